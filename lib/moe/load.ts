import { type BackendName, backendOf, resolveBackend } from '../backend.ts';
import type { Checkpoint } from '../checkpoint.ts';
import { HeddleError } from '../errors.ts';
import { type PackedMatrix, packMatrix, type WeightType } from '../gemm/linear.ts';
import { type AsyncOpOptions, call, optionInteger } from '../op.ts';
import type { Tensor } from '../tensor.ts';
import type { MoEBlock } from './config.ts';
import { ExpertCache } from './expertCache.ts';
import { type ExpertData, ExpertReader, readFloats, readMatrices, toFloat32 } from './expertReader.ts';
import {
  ExpertWeights,
  expertWeightOptions,
  type PackExpertsOptions,
  packExperts,
  preparePackInto,
} from './experts.ts';

export interface MoELayerOptions {
  /** Index of the decoder layer. */
  layer: number;
  /**
   * How expert weights are packed. Default: as the checkpoint stores them (MXFP4 of gpt-oss and float8 of DeepSeek-V3
   * bit for bit). The router stays float32.
   */
  type?: WeightType;
  /** k values per scale of int4 (32, 64, 128). Default 32. */
  groupSize?: number;
  /** int4: with or without zero points, see {@link PackExpertsOptions}. Also for the shared experts. */
  symmetric?: PackExpertsOptions['symmetric'];
  /** int4: search the scales, see {@link PackExpertsOptions}. Also for the shared experts. */
  search?: PackExpertsOptions['search'];
  /** int4: activations seen by the layer, see {@link PackExpertsOptions}. Shared experts use `hidden` alone. */
  calibration?: PackExpertsOptions['calibration'];
  /**
   * Most bytes of packed experts at any time. Experts then stay in the checkpoint, which is kept open, and are read
   * and packed on first use; the least recently used go when room is needed. Shared experts and the router are
   * always packed and not counted, nor is the rounding to memory pages; beside the budget, the weights of up to two
   * experts as the file has them are in memory while experts are packed. Must hold at least one expert. Not for backend
   * cuda. Default: all experts are packed by `load`.
   */
  memoryBudget?: number;
  /**
   * `'cuda'`: the weights are packed on the host, which holds one expert at a time, and live on the device; the layer then
   * takes tensors there, and on the host.
   */
  backend?: 'auto' | BackendName;
  threads?: number;
  signal?: AbortSignal;
  /** Called while weights are read and packed. */
  onProgress?: (progress: { done: number; total: number; stage: string }) => void;
}

export const LOAD_OPTIONS: ReadonlySet<string> = new Set([
  'layer',
  'type',
  'groupSize',
  'symmetric',
  'search',
  'calibration',
  'memoryBudget',
  'backend',
  'threads',
  'signal',
  'onProgress',
]);

/** What a layer is made of. */
export interface Parts {
  block: MoEBlock;
  router: PackedMatrix;
  routerBias?: Tensor<'float32'>;
  selectionBias?: Tensor<'float32'>;
  experts: ExpertWeights;
  /** With a memory budget: what fills `experts`. */
  cache?: ExpertCache;
  shared?: ExpertWeights;
  sharedGate?: PackedMatrix;
  /** Backend cuda: the biases there. */
  onDevice?: Pick<Parts, 'routerBias' | 'selectionBias'>;
}

/** Frees what parts hold outside the garbage collector. */
export function disposeParts(parts: Partial<Parts>): void {
  const { router, experts, cache, shared, sharedGate, onDevice } = parts;
  for (const part of [router, cache ?? experts, shared, sharedGate]) part?.dispose();
  for (const bias of [onDevice?.routerBias, onDevice?.selectionBias]) bias?.dispose();
}

/**
 * Reads and packs; with a `memoryBudget` the experts are left for later, and the checkpoint must stay open.
 * @param own whether the cache closes the checkpoint in the end
 */
export async function readParts(
  c: Checkpoint,
  block: MoEBlock,
  options: MoELayerOptions,
  own: boolean,
): Promise<Parts> {
  const { hiddenSize: d, intermediateSize: f, experts: count, tensors } = block;
  const { signal } = options;
  const op: AsyncOpOptions = { backend: options.backend, threads: options.threads, signal };
  const budget =
    options.memoryBudget === undefined
      ? undefined
      : optionInteger(options.memoryBudget, 1, Number.MAX_SAFE_INTEGER, 'memoryBudget');
  const onDevice = backendOf(resolveBackend(options.backend)) === 'cuda';
  if (onDevice && budget !== undefined) {
    throw new HeddleError(
      'ERR_OPTION',
      'memoryBudget is for the host: on backend cuda all experts are on the device',
    );
  }
  const total = 2 + (budget === undefined ? count : 0) + (tensors.shared ? 1 : 0);
  let done = 0;
  const step = (stage: string) => options.onProgress?.({ done: ++done, total, stage });
  const float32 = async (name: string, dims: number[]) => toFloat32(await readFloats(c, name, dims, signal));

  const router = await packMatrix(await float32(tensors.router, [count, d]), { ...op, type: 'float32' });
  const parts: Partial<Parts> & { router: PackedMatrix } = { router };
  try {
    step('router');
    if (tensors.routerBias) parts.routerBias = await float32(tensors.routerBias, [count]);
    if (tensors.selectionBias) parts.selectionBias = await float32(tensors.selectionBias, [count]);

    const reader = new ExpertReader(c, block);
    const [type, group] = expertWeightOptions(options, reader.source, d, f);
    const shape = { experts: count, hidden: d, intermediate: f, gated: true };
    const { symmetric, search, calibration } = options;
    const packing = { ...block.activation, symmetric, search, calibration };
    const experts = new ExpertWeights(shape, packing, type, group, onDevice ? 'cpu' : options.backend);
    parts.experts = experts;
    if (budget !== undefined) parts.cache = new ExpertCache(experts, reader, budget, own);
    else if (!onDevice) await packAll(experts, reader, op, step);
    else {
      const pack = (packed: (expert: number) => Promise<void>) => packAll(experts, reader, op, step, packed);
      parts.experts = await experts.throughHost(pack, { threads: options.threads, signal });
      experts.dispose();
      const place = async (bias: Tensor<'float32'> | undefined) =>
        bias && (await bias.to('cuda', { signal }));
      parts.onDevice = { routerBias: await place(parts.routerBias) };
      parts.onDevice.selectionBias = await place(parts.selectionBias);
    }

    if (tensors.shared) {
      const { intermediateSize: size } = tensors.shared;
      const { sources, scales } = await readMatrices(c, tensors.shared, d, size, signal);
      const { hidden } = calibration ?? {};
      const rounding = { symmetric, search, calibration: hidden && { hidden } };
      const shared = { type: options.type, groupSize: options.groupSize, scales, ...block.activation };
      parts.shared = await packExperts(sources, { ...op, ...shared, ...rounding });
      step('shared experts');
    }
    if (tensors.sharedGate) {
      const gate = await float32(tensors.sharedGate, [1, d]);
      parts.sharedGate = await packMatrix(gate, { ...op, type: 'float32' });
    }
    step('packed');
    return { ...parts, block, experts: parts.experts };
  } catch (error) {
    disposeParts({ ...parts, cache: undefined });
    throw error;
  }
}

/** All experts one after the other, each read while the one before is packed and then taken by `packed`. */
async function packAll(
  weights: ExpertWeights,
  reader: ExpertReader,
  options: AsyncOpOptions,
  step: (stage: string) => void,
  packed?: (expert: number) => Promise<void>,
): Promise<void> {
  const start = (expert: number): Promise<ExpertData> => {
    const reading = reader.read(expert, options.signal);
    reading.catch(() => {}); // awaited later, or not at all when packing fails first
    return reading;
  };
  let ahead = start(0);
  for (let e = 0; e < weights.experts; e++) {
    const data = await ahead;
    if (e + 1 < weights.experts) ahead = start(e + 1);
    try {
      const { op, args } = preparePackInto(weights, e, data);
      await call(op, args, { ...options, backend: weights.backend });
    } catch (error) {
      throw reader.failure(e, error);
    }
    await packed?.(e);
    step(`expert ${e}`);
  }
  weights.account();
}
