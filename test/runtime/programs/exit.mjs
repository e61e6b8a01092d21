// How the process ends. argv[2]: idle (after finished jobs) | flight (jobs nobody waits for are finished first) |
// exit (process.exit() with jobs in flight).
import { makeLogits, routeTopK, slow, slowExperts } from './common.mjs';

const way = process.argv[2];
if (way === 'idle') {
  await Promise.all([1, 2, 3].map(() => routeTopK(makeLogits(100, 64), { k: 4 })));
  console.log(JSON.stringify({ at: Date.now() }));
}
if (way === 'flight') {
  let done = 0;
  for (let i = 0; i < 3; i++) {
    routeTopK(makeLogits(100, slowExperts), slow).then(() => {
      if (++done === 3) console.log(JSON.stringify({ at: Date.now(), done }));
    });
  }
}
if (way === 'exit') {
  for (let i = 0; i < 20; i++) routeTopK(makeLogits(1000, slowExperts), { ...slow, threads: 1 + (i % 2) });
  setTimeout(() => {
    console.log(JSON.stringify({ at: Date.now() }));
    process.exit(0);
  }, 50);
}
