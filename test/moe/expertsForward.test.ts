import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { Tensor } from '../../lib/index.ts';
import {
  type ExpertSources,
  expertsForward,
  expertsForwardSync,
  packExperts,
  packExpertsSync,
  type Routing,
  routeTopKSync,
} from '../../lib/moe/index.ts';
import { expertsForwardCases } from '../cases/moe/expertsForward.ts';
import { Random } from '../cases/random.ts';
import { nativeVariants } from '../helpers/backends.ts';
import { testCases } from '../helpers/cases.ts';
import { expectRejection, expectThrow } from '../helpers/errors.ts';

testCases(expertsForwardCases);

const everywhere = [
  { name: 'reference', options: { backend: 'reference' as const }, use() {} },
  ...nativeVariants(),
];

function layer(random: Random, experts: number, d: number, f: number): ExpertSources {
  const make = (rows: number, columns: number) =>
    new Tensor('float32', random.normals(experts * rows * columns, columns ** -0.5), [
      experts,
      rows,
      columns,
    ]);
  return { gate: make(f, d), up: make(f, d), down: make(d, f) };
}

describe.each(nativeVariants())('a token on $name', ({ use }) => {
  it.each(['float32', 'bfloat16', 'int8', 'int4', 'mxfp4', 'float8'] as const)(
    '%s: same bits alone, in a batch, in any order',
    (type) => {
      use();
      const random = new Random(31);
      const [tokens, experts, k, d, f] = [90, 5, 2, 96, 64];
      const weights = packExpertsSync(layer(random, experts, d, f), { type });
      const x = random.normals(tokens * d);
      const routing = routeTopKSync(
        new Tensor('float32', random.normals(tokens * experts), [tokens, experts]),
        { k },
      );
      const all = expertsForwardSync(new Tensor('float32', x, [tokens, d]), routing, weights)
        .data as Float32Array;
      const pick = (ids: number[]) => {
        const take = (data: Float32Array | Int32Array, width: number) =>
          ids.flatMap((t) => Array.from(data.subarray(t * width, (t + 1) * width)));
        const r: Routing = {
          indices: new Tensor('int32', Int32Array.from(take(routing.indices.data, k)), [ids.length, k]),
          weights: new Tensor('float32', Float32Array.from(take(routing.weights.data, k)), [ids.length, k]),
        };
        return expertsForwardSync(
          new Tensor('float32', Float32Array.from(take(x, d)), [ids.length, d]),
          r,
          weights,
          { threads: 1 },
        ).data as Float32Array;
      };
      for (let t = 0; t < tokens; t += 7) expect(pick([t])).toEqual(all.slice(t * d, (t + 1) * d));
      const reversed = Array.from({ length: tokens }, (_, i) => tokens - 1 - i);
      const back = pick(reversed);
      for (const [i, t] of reversed.entries())
        expect(back.slice(i * d, (i + 1) * d)).toEqual(all.slice(t * d, (t + 1) * d));
    },
  );
});

describe('integer activations', () => {
  it.each([
    ['int8', 0.02],
    ['int4', 0.02],
    ['mxfp4', 0.02],
  ] as const)('%s stay within %d of exact products with the dequantised weights', (type, bound) => {
    // The op quantises activations to 8 bits; this measures what that costs.
    const random = new Random(8);
    const [tokens, d, f] = [16, 256, 128];
    const sources = layer(random, 1, d, f);
    const x = new Tensor('float32', random.normals(tokens * d), [tokens, d]);
    const routing = {
      indices: new Tensor('int32', new Int32Array(tokens), [tokens, 1]),
      weights: new Tensor('float32', new Float32Array(tokens).fill(1), [tokens, 1]),
    };
    const quantised = packExpertsSync(sources, { type, backend: 'reference' });
    const bank = quantised.use('reference') as {
      experts: Record<'gate' | 'up' | 'down', { rows: Float32Array[] }>[];
    };
    const dequantised = (m: { rows: Float32Array[] }) =>
      new Tensor('float32', Float32Array.from(m.rows.flatMap((r) => Array.from(r))), [
        1,
        m.rows.length,
        m.rows[0].length,
      ]);
    const [e] = bank.experts;
    const exact = packExpertsSync(
      { gate: dequantised(e.gate), up: dequantised(e.up), down: dequantised(e.down) },
      { backend: 'reference' },
    );
    const a = expertsForwardSync(x, routing, quantised).data as Float32Array;
    const b = expertsForwardSync(x, routing, exact).data as Float32Array;
    const norm = Math.hypot(...b);
    const difference = Math.hypot(...a.map((v, i) => v - b[i]));
    expect(difference / norm).toBeLessThan(bound);
    expect(difference / norm).toBeGreaterThan(1e-4);
  });
});

describe.each(everywhere)('a NaN in x on $name', ({ options, use }) => {
  it.each(['silu', 'clamped-swiglu', 'gelu', 'gelu-tanh', 'relu', 'relu-squared', 'identity'] as const)(
    '%s: stays in its own row',
    (activation) => {
      use();
      const random = new Random(6);
      const weights = packExpertsSync(layer(random, 2, 24, 20), { ...options, activation });
      const x = random.normals(3 * 24);
      x[24 + 5] = Number.NaN;
      const routing: Routing = {
        indices: new Tensor('int32', Int32Array.from([0, 0, 0]), [3, 1]),
        weights: new Tensor('float32', Float32Array.from([1, 1, 1]), [3, 1]),
      };
      const y = expertsForwardSync(new Tensor('float32', x, [3, 24]), routing, weights).data as Float32Array;
      for (let i = 0; i < y.length; i++) expect(Number.isNaN(y[i])).toBe(i >= 24 && i < 48);
    },
  );
});

describe.each(everywhere)('integer weights and a NaN or infinity in x on $name', ({ options, use }) => {
  it.each(['int8', 'int4', 'mxfp4'] as const)('%s: its own row is NaN, others keep their bits', (type) => {
    use();
    const random = new Random(6);
    const weights = packExpertsSync(layer(random, 2, 64, 32), { ...options, type });
    const x = random.normals(3 * 64);
    const routing: Routing = {
      indices: new Tensor('int32', Int32Array.from([0, 1, 0]), [3, 1]),
      weights: new Tensor('float32', Float32Array.from([1, 1, 1]), [3, 1]),
    };
    const run = () =>
      (
        expertsForwardSync(new Tensor('float32', x.slice(), [3, 64]), routing, weights).data as Float32Array
      ).slice();
    const before = run();
    for (const odd of [Number.NaN, Infinity]) {
      x[64 + 5] = odd;
      const y = run();
      for (let i = 0; i < y.length; i++) {
        if (i >= 64 && i < 128) expect(y[i]).toBeNaN();
        else expect(y[i]).toBe(before[i]);
      }
    }
    x.fill(1e-38, 64, 128); // too small for float32 to scale to 127
    for (const v of run().subarray(64, 128)) expect(Math.abs(v)).toBe(0);
  });
});

describe('handles', () => {
  it('dispose while a forward runs is safe; use after dispose is refused', async () => {
    const random = new Random(3);
    const weights = await packExperts(layer(random, 4, 128, 96));
    expect(weights.backend === 'reference' || weights.bytes > 4 * 3 * 128 * 96 * 4 - 1).toBe(true);
    const x = new Tensor('float32', random.normals(512 * 128), [512, 128]);
    const routing = routeTopKSync(new Tensor('float32', random.normals(512 * 4), [512, 4]), { k: 2 });
    const expected = expertsForwardSync(x, routing, weights).data;
    const running = expertsForward(x, routing, weights);
    weights.dispose();
    expect((await running).data).toEqual(expected);
    await expectRejection(expertsForward(x, routing, weights), 'ERR_DISPOSED', /expert weights/);
  });

  it('concurrent forwards of one layer do not disturb each other', async () => {
    const random = new Random(4);
    const weights = await packExperts(layer(random, 4, 64, 48));
    const runs = Array.from({ length: 12 }, (_, i) => {
      const tokens = 1 + ((i * 37) % 90);
      const x = new Tensor('float32', random.normals(tokens * 64), [tokens, 64]);
      const routing = routeTopKSync(new Tensor('float32', random.normals(tokens * 4), [tokens, 4]), { k: 2 });
      return { x, routing, expected: expertsForwardSync(x, routing, weights).data };
    });
    const results = await Promise.all(runs.map((r) => expertsForward(r.x, r.routing, weights)));
    for (const [i, r] of results.entries()) expect(r.data).toEqual(runs[i].expected);
  });
});

describe.each(everywhere)('bad input on $name', ({ options, use }) => {
  it('is refused with code and name', async () => {
    use();
    const random = new Random(2);
    const good = layer(random, 3, 8, 4);
    const f32 = (dims: number[]) =>
      new Tensor('float32', new Float32Array(dims.reduce((a, b) => a * b, 1)), dims);
    const pack = (s: unknown, o: object = {}) => packExpertsSync(s as ExpertSources, { ...options, ...o });
    expectThrow(() => pack({ gate: good.gate, up: good.up }), 'ERR_ARGUMENT', /^down/);
    expectThrow(() => pack({ ...good, up: f32([3, 5, 8]) }), 'ERR_SHAPE', /^up: expected \[4, 8\]/);
    expectThrow(() => pack({ ...good, up: f32([2, 4, 8]) }), 'ERR_SHAPE', /^up: expected 3 experts/);
    expectThrow(
      () => pack({ ...good, gate: [f32([4, 8]), f32([4, 8]), f32([4, 9])] }),
      'ERR_SHAPE',
      /^gate\[2\]/,
    );
    expectThrow(() => pack({ ...good, gateUp: f32([3, 8, 8]) }), 'ERR_ARGUMENT', /either gateUp/);
    expectThrow(() => pack({ ...good, interleaved: true }), 'ERR_OPTION', /interleaved/);
    expectThrow(() => pack({ ...good, gates: good.gate }), 'ERR_OPTION', /'gates'/);
    expectThrow(
      () => pack({ ...good, up: new Tensor('bfloat16', new Uint16Array(96), [3, 4, 8]) }),
      'ERR_DTYPE',
      /^up is bfloat16/,
    );
    expectThrow(() => pack(good, { type: 'int4' }), 'ERR_OPTION', /does not divide/);
    expectThrow(() => pack(good, { activation: 'swish' }), 'ERR_OPTION', /^activation/);
    expectThrow(() => pack(good, { biases: { gate: f32([3, 4]) } }), 'ERR_ARGUMENT', /gate and up together/);
    expectThrow(() => pack(good, { biases: { down: f32([3, 4]) } }), 'ERR_SHAPE', /biases.down/);
    const ungated = { up: good.up, down: good.down };
    expectThrow(() => pack(ungated, { biases: { gate: f32([3, 4]) } }), 'ERR_ARGUMENT', /ungated layer/);
    const both = { gateUp: f32([3, 8]), up: f32([3, 4]) };
    expectThrow(() => pack(good, { biases: both }), 'ERR_ARGUMENT', /either gateUp/);
    expectThrow(() => pack({ gate: [], up: [], down: [] }), 'ERR_SHAPE', /at least one expert/);
    const weights = pack(good);
    const routing = (ids: number[], k: number): Routing => ({
      indices: new Tensor('int32', Int32Array.from(ids), [ids.length / k, k]),
      weights: new Tensor('float32', new Float32Array(ids.length), [ids.length / k, k]),
    });
    const run = (x: Tensor, r: Routing, o: object = {}) =>
      expertsForwardSync(x, r, weights, { ...options, ...o });
    expectThrow(() => run(f32([2, 7]), routing([0, 1], 1)), 'ERR_SHAPE', /^x: expected \[tokens, 8\]/);
    expectThrow(
      () => run(f32([2, 8]), routing([0, 1, 2], 1)),
      'ERR_SHAPE',
      /routing.indices: expected \[2, 1\]/,
    );
    expectThrow(
      () => run(f32([2, 8]), routing([0, 1, 2, 3], 2)),
      'ERR_VALUE',
      /routing.indices\[1, 1\] is 3/,
    );
    expectThrow(() => run(f32([2, 8]), routing([0, -2], 1)), 'ERR_VALUE', /routing.indices\[1, 0\] is -2/);
    expectThrow(
      () => run(f32([2, 8]), routing([0, 1], 1), { sharedGate: f32([2]) }),
      'ERR_OPTION',
      /sharedGate/,
    );
    expectThrow(() => run(f32([2, 8]), routing([0, 1], 1), { shared: weights }), 'ERR_SHAPE', /^shared/);
    const x = f32([2, 8]);
    expectThrow(() => run(x, routing([0, 1], 1), { out: x }), 'ERR_ARGUMENT', /out overlaps/);
  });
});

describe.each(everywhere)('published cases of onnxruntime on $name', ({ options, use }) => {
  const read = (name: string) =>
    JSON.parse(
      readFileSync(join(import.meta.dirname, `../golden/published/onnxruntime_moe_${name}.json`), 'utf8'),
    );
  const tensor = (t: { dims: number[]; data?: number[]; fill?: number }) => {
    const size = t.dims.reduce((a, b) => a * b);
    return new Tensor(
      'float32',
      t.data ? Float32Array.from(t.data) : new Float32Array(size).fill(t.fill as number),
      t.dims,
    );
  };
  const worst = (a: ArrayLike<number>, b: ArrayLike<number>) => {
    expect(a.length).toBe(b.length);
    return Math.max(...Array.from(a, (v, i) => Math.abs(v - b[i])));
  };

  it.each(['gelu', 'relu'] as const)('%s, one matrix, biases, top 1', (name) => {
    use();
    const { inputs: i, expected, tolerance } = read(name);
    const weights = packExpertsSync(
      { up: tensor(i.w1), down: tensor(i.w2) },
      { ...options, activation: name, biases: { up: tensor(i.b1), down: tensor(i.b2) } },
    );
    const routing = routeTopKSync(tensor(i.logits), { ...options, k: 1 });
    const y = expertsForwardSync(tensor(i.input), routing, weights).data as Float32Array;
    expect(worst(y, tensor(expected.output).data)).toBeLessThan(tolerance.absolute);
  });

  it('Mixtral', () => {
    use();
    const { inputs: i, expected, tolerance } = read('mixtral');
    const weights = packExpertsSync(
      { gate: tensor(i.gate), up: tensor(i.up), down: tensor(i.down) },
      options,
    );
    const routing = routeTopKSync(tensor(i.logits), { ...options, k: 2, normalize: true });
    const y = expertsForwardSync(tensor(i.input), routing, weights).data as Float32Array;
    expect(worst(y, tensor(expected.output).data)).toBeLessThan(tolerance.absolute);
  });

  it('SwiGLU with beta 1 and no clamp', () => {
    use();
    const { inputs: i, options: o, expected, tolerance } = read('swiglu_basic');
    const weights = packExpertsSync(
      { gateUp: tensor(i.gateUp), down: tensor(i.down), interleaved: true, layout: 'in-out' },
      { ...options, activation: 'clamped-swiglu', alpha: o.alpha, limit: 1e30 },
    );
    const routing = routeTopKSync(tensor(i.logits), { ...options, k: 1, normalize: true });
    const y = expertsForwardSync(tensor(i.input), routing, weights).data as Float32Array;
    expect(worst(y, tensor(expected.output).data)).toBeLessThan(tolerance.absolute);
  });
});
