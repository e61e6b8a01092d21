import { execFileSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { cpus } from 'node:os';
import { join } from 'node:path';
import { type Info, info, packageRoot } from '../lib/backend.ts';
import type { Arithmetic, Peaks } from './peaks.ts';

/** Raised when a field changes its meaning or goes away; new fields do not raise it. */
export const REPORT_VERSION = 1;

/** Where and with what a report was made: the head of every JSON file that heddle writes. */
export interface RunInfo {
  version: typeof REPORT_VERSION;
  date: string;
  package: string;
  /** Commit of the working tree, with `+` when it was changed; `null` outside a clone. */
  commit: string | null;
  node: string;
  platform: string;
  cpu: string;
  features: string[];
  isa: string | null;
  threads: number;
  /** Seed of the random data: the same seed gives the same data. */
  seed: number;
}

/** Time of another library (or of the reference) on the same work. */
export interface PeerTiming {
  seconds: number;
  /** (slowest − fastest round) / median; `null` for a single run. */
  spread: number | null;
  /** This time over heddle's: above 1, heddle is faster. */
  ratio: number;
  /** How it was taken, when not in interleaved rounds over the whole case. */
  note?: string;
}

export interface BenchRow {
  family: string;
  op: string;
  name: string;
  /** Backend and instruction set, `cpu/avx512`. */
  variant: string;
  /** Distance from the reference on this run's data. */
  error: { relative: number; ulp: number; tolerance: number; passed: boolean; detail?: string };
  /** `null`: the result was wrong, so it was not timed. */
  seconds: number | null;
  spread: number | null;
  rounds: number[];
  flops?: number;
  bytes?: number;
  /** The arithmetic whose peak the operations are held against. */
  arithmetic: Arithmetic;
  flopsPerSecond?: number;
  bytesPerSecond?: number;
  items?: { unit: string; count: number; perSecond: number };
  /** The limit that the work meets first (`read` or an arithmetic), and how much of it was reached. */
  peak?: { bound: string; share: number };
  reference?: PeerTiming;
  peers: Record<string, PeerTiming>;
}

export interface BenchReport extends RunInfo {
  format: 'heddle-bench';
  secondsPerEntrant: number;
  peaks: Peaks | null;
  /** Version of each peer that ran, or why it did not. */
  peers: Record<string, { available: boolean; version?: string; reason?: string }>;
  rows: BenchRow[];
  /** Cases that could not be checked or timed at all. */
  failures: { case: string; message: string }[];
}

function commitOf(root: string): string | null {
  if (!existsSync(join(root, '.git'))) return null;
  try {
    const git = (...args: string[]) =>
      execFileSync('git', ['-C', root, ...args], { encoding: 'utf8' }).trim();
    return git('rev-parse', '--short=12', 'HEAD') + (git('status', '--porcelain') === '' ? '' : '+');
  } catch {
    return null;
  }
}

export function runInfo(seed: number, threads: number, state: Info = info()): RunInfo {
  return {
    version: REPORT_VERSION,
    date: new Date().toISOString(),
    package: state.version,
    commit: commitOf(packageRoot()),
    node: state.node,
    platform: state.platform,
    cpu: cpus()[0]?.model.trim() ?? 'unknown',
    features: state.cpuFeatures,
    isa: state.isa,
    threads,
    seed,
  };
}
