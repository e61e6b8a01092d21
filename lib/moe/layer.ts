import type { BackendName } from '../backend.ts';
import { type Checkpoint, openCheckpoint } from '../checkpoint.ts';
import { decodeFloats, type FloatType } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import {
  FLOAT_TYPES,
  linear,
  linearSync,
  type PackedMatrix,
  packMatrix,
  type WeightType,
} from '../gemm/linear.ts';
import { type AsyncOpOptions, checkOptions, type OpOptions, optionInteger } from '../op.ts';
import { asTensor, makeTensor, Tensor, type TensorLike } from '../tensor.ts';
import { type MoEBlock, moeBlock } from './config.ts';
import {
  type ExpertSources,
  type ExpertWeights,
  expertsForward,
  expertsForwardSync,
  packExperts,
} from './experts.ts';
import { type RouteTopKOptions, type Routing, routeTopK, routeTopKSync } from './routeTopK.ts';

export interface MoELayerOptions {
  /** Index of the decoder layer. */
  layer: number;
  /** How expert weights are packed. Default: as the checkpoint stores them. The router stays float32. */
  type?: WeightType;
  /** k values per scale of int4 (32, 64, 128). Default 32. */
  groupSize?: number;
  backend?: 'auto' | BackendName;
  threads?: number;
  signal?: AbortSignal;
  /** Called while weights are read and packed. */
  onProgress?: (progress: { done: number; total: number; stage: string }) => void;
}

const LOAD_OPTIONS: ReadonlySet<string> = new Set([
  'layer',
  'type',
  'groupSize',
  'backend',
  'threads',
  'signal',
  'onProgress',
]);

interface Parts {
  block: MoEBlock;
  router: PackedMatrix;
  routerBias?: Tensor<'float32'>;
  selectionBias?: Tensor<'float32'>;
  experts: ExpertWeights;
  shared?: ExpertWeights;
  sharedGate?: PackedMatrix;
}

/** Reads a tensor that must exist with these dims and a float type. */
async function readTensor(
  c: Checkpoint,
  name: string,
  dims: readonly number[],
  signal?: AbortSignal,
): Promise<Tensor<FloatType>> {
  const t = asTensor((await c.read(name, { signal })) as TensorLike, name, FLOAT_TYPES);
  if (t.dims.length !== dims.length || t.dims.some((d, i) => d !== dims[i])) {
    throw new HeddleError(
      'ERR_CHECKPOINT',
      `${c.path}: ${name} has dims [${t.dims.join(', ')}], config.json makes it [${dims.join(', ')}]`,
    );
  }
  return t;
}

async function readFloat32(
  c: Checkpoint,
  name: string,
  dims: readonly number[],
  signal?: AbortSignal,
): Promise<Tensor<'float32'>> {
  const t = await readTensor(c, name, dims, signal);
  return t.type === 'float32'
    ? (t as Tensor<'float32'>)
    : makeTensor('float32', decodeFloats(t.data, t.type), t.dims);
}

/**
 * A mixture-of-experts layer read from a Hugging Face checkpoint directory: mixtral, qwen2_moe, qwen3_moe, olmoe,
 * deepseek_v3, gpt_oss.
 *
 * ```ts
 * const layer = await MoELayer.load(directory, { layer: 1 });
 * const y = await layer.forward(new Tensor('float32', x, [tokens, layer.hiddenSize]));
 * layer.dispose();
 * ```
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
   * Reads config.json and the layer's tensors, and packs the weights.
   * @param directory checkpoint directory (config.json, model.safetensors or shards with an index), or one file
   * @throws HeddleError `ERR_CHECKPOINT` naming file, field or tensor; `ERR_OPTION`; `ERR_MEMORY`; `ERR_ABORTED`
   */
  static async load(directory: string, options: MoELayerOptions): Promise<MoELayer> {
    checkOptions(options, LOAD_OPTIONS, 'MoELayer.load');
    const layer = optionInteger(options?.layer, 0, 100_000, 'layer');
    const checkpoint = await openCheckpoint(directory);
    try {
      return new MoELayer(await readParts(checkpoint, moeBlock(checkpoint, layer), options));
    } finally {
      checkpoint.close();
    }
  }

  /** Bytes of packed weights. */
  get bytes(): number {
    const { router, experts, shared, sharedGate } = this.parts;
    return router.bytes + experts.bytes + (shared?.bytes ?? 0) + (sharedGate?.bytes ?? 0);
  }

  /** What `routeTopK` is called with. */
  get routing(): RouteTopKOptions {
    return { ...this.parts.block.routing, selectionBias: this.parts.selectionBias };
  }

  private tokens(x: TensorLike): { flat: Tensor<FloatType>; dims: readonly number[] } {
    if (this.disposed) throw new HeddleError('ERR_DISPOSED', 'the MoE layer was disposed');
    const t = asTensor(x, 'x', FLOAT_TYPES);
    const d = this.hiddenSize;
    if (t.dims.length < 1 || t.dims[t.dims.length - 1] !== d) {
      throw new HeddleError('ERR_SHAPE', `x: expected [..., ${d}], got [${t.dims.join(', ')}]`);
    }
    return { flat: makeTensor(t.type, t.data, [t.size / d, d]), dims: t.dims };
  }

  /** Router logits, expert ids and weights of each token. `x` `[.., hidden]`; results `[tokens, …]`. */
  async route(x: TensorLike, options: AsyncOpOptions = {}): Promise<Routing & { logits: Tensor<'float32'> }> {
    const { flat } = this.tokens(x);
    const o = { ...options, backend: this.backend };
    const logits = (await linear(flat, this.parts.router, {
      ...o,
      bias: this.parts.routerBias,
    })) as Tensor<'float32'>;
    return { ...(await routeTopK(logits, { ...this.routing, ...o })), logits };
  }

  /** {@link route} on the calling thread. */
  routeSync(x: TensorLike, options: OpOptions = {}): Routing & { logits: Tensor<'float32'> } {
    const { flat } = this.tokens(x);
    const o = { ...options, backend: this.backend };
    const logits = linearSync(flat, this.parts.router, {
      ...o,
      bias: this.parts.routerBias,
    }) as Tensor<'float32'>;
    return { ...routeTopKSync(logits, { ...this.routing, ...o }), logits };
  }

  /**
   * The block's output, shared experts included.
   * @param x `[.., hidden]` float32, bfloat16 or float16
   * @returns the same dims and type as x
   */
  async forward(x: TensorLike, options: AsyncOpOptions = {}): Promise<Tensor<FloatType>> {
    const { flat, dims } = this.tokens(x);
    const o = { ...options, backend: this.backend };
    const routing = await this.route(flat, o);
    const { experts, shared, sharedGate } = this.parts;
    const gate =
      sharedGate === undefined ? undefined : await linear(flat, sharedGate, { ...o, activation: 'sigmoid' });
    const y = await expertsForward(flat, routing, experts, {
      ...o,
      shared,
      sharedGate: flatten(gate),
      outType: flat.type,
    });
    return makeTensor(y.type, y.data, dims);
  }

  /** {@link forward} on the calling thread. */
  forwardSync(x: TensorLike, options: OpOptions = {}): Tensor<FloatType> {
    const { flat, dims } = this.tokens(x);
    const o = { ...options, backend: this.backend };
    const routing = this.routeSync(flat, o);
    const { experts, shared, sharedGate } = this.parts;
    const gate =
      sharedGate === undefined ? undefined : linearSync(flat, sharedGate, { ...o, activation: 'sigmoid' });
    const y = expertsForwardSync(flat, routing, experts, {
      ...o,
      shared,
      sharedGate: flatten(gate),
      outType: flat.type,
    });
    return makeTensor(y.type, y.data, dims);
  }

  /** Frees the packed weights (when the last running call ends). Further use throws `ERR_DISPOSED`. */
  dispose(): void {
    this.disposed = true;
    const { router, experts, shared, sharedGate } = this.parts;
    for (const handle of [router, experts, shared, sharedGate]) handle?.dispose();
  }
}

/** `[tokens, 1]` as `[tokens]`. */
function flatten(t: Tensor<FloatType> | undefined): Tensor | undefined {
  return t === undefined ? undefined : new Tensor('float32', t.data as Float32Array, [t.size]);
}

async function readParts(c: Checkpoint, block: MoEBlock, options: MoELayerOptions): Promise<Parts> {
  const { hiddenSize: d, intermediateSize: f, experts: count, tensors } = block;
  const { signal } = options;
  const op: AsyncOpOptions = { backend: options.backend, threads: options.threads, signal };
  const names = tensors.experts;
  const total = 2 + ('gateUp' in names ? 2 : 3 * count) + (tensors.shared ? 4 : 0);
  let done = 0;
  const step = (stage: string) => options.onProgress?.({ done: ++done, total, stage });
  const pack = { ...op, type: options.type, groupSize: options.groupSize, ...block.activation };

  const router = await packMatrix(await readFloat32(c, tensors.router, [count, d], signal), {
    ...op,
    type: 'float32',
  });
  step('router');
  const routerBias = tensors.routerBias && (await readFloat32(c, tensors.routerBias, [count], signal));
  const selectionBias =
    tensors.selectionBias && (await readFloat32(c, tensors.selectionBias, [count], signal));

  let experts: ExpertWeights;
  if ('gateUp' in names) {
    const gateUp = await readTensor(c, names.gateUp, [count, d, 2 * f], signal);
    step('gate and up');
    const down = await readTensor(c, names.down, [count, f, d], signal);
    step('down');
    const biases = {
      gateUp: await readFloat32(c, names.gateUpBias, [count, 2 * f], signal),
      down: await readFloat32(c, names.downBias, [count, d], signal),
    };
    experts = await packExperts({ gateUp, down, interleaved: true, layout: 'in-out' }, { ...pack, biases });
  } else {
    const sources: Required<Pick<ExpertSources, 'gate' | 'up' | 'down'>> = { gate: [], up: [], down: [] };
    for (let e = 0; e < count; e++) {
      const read = async (name: string, dims: number[]) => {
        const t = await readTensor(c, name.replace('{}', String(e)), dims, signal);
        step(`expert ${e}`);
        return t;
      };
      (sources.gate as Tensor[]).push(await read(names.gate, [f, d]));
      (sources.up as Tensor[]).push(await read(names.up, [f, d]));
      (sources.down as Tensor[]).push(await read(names.down, [d, f]));
    }
    experts = await packExperts(sources, pack);
  }

  let shared: ExpertWeights | undefined;
  let sharedGate: PackedMatrix | undefined;
  if (tensors.shared) {
    const s = tensors.shared;
    const size = s.intermediateSize;
    shared = await packExperts(
      {
        gate: [await readTensor(c, s.gate, [size, d], signal)],
        up: [await readTensor(c, s.up, [size, d], signal)],
        down: [await readTensor(c, s.down, [d, size], signal)],
      },
      pack,
    );
    step('shared experts');
  }
  if (tensors.sharedGate) {
    sharedGate = await packMatrix(await readFloat32(c, tensors.sharedGate, [1, d], signal), {
      ...op,
      type: 'float32',
    });
  }
  step('packed');
  return {
    block,
    router,
    routerBias: routerBias || undefined,
    selectionBias: selectionBias || undefined,
    experts,
    shared,
    sharedGate,
  };
}
