// Many calls of each kind: memory after each batch must stop growing, and results stay order-independent.
import { makeLogits, routeTopK, routeTopKSync, sameRouting } from './common.mjs';

const logits = makeLogits(256, 128);
const expected = routeTopKSync(logits, { k: 8 });
let wrong = 0;

async function batch() {
  for (let i = 0; i < 300; i++) routeTopKSync(logits, { k: 8 });
  for (let i = 0; i < 30; i++) {
    const controller = new AbortController();
    const jobs = Array.from({ length: 10 }, (_, j) =>
      routeTopK(logits, { k: 8, threads: 1 + (j % 3), signal: j % 5 === 0 ? controller.signal : undefined }),
    );
    if (i % 2 === 0) controller.abort();
    for (const [j, r] of (await Promise.allSettled(jobs)).entries()) {
      if (r.status === 'fulfilled' ? !sameRouting(r.value, expected) : j % 5 !== 0) wrong++;
    }
    try {
      routeTopKSync(logits, { k: 500 });
    } catch {}
  }
}

async function measure() {
  for (let i = 0; i < 3; i++) {
    globalThis.gc();
    await new Promise((resolve) => setImmediate(resolve));
  }
  const { rss, heapUsed, external, arrayBuffers } = process.memoryUsage();
  return { rss, heapUsed, external, arrayBuffers };
}

for (let i = 0; i < 8; i++) await batch();
const before = await measure();
for (let i = 0; i < 20; i++) await batch();
const after = await measure();
// What a job holds is released: an input that is used by nobody else is collected.
let collected = false;
const registry = new FinalizationRegistry(() => {
  collected = true;
});
await (async () => {
  const own = makeLogits(64, 64);
  registry.register(own.data, null);
  await routeTopK(own, { k: 2 });
})();
for (let i = 0; i < 20 && !collected; i++) {
  await measure();
  await new Promise((resolve) => setTimeout(resolve, 5));
}
console.log(JSON.stringify({ before, after, wrong, collected }));
