import { HeddleError } from '../errors.ts';
import { checkMxfp4, isMxfp4, type Mxfp4Blocks } from '../gemm/mxfp4.ts';
import { SOURCE_TYPES, type SourceData, type SourceType } from '../gemm/weights.ts';
import { checkOptions, optionChoice } from '../op.ts';
import { asTensor, type TensorLike } from '../tensor.ts';

/**
 * One matrix per expert: a list of `[out, in]` tensors, one tensor `[experts, out, in]`, or MXFP4 blocks of gpt-oss
 * `[experts, out, in / 32, 16]` with their scales.
 */
export type Stacked = TensorLike | readonly TensorLike[] | Mxfp4Blocks;

/**
 * Expert weights as checkpoints store them. f = intermediate size, d = hidden size. With `layout: 'in-out'` every
 * matrix is transposed (gpt-oss: gateUp `[experts, d, 2f]`, down `[experts, f, d]`).
 */
export interface ExpertSources {
  /** `[experts, f, d]`; leave out for ungated layers. */
  gate?: Stacked;
  /** `[experts, f, d]` */
  up?: Stacked;
  /** `[experts, 2f, d]` instead of gate and up: gate rows, then up rows. */
  gateUp?: Stacked;
  /** gateUp alternates gate and up (g0, u0, g1, u1 …), as gpt-oss. Default false. */
  interleaved?: boolean;
  /** `[experts, d, f]` */
  down: Stacked;
  layout?: 'out-in' | 'in-out';
}

/** float32 biases: `[experts, f]`, `[experts, f]` or together `[experts, 2f]`, and `[experts, d]`. */
export interface ExpertBiases {
  gate?: TensorLike;
  up?: TensorLike;
  gateUp?: TensorLike;
  down?: TensorLike;
}

export interface BankShape {
  experts: number;
  hidden: number;
  intermediate: number;
  gated: boolean;
}

/** @internal */
export type ExpertSourceType = SourceType | 'mxfp4';

interface Matrices {
  type: ExpertSourceType;
  rows: number;
  columns: number;
  data: SourceData[];
  /** e8m0 of MXFP4 sources. */
  exponents?: Uint8Array[];
}

/** Splits a stacked tensor or checks a list: the same type and `[rows, columns]` for each expert. */
function matricesOf(value: Stacked, name: string): Matrices {
  if (isMxfp4(value)) {
    const m = checkMxfp4(value, name, 3);
    const [experts, rows, columns] = m.dims;
    if (experts === 0) throw new HeddleError('ERR_SHAPE', `${name}: at least one expert is needed`);
    const part = (data: Uint8Array) => {
      const size = data.length / experts;
      return Array.from({ length: experts }, (_, e) => data.subarray(e * size, (e + 1) * size));
    };
    return { type: 'mxfp4', rows, columns, data: part(m.blocks), exponents: part(m.scales) };
  }
  if (Array.isArray(value)) {
    if (value.length === 0) throw new HeddleError('ERR_SHAPE', `${name}: at least one expert is needed`);
    const tensors = value.map((v, i) => asTensor(v as TensorLike, `${name}[${i}]`, SOURCE_TYPES, 2));
    const [first] = tensors;
    for (const [i, t] of tensors.entries()) {
      if (t.type !== first.type)
        throw new HeddleError('ERR_DTYPE', `${name}[${i}] is ${t.type}, ${name}[0] is ${first.type}`);
      if (t.dims[0] !== first.dims[0] || t.dims[1] !== first.dims[1]) {
        throw new HeddleError(
          'ERR_SHAPE',
          `${name}[${i}]: expected [${first.dims.join(', ')}] as ${name}[0], got [${t.dims.join(', ')}]`,
        );
      }
    }
    return {
      type: first.type,
      rows: first.dims[0],
      columns: first.dims[1],
      data: tensors.map((t) => t.data),
    };
  }
  const t = asTensor(value as TensorLike, name, SOURCE_TYPES, 3);
  const [experts, rows, columns] = t.dims;
  if (experts === 0) throw new HeddleError('ERR_SHAPE', `${name}: at least one expert is needed`);
  const size = rows * columns;
  const data = Array.from({ length: experts }, (_, e) => t.data.subarray(e * size, (e + 1) * size));
  return { type: t.type, rows, columns, data };
}

function biasesOf(
  value: TensorLike | undefined,
  name: string,
  experts: number,
  width: number,
): Float32Array[] | null {
  if (value === undefined) return null;
  const t = asTensor(value, name, ['float32'], 2);
  if (t.dims[0] !== experts || t.dims[1] !== width) {
    throw new HeddleError(
      'ERR_SHAPE',
      `${name}: expected [${experts}, ${width}], got [${t.dims.join(', ')}]`,
    );
  }
  return Array.from({ length: experts }, (_, e) => t.data.subarray(e * width, (e + 1) * width));
}

/** Everything the boundary needs: pointers per expert and shared strides (native/binding/experts.cpp). */
export interface Layout {
  shape: BankShape;
  source: ExpertSourceType;
  gate: SourceData[] | null;
  up: SourceData[];
  upStrides: [n: number, k: number];
  down: SourceData[];
  downStrides: [n: number, k: number];
  /** MXFP4: exponents of gate, up and down; their row stride is a 16th of the blocks' (16 bytes a block). */
  exponents: [Uint8Array[] | null, Uint8Array[] | null, Uint8Array[] | null];
}

/** @internal */
export function layoutOf(s: ExpertSources): Layout {
  if (s === null || typeof s !== 'object')
    throw new HeddleError('ERR_ARGUMENT', 'sources: expected { gate, up, down } or { gateUp, down }');
  checkOptions(s, SOURCE_KEYS, 'sources');
  if (s.down === undefined) throw new HeddleError('ERR_ARGUMENT', 'down: required');
  const transposed = optionChoice(s.layout, ['out-in', 'in-out'] as const, 'out-in', 'layout') === 'in-out';
  const down = matricesOf(s.down, 'down');
  const experts = down.data.length;
  const [hidden, intermediate] = transposed ? [down.columns, down.rows] : [down.rows, down.columns];
  const check = (m: Matrices, name: string, width: number) => {
    const [rows, columns] = transposed ? [hidden, width] : [width, hidden];
    if (m.data.length !== experts) {
      throw new HeddleError(
        'ERR_SHAPE',
        `${name}: expected ${experts} experts as down, got ${m.data.length}`,
      );
    }
    if (m.rows !== rows || m.columns !== columns) {
      throw new HeddleError(
        'ERR_SHAPE',
        `${name}: expected [${rows}, ${columns}] to fit down [${down.rows}, ${down.columns}], got [${m.rows}, ${m.columns}]`,
      );
    }
    if (m.type !== down.type)
      throw new HeddleError('ERR_DTYPE', `${name} is ${m.type}, down is ${down.type}`);
    return m;
  };
  const mxfp4 = down.type === 'mxfp4';
  if (mxfp4 && transposed)
    throw new HeddleError('ERR_OPTION', "layout: MXFP4 blocks are 'out-in', got 'in-out'");
  const perElement = mxfp4 ? 2 : 1; // strides count array elements, and a byte of blocks holds two values
  const strides = (width: number): [number, number] => (transposed ? [1, width] : [hidden / perElement, 1]);
  const downStrides: [number, number] = transposed ? [1, hidden] : [intermediate / perElement, 1];
  const common = { source: down.type, down: down.data, downStrides };
  if (s.gateUp !== undefined) {
    if (s.gate !== undefined || s.up !== undefined) {
      throw new HeddleError('ERR_ARGUMENT', 'give either gateUp or gate and up, not both');
    }
    const both = check(matricesOf(s.gateUp, 'gateUp'), 'gateUp', 2 * intermediate);
    const [n, k] = strides(2 * intermediate);
    const offset = s.interleaved ? n : n * intermediate;
    return {
      ...common,
      shape: { experts, hidden, intermediate, gated: true },
      gate: both.data,
      up: both.data.map((m) => m.subarray(offset)),
      upStrides: [s.interleaved ? 2 * n : n, k],
      exponents: both.exponents
        ? [both.exponents, both.exponents.map((m) => m.subarray(offset / 16)), down.exponents ?? null]
        : NO_EXPONENTS,
    };
  }
  if (s.up === undefined) throw new HeddleError('ERR_ARGUMENT', 'up: required (or gateUp)');
  if (s.interleaved) throw new HeddleError('ERR_OPTION', 'interleaved needs gateUp');
  const up = check(matricesOf(s.up, 'up'), 'up', intermediate);
  const gate = s.gate === undefined ? null : check(matricesOf(s.gate, 'gate'), 'gate', intermediate);
  return {
    ...common,
    shape: { experts, hidden, intermediate, gated: gate !== null },
    gate: gate?.data ?? null,
    up: up.data,
    upStrides: strides(intermediate),
    exponents: up.exponents ? [gate?.exponents ?? null, up.exponents, down.exponents ?? null] : NO_EXPONENTS,
  };
}

const NO_EXPONENTS: Layout['exponents'] = [null, null, null];
const SOURCE_KEYS: ReadonlySet<string> = new Set(['gate', 'up', 'gateUp', 'interleaved', 'down', 'layout']);
const BIAS_KEYS: ReadonlySet<string> = new Set(['gate', 'up', 'gateUp', 'down']);

export type Biases = [Float32Array[] | null, Float32Array[] | null, Float32Array[] | null];

/** @internal */
export function biasLists(b: ExpertBiases | undefined, shape: BankShape, interleaved: boolean): Biases {
  if (b === undefined) return [null, null, null];
  checkOptions(b, BIAS_KEYS, 'biases');
  const { experts, hidden, intermediate } = shape;
  const down = biasesOf(b.down, 'biases.down', experts, hidden);
  if (b.gateUp !== undefined && (b.gate !== undefined || b.up !== undefined)) {
    throw new HeddleError('ERR_ARGUMENT', 'biases: give either gateUp or gate and up, not both');
  }
  if (!shape.gated && (b.gate !== undefined || b.gateUp !== undefined)) {
    throw new HeddleError('ERR_ARGUMENT', 'biases: an ungated layer has no gate to bias');
  }
  if (b.gateUp !== undefined) {
    const both = biasesOf(b.gateUp, 'biases.gateUp', experts, 2 * intermediate) as Float32Array[];
    const part = (first: number) =>
      both.map((row) =>
        interleaved
          ? Float32Array.from({ length: intermediate }, (_, i) => row[2 * i + first])
          : row.subarray(first * intermediate, (first + 1) * intermediate),
      );
    return [part(0), part(1), down];
  }
  const gate = biasesOf(b.gate, 'biases.gate', experts, intermediate);
  const up = biasesOf(b.up, 'biases.up', experts, intermediate);
  if (shape.gated && (gate === null) !== (up === null)) {
    throw new HeddleError('ERR_ARGUMENT', 'biases: give gate and up together');
  }
  return [gate, up, down];
}
