import { step as opStep, type Steps } from '../../checkpoint/steps.ts';
import {
  type AddedRows,
  type Dense,
  type FusedLinear,
  fusedLinear,
  type NormWeights,
} from '../../nn/fusedLinear.ts';
import type { AsyncOpOptions } from '../../op.ts';
import type { Tensor } from '../../tensor.ts';
import { attention, attentionSync } from '../attention.ts';
import { rotaryEmbedding, rotaryEmbeddingSync } from '../rotaryEmbedding.ts';
import type { ResolvedConfig } from './config.ts';
import { view } from './ops.ts';
import { type Block, blocksOf, isRun, type TokenRows, uniformLength, type View } from './rows.ts';

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
  /** TimeSformer's second projection of attention over time, where it is not one product with the first. */
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
    const whole = rows <= blockTokens || v.ownRows !== undefined;
    most = Math.max(most, whole ? 4 * rows : 2 * rows + 2 * blockTokens);
  }
  // ViViT 4 gives half of its heads to either axis.
  return most * (c.attention === 'factorized-dot-product' ? c.hiddenSize / 2 : c.hiddenSize);
}

/** Cuts buffers of the given lengths from one. */
function cut(buffer: Float32Array, ...lengths: number[]): Float32Array[] {
  let at = 0;
  return lengths.map((n) => {
    at += n;
    return buffer.subarray(at - n, at);
  });
}

/** Rows [begin, end) of a view in the stream: a run of it, or an index. */
function rowsIn(stream: Float32Array, d: number, order: Int32Array, begin: number, end: number) {
  if (!isRun(order, begin, end)) return { rows: stream, index: order.subarray(begin, end) };
  const first = order[begin] * d;
  return { rows: stream.subarray(first, first + (end - begin) * d), index: undefined };
}

/** A norm as products take it along. */
function normOf(s: Stream, norm: NormWeights): FusedLinear['norm'] {
  const { layerNormEpsilon: epsilon, unitOffset } = s.config;
  return { ...norm, epsilon, unitOffset };
}

/** out = norm(x) Wᵀ + bias of rows [begin, end) of a view, and another such product. */
function project(
  s: Stream,
  v: View,
  [begin, end]: readonly [number, number],
  norm: NormWeights,
  weight: Dense,
  out: Float32Array,
  also?: FusedLinear['also'],
): Steps<void> {
  const { rows, index } = rowsIn(s.x, s.config.hiddenSize, v.order, begin, end);
  const f = { x: rows, rows: end - begin, index, norm: normOf(s, norm), weight, out, also };
  return fusedLinear(f, s.options);
}

/** The update of a step's stream by the attention of some rows. */
function updateOf(step: AttentionStep, context: Float32Array): Omit<FusedLinear, 'out' | 'rows'> {
  const { output } = step.weights;
  const gate = step.gate === undefined ? undefined : Math.tanh(step.gate);
  if (step.projection === undefined) return { x: context, weight: output, gate };
  return { x: context, hidden: { ...output, activation: 'none' }, weight: step.projection, gate };
}

/** Adds the projected attention of a block to the stream, but for class tokens that sequences share. */
function addBlock(
  s: Stream,
  v: View,
  [begin, end]: readonly [number, number],
  context: Float32Array,
  step: AttentionStep,
): Steps<void> {
  const { rows, index } = rowsIn(s.target ?? s.x, s.config.hiddenSize, v.ownRows ?? v.order, begin, end);
  const add: AddedRows[] = [{ table: rows }];
  return fusedLinear({ ...updateOf(step, context), rows: end - begin, add, out: rows, to: index }, s.options);
}

/** Sums of the contexts of the copies of a class token: the mean of their updates is the update of their mean. */
class ClassSums {
  private readonly sums = new Map<number, { sum: Float64Array; count: number }>();

  add(row: number, y: Float32Array): void {
    const entry = this.sums.get(row) ?? { sum: new Float64Array(y.length), count: 0 };
    this.sums.set(row, entry);
    for (let j = 0; j < y.length; j++) entry.sum[j] += y[j];
    entry.count++;
  }

  /** Adds the mean updates to the stream. */
  *apply(s: Stream, step: AttentionStep): Steps<void> {
    const rows = this.sums.size;
    const context = new Float32Array(rows * s.config.hiddenSize);
    let at = 0;
    for (const { sum, count } of this.sums.values()) for (const v of sum) context[at++] = v / count;
    const to = Int32Array.from(this.sums.keys());
    yield* fusedLinear({ ...updateOf(step, context), rows, add: [{ table: s.x }], out: s.x, to }, s.options);
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

/** Keys and values of rows, written to rows `at` and on of `kv`; `spare` is overwritten where keys are rotated. */
function* keysAndValues(
  s: Stream,
  v: View,
  rows: readonly [begin: number, end: number],
  step: AttentionStep,
  spare: Float32Array,
  kv: KeyValue,
  at: number,
) {
  const { keyValue } = step.weights;
  const key = kv.key.subarray(at * kv.stride);
  if (keyValue.length === 1) return yield* project(s, v, rows, step.norm, keyValue[0], key);
  yield* project(s, v, rows, step.norm, keyValue[0], spare);
  yield* rotate(s, v, rows[0], rows[1], spare, key);
  yield* project(s, v, rows, step.norm, keyValue[1], kv.value.subarray(at * kv.stride));
}

/** Queries of rows, rotated where the model rotates; both buffers are overwritten. Returns [queries, the other]. */
function* queriesOf(
  s: Stream,
  v: View,
  rows: readonly [begin: number, end: number],
  step: AttentionStep,
  first: Float32Array,
  second: Float32Array,
): Steps<[Float32Array, Float32Array]> {
  yield* project(s, v, rows, step.norm, step.weights.query, first);
  if (step.weights.keyValue.length === 1) return [first, second];
  yield* rotate(s, v, rows[0], rows[1], first, second);
  return [second, first];
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
  const width = w.query.weight.outputs;
  const size = rows * width;
  const buffer = s.keep ? new Float32Array(4 * size) : s.scratch;
  const [first, second, both] = cut(buffer, size, size, 2 * size);
  const kv = keyValueIn(w, both, rows);
  const range = [b.begin, b.end] as const;
  let [q, h] = [first, second];
  if (w.keyValue.length === 1) {
    yield* project(s, v, range, step.norm, w.keyValue[0], both, { weight: w.query, out: q });
  } else {
    yield* keysAndValues(s, v, range, step, first, kv, 0);
    [q, h] = yield* queriesOf(s, v, range, step, first, second);
  }
  const length = uniformLength(v, b);
  const segments = length > 0 ? undefined : v.offsets.slice(b.first, b.last + 1).map((o) => o - b.begin);
  const shape = length > 0 ? ([b.last - b.first, length, length] as const) : ([1, rows, rows] as const);
  const lse = yield* attend(s, width, q, kv, shape, segments, h, s.keep !== undefined);
  if (s.keep) {
    const dim = d / s.config.heads;
    const kept = (data: Float32Array) => view(data.slice(0, rows * width), rows, width / dim, dim);
    const apart = w.keyValue.length > 1;
    s.keep.push({
      kind: 'attention',
      axis: step.axis,
      input: view(s.x.slice(), s.x.length / d, d),
      order: isRun(v.order, 0, v.order.length) ? undefined : v.order.slice(),
      offsets: v.offsets.slice(),
      query: kept(q),
      key: apart ? kept(kv.key) : kept(columns(both, rows, 2 * width, 0, width)),
      value: apart ? kept(kv.value) : kept(columns(both, rows, 2 * width, width, width)),
      context: kept(h),
      logSumExp: lse,
    });
  }
  for (let g = b.first; sums !== undefined && g < b.last; g++) {
    const from = (v.offsets[g] - b.begin) * width;
    sums.add(v.order[v.offsets[g]], h.subarray(from, from + width));
  }
  yield* addBlock(s, v, range, h, step);
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
  const { weights: w } = step;
  const width = w.query.weight.outputs;
  const length = b.end - b.begin;
  const size = s.blockTokens * width;
  const [first, second, both] = cut(s.scratch, size, size, 2 * length * width);
  const kv = keyValueIn(w, both, length);
  const blocks: [number, number][] = [];
  for (let begin = b.begin; begin < b.end; begin += s.blockTokens) {
    blocks.push([begin, Math.min(begin + s.blockTokens, b.end)]);
  }
  for (const rows of blocks) yield* keysAndValues(s, v, rows, step, first, kv, rows[0] - b.begin);
  for (const rows of blocks) {
    const [q, h] = yield* queriesOf(s, v, rows, step, first, second);
    yield* attend(s, width, q, kv, [1, rows[1] - rows[0], length], undefined, h);
    yield* addBlock(s, v, rows, h, step);
  }
}

/** x += scale · MHA(norm x) within the sequences of a view. */
export function* attentionStep(s: Stream, v: View, step: AttentionStep): Steps<void> {
  const sums = v.ownRows && new ClassSums();
  const size = s.keep ? Number.POSITIVE_INFINITY : s.blockTokens;
  for (const b of blocksOf(v, size)) {
    if (b.end - b.begin <= size || sums !== undefined) yield* shortBlock(s, v, b, step, sums);
    else yield* longSequence(s, v, b, step);
  }
  if (sums) yield* sums.apply(s, step);
}

/** x += down(act(up(norm x))). */
export function* mlpStep(s: Stream, step: MlpStep): Steps<void> {
  const { hiddenSize: d, intermediateSize: f, activation } = s.config;
  const { x } = s;
  const rows = x.length / d;
  const norm = normOf(s, step.norm);
  const add = [{ table: x }];
  if (s.keep === undefined) {
    const hidden = { ...step.up, activation };
    return yield* fusedLinear({ x, rows, norm, hidden, weight: step.down, add, out: x }, s.options);
  }
  const hidden = new Float32Array(rows * f);
  yield* fusedLinear({ x, rows, norm, weight: step.up, activation, out: hidden }, s.options);
  s.keep.push({ kind: 'mlp', input: view(x.slice(), rows, d), hidden: view(hidden, rows, f) });
  yield* fusedLinear({ x: hidden, rows, weight: step.down, add, out: x }, s.options);
}
