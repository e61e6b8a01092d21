import { step as opStep, type Steps } from '../../checkpoint/steps.ts';
import type { AsyncOpOptions } from '../../op.ts';
import type { Tensor } from '../../tensor.ts';
import { attention, attentionSync } from '../attention.ts';
import { rotaryEmbedding, rotaryEmbeddingSync } from '../rotaryEmbedding.ts';
import type { ResolvedConfig } from './config.ts';
import { addRows, type Dense, type NormWeights, normRows, product, view } from './ops.ts';
import {
  type Block,
  blocksOf,
  gatherRows,
  isRun,
  scatterRows,
  type TokenRows,
  uniformLength,
  type View,
} from './rows.ts';

/** Query, key and value; with rotary positions keys and values are apart, because only keys are rotated. */
export interface AttentionWeights {
  query: Dense;
  keyValue: Dense[];
  output: Dense;
}

export interface AttentionStep {
  kind: 'attention';
  axis: 'joint' | 'time' | 'space';
  norm: NormWeights;
  weights: AttentionWeights;
  /** TimeSformer's second projection of attention over time. */
  projection?: Dense;
  /** LongViViT: the update is scaled by tanh of this. */
  gate?: number;
}

export interface MlpStep {
  kind: 'mlp';
  norm: NormWeights;
  up: Dense;
  down: Dense;
}

/** What a step keeps for its backward pass; rows in the order of the step's sequences. */
export interface StepActivations {
  kind: 'attention' | 'mlp';
  axis?: 'joint' | 'time' | 'space';
  /** The residual stream before the step, `[rows, hidden]`, in output order. */
  input: Tensor<'float32'>;
  /** Row of the stream of each row below, where the step reorders them. */
  order?: Int32Array;
  /** Where each sequence begins, and the end. */
  offsets?: Int32Array;
  /** `[rows, heads, head dim]`, rotated where the model rotates. */
  query?: Tensor<'float32'>;
  key?: Tensor<'float32'>;
  value?: Tensor<'float32'>;
  /** The attention's output before its projection, `[rows, heads, head dim]`. */
  context?: Tensor<'float32'>;
  /** `[heads, rows]`; `[sequences, heads, length]` where all sequences are as long. */
  logSumExp?: Tensor<'float32'>;
  /** The MLP's values after the activation, `[rows, intermediate]`. */
  hidden?: Tensor<'float32'>;
}

/** What a stream of rows is computed with. */
export interface Stream {
  config: ResolvedConfig;
  rows: TokenRows;
  /** Columns of patches, for rotary positions. */
  columns: number;
  x: Float32Array;
  /** Where updates are added; default: x. */
  target?: Float32Array;
  /** Buffer that the steps cut their operands from. */
  scratch: Float32Array;
  blockTokens: number;
  options: AsyncOpOptions;
  /** Where the running layer keeps its activations. */
  keep?: StepActivations[];
}

/** float32 numbers of scratch that an attention step over a view takes. */
export function attentionScratch(c: ResolvedConfig, v: View, blockTokens: number): number {
  let most = 0;
  for (const b of blocksOf(v, blockTokens)) {
    const rows = b.end - b.begin;
    const whole = rows <= blockTokens || v.sharedClass;
    most = Math.max(most, whole ? 4 * rows : 2 * rows + 2 * blockTokens);
  }
  return most * c.hiddenSize;
}

export function mlpScratch(c: ResolvedConfig, rows: number, blockTokens: number): number {
  return Math.min(rows, blockTokens) * (c.hiddenSize + c.intermediateSize);
}

/** Cuts buffers of the given lengths from one. */
function cut(buffer: Float32Array, ...lengths: number[]): Float32Array[] {
  let at = 0;
  return lengths.map((n) => {
    at += n;
    return buffer.subarray(at - n, at);
  });
}

function dense(s: Stream, x: Float32Array, rows: number, w: Dense, out: Float32Array): Steps<void> {
  return product(x, rows, w, out, s.options);
}

/** The rows of a block, normed, in `out`; `spare` is overwritten where they do not lie together. */
function* normed(
  s: Stream,
  v: View,
  begin: number,
  end: number,
  norm: NormWeights,
  out: Float32Array,
  spare: Float32Array,
) {
  const d = s.config.hiddenSize;
  const rows = end - begin;
  let source = spare;
  if (isRun(v.order, begin, end)) {
    const first = v.order[begin] * d;
    source = s.x.subarray(first, first + rows * d);
  } else gatherRows(s.x, d, v.order, begin, end, spare);
  yield* normRows(source, rows, norm, s.config, out, s.options);
}

/**
 * Adds the rows of a block to the stream; first rows of sequences with a shared class go to `classSum` instead. `spare`
 * is overwritten where the rows do not lie together.
 */
function* addBlock(
  s: Stream,
  v: View,
  b: { begin: number; end: number; first: number },
  y: Float32Array,
  spare: Float32Array,
  gate: number | undefined,
  classSum: ClassSums | undefined,
) {
  const d = s.config.hiddenSize;
  const rows = b.end - b.begin;
  const target = s.target ?? s.x;
  if (classSum === undefined && isRun(v.order, b.begin, b.end)) {
    const first = v.order[b.begin] * d;
    return yield* addRows(target.subarray(first, first + rows * d), y, d, gate, s.options);
  }
  gatherRows(target, d, v.order, b.begin, b.end, spare);
  yield* addRows(spare.subarray(0, rows * d), y, d, gate, s.options);
  if (classSum === undefined) return scatterRows(spare, d, v.order, b.begin, b.end, b.begin, target);
  for (let g = b.first; g + 1 < v.offsets.length && v.offsets[g] < b.end; g++) {
    const begin = v.offsets[g];
    const from = (begin - b.begin) * d;
    classSum.add(v.order[begin], y.subarray(from, from + d));
    scatterRows(spare, d, v.order, begin + 1, v.offsets[g + 1], b.begin, target);
  }
}

/** Sums of the updates that the copies of a class token received. */
class ClassSums {
  private readonly sums = new Map<number, { sum: Float64Array; count: number }>();

  add(row: number, y: Float32Array): void {
    const entry = this.sums.get(row) ?? { sum: new Float64Array(y.length), count: 0 };
    this.sums.set(row, entry);
    for (let j = 0; j < y.length; j++) entry.sum[j] += y[j];
    entry.count++;
  }

  /** Adds the means to the stream. */
  apply(s: Stream): void {
    const d = s.config.hiddenSize;
    for (const [row, { sum, count }] of this.sums) {
      for (let j = 0; j < d; j++) s.x[row * d + j] += sum[j] / count;
    }
  }
}

/** Turns queries or keys by their tokens' time, row and column. */
function* rotate(s: Stream, v: View, begin: number, end: number, x: Float32Array, out: Float32Array) {
  const rows = end - begin;
  const positions = new Int32Array(3 * rows);
  for (let i = 0; i < rows; i++) {
    const row = v.order[begin + i];
    const n = s.rows.n[row];
    positions[i] = s.rows.t[row];
    positions[rows + i] = Math.floor(n / s.columns);
    positions[2 * rows + i] = n % s.columns;
  }
  const { heads, hiddenSize } = s.config;
  const dims = [1, rows, heads, hiddenSize / heads];
  const input = view(x, ...dims);
  const o = {
    ...s.options,
    positions: { type: 'int32', data: positions, dims: [3, 1, rows] },
    axes: 3,
    interleaved: true,
    tiledAngles: true,
    out: view(out, ...dims),
  };
  yield* opStep(
    () => rotaryEmbeddingSync(input, o),
    () => rotaryEmbedding(input, o),
  );
}

/** Keys and values of rows: where each begins and how far rows are apart. */
interface KeyValue {
  key: Float32Array;
  value: Float32Array;
  stride: number;
}

/** Keys and values of normed rows, written to rows `at` and on of `kv`. */
function* keysAndValues(
  s: Stream,
  v: View,
  begin: number,
  end: number,
  w: AttentionWeights,
  h: Float32Array,
  spare: Float32Array,
  kv: KeyValue,
  at: number,
) {
  const rows = end - begin;
  if (w.keyValue.length === 1)
    return yield* dense(s, h, rows, w.keyValue[0], kv.key.subarray(at * kv.stride));
  yield* dense(s, h, rows, w.keyValue[0], spare);
  yield* rotate(s, v, begin, end, spare, kv.key.subarray(at * kv.stride));
  yield* dense(s, h, rows, w.keyValue[1], kv.value.subarray(at * kv.stride));
}

function keyValueIn(w: AttentionWeights, buffer: Float32Array, rows: number): KeyValue {
  const width = w.query.weight.outputs;
  return w.keyValue.length === 1
    ? { key: buffer, value: buffer.subarray(width), stride: 2 * width }
    : { key: buffer, value: buffer.subarray(rows * width), stride: width };
}

/**
 * Attention of queries `[sequences, queries, …]` over keys `[sequences, keys, …]`, or of ragged sequences.
 * @returns log-sum-exp when asked for
 */
function* attend(
  s: Stream,
  width: number,
  q: Float32Array,
  kv: KeyValue,
  [sequences, queries, keys]: readonly [number, number, number],
  segments: Int32Array | undefined,
  out: Float32Array,
  returnLogSumExp = false,
) {
  const { softcap } = s.config;
  const dim = s.config.hiddenSize / s.config.heads;
  const heads = width / dim;
  const strides = [keys * kv.stride, kv.stride, dim, 1] as const;
  const operand = (data: Float32Array) => ({
    type: 'float32',
    data,
    dims: [sequences, keys, heads, dim],
  });
  const dims = [sequences, queries, heads, dim];
  const operands = [view(q, ...dims), operand(kv.key), operand(kv.value)] as const;
  const o = {
    ...s.options,
    softcap,
    strides: { key: strides, value: strides },
    segments: segments && { query: segments, key: segments },
    returnLogSumExp,
    out: returnLogSumExp ? undefined : { output: view(out, ...dims) },
  };
  const result = yield* opStep(
    () => attentionSync(...operands, o),
    () => attention(...operands, o),
  );
  if (returnLogSumExp) out.set(result.output.data as Float32Array);
  return result.logSumExp;
}

/** A block of whole sequences. */
function* shortBlock(s: Stream, v: View, b: Block, step: AttentionStep, sums: ClassSums | undefined) {
  const d = s.config.hiddenSize;
  const rows = b.end - b.begin;
  const { weights: w } = step;
  const size = rows * d;
  const buffer = s.keep ? new Float32Array(4 * size) : s.scratch;
  const width = w.query.weight.outputs;
  let [h, q, both] = cut(buffer, size, size, 2 * rows * width);
  yield* normed(s, v, b.begin, b.end, step.norm, h, q);
  const kv = keyValueIn(w, both, rows);
  yield* keysAndValues(s, v, b.begin, b.end, w, h, q, kv, 0);
  yield* dense(s, h, rows, w.query, q);
  if (w.keyValue.length > 1) {
    yield* rotate(s, v, b.begin, b.end, q, h);
    [h, q] = [q, h];
  }
  const length = uniformLength(v, b);
  const segments = length > 0 ? undefined : v.offsets.slice(b.first, b.last + 1).map((o) => o - b.begin);
  const shape = length > 0 ? ([b.last - b.first, length, length] as const) : ([1, rows, rows] as const);
  const lse = yield* attend(s, w.query.weight.outputs, q, kv, shape, segments, h, s.keep !== undefined);
  if (s.keep) {
    const dim = d / s.config.heads;
    const kept = (data: Float32Array) => view(data.slice(0, rows * width), rows, width / dim, dim);
    const apart = w.keyValue.length > 1;
    s.keep.push({
      kind: 'attention',
      axis: step.axis,
      input: view(s.x.slice(), s.x.length / d, d),
      order: isRun(v.order, 0, v.order.length) ? undefined : v.order,
      offsets: v.offsets,
      query: kept(q),
      key: apart ? kept(kv.key) : kept(columns(both, rows, 2 * width, 0, width)),
      value: apart ? kept(kv.value) : kept(columns(both, rows, 2 * width, width, width)),
      context: kept(h),
      logSumExp: lse,
    });
  }
  yield* dense(s, h, rows, w.output, q);
  if (step.projection) {
    yield* dense(s, q, rows, step.projection, h);
    [h, q] = [q, h];
  }
  yield* addBlock(s, v, b, q, h, step.gate, sums);
}

/** Columns [from, from + count) of rows of `width`. */
function columns(x: Float32Array, rows: number, width: number, from: number, count: number): Float32Array {
  const out = new Float32Array(rows * count);
  for (let r = 0; r < rows; r++) {
    out.set(x.subarray(r * width + from, r * width + from + count), r * count);
  }
  return out;
}

/** One sequence longer than a block: all keys and values first, then the queries block by block. */
function* longSequence(s: Stream, v: View, b: Block, step: AttentionStep) {
  const d = s.config.hiddenSize;
  const { weights: w } = step;
  const length = b.end - b.begin;
  const size = s.blockTokens * d;
  const [first, second, both] = cut(s.scratch, size, size, 2 * length * d);
  const kv = keyValueIn(w, both, length);
  for (let begin = b.begin; begin < b.end; begin += s.blockTokens) {
    const end = Math.min(begin + s.blockTokens, b.end);
    yield* normed(s, v, begin, end, step.norm, first, second);
    yield* keysAndValues(s, v, begin, end, w, first, second, kv, begin - b.begin);
  }
  for (let begin = b.begin; begin < b.end; begin += s.blockTokens) {
    const end = Math.min(begin + s.blockTokens, b.end);
    const rows = end - begin;
    let [h, q] = [first, second];
    yield* normed(s, v, begin, end, step.norm, h, q);
    yield* dense(s, h, rows, w.query, q);
    if (w.keyValue.length > 1) {
      yield* rotate(s, v, begin, end, q, h);
      [h, q] = [q, h];
    }
    yield* attend(s, w.query.weight.outputs, q, kv, [1, rows, length], undefined, h);
    yield* dense(s, h, rows, w.output, q);
    if (step.projection) {
      yield* dense(s, q, rows, step.projection, h);
      [h, q] = [q, h];
    }
    yield* addBlock(s, v, { begin, end, first: b.first }, q, h, step.gate, undefined);
  }
}

/** x += scale · MHA(norm x) within the sequences of a view. */
export function* attentionStep(s: Stream, v: View, step: AttentionStep): Steps<void> {
  const sums = v.sharedClass ? new ClassSums() : undefined;
  const size = s.keep ? Number.POSITIVE_INFINITY : s.blockTokens;
  for (const b of blocksOf(v, size)) {
    if (b.end - b.begin <= size || sums !== undefined) yield* shortBlock(s, v, b, step, sums);
    else yield* longSequence(s, v, b, step);
  }
  sums?.apply(s);
}

/** x += down(act(up(norm x))). */
export function* mlpStep(s: Stream, step: MlpStep): Steps<void> {
  const { hiddenSize: d, intermediateSize: f, activation } = s.config;
  const total = s.x.length / d;
  const size = s.keep ? Math.max(total, 1) : s.blockTokens;
  for (let begin = 0; begin < total; begin += size) {
    const rows = Math.min(size, total - begin);
    const [h, hidden] = cut(s.keep ? new Float32Array(rows * (d + f)) : s.scratch, rows * d, rows * f);
    const x = s.x.subarray(begin * d, (begin + rows) * d);
    yield* normRows(x, rows, step.norm, s.config, h, s.options);
    yield* product(h, rows, step.up, hidden, s.options, activation);
    s.keep?.push({ kind: 'mlp', input: view(x.slice(), rows, d), hidden: view(hidden.slice(), rows, f) });
    yield* dense(s, hidden, rows, step.down, h);
    yield* addRows(x, h, d, undefined, s.options);
  }
}
