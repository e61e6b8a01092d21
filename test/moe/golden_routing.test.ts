import { describe, expect, it } from 'vitest';
import {
  importanceLossSync,
  loadBalancingLossSync,
  loadLossSync,
  type RouterLoss,
  type RouteTopKOptions,
  routeExpertChoiceSync,
  routerZLossSync,
  routeSinkhornSync,
  routeTopKBackwardSync,
  routeTopKSync,
  routeWithSync,
} from '../../lib/moe/index.ts';
import { everyVariant } from '../helpers/backends.ts';
import { expectNear, floatTensor, type GoldenTensor, intTensor, readGolden } from '../helpers/golden.ts';

// Computed in float64 by PyTorch; see test/golden/make_routing.py.

interface LossValue {
  loss: number;
  gradient: GoldenTensor;
}

interface Golden {
  routeTopK: {
    name: string;
    options: {
      k: number;
      score: 'softmax' | 'sigmoid' | 'softmaxSelected';
      normalize: boolean;
      epsilon: number;
      scale: number;
      groups?: number;
      topkGroups?: number;
      groupScore?: 'max' | 'top2';
    };
    logits: GoldenTensor;
    bias?: GoldenTensor;
    indices: GoldenTensor;
    weights: GoldenTensor;
    upstream: GoldenTensor;
    gradient: GoldenTensor;
    indicesMaskedWithZero?: GoldenTensor;
  }[];
  routeExpertChoice: {
    name: string;
    options: { capacity: number };
    logits: GoldenTensor;
    tokensPerExpert: GoldenTensor;
    weightsPerExpert: GoldenTensor;
  }[];
  sinkhorn: {
    name: string;
    options: { k: number; tolerance: number; epsilon: number };
    logits: GoldenTensor;
    iterations: number;
    indices: GoldenTensor;
    weights: GoldenTensor;
  }[];
  losses: {
    name: string;
    options: { k: number };
    logits: GoldenTensor;
    indices: GoldenTensor;
    loadBalancing: LossValue;
    loadBalancingTransformers: LossValue;
    z: LossValue;
    importance: LossValue;
    load: { loss: number };
  }[];
}

const golden = readGolden<Golden>('moe/routing.json');

describe.each(everyVariant())('golden routing on $name', ({ options, use }) => {
  it.each(golden.routeTopK)('routeTopK: $name', (c) => {
    use();
    const { k, score, normalize, epsilon, scale, groups, topkGroups, groupScore } = c.options;
    const router =
      score === 'softmaxSelected'
        ? { softmaxOver: 'selected' as const, scale }
        : { score, normalize, normalizeEpsilon: epsilon, scale };
    const routing: RouteTopKOptions = { k, ...router };
    if (c.bias) routing.selectionBias = Float32Array.from(c.bias.data);
    if (groups) {
      routing.groups = { count: groups, keep: topkGroups as number, score: groupScore as 'max' };
    }
    const logits = floatTensor(c.logits);
    const routed = routeTopKSync(logits, { ...options, ...routing });
    expect(Array.from(routed.indices.data)).toEqual(c.indices.data);
    expectNear(routed.weights.data, c.weights.data);
    if (c.indicesMaskedWithZero) {
      expect(Array.from(routed.indices.data)).not.toEqual(c.indicesMaskedWithZero.data);
    }
    const replayed = routeWithSync(intTensor(c.indices), logits, { ...options, ...router });
    expectNear(replayed.weights.data, c.weights.data);

    const back = { ...options, ...router, indices: routed.indices };
    expectNear(routeTopKBackwardSync(floatTensor(c.upstream), logits, back).data, c.gradient.data);
  });

  it.each(golden.routeExpertChoice)('routeExpertChoice: $name', (c) => {
    use();
    const { capacity } = c.options;
    const chosen = routeExpertChoiceSync(floatTensor(c.logits), { ...options, capacity });
    expect(chosen.indices.dims).toEqual(c.tokensPerExpert.dims);
    expect(Array.from(chosen.indices.data)).toEqual(c.tokensPerExpert.data);
    expectNear(chosen.weights.data, c.weightsPerExpert.data);
  });

  it.each(golden.sinkhorn)('routeSinkhorn: $name', (c) => {
    use();
    const routed = routeSinkhornSync(floatTensor(c.logits), { ...options, ...c.options });
    expect(Array.from(routed.indices.data)).toEqual(c.indices.data);
    expectNear(routed.weights.data, c.weights.data);
    expect(routed.iterations).toBe(c.iterations);
    expect(routed.converged).toBe(true);
  });

  it.each(golden.losses)('losses: $name', (c) => {
    use();
    const logits = floatTensor(c.logits);
    const indices = intTensor(c.indices);
    const o = { ...options, gradient: true };
    const check = (actual: RouterLoss, expected: LossValue) => {
      expectNear([actual.value], [expected.loss]);
      expectNear(actual.gradient!.data, expected.gradient.data);
    };
    check(loadBalancingLossSync(logits, indices, o), c.loadBalancing);
    check(
      loadBalancingLossSync(logits, indices, { ...o, normalization: 'tokens' }),
      c.loadBalancingTransformers,
    );
    check(routerZLossSync(logits, o), c.z);
    check(importanceLossSync(logits, o), c.importance);
    const load = loadLossSync(indices, { ...options, numExperts: c.logits.dims[1] });
    expectNear([load.value], [c.load.loss]);
    expect(load.gradient).toBeUndefined();
  });
});
