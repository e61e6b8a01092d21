import { cpSync, mkdtempSync } from 'node:fs';
import { join } from 'node:path';
import { openCheckpointSync, type Tensor } from '../../lib/index.ts';
import { type TensorBytes, writeSafetensors } from './safetensors.ts';

/** A golden checkpoint of test/golden/moe. */
export const golden = (name: string) => join(import.meta.dirname, '../golden/moe', name);

/** The golden checkpoints of whole MoE layers: architectures, then types that weights are stored in. */
export const goldenLayers = [
  'mixtral',
  'qwen2_moe',
  'qwen3_moe',
  'olmoe',
  'deepseek_v3',
  'gpt_oss',
  'mixtral_bf16',
  'gpt_oss_mxfp4',
];

/** What layer 1 of a golden checkpoint was given, and what transformers made of it in float64. */
export function goldenIo(name: string) {
  const io = openCheckpointSync(join(golden(name), 'io.safetensors'));
  const read = (tensor: string) => io.readSync(tensor);
  const tensors = {
    input: read('input') as Tensor<'float32'>,
    output: read('output_float64').data as Float64Array,
    logits: read('router_logits_float64').data as Float64Array,
    indices: read('indices').data as Int32Array,
    weights: read('weights_float64').data as Float64Array,
  };
  io.close();
  return tensors;
}

/** A copy of a golden checkpoint of one file, whose tensors `edit` may change; returns its directory. */
export function editedCheckpoint(
  scratch: string,
  name: string,
  edit: (tensors: Record<string, TensorBytes>) => void,
): string {
  const directory = mkdtempSync(join(scratch, 'checkpoint-'));
  cpSync(golden(name), directory, { recursive: true });
  const file = join(directory, 'model.safetensors');
  const c = openCheckpointSync(file);
  const tensors: Record<string, TensorBytes> = {};
  for (const [tensor, { dtype, dims }] of c.tensors)
    tensors[tensor] = { dtype, dims, bytes: c.readBytesSync(tensor) };
  c.close();
  edit(tensors);
  writeSafetensors(file, tensors);
  return directory;
}
