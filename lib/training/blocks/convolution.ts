import type { Steps } from '../../checkpoint/steps.ts';
import { HeddleError } from '../../errors.ts';
import { checkOptions, optionInteger } from '../../op.ts';
import { MAX_EXTENT, outputSize, perAxis } from '../../privacy/convGeometry.ts';
import { product } from '../../tensor.ts';
import { type ConvolutionShape, convolution, convolutionInputGradient } from '../ops/convolution.ts';
import { type RunOptions, zeros } from '../ops/perform.ts';
import { type PoolingShape, pooling, poolingBackward } from '../ops/pooling.ts';
import {
  anySeed,
  type Backward,
  Block,
  type BlockInput,
  checkInput,
  type Forward,
  type LayerParameters,
} from './block.ts';
import { layerName } from './linear.ts';
import { type Mask, refuseMask } from './mask.ts';

/** One number for all axes, or one per axis. */
type PerAxis = number | readonly number[];
/** Checks `[B, channels, …]` and gives the output's places along each axis. */
function places(
  x: BlockInput,
  name: string,
  channels: number | null,
  window: { kernel: number[]; stride: number[]; padding: number[]; dilation?: number[] },
): number[] {
  const { kernel, stride, padding, dilation } = window;
  const fits = x.dims.length === kernel.length + 2 && (channels === null || x.dims[1] === channels);
  checkInput(x, name, fits, `[B, ${channels ?? 'C'}, ${kernel.map(() => 'size').join(', ')}]`);
  const out = x.dims.slice(2).map((n, i) => outputSize(n, kernel[i], stride[i], padding[i], dilation?.[i]));
  checkInput(
    x,
    name,
    out.every((n) => n >= 1),
    `a size that the kernel [${kernel.join(', ')}] fits in`,
  );
  const padded = x.dims[1] * product(x.dims.slice(2).map((n, i) => n + 2 * padding[i]));
  checkInput(x, name, padded < 2 ** 31, 'fewer than 2^31 padded elements per sample');
  return out;
}

export interface ConvOptions {
  /** Default 1. */
  stride?: PerAxis;
  /** Zeros on either side. Default 0. */
  padding?: PerAxis;
  /** Default 1. */
  dilation?: PerAxis;
  /** Divides both channel counts. Default 1. */
  groups?: number;
  /** Default true. */
  bias?: boolean;
}
const CONV_OPTIONS: ReadonlySet<string> = new Set(['stride', 'padding', 'dilation', 'groups', 'bias']);

abstract class Conv extends Block {
  readonly layers: Readonly<Record<string, LayerParameters>>;
  readonly kernel: number[];
  readonly stride: number[];
  readonly padding: number[];
  readonly dilation: number[];
  readonly groups: number;
  readonly bias: boolean;

  constructor(
    private readonly axes: 1 | 2 | 3,
    readonly inChannels: number,
    readonly outChannels: number,
    kernel: PerAxis,
    options: ConvOptions | undefined,
  ) {
    super();
    checkOptions(options, CONV_OPTIONS, `Conv${axes}d`);
    optionInteger(inChannels, 1, MAX_EXTENT, 'inChannels');
    optionInteger(outChannels, 1, MAX_EXTENT, 'outChannels');
    this.kernel = perAxis(kernel, axes, 1, 'kernel');
    this.stride = perAxis(options?.stride ?? 1, axes, 1, 'stride');
    this.padding = perAxis(options?.padding ?? 0, axes, 0, 'padding');
    this.dilation = perAxis(options?.dilation ?? 1, axes, 1, 'dilation');
    this.groups = optionInteger(options?.groups ?? 1, 1, MAX_EXTENT, 'groups');
    if (inChannels % this.groups !== 0 || outChannels % this.groups !== 0) {
      throw new HeddleError(
        'ERR_OPTION',
        `groups must divide the ${inChannels} input and ${outChannels} output channels, got ${this.groups}`,
      );
    }
    this.bias = options?.bias !== false;
    const weight = zeros([outChannels, inChannels / this.groups, ...this.kernel]);
    this.layers = { '': this.bias ? { weight, bias: zeros([outChannels]) } : { weight } };
    this.initialize(anySeed());
  }

  override initial(): { range: number } {
    return { range: 1 / Math.sqrt((this.inChannels / this.groups) * product(this.kernel)) };
  }

  *run(input: BlockInput, name: string, options: RunOptions | undefined, mask: Mask): Steps<Forward> {
    refuseMask(mask, name, `Conv${this.axes}d`);
    const { inChannels, outChannels, groups, kernel, stride, padding, dilation, bias } = this;
    const outSize = places(input, name, inChannels, this);
    const x = checkInput(input, name, true, '');
    const [samples, , ...size] = x.dims;
    const geometry = { kernel, stride, padding, dilation, groups };
    const shape: ConvolutionShape = { samples, inChannels, outChannels, size, outSize, ...geometry };
    const { weight, bias: b } = this.layers[''];
    const output = yield* convolution(x, weight, b ?? null, shape, options);
    const kind = `conv${this.axes}d` as const;
    const backward: Backward = function* (gradOutputs, recorder, wantInput) {
      recorder.layers[layerName(name)] = { kind, input: x, gradOutputs, ...geometry, bias };
      return wantInput ? yield* convolutionInputGradient(gradOutputs, weight, shape, recorder.options) : null;
    };
    return { output, mask: null, backward };
  }
}

/** Convolution of `[B, C_in, length]`. */
export class Conv1d extends Conv {
  constructor(inChannels: number, outChannels: number, kernel: PerAxis, options?: ConvOptions) {
    super(1, inChannels, outChannels, kernel, options);
  }
}

/** Convolution of `[B, C_in, height, width]`. */
export class Conv2d extends Conv {
  constructor(inChannels: number, outChannels: number, kernel: PerAxis, options?: ConvOptions) {
    super(2, inChannels, outChannels, kernel, options);
  }
}

/** Convolution of `[B, C_in, frames, height, width]`. */
export class Conv3d extends Conv {
  constructor(inChannels: number, outChannels: number, kernel: PerAxis, options?: ConvOptions) {
    super(3, inChannels, outChannels, kernel, options);
  }
}

export interface PoolOptions {
  /** Default: the kernel. */
  stride?: PerAxis;
  /** At most half the kernel. Default 0. */
  padding?: PerAxis;
}
const POOL_OPTIONS: ReadonlySet<string> = new Set(['stride', 'padding']);

abstract class Pool extends Block {
  readonly layers = {};
  readonly kernel: number[];
  readonly stride: number[];
  readonly padding: number[];

  constructor(
    private readonly average: boolean,
    kernel: PerAxis,
    options: PoolOptions | undefined,
  ) {
    super();
    checkOptions(options, POOL_OPTIONS, average ? 'AvgPool2d' : 'MaxPool2d');
    this.kernel = perAxis(kernel, 2, 1, 'kernel');
    this.stride = perAxis(options?.stride ?? kernel, 2, 1, 'stride');
    this.padding = perAxis(options?.padding ?? 0, 2, 0, 'padding');
    this.padding.forEach((p, i) => {
      optionInteger(p, 0, Math.floor(this.kernel[i] / 2), 'padding');
    });
  }

  *run(input: BlockInput, name: string, options: RunOptions | undefined, mask: Mask): Steps<Forward> {
    refuseMask(mask, name, 'pooling');
    const { average, kernel, stride, padding } = this;
    const outSize = places(input, name, null, this);
    const x = checkInput(input, name, true, '');
    const [samples, channels, ...size] = x.dims;
    const shape: PoolingShape = {
      average,
      planes: samples * channels,
      size,
      outSize,
      kernel,
      stride,
      padding,
    };
    const { output, index } = yield* pooling(x, shape, options);
    const backward: Backward = function* (g, recorder) {
      return yield* poolingBackward(g, index, shape, recorder.options);
    };
    return { output, mask: null, backward };
  }
}

/** Largest value of each window of `[B, C, height, width]`. */
export class MaxPool2d extends Pool {
  constructor(kernel: PerAxis, options?: PoolOptions) {
    super(false, kernel, options);
  }
}

/** Mean of each window of `[B, C, height, width]`, padding counted as zeros. */
export class AvgPool2d extends Pool {
  constructor(kernel: PerAxis, options?: PoolOptions) {
    super(true, kernel, options);
  }
}
