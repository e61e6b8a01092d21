import { join } from 'node:path';
import { videoArchitecture } from '../../lib/attention/video/architectures.ts';
import { resolveConfig, tensorShapes } from '../../lib/attention/video/config.ts';
import { checkpointReader } from '../../lib/attention/video/load.ts';
import { runSync } from '../../lib/checkpoint/steps.ts';
import { openCheckpointSync, Tensor } from '../../lib/index.ts';
import type { ReferenceTensors } from '../../lib/reference/attention/videoEncoder.ts';

export const GOLDEN_ENCODERS = [
  'timesformer_divided',
  'timesformer_joint',
  'timesformer_space',
  'vivit',
  'videoprism',
  'vjepa2',
] as const;

/** A golden checkpoint of test/golden/video. */
export const goldenVideo = (name: string) => join(import.meta.dirname, '../golden/video', name);

/** Frames and results of transformers. */
export function goldenIo(name: string) {
  const io = openCheckpointSync(join(goldenVideo(name), 'io.safetensors'));
  return {
    frames: io.readSync('frames') as Tensor<'float32'>,
    hidden: io.readSync('hidden') as Tensor<'float64'>,
    pooled: io.has('pooled') ? (io.readSync('pooled') as Tensor<'float64'>) : undefined,
  };
}

/** A golden checkpoint's config and tensors, as the reference reads them. */
export function goldenModel(name: string) {
  const c = openCheckpointSync(goldenVideo(name));
  const architecture = videoArchitecture(c);
  const config = resolveConfig(architecture.config);
  const read = checkpointReader(c, architecture, config);
  const tensors: Record<string, Tensor<'float32'>> = {};
  for (const [tensor, dims] of tensorShapes(config)) {
    const t = runSync(read(tensor, dims));
    tensors[tensor] = new Tensor('float32', t.data as Float32Array, dims);
  }
  return { architecture, config, tensors, get: referenceTensors(tensors) };
}

export const referenceTensors =
  (tensors: Readonly<Record<string, Tensor<'float32'>>>): ReferenceTensors =>
  (name) => {
    if (!(name in tensors)) throw new Error(`the reference asked for ${name}`);
    return tensors[name].data;
  };
