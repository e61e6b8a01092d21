import fs from 'node:fs';
import fc from 'fast-check';
import { beforeAll, describe, expect, it } from 'vitest';
import { members } from '../../lib/checkpoint/json.ts';
import { type Checkpoint, openCheckpoint, openCheckpointSync } from '../../lib/checkpoint.ts';
import { HeddleError } from '../../lib/errors.ts';
import { CheckpointFolder, using } from '../helpers/checkpointFiles.ts';
import {
  bytesOf,
  headerOf,
  rawSafetensors,
  type TensorBytes,
  writeSafetensors,
} from '../helpers/safetensors.ts';

const files = new CheckpointFolder();
const { fresh } = files;

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
