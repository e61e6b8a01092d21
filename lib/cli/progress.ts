import { SingleBar } from 'cli-progress';
import type { Io } from './command.ts';

export interface Progress {
  /** Says what is being done now. */
  note(text: string): void;
  /** Units of work are over; default 1. */
  step(units?: number): void;
  stop(): void;
}

/** How long the rest of the work takes at the pace so far. */
function remaining(done: number, total: number, start: number): string {
  const seconds = ((performance.now() - start) / 1000) * (total / done - 1);
  if (seconds < 1) return '';
  return seconds < 90
    ? `, about ${Math.ceil(seconds)} s left`
    : `, about ${Math.ceil(seconds / 60)} min left`;
}

/** A bar (on standard error) on a terminal; elsewhere a plain line at every tenth of the work, with an estimate. */
export function startProgress(io: Io, label: string, total: number): Progress {
  const start = performance.now();
  let done = 0;
  if (io.tty) {
    const bar = new SingleBar({
      format: `${label} {bar} {value}/{total}{left} {note}`,
      barsize: 24,
      barCompleteChar: '█',
      barIncompleteChar: '░',
      hideCursor: true,
      clearOnComplete: true,
    });
    bar.start(total, 0, { note: '', left: '' });
    return {
      note: (text) => bar.update({ note: text.slice(0, 60) }),
      step(units = 1) {
        done += units;
        bar.increment(units, { left: remaining(done, total, start) });
      },
      stop: () => bar.stop(),
    };
  }
  let told = 0;
  return {
    note() {},
    step(units = 1) {
      done += units;
      const tenth = Math.floor((10 * done) / total);
      if (tenth > told) io.err(`${label}: ${done} of ${total}${remaining(done, total, start)}`);
      told = tenth;
    },
    stop() {},
  };
}
