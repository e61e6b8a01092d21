import { maskTokens } from '../../../lib/attention/maskTokens.ts';
import {
  type PatchEmbedOptions,
  type PatchWeights,
  patchEmbed,
  patchEmbedSync,
} from '../../../lib/attention/patchEmbed.ts';
import { patchGrid, type Size3 } from '../../../lib/attention/patchGrid.ts';
import { encodeFloats, type FloatType } from '../../../lib/dtype.ts';
import { type PackedMatrix, packMatrixSync, type WeightType } from '../../../lib/gemm/linear.ts';
import type { OpOptions } from '../../../lib/op.ts';
import { Tensor } from '../../../lib/tensor.ts';
import type { OpCase } from '../case.ts';
import type { Random } from '../random.ts';
import { decoded } from './attention.ts';

/** The tubes of TubeViT for 32 frames of 224 x 224. */
export const TUBES = {
  tubelet: [
    [8, 8, 8],
    [16, 4, 4],
    [4, 12, 12],
    [1, 16, 16],
  ] as Size3[],
  stride: [
    [16, 32, 32],
    [6, 32, 32],
    [16, 32, 32],
    [32, 16, 16],
  ] as Size3[],
  offset: [
    [0, 0, 0],
    [4, 8, 8],
    [0, 14, 14],
    [0, 0, 0],
  ] as Size3[],
};

interface Shape {
  name: string;
  /** Batch, frames, channels, height, width, whatever the layout. */
  dims: [number, number, number, number, number];
  dim: number;
  options: Omit<PatchEmbedOptions, 'tokens' | 'bias' | 'out'>;
  type?: 'uint8' | 'float32' | 'bfloat16';
  weightType?: WeightType;
  /** The weights are given as a tensor of this type, not packed. On CUDA they always are, in `weightType`. */
  matrix?: FloatType;
  bias?: boolean;
  /** Keep a quarter of the tokens. */
  masked?: 'random' | 'tube' | 'frame';
  bench?: boolean;
}

const imagenet = { mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225] };
const small: [number, number, number, number, number] = [2, 5, 3, 17, 19];
const many: [number, number, number, number, number] = [2, 4, 3, 32, 32];

const shapes: Shape[] = [
  { name: 'ViViT', dims: small, dim: 40, options: { tubelet: [2, 4, 4] }, bias: true },
  { name: 'THWC', dims: small, dim: 33, options: { tubelet: [2, 4, 4], layout: 'THWC' } },
  {
    name: 'THWC, Flax',
    dims: small,
    dim: 33,
    options: { tubelet: [2, 4, 5], layout: 'THWC', weightOrder: 'THWC' },
  },
  { name: 'Flax', dims: small, dim: 8, options: { tubelet: [1, 5, 3], weightOrder: 'THWC' } },
  {
    name: 'pixels',
    dims: small,
    dim: 40,
    options: { tubelet: [2, 4, 4], ...imagenet },
    type: 'uint8',
    bias: true,
  },
  {
    name: 'pixels THWC',
    dims: small,
    dim: 40,
    options: { tubelet: [2, 4, 4], ...imagenet, layout: 'THWC' },
    type: 'uint8',
  },
  {
    name: 'bf16 video',
    dims: small,
    dim: 40,
    options: { tubelet: [2, 4, 4], outType: 'bfloat16' },
    type: 'bfloat16',
  },
  { name: 'bf16 weights', dims: small, dim: 40, options: { tubelet: [2, 4, 4] }, weightType: 'bfloat16' },
  { name: 'int8 weights', dims: small, dim: 40, options: { tubelet: [2, 4, 4] }, weightType: 'int8' },
  {
    name: 'overlap',
    dims: small,
    dim: 9,
    options: { tubelet: [3, 4, 2], stride: [1, 2, 3], offset: [1, 0, 5] },
  },
  { name: 'no clips', dims: [0, 4, 3, 8, 8], dim: 9, options: { tubelet: [2, 4, 4] } },
  {
    name: 'random',
    dims: [3, 8, 3, 16, 16],
    dim: 20,
    options: { tubelet: [2, 4, 4] },
    masked: 'random',
    bias: true,
  },
  { name: 'tube', dims: [1, 8, 3, 16, 16], dim: 20, options: { tubelet: [2, 4, 4] }, masked: 'tube' },
  {
    name: 'frame',
    dims: [2, 8, 3, 16, 16],
    dim: 20,
    options: { tubelet: [2, 4, 4], layout: 'THWC' },
    masked: 'frame',
  },
  {
    name: 'two tubes',
    dims: [2, 8, 3, 16, 16],
    dim: 20,
    options: {
      tubelet: [
        [8, 4, 4],
        [2, 8, 8],
      ],
      stride: [
        [4, 8, 8],
        [4, 8, 8],
      ],
      offset: [
        [0, 2, 2],
        [0, 0, 0],
      ],
    },
  },
  // What the CUDA kernels tell apart: tiles for many and for few tokens, pixels read as vectors or one by one, channels in
  // planes or interleaved, the weights in the same order or the other, odd sizes.
  { name: 'matrix', dims: many, dim: 130, options: { tubelet: [1, 4, 8] }, matrix: 'float32', bias: true },
  {
    name: 'bf16 matrix, pixels',
    dims: many,
    dim: 130,
    options: { tubelet: [1, 4, 8], ...imagenet, outType: 'bfloat16' },
    type: 'uint8',
    matrix: 'bfloat16',
    bias: true,
  },
  {
    name: 'fp16 matrix',
    dims: many,
    dim: 131,
    options: { tubelet: [1, 4, 8], outType: 'float16' },
    matrix: 'float16',
  },
  {
    name: 'bf16 matrix, pixels THWC',
    dims: [1, 4, 3, 16, 24],
    dim: 33,
    options: { tubelet: [2, 8, 8], layout: 'THWC', ...imagenet },
    type: 'uint8',
    matrix: 'bfloat16',
    bias: true,
  },
  {
    name: 'bf16 matrix, THWC, Flax',
    dims: [2, 4, 3, 16, 24],
    dim: 24,
    options: { tubelet: [2, 8, 8], layout: 'THWC', weightOrder: 'THWC', ...imagenet },
    type: 'bfloat16',
    matrix: 'bfloat16',
  },
  {
    name: 'fp16 matrix, odd, Flax',
    dims: small,
    dim: 7,
    options: { tubelet: [1, 5, 3], weightOrder: 'THWC', mean: [0.1, 0.2, 0.3] },
    matrix: 'float16',
  },
  {
    name: 'matrix, THWC, Flax',
    dims: [1, 4, 3, 16, 24],
    dim: 140,
    options: { tubelet: [2, 8, 8], layout: 'THWC', weightOrder: 'THWC', ...imagenet },
    matrix: 'float32',
  },
  {
    name: 'matrix, pixels, one channel',
    dims: [1, 3, 1, 13, 16],
    dim: 12,
    options: { tubelet: [1, 3, 8], layout: 'THWC' },
    type: 'uint8',
    matrix: 'float32',
  },
  {
    name: 'bf16 matrix, random',
    dims: [3, 8, 3, 32, 32],
    dim: 260,
    options: { tubelet: [2, 4, 4] },
    type: 'bfloat16',
    matrix: 'bfloat16',
    masked: 'random',
    bias: true,
  },
  {
    name: 'fp16 matrix, two tubes',
    dims: [2, 8, 3, 16, 16],
    dim: 20,
    options: {
      tubelet: [
        [8, 4, 4],
        [2, 8, 8],
      ],
      stride: [4, 8, 8],
      offset: [
        [0, 2, 2],
        [0, 0, 0],
      ],
    },
    matrix: 'float16',
    bias: true,
  },
  { name: 'ViViT-B', dims: [1, 32, 3, 224, 224], dim: 768, options: { tubelet: [2, 16, 16] }, bench: true },
  {
    name: 'ViViT-B pixels',
    dims: [1, 32, 3, 224, 224],
    dim: 768,
    options: { tubelet: [2, 16, 16], layout: 'THWC', ...imagenet },
    type: 'uint8',
    bench: true,
  },
  { name: 'TubeViT-B', dims: [1, 32, 3, 224, 224], dim: 768, options: TUBES, bench: true },
];

function videoOf(random: Random, s: Shape): Tensor {
  const size = s.dims.reduce((a, b) => a * b, 1);
  const [batch, frames, channels, height, width] = s.dims;
  const dims = s.options.layout === 'THWC' ? [batch, frames, height, width, channels] : s.dims;
  if (s.type === 'uint8') {
    return new Tensor(
      'uint8',
      Uint8Array.from({ length: size }, () => random.integer(0, 255)),
      dims,
    );
  }
  const type = s.type ?? 'float32';
  return new Tensor(type, encodeFloats(random.normals(size), type) as never, dims) as Tensor;
}

/** Tubelet embeddings: every layout, order, pixel and weight type; masks; several tubes. */
export const patchEmbedCases: OpCase[] = shapes.map((s) => {
  const [batch, frames, channels, height, width] = s.dims;
  const list = (x: Size3 | readonly Size3[] | undefined) =>
    (x === undefined ? [undefined] : typeof x[0] === 'number' ? [x] : x) as (Size3 | undefined)[];
  const tubelets = list(s.options.tubelet) as Size3[];
  const inputs = tubelets.map((t) => channels * t[0] * t[1] * t[2]);
  const grids = tubelets.map((tubelet, i) =>
    patchGrid([frames, height, width], {
      tubelet,
      stride: list(s.options.stride)[i],
      offset: list(s.options.offset)[i],
    }),
  );
  const flops = grids.reduce((sum, g, i) => sum + 2 * batch * g[0] * g[1] * g[2] * inputs[i] * s.dim, 0);
  const types = [s.weightType, s.matrix, s.options.outType];
  const low = types.some((t) => t === 'int8' || t === 'bfloat16' || t === 'float16');
  return {
    family: 'attention',
    op: 'patchEmbed',
    name: `${s.name} [${s.dims}] ${s.type ?? 'float32'}`,
    tolerance: low ? 5e-3 : 5e-6,
    flops,
    bench: s.bench,
    cuda: s.weightType !== 'int8',
    prepare(random) {
      const video = videoOf(random, s);
      const matrix = s.matrix ?? 'float32';
      const sources = inputs.map((k) => {
        const values = random.normals(s.dim * k, k ** -0.5);
        return new Tensor(matrix, encodeFloats(values, matrix) as never, [s.dim, k]) as Tensor<FloatType>;
      });
      const onDevice = sources.map((x) =>
        s.weightType === 'bfloat16'
          ? new Tensor('bfloat16', encodeFloats(x.data as Float32Array, 'bfloat16') as Uint16Array, x.dims)
          : x,
      );
      const options: PatchEmbedOptions = { ...s.options };
      if (s.bias) options.bias = new Tensor('float32', random.normals(s.dim), [s.dim]);
      if (s.masked) {
        const [t, h, w] = grids[0];
        options.tokens = maskTokens({
          frames: t,
          patches: h * w,
          ratio: 0.75,
          kind: s.masked,
          seed: 5,
          batch,
        });
      }
      const packed = new Map<string, PackedMatrix[]>();
      const pack = (o: OpOptions): PatchWeights | PatchWeights[] => {
        const backend = o.backend ?? 'auto';
        let w: PatchWeights[] = backend === 'cuda' ? onDevice : sources;
        if (s.matrix === undefined && backend !== 'cuda') {
          const made =
            packed.get(backend) ?? sources.map((x) => packMatrixSync(x, { type: s.weightType, backend }));
          packed.set(backend, made);
          w = made;
        }
        return w.length === 1 ? w[0] : w;
      };
      return {
        run: (o) => [decoded(patchEmbedSync(video, pack(o), { ...o, ...options }))],
        runAsync: async (o) => [decoded(await patchEmbed(video, pack(o), { ...o, ...options }))],
        timed: (o) => {
          const out = patchEmbedSync(video, pack(o), { ...o, ...options });
          return () => patchEmbedSync(video, pack(o), { ...o, ...options, out });
        },
        dispose: () => {
          for (const list of packed.values()) for (const m of list) m.dispose();
        },
      };
    },
  };
});
