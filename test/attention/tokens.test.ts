import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import {
  gatherTokens,
  gatherTokensSync,
  maskTokens,
  scatterTokensSync,
  tokensFromMask,
} from '../../lib/attention/index.ts';
import { philox } from '../../lib/attention/philox.ts';
import { gatherRowsSync, Tensor } from '../../lib/index.ts';
import { tokenCases } from '../cases/attention/tokens.ts';
import { Random } from '../cases/random.ts';
import { everyVariant } from '../helpers/backends.ts';
import { testCases } from '../helpers/cases.ts';
import { expectRejection, testRefusals } from '../helpers/errors.ts';

testCases(tokenCases);

describe('philox', () => {
  // kat_vectors of Random123 (Salmon et al.): philox4x32 10.
  it.each([
    [
      [0, 0, 0, 0],
      [0, 0],
      [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8],
    ],
    [
      [0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff],
      [0xffffffff, 0xffffffff],
      [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd],
    ],
    [
      [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344],
      [0xa4093822, 0x299f31d0],
      [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1],
    ],
  ] as [[number, number, number, number], [number, number], number[]][])(
    'published vector %#',
    (counter, key, out) => {
      expect(philox(counter, key)).toEqual(out);
    },
  );
});

const kinds = ['random', 'tube', 'frame'] as const;
const shape = fc.record({
  frames: fc.integer({ min: 1, max: 9 }),
  patches: fc.integer({ min: 1, max: 20 }),
  batch: fc.integer({ min: 0, max: 3 }),
  ratio: fc.double({ min: 0, max: 0.95, noNaN: true }),
  kind: fc.constantFrom(...kinds),
  seed: fc.integer({ min: 0, max: Number.MAX_SAFE_INTEGER }),
});

describe('maskTokens', () => {
  it('property: counts, order, and every index of the result', () => {
    fc.assert(
      fc.property(shape, (o) => {
        const { frames, patches, batch, ratio, kind } = o;
        const m = maskTokens(o);
        const n = { random: frames * patches, tube: patches, frame: frames }[kind];
        const count = n - Math.floor(ratio * n);
        const each = count * { random: 1, tube: frames, frame: patches }[kind];
        expect(Array.from(m.batchOffsets)).toEqual(Array.from({ length: batch + 1 }, (_, b) => b * each));
        expect(m.indices.length).toBe(batch * each);
        for (let b = 0; b < batch; b++) {
          const own = Array.from(m.indices.slice(b * each, (b + 1) * each));
          expect(own).toEqual([...new Set(own)].sort((x, y) => x - y));
          const places = own.map((x) => [Math.floor(x / patches), x % patches]);
          for (let t = 0; t < frames; t++) {
            const [from, to] = [m.timeOffsets[b * frames + t], m.timeOffsets[b * frames + t + 1]];
            const frame = Array.from(m.indices.slice(from, to), (x) => x % patches);
            expect(frame).toEqual(places.filter(([time]) => time === t).map(([, patch]) => patch));
            if (kind === 'tube') expect(frame).toEqual(places.slice(0, count).map(([, patch]) => patch));
            if (kind === 'frame') expect([0, patches]).toContain(frame.length);
          }
          for (let p = 0; p < patches; p++) {
            const [from, to] = [m.patchOffsets[b * patches + p], m.patchOffsets[b * patches + p + 1]];
            const positions = Array.from(m.patchOrder.slice(from, to));
            expect(positions).toEqual(own.flatMap((x, i) => (x % patches === p ? [b * each + i] : [])));
          }
        }
        m.inverse.forEach((at, token) => {
          const b = Math.floor(token / (frames * patches));
          const own = m.indices.slice(b * each, (b + 1) * each);
          expect(at).toBe(
            own.includes(token % (frames * patches))
              ? b * each + own.indexOf(token % (frames * patches))
              : -1,
          );
        });
        const keep = new Tensor(
          'uint8',
          Uint8Array.from(m.inverse, (at) => (at < 0 ? 0 : 3)),
          [batch, frames, patches],
        );
        expect(tokensFromMask(keep)).toEqual(m);
      }),
      { numRuns: 200 },
    );
  });

  it('a mask depends on its seed and its place in the batch, not on the batch', () => {
    for (const kind of kinds) {
      const o = { frames: 16, patches: 49, ratio: 0.75, kind, seed: 2 ** 52 + 1 };
      const four = maskTokens({ ...o, batch: 4 });
      expect(maskTokens({ ...o, batch: 4 })).toEqual(four);
      const own = (b: number) => four.indices.slice(four.batchOffsets[b], four.batchOffsets[b + 1]);
      expect(maskTokens(o).indices).toEqual(own(0));
      expect(own(1)).not.toEqual(own(0));
      // 2^32 apart: only the upper half of the seed differs.
      expect(maskTokens({ ...o, seed: o.seed - 2 ** 32 }).indices).not.toEqual(own(0));
    }
    // Fixed for good: masks of a run can be drawn again by later versions.
    expect(Array.from(maskTokens({ frames: 3, patches: 7, ratio: 0.75, seed: 42 }).indices)).toEqual(PINNED);
  });

  it('the largest ratio below 1 keeps one', () => {
    for (const patches of [1, 3, 2 ** 10, 12345]) {
      expect(maskTokens({ frames: 1, patches, ratio: 1 - 2 ** -53, seed: 1 }).indices.length).toBe(1);
    }
  });

  it('every token is kept equally often', () => {
    const counts = new Float64Array(30);
    const runs = 4000;
    for (let seed = 0; seed < runs; seed++) {
      for (const i of maskTokens({ frames: 5, patches: 6, ratio: 0.7, seed }).indices) counts[i]++;
    }
    // 9 of 30 kept: variance per token 0.3 * 0.7 runs; chi-square of 29 degrees, below 60 with probability 0.9994.
    const expected = 0.3 * runs;
    const chi = counts.reduce((sum, c) => sum + (c - expected) ** 2 / (runs * 0.3 * 0.7), 0) * (29 / 30);
    expect(chi).toBeLessThan(60);
    expect(chi).toBeGreaterThan(8);
  });
});

describe.each(everyVariant())('gatherTokens and scatterTokens on $name', ({ options, use }) => {
  it('property: each is the adjoint of the other, and gathering undoes scattering', () => {
    use();
    fc.assert(
      fc.property(shape, fc.integer({ min: 1, max: 20 }), (o, width) => {
        const tokens = maskTokens(o);
        const random = new Random(o.seed | 0);
        const kept = tokens.indices.length;
        const all = o.frames * o.patches;
        // Small integers: sums are exact.
        const draw = (dims: number[]) => {
          const data = Float32Array.from({ length: dims.reduce((a, b) => a * b, 1) }, () =>
            random.integer(-9, 9),
          );
          return new Tensor('float32', data, dims);
        };
        const x = draw([o.batch, o.frames, o.patches, width]);
        const y = draw([kept, width]);
        const dot = (a: Tensor, b: Tensor) =>
          (a.data as Float32Array).reduce((sum, value, i) => sum + value * (b.data[i] as number), 0);
        const gathered = gatherTokensSync(x, tokens, options);
        const scattered = scatterTokensSync(y, tokens, options);
        expect(scattered.dims).toEqual([o.batch, all, width]);
        expect(dot(gathered, y)).toBe(dot(x, scattered));
        expect(gatherTokensSync(scattered, tokens, options).data).toEqual(y.data);
        const fill = draw([width]);
        const filled = scatterTokensSync(y, tokens, { ...options, fill }).data;
        tokens.inverse.forEach((at, i) => {
          const row = at < 0 ? fill.data : y.data.slice(at * width, (at + 1) * width);
          expect(filled.slice(i * width, (i + 1) * width)).toEqual(row);
        });
      }),
      { numRuns: 40 },
    );
  });

  it('gatherRows: any order, and a refused index', () => {
    use();
    const x = new Tensor('float32', Float32Array.of(1, 2, 3, 4, 5, 6), [3, 2]);
    const rows = gatherRowsSync(x, Int32Array.of(2, -1, 0, 2), options);
    expect(Array.from(rows.data)).toEqual([5, 6, 0, 0, 1, 2, 5, 6]);
    expect(() => gatherRowsSync(x, Int32Array.of(0, 3), options)).toThrow(
      expect.objectContaining({ code: 'ERR_VALUE', message: 'index[1] is 3: expected -1 to 2' }),
    );
  });
});

describe('token ops refuse bad input', () => {
  const o = { frames: 2, patches: 3, ratio: 0.5, seed: 1 };
  const tokens = maskTokens(o);
  const x = Tensor.zeros('float32', [1, 6, 4]);
  const packed = Tensor.zeros('float32', [3, 4]);
  const mask = (more: object) => maskTokens({ ...o, ...more });
  testRefusals([
    ['no options', () => maskTokens(undefined as never), 'ERR_ARGUMENT', /maskTokens/],
    ['ratio 1', () => mask({ ratio: 1 }), 'ERR_OPTION', /^ratio must be at least 0 and below 1, got 1/],
    ['ratio below 0', () => mask({ ratio: -0.1 }), 'ERR_OPTION', /^ratio/],
    ['ratio NaN', () => mask({ ratio: NaN }), 'ERR_OPTION', /^ratio/],
    ['kind', () => mask({ kind: 'block' }), 'ERR_OPTION', /^kind/],
    ['frames', () => mask({ frames: 0 }), 'ERR_OPTION', /^frames/],
    ['seed', () => mask({ seed: -1 }), 'ERR_OPTION', /^seed/],
    ['no seed', () => mask({ seed: undefined }), 'ERR_OPTION', /^seed/],
    ['too many', () => mask({ frames: 2 ** 16, patches: 2 ** 16 }), 'ERR_OPTION', /tokens are more than/],
    ['unknown', () => mask({ probability: 1 }), 'ERR_OPTION', /probability/],
    ['keep type', () => tokensFromMask(Tensor.zeros('int8', [1, 2, 3])), 'ERR_DTYPE', /^keep/],
    ['x dims', (b) => gatherTokensSync(packed, tokens, b), 'ERR_SHAPE', /^x: expected \[1, 6, width\]/],
    [
      'tokens',
      (b) => gatherTokensSync(x, { ...tokens, indices: Int32Array.of(0, 2, 1) }, b),
      'ERR_VALUE',
      /^tokens.indices\[2\]/,
    ],
    ['not tokens', (b) => gatherTokensSync(x, {} as never, b), 'ERR_OPTION', /^tokens/],
    [
      'packed rows',
      (b) => scatterTokensSync(Tensor.zeros('float32', [2, 4]), tokens, b),
      'ERR_SHAPE',
      /^packed: expected 3 rows/,
    ],
    [
      'fill',
      (b) => scatterTokensSync(packed, tokens, { ...b, fill: Tensor.zeros('float32', [3]) }),
      'ERR_SHAPE',
      /^fill: expected \[4\]/,
    ],
    [
      'fill type',
      (b) => scatterTokensSync(packed, tokens, { ...b, fill: Tensor.zeros('bfloat16', [4]) }),
      'ERR_DTYPE',
      /^fill/,
    ],
    ['out', (b) => gatherTokensSync(x, tokens, { ...b, out: x }), 'ERR_SHAPE', /^out/],
    ['index', (b) => gatherRowsSync(packed, [0] as never, b), 'ERR_ARGUMENT', /^index/],
  ]);

  it('an aborted signal rejects', async () => {
    await expectRejection(gatherTokens(x, tokens, { signal: AbortSignal.abort() }), 'ERR_ABORTED', /aborted/);
  });
});

/** Drawn by another program: sorted by the 53-bit numbers of Philox, the first n - floor(p n). */
const PINNED: number[] = [1, 10, 11, 12, 15, 18];
