import type { ResolvedConfig } from './config.ts';

/** Where the rows of the residual stream are in the video; a class token has t = n = -1. */
export interface TokenRows {
  clip: Int32Array;
  t: Int32Array;
  n: Int32Array;
  /** Rows `offsets[s]` to `offsets[s + 1]` are sequence s of the output: a clip, or a frame. */
  offsets: Int32Array;
}

/** Sequences that attend within themselves: rows `order[offsets[g]]` to `order[offsets[g + 1]]`, in that order. */
export interface View {
  order: Int32Array;
  offsets: Int32Array;
  /** Every sequence begins with the class token of its clip, which several sequences share: `order` with -1 for it. */
  ownRows?: Int32Array;
}

/** Rows order[begin, end): whole sequences first to last, or part of one. */
export interface Block {
  begin: number;
  end: number;
  first: number;
  last: number;
}

/**
 * Lays out the rows: per clip (or per frame) the class token, where there is one, then the tokens.
 * @param kept per clip, ascending indices t · N + n; undefined: all
 */
export function layOutRows(
  c: ResolvedConfig,
  clips: number,
  frames: number,
  patches: number,
  kept: readonly Int32Array[] | undefined,
): TokenRows {
  const perFrame = framesApart(c);
  const cls = c.classToken ? 1 : 0;
  const offsets = [0];
  const count = (b: number) => kept?.[b].length ?? frames * patches;
  let most = 0;
  for (let b = 0; b < clips; b++) most += count(b) + cls * (perFrame ? frames : 1);
  const rows = { clip: new Int32Array(most), t: new Int32Array(most), n: new Int32Array(most) };
  let at = 0;
  const push = (b: number, time: number, patch: number) => {
    rows.clip[at] = b;
    rows.t[at] = time;
    rows.n[at++] = patch;
  };
  for (let b = 0; b < clips; b++) {
    const tokens = kept === undefined ? undefined : ordered(c, kept[b], patches);
    let open = -1;
    if (!perFrame && cls) push(b, -1, -1);
    for (let i = 0; i < count(b); i++) {
      let [time, patch] = [Math.floor(i / patches), i % patches];
      if (tokens !== undefined) [time, patch] = [Math.floor(tokens[i] / patches), tokens[i] % patches];
      else if (c.tokenOrder === 'patches') [time, patch] = [i % frames, Math.floor(i / frames)];
      if (perFrame && time !== open) {
        if (open >= 0) offsets.push(at);
        open = time;
        if (cls) push(b, -1, -1);
      }
      push(b, time, patch);
    }
    if (!perFrame || open >= 0) offsets.push(at);
  }
  const { clip, t, n } = rows;
  return {
    clip: clip.subarray(0, at),
    t: t.subarray(0, at),
    n: n.subarray(0, at),
    offsets: Int32Array.from(offsets),
  };
}

/** Kept tokens in the order of a config. */
function ordered(c: ResolvedConfig, tokens: Int32Array, patches: number): Int32Array {
  if (c.tokenOrder !== 'patches') return tokens;
  return tokens.slice().sort((x, y) => (x % patches) - (y % patches) || x - y);
}

/** Whether the rows of a frame are a sequence of their own, with their own class token. */
export function framesApart(c: ResolvedConfig): boolean {
  return c.attention === 'space-only' || c.attention === 'factorized-encoder';
}

/** The sequences of the output as a view. */
export function wholeView(rows: TokenRows): View {
  return { order: Int32Array.from({ length: rows.clip.length }, (_, i) => i), offsets: rows.offsets };
}

/**
 * Tokens of one frame (`'space'`) or of one patch (`'time'`) of a clip, without class tokens; `sharedClass` puts the
 * clip's class token first.
 */
export function axisView(rows: TokenRows, axis: 'time' | 'space', sharedClass = false): View {
  const position = axis === 'time' ? rows.n : rows.t;
  const count = rows.clip.length;
  let most = 0;
  for (let i = 0; i < count; i++) most = Math.max(most, position[i] + 1);
  const clips = count === 0 ? 0 : rows.clip[count - 1] + 1;
  const lengths = new Int32Array(clips * most);
  const classRow = new Int32Array(clips).fill(-1);
  let tokens = 0;
  for (let i = 0; i < count; i++) {
    if (rows.t[i] < 0) classRow[rows.clip[i]] = i;
    else {
      lengths[rows.clip[i] * most + position[i]]++;
      tokens++;
    }
  }
  const offsets = [0];
  const start = new Int32Array(lengths.length);
  const extra = sharedClass ? 1 : 0;
  for (let g = 0, at = 0; g < lengths.length; g++) {
    if (lengths[g] === 0) continue;
    start[g] = at + extra;
    at += lengths[g] + extra;
    offsets.push(at);
  }
  const order = new Int32Array(tokens + extra * (offsets.length - 1));
  const next = start.slice();
  for (let i = 0; i < count; i++) {
    if (rows.t[i] < 0) continue;
    const g = rows.clip[i] * most + position[i];
    if (extra && next[g] === start[g]) order[start[g] - 1] = classRow[rows.clip[i]];
    order[next[g]++] = i;
  }
  if (!sharedClass) return { order, offsets: Int32Array.from(offsets) };
  const ownRows = order.slice();
  for (let g = 0; g + 1 < offsets.length; g++) ownRows[offsets[g]] = -1;
  return { order, offsets: Int32Array.from(offsets), ownRows };
}

/** Runs of whole sequences of about `size` rows; a longer sequence is cut into parts of one block each. */
export function* blocksOf(view: View, size: number): Generator<Block> {
  const { offsets } = view;
  const sequences = offsets.length - 1;
  for (let first = 0; first < sequences; ) {
    let last = first + 1;
    while (last < sequences && offsets[last + 1] - offsets[first] <= size) last++;
    yield { begin: offsets[first], end: offsets[last], first, last };
    first = last;
  }
}

/** Length of the sequences of a block when they are all as long, else 0. */
export function uniformLength(view: View, block: Block): number {
  const { offsets } = view;
  const length = offsets[block.first + 1] - offsets[block.first];
  for (let g = block.first; g < block.last; g++) {
    if (offsets[g + 1] - offsets[g] !== length) return 0;
  }
  return length;
}

/** Whether rows order[begin, end) lie one after the other in memory. */
export function isRun(order: Int32Array, begin: number, end: number): boolean {
  for (let i = begin + 1; i < end; i++) if (order[i] !== order[i - 1] + 1) return false;
  return true;
}
