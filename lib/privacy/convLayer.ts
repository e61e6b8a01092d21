import { DTYPE_CODE } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import { optionInteger } from '../op.ts';
import type { TensorLike } from '../tensor.ts';
import { asBoolean, asMask, featureTensor, type PreparedLayer, product, values } from './layerArguments.ts';

/** A convolution (cross-correlation, as frameworks have it), channels first. */
export interface ConvLayer {
  kind: 'conv1d' | 'conv2d' | 'conv3d';
  /** `[B, C_in, …]` with one, two or three spatial dimensions. */
  input: TensorLike;
  /** `[B, C_out, …]`. */
  gradOutputs: TensorLike;
  /** Extent of the kernel, one number for all axes or one per axis. */
  kernel: number | readonly number[];
  /** Default 1. */
  stride?: number | readonly number[];
  /** Zeros on either side. Default 0. */
  padding?: number | readonly number[];
  /** Default 1. */
  dilation?: number | readonly number[];
  /** Groups of channels; divides both channel counts. Default 1. */
  groups?: number;
  /** Whether the layer has a bias; no default, as for linear layers. */
  bias: boolean;
  /**
   * uint8 `[B, …]` of output places: 0 marks one of padding, whose gradient is not read. Input that only padded places
   * look at is not read either.
   */
  mask?: TensorLike;
}

export const CONV_KEYS: ReadonlySet<string> = new Set([
  'kind',
  'input',
  'gradOutputs',
  'kernel',
  'stride',
  'padding',
  'dilation',
  'groups',
  'bias',
  'mask',
]);

const MAX_EXTENT = 2 ** 20;

function perAxis(
  value: unknown,
  axes: number,
  min: number,
  fallback: number | undefined,
  name: string,
): number[] {
  const v = value === undefined ? fallback : value;
  if (v === undefined) throw new HeddleError('ERR_ARGUMENT', `${name} is required`);
  const list = Array.isArray(v) ? v : new Array(axes).fill(v);
  if (list.length !== axes) {
    throw new HeddleError('ERR_OPTION', `${name} must be one number or ${axes}, got [${list.join(', ')}]`);
  }
  return list.map((x) => optionInteger(x, min, MAX_EXTENT, name));
}

/** @internal */
export function prepareConv(layer: ConvLayer): PreparedLayer {
  const { kind } = layer;
  const axes = Number(kind[4]);
  const x = featureTensor(layer.input, 'layer.input', axes + 2);
  const g = featureTensor(layer.gradOutputs, 'layer.gradOutputs', axes + 2);
  if (x.dims.length !== axes + 2) {
    throw new HeddleError(
      'ERR_SHAPE',
      `layer.input: expected ${axes + 2} dimensions, got [${x.dims.join(', ')}]`,
    );
  }
  const kernel = perAxis(layer.kernel, axes, 1, undefined, 'layer.kernel');
  const stride = perAxis(layer.stride, axes, 1, 1, 'layer.stride');
  const padding = perAxis(layer.padding, axes, 0, 0, 'layer.padding');
  const dilation = perAxis(layer.dilation, axes, 1, 1, 'layer.dilation');
  const bias = asBoolean(layer.bias, undefined);
  const [samples, inChannels, ...size] = x.dims;
  const outputSize = size.map((n, i) => {
    const places = Math.floor((n + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) / stride[i]) + 1;
    if (n < 1 || n > MAX_EXTENT || places < 1) {
      throw new HeddleError(
        'ERR_SHAPE',
        `layer.input: size [${size.join(', ')}] is too small for the kernel, or above ${MAX_EXTENT}`,
      );
    }
    return places;
  });
  const outChannels = g.dims[1];
  const expected = [samples, outChannels, ...outputSize];
  if (g.dims.length !== expected.length || g.dims.some((d, i) => d !== expected[i])) {
    throw new HeddleError(
      'ERR_SHAPE',
      `layer.gradOutputs: expected [${samples}, C_out, ${outputSize.join(', ')}], got [${g.dims.join(', ')}]`,
    );
  }
  const mask = asMask(layer.mask, [samples, ...outputSize]);
  const groups = optionInteger(layer.groups ?? 1, 1, MAX_EXTENT, 'layer.groups');
  if (inChannels % groups !== 0 || outChannels % groups !== 0) {
    throw new HeddleError(
      'ERR_OPTION',
      `layer.groups must divide the ${inChannels} input and ${outChannels} output channels, got ${groups}`,
    );
  }
  // Axes are padded in front to three: extents of 1, kernel 1, stride 1, padding 0, dilation 1.
  const three = (list: number[], fill: number) => [...new Array(3 - axes).fill(fill), ...list];
  const geometry = Int32Array.of(
    ...three(size, 1),
    ...three(outputSize, 1),
    ...three(kernel, 1),
    ...three(stride, 1),
    ...three(padding, 0),
    ...three(dilation, 1),
  );
  const places = product(outputSize);
  const inputs = (inChannels / groups) * product(kernel);
  return {
    stem: 'conv',
    args: [
      samples,
      inChannels,
      outChannels,
      groups,
      geometry,
      x.data,
      DTYPE_CODE[x.type],
      g.data,
      DTYPE_CODE[g.type],
      mask?.data ?? null,
      bias,
    ],
    samples,
    preferGhost: 2 * places * places <= inputs * (outChannels / groups),
    inputs: mask === null ? [x, g] : [x, g, mask],
    parameters: [
      ['weight', [outChannels, inChannels / groups, ...kernel]],
      ['bias', bias ? [outChannels] : null],
    ],
    reference: () => ({
      kind,
      input: values(x),
      gradOutputs: values(g),
      samples,
      inChannels,
      outChannels,
      size,
      outputSize,
      kernel,
      stride,
      padding,
      dilation,
      groups,
      bias,
      mask: mask?.data,
    }),
  };
}
