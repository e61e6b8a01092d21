// Peak resident memory of a piece of work, from Linux's own high-water mark.
import { readFileSync, writeFileSync } from 'node:fs';

function status(name) {
  const line = readFileSync('/proc/self/status', 'utf8').match(new RegExp(`^${name}:\\s+(\\d+) kB`, 'm'));
  return Number(line[1]) * 1024;
}

/** Bytes by which resident memory rose above its level before `work`, at any moment of it. */
export async function peakGrowth(work) {
  globalThis.gc?.();
  writeFileSync('/proc/self/clear_refs', '5'); // the high-water mark starts again from what is resident
  const before = status('VmRSS');
  await work();
  return status('VmHWM') - before;
}

/** Whether the high-water mark can be read and reset here. */
export function canMeasure() {
  try {
    writeFileSync('/proc/self/clear_refs', '5');
    return status('VmHWM') > 0;
  } catch {
    return false;
  }
}
