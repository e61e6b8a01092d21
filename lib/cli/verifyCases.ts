import {
  type Comparison,
  caseLabel,
  caseSeed,
  compareOutputs,
  missOf,
  type OpCase,
  type PreparedCase,
  sameBits,
} from '../../test/cases/case.ts';
import { Random } from '../../test/cases/random.ts';
import type { Tensor } from '../tensor.ts';
import type { Variant } from './variants.ts';

export interface Failure {
  case: string;
  variant: string;
  message: string;
}

/** One op on one variant, over all its cases. */
export interface VerifyRow {
  op: string;
  variant: string;
  cases: number;
  /** Largest relative error and its bound, of the case that came nearest to (or went over) its bound. */
  relative: number;
  tolerance: number;
  ulp: number;
  failed: number;
}

export interface VerifyResult {
  rows: VerifyRow[];
  failures: Failure[];
}

/** Work that the reference finishes in about a second. */
const REFERENCE_FLOPS = 4e8;

/** The cases that the reference can compute in passing. */
export function verifiable(cases: OpCase[]): OpCase[] {
  return cases.filter((c) => c.verify !== false && (c.flops ?? 0) <= REFERENCE_FLOPS);
}

interface Outcome {
  variant: string;
  comparison?: Comparison;
  miss?: string;
}

/**
 * One case on every variant against the reference, synchronously on one thread and asynchronously on the default
 * number of threads; the two must agree in every bit.
 */
async function verifyCase(c: OpCase, variants: Variant[], seed: number): Promise<Outcome[]> {
  let prepared: PreparedCase;
  let expected: Tensor[];
  try {
    prepared = c.prepare(new Random(caseSeed(seed, c)));
    expected = prepared.run({ backend: 'reference' });
  } catch (error) {
    return [{ variant: 'reference', miss: String(error) }];
  }
  const compare = prepared.compare ?? compareOutputs;
  const outcomes: Outcome[] = [];
  for (const variant of variants) {
    try {
      variant.use();
      const actual = prepared.run({ ...variant.options, threads: 1 });
      const comparison = compare(actual, expected);
      let miss = missOf(comparison, c.tolerance);
      if (miss === undefined && !sameBits(await prepared.runAsync(variant.options), actual)) {
        miss =
          'the asynchronous result on all threads differs in bits from the synchronous one on one thread';
      }
      outcomes.push({ variant: variant.name, comparison, miss });
    } catch (error) {
      outcomes.push({ variant: variant.name, miss: String(error) });
    }
  }
  prepared.dispose?.();
  return outcomes;
}

function addTo(row: VerifyRow, tolerance: number, { comparison, miss }: Outcome): void {
  row.cases++;
  if (miss !== undefined) row.failed++;
  if (comparison === undefined) return;
  if (comparison.relative / tolerance >= row.relative / row.tolerance) {
    row.relative = comparison.relative;
    row.tolerance = tolerance;
  }
  row.ulp = Math.max(row.ulp, comparison.ulp);
}

/** Verifies cases one by one and sums up per op and variant. */
export async function verifyCases(
  cases: OpCase[],
  variants: Variant[],
  seed: number,
  onCase?: (label: string) => void,
): Promise<VerifyResult> {
  const rows = new Map<string, VerifyRow>();
  const failures: Failure[] = [];
  for (const c of cases) {
    onCase?.(caseLabel(c));
    await new Promise((resolve) => setImmediate(resolve)); // lets the progress bar draw
    for (const outcome of await verifyCase(c, variants, seed)) {
      const { variant, miss } = outcome;
      const key = `${c.op} ${variant}`;
      const row = rows.get(key) ?? {
        op: c.op,
        variant,
        cases: 0,
        relative: 0,
        tolerance: c.tolerance,
        ulp: 0,
        failed: 0,
      };
      rows.set(key, row);
      addTo(row, c.tolerance, outcome);
      if (miss !== undefined) failures.push({ case: caseLabel(c), variant, message: miss });
    }
  }
  return { rows: [...rows.values()], failures };
}
