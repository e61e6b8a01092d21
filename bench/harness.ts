import Benchmark from 'benchmark';
import lodash from 'lodash';
import platform from 'platform';

// benchmark.js looks its libraries up by require(), which fails once bundled; handing them over works in both.
const Timer = (Benchmark as unknown as { runInContext(context: object): typeof Benchmark }).runInContext({
  _: lodash,
  platform,
  process,
});

/** One of the things that are timed side by side. */
export interface Entrant {
  name: string;
  /** Runs for about `seconds` and returns samples of the time of one call, in seconds. */
  round(seconds: number): number[] | Promise<number[]>;
}

export interface Timing {
  name: string;
  /** Median over the rounds of each round's median, in seconds. */
  seconds: number;
  /** (slowest round − fastest round) / median. */
  spread: number;
  /** Median of each round. */
  rounds: number[];
  samples: number;
}

export function median(values: readonly number[]): number {
  if (values.length === 0) return Number.NaN;
  const sorted = [...values].sort((a, b) => a - b);
  const half = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}

/** A synchronous call timed by benchmark.js, which calibrates how many calls make one sample. */
export function localEntrant(name: string, fn: () => unknown): Entrant {
  let count = 1;
  return {
    name,
    round(seconds) {
      // benchmark.js would make several calls to find out that one is enough.
      const start = performance.now();
      fn();
      const once = (performance.now() - start) / 1000;
      if (once > seconds / 2) {
        // As the peers: calls until the time is over.
        const samples = [once];
        for (let from = performance.now(); from - start < seconds * 1000; ) {
          fn();
          const to = performance.now();
          samples.push((to - from) / 1000);
          from = to;
        }
        return samples;
      }
      const bench = new Timer(name, fn, {
        initCount: count,
        maxTime: seconds * 0.75,
        minTime: Math.max(seconds / 8, 1e-3),
        minSamples: 1,
      });
      bench.run({ async: false });
      const failure = (bench as unknown as { error?: Error }).error;
      if (failure) throw failure;
      count = Math.max(1, bench.count);
      return bench.stats.sample;
    },
  };
}

/** An asynchronous call: awaited in a loop, one sample for every `batch` of at least a millisecond. */
export function asyncEntrant(name: string, fn: () => Promise<unknown>): Entrant {
  let batch = 1;
  return {
    name,
    async round(seconds) {
      const samples: number[] = [];
      const end = performance.now() + seconds * 1000;
      do {
        const start = performance.now();
        for (let i = 0; i < batch; i++) await fn();
        const elapsed = performance.now() - start;
        if (elapsed < 1) batch *= 2;
        else samples.push(elapsed / 1000 / batch);
      } while (performance.now() < end || samples.length === 0);
      return samples;
    },
  };
}

export interface InterleaveOptions {
  /** Time per entrant over all rounds. */
  seconds: number;
  rounds?: number;
  /** Called before each round of each entrant; -1 is the one that is not counted. */
  onRound?(entrant: Entrant, round: number): void;
}

export const DEFAULT_ROUNDS = 5;
/** Enough for a median, where a round takes far longer than was asked for (one call of many seconds). */
const FEWEST_ROUNDS = 3;

// Thread pools (OpenMP's, onnxruntime's) spin for a while after their work; the next entrant must not compete with that:
// after 10 ms one token through 8 experts reached 65 % of the read bandwidth beside peers, after 150 ms 81 %.
const SETTLE_MS = 150;

/**
 * Times entrants in rounds A B C, A B C, …: a machine that slows down or is disturbed for a while then hits all of
 * them alike, and medians of rounds can be compared. A round before the first is not counted: the first calls pay for
 * fresh memory and for JavaScript that is not compiled yet (a video layer: 136 and 120 ms, then 112).
 */
export async function interleave(entrants: Entrant[], options: InterleaveOptions): Promise<Timing[]> {
  const count = options.rounds ?? DEFAULT_ROUNDS;
  const slice = options.seconds / count;
  const medians: number[][] = entrants.map(() => []);
  const samples = entrants.map(() => 0);
  const limit = 4 * options.seconds * entrants.length;
  let spent = 0;
  for (let round = -1; round < count; round++) {
    if (round >= FEWEST_ROUNDS && spent > limit) break;
    for (const [i, entrant] of entrants.entries()) {
      options.onRound?.(entrant, round);
      await new Promise((resolve) => setTimeout(resolve, SETTLE_MS));
      const start = performance.now();
      const times = await entrant.round(slice);
      if (round < 0) continue;
      spent += (performance.now() - start) / 1000;
      medians[i].push(median(times));
      samples[i] += times.length;
    }
  }
  return entrants.map((entrant, i) => timingOf(entrant.name, medians[i], samples[i]));
}

export function timingOf(name: string, rounds: number[], samples: number): Timing {
  const seconds = median(rounds);
  return {
    name,
    seconds,
    spread: (Math.max(...rounds) - Math.min(...rounds)) / seconds,
    rounds,
    samples,
  };
}
