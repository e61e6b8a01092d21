import { beforeAll, describe, expect, it } from 'vitest';
import { info } from '../../lib/index.ts';
import { requireDist, runProgram } from '../helpers/program.ts';

// Each program is a Node process of its own on the built package: a crash or a hang is then one failing test. They
// run on the scalar code, where a moderate input already takes long.
const { cpu } = info().backends;
if (!cpu.available) console.log(`runtime tests skipped: ${cpu.reason}`);
const native = describe.skipIf(!cpu.available);

const env = { HEDDLE_ISA: 'scalar' };
const program = <T>(name: string, args: string[] = [], extra: Record<string, string> = {}) =>
  runProgram<T>(name, args, { env: { ...env, ...extra }, nodeArgs: ['--expose-gc'] });

beforeAll(requireDist);

native('worker threads', () => {
  it('two workers and the main thread compute at once and are right', async () => {
    const { right, rounds } = await program<{ right: number[]; rounds: number }>('workers.mjs');
    expect(right).toEqual([rounds, rounds, rounds]);
  });

  it.each([
    ['terminated', 'terminate'],
    ['calling process.exit', 'exit'],
    ['throwing', 'throw'],
  ])('20 workers %s in mid-run leave the process healthy', async (_, way) => {
    const r = await program<{ right: boolean; slowest: number }>('terminate.mjs', [way, '20']);
    expect(r.right).toBe(true);
    // Six jobs of about 300 ms were queued: none is finished first.
    expect(r.slowest).toBeLessThan(300);
  });

  it('a worker whose jobs nobody awaits finishes them before it ends', async () => {
    const r = await program<{ right: boolean; slowest: number }>('terminate.mjs', ['return', '1']);
    expect(r.right).toBe(true);
    expect(r.slowest).toBeGreaterThan(100);
  });

  it('a terminated worker does not wait for the jobs of others', { retry: 3 }, async () => {
    const r = await program<{ terminate: number; own: number }>('terminateBehind.mjs');
    expect(r.own).toBeGreaterThan(500);
    expect(r.terminate).toBeLessThan(r.own / 4);
  });
});

native('the end of the process', () => {
  it.each([
    ['idle: prompt', 'idle', {}],
    ['with jobs in flight that nobody awaits: after they are done', 'flight', {}],
    ['with one thread for many jobs', 'flight', { HEDDLE_THREADS: '1' }],
  ])('%s', { retry: 3 }, async (_, way, extra) => {
    const r = await program<{ at: number; done?: number }>(
      'exit.mjs',
      [way],
      extra as Record<string, string>,
    );
    if (way === 'flight') expect(r.done).toBe(3);
    expect(r.milliseconds).toBeLessThan(5000);
  });

  it('process.exit with seconds of jobs in flight: they are cancelled', { retry: 3 }, async () => {
    const r = await program('exit.mjs', ['exit']);
    expect(r.milliseconds).toBeLessThan(4000); // twenty jobs of about a second were queued
  });
});

native('the event loop', () => {
  // This machine is shared. An attempt in which a process that computes nothing was late as well says nothing about
  // heddle and is repeated; four attempts in which only heddle's process was late fail.
  it.for(['one', 'many'])(
    'a 5 ms interval is at most 10 ms late beside long jobs: %s',
    { timeout: 120_000 },
    async (how, { skip }) => {
      const seen: { late: number; idleLate: number }[] = [];
      let ours = 0;
      for (let attempt = 0; attempt < 10; attempt++) {
        const r = await program<{ late: number; ticks: number; duration: number; idleLate: number }>(
          'eventLoop.mjs',
          [how],
        );
        expect(r.duration).toBeGreaterThan(200);
        if (r.late <= 10) {
          expect(r.ticks).toBeGreaterThan(r.duration / 15);
          return;
        }
        seen.push({ late: Math.round(r.late), idleLate: Math.round(r.idleLate) });
        if (r.idleLate <= 8 && ++ours === 4) break;
      }
      if (ours >= 4) expect.fail(`late in ms, beside an idle process: ${JSON.stringify(seen)}`);
      console.log(`event loop test skipped: the machine is too busy, in ms: ${JSON.stringify(seen)}`);
      skip();
    },
  );
});

native('abort', () => {
  it('of a running job rejects within a tile, with its reason', { retry: 3 }, async () => {
    const r = await program<{ whole: number; tile: number; median: number; worst: number; wrong: number }>(
      'abort.mjs',
    );
    expect(r.wrong).toBe(0);
    expect(r.whole).toBeGreaterThan(200);
    expect(r.median).toBeLessThanOrEqual(r.tile + 5); // a tile, and the way back to a busy thread
    expect(r.worst).toBeLessThan(r.whole / 4);
  });
});

native('memory', () => {
  it('does not grow over 12,000 calls, and inputs are released', { timeout: 120_000 }, async () => {
    interface Memory {
      rss: number;
      heapUsed: number;
      external: number;
      arrayBuffers: number;
    }
    const r = await program<{ before: Memory; after: Memory; wrong: number; collected: boolean }>('leak.mjs');
    const mebibyte = 2 ** 20;
    expect(r.wrong).toBe(0);
    expect(r.collected).toBe(true);
    expect(r.after.heapUsed - r.before.heapUsed).toBeLessThan(mebibyte);
    expect(r.after.external - r.before.external).toBeLessThan(mebibyte);
    expect(r.after.arrayBuffers - r.before.arrayBuffers).toBeLessThan(mebibyte);
    expect(r.after.rss - r.before.rss).toBeLessThan(48 * mebibyte); // the outputs alone are 190 MiB
  });
});
