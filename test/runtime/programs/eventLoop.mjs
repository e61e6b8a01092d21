// Lateness of a 5 ms interval while long jobs run: argv[2] one (a single long job) | many (a queue of them).
import { makeLogits, routeTopK, slow, slowExperts } from './common.mjs';

const logits = makeLogits(process.argv[2] === 'one' ? 2500 : 250, slowExperts);
await routeTopK(logits, { k: 1 });
const jobs = process.argv[2] === 'one' ? 1 : 10;

let last = performance.now();
let late = 0;
let ticks = 0;
const timer = setInterval(() => {
  const now = performance.now();
  late = Math.max(late, now - last - 5);
  last = now;
  ticks++;
}, 5);
await new Promise((resolve) => setTimeout(resolve, 30));
late = 0;
ticks = 0;
const started = performance.now();
const running = Array.from({ length: jobs }, () => routeTopK(logits, slow));
const queueing = performance.now() - started;
await Promise.all(running);
const duration = performance.now() - started;
clearInterval(timer);
console.log(JSON.stringify({ late, ticks, duration, queueing }));
