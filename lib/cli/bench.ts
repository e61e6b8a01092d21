import { writeFileSync } from 'node:fs';
import { bestPeaks, measurePeaks, type Peaks } from '../../bench/peaks.ts';
import { connectPeers, type Peers } from '../../bench/peers/index.ts';
import { type BenchReport, type BenchRow, runInfo } from '../../bench/report.ts';
import { rooflineSvg } from '../../bench/roofline.ts';
import { benchCase, setPeakShares } from '../../bench/run.ts';
import { caseLabel, type OpCase } from '../../test/cases/case.ts';
import { type IsaName, info } from '../backend.ts';
import {
  type Command,
  type Context,
  FILTER_OPTION,
  type Io,
  numberOption,
  SEED_OPTION,
  seedOf,
  selectCases,
  UsageError,
} from './command.ts';
import {
  formatBytes,
  formatError,
  formatPercent,
  formatRate,
  formatRatio,
  formatTable,
  formatTime,
  withoutEmptyColumns,
} from './format.ts';
import { startProgress } from './progress.ts';
import { keepingIsa, selectVariants, type Variant } from './variants.ts';

export interface BenchPlan {
  cases: OpCase[];
  variants: Variant[];
  threads: number;
  seconds: number;
  seed: number;
  peers: boolean;
  /** Size of the buffer for the bandwidth peaks; default: chosen by the caches. */
  bufferBytes?: number;
}

const isaOf = (v: Variant) => v.name.split('/')[1] as IsaName | undefined;

function printPeaks(io: Io, peaks: Peaks): void {
  io.out(`peaks on ${peaks.threads} thread${peaks.threads === 1 ? '' : 's'}:`);
  for (const [kind, byIsa] of Object.entries(peaks.operations)) {
    const list = Object.entries(byIsa).map(([isa, v]) => `${isa} ${formatRate(v as number, 'op/s')}`);
    if (list.length > 0) io.out(`  ${kind.padEnd(5)} ${list.join(', ')}`);
  }
  const buffer = formatBytes(peaks.bufferBytes);
  io.out(
    `  read  ${formatRate(peaks.read, 'B/s')}, copy ${formatRate(peaks.copy, 'B/s')} (${buffer} buffer)`,
  );
}

function printPeers(io: Io, peers: Peers): void {
  for (const [name, peer] of peers.ready) io.out(`peer ${name}: ${peer.version}`);
  for (const [name, reason] of peers.missing) io.out(`peer ${name}: ${reason}`);
}

export function benchTable(rows: BenchRow[], tty: boolean): string {
  const peerNames = [...new Set(rows.flatMap((r) => Object.keys(r.peers)))];
  const head = [
    'op',
    'case',
    'variant',
    'error',
    'time',
    '±',
    'op/s',
    'B/s',
    'items',
    'of peak',
    'reference',
  ];
  const body = rows.map((r) => [
    r.op,
    r.name,
    r.variant,
    r.error.passed ? formatError(r.error.relative) : 'WRONG',
    r.seconds === null ? '' : formatTime(r.seconds),
    r.spread === null ? '' : formatPercent(r.spread),
    r.flopsPerSecond ? formatRate(r.flopsPerSecond, 'FLOP/s') : '',
    r.bytesPerSecond ? formatRate(r.bytesPerSecond, 'B/s') : '',
    r.items ? formatRate(r.items.perSecond, `${r.items.unit}/s`) : '',
    r.peak ? `${formatPercent(r.peak.share)} ${r.peak.bound}` : '',
    r.reference ? formatRatio(r.reference.ratio) : '',
    ...peerNames.map((name) => (r.peers[name] ? formatRatio(r.peers[name].ratio) : '')),
  ]);
  const table = withoutEmptyColumns([...head, ...peerNames], body);
  return formatTable(
    table.head,
    table.rows,
    tty,
    table.head.map((_, i) => i).filter((i) => i > 2),
  );
}

/** Wrong results and cases that failed. */
export function missesOf(report: BenchReport): number {
  return report.failures.length + report.rows.filter((r) => !r.error.passed).length;
}

/** Measures peaks, connects peers, times every case and prints the table. */
export async function runBench(plan: BenchPlan, { io }: Context): Promise<BenchReport> {
  const { cases, variants, threads, seconds, seed } = plan;
  const isas = variants.map(isaOf).filter((isa) => isa !== undefined);
  const measure = () => measurePeaks(isas, threads, Math.min(200, 400 * seconds), plan.bufferBytes);
  const before = measure();
  const peers = plan.peers ? await connectPeers() : null;
  if (peers) printPeers(io, peers);
  const report: BenchReport = {
    format: 'heddle-bench',
    ...runInfo(seed, threads),
    secondsPerEntrant: seconds,
    peaks: before,
    peers: {},
    rows: [],
    failures: [],
  };
  for (const [name, peer] of peers?.ready ?? [])
    report.peers[name] = { available: true, version: peer.version };
  for (const [name, reason] of peers?.missing ?? []) report.peers[name] = { available: false, reason };
  const progress = startProgress(io, 'bench', cases.length);
  const notes: string[] = [];
  try {
    await keepingIsa(async () => {
      for (const c of cases) {
        progress.note(caseLabel(c));
        await new Promise((resolve) => setImmediate(resolve)); // lets the progress bar draw
        try {
          const onNote = (note: string) => notes.push(note);
          report.rows.push(...(await benchCase(c, { variants, threads, seconds, seed, peers, onNote })));
        } catch (error) {
          report.failures.push({ case: caseLabel(c), message: String(error) });
        }
        progress.step();
      }
    });
  } finally {
    progress.stop();
    peers?.close();
  }
  for (const note of notes) io.out(note);
  // Twice, because a disturbed peak flatters every row.
  const after = measure();
  if (before && after) {
    report.peaks = bestPeaks(before, after);
    setPeakShares(report.rows, report.peaks);
    printPeaks(io, report.peaks);
  }
  if (report.rows.length > 0) io.out(benchTable(report.rows, io.tty));
  io.out('×: its time over heddle’s, in the same run. ±: slowest less fastest round, over the median.');
  for (const r of report.rows.filter((row) => !row.error.passed)) {
    io.out(`WRONG ${r.op}: ${r.name} on ${r.variant}: ${r.error.detail} (seed ${seed})`);
  }
  for (const f of report.failures) io.out(`FAILED ${f.case}: ${f.message}`);
  return report;
}

export const benchCommand: Command = {
  name: 'bench',
  usage: '[family] [--filter TEXT] [--peers] [--isa ISA] [--threads N] [--time S] [--json FILE] [--svg FILE]',
  summary:
    'Times the benchmark cases, each checked first against the reference on fresh data.\n' +
    '  Prints rates, the share of this machine’s peak, and the ratio to the reference and to other libraries.',
  positionals: 1,
  options: {
    filter: FILTER_OPTION,
    peers: {
      type: 'boolean',
      help: 'also PyTorch (HEDDLE_PYTHON names the interpreter) and onnxruntime-node',
    },
    backend: { type: 'string', value: 'B', help: 'cpu or reference (default: cpu where it loads)' },
    isa: {
      type: 'string',
      value: 'ISA',
      help: 'instruction sets, comma-separated, or all (default: the one in use)',
    },
    threads: { type: 'string', value: 'N', help: 'threads of heddle and of the peers (default: all)' },
    time: { type: 'string', value: 'S', help: 'seconds per case and entrant (default: 1)' },
    seed: SEED_OPTION,
    buffer: {
      type: 'string',
      value: 'MIB',
      help: 'buffer for the bandwidth peaks (default: 4 × the last-level cache, at most 1024)',
    },
    study: {
      type: 'boolean',
      help: 'bench video --study: time and memory of ways to make long videos cheaper, beside what arithmetic predicts',
    },
    frames: {
      type: 'string',
      value: 'N',
      help: 'with --study: most frames (default: 256; 16 takes a minute)',
    },
    json: { type: 'string', value: 'FILE', help: 'also writes the result as JSON' },
    svg: {
      type: 'string',
      value: 'FILE',
      help: 'also draws the rows with operations and bytes below the roofline',
    },
  },
  async run(values, [family], context) {
    const { io } = context;
    const seed = seedOf(values);
    const threads = numberOption(values, 'threads', { min: 1, max: 256, integer: true }, info().threads);
    if (values['study'] === true) {
      if (family !== 'video') throw new UsageError("--study needs the family 'video'");
      const { runStudy } = await import('./videoStudy.ts');
      const frames = numberOption(values, 'frames', { min: 16, max: 4096, integer: true }, 256);
      const [json, svg] = [values['json'], values['svg']].map((f) =>
        f === undefined ? undefined : String(f),
      );
      return runStudy({ frames, threads, json, svg }, context);
    }
    if (values['frames'] !== undefined) throw new UsageError('--frames needs --study');
    const seconds = numberOption(values, 'time', { min: 0.01, max: 3600 }, 1);
    const variants = selectVariants(values, io, (native) => native.filter((v) => isaOf(v) === info().isa));
    const cases = selectCases(context.cases, family, values['filter']).filter((c) => c.bench);
    if (cases.length === 0) throw new UsageError('no benchmark case matches');
    io.out(`seed ${seed}`);
    const bufferBytes =
      values['buffer'] === undefined
        ? undefined
        : numberOption(values, 'buffer', { min: 2, max: 2 ** 20, integer: true }, 0) * 2 ** 20;
    const peers = values['peers'] === true;
    const plan = { cases, variants, threads, seconds, seed, peers, bufferBytes };
    const report = await runBench(plan, context);
    if (values['json'] !== undefined) {
      writeFileSync(String(values['json']), `${JSON.stringify(report, null, 2)}\n`);
    }
    if (values['svg'] !== undefined) {
      const svg =
        report.peaks && rooflineSvg(report.rows, report.peaks, `heddle ${report.package} on ${report.cpu}`);
      if (svg) writeFileSync(String(values['svg']), svg);
      else io.out('no picture: no row has both operations and bytes');
    }
    return missesOf(report) === 0 ? 0 : 1;
  },
};
