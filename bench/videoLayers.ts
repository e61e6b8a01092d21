/**
 * Where the time of a video layer goes: every native call of a forward timed by itself, beside its floor, and the rest,
 * which is TypeScript. Build with `npx esbuild bench/videoLayers.ts --bundle --platform=node --format=esm
 * --packages=external --outfile=build/videoLayers.mjs`, run `node build/videoLayers.mjs [ViViT-B|TimeSformer-B]
 * [float32|bfloat16|int8] [rounds] [GFLOP/s of the machine's multiply-adds]`.
 */
import type { VideoWeightType } from '../lib/attention/video/index.ts';
import { VideoEncoder } from '../lib/attention/video/index.ts';
import type { Steps } from '../lib/checkpoint/steps.ts';
import { BASE_MODELS, randomFrames, randomTensors } from '../test/cases/attention/videoEncoder.ts';
import { Random } from '../test/cases/random.ts';
import { median } from './harness.ts';

const [name = 'ViViT-B', type = 'float32', rounds = '9', peak = '350'] = process.argv.slice(2);
const threads = 2;

/** The calls of a layer with their operations; n rows, s of attention over space with its class tokens. */
function callsOf(model: string): [string, number][] {
  const d = 768;
  const product = (rows: number, outputs: number, inputs = d) => 2 * rows * outputs * inputs;
  const mlp = (rows: number) => 4 * rows * d * 4 * d;
  if (model === 'ViViT-B') {
    const n = 3137;
    return [
      ['embedding', product(n - 1, d, 1536)],
      ['norm, query, key, value', product(n, 3 * d)],
      ['attention', 4 * n * n * d],
      ['output, residual', product(n, d)],
      ['norm, MLP, residual', mlp(n)],
      ['last norm', 0],
    ];
  }
  const [n, s] = [1568, 8 * 197];
  const merged: [string, number][] = [['time: output, residual', product(n, type === 'float32' ? d : 2 * d)]];
  return [
    ['embedding', product(n, d)],
    ['time: norm, query, key, value', product(n, 3 * d)],
    ['time: attention', 4 * 196 * 8 * 8 * d],
    ...merged,
    ['space: norm, query, key, value', product(s, 3 * d)],
    ['space: attention', 4 * s * 197 * d],
    ['space: output, residual', product(s, d)],
    ['space: class tokens', product(1, d)],
    ['norm, MLP, residual', mlp(n + 1)],
    ['last norm', 0],
  ];
}

const config = BASE_MODELS[name].config;
const encoder = VideoEncoder.createSync(config, randomTensors(config, new Random(1)), {
  type: type as VideoWeightType,
});
const frames = randomFrames(config, 1, new Random(2));
const calls = callsOf(name);
const times: number[][] = [];
const whole: number[] = [];
for (let round = 0; round < Number(rounds) + 2; round++) {
  const start = performance.now();
  const steps = (encoder as unknown as { steps(f: unknown, o: object): Steps<unknown> }).steps(frames, {
    threads,
  });
  let at = 0;
  for (let next = steps.next(); !next.done; ) {
    const begin = performance.now();
    const value = next.value.sync();
    if (round >= 2) {
      times[at] ??= [];
      times[at].push(performance.now() - begin);
    }
    at++;
    next = steps.next(value);
  }
  if (round >= 2) whole.push(performance.now() - start);
  if (at !== calls.length) throw new Error(`${at} calls, expected ${calls.length}`);
}
let sum = 0;
for (const [i, [label, flops]] of calls.entries()) {
  const ms = median(times[i]);
  sum += ms;
  const floor = flops / Number(peak) / 1e6;
  const rate = (flops / ms / 1e6).toFixed(0);
  console.log(
    `${label.padEnd(31)} ${ms.toFixed(2).padStart(8)} ms  floor ${floor.toFixed(2).padStart(7)}  ${rate.padStart(5)} GFLOP/s`,
  );
}
const total = median(whole);
const floor = calls.reduce((f, c) => f + c[1], 0) / Number(peak) / 1e6;
console.log(`${'TypeScript'.padEnd(31)} ${(total - sum).toFixed(2).padStart(8)} ms`);
console.log(
  `${'whole'.padEnd(31)} ${total.toFixed(2).padStart(8)} ms  floor ${floor.toFixed(2).padStart(7)}`,
);
encoder.dispose();
