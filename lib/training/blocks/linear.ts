import { type Steps, step } from '../../checkpoint/steps.ts';
import { HeddleError } from '../../errors.ts';
import { linear, linearSync, packMatrix, packMatrixSync } from '../../gemm/linear.ts';
import { checkOptions, optionInteger } from '../../op.ts';
import type { EmbeddingLayer } from '../../privacy/layer.ts';
import { makeTensor, type Tensor } from '../../tensor.ts';
import type { RunOptions } from '../ops/perform.ts';
import { zeros } from '../ops/perform.ts';
import {
  anySeed,
  type Backward,
  Block,
  type BlockInput,
  checkInput,
  type Forward,
  here,
  type LayerParameters,
} from './block.ts';
import type { Mask } from './mask.ts';

const BIAS: ReadonlySet<string> = new Set(['bias']);

/** x·Wᵀ, or x·W for `transposed`, with weights packed for this one product. */
export function* product(
  x: Tensor<'float32'>,
  weight: Tensor<'float32'>,
  bias: Tensor<'float32'> | null,
  transposed: boolean,
  options: RunOptions | undefined,
): Steps<Tensor<'float32'>> {
  const packing = { ...options, transposed };
  const w = yield* step(
    () => packMatrixSync(weight, packing),
    () => packMatrix(weight, packing),
  );
  try {
    const given = bias === null ? options : { ...options, bias };
    const y = yield* step(
      () => linearSync(x, w, given),
      () => linear(x, w, given),
    );
    return y as Tensor<'float32'>;
  } finally {
    w.dispose();
  }
}

/** `y = x·Wᵀ + b` over the last dimension. */
export class Linear extends Block {
  readonly layers: Readonly<Record<string, LayerParameters>>;
  readonly inputs: number;
  readonly outputs: number;
  readonly bias: boolean;

  /** @param options `bias`: default true */
  constructor(inputs: number, outputs: number, options?: { bias?: boolean }) {
    super();
    checkOptions(options, BIAS, 'Linear');
    this.inputs = optionInteger(inputs, 1, 2 ** 31 - 1, 'inputs');
    this.outputs = optionInteger(outputs, 1, 2 ** 31 - 1, 'outputs');
    this.bias = options?.bias !== false;
    const weight = zeros([outputs, inputs]);
    this.layers = { '': this.bias ? { weight, bias: zeros([outputs]) } : { weight } };
    this.initialize(anySeed());
  }

  override initial(): { range: number } {
    return { range: 1 / Math.sqrt(this.inputs) };
  }

  *run(input: BlockInput, name: string, options: RunOptions | undefined, mask: Mask): Steps<Forward> {
    const { inputs, bias } = this;
    const fits = input.dims.length >= 2 && input.dims[input.dims.length - 1] === inputs;
    const x = checkInput(input, name, fits, `[B, …, ${inputs}]`);
    const { weight, bias: b } = this.layers[''];
    const output = yield* product(x, weight, b ?? null, false, options);
    const backward: Backward = function* (g, recorder, wantInput) {
      recorder.layers[layerName(name)] = {
        kind: 'linear',
        activations: x,
        gradOutputs: g,
        bias,
        mask: mask ?? undefined,
      };
      return wantInput ? yield* product(g, weight, null, true, recorder.options) : null;
    };
    return { output, mask, backward };
  }
}

/** What clipping needs of a table: which rows were read, and what came back to them. */
const rowsRead = (
  indices: Tensor<'int32'>,
  gradOutputs: Tensor<'float32'>,
  numEmbeddings: number,
  mask: Mask,
): EmbeddingLayer => ({ kind: 'embedding', indices, gradOutputs, numEmbeddings, mask: mask ?? undefined });

/** A table of vectors, of which every id reads one row: `[B, …]` int32 → `[B, …, dim]`. */
export class Embedding extends Block {
  readonly layers: Readonly<Record<string, LayerParameters>>;

  constructor(
    readonly numEmbeddings: number,
    readonly dim: number,
  ) {
    super();
    optionInteger(numEmbeddings, 1, 2 ** 31 - 1, 'numEmbeddings');
    optionInteger(dim, 1, 2 ** 31 - 1, 'dim');
    this.layers = { '': { weight: zeros([numEmbeddings, dim]) } };
    this.initialize(anySeed());
  }

  override initial(): { range: number } {
    return { range: Math.sqrt(3) };
  }

  run(ids: BlockInput, name: string, _: RunOptions | undefined, mask: Mask): Steps<Forward> {
    return here(() => this.lookUp(ids, name, mask));
  }

  private lookUp(ids: BlockInput, name: string, mask: Mask): Forward {
    if (ids.type !== 'int32') throw new HeddleError('ERR_DTYPE', `ids: expected int32, got ${ids.type}`);
    if (ids.dims.length < 1) throw new HeddleError('ERR_SHAPE', 'ids: expected [B, …], got []');
    const { numEmbeddings, dim } = this;
    const output = zeros([...ids.dims, dim]);
    const table = this.layers[''].weight.data;
    for (let i = 0; i < ids.size; i++) {
      if (mask?.data[i] === 0) continue;
      const id = ids.data[i];
      if (!(id >= 0 && id < numEmbeddings)) {
        throw new HeddleError('ERR_VALUE', `ids: element ${i} is ${id}: expected 0 to ${numEmbeddings - 1}`);
      }
      output.data.set(table.subarray(id * dim, (id + 1) * dim), i * dim);
    }
    const backward: Backward = (gradOutputs, recorder) =>
      here(() => {
        recorder.layers[layerName(name)] = rowsRead(ids, gradOutputs, numEmbeddings, mask);
        return null;
      });
    return { output, mask, backward };
  }
}

/**
 * Adds a learned vector to each position: `x[b, t] + W[t]`, for x `[B, T, dim]` with T at most `length`. Positions count
 * tokens: padding, wherever it stands, has none.
 */
export class PositionEmbedding extends Block {
  readonly layers: Readonly<Record<string, LayerParameters>>;

  constructor(
    readonly length: number,
    readonly dim: number,
  ) {
    super();
    optionInteger(length, 1, 2 ** 31 - 1, 'length');
    optionInteger(dim, 1, 2 ** 31 - 1, 'dim');
    this.layers = { '': { weight: zeros([length, dim]) } };
    this.initialize(anySeed());
  }

  override initial(): { range: number } {
    return { range: 0.02 };
  }

  run(input: BlockInput, name: string, _: RunOptions | undefined, mask: Mask): Steps<Forward> {
    return here(() => this.add(input, name, mask));
  }

  private add(input: BlockInput, name: string, mask: Mask): Forward {
    const { length, dim } = this;
    const fits = input.dims.length === 3 && input.dims[1] <= length && input.dims[2] === dim;
    const x = checkInput(input, name, fits, `[B, at most ${length}, ${dim}]`);
    const [batch, positions] = x.dims;
    const table = this.layers[''].weight.data;
    const ids = new Int32Array(batch * positions);
    for (let b = 0; b < batch; b++) {
      let next = 0;
      for (let i = b * positions; i < (b + 1) * positions; i++) if (mask?.data[i] !== 0) ids[i] = next++;
    }
    const output = zeros(x.dims);
    for (let i = 0; i < x.size; i++) {
      output.data[i] = x.data[i] + table[ids[Math.floor(i / dim)] * dim + (i % dim)];
    }
    const indices = makeTensor('int32', ids, [batch, positions]);
    const backward: Backward = (gradOutputs, recorder, wantInput) =>
      here(() => {
        recorder.layers[layerName(name)] = rowsRead(indices, gradOutputs, length, mask);
        return wantInput ? gradOutputs : null;
      });
    return { output, mask, backward };
  }
}

/** @internal The name of a block's own layer. */
export const layerName = (prefix: string): string => prefix.replace(/\.$/, '');
