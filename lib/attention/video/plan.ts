import type { ResolvedConfig } from './config.ts';
import { axisView, type TokenRows, type View, wholeView } from './rows.ts';
import { attentionScratch } from './steps.ts';

/** The views that the steps of a config attend within. */
export interface Views {
  joint: View;
  time?: View;
  space?: View;
}

/** Views of the first stage's rows. */
export function viewsOf(c: ResolvedConfig, rows: TokenRows): Views {
  const joint = wholeView(rows);
  switch (c.attention) {
    case 'joint':
      return { joint };
    case 'space-only':
    case 'factorized-encoder':
      return { joint, space: joint };
    case 'divided-space-time':
      return { joint, time: axisView(rows, 'time'), space: axisView(rows, 'space', true) };
    default:
      return { joint, time: axisView(rows, 'time'), space: axisView(rows, 'space') };
  }
}

/** What a forward takes: memory beside the weights, the frames and the caller's own. */
export interface ForwardPlan {
  /** Tokens of the residual stream, class tokens included. */
  tokens: number;
  /** Bytes of the residual stream, which becomes `hidden`. */
  streamBytes: number;
  /** Bytes of the buffers that every step reuses. */
  scratchBytes: number;
  /** The sum: the most that a forward holds at any time. */
  bytes: number;
  /** Multiplications and additions of all products. */
  flops: number;
}

/** Floats of the second stage of a factorized encoder that pools frames. */
function pooledRows(c: ResolvedConfig, rows: TokenRows): number {
  if (c.attention !== 'factorized-encoder' || c.framePooling === 'none') return 0;
  const clips = rows.clip.length === 0 ? 0 : rows.clip[rows.clip.length - 1] + 1;
  return clips + rows.offsets.length - 1;
}

/** Sum of squares of the sequences' lengths. */
function pairs(v: View): number {
  let sum = 0;
  for (let g = 0; g + 1 < v.offsets.length; g++) sum += (v.offsets[g + 1] - v.offsets[g]) ** 2;
  return sum;
}

/** Counts operations of the layers over some rows. */
function layerFlops(c: ResolvedConfig, views: Views, tokens: number, merged: boolean): number {
  const { hiddenSize: d, intermediateSize: f } = c;
  const projections = (rows: number, matrices = 4) => 2 * matrices * rows * d * d;
  const scores = (v: View) => 4 * pairs(v) * d;
  const mlp = 4 * tokens * d * f;
  const { joint, time, space } = views;
  switch (c.attention) {
    case 'factorized-self-attention':
      return 2 * projections(tokens) + scores(time as View) + scores(space as View) + mlp;
    case 'factorized-dot-product':
      return projections(tokens) + (scores(time as View) + scores(space as View)) / 2 + mlp;
    case 'divided-space-time': {
      const [t, s] = [time as View, space as View];
      const rows = projections(t.order.length, merged ? 4 : 5) + projections(s.order.length);
      return rows + scores(t) + scores(s) + mlp;
    }
    default:
      return projections(tokens) + scores(joint) + mlp;
  }
}

/**
 * Tokens that are worked on at a time where the caller does not say. Four rows of scratch per token of a block are a
 * quarter of a long input's stream, so that masking tokens saves of both; more tokens than this gain 1 to 3 %.
 */
export function defaultBlockTokens(tokens: number): number {
  return tokens <= 4096 ? 4096 : Math.min(Math.max(Math.ceil(tokens / 16), 1024), 4096);
}

/**
 * float32 numbers of scratch, and operations, of a forward over these rows.
 * @param merged whether TimeSformer's two projections of attention over time are one product, as in float32
 */
export function planForward(
  c: ResolvedConfig,
  rows: TokenRows,
  views: Views,
  blockTokens: number,
  merged = false,
): ForwardPlan {
  const d = c.hiddenSize;
  const tokens = rows.clip.length;
  const k = c.channels * c.tubelet[0] * c.tubelet[1] * c.tubelet[2];
  let scratch = 0;
  const attends = (v: View | undefined) => {
    if (v) scratch = Math.max(scratch, attentionScratch(c, v, blockTokens));
  };
  if (c.layers > 0) for (const v of [views.time, views.space ?? views.joint]) attends(v);
  let patches = 0;
  for (const t of rows.t) if (t >= 0) patches++;
  let flops = 2 * patches * k * d + c.layers * layerFlops(c, views, tokens, merged);
  let floats = tokens * d;
  if (c.attention === 'factorized-encoder') {
    const pooled = pooledRows(c, rows);
    const second = c.framePooling === 'none' ? tokens : pooled;
    const time = c.framePooling === 'none' ? axisView(rows, 'time') : pooledView(rows);
    if (c.timeLayers > 0) attends(time);
    floats += pooled * d;
    flops += c.timeLayers * layerFlops(c, { joint: time }, second, merged);
  }
  // ViViT 4 collects the update of attention over time before the stream changes.
  if (c.attention === 'factorized-dot-product' && c.layers > 0) scratch += tokens * d;
  return {
    tokens,
    streamBytes: floats * 4,
    scratchBytes: scratch * 4,
    bytes: (floats + scratch) * 4,
    flops,
  };
}

/** One sequence per clip: its class token and one row per frame that keeps a token. */
export function pooledView(rows: TokenRows): View {
  const offsets = [0];
  const frames = rows.offsets.length - 1;
  const clips = frames === 0 ? 0 : rows.clip[rows.clip.length - 1] + 1;
  let frame = 0;
  for (let b = 0; b < clips; b++) {
    const first = frame;
    while (frame < frames && rows.clip[rows.offsets[frame]] === b) frame++;
    offsets.push(offsets[b] + 1 + frame - first);
  }
  const order = Int32Array.from({ length: offsets[clips] }, (_, i) => i);
  return { order, offsets: Int32Array.from(offsets) };
}
