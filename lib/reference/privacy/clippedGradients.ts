import { type Gradients, type Layer, zeroGradients } from './layers.ts';
import { perSampleGradient } from './perSampleGradient.ts';

/**
 * Σ_i c_i·g_i for every parameter of a layer, added to `out` where it is given. A sample with factor 0 is not
 * read, so that one with a NaN contributes 0 and not 0·NaN.
 */
export function clippedGradientsReference(
  layer: Layer,
  factors: ArrayLike<number>,
  out: Gradients = zeroGradients(layer),
): Gradients {
  for (let i = 0; i < layer.samples; i++) {
    if (factors[i] === 0) continue;
    for (const [name, gradient] of Object.entries(perSampleGradient(layer, i))) {
      for (let j = 0; j < gradient.length; j++) out[name][j] += factors[i] * gradient[j];
    }
  }
  return out;
}
