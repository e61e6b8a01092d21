import type { BackendName } from '../../backend.ts';
import { runAsync, runSync, type Steps } from '../../checkpoint/steps.ts';
import { Checkpoint, openCheckpoint } from '../../checkpoint.ts';
import { HeddleError } from '../../errors.ts';
import { type AsyncOpOptions, checkOptions, optionChoice, optionInteger } from '../../op.ts';
import { allocate, makeTensor, Tensor, type TensorLike } from '../../tensor.ts';
import { indexTokens, type KeptTokens } from '../keptTokens.ts';
import { videoArchitecture } from './architectures.ts';
import { ownTimeClass, type ResolvedConfig, resolveConfig, type VideoEncoderConfig } from './config.ts';
import { type ForwardResult, forwardRows, type LayerActivations } from './forward.ts';
import { checkpointReader, recordReader } from './load.ts';
import { checkNormalization, type Frames, type Normalization, readFrames } from './pixels.ts';
import { defaultBlockTokens, type ForwardPlan, planForward, type Views, viewsOf } from './plan.ts';
import { POSITION_RESIZINGS, type PositionResizing, tablesFor } from './positions.ts';
import { layOutRows, type TokenRows } from './rows.ts';
import {
  ENCODER_OPTIONS,
  type EncoderParts,
  type ReadTensor,
  type VideoEncoderOptions,
  WeightPacker,
} from './weights.ts';

export interface VideoForwardOptions extends AsyncOpOptions {
  /** Tokens to keep, as `maskTokens` returns them; the others are never computed. Default: all. */
  mask?: KeptTokens;
  /** Keeps what a backward pass through the last n layers needs; the layers before keep nothing. Default 0. */
  lastLayers?: number;
  /**
   * Tokens that are worked on at a time; attention sequences are not cut. Fewer take less memory, more keep more threads
   * busy. Results do not depend on it. Default: 4096 of up to 4096 tokens, else a sixteenth of them, from 1024 to 4096.
   */
  blockTokens?: number;
  /**
   * Resizes the position tables where the frames have other tubelets than the config's; transformers does so with
   * `'nearest'` for TimeSformer. Default: other frames are refused.
   */
  resizePositions?: PositionResizing;
  /** Order of the axes of frames. Default `'TCHW'`. */
  layout?: 'TCHW' | 'THWC';
  /** Of uint8 frames: `(pixel / 255 - mean) / std` per channel. Default: the model's, else mean 0.5, std 0.5. */
  normalization?: Normalization;
  /** Called after the embedding and after every layer. */
  onProgress?: (progress: { done: number; total: number; stage: string }) => void;
}

/**
 * last_hidden_state, float32: `[clips, tokens, hidden]`, the class token first; `[clips * frames, 1 + patches, hidden]`
 * of space-only attention. Sequences of different lengths are packed: `[1, all tokens, hidden]`.
 */
export class VideoEncoderOutput extends Tensor<'float32'> {
  /** With a mask: where each sequence begins, and the end, int32. */
  readonly offsets?: Tensor<'int32'>;
  /** pooler_output `[clips, pooler size]`, where the model has a pooler. */
  readonly pooled?: Tensor<'float32'>;
  /** With `lastLayers`: the activations of those layers, first to last. */
  readonly activations?: LayerActivations[];

  /** @internal */
  constructor(
    data: Float32Array,
    dims: readonly number[],
    more: Pick<VideoEncoderOutput, 'offsets' | 'pooled' | 'activations'>,
  ) {
    super('float32', data, dims);
    Object.assign(this, more);
  }
}

const FORWARD_OPTIONS: ReadonlySet<string> = new Set([
  'mask',
  'lastLayers',
  'blockTokens',
  'layout',
  'resizePositions',
  'normalization',
  'onProgress',
  'backend',
  'threads',
  'signal',
]);

const HALF: Normalization = { mean: [0.5], std: [0.5] };
/** What each model's preprocessor does with pixels between 0 and 1. */
const NORMALIZATIONS: Readonly<Record<string, Normalization>> = {
  timesformer: { mean: [0.45, 0.45, 0.45], std: [0.225, 0.225, 0.225] },
  videoprism_vision_model: { mean: [0], std: [1] },
  vjepa2: { mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225] },
};

interface Layout {
  /** Sizes that it is for; empty with a mask. */
  key: string;
  rows: TokenRows;
  views: Views;
  blockTokens: number;
  plan: ForwardPlan;
}

/** Checks a mask and cuts it into clips. */
function keptTokens(mask: KeptTokens | undefined, f: Frames): Int32Array[] | undefined {
  if (mask === undefined) return undefined;
  const { batch } = indexTokens(mask, 'mask');
  const clips = f.dims[0];
  const [time, height, width] = f.grid;
  if (batch !== clips || mask.frames !== time || mask.patches !== height * width) {
    throw new HeddleError(
      'ERR_SHAPE',
      `mask: expected ${clips} clips of ${time} frames of ${height * width} patches, ` +
        `got ${batch} of ${mask.frames} of ${mask.patches}`,
    );
  }
  return Array.from({ length: clips }, (_, b) => {
    const own = mask.indices.subarray(mask.batchOffsets[b], mask.batchOffsets[b + 1]);
    if (own.length === 0) throw new HeddleError('ERR_VALUE', `mask keeps no token of clip ${b}`);
    return own;
  });
}

/**
 * A video encoder: TimeSformer, ViViT, VideoPrism or V-JEPA 2 read from a Hugging Face checkpoint directory, or any of
 * the published factorizations by configuration.
 *
 * ```ts
 * const encoder = await VideoEncoder.load(directory, { type: 'bfloat16' });
 * const hidden = await encoder.forward(frames); // [clips, frames, channels, height, width] to [clips, tokens, hidden]
 * encoder.dispose();
 * ```
 *
 * Beside the weights a forward holds the residual stream, which becomes the result, and one buffer that every step
 * reuses and the encoder keeps for the next forward of that size; {@link VideoEncoder.plan} says how many bytes.
 */
export class VideoEncoder {
  /** `model_type` of the checkpoint; `'custom'` of {@link VideoEncoder.create}. */
  readonly modelType: string;
  readonly config: ResolvedConfig;
  /** The backend the weights were packed for. */
  readonly backend: BackendName;
  private readonly parts: EncoderParts;
  private readonly threads: number | undefined;
  private disposed = false;
  /** The last forward's buffer, for the next one: fresh memory costs more than it seems. */
  private idle: Float32Array | undefined;
  /** Of the last forward without a mask. */
  private layout: Layout | undefined;
  /** Calls under way; what they use is freed when the last one ends. */
  private running = 0;

  private constructor(modelType: string, config: ResolvedConfig, parts: EncoderParts, threads?: number) {
    this.modelType = modelType;
    this.config = config;
    this.parts = parts;
    this.backend = parts.patch.weight.backend;
    this.threads = threads;
    const dispose = (Symbol as { dispose?: symbol }).dispose;
    if (dispose) Object.defineProperty(this, dispose, { value: () => this.dispose(), enumerable: false });
  }

  private static *build(
    modelType: string,
    config: ResolvedConfig,
    read: ReadTensor,
    options: VideoEncoderOptions,
  ): Steps<VideoEncoder> {
    const parts = yield* new WeightPacker(config, read, options).parts();
    return new VideoEncoder(modelType, config, parts, options.threads);
  }

  /**
   * Reads config.json and every tensor of the encoder, and packs the weights. Heads, poolers of classifiers and V-JEPA 2's
   * predictor are not read.
   * @param source checkpoint directory, one file, or an open checkpoint, which stays the caller's to close
   * @throws HeddleError `ERR_CHECKPOINT` naming file, field or tensor, also for tensors that are missing or have no
   *   place; `ERR_OPTION`; `ERR_MEMORY`; `ERR_ABORTED`
   */
  static async load(source: string | Checkpoint, options: VideoEncoderOptions = {}): Promise<VideoEncoder> {
    checkOptions(options, ENCODER_OPTIONS, 'VideoEncoder.load');
    const load = (c: Checkpoint) => {
      const architecture = videoArchitecture(c);
      const config = resolveConfig(architecture.config);
      const read = checkpointReader(c, architecture, config, options.signal);
      return runAsync(VideoEncoder.build(architecture.modelType, config, read, options));
    };
    if (source instanceof Checkpoint) return load(source);
    const checkpoint = await openCheckpoint(source);
    try {
      return await load(checkpoint);
    } finally {
      checkpoint.close();
    }
  }

  /**
   * An encoder of any configuration.
   * @param tensors every tensor that {@link videoEncoderTensors} names, float32, bfloat16 or float16
   * @throws HeddleError `ERR_OPTION` naming the config's field, `ERR_ARGUMENT` for tensors that are missing or have no
   *   place, `ERR_SHAPE`, `ERR_DTYPE`, `ERR_MEMORY`, `ERR_ABORTED`
   */
  static async create(
    config: VideoEncoderConfig,
    tensors: Readonly<Record<string, TensorLike>>,
    options: VideoEncoderOptions = {},
  ): Promise<VideoEncoder> {
    return runAsync(VideoEncoder.custom(config, tensors, options));
  }

  /** {@link create} on the calling thread. */
  static createSync(
    config: VideoEncoderConfig,
    tensors: Readonly<Record<string, TensorLike>>,
    options: VideoEncoderOptions = {},
  ): VideoEncoder {
    return runSync(VideoEncoder.custom(config, tensors, options));
  }

  private static *custom(
    config: VideoEncoderConfig,
    tensors: Readonly<Record<string, TensorLike>>,
    options: VideoEncoderOptions,
  ): Steps<VideoEncoder> {
    checkOptions(options, ENCODER_OPTIONS, 'VideoEncoder.create');
    const resolved = resolveConfig(config);
    return yield* VideoEncoder.build('custom', resolved, recordReader(tensors, resolved), options);
  }

  /** Whether attention over time has one projection where the model has two. */
  private get merged(): boolean {
    return this.parts.layers.every((l) =>
      l.steps.every((s) => s.kind === 'mlp' || s.projection === undefined),
    );
  }

  /** Bytes of packed weights. */
  get bytes(): number {
    return this.parts.matrices.reduce((sum, m) => sum + m.bytes, 0);
  }

  private prepare(frames: TensorLike, options: VideoForwardOptions) {
    if (this.disposed) throw new HeddleError('ERR_DISPOSED', 'the video encoder was disposed');
    checkOptions(options, FORWARD_OPTIONS, 'VideoEncoder.forward');
    const c = this.config;
    const layout = optionChoice(options.layout, ['TCHW', 'THWC'], 'TCHW', 'layout');
    const normalization = options.normalization ?? NORMALIZATIONS[this.modelType] ?? HALF;
    const read = readFrames(frames, c, layout, checkNormalization(normalization, c.channels));
    const resizing = options.resizePositions;
    if (resizing !== undefined) optionChoice(resizing, POSITION_RESIZINGS, 'nearest', 'resizePositions');
    const tables = tablesFor(c, this.parts, read.grid, resizing);
    const blockTokens =
      options.blockTokens === undefined
        ? undefined
        : optionInteger(options.blockTokens, 1, 2 ** 30, 'blockTokens');
    const layers = c.layers + c.timeLayers;
    const lastLayers = optionInteger(options.lastLayers ?? 0, 0, layers, 'lastLayers');
    const [time, height, width] = read.grid;
    const patches = height * width;
    const kept = keptTokens(options.mask, read);
    const laidOut = this.layOut([read.dims[0], time, patches], blockTokens, kept);
    return { read, tables, lastLayers, ...laidOut };
  }

  /** Where the rows are, and what they take; kept for the next frames of these sizes, unless tokens are masked. */
  private layOut(
    sizes: readonly [number, number, number],
    wanted: number | undefined,
    kept: Int32Array[] | undefined,
  ): Layout {
    const key = kept === undefined ? [...sizes, wanted].join() : '';
    if (key !== '' && this.layout?.key === key) return this.layout;
    const rows = layOutRows(this.config, ...sizes, kept);
    const views = viewsOf(this.config, rows);
    const blockTokens = wanted ?? defaultBlockTokens(rows.clip.length);
    const plan = planForward(this.config, rows, views, blockTokens, this.merged);
    const fresh = { key, rows, views, blockTokens, plan };
    if (key !== '') this.layout = fresh;
    return fresh;
  }

  /**
   * What {@link forward} would take for these frames: exactly the bytes it allocates, `lastLayers` and the scratch of
   * single ops apart, and the operations of its products. Computes nothing.
   */
  plan(frames: TensorLike, options: VideoForwardOptions = {}): ForwardPlan {
    return this.prepare(frames, options).plan;
  }

  /**
   * The encoder's output for clips of frames, in transformers' order.
   *
   * @param frames `[clips, frames, channels, height, width]` float32 as the model's preprocessor makes them, or uint8
   * @throws HeddleError `ERR_SHAPE` for frames without a token, of other channels, or of tubelets that the position
   *   tables have no rows for; `ERR_VALUE` for a mask that keeps nothing of a clip; `ERR_DTYPE`, `ERR_OPTION`,
   *   `ERR_DISPOSED`, `ERR_MEMORY`, `ERR_ABORTED`
   */
  async forward(frames: TensorLike, options: VideoForwardOptions = {}): Promise<VideoEncoderOutput> {
    const steps = this.steps(frames, options);
    this.running++;
    try {
      return await runAsync(steps);
    } finally {
      if (--this.running === 0 && this.disposed) this.free();
    }
  }

  /** {@link forward} on the calling thread (and helpers, when `threads` > 1). */
  forwardSync(frames: TensorLike, options: VideoForwardOptions = {}): VideoEncoderOutput {
    return runSync(this.steps(frames, options));
  }

  /** Checks everything now; the generator computes. */
  private steps(frames: TensorLike, options: VideoForwardOptions): Steps<VideoEncoderOutput> {
    const { read, tables, rows, views, blockTokens, lastLayers, plan } = this.prepare(frames, options);
    const total = 1 + this.config.layers + this.config.timeLayers;
    let done = 0;
    const size = plan.scratchBytes / 4;
    const scratch = this.idle?.length === size ? this.idle : allocate('float32', size);
    this.idle = undefined; // a forward beside this one takes memory of its own
    const release = () => {
      if (!this.disposed) this.idle = scratch;
    };
    const run = forwardRows({
      config: this.config,
      parts: { ...this.parts, ...tables },
      frames: read,
      rows,
      views,
      scratch,
      blockTokens,
      lastLayers,
      options: {
        backend: this.backend,
        threads: options.threads ?? this.threads,
        signal: options.signal,
      },
      onStep: (stage) => options.onProgress?.({ done: ++done, total, stage }),
    });
    const output = this.output.bind(this);
    return (function* () {
      const result = yield* run;
      release();
      return output(result, read.dims[0], options.mask !== undefined, lastLayers > 0);
    })();
  }

  private output(result: ForwardResult, clips: number, masked: boolean, kept: boolean): VideoEncoderOutput {
    const { x, offsets } = result;
    const sequences = offsets.length - 1;
    const length = sequences > 0 ? offsets[1] : 0;
    const even = offsets.every((o, i) => o === i * length);
    const d = this.config.hiddenSize;
    const dims = sequences === 0 ? [clips, 0, d] : even ? [sequences, length, d] : [1, offsets[sequences], d];
    const pooled = this.config.classToken || ownTimeClass(this.config) ? result.pooled : undefined;
    return new VideoEncoderOutput(x, dims, {
      ...(masked && { offsets: makeTensor('int32', offsets, [offsets.length]) }),
      ...(pooled && { pooled }),
      ...(kept && { activations: result.activations }),
    });
  }

  /** Frees the packed weights, when the running calls have ended. Further use throws `ERR_DISPOSED`. */
  dispose(): void {
    if (this.disposed) return;
    this.disposed = true;
    if (this.running === 0) this.free();
  }

  private free(): void {
    this.idle = undefined;
    this.layout = undefined;
    for (const m of this.parts.matrices) m.dispose();
  }
}
