// Lateness of a 5 ms interval while long jobs run: argv[2] one (a single long job) | many (a queue of them). Another
// process, which computes nothing, keeps the same interval: how late that is, the machine is at fault for.
import { fork } from 'node:child_process';
import { makeLogits, routeTopK, slow, slowExperts } from './common.mjs';

const PERIOD = 5;

/** Starts the interval; stop() says how late the latest tick was. */
function watch() {
  let last = performance.now();
  let late = 0;
  let ticks = 0;
  const timer = setInterval(() => {
    const now = performance.now();
    late = Math.max(late, now - last - PERIOD);
    last = now;
    ticks++;
  }, PERIOD);
  return () => {
    clearInterval(timer);
    return { late: Math.max(late, performance.now() - last - PERIOD), ticks };
  };
}

const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

async function measure(way) {
  const idle = fork(new URL(import.meta.url), ['idle']);
  const answer = () => new Promise((resolve) => idle.once('message', resolve));
  await answer();
  const logits = makeLogits(way === 'one' ? 2500 : 250, slowExperts);
  await routeTopK(logits, { k: 1 });
  await wait(30);

  idle.send('start');
  await answer();
  const stop = watch();
  const started = performance.now();
  const jobs = Array.from({ length: way === 'one' ? 1 : 10 }, () => routeTopK(logits, slow));
  await Promise.all(jobs);
  const duration = performance.now() - started;
  const { late, ticks } = stop();
  idle.send('stop');
  const control = await answer();
  idle.disconnect();
  console.log(JSON.stringify({ late, ticks, duration, idleLate: control.late }));
}

if (process.argv[2] === 'idle') {
  let stop;
  process.on('message', (message) => {
    if (message === 'start') stop = watch();
    process.send(message === 'start' ? 'started' : stop());
  });
  process.send('ready');
} else {
  await measure(process.argv[2]);
}
