import { readFileSync } from 'node:fs';
import { freemem } from 'node:os';
import { type IsaName, info, nativeAddon, setDefaults } from '../lib/backend.ts';

/** In the order of PeakKind in native/bench/peaks.h. */
const KINDS = ['f32', 'bf16', 'int8', 'read', 'copy'] as const;
export type PeakKind = (typeof KINDS)[number];
export type Arithmetic = 'f32' | 'bf16' | 'int8';

/** What this machine can do at most, measured in the same run as the rows. */
export interface Peaks {
  threads: number;
  /** Operations per second (a multiply-add is two) by arithmetic and instruction set; absent where there is none. */
  operations: Record<Arithmetic, Partial<Record<IsaName, number>>>;
  /** Bytes per second read from memory beyond the caches. */
  read: number;
  /** Bytes read plus bytes written per second. */
  copy: number;
  /** Size of the buffer for `read` and `copy`. */
  bufferBytes: number;
}

const GiB = 2 ** 30;
const MiB = 2 ** 20;
const UNSUPPORTED = -3;

function lastLevelCacheBytes(): number {
  try {
    const text = readFileSync('/sys/devices/system/cpu/cpu0/cache/index3/size', 'utf8').trim();
    const units: Record<string, number> = { K: 1024, M: MiB, G: GiB };
    return Number.parseInt(text, 10) * (units[text.at(-1) ?? ''] ?? 1);
  } catch {
    return 64 * MiB; // not told by this system: more than most have
  }
}

/** Four times the last-level cache, at most 1 GiB and at most a quarter of the free memory. */
export function streamBufferBytes(): number {
  return Math.floor(Math.min(GiB, Math.max(256 * MiB, 4 * lastLevelCacheBytes()), freemem() / 4));
}

/** One peak on the instruction set in use, per second; `undefined` where the machine has no such instruction. */
export function measurePeak(
  kind: PeakKind,
  threads: number,
  milliseconds: number,
  bytes = 0,
): number | undefined {
  const measure = nativeAddon()?.['measurePeak'] as ((...args: unknown[]) => number) | undefined;
  if (measure === undefined) return undefined;
  const result = new Float64Array(1);
  const status = measure(threads, null, null, KINDS.indexOf(kind), milliseconds, bytes, result);
  if (status === UNSUPPORTED) return undefined;
  if (status !== 0) throw new Error(`measuring the peak '${kind}' failed with status ${status}`);
  return result[0];
}

/** All peaks of the given instruction sets. `null` without the native backend. */
export function measurePeaks(
  isas: readonly IsaName[],
  threads: number,
  milliseconds: number,
  bufferBytes = streamBufferBytes(),
): Peaks | null {
  const before = info().isa;
  if (before === null) return null;
  const operations: Peaks['operations'] = { f32: {}, bf16: {}, int8: {} };
  try {
    for (const isa of isas) {
      setDefaults({ isa });
      for (const kind of ['f32', 'bf16', 'int8'] as const) {
        const value = measurePeak(kind, threads, milliseconds);
        if (value !== undefined) operations[kind][isa] = value;
      }
    }
    setDefaults({ isa: info().isas[0] }); // bandwidth is the machine's, not an instruction set's
    const read = measurePeak('read', threads, 3 * milliseconds, bufferBytes) as number;
    const copy = measurePeak('copy', threads, 3 * milliseconds, bufferBytes) as number;
    return { threads, operations, read, copy, bufferBytes };
  } finally {
    setDefaults({ isa: before });
  }
}

/** The better of two measurements of the same peaks: a peak is what the machine can do. */
export function bestPeaks(a: Peaks, b: Peaks): Peaks {
  const best = (x: Partial<Record<IsaName, number>>, y: Partial<Record<IsaName, number>>) =>
    Object.fromEntries(
      Object.entries(x).map(([isa, value]) => [isa, Math.max(value, y[isa as IsaName] ?? 0)]),
    ) as Partial<Record<IsaName, number>>;
  const [p, q] = [a.operations, b.operations];
  return {
    ...a,
    operations: { f32: best(p.f32, q.f32), bf16: best(p.bf16, q.bf16), int8: best(p.int8, q.int8) },
    read: Math.max(a.read, b.read),
    copy: Math.max(a.copy, b.copy),
  };
}
