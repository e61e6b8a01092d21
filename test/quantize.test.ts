import { describe, expect, it } from 'vitest';
import {
  dequantize,
  linearSync,
  type OpOptions,
  type PackMatrixOptions,
  packMatrix,
  packMatrixSync,
  quantize,
  setDefaults,
  Tensor,
} from '../lib/index.ts';
import { packExperts, packExpertsSync } from '../lib/moe/index.ts';
import { float8Source } from './cases/linear.ts';
import { Random } from './cases/random.ts';
import { nativeVariants } from './helpers/backends.ts';
import { expectRejection, expectThrow } from './helpers/errors.ts';

const everywhere = [
  { name: 'reference', options: { backend: 'reference' as const }, use() {} },
  ...nativeVariants(),
];

const f32 = (data: ArrayLike<number>, dims: number[]) => new Tensor('float32', Float32Array.from(data), dims);

/** x with a one at input i: what comes out is column i of the weights as packed. */
function unpacked(weight: Tensor, options: PackMatrixOptions & OpOptions): Float64Array {
  const [n, k] = weight.dims;
  const packed = packMatrixSync(weight, options);
  const x = new Float32Array(k * k);
  for (let i = 0; i < k; i++) x[i * k + i] = 1;
  const y = linearSync(f32(x, [k, k]), packed).data as Float32Array;
  packed.dispose();
  return Float64Array.from({ length: n * k }, (_, i) => y[(i % k) * n + Math.floor(i / k)]);
}

describe.each(everywhere)('packed weights on $name', ({ options, use }) => {
  it('every E4M3 code is decoded exactly', () => {
    use();
    const codes = Uint8Array.from({ length: 256 }, (_, i) => ((i & 0x7f) === 0x7f ? 0 : i));
    const w = new Tensor('float8_e4m3', codes, [4, 64]);
    const values = unpacked(w, options);
    // The definition: (-1)^s 2^(e-7) (1 + m/8), or 2^-6 m/8 for e = 0.
    for (const [i, c] of codes.entries()) {
      const [e, m] = [(c >> 3) & 15, c & 7];
      const v = e === 0 ? (m / 8) * 2 ** -6 : (1 + m / 8) * 2 ** (e - 7);
      expect(values[i]).toBe((c & 128 ? -v : v) + 0);
    }
  });

  it.each([
    { type: 'int8' },
    { type: 'int4' },
    { type: 'int4', groupSize: 64, symmetric: false },
    { type: 'int4', symmetric: false, search: true },
    { type: 'mxfp4' },
    { type: 'float8' },
  ] as const)('hold what quantize says: %j', (o) => {
    use();
    const random = new Random(5);
    const [n, k] = [133, 192];
    const w = f32(random.normals(n * k), [n, k]);
    const expected = dequantize(quantize(w, o)).data;
    const actual = unpacked(w, { ...o, ...options });
    // 1 is quantised to 127 and scaled by 1/127, both roundings of float32.
    const worst = actual.reduce((a, v, i) => Math.max(a, Math.abs(v - expected[i])), 0);
    expect(worst).toBeLessThan(2e-6); // weights up to 5
  });

  it('float8 sources keep their codes and scales, whatever their blocks hold', () => {
    use();
    const { weight, scale } = float8Source(new Random(9), 130, 140);
    for (let i = 0; i < weight.data.length; i++) weight.data[i] &= 0xbf; // no block reaches 448
    const values = unpacked(weight, { ...options, scale });
    for (const [row, column, block] of [
      [0, 0, 0],
      [127, 128, 1],
      [128, 127, 2],
      [129, 139, 3],
    ]) {
      const at = row * 140 + column;
      const value = dequantize({ type: 'float8', groupSize: 128, codes: weight, scale }).data[at];
      expect(values[at]).toBe(value);
      const code = weight.data[at];
      const one = (1 + (code & 7) / 8) * 2 ** (((code >> 3) & 15) - 7); // exponent 0 is not among them
      expect((code >> 3) & 15).not.toBe(0);
      expect(value).toBe(Math.fround((code & 128 ? -one : one) * scale.data[block]));
    }
  });

  it('a weight that the type cannot hold is refused, with its place', async () => {
    use();
    const n = 70;
    const k = 96;
    for (const type of ['int8', 'int4', 'mxfp4', 'float8'] as const) {
      for (const bad of [NaN, Infinity, -Infinity]) {
        const data = new Random(1).normals(n * k);
        data[69 * k + 5] = NaN;
        data[34 * k + 95] = bad;
        const w = new Tensor('float32', data, [n, k]);
        const text = new RegExp(`^weight\\[34, 95\\] is ${bad}: ${type} weights must be finite$`);
        expectThrow(() => packMatrixSync(w, { ...options, type }), 'ERR_VALUE', text);
        await expectRejection(packMatrix(w, { ...options, type }), 'ERR_VALUE', text);
      }
    }
    const codes = new Uint8Array(n * k);
    codes[3 * k + 7] = 0xff;
    const w8 = new Tensor('float8_e4m3', codes, [n, k]);
    expectThrow(() => packMatrixSync(w8, options), 'ERR_VALUE', /^weight\[3, 7\] is NaN: float8/);
    expectThrow(
      () => packMatrixSync(w8, { ...options, type: 'int4' }),
      'ERR_VALUE',
      /^weight\[3, 7\] is NaN: int4/,
    );
    for (const type of ['float32', 'bfloat16'] as const) {
      const data = new Random(1).normals(n * k);
      data[34 * k + 95] = NaN;
      const p = packMatrixSync(new Tensor('float32', data, [n, k]), { ...options, type });
      const y = linearSync(f32(new Float32Array(k).fill(1), [1, k]), p).data;
      expect(Array.from(y as Float32Array, Number.isNaN).indexOf(true)).toBe(34);
    }
  });

  it('the same of experts, named by matrix and expert', async () => {
    use();
    const [e, d, f] = [3, 64, 32];
    const make = (size: number, bad = -1) => {
      const data = new Random(2).normals(e * size);
      if (bad >= 0) data[bad] = NaN;
      return data;
    };
    const gate = f32(make(f * d), [e, f, d]);
    const down = f32(make(d * f, 2 * d * f + 63 * f + 31), [e, d, f]);
    const up = f32(make(f * d), [e, f, d]);
    const badUp = f32(make(f * d, f * d + 31 * d + 2), [e, f, d]);
    const o = { ...options, type: 'int4' as const };
    expectThrow(
      () => packExpertsSync({ gate, up, down }, o),
      'ERR_VALUE',
      /^down\[2\]\[63, 31\] is NaN: int4/,
    );
    expectThrow(() => packExpertsSync({ gate, up: badUp, down }, o), 'ERR_VALUE', /^up\[1\]\[31, 2\] is NaN/);
    expectThrow(
      () => packExpertsSync({ gate: badUp, up, down }, o),
      'ERR_VALUE',
      /^gate\[1\]\[31, 2\] is NaN/,
    );
    expectThrow(() => packExpertsSync({ up: badUp, down }, o), 'ERR_VALUE', /^up\[1\]\[31, 2\] is NaN/);
    await expectRejection(packExperts({ up, down }, o), 'ERR_VALUE', /^down\[2\]\[63, 31\] is NaN/);
    const gateUp = f32(make(2 * f * d, 2 * f * d + 33 * d), [e, 2 * f, d]);
    expectThrow(() => packExpertsSync({ gateUp, down }, o), 'ERR_VALUE', /^up\[1\]\[1, 0\] is NaN/);
    expectThrow(
      () => packExpertsSync({ gateUp, down, interleaved: true }, o),
      'ERR_VALUE',
      /^up\[1\]\[16, 0\] is NaN/,
    );
  });

  it('options that do not fit are refused', () => {
    use();
    const w = f32(new Random(3).normals(64), [2, 32]);
    const { weight, scale } = float8Source(new Random(4), 2, 32);
    const pack = (t: Tensor, o: object) => packMatrixSync(t, { ...options, ...o });
    expectThrow(
      () => pack(w, { type: 'int8', symmetric: false }),
      'ERR_OPTION',
      /^symmetric: false needs type int4/,
    );
    expectThrow(() => pack(w, { search: true }), 'ERR_OPTION', /^search needs type int4/);
    expectThrow(() => pack(w, { type: 'int4', search: 1 }), 'ERR_OPTION', /^search must be true or false/);
    expectThrow(
      () => pack(w, { type: 'int4', symmetric: 'no' }),
      'ERR_OPTION',
      /^symmetric must be true or false/,
    );
    expectThrow(() => pack(w, { type: 'float8', groupSize: 64 }), 'ERR_OPTION', /^groupSize needs/);
    const ones = new Float32Array(32).fill(1);
    expectThrow(
      () => pack(w, { type: 'mxfp4', calibration: ones }),
      'ERR_OPTION',
      /^calibration needs type int4/,
    );
    expectThrow(
      () => pack(w, { type: 'int4', calibration: ones, search: false }),
      'ERR_OPTION',
      /^search: false leaves/,
    );
    expectThrow(
      () => pack(w, { type: 'int4', calibration: ones.subarray(1) }),
      'ERR_SHAPE',
      /^calibration: expected \[32\]/,
    );
    for (const bad of [NaN, -1, Infinity]) {
      const c = ones.slice();
      c[3] = bad;
      expectThrow(() => pack(w, { type: 'int4', calibration: c }), 'ERR_VALUE', /^calibration\[3\] is/);
      const s = f32([bad], [1, 1]);
      expectThrow(() => pack(weight, { scale: s }), 'ERR_VALUE', /^scale\[0, 0\] is/);
    }
    expectThrow(() => pack(w, { scale }), 'ERR_OPTION', /^scale needs float8_e4m3 weights, got float32/);
    expectThrow(() => pack(weight, { scale: f32([1, 1], [1, 2]) }), 'ERR_SHAPE', /^scale: expected \[1, 1\]/);
    const experts = {
      up: f32(new Float32Array(1024), [1, 32, 32]),
      down: f32(new Float32Array(1024), [1, 32, 32]),
    };
    const packE = (o: object, s: object = experts) => packExpertsSync(s as never, { ...options, ...o });
    expectThrow(() => packE({ scales: { up: scale } }), 'ERR_OPTION', /^scales.up needs float8_e4m3/);
    expectThrow(() => packE({ scales: { ups: scale } }), 'ERR_OPTION', /'ups'/);
    expectThrow(() => packE({ type: 'int4', calibration: { down: ones } }), 'ERR_OPTION', /'down'/);
    expectThrow(
      () => packE({ type: 'int4', calibration: { intermediate: ones.subarray(2) } }),
      'ERR_SHAPE',
      /^calibration.intermediate: expected \[32\]/,
    );
    const codes = {
      up: Tensor.zeros('float8_e4m3', [1, 32, 32]),
      down: Tensor.zeros('float8_e4m3', [1, 32, 32]),
    };
    const one = f32([1], [1, 1, 1]);
    expectThrow(() => packE({ scales: { gate: one } }, codes), 'ERR_OPTION', /^scales.gate has no matrix/);
    expectThrow(
      () => packE({ scales: { up: [scale, scale] } }, codes),
      'ERR_SHAPE',
      /^scales.up: expected 1/,
    );
    expectThrow(
      () => packE({ scales: { up: f32([1, 1], [1, 1, 2]) } }, codes),
      'ERR_SHAPE',
      /^scales.up: expected \[1, 1, 1\]/,
    );
    expectThrow(
      () => packE({ scales: { up: one } }, { ...codes, layout: 'in-out' }),
      'ERR_OPTION',
      /^scales need layout/,
    );
  });
});

describe('quantize', () => {
  it('rounds cases worked by hand', () => {
    const row = new Float32Array(32);
    row.set([15, 0, -15, 7, 7.4, 1.5, 2.5]);
    // Symmetric: scale 15/7; 7 / scale = 3.27, 7.4 / scale = 3.45, 1.5 / scale = 0.7, 2.5 / scale = 1.17.
    const s = quantize(f32(row, [1, 32]), { type: 'int4' });
    expect(Array.from(s.codes.data.subarray(0, 7))).toEqual([15, 8, 1, 11, 11, 9, 9]);
    expect(s.scale.data[0]).toBe(Math.fround(15 / 7));
    expect(s.zero?.data[0]).toBe(8);
    // Zero points: scale 2, zero = round(7.5) = 8; 15 -> 7.5 -> 8 + 8 = 16, clamped; 7 -> 3.5 -> 4 (even).
    const z = quantize(f32(row, [1, 32]), { type: 'int4', symmetric: false });
    expect(z.scale.data[0]).toBe(2);
    expect(z.zero?.data[0]).toBe(8);
    expect(Array.from(z.codes.data.subarray(0, 7))).toEqual([15, 8, 0, 12, 12, 9, 9]);
    // All of one sign: the range still holds 0.
    const p = quantize(f32(new Float32Array(32).fill(3), [1, 32]), { type: 'int4', symmetric: false });
    expect([p.zero?.data[0], p.codes.data[0]]).toEqual([0, 15]);
    expect(dequantize(p).data[0]).toBeCloseTo(3, 6);
    // E4M3: 448 is the largest; halves of a step go to the even code.
    const f8 = quantize(f32([448, 17, 19, 2 ** -9, 2 ** -10, 3 * 2 ** -10, -240, 0.0146], [1, 8]), {
      type: 'float8',
    });
    expect(Array.from(f8.codes.data)).toEqual([0x7e, 0x58, 0x5a, 1, 0, 2, 0xf7, 7]);
  });

  it('keeps every error within the step', () => {
    const random = new Random(6);
    const [n, k] = [40, 256];
    const w = f32(
      random.normals(n * k).map((v, i) => v + (i % 7)),
      [n, k],
    );
    for (const [o, steps] of [
      [{ type: 'int8' }, 0.5],
      [{ type: 'int4' }, 0.5],
      [{ type: 'int4', groupSize: 128, symmetric: false }, 1],
    ] as const) {
      const q = quantize(w, o);
      const d = dequantize(q).data;
      const groups = q.scale.dims[1];
      let worst = 0;
      for (let i = 0; i < n * k; i++) {
        const scale = q.scale.data[Math.floor(i / k) * groups + Math.floor((i % k) / q.groupSize)];
        worst = Math.max(worst, Math.abs(d[i] - w.data[i]) / scale);
      }
      expect(worst).toBeLessThanOrEqual(steps * (1 + 1e-5));
      expect(worst).toBeGreaterThan(0.45);
    }
    const q = quantize(w, { type: 'float8' });
    const d = dequantize(q).data;
    for (let i = 0; i < n * k; i++) {
      const scale = q.scale.data[Math.floor((i % k) / 128)];
      // Half of a 3-bit mantissa's step, or of the smallest step.
      expect(Math.abs(d[i] - w.data[i])).toBeLessThanOrEqual(Math.abs(w.data[i]) / 16 + 2 ** -10 * scale);
    }
  });

  it('refuses what it cannot do', () => {
    setDefaults({});
    const w = f32(new Float32Array(64), [2, 32]);
    expectThrow(() => quantize(w, { type: 'float32' as never }), 'ERR_OPTION', /^type must be int8/);
    expectThrow(() => quantize(w, {} as never), 'ERR_OPTION', /^type must be int8/);
    expectThrow(() => quantize(w, { type: 'int4', group: 32 } as never), 'ERR_OPTION', /'group'/);
    expectThrow(() => quantize(f32([NaN], [1, 1]), { type: 'int8' }), 'ERR_VALUE', /^weight\[0, 0\] is NaN/);
  });
});

/** Σ over inputs of a_k² (w − ŵ)², per row and group. */
function groupErrors(w: Tensor, d: ArrayLike<number>, weight: Float32Array, group: number): Float64Array {
  const k = w.dims[1];
  const out = new Float64Array(w.size / group);
  for (let i = 0; i < w.size; i++) {
    out[Math.floor(i / group)] += weight[i % k] * ((w.data[i] as number) - d[i]) ** 2;
  }
  return out;
}

describe('the scale search', () => {
  it.each([
    { symmetric: true, groupSize: 32 },
    { symmetric: true, groupSize: 128 },
    { symmetric: false, groupSize: 32 },
    { symmetric: false, groupSize: 64 },
  ])('never has more weighted error than rounding to nearest: %j', (o) => {
    const random = new Random(11);
    const [n, k] = [24, 256];
    // Heavy tails, as trained weights have: the largest of a group is worth clipping where its input is quiet.
    const w = f32(
      random.normals(n * k).map((v) => v ** 3),
      [n, k],
    );
    const weight = Float32Array.from({ length: k }, () => Math.exp(3 * random.normal()));
    const base = { type: 'int4' as const, ...o };
    const errors = (q: ReturnType<typeof quantize>, by: Float32Array) =>
      groupErrors(w, dequantize(q).data, by, o.groupSize);
    const sum = (a: Float64Array) => a.reduce((x, y) => x + y, 0);
    const ones = new Float32Array(k).fill(1);
    const nearest = quantize(w, base);
    const plain = quantize(w, { ...base, search: true });
    const calibrated = quantize(w, { ...base, calibration: weight });
    // float32 rounding of the dequantised values is not in the search's sums: allow 1e-5.
    for (const [found, by] of [
      [plain, ones],
      [calibrated, weight],
    ] as const) {
      const before = errors(nearest, by);
      const after = errors(found, by);
      for (let g = 0; g < before.length; g++) expect(after[g]).toBeLessThanOrEqual(before[g] * (1 + 1e-5));
      expect(sum(after)).toBeLessThan(0.99 * sum(before));
    }
    // And each search is best at what it minimises.
    expect(sum(errors(calibrated, weight))).toBeLessThan(sum(errors(plain, weight)));
    expect(sum(errors(plain, ones))).toBeLessThan(sum(errors(calibrated, ones)));
  });
});
