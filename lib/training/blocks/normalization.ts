import type { Steps } from '../../checkpoint/steps.ts';
import { HeddleError } from '../../errors.ts';
import { checkOptions, optionInteger, optionNumber } from '../../op.ts';
import type { PrivateLayer } from '../../privacy/layer.ts';
import type { Tensor } from '../../tensor.ts';
import { type NormalizeShape, normalize, normalizeBackward } from '../ops/normalize.ts';
import { product, type RunOptions, zeros } from '../ops/perform.ts';
import {
  type Backward,
  Block,
  type BlockInput,
  checkInput,
  type Forward,
  type LayerParameters,
} from './block.ts';
import { layerName } from './linear.ts';

const OPTIONS: ReadonlySet<string> = new Set(['epsilon', 'bias']);
type NormKind = 'layer-norm' | 'rms-norm' | 'group-norm';

abstract class Norm extends Block {
  readonly layers: Readonly<Record<string, LayerParameters>>;
  protected readonly epsilon: number;

  constructor(
    protected readonly kind: NormKind,
    protected readonly width: number,
    bias: boolean,
    epsilon: number,
  ) {
    super();
    optionInteger(width, 1, 2 ** 31 - 1, kind === 'group-norm' ? 'channels' : 'dim');
    this.epsilon = optionNumber(epsilon, 0, 1e-5, 'epsilon');
    this.layers = {
      '': bias ? { weight: zeros([width]), bias: zeros([width]) } : { weight: zeros([width]) },
    };
    this.initialize(0);
  }

  override initial(_layer: string, parameter: string): { value: number } {
    return { value: parameter === 'weight' ? 1 : 0 };
  }

  /** Checks x and says how it is cut. */
  protected abstract shape(x: BlockInput, name: string): NormalizeShape;

  *run(input: BlockInput, name: string, options: RunOptions | undefined): Steps<Forward> {
    const shape = this.shape(input, name);
    const { kind } = this;
    const { weight, bias } = this.layers[''];
    const kept = yield* normalize(input as Tensor<'float32'>, weight, bias ?? null, shape, options);
    const backward: Backward = function* (gradOutputs, recorder, wantInput) {
      const { normalized } = kept;
      const layer = { kind, normalized, gradOutputs, bias: bias !== undefined };
      recorder.layers[layerName(name)] = layer as PrivateLayer;
      return wantInput ? yield* normalizeBackward(gradOutputs, weight, kept, shape, recorder.options) : null;
    };
    return { output: kept.output, backward };
  }
}

abstract class LastDimension extends Norm {
  protected shape(x: BlockInput, name: string): NormalizeShape {
    const { width: channels, epsilon } = this;
    const fits = x.dims.length >= 2 && x.dims[x.dims.length - 1] === channels;
    checkInput(x, name, fits, `[B, …, ${channels}]`);
    const samples = product(x.dims.slice(0, -1));
    return { samples, channels, spatial: 1, groups: 1, centered: this.kind === 'layer-norm', epsilon };
  }
}

/** Layer normalisation over the last dimension, with weight and bias. */
export class LayerNorm extends LastDimension {
  /** @param options `epsilon` default 1e-5, `bias` default true */
  constructor(dim: number, options?: { epsilon?: number; bias?: boolean }) {
    checkOptions(options, OPTIONS, 'LayerNorm');
    super('layer-norm', dim, options?.bias !== false, options?.epsilon ?? 1e-5);
  }
}

/** RMS normalisation over the last dimension, with a weight. */
export class RmsNorm extends LastDimension {
  /** @param options `epsilon` default 1e-6, `bias` default false */
  constructor(dim: number, options?: { epsilon?: number; bias?: boolean }) {
    checkOptions(options, OPTIONS, 'RmsNorm');
    super('rms-norm', dim, options?.bias === true, options?.epsilon ?? 1e-6);
  }
}

/** Group normalisation of `[B, C, …]`, with weight and bias per channel: the batch norm of private training. */
export class GroupNorm extends Norm {
  /** @param options `epsilon` default 1e-5, `bias` default true */
  constructor(
    readonly groups: number,
    channels: number,
    options?: { epsilon?: number; bias?: boolean },
  ) {
    checkOptions(options, OPTIONS, 'GroupNorm');
    super('group-norm', channels, options?.bias !== false, options?.epsilon ?? 1e-5);
    optionInteger(groups, 1, channels, 'groups');
    if (channels % groups !== 0) {
      throw new HeddleError('ERR_OPTION', `groups must divide the ${channels} channels, got ${groups}`);
    }
  }

  protected shape(x: BlockInput, name: string): NormalizeShape {
    const { width: channels, groups, epsilon } = this;
    checkInput(x, name, x.dims.length >= 2 && x.dims[1] === channels, `[B, ${channels}, …]`);
    return {
      samples: x.dims[0],
      channels,
      spatial: product(x.dims.slice(2)),
      groups,
      centered: true,
      epsilon,
    };
  }
}
