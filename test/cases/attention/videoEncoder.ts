import type { KeptTokens } from '../../../lib/attention/keptTokens.ts';
import { resolveConfig, type VideoEncoderConfig } from '../../../lib/attention/video/config.ts';
import {
  VideoEncoder,
  type VideoWeightType,
  videoEncoderTensors,
} from '../../../lib/attention/video/index.ts';
import { defaultBlockTokens, planForward, viewsOf } from '../../../lib/attention/video/plan.ts';
import { layOutRows } from '../../../lib/attention/video/rows.ts';
import type { OpOptions } from '../../../lib/op.ts';
import { Tensor } from '../../../lib/tensor.ts';
import type { OpCase, PeerSpec, PreparedCase } from '../case.ts';
import type { Random } from '../random.ts';

interface EncoderShape {
  name: string;
  config: VideoEncoderConfig;
  clips: number;
  type?: VideoWeightType;
  /** transformers' module of the same layer. */
  peer?: PeerSpec;
  bench?: boolean;
  verify?: boolean;
  mask?: KeptTokens;
}

/** One layer of base size: hidden 768, 12 heads, 224 x 224 pixels. */
const BASE = {
  imageSize: 224,
  hiddenSize: 768,
  heads: 12,
  intermediateSize: 3072,
  layers: 1,
} as const;

/** ViViT-B/16x2 sees 32 frames, TimeSformer-B 8, VideoPrism-B 16 of 288 pixels. */
export const BASE_MODELS: Record<string, { config: VideoEncoderConfig; peer: PeerSpec }> = {
  'ViViT-B': {
    config: {
      ...BASE,
      attention: 'joint',
      frames: 32,
      tubelet: [2, 16, 16],
      classToken: true,
      activation: 'gelu-tanh',
    },
    peer: { op: 'video_encoder', model: 'vivit', frames: 32 },
  },
  'TimeSformer-B': {
    config: {
      ...BASE,
      attention: 'divided-space-time',
      frames: 8,
      tubelet: [1, 16, 16],
      positions: 'space-time',
      tokenOrder: 'patches',
    },
    peer: { op: 'video_encoder', model: 'timesformer', frames: 8 },
  },
};

const SMALL = {
  imageSize: [13, 9] as [number, number],
  frames: 5,
  tubelet: [1, 4, 3] as [number, number, number],
  hiddenSize: 40,
  heads: 4,
  intermediateSize: 72,
  layers: 1,
};

const shapes: EncoderShape[] = [
  { name: 'ViViT 1', config: { ...SMALL, attention: 'joint', classToken: true }, clips: 2 },
  { name: 'ViViT 2', config: { ...SMALL, attention: 'factorized-encoder', timeLayers: 1 }, clips: 2 },
  { name: 'ViViT 3', config: { ...SMALL, attention: 'factorized-self-attention' }, clips: 2 },
  { name: 'ViViT 4', config: { ...SMALL, attention: 'factorized-dot-product' }, clips: 2 },
  {
    name: 'TimeSformer',
    config: { ...SMALL, attention: 'divided-space-time', positions: 'space-time', tokenOrder: 'patches' },
    clips: 2,
  },
  { name: 'V-JEPA 2', config: { ...SMALL, attention: 'joint', positions: 'rotary' }, clips: 1 },
  {
    name: 'ViViT 3 int8',
    config: { ...SMALL, attention: 'factorized-self-attention' },
    clips: 1,
    type: 'int8',
  },
  ...Object.entries(BASE_MODELS).flatMap(([model, { config, peer }]) =>
    (['float32', 'bfloat16', 'int8'] as const).map((type) => ({
      name: `${model} layer ${type}`,
      config,
      clips: 1,
      type,
      // PyTorch's nearest to int8 weights with float32 activations is bfloat16.
      peer: { ...peer, type: type === 'int8' ? 'bfloat16' : type },
      bench: true,
      verify: false,
    })),
  ),
];

/** Random tensors of a config, large enough that every part moves the output. */
export function randomTensors(config: VideoEncoderConfig, random: Random): Record<string, Tensor<'float32'>> {
  const tensors: Record<string, Tensor<'float32'>> = {};
  for (const [name, dims] of videoEncoderTensors(config)) {
    const size = dims.reduce((a, b) => a * b, 1);
    const data = random.normals(size);
    const norm = /[nN]orm\.weight$/.test(name);
    const scale = dims.length > 1 && name.endsWith('weight') ? 1.5 / Math.sqrt(size / dims[0]) : 0.5;
    const centre = norm && config.unitOffset !== true ? 1 : 0;
    for (let i = 0; i < size; i++) data[i] = centre + (norm ? 0.3 : scale) * data[i];
    tensors[name] = new Tensor('float32', data, dims);
  }
  return tensors;
}

/** Frames that a config takes. */
export function randomFrames(config: VideoEncoderConfig, clips: number, random: Random): Tensor<'float32'> {
  const { imageSize: size, channels = 3 } = config;
  const [height, width] = Array.isArray(size) ? size : [size, size];
  const dims = [clips, config.frames, channels, height, width];
  const count = dims.reduce((a, b) => a * b, 1);
  return new Tensor('float32', random.normals(count), dims);
}

function prepareCase(s: EncoderShape, random: Random): PreparedCase {
  const tensors = randomTensors(s.config, random);
  const frames = randomFrames(s.config, s.clips, random);
  const made = new Map<string, VideoEncoder>();
  const encoder = ({ backend }: OpOptions) => {
    const key = String(backend);
    const found = made.get(key);
    if (found) return found;
    const fresh = VideoEncoder.createSync(s.config, tensors, { type: s.type, backend });
    made.set(key, fresh);
    return fresh;
  };
  const run = (o: OpOptions, mask?: KeptTokens) =>
    encoder(o).forwardSync(frames, { threads: o.threads, mask });
  const dispose = () => {
    for (const e of made.values()) e.dispose();
  };
  if (s.verify !== false) {
    const { mask } = s;
    return {
      run: (o) => [run(o, mask)],
      runAsync: async ({ backend, threads, signal }) => [
        await encoder({ backend }).forward(frames, { threads, signal, mask }),
      ],
      dispose,
    };
  }
  // The reference computes six of the tokens, without the others, which are part of every run but the timed ones.
  const few = firstTokens(s.config, 6);
  const some: PreparedCase = {
    run: (o) => [run(o, few)],
    runAsync: async (o) => [run(o, few)],
  };
  return {
    run: (o) => [run(o), run(o, few)],
    runAsync: async (o) => [run(o), run(o, few)],
    timed: (o) => () => run(o),
    slice: { prepared: some, fraction: 1e-3, of: (outputs) => outputs.slice(1) },
    dispose,
  };
}

/** A mask that keeps tokens of the first two frames. */
function firstTokens(config: VideoEncoderConfig, count: number): KeptTokens {
  const [time, height, width] = resolveConfig(config).grid;
  const patches = height * width;
  const half = count / 2;
  const indices = Int32Array.from({ length: count }, (_, i) => (i < half ? i : patches + i - half));
  return { indices, batchOffsets: Int32Array.of(0, count), frames: time, patches };
}

/** Operations of a forward's products. */
function flopsOf(s: EncoderShape): number {
  const c = resolveConfig(s.config);
  const rows = layOutRows(c, s.clips, c.grid[0], c.grid[1] * c.grid[2], undefined);
  return planForward(c, rows, viewsOf(c, rows), defaultBlockTokens(rows.clip.length), s.type === 'float32')
    .flops;
}

export const videoEncoderCases: OpCase[] = shapes.map((s) => ({
  family: 'attention',
  op: 'videoEncoder',
  name: s.name,
  // int8: a sum in fp32 and one in fp64 may round to two neighbouring int8 activations, 1/127 of the row's largest apart.
  // All tokens attend to that token, and the roundings of the products behind then differ by the dozen: 1e-7 to
  // 8.3e-3 after one layer in 15 draws. fusedLinear's cases hold each product by itself.
  tolerance: s.type === 'int8' ? 1.5e-2 : 4e-6,
  bench: s.bench,
  verify: s.verify,
  peers: s.peer && { pytorch: s.peer },
  flops: s.bench ? flopsOf(s) : undefined,
  // bf16 weights are widened: their products are float32's.
  peak: s.type === 'int8' ? 'int8' : 'f32',
  prepare: (random) => prepareCase(s, random),
}));
