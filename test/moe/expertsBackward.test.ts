import { afterAll, describe, expect, it } from 'vitest';
import { setDefaults } from '../../lib/backend.ts';
import { Tensor } from '../../lib/index.ts';
import {
  type ExpertGradients,
  type ExpertSources,
  type ExpertsBackwardOptions,
  expertsBackward,
  expertsBackwardSync,
  expertsForwardSync,
  packExpertsSync,
  type Routing,
  routeTopKSync,
} from '../../lib/moe/index.ts';
import { sameBits } from '../cases/case.ts';
import { expertsBackwardCases, gradientList } from '../cases/moe/expertsBackward.ts';
import type { Shape } from '../cases/moe/expertsForward.ts';
import { Random } from '../cases/random.ts';
import { nativeVariants } from '../helpers/backends.ts';
import { testCases } from '../helpers/cases.ts';
import { expectRejection, expectThrow } from '../helpers/errors.ts';
import { type Problem, problem } from '../helpers/experts.ts';

testCases(expertsBackwardCases);

const everywhere = [
  { name: 'reference', options: { backend: 'reference' as const }, use() {} },
  ...nativeVariants(),
];

afterAll(() => {
  if (nativeVariants().length > 0) setDefaults({ isa: 'auto' });
});

const f32 = (data: ArrayLike<number>, dims: number[]) => new Tensor('float32', Float32Array.from(data), dims);
const zeros = (dims: number[]) => Tensor.zeros('float32', dims);

describe.each(everywhere)('worked by hand on $name', ({ options, use }) => {
  it('y = w (D (G x)(U x)): one expert of size 1', () => {
    use();
    const [x, dy, w, G, U, D] = [3, 2, 0.5, 2, 5, 7];
    const g = expertsBackwardSync(
      f32([dy], [1, 1]),
      f32([x], [1, 1]),
      { indices: new Tensor('int32', Int32Array.of(0), [1, 1]), weights: f32([w], [1, 1]) },
      { gate: f32([G], [1, 1, 1]), up: f32([U], [1, 1, 1]), down: f32([D], [1, 1, 1]) },
      { ...options, activation: 'identity' },
    );
    const first = (t: unknown) => (t as Tensor).data[0] as number;
    expect(first(g.x)).toBeCloseTo(dy * w * D * G * U * 2 * x, 3);
    expect(first(g.weights)).toBeCloseTo(dy * D * G * U * x * x, 3);
    expect(first(g.gate)).toBeCloseTo(dy * w * D * U * x * x, 3);
    expect(first(g.up)).toBeCloseTo(dy * w * D * G * x * x, 3);
    expect(first(g.down)).toBeCloseTo(dy * w * G * U * x * x, 3);
    expect(g.biases).toBeUndefined();
  });

  it('at the edge of a clamp the derivative is 1, beyond it 0; relu at 0 has 0', () => {
    use();
    const run = (g: number, u: number) => {
      const r = expertsBackwardSync(
        f32([1], [1, 1]),
        f32([1], [1, 1]),
        { indices: new Tensor('int32', Int32Array.of(0), [1, 1]), weights: f32([1], [1, 1]) },
        { gate: f32([g], [1, 1, 1]), up: f32([u], [1, 1, 1]), down: f32([1], [1, 1, 1]) },
        { ...options, activation: 'clamped-swiglu', limit: 2 },
      );
      return [r.gate, r.up].map((t) => Math.abs((t as Tensor).data[0] as number) > 0);
    };
    expect(run(2, 2)).toEqual([true, true]);
    expect(run(2.001, 1)).toEqual([false, true]);
    expect(run(1, 2.001)).toEqual([true, false]);
    expect(run(1, -2)).toEqual([true, true]);
    expect(run(1, -2.001)).toEqual([true, false]);
    expect(run(-50, 1)[1]).toBe(true);
    const relu = expertsBackwardSync(
      f32([1], [1, 1]),
      f32([0], [1, 1]),
      { indices: new Tensor('int32', Int32Array.of(0), [1, 1]), weights: f32([1], [1, 1]) },
      { up: f32([1], [1, 1, 1]), down: f32([1], [1, 1, 1]) },
      { ...options, activation: 'relu' },
    );
    expect(relu.x.data[0]).toBe(0);
  });
});

const layerShape: Shape = {
  name: '',
  tokens: 61,
  experts: 5,
  k: 2,
  hidden: 40,
  intermediate: 24,
  biases: true,
};

describe.each(everywhere)('properties on $name', ({ options, use }) => {
  const run = (p: Problem, more: ExpertsBackwardOptions = {}) =>
    expertsBackwardSync(p.gradOutput, p.x, p.routing, p.sources, { ...options, biases: p.biases, ...more });

  it.each(['float32', 'bfloat16'] as const)(
    '%s: a token has the same bits alone and in any batch',
    (type) => {
      use();
      const p = problem(layerShape, 5);
      const d = layerShape.hidden;
      const k = layerShape.k;
      const all = run(p, { type });
      for (const ids of [[17], [60, 3, 3, 29]]) {
        const take = <T extends Float32Array | Int32Array>(data: T, width: number): T =>
          (data.constructor as unknown as { from(v: number[]): T }).from(
            ids.flatMap((t) => Array.from(data.subarray(t * width, (t + 1) * width))),
          );
        const n = ids.length;
        const picked = run(
          {
            ...p,
            x: new Tensor('float32', take(p.x.data as Float32Array, d), [n, d]),
            gradOutput: new Tensor('float32', take(p.gradOutput.data as Float32Array, d), [n, d]),
            routing: {
              indices: new Tensor('int32', take(p.routing.indices.data, k), [n, k]),
              weights: new Tensor('float32', take(p.routing.weights.data, k), [n, k]),
            },
          },
          { type },
        );
        expect(picked.x.data).toEqual(take(all.x.data, d));
        expect(picked.weights.data).toEqual(take(all.weights.data, k));
      }
    },
  );

  it('experts without routes and routes of id -1 have zero gradients, written over what was there', () => {
    use();
    const p = problem({ ...layerShape, layout: 'stacked', tokens: 3, k: 1 }, 6);
    p.routing.indices.data.set([4, -1, 4]);
    const dirty = run(p);
    for (const t of gradientList(dirty)) (t.data as Float32Array).fill(99);
    const g = run(p, { out: dirty });
    expect(gradientList(g)).toEqual(gradientList(run(p)));
    expect(gradientList(g).every((t, i) => t.data === gradientList(dirty)[i].data)).toBe(true);
    for (const t of [g.gate, g.up, g.down, ...Object.values(g.biases ?? {})] as Tensor[]) {
      const size = t.data.length / 5;
      expect((t.data as Float32Array).subarray(0, 4 * size).every((v) => v === 0)).toBe(true);
      expect((t.data as Float32Array).subarray(4 * size).some((v) => v !== 0)).toBe(true);
    }
    expect(g.x.data.subarray(40, 80).every((v) => v === 0)).toBe(true);
    expect(g.x.data.subarray(80).every((v) => v !== 0)).toBe(true);
    expect(g.weights.data[1]).toBe(0);
  });

  it('no tokens, no slots: zeros', () => {
    use();
    for (const [tokens, k] of [
      [0, 2],
      [3, 0],
    ]) {
      const g = run(problem({ ...layerShape, tokens, k }, 6));
      expect(g.x.dims).toEqual([tokens, 40]);
      expect(g.weights.dims).toEqual([tokens, k]);
      expect(gradientList(g).every((t) => (t.data as Float32Array).every((v) => v === 0))).toBe(true);
    }
  });

  const kinds = ['silu', 'clamped-swiglu', 'gelu-tanh', 'gelu', 'relu', 'relu-squared', 'identity'] as const;
  it.each(kinds)('%s: a NaN stays in its token and its experts', (activation) => {
    use();
    for (const layout of ['separate', 'ungated'] as const) {
      const p = problem({ ...layerShape, layout }, 8);
      const ups = (g: ExpertGradients) => [g.up].flat() as Tensor<'float32'>[];
      const good = run(p, { activation });
      const [t, d] = [20, layerShape.hidden];
      (p.x.data as Float32Array)[t * d + 3] = NaN;
      const g = run(p, { activation });
      const linear = activation === 'identity' && layout === 'ungated'; // its gradient does not depend on x
      expect(g.x.data.subarray(t * d, (t + 1) * d).every((v) => Number.isNaN(v))).toBe(!linear);
      expect(g.x.data.subarray(0, t * d)).toEqual(good.x.data.subarray(0, t * d));
      expect(g.x.data.subarray((t + 1) * d)).toEqual(good.x.data.subarray((t + 1) * d));
      const hit = p.routing.indices.data.subarray(t * 2, t * 2 + 2);
      const size = layerShape.intermediate * d;
      const all = ups(g).flatMap((u) => Array.from(u.data));
      for (let e = 0; e < 5; e++) {
        const up = all.slice(e * size, (e + 1) * size);
        expect(up.some((v) => Number.isNaN(v))).toBe(hit.includes(e));
      }
    }
  });

  it('bfloat16 gradients are those of the rounded weights', () => {
    use();
    const shape: Shape = { ...layerShape, source: 'bfloat16' };
    const rounded = problem(shape, 9);
    const a = run(rounded);
    const b = run(rounded, { type: 'float32' });
    for (const [i, t] of gradientList(a).entries()) {
      const expected = gradientList(b)[i].data as Float32Array;
      const difference = Math.hypot(...(t.data as Float32Array).map((v, j) => v - expected[j]));
      expect(difference).toBeLessThan(1e-2 * Math.hypot(...expected));
    }
  });

  it('shared experts: a second call with one slot, as the documentation says', () => {
    use();
    const p = problem({ ...layerShape, tokens: 4, experts: 1, k: 1 }, 10);
    p.routing.indices.data.fill(0);
    const g = run(p);
    const shared = packExpertsSync(p.sources, { ...options, biases: p.biases });
    const nowhere: Routing = {
      indices: new Tensor('int32', new Int32Array(4).fill(-1), [4, 1]),
      weights: zeros([4, 1]),
    };
    const sharedGate = new Tensor('float32', p.routing.weights.data.slice(), [4]);
    const value = () => {
      const y = expertsForwardSync(p.x, nowhere, shared, { ...options, shared, sharedGate }).data;
      return Array.from(y as Float32Array, (v, i) => v * (p.gradOutput.data[i] as number)).reduce(
        (a, b) => a + b,
      );
    };
    for (let t = 0; t < 4; t++) {
      const old = sharedGate.data[t];
      sharedGate.data[t] = old + 0.5;
      const high = value();
      sharedGate.data[t] = old - 0.5;
      const slope = high - value(); // linear in the gate: exact but for rounding
      sharedGate.data[t] = old;
      expect(Math.abs(slope - g.weights.data[t])).toBeLessThan(1e-4 * (1 + Math.abs(slope)));
    }
  });

  it('a few steps of SGD bring a layer to its teacher', async () => {
    use();
    const [tokens, experts, k, d, f] = [96, 4, 2, 12, 16];
    const random = new Random(12);
    const make = (rows: number, columns: number) =>
      new Tensor('float32', random.normals(experts * rows * columns, columns ** -0.5), [
        experts,
        rows,
        columns,
      ]);
    const teacher = { gate: make(f, d), up: make(f, d), down: make(d, f) };
    const student = { gate: make(f, d), up: make(f, d), down: make(d, f) };
    const x = new Tensor('float32', random.normals(tokens * d), [tokens, d]);
    const logits = new Tensor('float32', random.normals(tokens * experts), [tokens, experts]);
    const routing = routeTopKSync(logits, { ...options, k, normalize: true });
    const forward = (sources: ExpertSources) => {
      const weights = packExpertsSync(sources, options);
      const y = expertsForwardSync(x, routing, weights).data as Float32Array;
      weights.dispose();
      return y;
    };
    const target = forward(teacher);
    const losses: number[] = [];
    let out: ExpertGradients | undefined;
    for (let step = 0; step < 40; step++) {
      const error = forward(student).map((v, i) => v - target[i]);
      losses.push(error.reduce((sum, v) => sum + v * v, 0) / error.length);
      const dy = new Tensor(
        'float32',
        error.map((v) => (2 * v) / tokens),
        [tokens, d],
      );
      out = await expertsBackward(dy, x, routing, student, { ...options, out });
      for (const name of ['gate', 'up', 'down'] as const) {
        const g = (out[name] as Tensor<'float32'>).data;
        student[name].data.forEach((v, i) => {
          student[name].data[i] = v - 0.5 * g[i];
        });
      }
    }
    expect(losses[39]).toBeLessThan(0.2 * losses[0]);
    for (let i = 1; i < 6; i++) expect(losses[i]).toBeLessThan(losses[i - 1]);
  });

  it('an aborted call rejects', async () => {
    use();
    const p = problem(layerShape, 5);
    const signal = AbortSignal.abort();
    await expectRejection(
      expertsBackward(p.gradOutput, p.x, p.routing, p.sources, { ...options, signal }),
      'ERR_ABORTED',
      /expertsBackward was aborted/,
    );
  });
});

it('concurrent backwards do not disturb each other', async () => {
  const problems = Array.from({ length: 8 }, (_, i) => problem({ ...layerShape, tokens: 1 + 13 * i }, i));
  const args = (p: Problem) => [p.gradOutput, p.x, p.routing, p.sources, { biases: p.biases }] as const;
  const expected = problems.map((p) => gradientList(expertsBackwardSync(...args(p))));
  const actual = await Promise.all(problems.map((p) => expertsBackward(...args(p))));
  for (const [i, g] of actual.entries()) expect(sameBits(gradientList(g), expected[i])).toBe(true);
});

describe.each(everywhere)('bad input on $name', ({ options, use }) => {
  it('is refused with code and name', () => {
    use();
    const good = problem(
      { ...layerShape, tokens: 2, experts: 3, hidden: 8, intermediate: 4, layout: 'stacked' },
      1,
    );
    const refuse = (
      change: Partial<Record<keyof Problem, unknown>>,
      o: object,
      code: never,
      message: RegExp,
    ) => {
      const p = { ...good, ...change } as Problem;
      expectThrow(
        () => expertsBackwardSync(p.gradOutput, p.x, p.routing, p.sources, { ...options, ...o }),
        code,
        message,
      );
    };
    const check = (change: Partial<Record<keyof Problem, unknown>>, code: string, message: RegExp) =>
      refuse(change, {}, code as never, message);
    const option = (o: object, code: string, message: RegExp) => refuse({}, o, code as never, message);
    const ids = (a: number[]) => ({
      indices: new Tensor('int32', Int32Array.from(a), [2, a.length / 2]),
      weights: zeros([2, a.length / 2]),
    });
    const s = good.sources;
    check({ gradOutput: zeros([2, 7]) }, 'ERR_SHAPE', /^gradOutput: expected \[2, 8\], got \[2, 7\]/);
    check({ gradOutput: zeros([3, 8]) }, 'ERR_SHAPE', /^gradOutput: expected \[2, 8\]/);
    check({ gradOutput: null }, 'ERR_ARGUMENT', /^gradOutput/);
    check({ x: zeros([2, 9]) }, 'ERR_SHAPE', /^x: expected \[tokens, 8\]/);
    check({ x: new Tensor('int32', new Int32Array(16), [2, 8]) }, 'ERR_DTYPE', /^x: type int32/);
    check({ routing: null }, 'ERR_ARGUMENT', /^routing/);
    check(
      { routing: { ...ids([0, 1]), weights: zeros([2, 2]) } },
      'ERR_SHAPE',
      /^routing.weights: expected \[2, 1\]/,
    );
    check(
      { routing: { indices: ids([0, 1, 2, 0]).indices.reshape([4, 1]), weights: zeros([4, 1]) } },
      'ERR_SHAPE',
      /^routing.indices: expected \[2, 1\]/,
    );
    check({ routing: ids([0, 1, 2, 3]) }, 'ERR_VALUE', /^routing.indices\[1, 1\] is 3/);
    check({ routing: ids([0, -2]) }, 'ERR_VALUE', /^routing.indices\[1, 0\] is -2/);
    check({ sources: { ...s, down: undefined } }, 'ERR_ARGUMENT', /^down/);
    check({ sources: { ...s, up: zeros([3, 5, 8]) } }, 'ERR_SHAPE', /^up: expected \[4, 8\]/);
    check({ sources: { up: zeros([3, 0, 8]), down: zeros([3, 8, 0]) } }, 'ERR_SHAPE', /have no weights/);
    option({ type: 'int8' }, 'ERR_OPTION', /^type must be one of float32, bfloat16, got "int8"/);
    option({ activation: 'swish' }, 'ERR_OPTION', /^activation/);
    option({ limit: -1 }, 'ERR_OPTION', /^limit/);
    option({ alpha: NaN }, 'ERR_OPTION', /^alpha/);
    option({ shared: 1 }, 'ERR_OPTION', /unknown option 'shared'/);
    option({ biases: { down: zeros([3, 4]) } }, 'ERR_SHAPE', /^biases.down: expected \[3, 8\]/);
    option({ biases: { gate: zeros([3, 4]) } }, 'ERR_ARGUMENT', /gate and up together/);
    option(
      { biases: { gateUp: zeros([3, 8]), up: zeros([3, 4]) } },
      'ERR_ARGUMENT',
      /^biases: give either gateUp/,
    );
    refuse(
      { sources: { up: s.up, down: s.down } },
      { biases: { gate: zeros([3, 4]) } },
      'ERR_ARGUMENT' as never,
      /^biases.gate: the experts have no gate/,
    );
    const out = () => expertsBackwardSync(good.gradOutput, good.x, good.routing, s, options);
    option({ out: 1 }, 'ERR_ARGUMENT', /^out: expected the gradients/);
    option({ out: { ...out(), gate: undefined } }, 'ERR_ARGUMENT', /^out.gate/);
    option({ out: { ...out(), x: zeros([2, 7]) } }, 'ERR_SHAPE', /^out.x: expected dims \[2, 8\]/);
    option({ out: { ...out(), down: s.down } }, 'ERR_ARGUMENT', /^out.down overlaps/);
    option({ out: { ...out(), x: good.gradOutput } }, 'ERR_ARGUMENT', /^out.x overlaps/);
    const twice = out();
    option({ out: { ...twice, up: twice.gate } }, 'ERR_ARGUMENT', /^out.up overlaps/);
    option({ out: out(), biases: { down: zeros([3, 8]) } }, 'ERR_ARGUMENT', /^out.biases.down/);
  });
});
