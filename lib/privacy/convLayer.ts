import { DTYPE_CODE } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import { optionInteger } from '../op.ts';
import { product, sameDims, type TensorLike } from '../tensor.ts';
import { geometryNumbers, MAX_EXTENT, outputSize, perAxis } from './convGeometry.ts';
import { asBoolean, asMask, featureTensor, type PreparedLayer, values } from './layerArguments.ts';

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
  if (layer.kernel === undefined) throw new HeddleError('ERR_ARGUMENT', 'layer.kernel is required');
  const kernel = perAxis(layer.kernel, axes, 1, 'layer.kernel');
  const stride = perAxis(layer.stride ?? 1, axes, 1, 'layer.stride');
  const padding = perAxis(layer.padding ?? 0, axes, 0, 'layer.padding');
  const dilation = perAxis(layer.dilation ?? 1, axes, 1, 'layer.dilation');
  const bias = asBoolean(layer.bias, undefined);
  const [samples, inChannels, ...size] = x.dims;
  const outSize = size.map((n, i) => {
    const places = outputSize(n, kernel[i], stride[i], padding[i], dilation[i]);
    if (n < 1 || n > MAX_EXTENT || places < 1) {
      throw new HeddleError(
        'ERR_SHAPE',
        `layer.input: size [${size.join(', ')}] is too small for the kernel, or above ${MAX_EXTENT}`,
      );
    }
    return places;
  });
  const outChannels = g.dims[1];
  const expected = [samples, outChannels, ...outSize];
  if (!sameDims(g.dims, expected)) {
    throw new HeddleError(
      'ERR_SHAPE',
      `layer.gradOutputs: expected [${samples}, C_out, ${outSize.join(', ')}], got [${g.dims.join(', ')}]`,
    );
  }
  const mask = asMask(layer.mask, [samples, ...outSize]);
  const groups = optionInteger(layer.groups ?? 1, 1, MAX_EXTENT, 'layer.groups');
  if (inChannels % groups !== 0 || outChannels % groups !== 0) {
    throw new HeddleError(
      'ERR_OPTION',
      `layer.groups must divide the ${inChannels} input and ${outChannels} output channels, got ${groups}`,
    );
  }
  const geometry = geometryNumbers({ size, outSize, kernel, stride, padding, dilation });
  const places = product(outSize);
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
      outputSize: outSize,
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
