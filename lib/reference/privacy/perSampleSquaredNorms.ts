import { dot } from '../gemm/linear.ts';
import { type Layer, type LinearLayer, positionsOf, rowOf } from './layers.ts';
import { adapterGradient, adapterInput, perSampleGradient, unfold } from './perSampleGradient.ts';

/** How a norm is computed: from the gradient itself, or from Gram products of activations and gradients. */
export type NormMethod = 'ghost' | 'instantiate';

/**
 * ‖g_i‖² of every sample's gradient of one layer, all parameters together. A sample with a NaN or an infinity
 * in what it reads gets a norm that is not finite, which is how it is reported.
 */
export function perSampleSquaredNormsReference(layer: Layer, method: NormMethod): Float64Array {
  return Float64Array.from({ length: layer.samples }, (_, i) =>
    method === 'ghost' ? ghostSquaredNorm(layer, i) : instantiatedSquaredNorm(layer, i),
  );
}

function instantiatedSquaredNorm(layer: Layer, sample: number): number {
  let sum = 0;
  for (const gradient of Object.values(perSampleGradient(layer, sample))) sum += dot(gradient, gradient);
  return sum;
}

/** Gram sums are sums of squares: what rounding made negative is 0 (and NaN stays NaN). */
function clampGram(sum: number): number {
  return Math.max(0, sum);
}

function ghostSquaredNorm(layer: Layer, sample: number): number {
  switch (layer.kind) {
    case 'linear':
      return ghostLinear(layer, sample);
    // Σ_{t,s} 1[a_t = a_s]·⟨G_t, G_s⟩
    case 'embedding': {
      const { indices, gradOutputs, positions, outputs, paddingIndex } = layer;
      const read = positionsOf(layer, sample)
        .map((t) => sample * positions + t)
        .filter((row) => indices[row] !== paddingIndex);
      let sum = 0;
      for (const t of read) {
        for (const s of read) {
          if (indices[t] === indices[s])
            sum += dot(rowOf(gradOutputs, t, outputs), rowOf(gradOutputs, s, outputs));
        }
      }
      return clampGram(sum);
    }
    // n_emb² + n_head² + 2 Σ_{t,s} Gˡ_s[a_t]·⟨Gᵉ_t, h_s⟩
    case 'tied-embedding': {
      const { indices, gradEmbeddings, hidden, gradLogits, positions, width, numEmbeddings } = layer;
      const embedding = ghostSquaredNorm(
        { ...layer, kind: 'embedding', gradOutputs: gradEmbeddings, outputs: width },
        sample,
      );
      const head = ghostLinear(
        {
          ...layer,
          kind: 'linear',
          activations: hidden,
          gradOutputs: gradLogits,
          inputs: width,
          outputs: numEmbeddings,
          bias: false,
        },
        sample,
      );
      const read = positionsOf(layer, sample).map((t) => sample * positions + t);
      let cross = 0;
      for (const t of read) {
        if (indices[t] === layer.paddingIndex) continue;
        for (const s of read) {
          cross +=
            gradLogits[s * numEmbeddings + indices[t]] *
            dot(rowOf(gradEmbeddings, t, width), rowOf(hidden, s, width));
        }
      }
      return clampGram(embedding + head + 2 * cross);
    }
    // Two linear layers: B reads A·x_t and gets s·G_t; A reads x_t and gets s·BᵀG_t.
    case 'lora': {
      const { activations, gradOutputs, positions, inputs, outputs, rank, scale } = layer;
      const all = Array.from({ length: layer.samples * positions }, (_, row) => row);
      const lowered = all.flatMap((row) => [...adapterInput(layer, rowOf(activations, row, inputs))]);
      const returned = all.flatMap((row) => [...adapterGradient(layer, rowOf(gradOutputs, row, outputs))]);
      const common = {
        kind: 'linear',
        samples: layer.samples,
        positions,
        mask: layer.mask,
        bias: false,
      } as const;
      const up = { ...common, activations: lowered, gradOutputs, inputs: rank, outputs };
      const down = { ...common, activations, gradOutputs: returned, inputs, outputs: rank };
      return scale * scale * (ghostLinear(up, sample) + ghostLinear(down, sample));
    }
    // Σ_e of the linear formula over the rows that the sample sent to expert e
    case 'experts': {
      const { activations, gradOutputs, sampleOf, expertOf, inputs, outputs } = layer;
      let sum = 0;
      for (let n = 0; n < layer.rows; n++) {
        for (let m = 0; m < layer.rows; m++) {
          if (sampleOf[n] !== sample || sampleOf[m] !== sample) continue;
          if (layer.mask?.[n] === 0 || layer.mask?.[m] === 0) continue;
          if (expertOf[n] < 0 || expertOf[n] !== expertOf[m]) continue;
          const gram = dot(rowOf(activations, n, inputs), rowOf(activations, m, inputs));
          sum +=
            (gram + (layer.bias ? 1 : 0)) *
            dot(rowOf(gradOutputs, n, outputs), rowOf(gradOutputs, m, outputs));
        }
      }
      return clampGram(sum);
    }
    case 'conv1d':
    case 'conv2d':
    case 'conv3d': {
      let sum = 0;
      for (let group = 0; group < layer.groups; group++) sum += ghostLinear(unfold(layer, group), sample);
      return sum;
    }
    // Their gradients are as short as one row: there is nothing to save.
    case 'layer-norm':
    case 'rms-norm':
    case 'group-norm':
      return instantiatedSquaredNorm(layer, sample);
  }
}

/** Σ_{t,s} (⟨A_t, A_s⟩ + 1[bias])·⟨G_t, G_s⟩ */
function ghostLinear(layer: LinearLayer, sample: number): number {
  const { activations, gradOutputs, positions, inputs, outputs } = layer;
  const read = positionsOf(layer, sample).map((t) => sample * positions + t);
  let sum = 0;
  for (const t of read) {
    for (const s of read) {
      const gram = dot(rowOf(activations, t, inputs), rowOf(activations, s, inputs));
      sum +=
        (gram + (layer.bias ? 1 : 0)) * dot(rowOf(gradOutputs, t, outputs), rowOf(gradOutputs, s, outputs));
    }
  }
  return clampGram(sum);
}
