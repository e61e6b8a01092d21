// Two workers compute at once, and the main thread with them; every result is compared with the reference's.
import { isMainThread, parentPort, Worker, workerData } from 'node:worker_threads';
import { makeLogits, routeTopK, routeTopKSync, sameRouting } from './common.mjs';

async function compute(seed, rounds) {
  let right = 0;
  for (let r = 0; r < rounds; r++) {
    const logits = makeLogits(64 + r, 60, seed * 100 + r);
    const options = { k: 6, normalize: true };
    const results = await Promise.all([1, 2, 4].map((threads) => routeTopK(logits, { ...options, threads })));
    results.push(routeTopKSync(logits, { ...options, threads: 2 }));
    const ids = routeTopKSync(logits, { ...options, backend: 'reference' }).indices.data;
    right += results.every(
      (x) => sameRouting(x, results[0]) && ids.every((id, i) => id === x.indices.data[i]),
    );
  }
  return right;
}

if (isMainThread) {
  const rounds = 40;
  const workers = [1, 2].map((seed) => {
    const worker = new Worker(new URL(import.meta.url), { workerData: { seed, rounds } });
    return new Promise((resolve, reject) => {
      worker.on('message', resolve);
      worker.on('error', reject);
    });
  });
  const right = await Promise.all([compute(3, rounds), ...workers]);
  console.log(JSON.stringify({ right, rounds }));
} else {
  parentPort.postMessage(await compute(workerData.seed, workerData.rounds));
}
