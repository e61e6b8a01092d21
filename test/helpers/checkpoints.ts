import { cpSync, mkdtempSync } from 'node:fs';
import { join } from 'node:path';
import { openCheckpointSync } from '../../lib/index.ts';
import { type TensorBytes, writeSafetensors } from './safetensors.ts';

/** A golden checkpoint of test/golden/moe. */
export const golden = (name: string) => join(import.meta.dirname, '../golden/moe', name);

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
