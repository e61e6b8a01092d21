// Workers are ended in mid-run, many times, in different ways; afterwards the process still computes rightly.
//   argv[2]: terminate (worker.terminate()) | exit (process.exit() inside) | throw | return (jobs nobody awaits)
import { isMainThread, parentPort, Worker, workerData } from 'node:worker_threads';
import { makeLogits, routeTopK, routeTopKSync, sameRouting, slow, slowExperts } from './common.mjs';

if (isMainThread) {
  const way = process.argv[2];
  const rounds = Number(process.argv[3]);
  const logits = makeLogits(50, 300);
  const before = routeTopKSync(logits, { k: 8 });
  let slowest = 0;
  for (let r = 0; r < rounds; r++) {
    const worker = new Worker(new URL(import.meta.url), { workerData: { way, r } });
    const ended = new Promise((resolve) => worker.on('exit', resolve));
    worker.on('error', () => {});
    await new Promise((resolve) => worker.once('message', resolve));
    // The main thread has jobs of its own in the same pool while the worker ends.
    const own = Promise.all([1, 2, 3].map(() => routeTopK(logits, { k: 8 })));
    await new Promise((resolve) => setTimeout(resolve, (r * 7) % 23));
    const started = performance.now();
    if (way === 'terminate') await worker.terminate();
    await ended;
    slowest = Math.max(slowest, performance.now() - started);
    for (const result of await own)
      if (!sameRouting(result, before)) throw new Error(`round ${r}: wrong result`);
  }
  const right = sameRouting(await routeTopK(logits, { k: 8 }), before);
  console.log(JSON.stringify({ right, rounds, slowest }));
} else {
  const logits = makeLogits(400, slowExperts, workerData.r + 1);
  for (let i = 0; i < 6; i++) routeTopK(logits, { ...slow, threads: 1 + (i % 3) }).catch(() => {});
  parentPort.postMessage('queued');
  const { way, r } = workerData;
  const later = () => new Promise((resolve) => setTimeout(resolve, (r * 5) % 17));
  if (way === 'terminate') await routeTopK(logits, slow);
  if (way === 'exit') {
    await later();
    process.exit(0);
  }
  if (way === 'throw') {
    await later();
    throw new Error('on purpose');
  }
}
