import { describe, expect, it } from 'vitest';
import {
  type Activation,
  type ExpertsBackwardOptions,
  expertsBackwardSync,
  expertsForwardSync,
  packExpertsSync,
} from '../../lib/moe/index.ts';
import { Tensor } from '../../lib/tensor.ts';
import { gradientList } from '../cases/moe/expertsBackward.ts';
import type { Shape } from '../cases/moe/expertsForward.ts';
import { type Problem, problem } from '../helpers/experts.ts';

/** ⟨gradOutput, forward⟩ on the reference: its derivative by any input is what the backward returns. */
function loss(p: Problem, options: ExpertsBackwardOptions): number {
  const weights = packExpertsSync(p.sources, { ...options, biases: p.biases, backend: 'reference' });
  const y = expertsForwardSync(p.x, p.routing, weights).data as Float32Array;
  const g = p.gradOutput.data as Float32Array;
  return y.reduce((sum, v, i) => sum + v * g[i], 0);
}

/** Central differences of {@link loss} by every element of `data`. */
function differences(p: Problem, options: ExpertsBackwardOptions, data: Float32Array): number[] {
  const step = 2 ** -9;
  return Array.from(data, (value, i) => {
    data[i] = value + step;
    const above = data[i];
    const high = loss(p, options);
    data[i] = value - step;
    const low = loss(p, options);
    const slope = (high - low) / (above - data[i]);
    data[i] = value;
    return slope;
  });
}

describe('the reference is the derivative of the forward reference', () => {
  const tiny: Shape = { name: '', tokens: 4, experts: 3, k: 2, hidden: 4, intermediate: 3 };
  const gated: [string, Activation, Partial<Shape> & { gateUpBiases?: boolean }, ExpertsBackwardOptions?][] =
    [
      ['SwiGLU', 'silu', {}],
      ['SwiGLU, biases', 'silu', { biases: true }],
      ['SwiGLU, stacked', 'silu', { layout: 'stacked' }],
      ['SwiGLU, concatenated, biases', 'silu', { layout: 'concatenated', biases: true }],
      ['SwiGLU, biases together', 'silu', { layout: 'concatenated', biases: true, gateUpBiases: true }],
      ['SwiGLU, ungated', 'silu', { layout: 'ungated' }],
      ['masked routes', 'silu', { masked: true, biases: true }],
      ['gpt-oss', 'clamped-swiglu', { layout: 'gpt-oss', biases: true }],
      ['clamps', 'clamped-swiglu', { layout: 'gpt-oss', biases: true }, { alpha: 0.9, limit: 0.5 }],
      ['clamps, ungated', 'clamped-swiglu', { layout: 'ungated' }, { limit: 0.5 }],
      ['GeGLU tanh', 'gelu-tanh', { biases: true }],
      ['GeGLU erf', 'gelu', { biases: true }],
      ['GELU tanh, ungated', 'gelu-tanh', { layout: 'ungated' }],
      ['GELU erf, ungated, biases', 'gelu', { layout: 'ungated', biases: true }],
      ['ReLU squared', 'relu-squared', {}],
      ['ReLU squared, ungated', 'relu-squared', { layout: 'ungated' }],
      ['ReLU', 'relu', { biases: true }],
      ['ReLU, ungated', 'relu', { layout: 'ungated' }],
      ['identity', 'identity', {}],
      ['identity, ungated', 'identity', { layout: 'ungated', biases: true }],
    ];
  it.each(gated)('%s', (_, activation, shape, more) => {
    const p = problem({ ...tiny, ...shape }, 7);
    if (shape.gateUpBiases) p.biases = { gateUp: Tensor.zeros('float32', [3, 6]), down: p.biases?.down };
    const options = { activation, ...more };
    const gradients = expertsBackwardSync(p.gradOutput, p.x, p.routing, p.sources, {
      ...options,
      biases: p.biases,
      backend: 'reference',
    });
    const inputs = gradientList({
      ...p.sources,
      x: p.x,
      weights: p.routing.weights,
      biases: p.biases,
    } as never);
    const outputs = gradientList(gradients);
    expect(outputs.length).toBe(inputs.length);
    for (const [i, input] of inputs.entries()) {
      expect(outputs[i].dims).toEqual(input.dims);
      const expected = differences(p, options, input.data as Float32Array);
      const actual = outputs[i].data as Float32Array;
      const error = Math.hypot(...expected.map((v, j) => v - actual[j]));
      if (i === 0) expect(Math.hypot(...expected)).toBeGreaterThan(0.1);
      expect(error).toBeLessThan(1e-3 * Math.hypot(...expected) + 1e-5);
    }
  });
});
