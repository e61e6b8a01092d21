import { xoroshiro128plus } from 'pure-rand/generator/xoroshiro128plus';
import type { Gradients, Layer } from '../../lib/reference/privacy/layers.ts';

const generator = xoroshiro128plus(6);
export const random = (count: number) =>
  Float64Array.from({ length: count }, () => (generator.next() / 2 ** 31) * 1.5);
const integers = (count: number, below: number) =>
  Float64Array.from({ length: count }, () => (generator.next() >>> 0) % below);

type Forward = (parameters: Gradients, sample: number) => number;
export interface Case {
  name: string;
  layer: Layer;
  /** Σ ∂L/∂output ∘ output(parameters), in other words than the reference's. */
  loss: Forward;
}

/** Every kind of layer with its forward. */
export function cases(): Case[] {
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
