import type { Tensor } from '../lib/tensor.ts';
import {
  type CaseSlice,
  caseSeed,
  compareOutputs,
  missOf,
  type OpCase,
  type PreparedCase,
} from '../test/cases/case.ts';
import { Random } from '../test/cases/random.ts';
import type { Variant } from '../test/helpers/backends.ts';
import { DEFAULT_ROUNDS, type Entrant, interleave, localEntrant, type Timing } from './harness.ts';
import type { Peaks } from './peaks.ts';
import type { Peers } from './peers/index.ts';
import type { BenchRow, PeerTiming } from './report.ts';

export interface BenchOptions {
  variants: Variant[];
  threads: number;
  /** Time per entrant and case. */
  seconds: number;
  seed: number;
  peers: Peers | null;
  onNote?(text: string): void;
}

/** Rates of a row that was timed. */
function setRates(row: BenchRow, c: OpCase, seconds: number): void {
  if (c.flops) row.flopsPerSecond = c.flops / seconds;
  if (c.bytes) row.bytesPerSecond = c.bytes / seconds;
  if (c.items) row.items = { ...c.items, perSecond: c.items.count / seconds };
}

/** The share of the roofline: the least time that the peaks allow over the time taken. */
export function setPeakShares(rows: BenchRow[], peaks: Peaks): void {
  for (const row of rows) {
    if (row.seconds === null) continue;
    const isa = row.variant.split('/')[1] as keyof Peaks['operations']['f32'];
    const operations = peaks.operations[row.arithmetic][isa];
    const floors: [string, number][] = [];
    if (row.bytes) floors.push(['read', row.bytes / peaks.read]);
    if (row.flops && operations) floors.push([row.arithmetic, row.flops / operations]);
    floors.sort((a, b) => b[1] - a[1]);
    if (floors.length > 0) row.peak = { bound: floors[0][0], share: floors[0][1] / row.seconds };
  }
}

interface Expectation {
  /** Outputs of the reference on the whole case, or on its slice. */
  outputs: Tensor[];
  slice?: CaseSlice;
  /** Time of that run, extrapolated to the whole case. */
  seconds: number;
  fraction: number;
}

function runReference(c: OpCase, prepared: PreparedCase): Expectation {
  const slice = c.verify === false ? prepared.slice : undefined;
  if (c.verify === false && slice === undefined) {
    throw new Error('the case is too large for the reference and has no slice: it cannot be checked');
  }
  const start = performance.now();
  const outputs = (slice?.prepared ?? prepared).run({ backend: 'reference' });
  const fraction = slice?.fraction ?? 1;
  return { outputs, slice, seconds: (performance.now() - start) / 1000 / fraction, fraction };
}

function check(
  c: OpCase,
  prepared: PreparedCase,
  variant: Variant,
  expected: Expectation,
  threads: number,
): BenchRow['error'] {
  variant.use();
  const whole = prepared.run({ ...variant.options, threads });
  const actual = expected.slice ? expected.slice.of(whole) : whole;
  const compare = (expected.slice?.prepared ?? prepared).compare ?? compareOutputs;
  const comparison = compare(actual, expected.outputs);
  const detail = missOf(comparison, c.tolerance);
  const { relative, ulp } = comparison;
  return { relative, ulp, tolerance: c.tolerance, passed: detail === undefined, detail };
}

async function peerEntrants(c: OpCase, options: BenchOptions): Promise<Entrant[]> {
  const entrants: Entrant[] = [];
  for (const [name, peer] of options.peers?.ready ?? []) {
    const spec = c.peers?.[name];
    if (spec === undefined) continue;
    try {
      entrants.push(await peer.entrant(spec, options.threads));
    } catch (error) {
      options.onNote?.(`peer ${name} skipped for ${c.op} ${c.name}: ${(error as Error).message}`);
    }
  }
  return entrants;
}

/** The reference as an entrant when a round of it is affordable, and its timing from the check when it is not. */
function referenceEntrant(prepared: PreparedCase, expected: Expectation, slice: number): Entrant | null {
  if (expected.slice !== undefined || expected.seconds > slice) return null;
  return localEntrant('reference', () => prepared.run({ backend: 'reference' }));
}

function peerTiming(timing: Timing, own: number): PeerTiming {
  return { seconds: timing.seconds, spread: timing.spread, ratio: timing.seconds / own };
}

function referenceTiming(timing: Timing | undefined, expected: Expectation, own: number): PeerTiming {
  if (timing) return peerTiming(timing, own);
  const note = expected.fraction === 1 ? 'one run' : `one run over ${expected.fraction} of the case`;
  return { seconds: expected.seconds, spread: null, ratio: expected.seconds / own, note };
}

/** Validates one case on fresh data, then times every variant that is right, with the peers, in interleaved rounds. */
export async function benchCase(c: OpCase, options: BenchOptions): Promise<BenchRow[]> {
  const prepared = c.prepare(new Random(caseSeed(options.seed, c)));
  try {
    return await benchPrepared(c, prepared, options);
  } finally {
    prepared.dispose?.();
  }
}

async function benchPrepared(c: OpCase, prepared: PreparedCase, options: BenchOptions): Promise<BenchRow[]> {
  const { threads, seconds } = options;
  const expected = runReference(c, prepared);
  const rows: BenchRow[] = [];
  const entrants: Entrant[] = [];
  for (const variant of options.variants) {
    const error = check(c, prepared, variant, expected, threads);
    rows.push({
      family: c.family,
      op: c.op,
      name: c.name,
      variant: variant.name,
      error,
      seconds: null,
      spread: null,
      rounds: [],
      flops: c.flops,
      bytes: c.bytes,
      arithmetic: c.peak ?? 'f32',
      peers: {},
    });
    if (!error.passed) continue; // a wrong result has no speed
    const call = { ...variant.options, threads };
    const entrant = localEntrant(variant.name, prepared.timed?.(call) ?? (() => prepared.run(call)));
    entrants.push({
      name: variant.name,
      round(s) {
        variant.use();
        return entrant.round(s);
      },
    });
  }
  if (entrants.length === 0) return rows;
  const itself = options.variants.some((v) => v.name === 'reference');
  const reference = itself ? null : referenceEntrant(prepared, expected, seconds / DEFAULT_ROUNDS);
  const others = await peerEntrants(c, options);
  const all = [...entrants, ...(reference ? [reference] : []), ...others];
  const timings = new Map((await interleave(all, { seconds })).map((t) => [t.name, t]));
  for (const row of rows) {
    const own = timings.get(row.variant);
    if (own === undefined) continue;
    row.seconds = own.seconds;
    row.spread = own.spread;
    row.rounds = own.rounds;
    setRates(row, c, own.seconds);
    if (row.variant !== 'reference') {
      row.reference = referenceTiming(timings.get('reference'), expected, own.seconds);
    }
    for (const { name } of others) row.peers[name] = peerTiming(timings.get(name) as Timing, own.seconds);
  }
  return rows;
}
