import { xoroshiro128plus } from 'pure-rand/generator/xoroshiro128plus';
import { describe, expect, it } from 'vitest';
import {
  adaptThreshold,
  type ClipOptions,
  clipFactorsReference,
} from '../../lib/reference/privacy/clipFactors.ts';
import { clippedGradientsReference } from '../../lib/reference/privacy/clippedGradients.ts';
import { type Gradients, type Layer, zeroGradients } from '../../lib/reference/privacy/layers.ts';
import { perSampleGradient } from '../../lib/reference/privacy/perSampleGradient.ts';
import { perSampleSquaredNormsReference } from '../../lib/reference/privacy/perSampleSquaredNorms.ts';

const generator = xoroshiro128plus(6);
const random = (count: number) =>
  Float64Array.from({ length: count }, () => (generator.next() / 2 ** 31) * 1.5);
const integers = (count: number, below: number) =>
  Float64Array.from({ length: count }, () => (generator.next() >>> 0) % below);

type Forward = (parameters: Gradients, sample: number) => number;
interface Case {
  name: string;
  layer: Layer;
  /** Σ ∂L/∂output ∘ output(parameters), in other words than the reference's. */
  loss: Forward;
}

function cases(): Case[] {
  const list: Case[] = [];
  const mask = [1, 1, 0, 1, 1, 1, 0, 0, 0]; // 3 samples × 3 positions; the last sample is all padding
  for (const [name, m] of [
    ['linear', null],
    ['linear, padded', mask],
  ] as const) {
    const [B, T, d, p] = [3, 3, 4, 2];
    const A = random(B * T * d);
    const G = random(B * T * p);
    m?.forEach((on, row) => {
      if (on === 0) A.fill(Number.NaN, row * d, (row + 1) * d); // padding is not read
    });
    list.push({
      name,
      layer: {
        kind: 'linear',
        activations: A,
        gradOutputs: G,
        samples: B,
        positions: T,
        inputs: d,
        outputs: p,
        bias: true,
        mask: m,
      },
      loss: (w, i) => {
        let sum = 0;
        for (let t = 0; t < T; t++) {
          if (m !== null && m[i * T + t] === 0) continue;
          for (let o = 0; o < p; o++) {
            let y = w.bias[o];
            for (let j = 0; j < d; j++) y += w.weight[o * d + j] * A[(i * T + t) * d + j];
            sum += G[(i * T + t) * p + o] * y;
          }
        }
        return sum;
      },
    });
  }
  {
    const [B, T, p, V] = [3, 5, 2, 4];
    const ids = integers(B * T, V);
    const G = random(B * T * p);
    for (const paddingIndex of [-1, 1]) {
      list.push({
        name: `embedding, padding index ${paddingIndex}`,
        layer: {
          kind: 'embedding',
          indices: ids,
          gradOutputs: G,
          samples: B,
          positions: T,
          outputs: p,
          numEmbeddings: V,
          paddingIndex,
        },
        loss: (w, i) => {
          let sum = 0;
          for (let row = i * T; row < (i + 1) * T; row++) {
            if (ids[row] === paddingIndex) continue;
            for (let o = 0; o < p; o++) sum += G[row * p + o] * w.weight[ids[row] * p + o];
          }
          return sum;
        },
      });
    }
  }
  for (const kind of ['layer-norm', 'rms-norm'] as const) {
    const [B, T, p] = [3, 2, 4];
    const x = random(B * T * p);
    const G = random(B * T * p);
    const bias = kind === 'layer-norm';
    list.push({
      name: kind,
      layer: { kind, normalized: x, gradOutputs: G, samples: B, positions: T, outputs: p, bias },
      loss: (w, i) => {
        let sum = 0;
        for (let e = i * T * p; e < (i + 1) * T * p; e++) {
          sum += G[e] * (w.weight[e % p] * x[e] + (bias ? w.bias[e % p] : 0));
        }
        return sum;
      },
    });
  }
  {
    const [B, C, S] = [2, 4, 3];
    const x = random(B * C * S);
    const G = random(B * C * S);
    list.push({
      name: 'group-norm',
      layer: {
        kind: 'group-norm',
        normalized: x,
        gradOutputs: G,
        samples: B,
        channels: C,
        spatial: S,
        bias: true,
      },
      loss: (w, i) => {
        let sum = 0;
        for (let e = i * C * S; e < (i + 1) * C * S; e++) {
          const c = Math.floor(e / S) % C;
          sum += G[e] * (w.weight[c] * x[e] + w.bias[c]);
        }
        return sum;
      },
    });
  }
  {
    const [B, T, p, V] = [2, 4, 3, 5];
    const ids = integers(B * T, V);
    const Ge = random(B * T * p);
    const H = random(B * T * p);
    const Gl = random(B * T * V);
    list.push({
      name: 'tied-embedding',
      layer: {
        kind: 'tied-embedding',
        indices: ids,
        gradEmbeddings: Ge,
        hidden: H,
        gradLogits: Gl,
        samples: B,
        positions: T,
        width: p,
        numEmbeddings: V,
        paddingIndex: -1,
      },
      loss: (w, i) => {
        let sum = 0;
        for (let row = i * T; row < (i + 1) * T; row++) {
          for (let o = 0; o < p; o++) {
            sum += Ge[row * p + o] * w.weight[ids[row] * p + o];
            for (let v = 0; v < V; v++) sum += Gl[row * V + v] * H[row * p + o] * w.weight[v * p + o];
          }
        }
        return sum;
      },
    });
  }
  {
    const [N, B, E, d, p] = [9, 3, 2, 3, 2];
    const A = random(N * d);
    const G = random(N * p);
    const sampleOf = [0, 1, 0, 1, 1, 0, -1, 2, 0];
    const expertOf = [0, 0, 1, 1, 0, 0, 1, -1, 1];
    list.push({
      name: 'experts',
      layer: {
        kind: 'experts',
        activations: A,
        gradOutputs: G,
        sampleOf,
        expertOf,
        rows: N,
        samples: B,
        experts: E,
        inputs: d,
        outputs: p,
        bias: true,
      },
      loss: (w, i) => {
        let sum = 0;
        for (let n = 0; n < N; n++) {
          if (sampleOf[n] !== i || expertOf[n] < 0) continue;
          for (let o = 0; o < p; o++) {
            let y = w.bias[expertOf[n] * p + o];
            for (let j = 0; j < d; j++) y += w.weight[(expertOf[n] * p + o) * d + j] * A[n * d + j];
            sum += G[n * p + o] * y;
          }
        }
        return sum;
      },
    });
  }
  list.push(conv('conv1d', [7], [3], [2], [1], [2], 1), conv('conv1d', [6], [2], [1], [0], [1], 2));
  list.push(conv('conv2d', [5, 4], [3, 2], [2, 1], [1, 1], [1, 2], 2));
  list.push(conv('conv2d', [3, 3], [3, 3], [1, 1], [1, 1], [1, 1], 4));
  list.push(conv('conv3d', [3, 4, 3], [2, 2, 1], [1, 2, 1], [1, 0, 0], [1, 1, 1], 2));
  return list;
}

/** A convolution by scattering every input to the outputs it reaches: the other way round to an unfold. */
function conv(
  kind: 'conv1d' | 'conv2d' | 'conv3d',
  size: number[],
  kernel: number[],
  stride: number[],
  padding: number[],
  dilation: number[],
  groups: number,
): Case {
  const [B, Ci, Co] = [2, 4, 4];
  const outputSize = size.map((n, a) =>
    Math.floor((n + 2 * padding[a] - dilation[a] * (kernel[a] - 1) - 1) / stride[a] + 1),
  );
  const volume = (extents: number[]) => extents.reduce((x, y) => x * y, 1);
  const input = random(B * Ci * volume(size));
  const G = random(B * Co * volume(outputSize));
  const three = (extents: number[], fill: number) => [
    ...new Array(3 - extents.length).fill(fill),
    ...extents,
  ];
  const [D, H, W] = three(size, 1);
  const [KD, KH, KW] = three(kernel, 1);
  const [OD, OH, OW] = three(outputSize, 1);
  const [S, P, L] = [three(stride, 1), three(padding, 0), three(dilation, 1)];
  const loss: Forward = (w, i) => {
    let sum = 0;
    for (let o = 0; o < Co; o++) {
      const g = Math.floor(o / (Co / groups));
      for (let e = 0; e < OD * OH * OW; e++) sum += G[(i * Co + o) * OD * OH * OW + e] * w.bias[o];
      for (let c = 0; c < Ci / groups; c++)
        for (let z = 0; z < D; z++)
          for (let y = 0; y < H; y++)
            for (let x = 0; x < W; x++)
              for (let a = 0; a < KD; a++)
                for (let b = 0; b < KH; b++)
                  for (let k = 0; k < KW; k++) {
                    const oz = (z + P[0] - a * L[0]) / S[0];
                    const oy = (y + P[1] - b * L[1]) / S[1];
                    const ox = (x + P[2] - k * L[2]) / S[2];
                    if (![oz, oy, ox].every(Number.isInteger)) continue;
                    if (oz < 0 || oy < 0 || ox < 0 || oz >= OD || oy >= OH || ox >= OW) continue;
                    const tap = (((o * (Ci / groups) + c) * KD + a) * KH + b) * KW + k;
                    const channel = i * Ci + g * (Ci / groups) + c;
                    const at = ((channel * D + z) * H + y) * W + x;
                    const to = (((i * Co + o) * OD + oz) * OH + oy) * OW + ox;
                    sum += G[to] * w.weight[tap] * input[at];
                  }
    }
    return sum;
  };
  return {
    name: `${kind}, size ${size}, kernel ${kernel}, stride ${stride}, padding ${padding}, dilation ${dilation}, groups ${groups}`,
    layer: {
      kind,
      input,
      gradOutputs: G,
      samples: B,
      inChannels: Ci,
      outChannels: Co,
      size,
      outputSize,
      kernel,
      stride,
      padding,
      dilation,
      groups,
      bias: true,
    },
    loss,
  };
}

const [B, T, d, p, r] = [2, 3, 4, 3, 2];
const loraLayer = (a: Float64Array, b: Float64Array, A: Float64Array, G: Float64Array): Layer => ({
  kind: 'lora',
  activations: A,
  gradOutputs: G,
  a,
  b,
  samples: B,
  positions: T,
  inputs: d,
  outputs: p,
  rank: r,
  scale: 0.5,
});

describe('per-sample gradients', () => {
  it.each(cases())('$name: the derivative of an independent forward', ({ layer, loss }) => {
    for (let i = 0; i < layer.samples; i++) {
      const gradient = perSampleGradient(layer, i);
      const point = zeroGradients(layer);
      expect(Object.keys(gradient)).toEqual(Object.keys(point));
      for (const [name, values] of Object.entries(point)) {
        expect(gradient[name].length).toBe(values.length);
        for (let e = 0; e < values.length; e++) {
          values[e] = 1; // the loss is linear in the parameters, so its value at a basis vector is the slope
          expect(Math.abs(gradient[name][e] - loss(point, i))).toBeLessThan(1e-12);
          values[e] = 0;
        }
      }
    }
  });

  it('lora: central differences of an independent forward', () => {
    const [a, b, A, G] = [random(r * d), random(p * r), random(B * T * d), random(B * T * p)];
    const layer = loraLayer(a, b, A, G);
    const loss = (i: number) => {
      let sum = 0;
      for (let t = i * T; t < (i + 1) * T; t++)
        for (let o = 0; o < p; o++)
          for (let k = 0; k < r; k++)
            for (let j = 0; j < d; j++)
              sum += 0.5 * G[t * p + o] * b[o * r + k] * a[k * d + j] * A[t * d + j];
      return sum;
    };
    for (let i = 0; i < B; i++) {
      const gradient = perSampleGradient(layer, i);
      for (const [name, values] of [
        ['a', a],
        ['b', b],
      ] as const) {
        for (let e = 0; e < values.length; e++) {
          const kept = values[e];
          values[e] = kept + 1;
          const above = loss(i);
          values[e] = kept - 1; // exact: the loss is linear in each entry
          const below = loss(i);
          values[e] = kept;
          expect(Math.abs(gradient[name][e] - (above - below) / 2)).toBeLessThan(1e-12);
        }
      }
    }
  });
});

describe('perSampleSquaredNorms', () => {
  it.each([
    ...cases().map(({ name, layer }) => ({ name, layer })),
    { name: 'lora', layer: loraLayer(random(r * d), random(p * r), random(B * T * d), random(B * T * p)) },
  ])('$name: ghost equals instantiated', ({ layer }) => {
    const ghost = perSampleSquaredNormsReference(layer, 'ghost');
    const plain = perSampleSquaredNormsReference(layer, 'instantiate');
    expect(plain.length).toBe(layer.samples);
    expect(Math.max(...plain)).toBeGreaterThan(0.01);
    for (let i = 0; i < plain.length; i++) {
      expect(Math.abs(ghost[i] - plain[i])).toBeLessThan(1e-12 * (1 + plain[i]));
    }
  });

  it('Opacus embedding_norm_sample_test: .4, .3162, .3162', () => {
    const layer: Layer = {
      kind: 'embedding',
      indices: [1, 1, 2, 0, 2, 0],
      gradOutputs: [0.2, 0.2, 0.3, 0.1, 0.3, 0.1],
      samples: 3,
      positions: 2,
      outputs: 1,
      numEmbeddings: 3,
      paddingIndex: -1,
    };
    for (const method of ['ghost', 'instantiate'] as const) {
      const norms = perSampleSquaredNormsReference(layer, method);
      expect(norms[0]).toBeCloseTo(0.16, 14);
      expect(norms[1]).toBeCloseTo(0.1, 14);
      expect(norms[2]).toBeCloseTo(0.1, 14);
    }
  });

  it('one position: ‖a‖²‖g‖², plus ‖g‖² for the bias; worked by hand', () => {
    const layer = {
      kind: 'linear',
      activations: [1, 2],
      gradOutputs: [3, 4],
      samples: 1,
      positions: 1,
      inputs: 2,
      outputs: 2,
    } as const;
    expect(perSampleSquaredNormsReference({ ...layer, bias: false }, 'ghost')[0]).toBe(125);
    expect(perSampleSquaredNormsReference({ ...layer, bias: true }, 'ghost')[0]).toBe(150);
  });

  it('reports a sample that is not finite, and only that one; all padding is 0', () => {
    const layer = cases()[1].layer as Extract<Layer, { kind: 'linear' }>;
    for (const method of ['ghost', 'instantiate'] as const) {
      const clean = perSampleSquaredNormsReference(layer, method);
      expect(clean[2]).toBe(0); // all padding
      for (const bad of [Number.NaN, Infinity]) {
        const gradOutputs = Float64Array.from(layer.gradOutputs);
        gradOutputs[1] = bad;
        const norms = perSampleSquaredNormsReference({ ...layer, gradOutputs }, method);
        expect(Number.isFinite(norms[0])).toBe(false);
        expect(norms[1]).toBe(clean[1]);
      }
    }
  });
});

describe('clipFactors', () => {
  const options: ClipOptions = { maxNorm: 1, mode: 'abadi', stability: 1e-6, gamma: 0.01, groups: [0] };
  const factor = (squared: number, change: Partial<ClipOptions> = {}) =>
    clipFactorsReference([[squared]], { ...options, ...change })[0][0];

  it('each mode, by hand', () => {
    expect(factor(25)).toBe(1 / (5 + 1e-6));
    expect(factor(0.25)).toBe(1);
    expect(factor(25, { mode: 'auto-s', maxNorm: 2 })).toBe(2 / 5.01);
    expect(factor(25, { mode: 'auto-v', maxNorm: 2 })).toBe(0.4);
    expect(factor(4, { mode: 'indicator', maxNorm: 2 })).toBe(1);
    expect(factor(4.001, { mode: 'indicator', maxNorm: 2 })).toBe(0);
  });

  it('zero and infinite thresholds, zero norms, norms that are not finite', () => {
    expect(factor(25, { maxNorm: 0 })).toBe(0);
    expect(factor(25, { maxNorm: Infinity })).toBe(1);
    expect(factor(0)).toBe(1);
    expect(factor(0, { mode: 'auto-s' })).toBe(100);
    expect(factor(0, { mode: 'auto-v' })).toBe(0);
    expect(factor(-1e-12, { mode: 'auto-v' })).toBe(0); // a Gram sum that rounding made negative
    for (const bad of [Number.NaN, Infinity]) {
      for (const mode of ['abadi', 'auto-s', 'auto-v', 'indicator'] as const) {
        expect(factor(bad, { mode, maxNorm: Infinity })).toBe(0);
      }
    }
    expect(clipFactorsReference([], { ...options, groups: [] })).toEqual([]);
    expect(clipFactorsReference([[]], options)[0].length).toBe(0);
  });

  it('flat, by layer and by group: shared factors and R/√K', () => {
    const squared = [[9], [16], [144]];
    const at = (groups: number[]) =>
      clipFactorsReference(squared, { ...options, mode: 'auto-v', groups }).map((f) => f[0]);
    expect(at([0, 0, 0])).toEqual([1 / 13, 1 / 13, 1 / 13]);
    const R3 = 1 / Math.sqrt(3);
    expect(at([0, 1, 2])).toEqual([R3 / 3, R3 / 4, R3 / 12]);
    const R2 = 1 / Math.sqrt(2);
    expect(at([0, 0, 7])).toEqual([R2 / 5, R2 / 5, R2 / 12]);
    const bad = clipFactorsReference(
      [
        [9, 1],
        [Number.NaN, 1],
      ],
      { ...options, groups: [0, 1] },
    );
    expect([bad[0][0], bad[1][0]]).toEqual([0, 0]);
    expect(bad[0][1]).toBeGreaterThan(0);
  });

  it('the clipped sample is within R in every grouping', () => {
    for (const groups of [
      [0, 0],
      [0, 1],
    ]) {
      const squared = [random(50).map((x) => 100 * x * x), random(50).map((x) => 100 * x * x)];
      const factors = clipFactorsReference(squared, { ...options, maxNorm: 0.7, groups });
      for (let i = 0; i < 50; i++) {
        const total = squared.reduce((sum, s, l) => sum + s[i] * factors[l][i] ** 2, 0);
        expect(Math.sqrt(total)).toBeLessThanOrEqual(0.7);
      }
    }
  });

  it('adaptThreshold finds the quantile', () => {
    const norms = Float64Array.from({ length: 1000 }, (_, i) => i / 1000);
    let threshold = 5;
    for (let i = 0; i < 200; i++) {
      threshold = adaptThreshold(norms, threshold, {
        quantile: 0.3,
        rate: 0.2,
        expectedBatch: 1000,
        noise: 0,
      });
    }
    expect(threshold).toBeCloseTo(0.3, 2);
    const options = { quantile: 0.5, rate: 1, expectedBatch: 4, noise: 1 };
    expect(adaptThreshold([1, 3], 2, options)).toBe(2 * Math.exp(-(0.75 - 0.5)));
    expect(adaptThreshold([1, 1, 1, 3], 2, { ...options, noise: 0 })).toBe(2 * Math.exp(-(0.75 - 0.5)));
    expect(adaptThreshold([], 2, { ...options, noise: 0 })).toBe(2); // an empty batch says nothing
  });
});

describe('clippedGradients', () => {
  it.each(cases())('$name: Σ c·g, added to out', ({ layer }) => {
    const factors = Float64Array.from({ length: layer.samples }, (_, i) => 0.5 / (i + 1));
    const first = clippedGradientsReference(layer, factors);
    for (const [name, values] of Object.entries(first)) {
      for (let e = 0; e < values.length; e++) {
        let sum = 0;
        for (let i = 0; i < layer.samples; i++) sum += factors[i] * perSampleGradient(layer, i)[name][e];
        expect(Math.abs(values[e] - sum)).toBeLessThan(1e-12);
      }
    }
    const twice = clippedGradientsReference(layer, factors, structuredClone(first));
    for (const [name, values] of Object.entries(twice)) {
      for (let e = 0; e < values.length; e++) {
        expect(Math.abs(values[e] - 2 * first[name][e])).toBeLessThan(1e-12);
      }
    }
  });

  it('[3, 4] clipped to 1 is [.6, .8]; a NaN sample adds nothing; an empty batch is 0', () => {
    const layer: Layer = {
      kind: 'linear',
      activations: [1, 1],
      gradOutputs: [3, 4, Number.NaN, 1],
      samples: 2,
      positions: 1,
      inputs: 1,
      outputs: 2,
      bias: false,
    };
    const norms = perSampleSquaredNormsReference(layer, 'ghost');
    const options = { maxNorm: 1, mode: 'abadi', stability: 0, gamma: 0.01, groups: [0] } as const;
    const [factors] = clipFactorsReference([norms], options);
    const { weight } = clippedGradientsReference(layer, factors);
    expect(weight[0]).toBeCloseTo(0.6, 14);
    expect(weight[1]).toBeCloseTo(0.8, 14);
    const empty = { ...layer, activations: [], gradOutputs: [], samples: 0 };
    expect([...clippedGradientsReference(empty, []).weight]).toEqual([0, 0]);
    expect(perSampleSquaredNormsReference(empty, 'ghost').length).toBe(0);
  });
});
