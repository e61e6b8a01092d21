// A worker whose job waits behind long jobs of the main thread is terminated: it need not wait for them.
import { isMainThread, parentPort, Worker } from 'node:worker_threads';
import { makeLogits, routeTopK, slow, slowExperts } from './common.mjs';

if (isMainThread) {
  const worker = new Worker(new URL(import.meta.url));
  await new Promise((resolve) => worker.once('message', resolve));
  const logits = makeLogits(600, slowExperts);
  const started = performance.now();
  const own = Promise.all([1, 2, 3, 4].map(() => routeTopK(logits, { ...slow, threads: 1 })));
  worker.postMessage('go');
  await new Promise((resolve) => worker.once('message', resolve));
  const asked = performance.now();
  await worker.terminate();
  const ended = performance.now();
  await own;
  console.log(JSON.stringify({ terminate: ended - asked, own: performance.now() - started }));
} else {
  parentPort.once('message', () => {
    routeTopK(makeLogits(10, slowExperts), slow);
    parentPort.postMessage('queued');
  });
  parentPort.postMessage('ready');
}
