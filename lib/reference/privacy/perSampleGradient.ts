import { product } from '../../tensor.ts';
import {
  type ConvLayer,
  coordinates,
  type Gradients,
  type Layer,
  type LinearLayer,
  positionsOf,
  rowOf,
  zeroGradients,
} from './layers.ts';

/** into[o, j] += g_o·a_j: one position's part of a weight gradient. */
function addOuter(
  into: Float64Array,
  offset: number,
  g: ArrayLike<number>,
  a: ArrayLike<number>,
  scale = 1,
): void {
  for (let o = 0; o < g.length; o++) {
    for (let j = 0; j < a.length; j++) into[offset + o * a.length + j] += scale * g[o] * a[j];
  }
}

function addRow(into: Float64Array, offset: number, g: ArrayLike<number>): void {
  for (let o = 0; o < g.length; o++) into[offset + o] += g[o];
}

/** The gradient of one sample with respect to every parameter of a layer: the definition of all the rest. */
export function perSampleGradient(layer: Layer, sample: number): Gradients {
  const out = zeroGradients(layer);
  switch (layer.kind) {
    // ∂W = Σ_t G_t A_tᵀ, ∂b = Σ_t G_t
    case 'linear': {
      const { activations, gradOutputs, positions, inputs, outputs } = layer;
      for (const t of positionsOf(layer, sample)) {
        const row = sample * positions + t;
        const g = rowOf(gradOutputs, row, outputs);
        addOuter(out.weight, 0, g, rowOf(activations, row, inputs));
        if (layer.bias) addRow(out.bias, 0, g);
      }
      return out;
    }
    // ∂W[v] = Σ_{t: a_t = v} G_t
    case 'embedding': {
      const { indices, gradOutputs, positions, outputs, paddingIndex } = layer;
      for (const t of positionsOf(layer, sample)) {
        const row = sample * positions + t;
        const v = indices[row];
        if (v !== paddingIndex) addRow(out.weight, v * outputs, rowOf(gradOutputs, row, outputs));
      }
      return out;
    }
    // ∂γ = Σ_t x̂_t∘G_t, ∂β = Σ_t G_t
    case 'layer-norm':
    case 'rms-norm': {
      const { normalized, gradOutputs, positions, outputs } = layer;
      for (const t of positionsOf(layer, sample)) {
        const row = sample * positions + t;
        const g = rowOf(gradOutputs, row, outputs);
        const x = rowOf(normalized, row, outputs);
        addRow(
          out.weight,
          0,
          g.map((value, j) => value * x[j]),
        );
        if (layer.bias) addRow(out.bias, 0, g);
      }
      return out;
    }
    // ∂γ_c = Σ_s x̂[c, s]·G[c, s], ∂β_c = Σ_s G[c, s]
    case 'group-norm': {
      const { normalized, gradOutputs, channels, spatial } = layer;
      for (let c = 0; c < channels; c++) {
        const g = rowOf(gradOutputs, sample * channels + c, spatial);
        const x = rowOf(normalized, sample * channels + c, spatial);
        for (const s of positionsOf({ positions: spatial, mask: layer.mask }, sample)) {
          out.weight[c] += x[s] * g[s];
          if (layer.bias) out.bias[c] += g[s];
        }
      }
      return out;
    }
    // embedding's and head's gradients in one matrix: ∂W = Σ_t e_{a_t} Gᵉ_tᵀ + Σ_s Gˡ_s h_sᵀ
    case 'tied-embedding': {
      const { indices, gradEmbeddings, hidden, gradLogits, positions, width, numEmbeddings } = layer;
      for (const t of positionsOf(layer, sample)) {
        const row = sample * positions + t;
        const v = indices[row];
        if (v !== layer.paddingIndex) addRow(out.weight, v * width, rowOf(gradEmbeddings, row, width));
        addOuter(out.weight, 0, rowOf(gradLogits, row, numEmbeddings), rowOf(hidden, row, width));
      }
      return out;
    }
    // With u_t = A·x_t: ∂B = s Σ_t G_t u_tᵀ, ∂A = s Σ_t (BᵀG_t) x_tᵀ
    case 'lora': {
      const { activations, gradOutputs, positions, inputs, outputs, scale } = layer;
      for (const t of positionsOf(layer, sample)) {
        const row = sample * positions + t;
        const x = rowOf(activations, row, inputs);
        const g = rowOf(gradOutputs, row, outputs);
        addOuter(out.b, 0, g, adapterInput(layer, x), scale);
        addOuter(out.a, 0, adapterGradient(layer, g), x, scale);
      }
      return out;
    }
    // ∂W[e] = Σ_{n: sample, expert e} G_n A_nᵀ
    case 'experts': {
      const { activations, gradOutputs, sampleOf, expertOf, rows, inputs, outputs } = layer;
      for (let n = 0; n < rows; n++) {
        const e = expertOf[n];
        if (sampleOf[n] !== sample || e < 0 || layer.mask?.[n] === 0) continue;
        const g = rowOf(gradOutputs, n, outputs);
        addOuter(out.weight, e * outputs * inputs, g, rowOf(activations, n, inputs));
        if (layer.bias) addRow(out.bias, e * outputs, g);
      }
      return out;
    }
    // Per group of channels a linear layer on the unfolded input: T = output places, d = C_in/groups·taps.
    default: {
      const inputs = layer.inChannels / layer.groups;
      const perGroup = (layer.outChannels / layer.groups) * inputs * product(layer.kernel);
      for (let group = 0; group < layer.groups; group++) {
        const part = perSampleGradient(unfold(layer, group), sample);
        out.weight.set(part.weight, group * perGroup);
        if (layer.bias) out.bias.set(part.bias, (group * layer.outChannels) / layer.groups);
      }
      return out;
    }
  }
}

/** u = A·x, what the adapter's second matrix reads. */
export function adapterInput(layer: { a: ArrayLike<number>; rank: number }, x: Float64Array): Float64Array {
  return Float64Array.from({ length: layer.rank }, (_, r) =>
    x.reduce((sum, value, j) => sum + layer.a[r * x.length + j] * value, 0),
  );
}

/** Bᵀ·g, what comes back through the adapter's second matrix. */
export function adapterGradient(
  layer: { b: ArrayLike<number>; rank: number },
  g: Float64Array,
): Float64Array {
  return Float64Array.from({ length: layer.rank }, (_, r) =>
    g.reduce((sum, value, o) => sum + layer.b[o * layer.rank + r] * value, 0),
  );
}

/**
 * One group of a convolution as a linear layer: the row of an output place holds the inputs under the kernel,
 * [inChannels/groups, ...kernel], with zeros outside of the input.
 */
export function unfold(layer: ConvLayer, group: number): LinearLayer {
  const { samples, size, outputSize, kernel, stride, padding, dilation } = layer;
  const channels = layer.inChannels / layer.groups;
  const outputs = layer.outChannels / layer.groups;
  const positions = product(outputSize);
  const plane = product(size);
  const activations: number[] = [];
  const gradOutputs: number[] = [];
  for (let sample = 0; sample < samples; sample++) {
    let t = 0;
    for (const place of coordinates(outputSize)) {
      for (let c = 0; c < channels; c++) {
        const channel = sample * layer.inChannels + group * channels + c;
        for (const tap of coordinates(kernel)) {
          let inside = true;
          let at = 0;
          for (let axis = 0; axis < size.length; axis++) {
            const x = place[axis] * stride[axis] - padding[axis] + tap[axis] * dilation[axis];
            if (x < 0 || x >= size[axis]) inside = false;
            at = at * size[axis] + x;
          }
          activations.push(inside ? layer.input[channel * plane + at] : 0);
        }
      }
      for (let o = 0; o < outputs; o++) {
        const channel = sample * layer.outChannels + group * outputs + o;
        gradOutputs.push(layer.gradOutputs[channel * positions + t]);
      }
      t++;
    }
  }
  const inputs = channels * product(kernel);
  const { bias, mask } = layer;
  return { kind: 'linear', activations, gradOutputs, samples, positions, inputs, outputs, bias, mask };
}
