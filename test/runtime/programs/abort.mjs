// Aborts a running job again and again: it must reject within a tile, with the reason, and compute no further.
import { makeLogits, routeTopK, slow, slowExperts, slowTile } from './common.mjs';

const rows = 1500;
const logits = makeLogits(rows, slowExperts);
const started = performance.now();
await routeTopK(logits, { ...slow, threads: 1 });
const whole = performance.now() - started;
const delays = [];
let wrong = 0;
for (let i = 0; i < 10; i++) {
  const controller = new AbortController();
  const job = routeTopK(logits, { ...slow, threads: 1 + (i % 2), signal: controller.signal });
  job.catch(() => {});
  await new Promise((resolve) => setTimeout(resolve, 20));
  const reason = new Error(`abort ${i}`);
  const asked = performance.now();
  controller.abort(reason);
  try {
    await job;
    wrong++;
  } catch (error) {
    delays.push(performance.now() - asked);
    if (error.code !== 'ERR_ABORTED' || error.cause !== reason) wrong++;
  }
}
delays.sort((a, b) => a - b);
console.log(
  JSON.stringify({ whole, tile: (whole / rows) * slowTile, median: delays[5], worst: delays[9], wrong }),
);
