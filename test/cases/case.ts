import type { AsyncOpOptions, OpOptions } from '../../lib/op.ts';
import type { Tensor } from '../../lib/tensor.ts';
import type { Random } from './random.ts';

/** How far a result is from the reference. */
export interface Comparison {
  /** ‖actual − expected‖ / ‖expected‖ over all floating outputs (0 / 0 = 0). */
  relative: number;
  /** Largest difference of one element in units in the last place of the expected float32. */
  ulp: number;
  /** Elements of integer outputs that differ and may not. */
  mismatches: number;
  /** What differed first, for the message of a failing test. */
  detail?: string;
}

/** A case with its data drawn: ready to run on any backend, any number of times. */
export interface PreparedCase {
  /** Computes with fresh outputs. */
  run(options: OpOptions): Tensor[];
  runAsync(options: AsyncOpOptions): Promise<Tensor[]>;
  /** Default: {@link compareOutputs}. */
  compare?(actual: Tensor[], expected: Tensor[]): Comparison;
  /** A call that reuses its outputs, for timing. Default: `run`. */
  timed?(options: OpOptions): () => unknown;
  /** Part of a case that is too large for the reference: what `heddle bench` checks and times instead. */
  slice?: CaseSlice;
  /** Frees native memory (packed weights); `verify` and `bench` call it when they are done with the case. */
  dispose?(): void;
}

/** Part of a case, on the same data (the first tokens, say). */
export interface CaseSlice {
  prepared: PreparedCase;
  /** Its share of the whole case's work: the reference's time is divided by it. */
  fraction: number;
  /** The same part of the whole case's outputs. */
  of(outputs: Tensor[]): Tensor[];
}

/** The same work in another library: its name for the op and what that op needs to know (see bench/peers). */
export interface PeerSpec {
  op: string;
  [parameter: string]: string | number | boolean;
}

export type PeerName = 'pytorch' | 'onnxruntime';

/**
 * One row of an op's table. Tests run every row on every backend and instruction set against the reference;
 * `heddle verify` does the same on a user's machine; `heddle bench` times the rows that have `bench: true`.
 */
export interface OpCase {
  family: string;
  op: string;
  name: string;
  /** Bound of {@link Comparison.relative}. */
  tolerance: number;
  /** Work of one call, for rates. */
  flops?: number;
  bytes?: number;
  /** Which arithmetic peak `flops` is held against. Default: f32. */
  peak?: 'f32' | 'bf16' | 'int8';
  /** Who else does this, for `heddle bench --peers`. */
  peers?: Partial<Record<PeerName, PeerSpec>>;
  /** Unit and count for a throughput column, for example tokens. */
  items?: { unit: string; count: number };
  /** Timed by `heddle bench`. Too large for the reference rows set `verify: false`; bench then checks a slice. */
  bench?: boolean;
  verify?: boolean;
  /** False where the op's CUDA kernel does not serve this input. */
  cuda?: boolean;
  prepare(random: Random): PreparedCase;
}

const FLOATING: ReadonlySet<string> = new Set(['float32', 'float64', 'bfloat16', 'float16']);

function asFloats(t: Tensor): ArrayLike<number> {
  if (t.type === 'bfloat16' || t.type === 'float16') {
    throw new Error(`compareOutputs: decode ${t.type} outputs first`);
  }
  return t.data as ArrayLike<number>;
}

const bits = new Int32Array(1);
const float = new Float32Array(bits.buffer);

function ordered(x: number): number {
  float[0] = x;
  return bits[0] < 0 ? -(bits[0] & 0x7fffffff) : bits[0];
}

/** Norm-wise error, ULP and mismatches of a list of outputs. NaN equals NaN; an infinity equals itself. */
export function compareOutputs(actual: Tensor[], expected: Tensor[]): Comparison {
  const result: Comparison = { relative: 0, ulp: 0, mismatches: 0 };
  if (actual.length !== expected.length) {
    return { relative: Infinity, ulp: Infinity, mismatches: 1, detail: 'different number of outputs' };
  }
  for (let o = 0; o < actual.length; o++) {
    const a = actual[o];
    const e = expected[o];
    if (a.type !== e.type || a.dims.join() !== e.dims.join()) {
      return { relative: Infinity, ulp: Infinity, mismatches: 1, detail: `output ${o}: type or dims differ` };
    }
    if (!FLOATING.has(a.type)) {
      for (let i = 0; i < a.data.length; i++) {
        if (a.data[i] === e.data[i]) continue;
        result.mismatches++;
        result.detail ??= `output ${o}[${i}]: ${a.data[i]}, expected ${e.data[i]}`;
      }
      continue;
    }
    let difference = 0;
    let norm = 0;
    const x = asFloats(a);
    const y = asFloats(e);
    for (let i = 0; i < x.length; i++) {
      if (Object.is(x[i], y[i]) || x[i] === y[i]) {
        if (Number.isFinite(y[i])) norm += y[i] * y[i];
        continue;
      }
      if (!Number.isFinite(x[i]) || !Number.isFinite(y[i])) {
        result.mismatches++;
        result.detail ??= `output ${o}[${i}]: ${x[i]}, expected ${y[i]}`;
        continue;
      }
      difference += (x[i] - y[i]) ** 2;
      norm += y[i] * y[i];
      result.ulp = Math.max(result.ulp, Math.abs(ordered(x[i]) - ordered(Math.fround(y[i]))));
    }
    const relative = difference === 0 ? 0 : Math.sqrt(difference / norm);
    result.relative = Math.max(result.relative, relative);
  }
  return result;
}

/** Whether a comparison is within the case's bound. */
export function passes(c: Comparison, tolerance: number): boolean {
  return c.mismatches === 0 && c.relative <= tolerance;
}

/** What is wrong with a comparison, or `undefined`. */
export function missOf(c: Comparison, tolerance: number): string | undefined {
  if (passes(c, tolerance)) return undefined;
  if (c.detail !== undefined) return c.detail;
  if (c.mismatches > 0) return `${c.mismatches} elements differ`;
  return `relative error ${c.relative.toExponential(2)} is above ${tolerance.toExponential(0)}`;
}

export function caseLabel(c: OpCase): string {
  return `${c.op}: ${c.name}`;
}

/** The seed of one case in a run: it does not depend on which other cases run, so a filter repeats the same data. */
export function caseSeed(seed: number, c: OpCase): number {
  let h = 0x811c9dc5 ^ seed;
  for (const ch of `${c.family}/${caseLabel(c)}`) h = Math.imul(h ^ ch.charCodeAt(0), 0x01000193);
  return h | 0;
}

/** Bitwise equality of outputs: what thread counts and batches must not change. */
export function sameBits(a: Tensor[], b: Tensor[]): boolean {
  if (a.length !== b.length) return false;
  return a.every((t, i) => {
    const x = t.data;
    const y = b[i].data;
    const p = Buffer.from(x.buffer, x.byteOffset, x.byteLength);
    return p.equals(Buffer.from(y.buffer, y.byteOffset, y.byteLength));
  });
}
