import type { BackendName } from '../backend.ts';
import { runAsync, runSync, type Steps, step } from '../checkpoint/steps.ts';
import { Checkpoint, openCheckpoint } from '../checkpoint.ts';
import type { Location } from '../device.ts';
import { FLOAT_TYPES, type FloatType } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import { linear, linearSync, type WeightType } from '../gemm/linear.ts';
import { type AsyncOpOptions, checkOptions, type OpOptions, optionInteger } from '../op.ts';
import { asTensor, makeTensor, type Tensor, type TensorLike } from '../tensor.ts';
import { cachedForward } from './cachedForward.ts';
import { moeBlock } from './config.ts';
import { deviceForward } from './deviceForward.ts';
import type { ExpertCacheStats } from './expertCache.ts';
import { expertsForward, expertsForwardSync } from './experts.ts';
import { disposeParts, LOAD_OPTIONS, type MoELayerOptions, type Parts, readParts } from './load.ts';
import { type RouteTopKOptions, type Routing, routeTopK, routeTopKSync } from './routeTopK.ts';

export type { MoELayerOptions };

/**
 * A mixture-of-experts layer read from a Hugging Face checkpoint directory: mixtral, qwen2_moe, qwen3_moe, olmoe,
 * deepseek_v3, gpt_oss.
 *
 * ```ts
 * const layer = await MoELayer.load(directory, { layer: 1 });
 * const y = await layer.forward(new Tensor('float32', x, [tokens, layer.hiddenSize]));
 * layer.dispose();
 * ```
 *
 * Loaded with `backend: 'cuda'`, the weights live on the device: a tensor there goes through the router, its experts and
 * the shared ones without leaving it, and so is the result.
 */
export class MoELayer {
  readonly modelType: string;
  readonly hiddenSize: number;
  readonly intermediateSize: number;
  readonly experts: number;
  readonly k: number;
  /** How the expert weights are stored. */
  readonly type: WeightType;
  /** The backend the weights were packed for. */
  readonly backend: BackendName;
  private readonly parts: Parts;
  private disposed = false;
  /** Calls under way; what they use is freed when the last one ends. */
  private running = 0;

  private constructor(parts: Parts) {
    this.parts = parts;
    this.modelType = parts.block.modelType;
    this.hiddenSize = parts.block.hiddenSize;
    this.intermediateSize = parts.block.intermediateSize;
    this.experts = parts.block.experts;
    this.k = parts.block.routing.k;
    this.type = parts.experts.type;
    this.backend = parts.experts.backend;
    const dispose = (Symbol as { dispose?: symbol }).dispose;
    if (dispose) Object.defineProperty(this, dispose, { value: () => this.dispose(), enumerable: false });
  }

  /**
   * Reads config.json and the layer's tensors, and packs the weights; with `memoryBudget`, experts on first use.
   * @param source checkpoint directory (config.json, model.safetensors or shards with an index), one file, or an open
   *   checkpoint, which many layers can share (a layer with a `memoryBudget` keeps every shard open otherwise) and
   *   which stays the caller's to close
   * @throws HeddleError `ERR_CHECKPOINT` naming file, field or tensor; `ERR_OPTION`; `ERR_MEMORY`; `ERR_ABORTED`
   */
  static async load(source: string | Checkpoint, options: MoELayerOptions): Promise<MoELayer> {
    checkOptions(options, LOAD_OPTIONS, 'MoELayer.load');
    const layer = optionInteger(options?.layer, 0, 100_000, 'layer');
    const load = async (c: Checkpoint, own: boolean) =>
      new MoELayer(await readParts(c, moeBlock(c, layer), options, own));
    if (source instanceof Checkpoint) return load(source, false);
    // A file that stays open may be truncated by others: a read then fails, a mapped page would end the process.
    const map = options.memoryBudget === undefined ? 'auto' : 'never';
    const checkpoint = await openCheckpoint(source, { map });
    let keep = false;
    try {
      const loaded = await load(checkpoint, true);
      keep = loaded.cache !== undefined;
      return loaded;
    } finally {
      if (!keep) checkpoint.close();
    }
  }

  /** Counters of a layer loaded with `memoryBudget`; undefined without one. */
  get cache(): ExpertCacheStats | undefined {
    return this.parts.cache?.stats;
  }

  /** Bytes of packed weights. */
  get bytes(): number {
    const { router, experts, shared, sharedGate } = this.parts;
    return router.bytes + experts.bytes + (shared?.bytes ?? 0) + (sharedGate?.bytes ?? 0);
  }

  /** Where the weights are. */
  get location(): Location {
    return this.backend === 'cuda' ? 'cuda' : 'cpu';
  }

  /** What `routeTopK` is called with; tensors are on the CPU. */
  get routing(): RouteTopKOptions {
    return { ...this.parts.block.routing, selectionBias: this.parts.selectionBias };
  }

  private tokens(x: TensorLike): { flat: Tensor<FloatType>; dims: readonly number[] } {
    if (this.disposed) throw new HeddleError('ERR_DISPOSED', 'the MoE layer was disposed');
    const t = asTensor(x, 'x', FLOAT_TYPES, undefined, 'device');
    if (t.location === 'cuda' && this.backend !== 'cuda') {
      throw new HeddleError(
        'ERR_BACKEND',
        `x is on cuda but the MoE layer was loaded for backend ${this.backend}; load it with backend 'cuda'`,
      );
    }
    const d = this.hiddenSize;
    if (t.dims.length < 1 || t.dims[t.dims.length - 1] !== d) {
      throw new HeddleError('ERR_SHAPE', `x: expected [..., ${d}], got [${t.dims.join(', ')}]`);
    }
    return { flat: makeTensor(t.type, t.data, [t.size / d, d]), dims: t.dims };
  }

  /** Keeps the weights while `work` runs. */
  private async hold<T>(work: () => Promise<T>): Promise<T> {
    this.running++;
    try {
      return await work();
    } finally {
      if (--this.running === 0 && this.disposed) this.free();
    }
  }

  /**
   * Router logits, expert ids and weights of each token. `x` `[.., hidden]`; results `[tokens, …]`, where x is.
   * @throws HeddleError as {@link forward}
   */
  async route(x: TensorLike, options: AsyncOpOptions = {}): Promise<Routing & { logits: Tensor<'float32'> }> {
    const { flat } = this.tokens(x);
    return this.hold(() => runAsync(this.router(flat, options)));
  }

  /** {@link route} on the calling thread. */
  routeSync(x: TensorLike, options: OpOptions = {}): Routing & { logits: Tensor<'float32'> } {
    const { flat } = this.tokens(x);
    return runSync(this.router(flat, options));
  }

  private *router(flat: Tensor<FloatType>, options: AsyncOpOptions) {
    const { router, onDevice } = this.parts;
    const biases = flat.location === 'cuda' ? (onDevice as NonNullable<typeof onDevice>) : this.parts;
    const o = { ...options, backend: this.backend };
    const product = { ...o, bias: biases.routerBias };
    const logits = (yield* step(
      () => linearSync(flat, router, product),
      () => linear(flat, router, product),
    )) as Tensor<'float32'>;
    try {
      const choice = { ...this.routing, ...o, selectionBias: biases.selectionBias };
      const routing = yield* step(
        () => routeTopKSync(logits, choice),
        () => routeTopK(logits, choice),
      );
      return { ...routing, logits };
    } catch (error) {
      logits.dispose();
      throw error;
    }
  }

  /**
   * The block's output, shared experts included.
   * @param x `[.., hidden]` float32, bfloat16 or float16
   * @returns the same dims and type as x, where x is
   * @throws HeddleError `ERR_SHAPE`, `ERR_DTYPE`, `ERR_DISPOSED`, `ERR_MEMORY`, `ERR_ABORTED`, `ERR_BACKEND` for x on the
   *   device and a layer that is not; with a `memoryBudget` also `ERR_CHECKPOINT` when an expert cannot be read: later
   *   forwards are not affected
   */
  async forward(x: TensorLike, options: AsyncOpOptions = {}): Promise<Tensor<FloatType>> {
    const { flat, dims } = this.tokens(x);
    return this.hold(() => runAsync(this.block(flat, dims, options)));
  }

  /**
   * {@link forward} on the calling thread. With a `memoryBudget` it throws `ERR_MEMORY` where it would have to wait for
   * asynchronous forwards.
   */
  forwardSync(x: TensorLike, options: OpOptions = {}): Tensor<FloatType> {
    const { flat, dims } = this.tokens(x);
    return runSync(this.block(flat, dims, options));
  }

  private *block(
    x: Tensor<FloatType>,
    dims: readonly number[],
    options: AsyncOpOptions,
  ): Steps<Tensor<FloatType>> {
    const y = yield* this.backend === 'cuda' ? this.onDevice(x, options) : this.onHost(x, options);
    return makeTensor(y.type, y.data, dims);
  }

  private *onHost(x: Tensor<FloatType>, options: AsyncOpOptions): Steps<Tensor<FloatType>> {
    const { experts, cache, shared, sharedGate: gate } = this.parts;
    const o = { ...options, backend: this.backend };
    const routing = yield* this.router(x, o);
    let open: Tensor | undefined;
    if (gate !== undefined) {
      const sigmoid = { ...o, activation: 'sigmoid' as const };
      const product = yield* step(
        () => linearSync(x, gate, sigmoid),
        () => linear(x, gate, sigmoid),
      );
      open = product.reshape([product.size]);
    }
    const forward = { shared, sharedGate: open, outType: x.type };
    if (cache !== undefined) return yield* cachedForward(cache, x, routing, forward, o);
    const all = { ...o, ...forward };
    return yield* step(
      () => expertsForwardSync(x, routing, experts, all),
      () => expertsForward(x, routing, experts, all),
    );
  }

  private *onDevice(x: Tensor<FloatType>, options: AsyncOpOptions): Steps<Tensor<FloatType>> {
    if (x.location === 'cuda') return yield* deviceForward(this.parts, this.routing, x, options);
    const { signal } = options;
    const there = yield* moved(x, 'cuda', signal);
    try {
      const y = yield* deviceForward(this.parts, this.routing, there, options);
      try {
        return yield* moved(y, 'cpu', signal);
      } finally {
        y.dispose();
      }
    } finally {
      there.dispose();
    }
  }

  /**
   * Frees the packed weights and closes the checkpoint: when the running calls have ended, which still give their
   * results. Further use throws `ERR_DISPOSED`.
   */
  dispose(): void {
    this.disposed = true;
    if (this.running === 0) this.free();
  }

  private free(): void {
    disposeParts(this.parts);
  }
}

function moved(t: Tensor<FloatType>, to: Location, signal?: AbortSignal): Steps<Tensor<FloatType>> {
  return step(
    () => t.toSync(to),
    () => t.to(to, { signal }),
  );
}
