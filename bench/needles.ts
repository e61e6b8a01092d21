/**
 * Needles in ten million keys: build with `npx esbuild bench/needles.ts --bundle --platform=node
 * --format=esm --packages=external --outfile=build/needles.mjs`, run `node build/needles.mjs [keys] [result.json]`. What is done is said in
 * test/helpers/needles.ts: one pass over the keys answers all cells, each length being a stream that ends there.
 */
import { writeFileSync } from 'node:fs';
import { cpus } from 'node:os';
import { info } from '../lib/backend.ts';
import { BLOCK, DIM, equalKeysError, findNeedles } from '../test/helpers/needles.ts';

const keys = Number(process.argv[2] ?? 10_000_000);
const file = process.argv[3];
const threads = Math.min(2, cpus().length);
const lengths = Array.from({ length: 20 }, (_, i) => Math.floor((keys * (i + 1)) / 20));
const depths = Array.from({ length: 10 }, (_, i) => i / 9);
const started = performance.now();
let shown = 0;
const r = await findNeedles(lengths, depths, 99, {
  threads,
  onProgress(tokens) {
    if (tokens < shown) return;
    shown += keys / 10;
    console.error(`${tokens} keys, ${((performance.now() - started) / 1000).toFixed(0)} s`);
  },
});
const alone = await findNeedles([keys], [0.5], 0, { threads });
const equal = await equalKeysError(keys, { threads });
const rows = lengths.reduce((sum, l) => sum + l * depths.length, 0) + keys * (r.planted.count + 1);
const flops = 4 * DIM * rows;
const computing = r.seconds - r.generatingSeconds;
const report = {
  format: 'heddle-needles',
  version: 1,
  date: new Date().toISOString(),
  processor: cpus()[0]?.model,
  node: process.version,
  isa: info().isa,
  threads,
  head: { queryHeads: 1, dim: DIM, type: 'float32', blockTokens: BLOCK },
  method:
    'One pass over random keys made from counters. 200 cells: a stream per length (20, a twentieth of the keys apart) with one query for each of 10 depths sees the keys before its length; all 200 needles and the planted ones lie in the same keys. "seconds" is that pass with all its queries, generation and a float64 softmax of one query in JavaScript included ("generatingSeconds").',
  keys,
  cells: {
    count: r.cells.length,
    wrong: r.wrong,
    columns: 'length, depth, index, found, weight',
    detail: r.cells.map((c) => Object.values(c)),
  },
  planted: r.planted,
  single: r.single,
  equalKeys: { keys, error: equal, bound: 1e-6 },
  rssGrowthMiB: r.rssGrowthMiB,
  seconds: r.seconds,
  generatingSeconds: r.generatingSeconds,
  gflopsPerSecond: flops / computing / 1e9,
  threeQueries: {
    seconds: alone.seconds,
    generatingSeconds: alone.generatingSeconds,
    keysPerSecond: keys / alone.seconds,
    rssGrowthMiB: alone.rssGrowthMiB,
  },
};
console.log(JSON.stringify({ ...report, cells: { ...report.cells, detail: undefined } }, null, 2));
if (file !== undefined) writeFileSync(file, `${JSON.stringify(report, null, 1)}\n`);
const good =
  r.wrong === 0 &&
  r.planted.recovered === r.planted.count &&
  r.single.relativeError < 1e-4 &&
  equal < 1e-6 &&
  r.rssGrowthMiB <= 64;
if (!good) {
  console.error('a bound is missed');
  process.exitCode = 1;
}
