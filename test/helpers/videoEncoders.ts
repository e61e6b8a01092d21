import { join } from 'node:path';
import { videoArchitecture } from '../../lib/attention/video/architectures.ts';
import { type ResolvedConfig, resolveConfig, tensorShapes } from '../../lib/attention/video/config.ts';
import type { VideoEncoderConfig } from '../../lib/attention/video/index.ts';
import { checkpointReader } from '../../lib/attention/video/load.ts';
import { openCheckpointSync, Tensor } from '../../lib/index.ts';
import type { ReferenceTensors } from '../../lib/reference/attention/videoEncoder.ts';
import { Random } from '../cases/random.ts';

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
export async function goldenModel(name: string) {
  const c = openCheckpointSync(goldenVideo(name));
  const architecture = videoArchitecture(c);
  const config = resolveConfig(architecture.config);
  const read = checkpointReader(c, architecture, config);
  const tensors: Record<string, Tensor<'float32'>> = {};
  for (const [tensor, dims] of tensorShapes(config)) {
    const t = await read(tensor, dims);
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

/** Random tensors of a config, large enough that every part moves the output. */
export function randomTensors(config: VideoEncoderConfig, seed: number): Record<string, Tensor<'float32'>> {
  const resolved: ResolvedConfig = resolveConfig(config);
  const random = new Random(seed);
  const tensors: Record<string, Tensor<'float32'>> = {};
  for (const [name, dims] of tensorShapes(resolved)) {
    const size = dims.reduce((a, b) => a * b, 1);
    const isNorm = /[nN]orm\.weight$/.test(name);
    const scale = dims.length > 1 && name.endsWith('weight') ? 1.5 / Math.sqrt(size / dims[0]) : 0.5;
    const centre = isNorm && !resolved.unitOffset ? 1 : 0;
    const data = random.normals(size).map((v) => centre + v * (isNorm ? 0.3 : scale));
    tensors[name] = new Tensor('float32', data, dims);
  }
  return tensors;
}
