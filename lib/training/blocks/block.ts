import { randomInt } from 'node:crypto';
import { runAsync, runSync, type Steps, step } from '../../checkpoint/steps.ts';
import { HeddleError } from '../../errors.ts';
import { type AsyncOpOptions, checkOptions, type OpOptions, optionInteger } from '../../op.ts';
import { chacha20Blocks } from '../../privacy/chacha20.ts';
import type { PrivateLayer } from '../../privacy/layer.ts';
import { asTensor, checkDims, type Tensor, type TensorLike } from '../../tensor.ts';
import type { RunOptions } from '../ops/perform.ts';
import { asMask, type Mask } from './mask.ts';

/** Parameters of one layer, by PyTorch's names (`weight`, `bias`); float32, updated in place. */
export type LayerParameters = Readonly<Record<string, Tensor<'float32'>>>;

/** What blocks read: activations, or ids of an embedding. */
export type BlockInput = Tensor<'float32'> | Tensor<'int32'>;

/** @internal What one backward run collects and obeys. */
export interface Recorder {
  layers: Record<string, PrivateLayer>;
  options: RunOptions | undefined;
}

/**
 * @internal The way back of one forward run: records what clipping needs of each layer; gives the input's gradient, or
 * null where it is not wanted.
 */
export type Backward = (
  gradOutput: Tensor<'float32'>,
  recorder: Recorder,
  wantInput: boolean,
) => Steps<Tensor<'float32'> | null>;

/** @internal */
export interface Forward {
  output: Tensor<'float32'>;
  /** Which positions of the output are tokens. */
  mask: Mask;
  backward: Backward;
}

/** Options of {@link Block.forward}. */
export interface ForwardOptions {
  /**
   * uint8 `[B, T]`, the dims of ids or the leading dims of activations: 0 marks padding. What stands there is not read,
   * and changes no token's activation, no loss and no gradient.
   */
  mask?: TensorLike;
}

const RUN_OPTIONS: ReadonlySet<string> = new Set(['backend', 'threads', 'signal']);
const FORWARD_OPTIONS: ReadonlySet<string> = new Set([...RUN_OPTIONS, 'mask']);

/** One forward run of a network: its output, and the way back. */
export class Pass {
  /** At positions of padding its values mean nothing. */
  readonly output: Tensor<'float32'>;
  /** What is left of the mask: for `crossEntropy`. Null where none was given, or where no positions are left. */
  readonly mask: Tensor<'uint8'> | null;
  private way: Backward | null;

  /** @internal */
  constructor({ output, mask, backward }: Forward) {
    this.output = output;
    this.mask = mask;
    this.way = backward;
  }

  private *run(gradOutput: TensorLike, options: RunOptions | undefined): Steps<Record<string, PrivateLayer>> {
    checkOptions(options, RUN_OPTIONS, 'backward');
    const g = asTensor(gradOutput, 'gradOutput', ['float32']);
    checkDims(g, this.output.dims, 'gradOutput', 'the output');
    if (this.way === null) throw new HeddleError('ERR_DISPOSED', 'backward has already run on this pass');
    const way = this.way;
    this.way = null;
    const recorder: Recorder = { layers: {}, options };
    yield* way(g, recorder, false);
    return recorder.layers;
  }

  /**
   * Walks back through the network, once: what each layer read, and the gradient of each sample's own loss with respect
   * to what it gave. Hand it to `PrivateOptimizer.accumulate`.
   * @param gradOutput in the dims of the output, not averaged over samples; padding has no say
   */
  async backward(gradOutput: TensorLike, options?: AsyncOpOptions): Promise<Record<string, PrivateLayer>> {
    return runAsync(this.run(gradOutput, options));
  }

  /** {@link backward} on the calling thread. */
  backwardSync(gradOutput: TensorLike, options?: OpOptions): Record<string, PrivateLayer> {
    return runSync(this.run(gradOutput, options));
  }
}

/** A piece of a network: forward, backward, and the layers it trains. */
export abstract class Block {
  /** Layers with parameters by their names; empty for blocks without any. */
  abstract readonly layers: Readonly<Record<string, LayerParameters>>;

  /** @internal `name` is the block's prefix, empty or ending in a dot. */
  abstract run(x: BlockInput, name: string, options: RunOptions | undefined, mask: Mask): Steps<Forward>;

  /** Range of the uniform initial values of a parameter, ±; or one number for all. @internal */
  initial(_layer: string, _parameter: string): { range: number } | { value: number } {
    return { value: 0 };
  }

  /**
   * Draws every parameter anew, as PyTorch's defaults have it: uniform within ±1/√(inputs), embeddings within ±√3,
   * normalisations 1 and 0. The same seed gives the same network on every machine. Constructors draw from a random seed.
   */
  initialize(seed: number): this {
    optionInteger(seed, 0, 2 ** 32 - 1, 'seed');
    const key = Uint32Array.of(seed, 0, 0, 0, 0, 0, 0, 0);
    let index = 0;
    for (const [layer, parameters] of Object.entries(this.layers)) {
      for (const [name, { data }] of Object.entries(parameters)) {
        const nonce = Uint32Array.of(0, index++, 0);
        const initial = this.initial(layer, name);
        if ('value' in initial) {
          data.fill(initial.value);
          continue;
        }
        const words = chacha20Blocks(key, 0, nonce, Math.ceil(data.length / 16));
        for (let i = 0; i < data.length; i++)
          data[i] = initial.range * (2 * ((words[i] + 0.5) / 2 ** 32) - 1);
      }
    }
    return this;
  }

  private *pass(x: TensorLike, options: (ForwardOptions & RunOptions) | undefined): Steps<Pass> {
    checkOptions(options, FORWARD_OPTIONS, 'forward');
    const { mask: given, ...run } = options ?? {};
    const input = asTensor(x, 'x', ['float32', 'int32']) as BlockInput;
    const ids = input.type === 'int32';
    const mask = asMask(given, ids ? input.dims : input.dims.slice(0, -1), ids ? 'x' : 'x without its last');
    return new Pass(yield* this.run(input, '', run, mask));
  }

  /**
   * Runs the network on a batch; the first dimension is the sample.
   * @throws HeddleError `ERR_ARGUMENT`, `ERR_SHAPE`, `ERR_DTYPE`, `ERR_VALUE`, `ERR_BACKEND`, `ERR_ABORTED`, `ERR_MEMORY`
   */
  async forward(x: TensorLike, options?: ForwardOptions & AsyncOpOptions): Promise<Pass> {
    return runAsync(this.pass(x, options));
  }

  /** {@link forward} on the calling thread. */
  forwardSync(x: TensorLike, options?: ForwardOptions & OpOptions): Pass {
    return runSync(this.pass(x, options));
  }
}

/** @internal A seed from the operating system. */
export const anySeed = (): number => randomInt(2 ** 32);

/** @internal Refuses an input of the wrong type or dims. */
export function checkInput(x: BlockInput, name: string, fits: boolean, expected: string): Tensor<'float32'> {
  const at = name === '' ? 'x' : `x of ${name.slice(0, -1)}`;
  if (x.type !== 'float32') throw new HeddleError('ERR_DTYPE', `${at}: expected float32, got ${x.type}`);
  if (!fits) throw new HeddleError('ERR_SHAPE', `${at}: expected ${expected}, got [${x.dims.join(', ')}]`);
  return x as Tensor<'float32'>;
}

/** @internal Work too small for a thread, as a step. */
export function* here<T>(work: () => T): Steps<T> {
  return yield* step(work, async () => work());
}
