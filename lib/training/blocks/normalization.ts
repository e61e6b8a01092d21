import { type Steps, step } from '../../checkpoint/steps.ts';
import { HeddleError } from '../../errors.ts';
import { layerNorm, layerNormSync, type NormResult, rmsNorm, rmsNormSync } from '../../nn/norm.ts';
import {
  layerNormBackward,
  layerNormBackwardSync,
  rmsNormBackward,
  rmsNormBackwardSync,
} from '../../nn/normBackward.ts';
import { checkOptions, optionInteger, optionNumber } from '../../op.ts';
import { product, type Tensor } from '../../tensor.ts';
import { type GroupNormShape, groupNorm, groupNormBackward } from '../ops/groupNorm.ts';
import { type RunOptions, zeros } from '../ops/perform.ts';
import {
  type Backward,
  Block,
  type BlockInput,
  checkInput,
  type Forward,
  type LayerParameters,
} from './block.ts';
import { layerName } from './linear.ts';
import { type Mask, refuseMask } from './mask.ts';

abstract class Norm extends Block {
  readonly layers: Readonly<Record<string, LayerParameters>>;
  protected readonly epsilon: number;

  constructor(
    protected readonly width: number,
    bias: boolean,
    epsilon: number,
    name: string,
  ) {
    super();
    optionInteger(width, 1, 2 ** 31 - 1, name);
    this.epsilon = optionNumber(epsilon, 0, 1e-5, 'epsilon');
    const weight = zeros([width]);
    this.layers = { '': bias ? { weight, bias: zeros([width]) } : { weight } };
    this.initialize(0);
  }

  override initial(_layer: string, parameter: string): { value: number } {
    return { value: parameter === 'weight' ? 1 : 0 };
  }
}

const LAYER_OPTIONS: ReadonlySet<string> = new Set(['epsilon', 'bias']);
const RMS_OPTIONS: ReadonlySet<string> = new Set(['epsilon']);

/** Layer normalisation over the last dimension, with weight and bias. */
export class LayerNorm extends Norm {
  /** @param options `epsilon` default 1e-5, `bias` default true */
  constructor(dim: number, options?: { epsilon?: number; bias?: boolean }) {
    checkOptions(options, LAYER_OPTIONS, 'LayerNorm');
    super(dim, options?.bias !== false, options?.epsilon ?? 1e-5, 'dim');
  }

  *run(input: BlockInput, name: string, options: RunOptions | undefined, mask: Mask): Steps<Forward> {
    const { width, epsilon } = this;
    const x = checkLast(input, name, width);
    const { weight, bias } = this.layers[''];
    const norm = function* (more: object, run: RunOptions | undefined): Steps<NormResult> {
      return yield* step(
        () => layerNormSync(x, { ...run, epsilon, ...more }),
        () => layerNorm(x, { ...run, epsilon, ...more }),
      );
    };
    const { output, mean, rstd } = yield* norm({ weight, bias, returnStatistics: true }, options);
    const backward: Backward = function* (g, recorder, wantInput) {
      const { output: normalized } = yield* norm({}, recorder.options);
      recorder.layers[layerName(name)] = {
        kind: 'layer-norm',
        normalized,
        gradOutputs: g,
        bias: bias !== undefined,
        mask: mask ?? undefined,
      };
      if (!wantInput) return null;
      const kept = { ...recorder.options, weight, epsilon, mean, rstd };
      const gradients = yield* step(
        () => layerNormBackwardSync(g, x, kept),
        () => layerNormBackward(g, x, kept),
      );
      return gradients.x as Tensor<'float32'>;
    };
    return { output: output as Tensor<'float32'>, mask, backward };
  }
}

/** RMS normalisation over the last dimension, with a weight. */
export class RmsNorm extends Norm {
  /** @param options `epsilon` default 1e-6 */
  constructor(dim: number, options?: { epsilon?: number }) {
    checkOptions(options, RMS_OPTIONS, 'RmsNorm');
    super(dim, false, options?.epsilon ?? 1e-6, 'dim');
  }

  *run(input: BlockInput, name: string, options: RunOptions | undefined, mask: Mask): Steps<Forward> {
    const { width, epsilon } = this;
    const x = checkLast(input, name, width);
    const { weight } = this.layers[''];
    const norm = function* (more: object, run: RunOptions | undefined): Steps<NormResult> {
      return yield* step(
        () => rmsNormSync(x, { ...run, epsilon, ...more }),
        () => rmsNorm(x, { ...run, epsilon, ...more }),
      );
    };
    const { output, rstd } = yield* norm({ weight, returnStatistics: true }, options);
    const backward: Backward = function* (g, recorder, wantInput) {
      const { output: normalized } = yield* norm({}, recorder.options);
      recorder.layers[layerName(name)] = {
        kind: 'rms-norm',
        normalized,
        gradOutputs: g,
        mask: mask ?? undefined,
      };
      if (!wantInput) return null;
      const kept = { ...recorder.options, weight, epsilon, rstd };
      const gradients = yield* step(
        () => rmsNormBackwardSync(g, x, kept),
        () => rmsNormBackward(g, x, kept),
      );
      return gradients.x as Tensor<'float32'>;
    };
    return { output: output as Tensor<'float32'>, mask, backward };
  }
}

function checkLast(x: BlockInput, name: string, width: number): Tensor<'float32'> {
  const fits = x.dims.length >= 2 && x.dims[x.dims.length - 1] === width;
  return checkInput(x, name, fits, `[B, …, ${width}]`);
}

/** Group normalisation of `[B, C, …]`, with weight and bias per channel: the batch norm of private training. */
export class GroupNorm extends Norm {
  /** @param options `epsilon` default 1e-5, `bias` default true */
  constructor(
    readonly groups: number,
    channels: number,
    options?: { epsilon?: number; bias?: boolean },
  ) {
    checkOptions(options, LAYER_OPTIONS, 'GroupNorm');
    super(channels, options?.bias !== false, options?.epsilon ?? 1e-5, 'channels');
    optionInteger(groups, 1, channels, 'groups');
    if (channels % groups !== 0) {
      throw new HeddleError('ERR_OPTION', `groups must divide the ${channels} channels, got ${groups}`);
    }
  }

  *run(input: BlockInput, name: string, options: RunOptions | undefined, mask: Mask): Steps<Forward> {
    refuseMask(mask, name, 'GroupNorm');
    const { width: channels, groups, epsilon } = this;
    const fits = input.dims.length >= 2 && input.dims[1] === channels;
    const x = checkInput(input, name, fits, `[B, ${channels}, …]`);
    const spatial = product(x.dims.slice(2));
    const shape: GroupNormShape = { samples: x.dims[0], channels, spatial, groups, epsilon };
    const { weight, bias } = this.layers[''];
    const kept = yield* groupNorm(x, weight, bias ?? null, shape, options);
    const backward: Backward = function* (gradOutputs, recorder, wantInput) {
      const { normalized } = kept;
      recorder.layers[layerName(name)] = {
        kind: 'group-norm',
        normalized,
        gradOutputs,
        bias: bias !== undefined,
      };
      return wantInput ? yield* groupNormBackward(gradOutputs, weight, kept, shape, recorder.options) : null;
    };
    return { output: kept.output, mask: null, backward };
  }
}
