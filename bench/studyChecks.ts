import type { StudyPoint } from './studyPlot.ts';

/** What the arithmetic promises of the study's longest clips, and what was measured. */
export interface StudyCheck {
  /** What is compared, in words. */
  what: string;
  unit: 'ratio' | 'bytes';
  predicted: number;
  measured: number;
  /** The measurement may be off by this factor, or must be at least the prediction. */
  bound: number | 'at least';
  holds: boolean;
}

export interface CheckedPoint extends StudyPoint {
  flops: number;
  skipped?: string;
}

/** Times relative to joint attention are held within this factor of the ratio of operations. */
const TIME_BOUND = 1.5;
/** Memory within this factor of the prediction. */
const MEMORY_BOUND = 1.25;
/** By how much 75 % masking must reduce time and memory. */
const LEAST_FALL = 3.5;

const RELATIVE_TO_JOINT = ['ViViT 3', 'ViViT 4', 'joint, 75 % masked', 'ViViT 3, 75 % tube masked'];
const MASKED = [
  ['joint', 'joint, 75 % masked'],
  ['ViViT 3', 'ViViT 3, 75 % tube masked'],
] as const;

function within(
  what: string,
  unit: StudyCheck['unit'],
  predicted: number,
  measured: number,
  bound: number,
): StudyCheck {
  const off = measured / predicted;
  return { what, unit, predicted, measured, bound, holds: off <= bound && off >= 1 / bound };
}

function fall(what: string, measured: number): StudyCheck {
  const holds = measured >= LEAST_FALL;
  return { what, unit: 'ratio', predicted: LEAST_FALL, measured, bound: 'at least', holds };
}

/** Checks of the rows with the most frames; those without a measurement are left out. */
export function studyChecks(rows: readonly CheckedPoint[]): StudyCheck[] {
  const frames = Math.max(...rows.map((r) => r.frames));
  const measured = rows.filter((r) => r.frames === frames && !r.skipped && !/ tuned$/.test(r.variant));
  const find = (name: string) => measured.find((r) => r.variant === name);
  const checks: StudyCheck[] = [];
  const joint = find('joint');
  for (const name of RELATIVE_TO_JOINT) {
    const r = find(name);
    if (joint === undefined || r === undefined) continue;
    const [predicted, found] = [joint.flops / r.flops, joint.seconds / r.seconds];
    checks.push(within(`${name}: faster than joint`, 'ratio', predicted, found, TIME_BOUND));
  }
  for (const r of measured) {
    checks.push(within(`${r.variant}: memory`, 'bytes', r.predictedBytes, r.bytes, MEMORY_BOUND));
  }
  for (const [whole, part] of MASKED) {
    const [a, b] = [find(whole), find(part)];
    if (a === undefined || b === undefined) continue;
    checks.push(fall(`${part}: time falls`, a.seconds / b.seconds));
    checks.push(fall(`${part}: memory falls`, a.bytes / b.bytes));
  }
  return checks;
}
