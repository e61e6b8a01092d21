import { type Steps, step } from '../../checkpoint/steps.ts';
import { DTYPE_CODE } from '../../dtype.ts';
import { type AddedRows, addedArguments, fusedLinear, type NormWeights } from '../../nn/fusedLinear.ts';
import { type AsyncOpOptions, call, callSync } from '../../op.ts';
import { allocate, makeTensor, type Tensor } from '../../tensor.ts';
import { patchEmbedOp } from '../patchEmbed.ts';
import type { ResolvedConfig } from './config.ts';
import { addAll, normRows } from './ops.ts';
import type { Frames } from './pixels.ts';
import { pooledView, type Views } from './plan.ts';
import { axisView, type TokenRows, type View } from './rows.ts';
import { attentionStep, mlpStep, type StepActivations, type Stream } from './steps.ts';
import type { EncoderParts, Layer } from './weights.ts';

/** What the last layers keep; see `VideoEncoder.forward`. */
export interface LayerActivations {
  /** Index of the layer, the temporal encoder's after the spatial encoder's. */
  layer: number;
  /** Its steps in the order in which they ran. */
  steps: StepActivations[];
}

export interface ForwardRun {
  config: ResolvedConfig;
  parts: EncoderParts;
  frames: Frames;
  rows: TokenRows;
  views: Views;
  /** float32 buffer of the plan's scratch. */
  scratch: Float32Array;
  blockTokens: number;
  lastLayers: number;
  options: AsyncOpOptions;
  onStep(stage: string): void;
}

export interface ForwardResult {
  x: Float32Array;
  /** Sequences of the output. */
  offsets: Int32Array;
  pooled?: Tensor<'float32'>;
  activations: LayerActivations[];
}

/** Adds row `at` of a table to x[to]. */
function addRow(x: Float32Array, to: number, table: Float32Array | undefined, at: number, d: number): void {
  if (table === undefined) return;
  const from = at * d;
  for (let j = 0; j < d; j++) x[to + j] += table[from + j];
}

/** Class tokens, embedded tubelets and their positions. */
function* embed(r: ForwardRun, x: Float32Array): Steps<void> {
  const { config: c, parts: p, rows, frames } = r;
  const d = c.hiddenSize;
  const cls = c.classToken ? 1 : 0;
  const [time, height, width] = frames.grid;
  const patches = height * width;
  let count = 0;
  for (let i = 0; i < rows.t.length; i++) {
    if (rows.t[i] >= 0) {
      count++;
      continue;
    }
    x.set(p.classToken as Float32Array, i * d);
    addRow(x, i * d, p.positions ?? p.spacePositions, 0, d);
  }
  if (count === 0) return;
  const [clips, , channels] = frames.dims;
  // By frame, whatever the order of the rows: neighbours share lines of pixels.
  const begins = new Int32Array(clips * time + 1);
  for (let i = 0; i < rows.t.length; i++) if (rows.t[i] >= 0) begins[rows.clip[i] * time + rows.t[i] + 1]++;
  for (let g = 0; g < clips * time; g++) begins[g + 1] += begins[g];
  const offsets = Int32Array.from({ length: clips + 1 }, (_, clip) => begins[clip * time]);
  const to = new Int32Array(count);
  for (let i = 0; i < rows.t.length; i++)
    if (rows.t[i] >= 0) to[begins[rows.clip[i] * time + rows.t[i]]++] = i;
  const tokens = to.map((i) => rows.t[i] * patches + rows.n[i]);
  const add: AddedRows[] = [];
  const { positions, spacePositions } = p;
  const timePositions = c.attention === 'factorized-encoder' ? undefined : p.timePositions;
  if (positions) add.push({ table: positions, index: tokens.map((t) => cls + t) });
  else if (spacePositions) add.push({ table: spacePositions, index: to.map((i) => cls + rows.n[i]) });
  if (timePositions) add.push({ table: timePositions, index: to.map((i) => rows.t[i]) });

  const [sb, sf, sc, sy, sx] = frames.strides;
  const tubelet = [...c.tubelet, ...c.tubelet];
  // In the order of patch_problem (native/binding/experts.cpp).
  const numbers = [clips, channels, sb, sc, sf, sy, sx, time, height, width, ...tubelet, 0, 0, 0, 0];
  const type = frames.data instanceof Uint8Array ? 'uint8' : 'float32';
  const args = [
    p.patch.weight.use(r.options.backend),
    Float64Array.from(numbers),
    frames.data,
    DTYPE_CODE[type],
    frames.scale,
    frames.shift,
    tokens,
    offsets,
    p.patch.bias?.data ?? null,
    x,
    DTYPE_CODE.float32,
    ...addedArguments(add),
    to,
  ];
  yield* step(
    () => callSync(patchEmbedOp, args, r.options),
    () => call(patchEmbedOp, args, r.options),
  );
}

/** Runs a layer's steps. */
function* runLayer(s: Stream, layer: Layer, views: Views, delta: Float32Array | undefined): Steps<void> {
  const viewOf = (axis: keyof Views): View => views[axis] ?? views.joint;
  for (const [i, step] of layer.steps.entries()) {
    if (step.kind === 'mlp') yield* mlpStep(s, step);
    else if (!layer.parallel) yield* attentionStep(s, viewOf(step.axis), step);
    else if (i === 0) {
      // Half of the heads attend over time, half over space, both of the same stream.
      const target = (delta as Float32Array).fill(0);
      yield* attentionStep({ ...s, target }, viewOf(step.axis), step);
    } else {
      yield* attentionStep(s, viewOf(step.axis), step);
      yield* addAll(s.x, delta as Float32Array, s.options);
    }
  }
}

/** Norm of every row in place, block by block. */
function* normAll(r: ForwardRun, x: Float32Array, norm: NormWeights): Steps<void> {
  const d = r.config.hiddenSize;
  const size = r.blockTokens * d;
  for (let at = 0; at < x.length; at += size) {
    const block = x.subarray(at, Math.min(at + size, x.length));
    yield* normRows(block, block.length / d, norm, r.config, block, r.options);
  }
}

/** Rows of the temporal encoder: a class token, then one row per frame. */
function poolFrames(r: ForwardRun, x: Float32Array, v: View): Float32Array {
  const { config: c, parts: p, rows } = r;
  const d = c.hiddenSize;
  const out = allocate('float32', v.order.length * d);
  let frame = 0;
  for (let b = 0; b + 1 < v.offsets.length; b++) {
    out.set(p.timeClassToken as Float32Array, v.offsets[b] * d);
    addRow(out, v.offsets[b] * d, p.timePositions, 0, d);
    for (let i = v.offsets[b] + 1; i < v.offsets[b + 1]; i++, frame++) {
      const begin = rows.offsets[frame];
      const end = c.framePooling === 'class' ? begin + 1 : rows.offsets[frame + 1];
      for (let row = begin; row < end; row++) {
        for (let j = 0; j < d; j++) out[i * d + j] += x[row * d + j] / (end - begin);
      }
      addRow(out, i * d, p.timePositions, rows.t[rows.offsets[frame + 1] - 1] + 1, d);
    }
  }
  return out;
}

/** The forward pass over rows that are laid out already. */
export function* forwardRows(r: ForwardRun): Steps<ForwardResult> {
  const { config: c, parts: p, rows } = r;
  const d = c.hiddenSize;
  const { scratch } = r;
  let x = allocate('float32', rows.clip.length * d);
  yield* embed(r, x);
  r.onStep('embedding');
  const activations: LayerActivations[] = [];
  const total = p.layers.length + p.timeLayers.length;
  let index = 0;
  const run = function* (s: Stream, layers: Layer[], views: Views, stage: string): Steps<void> {
    const delta = layers.some((l) => l.parallel) ? scratch.subarray(scratch.length - x.length) : undefined;
    for (const [i, layer] of layers.entries()) {
      const keep = index >= total - r.lastLayers ? ([] as StepActivations[]) : undefined;
      yield* runLayer({ ...s, keep }, layer, views, delta);
      if (keep) activations.push({ layer: index, steps: keep });
      index++;
      r.onStep(`${stage} ${i}`);
    }
  };
  const stream: Stream = {
    config: c,
    rows,
    columns: r.frames.grid[2],
    x,
    scratch,
    blockTokens: r.blockTokens,
    options: r.options,
  };
  yield* run(stream, p.layers, r.views, 'layer');
  yield* normAll(r, x, p.norm);
  let offsets = rows.offsets;
  if (c.attention === 'factorized-encoder') {
    let v: View;
    if (c.framePooling === 'none') {
      v = axisView(rows, 'time');
      for (let i = 0; i < rows.t.length; i++) addRow(x, i * d, p.timePositions, rows.t[i], d);
      offsets = clipOffsets(rows);
    } else {
      v = pooledView(rows);
      x = poolFrames(r, x, v);
      offsets = v.offsets;
    }
    yield* run({ ...stream, x }, p.timeLayers, { joint: v }, 'time layer');
    yield* normAll(r, x, p.timeNorm as NormWeights);
  }
  return { x, offsets, pooled: yield* pool(r, x, offsets), activations };
}

/** Where the rows of each clip begin, and the end. */
function clipOffsets(rows: TokenRows): Int32Array {
  const offsets = [0];
  for (let i = 1; i <= rows.clip.length; i++) {
    if (i === rows.clip.length || rows.clip[i] !== rows.clip[i - 1]) offsets.push(i);
  }
  return Int32Array.from(offsets);
}

/** tanh of the dense layer over the first token of each sequence. */
function* pool(r: ForwardRun, x: Float32Array, offsets: Int32Array): Steps<Tensor<'float32'> | undefined> {
  const { pooler } = r.parts;
  if (pooler === undefined) return undefined;
  const clips = offsets.length - 1;
  const size = pooler.weight.outputs;
  const y = new Float32Array(clips * size);
  yield* fusedLinear({ x, rows: clips, index: offsets, weight: pooler, out: y }, r.options);
  return makeTensor('float32', y.map(Math.tanh), [clips, size]);
}
