import type { BackendName } from '../backend.ts';
import * as moe from '../moe/index.ts';
import type { AsyncOpOptions } from '../op.ts';
import type { Tensor, TensorLike } from '../tensor.ts';

/** What the commands need of MoELayer. */
export interface Layer {
  readonly hiddenSize: number;
  forward(x: TensorLike, options?: AsyncOpOptions): Promise<Tensor>;
  dispose(): void;
}

export interface LayerOptions {
  layer: number;
  type?: string;
  backend?: BackendName;
}

export interface LayerClass {
  load(directory: string, options: LayerOptions): Promise<Layer>;
}

/** `heddle/moe`'s MoELayer, or `null` while this version has none. */
export function moeLayerClass(): LayerClass | null {
  return (moe as { MoELayer?: LayerClass }).MoELayer ?? null;
}
