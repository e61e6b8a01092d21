import { describe, expect, it } from 'vitest';
import { runAsync, runSync } from '../../lib/checkpoint/steps.ts';
import { type LinearActivation, linearSync, packMatrixSync, type WeightType } from '../../lib/gemm/linear.ts';
import { addResidualSync } from '../../lib/nn/addResidual.ts';
import { type FusedLinear, fusedLinear } from '../../lib/nn/fusedLinear.ts';
import { gatherRowsSync } from '../../lib/nn/gatherRows.ts';
import { layerNormSync } from '../../lib/nn/norm.ts';
import { Tensor } from '../../lib/tensor.ts';
import { Random } from '../cases/random.ts';
import { everyVariant } from '../helpers/backends.ts';

interface Shape {
  rows: number;
  k: number;
  f?: number;
  n: number;
  type?: WeightType;
  activation?: LinearActivation;
  norm?: boolean;
  gather?: boolean;
  scatter?: boolean;
  gate?: number;
  tables?: number;
}

const SHAPES: Shape[] = [
  { rows: 1, k: 5, n: 3 },
  { rows: 7, k: 40, n: 33, norm: true, activation: 'gelu' },
  { rows: 29, k: 70, n: 96, gather: true, norm: true },
  { rows: 200, k: 36, n: 40, scatter: true, tables: 1, gate: 0.3 },
  { rows: 61, k: 33, n: 65, gather: true, scatter: true, tables: 2 },
  { rows: 3, k: 40, f: 71, n: 40, norm: true, activation: 'gelu-tanh', tables: 1 },
  { rows: 150, k: 40, f: 65, n: 40, norm: true, activation: 'gelu', tables: 1 },
  { rows: 333, k: 17, f: 100, n: 9, gather: true, activation: 'sigmoid', scatter: true, tables: 2, gate: -2 },
  { rows: 150, k: 41, f: 67, n: 40, norm: true, activation: 'relu', type: 'bfloat16', tables: 1 },
  { rows: 5, k: 41, f: 67, n: 40, activation: 'silu', type: 'bfloat16' },
  { rows: 150, k: 40, f: 66, n: 40, norm: true, activation: 'gelu', type: 'int8', tables: 1 },
  { rows: 4, k: 40, f: 66, n: 40, activation: 'sigmoid', type: 'int8' },
  { rows: 90, k: 40, n: 70, gather: true, norm: true, type: 'int8' },
  { rows: 0, k: 4, n: 4 },
];

const label = (s: Shape) => JSON.stringify(s).replace(/["{}]/g, '');
const [SOURCE_ROWS, OUT_ROWS] = [50, 400];

/** A random case, and the same by one op after the other. */
function prepare(s: Shape, random: Random, options: { backend?: 'cpu' | 'reference' }) {
  const matrix = (n: number, k: number) => {
    const source = new Tensor('float32', random.normals(n * k, k ** -0.5), [n, k]);
    const bias = new Tensor('float32', random.normals(n), [n]);
    return { weight: packMatrixSync(source, { ...options, type: s.type ?? 'float32' }), bias };
  };
  const vector = (n: number) => new Tensor('float32', random.normals(n), [n]);
  const sourceRows = s.gather ? SOURCE_ROWS : s.rows;
  const x = random.normals(sourceRows * s.k);
  const index = s.gather
    ? Int32Array.from({ length: s.rows }, () => random.integer(0, SOURCE_ROWS - 1))
    : undefined;
  const norm = s.norm
    ? { weight: vector(s.k), bias: vector(s.k), epsilon: 1e-6, unitOffset: s.rows % 2 === 1 }
    : undefined;
  const hidden = s.f ? { ...matrix(s.f, s.k), activation: s.activation ?? 'none' } : undefined;
  const weight = matrix(s.n, s.f ?? s.k);
  const activation = s.f ? undefined : s.activation;
  const outRows = s.scatter ? OUT_ROWS : s.rows;
  // Every third row is not written.
  const to = s.scatter
    ? Int32Array.from({ length: s.rows }, (_, i) => (i % 3 === 1 ? -1 : OUT_ROWS - 1 - i))
    : undefined;
  const before = random.normals(outRows * s.n);
  const table = random.normals(11 * s.n);
  const tableIndex = Int32Array.from({ length: s.rows }, () => random.integer(0, 10));

  const run = (threads: number) => {
    const out = before.slice();
    const add = [{ table: out }, { table, index: tableIndex }].slice(0, s.tables ?? 0);
    const f: FusedLinear = { x, rows: s.rows, index, norm, hidden, weight, activation, add, out, to };
    if (s.gate !== undefined) f.gate = s.gate;
    return { steps: fusedLinear(f, { ...options, threads }), out };
  };

  const apart = () => {
    const wide = new Tensor('float32', x, [sourceRows, s.k]);
    let h = index ? gatherRowsSync(wide, index, options) : wide;
    if (norm) h = layerNormSync(h, { ...options, ...norm }).output as Tensor<'float32'>;
    if (hidden) {
      h = linearSync(h, hidden.weight, { ...options, bias: hidden.bias, activation: hidden.activation });
    }
    const y = linearSync(h, weight.weight, { ...options, bias: weight.bias, activation });
    const expected = before.slice();
    for (let i = 0; i < s.rows; i++) {
      const at = to ? to[i] : i;
      if (at < 0) continue;
      let row = new Tensor('float32', (y.data as Float32Array).slice(i * s.n, (i + 1) * s.n), [1, s.n]);
      // addResidual's gate is tanh of its argument.
      const gate = s.gate === undefined ? undefined : s.gate;
      if ((s.tables ?? 0) > 0) {
        const old = new Tensor('float32', before.slice(at * s.n, (at + 1) * s.n), [1, s.n]);
        row = gated(old, row, gate, options);
      } else if (gate !== undefined)
        row = new Tensor(
          'float32',
          row.data.map((v) => gate * v),
          [1, s.n],
        );
      if ((s.tables ?? 0) > 1) {
        const from = tableIndex[i] * s.n;
        const more = new Tensor('float32', table.slice(from, from + s.n), [1, s.n]);
        row = addResidualSync(row, more, options) as Tensor<'float32'>;
      }
      expected.set(row.data, at * s.n);
    }
    return expected;
  };
  const dispose = () => {
    weight.weight.dispose();
    hidden?.weight.dispose();
  };
  return { run, apart, dispose };
}

/** x + gate y with one rounding, as a fused multiply-add has it (to within what Math.fround of a double sum misses). */
function gated(
  x: Tensor<'float32'>,
  y: Tensor<'float32'>,
  gate: number | undefined,
  options: { backend?: 'cpu' | 'reference' },
): Tensor<'float32'> {
  if (gate === undefined) return addResidualSync(x, y, options) as Tensor<'float32'>;
  const g = Math.fround(gate);
  return new Tensor(
    'float32',
    x.data.map((v, i) => v + g * y.data[i]),
    x.dims,
  );
}

describe.each(everyVariant())('fusedLinear on $name', ({ options, use }) => {
  it.each(SHAPES.map((s) => [label(s), s] as const))('%s', async (_, s) => {
    use();
    const { run, apart, dispose } = prepare(s, new Random(s.rows + s.k), options as { backend?: 'cpu' });
    const one = run(1);
    runSync(one.steps);
    const expected = apart();
    if (s.gate === undefined) {
      expect(Buffer.from(one.out.buffer).equals(Buffer.from(expected.buffer))).toBe(true);
    } else {
      const off = Math.max(0, ...one.out.map((v, i) => Math.abs(v - expected[i])));
      expect(off).toBeLessThan(1e-6);
    }
    for (const threads of [2, 3, 8]) {
      const many = run(threads);
      await runAsync(many.steps);
      expect(Buffer.from(many.out.buffer).equals(Buffer.from(one.out.buffer))).toBe(true);
    }
    dispose();
  });

  it.each([1, 5, 77, 200])('computes two products of the same %i rows', (rows) => {
    use();
    const random = new Random(rows);
    const dense = (n: number) => {
      const source = new Tensor('float32', random.normals(n * 24), [n, 24]);
      const bias = new Tensor('float32', random.normals(n), [n]);
      return { weight: packMatrixSync(source, options), bias };
    };
    const [one, two] = [dense(70), dense(33)];
    const x = random.normals(rows * 24);
    const norm = {
      weight: new Tensor('float32', random.normals(24), [24]),
      bias: new Tensor('float32', random.normals(24), [24]),
      epsilon: 1e-5,
      unitOffset: false,
    };
    for (const threads of [1, 2, 5]) {
      const o = { ...options, threads };
      const [out, alsoOut] = [new Float32Array(rows * 70), new Float32Array(rows * 33)];
      runSync(fusedLinear({ x, rows, norm, weight: one, out, also: { weight: two, out: alsoOut } }, o));
      const alone = new Float32Array(rows * 33);
      runSync(fusedLinear({ x, rows, norm, weight: two, out: alone }, o));
      expect(Buffer.from(alsoOut.buffer).equals(Buffer.from(alone.buffer))).toBe(true);
      const first = new Float32Array(rows * 70);
      runSync(fusedLinear({ x, rows, norm, weight: one, out: first }, o));
      expect(Buffer.from(out.buffer).equals(Buffer.from(first.buffer))).toBe(true);
    }
    one.weight.dispose();
    two.weight.dispose();
  });

  it('computes a row in place, and the same alone', () => {
    use();
    const random = new Random(5);
    const s = { rows: 120, k: 24, f: 50, n: 24 };
    const matrix = (n: number, k: number) => {
      const source = new Tensor('float32', random.normals(n * k, k ** -0.5), [n, k]);
      return { weight: packMatrixSync(source, options) };
    };
    const hidden = { ...matrix(s.f, s.k), activation: 'gelu' as const };
    const weight = matrix(s.n, s.f);
    const before = random.normals(s.rows * s.k);
    const through = (x: Float32Array, rows: number) => {
      runSync(
        fusedLinear({ x, rows, hidden, weight, add: [{ table: x }], out: x }, { ...options, threads: 2 }),
      );
      return x;
    };
    const whole = through(before.slice(), s.rows);
    for (const row of [0, 1, 57, 119]) {
      const alone = through(before.slice(row * s.k, (row + 1) * s.k), 1);
      expect([...alone]).toEqual([...whole.subarray(row * s.k, (row + 1) * s.k)]);
    }
    hidden.weight.dispose();
    weight.weight.dispose();
  });
});
