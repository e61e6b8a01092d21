// Trains a small convolutional network on Fashion-MNIST with differential privacy, from the command line:
//
//   apt-get install dataset-fashion-mnist        # or --data DIRECTORY with the four IDX files, gzipped or not
//   node examples/fashion-mnist.mjs --epochs 40 --epsilon 2.7 --out run
//   node examples/fashion-mnist.mjs --epochs 40 --epsilon 2.7 --out run --resume       # after a crash or --stop-after
//
// Writes run.json (log), run.svg (accuracy and ε), run.safetensors (state) and run.key (secret: the noise's key). What
// is printed is safe to publish: ε, and the accuracy on the test set, which is public. The training loss would not be.
//
// The network is the one of Papernot et al. 2021 (tempered sigmoids) and Tramèr and Boneh 2021: 86.1 % at ε = 2.7.
import { existsSync, readFileSync, renameSync, writeFileSync } from 'node:fs';
import { cpus } from 'node:os';
import { parseArgs } from 'node:util';
import { Tensor } from 'heddle';
import {
  Conv2d,
  calibrateNoiseMultiplier,
  createNoiseKey,
  crossEntropy,
  Flatten,
  Linear,
  MaxPool2d,
  PoissonSampler,
  PrivateOptimizer,
  Sequential,
  Tanh,
} from 'heddle/privacy';
import { gather, loadFashionMnist } from './fashion-mnist/data.mjs';
import { plot } from './fashion-mnist/plot.mjs';

const { values: flags } = parseArgs({
  options: {
    data: { type: 'string', default: '/usr/share/datasets/fashion-mnist' },
    out: { type: 'string', default: 'fashion-mnist' },
    epochs: { type: 'string', default: '40' },
    batch: { type: 'string', default: '2048' },
    'micro-batch': { type: 'string', default: '512' },
    'learning-rate': { type: 'string', default: '4' },
    momentum: { type: 'string', default: '0.9' },
    'max-norm': { type: 'string', default: '0.1' },
    epsilon: { type: 'string', default: '2.7' },
    delta: { type: 'string', default: '1e-5' },
    seed: { type: 'string', default: '0' },
    threads: { type: 'string' },
    'stop-after': { type: 'string' },
    resume: { type: 'boolean', default: false },
  },
});
const number = (name) => {
  const value = Number(flags[name]);
  if (!Number.isFinite(value) || value <= 0) {
    if (!(name === 'seed' && value === 0))
      throw new Error(`--${name} must be a number above 0, got ${flags[name]}`);
  }
  return value;
};
const threads = flags.threads === undefined ? undefined : number('threads');
const delta = number('delta');
const microBatch = number('micro-batch');

const train = loadFashionMnist(flags.data, 'train');
const test = loadFashionMnist(flags.data, 't10k');

const model = new Sequential([
  new Conv2d(1, 16, 8, { stride: 2, padding: 3 }),
  new Tanh(),
  new MaxPool2d(2, { stride: 1 }),
  new Conv2d(16, 32, 4, { stride: 2 }),
  new Tanh(),
  new MaxPool2d(2, { stride: 1 }),
  new Flatten(),
  new Linear(512, 32),
  new Tanh(),
  new Linear(32, 10),
]).initialize(number('seed'));

// The key makes the noise: it must stay secret, and a resumed run needs the same one.
const keyFile = `${flags.out}.key`;
const stateFile = `${flags.out}.safetensors`;
if (!flags.resume && existsSync(stateFile))
  throw new Error(`${stateFile} exists: --resume it, or choose another --out`);
const key = flags.resume ? new Uint8Array(readFileSync(keyFile)) : createNoiseKey();
if (!flags.resume) writeFileSync(keyFile, key, { mode: 0o600 });

const sampler = new PoissonSampler({ key, size: train.count, sampleRate: number('batch') / train.count });
const stepsPerEpoch = Math.round(train.count / number('batch'));
const steps = stepsPerEpoch * number('epochs');
const noiseMultiplier = calibrateNoiseMultiplier({
  accountant: 'prv',
  epsilon: number('epsilon'),
  delta,
  sampleRate: sampler.sampleRate,
  steps,
});
const optimizer = new PrivateOptimizer({
  layers: model.layers,
  algorithm: { type: 'sgd', learningRate: number('learning-rate'), momentum: number('momentum') },
  maxNorm: number('max-norm'),
  noiseMultiplier,
  sampler,
  key,
  threads,
});

let log = {
  format: 'heddle-private-training',
  version: 1,
  date: new Date().toISOString(),
  processor: cpus()[0]?.model,
  cores: cpus().length,
  node: process.version,
  flags,
  delta,
  noiseMultiplier,
  sampleRate: sampler.sampleRate,
  stepsPerEpoch,
  epochs: [],
};
if (flags.resume) {
  await optimizer.loadFile(stateFile);
  const done = optimizer.steps / stepsPerEpoch;
  const earlier = JSON.parse(readFileSync(`${flags.out}.json`, 'utf8'));
  log = { ...earlier, epochs: earlier.epochs.slice(0, done) };
  console.log(`resumed after ${done} epochs`);
}
const parameters = Object.values(model.layers).flatMap((layer) => Object.values(layer));
const size = parameters.reduce((sum, p) => sum + p.size, 0);
console.log(
  `${size} parameters, ${steps} steps of ${flags.batch} expected samples, σ = ${noiseMultiplier.toFixed(3)}`,
);

/** Correct predictions among the test images. */
async function accuracy() {
  let correct = 0;
  for (let from = 0; from < test.count; from += 1000) {
    const indices = Int32Array.from({ length: Math.min(1000, test.count - from) }, (_, i) => from + i);
    const { images, labels } = gather(test, indices, Tensor);
    const { output } = await model.forward(images, { threads });
    const { prediction } = await crossEntropy(output, labels, { threads });
    correct += prediction.data.reduce((sum, p, i) => sum + (p === labels.data[i] ? 1 : 0), 0);
  }
  return correct / test.count;
}

function writeWhole(path, text) {
  writeFileSync(`${path}.tmp`, text);
  renameSync(`${path}.tmp`, path);
}

const last = Math.min(
  number('epochs'),
  log.epochs.length + (flags['stop-after'] ? number('stop-after') : Infinity),
);
for (let epoch = log.epochs.length; epoch < last; epoch++) {
  const started = performance.now();
  const cpu = process.cpuUsage();
  while (optimizer.steps < (epoch + 1) * stepsPerEpoch) {
    const batch = sampler.batch(optimizer.steps);
    for (let from = 0; from < batch.length; from += microBatch) {
      const { images, labels } = gather(train, batch.subarray(from, from + microBatch), Tensor);
      const pass = await model.forward(images, { threads });
      const { gradient } = await crossEntropy(pass.output, labels, { threads });
      await optimizer.accumulate(await pass.backward(gradient, { threads }));
    }
    await optimizer.step();
    if (process.stdout.isTTY)
      process.stdout.write(`\repoch ${epoch + 1}: step ${optimizer.steps} of ${steps} `);
  }
  const used = process.cpuUsage(cpu);
  const seconds = (performance.now() - started) / 1000;
  const row = {
    epoch: epoch + 1,
    steps: optimizer.steps,
    testAccuracy: await accuracy(),
    epsilonPrv: optimizer.epsilon({ accountant: 'prv', delta }).epsilon,
    epsilonRdp: optimizer.epsilon({ accountant: 'rdp', delta }).epsilon,
    seconds,
    cpuSeconds: (used.user + used.system) / 1e6,
  };
  log.epochs.push(row);
  log.seconds = log.epochs.reduce((sum, e) => sum + e.seconds, 0);
  log.cpuSeconds = log.epochs.reduce((sum, e) => sum + e.cpuSeconds, 0);
  log.ledger = optimizer.ledger.toJSON();
  // The log first: the state decides how many of its epochs count.
  writeWhole(`${flags.out}.json`, `${JSON.stringify(log, null, 2)}\n`);
  writeWhole(`${flags.out}.svg`, plot(log));
  await optimizer.save(stateFile);
  const start = process.stdout.isTTY ? '\r' : '';
  console.log(
    `${start}epoch ${String(row.epoch).padStart(2)}: test accuracy ${(100 * row.testAccuracy).toFixed(2)} %, ` +
      `ε = ${row.epsilonPrv.toFixed(3)} (RDP ${row.epsilonRdp.toFixed(3)}) at δ = ${delta}, ` +
      `${seconds.toFixed(1)} s, ${row.cpuSeconds.toFixed(1)} s CPU`,
  );
}
