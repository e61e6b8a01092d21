import { readFileSync, writeFileSync } from 'node:fs';
import { maskTokens } from '../lib/attention/maskTokens.ts';
import { resolveConfig, type VideoEncoderConfig } from '../lib/attention/video/config.ts';
import { VideoEncoder } from '../lib/attention/video/index.ts';
import { defaultBlockTokens, planForward, viewsOf } from '../lib/attention/video/plan.ts';
import { layOutRows } from '../lib/attention/video/rows.ts';
import { Tensor } from '../lib/tensor.ts';
import { randomTensors } from '../test/cases/attention/videoEncoder.ts';
import { Random } from '../test/cases/random.ts';

/** One way to make a long video cheaper. */
export interface StudyVariant {
  name: string;
  attention: 'joint' | 'factorized-encoder' | 'factorized-self-attention' | 'factorized-dot-product';
  /** Frames, rows and columns of a tubelet; 14 pixels give 256 patches per frame of 224 pixels. */
  tubelet?: readonly [number, number, number];
  mask?: { ratio: number; kind: 'random' | 'tube' };
  /** Layers, and of how many the activations are kept: adaptation of the last ones. Default 1 and 0. */
  layers?: number;
  lastLayers?: number;
}

const TUBELET = [1, 14, 14] as const;

export const STUDY_VARIANTS: readonly StudyVariant[] = [
  { name: 'joint', attention: 'joint' },
  { name: 'ViViT 2', attention: 'factorized-encoder' },
  { name: 'ViViT 3', attention: 'factorized-self-attention' },
  { name: 'ViViT 4', attention: 'factorized-dot-product' },
  ...[0.25, 0.5, 0.75].map((ratio) => ({
    name: `joint, ${100 * ratio} % masked`,
    attention: 'joint' as const,
    mask: { ratio, kind: 'random' as const },
  })),
  ...[0.25, 0.5, 0.75].map((ratio) => ({
    name: `ViViT 3, ${100 * ratio} % tube masked`,
    attention: 'factorized-self-attention' as const,
    mask: { ratio, kind: 'tube' as const },
  })),
  { name: 'joint, tubelets of 2 frames', attention: 'joint', tubelet: [2, 14, 14] },
  { name: 'joint, tubelets of 4 frames', attention: 'joint', tubelet: [4, 14, 14] },
  { name: 'joint, patches of 28', attention: 'joint', tubelet: [1, 28, 28] },
];

/** Adaptation keeps activations: eight layers of ViViT 3, all of them or the last four tuned. */
export const ADAPTATION_VARIANTS: readonly StudyVariant[] = [0, 4, 8].map((lastLayers) => ({
  name: `ViViT 3 x 8, ${lastLayers === 0 ? 'no layer' : lastLayers === 8 ? 'every layer' : 'last 4'} tuned`,
  attention: 'factorized-self-attention' as const,
  layers: 8,
  lastLayers,
}));

/** A layer of base size over 224 x 224 pixels. */
export function studyConfig(v: StudyVariant, frames: number): VideoEncoderConfig {
  const encoder = v.attention === 'factorized-encoder';
  return {
    attention: v.attention,
    imageSize: 224,
    frames,
    tubelet: v.tubelet ?? TUBELET,
    hiddenSize: 768,
    heads: 12,
    intermediateSize: 3072,
    layers: v.layers ?? 1,
    positions: encoder ? 'space-time' : 'none',
    ...(encoder ? { timeLayers: 1 } : {}),
  };
}

function maskOf(v: StudyVariant, grid: readonly [number, number, number]) {
  const [frames, height, width] = grid;
  return v.mask && maskTokens({ ...v.mask, frames, patches: height * width, seed: 1 });
}

/** What the arithmetic says of a variant's layers, without the patch embedding. */
export function predictStudy(
  v: StudyVariant,
  frames: number,
): { tokens: number; flops: number; bytes: number } {
  const c = resolveConfig(studyConfig(v, frames));
  const [time, height, width] = c.grid;
  const mask = maskOf(v, c.grid);
  const rows = layOutRows(c, 1, time, height * width, mask && [mask.indices]);
  const plan = planForward(c, rows, viewsOf(c, rows), defaultBlockTokens(rows.clip.length));
  const patches = mask ? mask.indices.length : time * height * width;
  const embedding = 2 * patches * c.channels * c.tubelet[0] * c.tubelet[1] * c.tubelet[2] * c.hiddenSize;
  return {
    tokens: plan.tokens,
    flops: plan.flops - embedding,
    bytes: plan.bytes + keptBytes(v, plan.tokens),
  };
}

/** Bytes of the activations that the last layers keep: per token, ViViT 3 keeps 17 widths and two rows of log-sums. */
function keptBytes(v: StudyVariant, tokens: number): number {
  const [d, f, heads] = [768, 3072, 12];
  return (v.lastLayers ?? 0) * tokens * 4 * (2 * (5 * d + heads) + d + f);
}

export interface StudyMeasurement {
  /** Of the layers, without the patch embedding. */
  seconds: number;
  /** Growth of the resident set during the forward, at its peak. */
  bytes: number;
}

/** Peak resident bytes since `resetPeak`, or of the whole process where the system cannot say. */
function peakBytes(): number {
  try {
    const line = /VmHWM:\s+(\d+) kB/.exec(readFileSync('/proc/self/status', 'utf8'));
    if (line) return Number(line[1]) * 1024;
  } catch {
    // Not Linux.
  }
  return process.resourceUsage().maxRSS * 1024;
}

function resetPeak(): void {
  try {
    writeFileSync('/proc/self/clear_refs', '5');
  } catch {
    // The peak then counts what came before, too.
  }
}

/** Runs a variant once in this process; meant for a child that does nothing else. */
export async function measureStudy(
  v: StudyVariant,
  frames: number,
  threads: number,
): Promise<StudyMeasurement> {
  const config = studyConfig(v, frames);
  const encoder = await VideoEncoder.create(config, randomTensors(config, new Random(1)), { threads });
  const pixels = new Uint8Array(frames * 3 * 224 * 224);
  for (let i = 0; i < pixels.length; i++) pixels[i] = (i * 2654435761) >>> 24;
  const input = new Tensor('uint8', pixels, [1, frames, 3, 224, 224]);
  const mask = maskOf(v, encoder.config.grid);
  // Threads, their buffers and compiled code: what the first forward of a process takes and no later one.
  const [time, height, width] = encoder.config.grid;
  const patches = height * width;
  const few = maskTokens({
    ratio: 1 - 256 / (time * patches),
    frames: time,
    patches,
    kind: 'random',
    seed: 2,
  });
  await encoder.forward(input, { mask: few });
  for (let i = 0; i < 2; i++) {
    // buffers are freed beside this thread
    (globalThis as { gc?: () => void }).gc?.();
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  const before = process.memoryUsage.rss();
  resetPeak();
  let start = performance.now();
  const output = await encoder.forward(input, {
    mask,
    lastLayers: v.lastLayers,
    onProgress: ({ stage }) => {
      if (stage === 'embedding') start = performance.now();
    },
  });
  const seconds = (performance.now() - start) / 1000;
  if (!Number.isFinite(output.data[0])) throw new Error(`${v.name}: the output is not finite`);
  return { seconds, bytes: Math.max(0, peakBytes() - before) };
}
