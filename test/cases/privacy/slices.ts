import type { ExpertsLayer } from '../../../lib/privacy/expertsLayer.ts';
import type { PrivateLayer } from '../../../lib/privacy/layer.ts';
import type { LoraLayer } from '../../../lib/privacy/loraLayer.ts';
import { Tensor } from '../../../lib/tensor.ts';

export type AnyLayer = PrivateLayer | LoraLayer;

/** Tensors without a sample axis. */
const PARAMETERS = new Set(['a', 'b']);

/** A layer's tensors that have a row, or a block of rows, for each sample. */
export function sampleTensors(layer: AnyLayer): [string, Tensor][] {
  return Object.entries(layer).filter(([name, t]) => t instanceof Tensor && !PARAMETERS.has(name));
}

/** Rows of one sample of a mixture of experts. */
export function expertRows(layer: ExpertsLayer, sample: number): number[] {
  const ids = Array.from(layer.sampleIds.data as Int32Array, Number);
  return ids.flatMap((id, row) => (id === sample ? [row] : []));
}

/** The layer with one sample alone. */
export function oneSample(layer: AnyLayer, sample: number): AnyLayer {
  const out: Record<string, unknown> = { ...layer };
  const rows = layer.kind === 'experts' ? expertRows(layer, sample) : [sample];
  for (const [name, t] of sampleTensors(layer)) {
    const width = t.size / t.dims[0];
    const data = t.data.slice(0, rows.length * width) as Float32Array;
    rows.forEach((row, i) => {
      data.set(t.data.slice(row * width, (row + 1) * width) as Float32Array, i * width);
    });
    if (name === 'sampleIds') data.fill(0);
    out[name] = new Tensor(t.type, data as never, [rows.length, ...t.dims.slice(1)]);
  }
  if (layer.kind === 'experts') out['samples'] = 1;
  return out as unknown as AnyLayer;
}

/** Columns `from` … `to` − 1 of the last axis. */
export function columns(t: Tensor, count: number): Tensor {
  const width = t.dims[t.dims.length - 1];
  const rows = t.size / width;
  const data = t.data.slice(0, rows * count) as Float32Array;
  for (let r = 0; r < rows; r++) {
    data.set(t.data.slice(r * width, r * width + count) as Float32Array, r * count);
  }
  return new Tensor(t.type, data as never, [...t.dims.slice(0, -1), count]);
}

/**
 * The layer with `count` of its outputs (of a tied embedding: features), and the same part of its gradients; null where
 * the whole layer is small enough for the reference.
 */
export function fewOutputs(
  layer: AnyLayer,
  count: number,
): { layer: AnyLayer; of(gradients: Tensor[]): Tensor[]; fraction: number } | null {
  if (layer.kind === 'linear' || layer.kind === 'experts') {
    const g = layer.gradOutputs as Tensor;
    const outputs = g.dims[g.dims.length - 1];
    const experts = layer.kind === 'experts' ? layer.numExperts : 1;
    return {
      layer: { ...layer, gradOutputs: columns(g, count) },
      fraction: count / outputs,
      of: (gradients) =>
        gradients.map((t) => {
          const width = t.size / experts / outputs;
          const dims = [...t.dims];
          dims[layer.kind === 'experts' ? 1 : 0] = count;
          const flat = columns(t.reshape([experts, outputs * width]), count * width);
          return flat.reshape(dims);
        }),
    };
  }
  if (layer.kind === 'tied-embedding') {
    const h = layer.hidden as Tensor;
    return {
      layer: {
        ...layer,
        hidden: columns(h, count),
        gradEmbeddings: columns(layer.gradEmbeddings as Tensor, count),
      },
      fraction: count / h.dims[h.dims.length - 1],
      of: (gradients) => gradients.map((t) => columns(t, count)),
    };
  }
  return null;
}
