import fs from 'node:fs';
import { describe, expect, it } from 'vitest';
import { CHUNK_BYTES } from '../../lib/checkpoint/file.ts';
import { openCheckpoint, openCheckpointSync, toHostOrder } from '../../lib/checkpoint.ts';
import { Tensor } from '../../lib/tensor.ts';
import { CheckpointFolder, f32, using } from '../helpers/checkpointFiles.ts';
import { rejection, thrown } from '../helpers/errors.ts';
import { bytesOf, rawSafetensors, writeSafetensors } from '../helpers/safetensors.ts';

const files = new CheckpointFolder();
const { fresh, write } = files;

describe('reading', () => {
  const types = [
    ['F64', 'float64', new Float64Array([1.5, -2, Number.NaN])],
    ['F32', 'float32', new Float32Array([1.5, -2, Number.POSITIVE_INFINITY])],
    ['F16', 'float16', new Uint16Array([0x3c00, 0xc000, 0x7e01])],
    ['BF16', 'bfloat16', new Uint16Array([0x3f80, 0xc000, 0x7fc1])],
    ['F8_E4M3', 'float8_e4m3', new Uint8Array([0, 0x7f, 0x80])],
    ['F8_E5M2', 'float8_e5m2', new Uint8Array([0, 0x7c, 0xff])],
    ['I64', 'int64', new BigInt64Array([1n, -(2n ** 63n), 2n ** 62n])],
    ['I32', 'int32', new Int32Array([1, -(2 ** 31), 5])],
    ['I8', 'int8', new Int8Array([1, -128, 5])],
    ['U8', 'uint8', new Uint8Array([1, 255, 5])],
    ['BOOL', 'uint8', new Uint8Array([1, 0, 1])],
  ] as const;

  it.each(types)('%s is read as %s, bit for bit', async (dtype, type, values) => {
    // A first tensor of 3 bytes leaves every wider type unaligned in the file.
    const file = fresh();
    writeSafetensors(file, {
      pad: { dtype: 'U8', dims: [3], bytes: new Uint8Array(3) },
      t: { dtype, dims: [3, 1], bytes: bytesOf(values) },
    });
    const checkpoint = await openCheckpoint(file);
    expect(checkpoint.info('t')).toEqual({
      name: 't',
      dtype,
      type,
      dims: [3, 1],
      byteLength: values.byteLength,
      file,
    });
    for (const tensor of [await checkpoint.read('t'), checkpoint.readSync('t')]) {
      expect(tensor).toBeInstanceOf(Tensor);
      expect(tensor.type).toBe(type);
      expect(tensor.dims).toEqual([3, 1]);
      expect(tensor.data.constructor).toBe(values.constructor);
      expect(bytesOf(tensor.data)).toEqual(bytesOf(values));
      // Read into memory of its own, of exactly its size.
      expect(tensor.data.byteOffset).toBe(0);
      expect(tensor.data.buffer.byteLength).toBe(values.byteLength);
    }
    checkpoint.close();
  });

  it.each([
    ['I16', 2],
    ['U16', 2],
    ['U32', 4],
    ['U64', 8],
    ['C64', 8],
    ['F8_E8M0', 1],
    ['F8_E4M3FNUZ', 1],
    ['F8_E5M2FNUZ', 1],
    ['F6_E2M3', 0.75],
    ['F6_E3M2', 0.75],
    ['F4', 0.5],
  ])('%s has no heddle type: listed, its bytes readable, read refused', async (dtype, size) => {
    const bytes = new Uint8Array(4 * size).map((_, i) => i + 1);
    const file = fresh();
    writeSafetensors(file, { t: { dtype, dims: [2, 2], bytes } });
    const checkpoint = await openCheckpoint(file);
    expect(checkpoint.info('t')).toMatchObject({ dtype, type: undefined, byteLength: 4 * size });
    expect(checkpoint.readBytesSync('t')).toEqual(bytes);
    expect(await checkpoint.readBytes('t')).toEqual(bytes);
    const error = thrown(() => checkpoint.readSync('t'));
    expect(error.code).toBe('ERR_DTYPE');
    expect(error.message).toContain(dtype);
    expect((await rejection(checkpoint.read('t'))).code).toBe('ERR_DTYPE');
    checkpoint.close();
  });

  it('reads scalars, empty tensors and a file without tensors', () => {
    const file = fresh();
    writeSafetensors(file, {
      scalar: { dtype: 'F32', dims: [], bytes: bytesOf(new Float32Array([7])) },
      empty: { dtype: 'F32', dims: [4, 0, 2], bytes: new Uint8Array(0) },
      huge: { dtype: 'I64', dims: [0, 2 ** 50], bytes: new Uint8Array(0) },
    });
    using(openCheckpointSync(file), (c) => {
      expect(c.readSync('scalar')).toMatchObject({ dims: [], data: new Float32Array([7]) });
      expect(c.readSync('empty')).toMatchObject({ dims: [4, 0, 2], data: new Float32Array(0) });
      expect(c.readSync('huge').dims).toEqual([0, 2 ** 50]);
    });
    using(openCheckpointSync(write(rawSafetensors('{}'))), (c) => expect(c.tensors.size).toBe(0));
  });

  it('accepts what the reference reader accepts: its own examples, padding, any order, extra fields', () => {
    const entry = '"test":{"dtype":"I32","shape":[2,2],"data_offsets":[0,16]}';
    for (const text of [
      `{${entry}}`,
      `  {${entry}}`,
      `{${entry}}     \n`,
      `\t{ "test" : {"dtype":"I32",\n"shape":[ 2, 2 ],"data_offsets":[0,16],"note":{"a":[1.5,null]}} }`,
    ]) {
      using(openCheckpointSync(write(rawSafetensors(text, new Uint8Array(16)))), (c) => {
        expect(c.readSync('test')).toMatchObject({ type: 'int32', dims: [2, 2] });
      });
    }
    const swapped =
      '{"b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]},"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}';
    using(openCheckpointSync(write(rawSafetensors(swapped, new Uint8Array([1, 2, 3])))), (c) => {
      expect([...c.tensors.keys()]).toEqual(['b', 'a']);
      expect(c.readSync('a').data).toEqual(new Uint8Array([1, 2]));
      expect(c.readSync('b').data).toEqual(new Uint8Array([3]));
    });
  });

  it('treats __proto__ and its like as names like any other', () => {
    const file = fresh();
    const names = ['__proto__', 'constructor', 'toString', '', 'ünï "q" \\ \n 🧵'];
    writeSafetensors(
      file,
      names.map((name, i) => [name, f32(i)] as const),
      JSON.parse('{"__proto__":"p","toString":"s"}'),
    );
    using(openCheckpointSync(file), (c) => {
      expect([...c.tensors.keys()]).toEqual(names);
      names.forEach((name, i) => {
        expect(c.has(name)).toBe(true);
        expect(c.readSync(name).data[0]).toBe(i);
      });
      expect(c.has('hasOwnProperty')).toBe(false);
      expect(Object.entries(c.metadata)).toEqual([
        ['__proto__', 'p'],
        ['toString', 's'],
      ]);
      expect(({} as Record<string, unknown>)['p']).toBeUndefined();
    });
    using(openCheckpointSync(file), (c) => expect(Object.getPrototypeOf(c.metadata)).toBeNull());
  });

  it('names a tensor that is not there', async () => {
    const file = fresh();
    writeSafetensors(file, { a: f32(1) });
    const c = openCheckpointSync(file);
    for (const error of [
      thrown(() => c.info('nope')),
      thrown(() => c.readSync('nope')),
      thrown(() => c.readBytesSync('nope')),
      await rejection(c.read('nope')),
      await rejection(c.readRange('nope', 0, 1)),
    ]) {
      expect(error.code).toBe('ERR_CHECKPOINT');
      expect(error.message).toContain(`${file}: there is no tensor "nope"`);
    }
    expect(thrown(() => c.readSync(3 as never)).code).toBe('ERR_ARGUMENT');
    c.close();
  });

  it('reads tensors of several chunks, many at once', async () => {
    const length = CHUNK_BYTES / 2 + 1000; // int32: two chunks and a bit
    const values = new Int32Array(length).map((_, i) => Math.imul(i, 2654435761));
    const file = fresh();
    writeSafetensors(file, {
      pad: f32(1),
      big: { dtype: 'I32', dims: [length], bytes: bytesOf(values) },
    });
    const c = await openCheckpoint(file);
    const [a, b] = await Promise.all([c.read('big'), c.read('big')]);
    for (const tensor of [a, b, c.readSync('big')]) {
      expect(Buffer.compare(bytesOf(tensor.data), bytesOf(values))).toBe(0);
    }
    c.close();
  });

  it('reads rows far beyond 4 GiB of a sparse file', async () => {
    const file = fresh();
    const rows = 3 * 1024;
    const inner = 1024 * 1024; // 3 GiB of U8, then 3 GiB more
    const text = JSON.stringify({
      a: { dtype: 'U8', shape: [rows, inner], data_offsets: [0, rows * inner] },
      b: { dtype: 'U8', shape: [rows, inner], data_offsets: [rows * inner, 2 * rows * inner] },
    });
    const head = rawSafetensors(text);
    fs.writeFileSync(file, head);
    fs.truncateSync(file, head.length + 2 * rows * inner);
    const fd = fs.openSync(file, 'r+');
    fs.writeSync(fd, Buffer.from([9, 8, 7]), 0, 3, head.length + (2 * rows - 1) * inner);
    fs.closeSync(fd);
    const c = openCheckpointSync(file);
    const row = await c.readRange('b', rows - 1, 1);
    expect(row.dims).toEqual([1, inner]);
    expect([...row.data.slice(0, 4)]).toEqual([9, 8, 7, 0]);
    expect(c.readRangeSync('b', rows - 2, 1).data.every((v) => v === 0)).toBe(true);
    c.close();
    fs.rmSync(file);
  });

  it('turns the bytes of each element on a big-endian host, and only there', () => {
    const bytes = [1, 2, 3, 4, 5, 6, 7, 8];
    const swapped = (size: number, little: boolean) => {
      const buffer = new Uint8Array(bytes).buffer;
      toHostOrder(buffer, size, little);
      return [...new Uint8Array(buffer)];
    };
    expect(swapped(2, false)).toEqual([2, 1, 4, 3, 6, 5, 8, 7]);
    expect(swapped(4, false)).toEqual([4, 3, 2, 1, 8, 7, 6, 5]);
    expect(swapped(8, false)).toEqual([8, 7, 6, 5, 4, 3, 2, 1]);
    expect(swapped(1, false)).toEqual(bytes);
    for (const size of [1, 2, 4, 8]) expect(swapped(size, true)).toEqual(bytes);
  });
});

describe('readRange', () => {
  const stack = () => {
    const file = fresh();
    writeSafetensors(file, {
      pad: { dtype: 'U8', dims: [1], bytes: new Uint8Array(1) },
      experts: {
        dtype: 'F32',
        dims: [4, 2, 3],
        bytes: bytesOf(Float32Array.from({ length: 24 }, (_, i) => i)),
      },
      scalar: { dtype: 'F32', dims: [], bytes: new Uint8Array(4) },
      none: { dtype: 'F32', dims: [0, 3], bytes: new Uint8Array(0) },
      u32: { dtype: 'U32', dims: [2], bytes: new Uint8Array(8) },
    });
    return openCheckpointSync(file);
  };

  it('gives any run of rows, the same both ways', async () => {
    const c = stack();
    const all = [...c.readSync('experts').data];
    for (let first = 0; first <= 4; first++) {
      for (let rows = 0; first + rows <= 4; rows++) {
        const sync = c.readRangeSync('experts', first, rows);
        expect(sync.dims).toEqual([rows, 2, 3]);
        expect([...sync.data]).toEqual(all.slice(first * 6, (first + rows) * 6));
        expect(sync.data.buffer.byteLength).toBe(rows * 24);
        expect(await c.readRange('experts', first, rows)).toEqual(sync);
      }
    }
    expect(c.readRangeSync('none', 0, 0).dims).toEqual([0, 3]);
    c.close();
  });

  it.each([
    ['experts', 4, 1, 'ERR_SHAPE'],
    ['experts', 0, 5, 'ERR_SHAPE'],
    ['experts', Number.MAX_SAFE_INTEGER, 2, 'ERR_SHAPE'],
    ['none', 0, 1, 'ERR_SHAPE'],
    ['scalar', 0, 1, 'ERR_SHAPE'],
    ['scalar', 0, 0, 'ERR_SHAPE'],
    ['experts', -1, 1, 'ERR_ARGUMENT'],
    ['experts', 0, 0.5, 'ERR_ARGUMENT'],
    ['experts', Number.NaN, 1, 'ERR_ARGUMENT'],
    ['experts', 0, undefined, 'ERR_ARGUMENT'],
    ['experts', '0', 1, 'ERR_ARGUMENT'],
    ['experts', Object.create(null), 1, 'ERR_ARGUMENT'],
    ['u32', 0, 1, 'ERR_DTYPE'],
  ])('refuses %s rows %s, %s', async (name, first, rows, code) => {
    const c = stack();
    const error = thrown(() => c.readRangeSync(name, first as number, rows as number));
    expect(error.code).toBe(code);
    expect((await rejection(c.readRange(name, first as number, rows as number))).message).toBe(error.message);
    c.close();
  });
});
