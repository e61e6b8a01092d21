import { execFile } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { freemem } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { runInfo } from '../../bench/report.ts';
import { type StudyCheck, studyChecks } from '../../bench/studyChecks.ts';
import { type StudyPoint, studySvg } from '../../bench/studyPlot.ts';
import {
  ADAPTATION_VARIANTS,
  measureStudy,
  predictStudy,
  STUDY_VARIANTS,
  type StudyMeasurement,
  type StudyVariant,
} from '../../bench/videoStudy.ts';
import { packageRoot } from '../backend.ts';
import type { Context, Io } from './command.ts';
import { formatBytes, formatRatio, formatTable, formatTime } from './format.ts';
import { startProgress } from './progress.ts';

/** Set in the child that measures one variant: what `runStudy` sends. */
const CHILD = 'HEDDLE_STUDY_CHILD';
/** Adaptation keeps activations of eight layers: clips of this many frames at most. */
const ADAPTATION_FRAMES = 16;

export interface StudyPlan {
  /** Most frames; powers of two from 16. */
  frames: number;
  threads: number;
  json?: string;
  svg?: string;
}

interface StudyRow extends StudyPoint {
  tokens: number;
  flops: number;
  /** Joint attention's time and operations over this variant's. */
  speedup?: number;
  predictedSpeedup?: number;
  /** Why there is no measurement. */
  skipped?: string;
}

/** glibc gives large blocks back when they are freed: what the weights took to make must not hide a forward's growth. */
const RETURN_FREED = { MALLOC_MMAP_THRESHOLD_: '131072', MALLOC_TRIM_THRESHOLD_: '131072' };

/** Measures one variant in a process of its own, whose memory grows by nothing else. */
async function inChild(variant: StudyVariant, frames: number, threads: number): Promise<StudyMeasurement> {
  const main = join(packageRoot(), 'dist', 'cli', 'main.js');
  const { stdout } = await promisify(execFile)(
    process.execPath,
    ['--expose-gc', main, 'bench', 'video', '--study'],
    { env: { ...process.env, ...RETURN_FREED, [CHILD]: JSON.stringify({ variant, frames, threads }) } },
  );
  return JSON.parse(stdout);
}

function row(r: StudyRow): string[] {
  return [
    String(r.frames),
    r.variant,
    String(r.tokens),
    (r.flops / 1e9).toFixed(0),
    r.skipped ?? formatTime(r.seconds),
    r.skipped ? '' : (r.flops / r.seconds / 1e9).toFixed(0),
    r.speedup ? formatRatio(r.speedup) : '',
    r.predictedSpeedup ? formatRatio(r.predictedSpeedup) : '',
    r.skipped ? '' : formatBytes(r.bytes),
    formatBytes(r.predictedBytes),
  ];
}

/** One check: predicted, measured, whether it holds. */
function checkLine(c: StudyCheck): string {
  const format = c.unit === 'bytes' ? formatBytes : formatRatio;
  const predicted =
    c.bound === 'at least' ? `at least ${format(c.predicted)}` : `predicted ${format(c.predicted)}`;
  const bound = c.bound === 'at least' ? '' : `, bound ${formatRatio(c.bound)}`;
  return `${c.holds ? 'holds' : 'FAILS'}  ${c.what}: ${predicted}, measured ${format(c.measured)}${bound}`;
}

const HEAD = [
  'frames',
  'variant',
  'tokens',
  'GFLOP',
  'time',
  'GFLOP/s',
  '× joint',
  'predicted',
  'memory',
  'predicted',
];

async function studyRows(plan: StudyPlan, io: Io): Promise<StudyRow[]> {
  const lengths: number[] = [];
  for (let f = 16; f <= plan.frames; f *= 2) lengths.push(f);
  const jobs = lengths.flatMap((frames) => [
    ...STUDY_VARIANTS.map((variant) => ({ frames, variant })),
    ...(frames <= ADAPTATION_FRAMES ? ADAPTATION_VARIANTS.map((variant) => ({ frames, variant })) : []),
  ]);
  // Time goes with operations, and a process takes as long to start as some 100 of these.
  const work = (flops: number) => Math.ceil(flops / 1e9) + 100;
  const predictions = jobs.map(({ frames, variant }) => predictStudy(variant, frames));
  const total = predictions.reduce((sum, p) => sum + work(p.flops), 0);
  io.err(`study: ${jobs.length} measurements, ${(total / 1000).toFixed(1)} TFLOP`);
  const progress = startProgress(io, 'study, GFLOP', total);
  const rows: StudyRow[] = [];
  try {
    for (const [i, { frames, variant }] of jobs.entries()) {
      progress.note(`${frames} frames, ${variant.name}`);
      const predicted = predictions[i];
      const known = { variant: variant.name, frames, tokens: predicted.tokens, flops: predicted.flops };
      const base = { ...known, predictedBytes: predicted.bytes, predictedSeconds: 0, seconds: 0, bytes: 0 };
      // The weights, the frames and the process itself come on top.
      const short = predicted.bytes * 1.3 + 2e8 > freemem();
      if (short) rows.push({ ...base, skipped: 'too little memory' });
      else rows.push({ ...base, ...(await inChild(variant, frames, plan.threads)) });
      progress.step(work(predicted.flops));
    }
  } finally {
    progress.stop();
  }
  predict(rows);
  return rows;
}

/** Adds what follows from the first row of each length, joint attention, and from the run's best rate. */
function predict(rows: StudyRow[]): void {
  const rate = Math.max(...rows.map((r) => (r.skipped ? 0 : r.flops / r.seconds)));
  for (const r of rows) {
    r.predictedSeconds = rate > 0 ? r.flops / rate : 0;
    const joint = rows.find((j) => j.frames === r.frames && j.variant === 'joint');
    if (joint === undefined || r === joint || / tuned$/.test(r.variant)) continue;
    r.predictedSpeedup = joint.flops / r.flops;
    if (!joint.skipped && !r.skipped) r.speedup = joint.seconds / r.seconds;
  }
}

/** `heddle bench video --study`: the exit code. */
export async function runStudy(plan: StudyPlan, { io }: Context): Promise<number> {
  const asked = process.env[CHILD];
  if (asked !== undefined) {
    const { variant, frames, threads } = JSON.parse(asked);
    io.out(JSON.stringify(await measureStudy(variant, frames, threads)));
    return 0;
  }
  const rows = await studyRows(plan, io);
  const head = runInfo(1, plan.threads);
  io.out('one layer, 768 wide, 12 heads, 224 x 224 pixels, 256 patches per frame, float32');
  io.out(formatTable(HEAD, rows.map(row), io.tty, [0, 2, 3, 4, 5, 6, 7, 8, 9]));
  io.out('× joint: its time over the variant’s, beside the ratio of operations. Memory: growth at its peak.');
  const checks = studyChecks(rows);
  for (const line of checks.map(checkLine)) io.out(line);
  if (plan.json) {
    const file = { format: 'heddle-video-study', ...head, rows, checks };
    writeFileSync(plan.json, `${JSON.stringify(file, null, 2)}\n`);
  }
  if (plan.svg) {
    const shown = rows.filter((r) => !r.skipped && !/ tuned$/.test(r.variant));
    writeFileSync(
      plan.svg,
      studySvg(shown, `One video layer of base size on ${head.cpu}, ${plan.threads} threads`),
    );
  }
  return 0;
}
