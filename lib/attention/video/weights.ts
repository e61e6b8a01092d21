import { type BackendName, backendOf, resolveBackend } from '../../backend.ts';
import { type Steps, step } from '../../checkpoint/steps.ts';
import { decodeFloats, type FloatType } from '../../dtype.ts';
import { HeddleError } from '../../errors.ts';
import { linear, linearSync, packMatrix, packMatrixSync } from '../../gemm/linear.ts';
import type { Dense, NormWeights } from '../../nn/fusedLinear.ts';
import { type AsyncOpOptions, optionChoice } from '../../op.ts';
import { dot } from '../../reference/gemm/linear.ts';
import { makeTensor, type Tensor } from '../../tensor.ts';
import { type ResolvedConfig, tensorShapes } from './config.ts';
import type { AttentionStep, AttentionWeights, MlpStep } from './steps.ts';

export interface VideoEncoderOptions {
  /**
   * How products store their weights. Norms, biases and position tables stay float32; with int8 so does the patch
   * embedding, whose inputs are pixels. Default: as given.
   */
  type?: VideoWeightType;
  backend?: 'auto' | BackendName;
  threads?: number;
  signal?: AbortSignal;
  /** Called while weights are read and packed. */
  onProgress?: (progress: { done: number; total: number; stage: string }) => void;
}

export type VideoWeightType = 'float32' | 'bfloat16' | 'int8';

export const ENCODER_OPTIONS: ReadonlySet<string> = new Set([
  'type',
  'backend',
  'threads',
  'signal',
  'onProgress',
]);

/** Reads a tensor by its name in {@link tensorShapes}, with the dims that it says. */
export type ReadTensor = (name: string, dims: readonly number[]) => Steps<Tensor<FloatType>>;

/** One layer: its steps in order. `parallel`: both attention steps read the same stream. */
export interface Layer {
  steps: (AttentionStep | MlpStep)[];
  parallel: boolean;
}

/** What an encoder is made of. */
export interface EncoderParts {
  patch: Dense;
  classToken?: Float32Array;
  timeClassToken?: Float32Array;
  positions?: Float32Array;
  spacePositions?: Float32Array;
  timePositions?: Float32Array;
  layers: Layer[];
  norm: NormWeights;
  timeLayers: Layer[];
  timeNorm?: NormWeights;
  pooler?: Dense;
  /** Everything that must be disposed of. */
  matrices: { dispose(): void; bytes: number }[];
}

function toFloat32(t: Tensor<FloatType>): Tensor<'float32'> {
  return t.type === 'float32'
    ? (t as Tensor<'float32'>)
    : makeTensor('float32', decodeFloats(t.data, t.type), t.dims);
}

/** Rows [from, from + count) of a matrix, without a copy. */
function rowsOf(t: Tensor<FloatType>, from: number, count: number): Tensor<FloatType> {
  const width = t.size / t.dims[0];
  const data = t.data.subarray(from * width, (from + count) * width);
  return makeTensor(t.type, data as never, [count, width]);
}

/** Columns [from, from + count) of a matrix. */
function columnsOf(t: Tensor<FloatType>, from: number, count: number): Tensor<FloatType> {
  const [rows, width] = t.dims;
  const data = t.data.slice(0, rows * count);
  for (let r = 0; r < rows; r++) {
    data.set(t.data.subarray(r * width + from, r * width + from + count) as never, r * count);
  }
  return makeTensor(t.type, data as never, [rows, count]);
}

function joined(parts: Tensor<FloatType>[]): Tensor<FloatType> {
  const size = parts.reduce((sum, p) => sum + p.size, 0);
  const data = new (parts[0].data.constructor as new (n: number) => Float32Array)(size);
  let at = 0;
  for (const p of parts) {
    data.set(p.data as Float32Array, at);
    at += p.size;
  }
  const rows = parts.reduce((sum, p) => sum + p.dims[0], 0);
  return makeTensor(parts[0].type, data as never, [rows, ...parts[0].dims.slice(1)]);
}

/** Reads every tensor of a config once and packs the matrices. */
export class WeightPacker {
  private readonly shapes: Map<string, readonly number[]>;
  private readonly op: AsyncOpOptions;
  private readonly type: VideoWeightType | undefined;
  private readonly onProgress: VideoEncoderOptions['onProgress'];
  private done = 0;
  readonly matrices: EncoderParts['matrices'] = [];

  constructor(
    private readonly c: ResolvedConfig,
    private readonly read: ReadTensor,
    options: VideoEncoderOptions,
  ) {
    this.shapes = tensorShapes(c);
    if (backendOf(resolveBackend(options.backend)) === 'cuda') {
      throw new HeddleError('ERR_BACKEND', 'VideoEncoder does not run on cuda; use backend cpu');
    }
    this.op = { backend: options.backend, threads: options.threads, signal: options.signal };
    this.type =
      options.type === undefined
        ? undefined
        : optionChoice<VideoWeightType>(options.type, ['float32', 'bfloat16', 'int8'], 'float32', 'type');
    this.onProgress = options.onProgress;
  }

  private *tensor(name: string): Steps<Tensor<FloatType>> {
    const dims = this.shapes.get(name);
    if (dims === undefined) throw new HeddleError('ERR_INTERNAL', `no shape of ${name}`);
    const t = yield* this.read(name, dims);
    this.onProgress?.({ done: ++this.done, total: this.shapes.size, stage: name });
    return t;
  }

  private *floats(name: string): Steps<Tensor<'float32'>> {
    return toFloat32(yield* this.tensor(name));
  }

  private *optional(name: string): Steps<Tensor<'float32'> | undefined> {
    return this.shapes.has(name) ? yield* this.floats(name) : undefined;
  }

  private *norm(name: string): Steps<NormWeights> {
    return { weight: yield* this.floats(`${name}.weight`), bias: yield* this.floats(`${name}.bias`) };
  }

  private *pack(weight: Tensor<FloatType>, bias?: Tensor<'float32'>, exact = false): Steps<Dense> {
    const type = exact && this.type === 'int8' ? 'float32' : this.type;
    // float16 has no packed form of its own.
    const o = { ...this.op, type };
    const packed = yield* step(
      () => packMatrixSync(weight, o),
      () => packMatrix(weight, o),
    );
    this.matrices.push(packed);
    return { weight: packed, bias };
  }

  private *dense(name: string): Steps<Dense> {
    const weight = yield* this.tensor(`${name}.weight`);
    return yield* this.pack(weight, yield* this.optional(`${name}.bias`));
  }

  /** The heads [from, from + count) of an attention layer; the output's bias goes with the first. */
  private *heads(
    qkv: Tensor<FloatType>,
    qkvBias: Tensor<'float32'> | undefined,
    output: Tensor<FloatType>,
    outputBias: Tensor<'float32'>,
    from: number,
    count: number,
  ): Steps<AttentionWeights> {
    const d = this.c.hiddenSize;
    const width = (count * d) / this.c.heads;
    const first = (from * d) / this.c.heads;
    const weights = [0, 1, 2].map((i) => rowsOf(qkv, i * d + first, width));
    const biases = [0, 1, 2].map(
      (i) => qkvBias && (rowsOf(qkvBias.reshape([3 * d, 1]), i * d + first, width) as Tensor<'float32'>),
    );
    const flat = (b: Tensor<'float32'> | undefined) => b?.reshape([b.size]);
    const query = yield* this.pack(weights[0], flat(biases[0]));
    const keyValue =
      this.c.positions === 'rotary'
        ? [yield* this.pack(weights[1], flat(biases[1])), yield* this.pack(weights[2], flat(biases[2]))]
        : [
            yield* this.pack(
              joined(weights.slice(1)),
              biases[1] && flat(joined([biases[1], biases[2] as Tensor<'float32'>]) as Tensor<'float32'>),
            ),
          ];
    const columns = count === this.c.heads ? output : columnsOf(output, first, width);
    const out = yield* this.pack(columns, from === 0 ? outputBias : undefined);
    return { query, keyValue, output: out };
  }

  /**
   * TimeSformer's projection of what attention over time put out: W₂(W₁ x + b₁) + b₂. In float32 it becomes one product,
   * an eighteenth of the layer less; other types would round W₂W₁ again, and keep two.
   */
  private *projected(
    output: Tensor<FloatType>,
    bias: Tensor<'float32'>,
    name: string,
  ): Steps<{ output: Tensor<FloatType>; bias: Tensor<'float32'>; projection?: Dense }> {
    const weight = yield* this.tensor(`${name}.weight`);
    const second = yield* this.floats(`${name}.bias`);
    const exact = (t: Tensor<FloatType>) => this.type === 'float32' || (!this.type && t.type === 'float32');
    if (!exact(output) || !exact(weight)) {
      return { output, bias, projection: yield* this.pack(weight, second) };
    }
    const o = { ...this.op, transposed: true, type: 'float32' as const };
    const packed = yield* step(
      () => packMatrixSync(output, o),
      () => packMatrix(output, o),
    );
    try {
      const outer = toFloat32(weight);
      const merged = yield* step(
        () => linearSync(outer, packed, this.op),
        () => linear(outer, packed, this.op),
      );
      const d = this.c.hiddenSize;
      const row = (i: number) => outer.data.subarray(i * d, (i + 1) * d);
      const mergedBias = second.data.map((b, i) => b + dot(row(i), bias.data));
      return { output: merged, bias: makeTensor('float32', mergedBias, [d]) };
    } finally {
      packed.dispose();
    }
  }

  /** @param after name of a projection that follows the attention's own */
  private *attention(name: string, after?: string): Steps<(AttentionWeights & { projection?: Dense })[]> {
    const qkv = yield* this.tensor(`${name}.qkv.weight`);
    const qkvBias = yield* this.optional(`${name}.qkv.bias`);
    let output = yield* this.tensor(`${name}.output.weight`);
    let outputBias = yield* this.floats(`${name}.output.bias`);
    let projection: Dense | undefined;
    if (after !== undefined) {
      const p = yield* this.projected(output, outputBias, after);
      [output, outputBias, projection] = [p.output, p.bias, p.projection];
    }
    const { heads, attention } = this.c;
    const parts = attention === 'factorized-dot-product' ? [heads / 2, heads / 2] : [heads];
    const all: (AttentionWeights & { projection?: Dense })[] = [];
    for (const [i, count] of parts.entries()) {
      const weights = yield* this.heads(qkv, qkvBias, output, outputBias, i * count, count);
      all.push({ ...weights, projection });
    }
    return all;
  }

  private *layer(p: string, axis: AttentionStep['axis']): Steps<Layer> {
    const { attention: kind, order, timeGate } = this.c;
    const time: AttentionStep[] = [];
    if (kind === 'factorized-self-attention' || kind === 'divided-space-time') {
      const norm = yield* this.norm(`${p}.timeNorm`);
      const after = kind === 'divided-space-time' ? `${p}.timeProjection` : undefined;
      const [{ projection, ...weights }] = yield* this.attention(`${p}.timeAttention`, after);
      const gate = timeGate ? (yield* this.floats(`${p}.timeGate`)).data[0] : undefined;
      time.push({ kind: 'attention', axis: 'time', norm, weights, projection, gate });
    }
    const norm = yield* this.norm(`${p}.norm`);
    const weights = yield* this.attention(`${p}.attention`);
    const own: AttentionStep[] = weights.map((w, i) => ({
      kind: 'attention',
      axis: weights.length === 2 && i === 0 ? 'time' : axis,
      norm,
      weights: w,
    }));
    const mlp: MlpStep = {
      kind: 'mlp',
      norm: yield* this.norm(`${p}.mlpNorm`),
      up: yield* this.dense(`${p}.mlp.up`),
      down: yield* this.dense(`${p}.mlp.down`),
    };
    const attends = order === 'space-time' && time.length > 0 ? [...own, ...time] : [...time, ...own];
    return { steps: [...attends, mlp], parallel: own.length === 2 };
  }

  *parts(): Steps<EncoderParts> {
    const c = this.c;
    try {
      const patchWeight = yield* this.tensor('patch.weight');
      const flat = makeTensor(patchWeight.type, patchWeight.data, [
        c.hiddenSize,
        patchWeight.size / c.hiddenSize,
      ]);
      const patch = yield* this.pack(flat as Tensor<FloatType>, yield* this.floats('patch.bias'), true);

      const axis = c.attention === 'joint' || c.attention === 'space-only' ? 'joint' : 'space';
      const parts: EncoderParts = {
        patch,
        classToken: (yield* this.optional('classToken'))?.data,
        timeClassToken: (yield* this.optional('timeClassToken'))?.data,
        positions: (yield* this.optional('positions'))?.data,
        spacePositions: (yield* this.optional('positions.space'))?.data,
        timePositions: (yield* this.optional('positions.time'))?.data,
        layers: [],
        norm: yield* this.norm('norm'),
        timeLayers: [],
        matrices: this.matrices,
      };
      const spaceAxis = c.attention === 'space-only' ? 'space' : axis;
      for (let i = 0; i < c.layers; i++) parts.layers.push(yield* this.layer(`layers.${i}`, spaceAxis));
      for (let i = 0; i < c.timeLayers; i++) {
        parts.timeLayers.push(yield* this.layer(`timeLayers.${i}`, 'time'));
      }
      if (c.attention === 'factorized-encoder') parts.timeNorm = yield* this.norm('timeNorm');
      if (c.poolerSize > 0) parts.pooler = yield* this.dense('pooler');
      return parts;
    } catch (error) {
      for (const m of this.matrices) m.dispose();
      throw error;
    }
  }
}
