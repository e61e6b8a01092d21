import { SingleBar } from 'cli-progress';
import type { Io } from './command.ts';

export interface Progress {
  /** Says what is being done now. */
  note(text: string): void;
  /** One unit of work is over. */
  step(): void;
  stop(): void;
}

/** A bar (on standard error) on a terminal; elsewhere a plain line at every tenth of the work. */
export function startProgress(io: Io, label: string, total: number): Progress {
  if (io.tty) {
    const bar = new SingleBar({
      format: `${label} {bar} {value}/{total} {note}`,
      barsize: 24,
      barCompleteChar: '█',
      barIncompleteChar: '░',
      hideCursor: true,
      clearOnComplete: true,
    });
    bar.start(total, 0, { note: '' });
    return {
      note: (text) => bar.update({ note: text.slice(0, 60) }),
      step: () => bar.increment(),
      stop: () => bar.stop(),
    };
  }
  let done = 0;
  let told = 0;
  return {
    note() {},
    step() {
      done++;
      const tenth = Math.floor((10 * done) / total);
      if (tenth > told) io.err(`${label}: ${done} of ${total}`);
      told = tenth;
    },
    stop() {},
  };
}
