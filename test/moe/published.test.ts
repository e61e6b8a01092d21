import { describe, expect, it } from 'vitest';
import { Tensor } from '../../lib/index.ts';
import {
  combineSync,
  type DispatchPlan,
  expertCapacity,
  importanceLossSync,
  loadBalancingLossSync,
  permuteSync,
  planDispatchSync,
  type RouteTopKOptions,
  routeExpertChoiceSync,
  routerZLossSync,
  routeTopKSync,
} from '../../lib/moe/index.ts';
import { Random } from '../cases/random.ts';
import { everyVariant } from '../helpers/backends.ts';
import { expectNear, floatTensor, type GoldenTensor, intTensor, readGolden } from '../helpers/golden.ts';

// Literal values from the tests of other projects; see test/golden/published/README.md. Not replayed: V-MoE's load
// loss, which is of noisy gating, an op that heddle does not have.

interface Published<Options, Expected> {
  inputs: Record<string, GoldenTensor>;
  options: Options;
  expected: Expected;
}
const published = <T>(name: string) => readGolden<T>(`published/${name}.json`);

/** Gates that are used as they are: sigmoid scores of their log-odds. */
function gatesAsLogits(gates: GoldenTensor): Tensor<'float32'> {
  return floatTensor({ dims: gates.dims, data: gates.data.map((p) => Math.log(p / (1 - p))) });
}

/** The rows of one expert in expert order. */
const rowsOf = (plan: DispatchPlan, e: number) => [plan.offsets.data[e], plan.offsets.data[e + 1]];

describe.each(everyVariant())('published cases on $name', ({ options, use }) => {
  it('vLLM: moe_align_block_size', () => {
    use();
    const c =
      published<
        Published<
          { numExperts: number },
          { sortedRoutes: number[]; paddingId: number; countsPerExpert: number[] }
        >
      >('vllm_moe_align_block_size');
    const plan = planDispatchSync(intTensor(c.inputs['indices']), {
      ...options,
      numExperts: c.options.numExperts,
    });
    const { sortedRoutes, paddingId, countsPerExpert } = c.expected;
    expect(Array.from(plan.order.data)).toEqual(sortedRoutes.filter((i) => i !== paddingId));
    expect(countsPerExpert.map((_, e) => rowsOf(plan, e)[1] - rowsOf(plan, e)[0])).toEqual(countsPerExpert);
  });

  it('V-MoE: capacity by slots, with and without batch priority', () => {
    use();
    interface Case {
      options: { k: number; capacity: number; batchPrioritized: boolean };
      expected: {
        indices: number[][];
        kept: boolean[][];
        weights: number[][];
        combineTokenExpertSlot: number[][][];
      };
    }
    const file = published<{ inputs: { gates: GoldenTensor }; cases: Case[] }>('vmoe_capacity');
    for (const { options: o, expected } of file.cases) {
      const logits = gatesAsLogits(file.inputs.gates);
      const { indices, weights } = routeTopKSync(logits, { ...options, k: o.k, score: 'sigmoid' });
      expect(Array.from(indices.data)).toEqual(expected.indices.flat());
      expectNear(weights.data, expected.weights.flat());
      const plan = planDispatchSync(indices, {
        ...options,
        numExperts: 3,
        capacity: o.capacity,
        ...(o.batchPrioritized ? { drop: 'batch-priority', weights } : { drop: 'slot' }),
      });
      // Their place in an expert's buffer follows priority, ours the token: only who stays can be compared.
      expect(Array.from(plan.inverse.data, (at) => at >= 0)).toEqual(expected.kept.flat());
      // Experts that answer with their own unit vector make combine show each token's weight per expert.
      const y = new Float32Array(plan.order.data.length * 3);
      plan.order.data.forEach((route, r) => {
        y[r * 3 + indices.data[route]] = 1;
      });
      const combined = combineSync(new Tensor('float32', y, [y.length / 3, 3]), plan, weights, options);
      const perExpert = expected.combineTokenExpertSlot.flatMap((token) =>
        token.map((slots) => slots.reduce((a, b) => a + b, 0)),
      );
      expectNear(combined.data, perExpert);
    }
  });

  it('V-MoE: expert choice', () => {
    use();
    const c =
      published<
        Published<{ capacity: number }, { tokensPerExpert: number[][]; weightsPerExpert: number[][] }>
      >('vmoe_expert_choice');
    const chosen = routeExpertChoiceSync(gatesAsLogits(c.inputs['gates']), {
      ...options,
      capacity: c.options.capacity,
      score: 'sigmoid',
    });
    expect(Array.from(chosen.indices.data)).toEqual(c.expected.tokensPerExpert.flat());
    expectNear(chosen.weights.data, c.expected.weightsPerExpert.flat());
  });

  it('V-MoE: GShard and importance losses', () => {
    use();
    const file = published<{ cases: ({ name: string } & Published<unknown, { loss: number }>)[] }>(
      'vmoe_losses',
    );
    const given = { ...options, score: 'none' as const };
    const gshard = file.cases.find((c) => c.name === 'gshard')!;
    const p = floatTensor(gshard.inputs['probabilities']);
    const first = new Tensor('int32', Int32Array.from([0, 2, 2, 0]), [4, 1]); // the largest gate of each row
    expect(loadBalancingLossSync(p, first, given).value).toBeCloseTo(gshard.expected.loss, 6);
    const importance = file.cases.find((c) => c.name === 'importance')!;
    const q = floatTensor(importance.inputs['probabilities']);
    expect(importanceLossSync(q, given).value).toBeCloseTo(importance.expected.loss, 6);
  });

  it('Switch: load balancing, z-loss and router', () => {
    use();
    const file = published<{
      cases: ({ name: string } & Published<unknown, Record<string, number>>)[];
    }>('switch_losses');
    const [balancing, z, router] = ['load balancing', 'z-loss', 'router'].map(
      (name) => file.cases.find((c) => c.name === name)!,
    );
    const p = floatTensor(balancing.inputs['probabilities']);
    const ids = intTensor(balancing.inputs['indices']);
    const loss = loadBalancingLossSync(p, ids, { ...options, score: 'none' }).value;
    expect(Math.abs(loss - balancing.expected['loss'])).toBeLessThan(1e-5);
    const logits = z.inputs['logits'];
    const zLoss = routerZLossSync(floatTensor({ dims: [12, 4], data: logits.data }), options).value;
    expect(Math.abs(zLoss - z.expected['loss'])).toBeLessThan(1e-5);

    const x = router.inputs['input'].data;
    const w = router.inputs['classifierTransposed'].data;
    const routed = Array.from({ length: 6 * 2 }, (_, i) =>
      [0, 1, 2, 3].reduce((a, h) => a + x[Math.floor(i / 2) * 4 + h] * w[h * 2 + (i % 2)], 0),
    );
    const l = floatTensor({ dims: [6, 2], data: routed });
    const { indices } = routeTopKSync(l, { ...options, k: 1 });
    const { loadBalancingLoss, zLoss: expectedZ } = router.expected;
    expect(Math.abs(loadBalancingLossSync(l, indices, options).value - loadBalancingLoss)).toBeLessThan(1e-5);
    expect(Math.abs(routerZLossSync(l, options).value - expectedZ)).toBeLessThan(1e-5);
  });

  it('DeepSpeed: capacity with drop by position and by probability', () => {
    use();
    type Case = Published<
      { k: number; capacity: number; drop: string | null },
      { keptTokenExpertPosition: number[][] }
    >;
    const file = published<{ cases: Case[] }>('deepspeed_capacity');
    for (const { inputs, options: o, expected } of file.cases) {
      for (const factor of [1, 2]) {
        const { dims, data } = inputs['logits'];
        const logits = floatTensor({ dims, data: data.map((x) => factor * x) });
        const { indices, weights } = routeTopKSync(logits, { ...options, k: o.k });
        const numExperts = dims[1];
        const size = { tokens: dims[0], k: o.k, numExperts, factor: 1, style: 'megatron' as const };
        if (o.drop !== null) expect(expertCapacity(size)).toBe(o.capacity);
        const plan = planDispatchSync(indices, {
          ...options,
          numExperts,
          ...(o.drop === null ? {} : { capacity: o.capacity }),
          ...(o.drop === 'probability' ? { drop: 'weight', weights } : {}),
        });
        const kept = Array.from({ length: numExperts }, (_, e) => {
          const [begin, end] = rowsOf(plan, e);
          return Array.from(plan.order.data.slice(begin, end), (route, i) => [Math.floor(route / o.k), e, i]);
        });
        expect(kept.flat().sort((a, b) => a[0] - b[0] || a[1] - b[1])).toEqual(
          expected.keptTokenExpertPosition,
        );
      }
    }
  });

  /** The whole block: route, dispatch, a plain MLP per expert, combine. */
  function moe(
    c: Published<{ k: number; normalize: boolean }, { output: GoldenTensor }>,
    mlp: (expert: number, x: Float32Array) => number[],
  ): Float32Array {
    use();
    const routing: RouteTopKOptions = { k: c.options.k, normalize: c.options.normalize };
    const logits = floatTensor(c.inputs['logits']);
    const { indices, weights } = routeTopKSync(logits, { ...options, ...routing });
    const plan = planDispatchSync(indices, { ...options, numExperts: logits.dims[1] });
    const x = permuteSync(floatTensor(c.inputs['input']), plan, options);
    const width = x.dims[1];
    const y = new Float32Array(x.data.length);
    for (let e = 0; e < plan.numExperts; e++) {
      const [begin, end] = rowsOf(plan, e);
      for (let r = begin; r < end; r++) {
        y.set(mlp(e, (x.data as Float32Array).slice(r * width, (r + 1) * width)), r * width);
      }
    }
    return combineSync(new Tensor('float32', y, x.dims), plan, weights, options).data as Float32Array;
  }

  /** W[expert] x for weights [experts, out, in]. */
  const product = (w: GoldenTensor, e: number, x: ArrayLike<number>): number[] => {
    const [, rows, columns] = w.dims;
    return Array.from({ length: rows }, (_, i) =>
      Array.from({ length: columns }, (_, j) => w.data[(e * rows + i) * columns + j] * x[j]).reduce(
        (a, b) => a + b,
      ),
    );
  };

  it('onnxruntime: top-1, not normalised, ReLU', () => {
    const c =
      published<Published<{ k: number; normalize: boolean }, { output: GoldenTensor }>>(
        'onnxruntime_moe_relu',
      );
    const { w1, b1, w2, b2 } = c.inputs;
    const out = moe(c, (e, x) => {
      const h = product(w1, e, x).map((v, i) => Math.max(0, v + b1.data[e * b1.dims[1] + i]));
      return product(w2, e, h).map((v, i) => v + b2.data[e * b2.dims[1] + i]);
    });
    expectNear(out, c.expected.output.data, 1e-4); // what the published digits are good for
  });

  it('onnxruntime: Mixtral, top-2 normalised', () => {
    const c =
      published<Published<{ k: number; normalize: boolean }, { output: GoldenTensor }>>(
        'onnxruntime_moe_mixtral',
      );
    const { gate, up, down } = c.inputs;
    const out = moe(c, (e, x) => {
      const u = product(up, e, x);
      return product(
        down,
        e,
        product(gate, e, x).map((g, i) => (g / (1 + Math.exp(-g))) * u[i]),
      );
    });
    expectNear(out, c.expected.output.data);
  });

  it('vLLM: dispatch with an expert map, even experts local', () => {
    use();
    const random = new Random(1);
    for (const [tokens, k] of [
      [16, 2],
      [16, 4],
      [32, 2],
      [32, 4],
    ]) {
      const ids = distinctIds(random, tokens, k, 8);
      const expertMap = Int32Array.from({ length: 8 }, (_, e) => (e % 2 === 0 ? e / 2 : -1));
      const plan = planDispatchSync(ids, { ...options, numExperts: 4, expertMap });
      const local = Int32Array.from(ids.data, (id) => expertMap[id]);
      const [order, offsets] = sorted(local, 4);
      expect(Array.from(plan.order.data)).toEqual(order);
      expect(Array.from(plan.offsets.data)).toEqual(offsets);
    }
  });
});

describe('shapes of vLLM test_moe_align_block_size', () => {
  const random = new Random(2);
  const shapes = [1, 3, 256, 2256, 4096].flatMap((tokens) =>
    [1, 2, 16, 32].flatMap((k) => [32, 160, 256, 257].map((experts) => ({ tokens, k, experts }))),
  );
  it.each(shapes)('T=$tokens k=$k E=$experts', ({ tokens, k, experts }) => {
    const ids = distinctIds(random, tokens, k, experts);
    const plan = planDispatchSync(ids, { numExperts: experts });
    const [order, offsets] = sorted(ids.data, experts);
    expect(Buffer.from(plan.order.data.buffer).equals(Buffer.from(Int32Array.from(order).buffer))).toBe(true);
    expect(Array.from(plan.offsets.data)).toEqual(offsets);
  });

  it('ids with repeats, five runs identical', () => {
    const data = Int32Array.from({ length: 256 }, () => random.integer(0, 31));
    const ids = new Tensor('int32', data, [128, 2]);
    const runs = Array.from({ length: 5 }, (_, i) =>
      planDispatchSync(ids, { numExperts: 32, threads: 1 + i }),
    );
    for (const run of runs) expect(run).toEqual(runs[0]);
    expect(Array.from(runs[0].order.data)).toEqual(sorted(data, 32)[0]);
  });
});

it('V-MoE: capacity from a factor', () => {
  interface Case {
    options: { tokens: number; numExperts: number; k?: number; capacityFactor: number };
    expected: number;
  }
  for (const { options: o, expected } of published<{ cases: Case[] }>('vmoe_capacity_size').cases) {
    const { tokens, numExperts, k = 1, capacityFactor: factor } = o;
    expect(expertCapacity({ tokens, numExperts, k, factor, style: 'vmoe' })).toBe(expected);
  }
});

/** `[tokens, k]` ids, distinct in each row. */
function distinctIds(random: Random, tokens: number, k: number, experts: number): Tensor<'int32'> {
  const data = new Int32Array(tokens * k);
  const all = Int32Array.from({ length: experts }, (_, e) => e);
  for (let t = 0; t < tokens; t++) {
    for (let j = 0; j < k; j++) {
      const pick = random.integer(j, experts - 1);
      [all[j], all[pick]] = [all[pick], all[j]];
      data[t * k + j] = all[j];
    }
  }
  return new Tensor('int32', data, [tokens, k]);
}

/** Routes by a stable sort of their ids (negative ones left out), and the offsets of the experts. */
function sorted(ids: Int32Array, experts: number): [number[], number[]] {
  const order = Array.from(ids.keys())
    .filter((i) => ids[i] >= 0)
    .sort((a, b) => ids[a] - ids[b]);
  const offsets = new Array(experts + 1).fill(0);
  for (const i of order) offsets[ids[i] + 1]++;
  for (let e = 0; e < experts; e++) offsets[e + 1] += offsets[e];
  return [order, offsets];
}
