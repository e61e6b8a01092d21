import { type Steps, step } from '../checkpoint/steps.ts';
import type { PackedMatrix } from '../gemm/linear.ts';
import { type AsyncOpOptions, call, callSync, type Op } from '../op.ts';
import { LINEAR_ACTIVATIONS, type LinearActivation } from '../reference/gemm/linear.ts';
import { fusedLinearReference } from '../reference/nn/fusedLinear.ts';
import type { Tensor } from '../tensor.ts';

/** A product's weights. */
export interface Dense {
  weight: PackedMatrix;
  bias?: Tensor<'float32'>;
}

export interface NormWeights {
  weight: Tensor<'float32'>;
  bias: Tensor<'float32'>;
}

/** Rows that are added to what is written: of this table, these; without `index` the rows that are written. */
export interface AddedRows {
  table: Float32Array;
  index?: Int32Array;
}

/** What {@link fusedLinear} computes; every buffer holds float32 rows. */
export interface FusedLinear {
  x: Float32Array;
  rows: number;
  /** Rows of x; default: the first ones in order. */
  index?: Int32Array;
  norm?: NormWeights & { epsilon: number; unitOffset: boolean };
  /** The first of two products. */
  hidden?: Dense & { activation: LinearActivation };
  weight: Dense;
  activation?: LinearActivation;
  /** The update is multiplied by it. */
  gate?: number;
  add?: readonly AddedRows[];
  out: Float32Array;
  /** Rows of out, -1: not written; default: the first ones in order. */
  to?: Int32Array;
  /** Another product of the same normed rows, without anything around it; its weights are of the same type. */
  also?: { weight: Dense; out: Float32Array };
}

const op: Op = { name: 'fusedLinear', reference: fusedLinearReference };

const code = (a: LinearActivation | undefined) => LINEAR_ACTIVATIONS.indexOf(a ?? 'none');

/**
 * @internal `out[to] = gate act(h Wᵀ + b) + added rows`, where h are rows of x, normed and taken through the hidden
 * product where those are given. For the layers of this package, which lay out the rows: nothing is checked. `out` may be
 * x where `index` and `to` are the same.
 */
export function* fusedLinear(f: FusedLinear, options: AsyncOpOptions): Steps<void> {
  if (f.rows === 0) return;
  const args = [
    f.x,
    f.rows,
    f.index ?? null,
    f.norm !== undefined,
    f.norm?.weight.data ?? null,
    f.norm?.bias.data ?? null,
    f.norm?.unitOffset ?? false,
    f.norm?.epsilon ?? 0,
    f.hidden?.weight.use(options.backend) ?? null,
    f.hidden?.bias?.data ?? null,
    code(f.hidden?.activation),
    f.weight.weight.use(options.backend),
    f.weight.bias?.data ?? null,
    code(f.activation),
    f.gate ?? 1,
    ...addedArguments(f.add),
    f.out,
    f.to ?? null,
    f.also?.weight.weight.use(options.backend) ?? null,
    f.also?.weight.bias?.data ?? null,
    f.also?.out ?? null,
  ];
  const run = { ...options, backend: f.weight.weight.backend };
  yield* step(
    () => callSync(op, args, run),
    () => call(op, args, run),
  );
}

/** Table and index of up to two added rows. */
export function addedArguments(add: readonly AddedRows[] = []): unknown[] {
  return [0, 1].flatMap((i) => [add[i]?.table ?? null, add[i]?.index ?? null]);
}
