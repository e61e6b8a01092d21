import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { CHUNK_BYTES, type FileSource } from '../lib/checkpoint/file.ts';
import { MAX_HEADER_BYTES } from '../lib/checkpoint/header.ts';
import { members } from '../lib/checkpoint/json.ts';
import { Checkpoint, openCheckpoint, openCheckpointSync, toHostOrder } from '../lib/checkpoint.ts';
import { HeddleError } from '../lib/errors.ts';
import { Tensor } from '../lib/tensor.ts';
import {
  bytesOf,
  headerOf,
  rawSafetensors,
  type TensorBytes,
  writeSafetensors,
} from './helpers/safetensors.ts';

let root: string;
let count = 0;

beforeAll(() => {
  root = fs.mkdtempSync(path.join(os.tmpdir(), 'heddle-checkpoint-'));
});
afterAll(() => {
  fs.rmSync(root, { recursive: true, force: true });
});

const fresh = (name = 'm.safetensors') => {
  const dir = path.join(root, `d${count++}`);
  fs.mkdirSync(dir);
  return path.join(dir, name);
};
const write = (bytes: Uint8Array | string, name?: string) => {
  const file = fresh(name);
  fs.writeFileSync(file, bytes);
  return file;
};
const failure = (run: () => unknown): HeddleError => {
  try {
    run();
  } catch (error) {
    expect(error).toBeInstanceOf(HeddleError);
    return error as HeddleError;
  }
  throw new Error('expected an error');
};
const failureOf = async (promise: Promise<unknown>): Promise<HeddleError> => {
  const error = await promise.then(
    () => new Error('expected an error'),
    (e) => e,
  );
  expect(error).toBeInstanceOf(HeddleError);
  return error;
};
/** Opens both ways; both must be refused with the same ERR_CHECKPOINT that says all of `parts`. */
const refused = async (file: string, ...parts: (string | RegExp)[]) => {
  const sync = failure(() => openCheckpointSync(file));
  const async = await failureOf(openCheckpoint(file));
  expect(sync.code).toBe('ERR_CHECKPOINT');
  expect(async.code).toBe('ERR_CHECKPOINT');
  expect(async.message).toBe(sync.message);
  for (const part of parts) expect(sync.message).toMatch(part);
  return sync;
};
const f32 = (...values: number[]): TensorBytes => ({
  dtype: 'F32',
  dims: [values.length],
  bytes: bytesOf(new Float32Array(values)),
});
const using = <T>(checkpoint: Checkpoint, body: (c: Checkpoint) => T): T => {
  try {
    return body(checkpoint);
  } finally {
    checkpoint.close();
  }
};
interface IndexJson {
  metadata?: unknown;
  weight_map: Record<string, unknown>;
}
/** Shards `a`, `b` with one tensor each, and an index; `edit` may damage the index. */
const sharded = (edit: (index: IndexJson) => unknown = (index) => index) => {
  const index = fresh('model.safetensors.index.json');
  const dir = path.dirname(index);
  writeSafetensors(path.join(dir, 'a.safetensors'), { x: f32(1, 2) }, { format: 'pt', only: 'a' });
  writeSafetensors(path.join(dir, 'b.safetensors'), { y: f32(3), z: f32(4, 5, 6) }, { format: 'np' });
  const content = edit({
    metadata: { total_size: 24 },
    weight_map: { x: 'a.safetensors', y: 'b.safetensors', z: 'b.safetensors' },
  });
  fs.writeFileSync(index, typeof content === 'string' ? content : JSON.stringify(content));
  return { dir, index };
};

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
    const error = failure(() => checkpoint.readSync('t'));
    expect(error.code).toBe('ERR_DTYPE');
    expect(error.message).toContain(dtype);
    expect((await failureOf(checkpoint.read('t'))).code).toBe('ERR_DTYPE');
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
      failure(() => c.info('nope')),
      failure(() => c.readSync('nope')),
      failure(() => c.readBytesSync('nope')),
      await failureOf(c.read('nope')),
      await failureOf(c.readRange('nope', 0, 1)),
    ]) {
      expect(error.code).toBe('ERR_CHECKPOINT');
      expect(error.message).toContain(`${file}: there is no tensor "nope"`);
    }
    expect(failure(() => c.readSync(3 as never)).code).toBe('ERR_ARGUMENT');
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
    const error = failure(() => c.readRangeSync(name, first as number, rows as number));
    expect(error.code).toBe(code);
    expect((await failureOf(c.readRange(name, first as number, rows as number))).message).toBe(error.message);
    c.close();
  });
});

describe('damaged files', () => {
  const entry = (dtype: unknown, shape: unknown, offsets: unknown) =>
    JSON.stringify({ dtype, shape, data_offsets: offsets });
  const good = entry('U8', [2], [0, 2]);
  const two = new Uint8Array(2);

  it('refuses truncated files', async () => {
    await refused(write(''), /truncated: 0 bytes/);
    const five = write('hello');
    await refused(five, five, /truncated: 5 bytes/);
    await refused(write(new Uint8Array(8)), /the header is not a JSON object/);
    const bytes = rawSafetensors(`{"a":${good}}`, two);
    await refused(write(bytes.subarray(0, 20)), /truncated: the header claims 53 bytes, the file has 20/);
    await refused(write(bytes.subarray(0, bytes.length - 1)), /tensor "a" lies outside the file \(truncated/);
  });

  it.each([
    ['longer than the file', 1000n, /claims 1000 bytes, the file has/],
    ['one byte too long', 56n, /claims 56 bytes/],
    [
      'just over the limit',
      BigInt(MAX_HEADER_BYTES) + 1n,
      /claims 100000001 bytes; the format allows 100000000/,
    ],
    ['of 100 GB', 100_000_000_000n, /claims 100000000000 bytes/],
    ['of 2^64 - 1', 2n ** 64n - 1n, /claims 18446744073709551615 bytes/],
  ])('refuses a header length %s without allocating it', async (_, length, message) => {
    const before = process.memoryUsage().arrayBuffers;
    await refused(write(rawSafetensors(`{"a":${good}}`, two, length)), message);
    expect(process.memoryUsage().arrayBuffers - before).toBeLessThan(1e6);
  });

  it.each([
    ['not JSON', 'hello world', /the header is not a JSON object/],
    ['an array', '[]', /the header is not a JSON object/],
    ['a string', '"{}"', /the header is not a JSON object/],
    ['null', 'null', /the header is not a JSON object/],
    ['cut short', '{"a":{"dtype":"U8"', /does not end/],
    ['cut in a string', '{"a', /string at character 1 does not end/],
    ['cut in an escape', '{"a\\', /string at character 1 does not end/],
    ['cut after the colon', '{"a":', /expected a value at character 5, found the end/],
    ['with a trailing comma', `{"a":${good},}`, /expected a key/],
    ['without a colon', '{"a" 1}', /expected ':'/],
    ['without a comma', `{"a":${good} "b":1}`, /expected ',' or '}'/],
    ['with text behind it', `{"a":${good}} x`, /expected the end/],
    ['two objects', `{"a":${good}}{}`, /expected the end/],
    ['with zero bytes behind it', `{"a":${good}}\0`, /expected the end/],
    ['with a byte order mark', `\ufeff{"a":${good}}`, /not a JSON object/],
    ['with a bad escape in a name', `{"\\x":${good}}`, /not valid JSON/],
    ['with a raw newline in a name', `{"a\n":${good}}`, /not valid JSON/],
    ['with half a surrogate pair in a name', `{"\\ud800":${good}}`, /not valid Unicode/],
    ['with mismatched brackets', '{"a":[}}', /does not end|not a JSON object/],
    ['nested 10^6 deep', `{"a":${'['.repeat(1e6)}${']'.repeat(1e6)}}`, /deeper than 128/],
  ])('refuses a header %s', async (_, text, message) => {
    const file = write(rawSafetensors(text, two));
    await refused(file, file, message);
  });

  it('refuses invalid UTF-8', async () => {
    const text = Buffer.from(`{"a?":${good}}`);
    text[text.indexOf('?')] = 0xff;
    await refused(write(rawSafetensors(text, two)), /not valid UTF-8/);
  });

  it.each([
    ['plain', '"a"', '"a"'],
    ['empty', '""', '""'],
    ['escaped', '"a"', '"\\u0061"'],
    ['escaped in two ways', '"\\n/"', '"\\u000a\\/"'],
    ['with quotes and backslashes', '"\\\\\\""', '"\\u005c\\u0022"'],
    ['__proto__', '"__proto__"', '"__proto__"'],
    ['astral', '"🧵"', '"\\ud83e\\uddf5"'],
  ])('refuses a name that occurs twice: %s', async (_, first, second) => {
    const name = JSON.stringify(JSON.parse(first));
    const text = `{${first}:${good},${second}:${good}}`;
    const error = await refused(write(rawSafetensors(text, two)), /twice/);
    expect(error.message).toContain(name);
  });

  it('refuses other duplicate keys, and is not fooled by keys inside values', async () => {
    await refused(
      write(rawSafetensors(`{"a":{"dtype":"U8",${good.slice(1)}}`, two)),
      /"a" has the key "dtype" twice/,
    );
    await refused(write(rawSafetensors(`{"__metadata__":{},"__metadata__":{},"a":${good}}`, two)), /twice/);
    await refused(write(rawSafetensors(`{"__metadata__":{"k":"1","k":"2"},"a":${good}}`, two)), /"k" twice/);
    const text = `{"__metadata__":{"a":"\\",\\"a\\":{"},"a":${good}}`;
    using(openCheckpointSync(write(rawSafetensors(text, two))), (c) => {
      expect(c.metadata).toEqual({ a: '","a":{' });
    });
  });

  it.each([
    ['an unknown dtype', entry('F7', [2], [0, 2]), /unknown dtype "F7"; known: F64/],
    ['a dtype in small letters', entry('u8', [2], [0, 2]), /unknown dtype/],
    ['a dtype that is a number', entry(8, [2], [0, 2]), /unknown dtype 8/],
    ['a dtype that is null', entry(null, [2], [0, 2]), /unknown dtype null/],
    ['a dtype named like a method', entry('constructor', [2], [0, 2]), /unknown dtype/],
    ['a negative dim', entry('U8', [-2], [0, 2]), /shape \[-2\]/],
    ['a negative zero', '{"dtype":"U8","shape":[-0],"data_offsets":[0,2]}', /shape/],
    ['a fractional dim', entry('U8', [1.5], [0, 2]), /shape \[1.5\]/],
    ['a string dim', entry('U8', ['2'], [0, 2]), /shape \["2"\]/],
    ['a null dim', entry('U8', [null], [0, 2]), /shape/],
    ['a nested shape', entry('U8', [[2]], [0, 2]), /shape/],
    ['a shape that is a number', entry('U8', 2, [0, 2]), /shape 2/],
    ['a shape that is an object', entry('U8', { length: 1, 0: 2 }, [0, 2]), /shape/],
    ['a dim beyond 2^53', '{"dtype":"U8","shape":[9007199254740993],"data_offsets":[0,2]}', /shape/],
    ['a dim of 1e999', '{"dtype":"U8","shape":[1e999],"data_offsets":[0,2]}', /shape/],
    ['dims that overflow', entry('U8', [2 ** 40, 2 ** 40], [0, 2]), /overflows/],
    ['dims that overflow before a zero', entry('U8', [2 ** 40, 2 ** 40, 0], [0, 2]), /overflows/],
    ['100 000 dims', entry('U8', new Array(100_000).fill(1), [0, 2]), /field "shape" of/],
    ['offsets that are strings', entry('U8', [2], ['0', '2']), /data_offsets/],
    ['one offset', entry('U8', [2], [2]), /data_offsets \[2\]/],
    ['three offsets', entry('U8', [2], [0, 2, 2]), /data_offsets \[0,2,2\]/],
    ['offsets that are null', entry('U8', [2], null), /data_offsets null/],
    ['a negative offset', entry('U8', [2], [-1, 1]), /data_offsets/],
    ['a fractional offset', entry('U8', [2], [0, 1.5]), /data_offsets/],
    ['begin after end', entry('U8', [2], [2, 0]), /end before they begin/],
    ['offsets behind the file', entry('U8', [2], [0, 4]), /needs 2 bytes, its data_offsets hold 4/],
    ['offsets out of range', entry('U8', [4], [0, 4]), /lies outside the file/],
    ['offsets of 2^52', entry('U8', [2], [2 ** 52, 2 ** 52 + 2]), /lies outside the file/],
    ['a size that is not its shape', entry('U8', [1], [0, 2]), /needs 1 bytes, its data_offsets hold 2/],
    ['a size that is not its dtype', entry('F32', [2], [0, 2]), /needs 8 bytes, its data_offsets hold 2/],
    ['half a byte', entry('F4', [5], [0, 2]), /whole bytes/],
    ['no dtype', '{"shape":[2],"data_offsets":[0,2]}', /has no dtype/],
    ['no shape', '{"dtype":"U8","data_offsets":[0,2]}', /has no shape/],
    ['no offsets', '{"dtype":"U8","shape":[2]}', /has no data_offsets/],
    ['an entry that is null', 'null', /is not a JSON object/],
    ['an entry that is an array', '[]', /is not a JSON object/],
    ['an entry that is not JSON', 'nonsense', /is not a JSON object/],
    ['a field that is not JSON', '{"dtype":U8}', /not valid JSON/],
    [
      'a thousand fields',
      JSON.stringify(Object.fromEntries(Array.from({ length: 1000 }, (_, i) => [i, i]))),
      /more than 64 keys/,
    ],
  ])('refuses a tensor with %s', async (_, text, message) => {
    const file = write(rawSafetensors(`{"the.name":${text}}`, two));
    await refused(file, file, /tensor "the.name" /, message);
  });

  it.each([
    ['overlap', { a: [0, 2], b: [1, 3] }, 3, /tensor "b" overlaps another tensor/],
    ['lie on each other', { a: [0, 2], b: [0, 2] }, 2, /tensor "b" overlaps/],
    ['leave a hole', { a: [0, 2], b: [3, 5] }, 5, /tensor "b" leaves a hole/],
    ['begin late', { a: [1, 3] }, 3, /tensor "a" leaves a hole/],
    ['end early', { a: [0, 2] }, 5, /3 bytes after the last tensor/],
    ['are none, with data', {}, 5, /5 bytes after the last tensor/],
  ])('refuses tensors that %s', async (_, tensors, size, message) => {
    const parts = Object.entries(tensors as Record<string, number[]>).map(
      ([name, [begin, end]]) => `"${name}":${entry('U8', [end - begin], [begin, end])}`,
    );
    await refused(write(rawSafetensors(`{${parts}}`, new Uint8Array(size))), message);
  });

  it.each(['null', '[]', '"x"', '{"a":1}', '{"a":null}', '{"a":{"b":"c"}}', '{"a":["b"]}', '{"a":tru}'])(
    'refuses __metadata__ %s',
    async (value) => {
      await refused(write(rawSafetensors(`{"__metadata__":${value},"a":${good}}`, two)), /__metadata__/);
    },
  );

  it('keeps messages short for very long names', async () => {
    const error = await refused(write(rawSafetensors(`{"${'n'.repeat(1e6)}":null}`)));
    expect(error.message.length).toBeLessThan(1000);
  });
});

describe('finding the files', () => {
  it('reads an index and its shards, by directory or index path', async () => {
    const { dir, index } = sharded();
    for (const given of [dir, index]) {
      const c = await openCheckpoint(given);
      expect([...c.tensors.keys()]).toEqual(['x', 'y', 'z']);
      expect(c.info('x').file).toBe(path.join(dir, 'a.safetensors'));
      expect(c.info('z').file).toBe(path.join(dir, 'b.safetensors'));
      expect(c.readSync('x').data).toEqual(new Float32Array([1, 2]));
      expect((await c.read('z')).data).toEqual(new Float32Array([4, 5, 6]));
      expect({ ...c.metadata }).toEqual({ format: 'pt', only: 'a' });
      c.close();
    }
  });

  it('prefers the index, then model.safetensors, then the only file', async () => {
    const { dir, index } = sharded();
    writeSafetensors(path.join(dir, 'model.safetensors'), { single: f32(1) });
    const names = () => using(openCheckpointSync(dir), (c) => [...c.tensors.keys()]);
    expect(names()).toEqual(['x', 'y', 'z']);
    fs.rmSync(index);
    expect(names()).toEqual(['single']);
    fs.rmSync(path.join(dir, 'model.safetensors'));
    await refused(dir, dir, /holds 2 \*\.safetensors files \(a.safetensors, b.safetensors\)/);
    fs.rmSync(path.join(dir, 'b.safetensors'));
    expect(names()).toEqual(['x']);
    fs.rmSync(path.join(dir, 'a.safetensors'));
    await refused(dir, dir, /holds no safetensors file/);
  });

  it('finds an index of another stem', () => {
    const { dir, index } = sharded();
    fs.renameSync(index, path.join(dir, 'diffusion_pytorch_model.safetensors.index.json'));
    using(openCheckpointSync(dir), (c) => expect(c.tensors.size).toBe(3));
  });

  it('keeps tensors that the index does not list, and shards in folders below', () => {
    const { dir } = sharded((index) => {
      delete index.weight_map['z'];
      index.weight_map['w'] = 'sub/c.safetensors';
      return index;
    });
    fs.mkdirSync(path.join(dir, 'sub'));
    writeSafetensors(path.join(dir, 'sub', 'c.safetensors'), { w: f32(9) });
    using(openCheckpointSync(dir), (c) => expect([...c.tensors.keys()]).toEqual(['x', 'y', 'z', 'w']));
  });

  it.skipIf(process.platform === 'win32')('follows symbolic links, as model caches use them', () => {
    const { dir, index } = sharded();
    const snapshot = path.join(dir, 'snapshot');
    fs.mkdirSync(snapshot);
    for (const name of [path.basename(index), 'a.safetensors', 'b.safetensors']) {
      fs.symlinkSync(path.join('..', name), path.join(snapshot, name));
    }
    using(openCheckpointSync(snapshot), (c) => expect(c.tensors.size).toBe(3));
  });

  it('refuses what is not there or not a file', async () => {
    const missing = path.join(root, 'missing');
    await refused(missing, `${missing}: no such file or directory`);
    await refused(path.join(write('x'), 'below-a-file'), /no such file/);
    const { dir } = sharded();
    fs.mkdirSync(path.join(dir, 'model.safetensors'));
    fs.rmSync(path.join(dir, 'model.safetensors.index.json'));
    await refused(dir, /model\.safetensors: (is not a regular file|cannot be read)/);
    expect((await failureOf(openCheckpoint('a\0b'))).code).toBe('ERR_CHECKPOINT');
    for (const bad of ['', undefined, null, 3, {}]) {
      expect(failure(() => openCheckpointSync(bad as never)).code).toBe('ERR_ARGUMENT');
      expect((await failureOf(openCheckpoint(bad as never))).code).toBe('ERR_ARGUMENT');
    }
    const option = await failureOf(openCheckpoint(dir, { map: 'always' as never }));
    expect(option.code).toBe('ERR_OPTION');
    expect(option.message).toContain('"always"');
  });

  it.skipIf(process.platform === 'win32')('does not wait on a named pipe', async () => {
    const pipe = fresh();
    execFileSync('mkfifo', [pipe]);
    await refused(pipe, /not a regular file/);
  });

  it('refuses an index that does not fit its shards', async () => {
    const missing = sharded();
    fs.rmSync(path.join(missing.dir, 'b.safetensors'));
    await refused(missing.dir, /b\.safetensors: no such file/);

    const absent = sharded((index) => ({
      ...index,
      weight_map: { ...index.weight_map, gone: 'b.safetensors' },
    }));
    await refused(absent.dir, /b\.safetensors: tensor "gone" is missing; .*index\.json promises it here/);

    const wrong = sharded((index) => ({
      ...index,
      weight_map: { ...index.weight_map, y: 'a.safetensors' },
    }));
    await refused(wrong.dir, /a\.safetensors: tensor "y" is missing/);

    const earlier = sharded(() => ({ weight_map: { y: 'b.safetensors', z: 'a.safetensors' } }));
    await refused(earlier.dir, /a\.safetensors: tensor "z" is missing/);

    const twice = sharded();
    writeSafetensors(path.join(twice.dir, 'b.safetensors'), { y: f32(3), z: f32(1), x: f32(1) });
    await refused(twice.dir, /b\.safetensors: tensor "x" is also in .*a\.safetensors/);

    const damaged = sharded();
    fs.truncateSync(path.join(damaged.dir, 'b.safetensors'), 5);
    await refused(damaged.dir, /b\.safetensors: truncated/);
  });

  it.each([
    '../a.safetensors',
    'sub/../../a.safetensors',
    'sub/../a.safetensors',
    '/etc/passwd',
    '..',
    '.',
    '',
    './a.safetensors',
    'sub//a.safetensors',
    '..\\a.safetensors',
    'C:\\a.safetensors',
    'C:a.safetensors',
    '\\\\host\\a.safetensors',
    'a.safetensors\0',
    5,
    null,
    ['a.safetensors'],
  ])('refuses the shard name %j', async (name) => {
    // Files exist where a traversal would lead, so only the check can refuse.
    const { dir } = sharded((index) => ({ weight_map: { ...index.weight_map, t: name } }));
    fs.mkdirSync(path.join(dir, 'sub'));
    writeSafetensors(path.join(root, 'a.safetensors'), { t: f32(1), x: f32(1) });
    await refused(dir, /index\.json: tensor "t" is mapped to/);
  });

  it.each([
    ['not JSON', 'nonsense', /not a JSON object/],
    ['an array', '[]', /not a JSON object/],
    ['cut short', '{"weight_map":{"x":"a.safe', /does not end/],
    ['without weight_map', '{"metadata":{}}', /has no weight_map/],
    ['with a weight_map of another kind', '{"weight_map":["a"]}', /weight_map is not a JSON object/],
    ['with a tensor twice', '{"weight_map":{"x":"a.safetensors","x":"b.safetensors"}}', /"x" twice/],
    ['with bad metadata', '{"metadata":{nonsense},"weight_map":{}}', /not valid JSON/],
  ])('refuses an index %s', async (_, text, message) => {
    const { dir, index } = sharded(() => text);
    await refused(dir, index, message);
  });

  it('reads config.json beside the weights', async () => {
    const file = fresh('model.safetensors');
    writeSafetensors(file, { a: f32(1) });
    using(openCheckpointSync(file), (c) => expect(c.config).toBeUndefined());
    const config = path.join(path.dirname(file), 'config.json');
    fs.writeFileSync(config, '{"model_type":"mixtral","num_local_experts":8}');
    for (const given of [file, path.dirname(file)]) {
      using(openCheckpointSync(given), (c) => {
        expect(c.config).toEqual({ model_type: 'mixtral', num_local_experts: 8 });
      });
    }
    for (const bad of ['{"a":', '[]', 'null', '', Buffer.from([0x22, 0xff, 0x22])]) {
      fs.writeFileSync(config, bad);
      await refused(file, config);
    }
    fs.truncateSync(config, 9 * 1024 * 1024);
    await refused(file, config, /at most/);
  });
});

describe('life of a checkpoint', () => {
  const simple = () => {
    const file = fresh();
    writeSafetensors(file, { a: f32(1, 2, 3) });
    return file;
  };

  it('refuses reads after close, keeps what was read', async () => {
    const c = await openCheckpoint(simple());
    const tensor = await c.read('a');
    c.close();
    c.close();
    for (const error of [
      failure(() => c.readSync('a')),
      failure(() => c.readRangeSync('a', 0, 1)),
      failure(() => c.readBytesSync('a')),
      await failureOf(c.read('a')),
      await failureOf(c.readRange('a', 0, 1)),
      await failureOf(c.readBytes('a')),
    ]) {
      expect(error.code).toBe('ERR_DISPOSED');
    }
    expect(failure(() => c.readRangeSync('a', 0, 0)).code).toBe('ERR_DISPOSED'); // though nothing is read
    expect(tensor.data).toEqual(new Float32Array([1, 2, 3]));
    expect(c.has('a')).toBe(true);
    expect(c.info('a').dims).toEqual([3]);
  });

  it('closes by Symbol.dispose', () => {
    const c = openCheckpointSync(simple());
    c[Symbol.dispose]();
    expect(failure(() => c.readSync('a')).code).toBe('ERR_DISPOSED');
  });

  it.skipIf(!fs.existsSync('/proc/self/fd'))(
    'leaves no file open: closed, refused, or closed in mid-read',
    async () => {
      const open = () =>
        fs.readdirSync('/proc/self/fd').filter((fd) => {
          try {
            return fs.readlinkSync(`/proc/self/fd/${fd}`).startsWith(root);
          } catch {
            return false;
          }
        }).length;
      const { dir } = sharded();
      const c = await openCheckpoint(dir);
      expect(open()).toBe(2);
      c.close();
      expect(open()).toBe(0);
      fs.truncateSync(path.join(dir, 'b.safetensors'), 50);
      await refused(dir);
      expect(open()).toBe(0);

      const file = fresh();
      const bytes = new Uint8Array(CHUNK_BYTES * 3);
      writeSafetensors(file, { big: { dtype: 'U8', dims: [bytes.length], bytes } });
      const big = await openCheckpoint(file);
      const reading = [big.read('big'), big.read('big')].map(failureOf);
      big.close();
      for (const error of await Promise.all(reading)) expect(error.code).toBe('ERR_DISPOSED');
      expect(open()).toBe(0);
    },
  );

  it.skipIf(!fs.existsSync('/proc/self/fd'))(
    'closes the files of a checkpoint that was forgotten',
    async () => {
      setFlagsFromString('--expose-gc');
      const gc = runInNewContext('gc') as () => void;
      const file = simple();
      const isOpen = () =>
        fs.readdirSync('/proc/self/fd').some((fd) => {
          try {
            return fs.readlinkSync(`/proc/self/fd/${fd}`) === fs.realpathSync(file);
          } catch {
            return false;
          }
        });
      // In a function of its own, so that no register of this one keeps the checkpoint.
      const read = () => openCheckpoint(file).then((c) => c.read('a'));
      expect((await read()).data).toEqual(new Float32Array([1, 2, 3]));
      expect(isOpen()).toBe(true);
      for (let i = 0; i < 100 && isOpen(); i++) {
        gc();
        await new Promise((resolve) => setTimeout(resolve, 10));
      }
      expect(isOpen()).toBe(false);
    },
  );

  it('is aborted before, during and not after', async () => {
    const file = fresh();
    const bytes = new Uint8Array(CHUNK_BYTES * 4);
    writeSafetensors(file, { big: { dtype: 'U8', dims: [4, bytes.length / 4], bytes } });
    const c = await openCheckpoint(file);
    const reason = new Error('enough');
    const done = AbortSignal.abort(reason);
    for (const promise of [
      c.read('big', { signal: done }),
      c.readRange('big', 0, 0, { signal: done }),
      c.readBytes('big', { signal: done }),
    ]) {
      const error = await failureOf(promise);
      expect(error.code).toBe('ERR_ABORTED');
      expect(error.cause).toBe(reason);
    }
    const during = new AbortController();
    const promise = c.read('big', { signal: during.signal });
    during.abort(reason);
    expect((await failureOf(promise)).code).toBe('ERR_ABORTED');

    const after = new AbortController();
    expect((await c.read('big', { signal: after.signal })).size).toBe(bytes.length);
    after.abort();
    expect((await failureOf(c.read('big', { signal: 'no' as never }))).code).toBe('ERR_OPTION');
    expect((await failureOf(c.read('big', { signal: null as never }))).code).toBe('ERR_OPTION');
    c.close();
  });

  it('notices a file that became shorter', async () => {
    const file = simple();
    const c = openCheckpointSync(file);
    fs.truncateSync(file, fs.statSync(file).size - 1);
    for (const error of [failure(() => c.readSync('a')), await failureOf(c.read('a'))]) {
      expect(error.code).toBe('ERR_CHECKPOINT');
      expect(error.message).toContain(`${file}: tensor "a" could not be read: the file ends at byte`);
    }
    expect(c.readRangeSync('a', 0, 2).data).toEqual(new Float32Array([1, 2]));
    c.close();
  });

  it.skipIf(process.platform === 'win32')('keeps reading the file it opened when that is replaced', () => {
    const file = simple();
    const c = openCheckpointSync(file);
    writeSafetensors(`${file}.new`, { a: f32(7, 8, 9) });
    fs.renameSync(`${file}.new`, file);
    expect(c.readSync('a').data).toEqual(new Float32Array([1, 2, 3]));
    c.close();
  });

  it('gives ERR_MEMORY for a tensor too large for memory, without touching the file', async () => {
    const file = fresh();
    const size = 2 ** 43;
    const head = rawSafetensors(
      JSON.stringify({ a: { dtype: 'U8', shape: [2, size / 2], data_offsets: [0, size] } }),
    );
    fs.writeFileSync(file, head);
    fs.truncateSync(file, head.length + size);
    const c = openCheckpointSync(file);
    expect(c.info('a').byteLength).toBe(size);
    expect(failure(() => c.readSync('a')).code).toBe('ERR_MEMORY');
    expect((await failureOf(c.readBytes('a'))).code).toBe('ERR_MEMORY');
    c.close();
  });

  it('takes mapped memory where the source offers it, and reads where it does not', async () => {
    const memory = new Float32Array([10, 20, 30, 40]);
    const calls: [number, number][] = [];
    let maps = true;
    const source: FileSource = {
      path: 'fake',
      size: 24,
      read: async (offset, target) => source.readSync(offset, target),
      readSync: (_, target) => target.fill(0).byteLength,
      close: () => {},
      map: (offset, length) => {
        calls.push([offset, length]);
        return maps ? memory.buffer.slice(offset - 8, offset - 8 + length) : undefined;
      },
    };
    const info = {
      name: 'a',
      dtype: 'F32',
      type: 'float32' as const,
      dims: [2, 2],
      byteLength: 16,
      file: 'fake',
    };
    const place = { info, source, offset: 8 };
    const base = {
      path: 'fake',
      places: new Map([['a', place]]),
      sources: [source],
      metadata: {},
      config: {},
    };
    const auto = new Checkpoint({ ...base, map: true });
    expect((await auto.read('a')).data).toEqual(memory);
    expect(auto.readRangeSync('a', 1, 1)).toMatchObject({ dims: [1, 2], data: memory.slice(2) });
    expect(calls).toEqual([
      [8, 16],
      [16, 8],
    ]);
    maps = false;
    expect(auto.readSync('a').data).toEqual(new Float32Array(4));
    expect(calls.length).toBe(3);
    expect(new Checkpoint({ ...base, map: false }).readSync('a').data).toEqual(new Float32Array(4));
    expect(calls.length).toBe(3);
  });

  it('gives frozen infos', () => {
    using(openCheckpointSync(simple()), (c) => {
      expect(Object.isFrozen(c.info('a'))).toBe(true);
      expect(Object.isFrozen(c.info('a').dims)).toBe(true);
      expect(Object.isFrozen(c.metadata)).toBe(true);
    });
  });
});

describe('properties', () => {
  const sizes: Record<string, number> = { F64: 8, F32: 4, BF16: 2, I8: 1, U64: 8, BOOL: 1, F8_E4M3: 1 };
  const tensor = fc
    .tuple(
      fc.constantFrom(...Object.keys(sizes)),
      fc.array(fc.nat(4), { maxLength: 4 }),
      fc.infiniteStream(fc.nat(255)),
    )
    .map(([dtype, dims, stream]): TensorBytes => {
      const length = dims.reduce((a, b) => a * b, 1) * sizes[dtype];
      return { dtype, dims, bytes: Uint8Array.from(stream.take(length)) };
    });
  const name = fc
    .oneof(
      fc.string(),
      fc.string({ unit: 'binary' }),
      fc.constantFrom('__proto__', '"', '\\', '\\"', '\\u0061'),
    )
    .filter((n) => n !== '__metadata__');
  const model = fc.uniqueArray(fc.tuple(name, tensor), { selector: ([n]) => n, maxLength: 5 });
  const bytes = model.map((tensors) => {
    const { text, data } = headerOf(tensors);
    return rawSafetensors(text, data);
  });
  let file: string;
  beforeAll(() => {
    file = fresh();
  });

  /** Opens and reads everything; the only error allowed is ERR_CHECKPOINT. True when it was readable. */
  const survives = (content: Uint8Array): boolean => {
    fs.writeFileSync(file, content);
    let c: Checkpoint;
    try {
      c = openCheckpointSync(file);
    } catch (error) {
      expect(error).toBeInstanceOf(HeddleError);
      expect(error).toMatchObject({ code: 'ERR_CHECKPOINT', message: expect.stringContaining(file) });
      return false;
    }
    using(c, () => {
      let total = 0;
      for (const [key, info] of c.tensors) {
        const raw = c.readBytesSync(key);
        total += raw.byteLength;
        expect(raw.byteLength).toBe(info.byteLength);
        if (info.type !== undefined) expect(bytesOf(c.readSync(key).data)).toEqual(raw);
      }
      const headerSize = Number(Buffer.from(content).readBigUInt64LE(0));
      expect(8 + headerSize + total).toBe(content.length);
    });
    return true;
  };

  it('reads back whatever was written', async () => {
    await fc.assert(
      fc.asyncProperty(model, async (tensors) => {
        writeSafetensors(file, tensors);
        const c = await openCheckpoint(file);
        expect([...c.tensors.keys()]).toEqual(tensors.map(([n]) => n));
        for (const [n, t] of tensors) {
          expect(c.info(n)).toMatchObject({ dtype: t.dtype, dims: t.dims, byteLength: t.bytes.length });
          expect(await c.readBytes(n)).toEqual(t.bytes);
          if (c.info(n).type !== undefined) expect(bytesOf((await c.read(n)).data)).toEqual(t.bytes);
        }
        c.close();
      }),
      { numRuns: 200 },
    );
  });

  it('takes random bytes without anything but ERR_CHECKPOINT', () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 64 }), fc.boolean(), (content, lengthIsTrue) => {
        // Most random lengths are refused at once: also try the content as a header of its true length.
        survives(lengthIsTrue ? rawSafetensors(content) : content);
      }),
      { numRuns: 500 },
    );
  });

  it('takes flipped bits: read properly or ERR_CHECKPOINT', () => {
    const outcomes = new Set<boolean>();
    fc.assert(
      fc.property(bytes, fc.array(fc.nat(), { minLength: 1, maxLength: 3 }), (content, flips) => {
        for (const flip of flips) content[(flip >>> 3) % content.length] ^= 1 << (flip & 7);
        outcomes.add(survives(content));
      }),
      { numRuns: 500 },
    );
    expect(outcomes).toEqual(new Set([true, false]));
  });

  it('refuses every truncation and every extension', () => {
    fc.assert(
      fc.property(bytes, fc.nat(), fc.uint8Array({ minLength: 1, maxLength: 9 }), (content, cut, more) => {
        expect(survives(content)).toBe(true);
        expect(survives(content.subarray(0, cut % content.length))).toBe(false);
        expect(survives(Buffer.concat([content, more]))).toBe(false);
      }),
      { numRuns: 200 },
    );
  });

  it('takes headers of any JSON in any place', () => {
    const value = fc.oneof(
      {
        weight: 3,
        arbitrary: fc.constantFrom('U8', 'F32', 0, 1, 2, 4, -1, 1e300, null, [], [0, 4], [4], [2, 2], {}),
      },
      { weight: 1, arbitrary: fc.jsonValue() },
    );
    const entry = fc.record({ dtype: value, shape: value, data_offsets: value }, { requiredKeys: [] });
    const header = fc.dictionary(
      fc.constantFrom('a', 'b', '__metadata__', '__proto__'),
      fc.oneof(entry, value),
    );
    fc.assert(
      fc.property(header, (h) => {
        survives(rawSafetensors(JSON.stringify(h), new Uint8Array(4)));
      }),
      { numRuns: 1000 },
    );
  });

  it('splits objects as JSON.parse does', () => {
    const fail = (reason: string) => new Error(reason);
    fc.assert(
      fc.property(
        fc.dictionary(name, fc.jsonValue({ maxDepth: 3 })),
        fc.constantFrom(0, 1, '\t'),
        (object, space) => {
          const text = JSON.stringify(object, null, space);
          const split = [...members(text, fail)].map(({ key, value }) => [key, JSON.parse(value)]);
          expect(split).toEqual(Object.entries(JSON.parse(text)));
        },
      ),
      { numRuns: 500 },
    );
  });

  it('refuses text exactly where JSON.parse does', () => {
    // Flat objects with short damage: whatever JSON.parse refuses must be refused, and the reverse.
    const text = fc
      .tuple(
        fc.dictionary(fc.string({ maxLength: 3 }), fc.jsonValue({ maxDepth: 1 })),
        fc.nat(),
        fc.constantFrom('', ...'{}[]",:\\ 0a\n'),
      )
      .map(([object, at, insert]) => {
        const good = JSON.stringify(object);
        const i = at % good.length;
        return good.slice(0, i) + insert + good.slice(i + (at % 2));
      });
    fc.assert(
      fc.property(text, (t) => {
        let parsed: unknown;
        try {
          parsed = JSON.parse(t);
        } catch {}
        const isObject =
          parsed !== undefined && parsed !== null && typeof parsed === 'object' && !Array.isArray(parsed);
        const fail = (reason: string) => new Error(reason);
        let split: [string, unknown][] | undefined;
        let reason = '';
        try {
          split = [...members(t, fail)].map(({ key, value }) => [key, JSON.parse(value)]);
        } catch (error) {
          reason = (error as Error).message;
        }
        if (isObject && !/twice|Unicode/.test(reason)) {
          expect(split && new Map(split)).toEqual(new Map(Object.entries(parsed as object)));
        }
        if (!isObject) expect(split).toBeUndefined();
      }),
      { numRuns: 1000 },
    );
  });
});
