// Trains privately for ten steps, saving after every second one; goes on from the saved file where there is one.
//   privateTraining.mjs FILE [--kill-after STEPS]
import { existsSync } from 'node:fs';
import { Tensor } from '../../../dist/index.js';
import {
  crossEntropy,
  Linear,
  PoissonSampler,
  PrivateOptimizer,
  Sequential,
  Tanh,
} from '../../../dist/privacy/index.js';

const [file, , killAfter] = process.argv.slice(2);
const key = Uint8Array.from({ length: 32 }, (_, i) => i); // a test's key: real ones come from createNoiseKey()
const model = new Sequential([new Linear(3, 8), new Tanh(), new Linear(8, 2)]).initialize(1);
const sampler = new PoissonSampler({ key, size: 50, sampleRate: 0.2 });
const optimizer = new PrivateOptimizer({
  layers: model.layers,
  algorithm: { type: 'adamw', learningRate: 0.01 },
  maxNorm: 1,
  noiseMultiplier: 1,
  sampler,
  key,
});
if (existsSync(file)) await optimizer.loadFile(file);
console.log(`from step ${optimizer.steps}`);
while (optimizer.steps < 10) {
  const batch = Array.from(sampler.batch(optimizer.steps));
  const x = new Tensor('float32', Float32Array.from(batch.flatMap((i) => [i / 50, (i % 7) / 7, 1])), [
    batch.length,
    3,
  ]);
  const labels = new Tensor(
    'int32',
    Int32Array.from(batch, (i) => i % 2),
    [batch.length],
  );
  const pass = await model.forward(x);
  const { gradient } = await crossEntropy(pass.output, labels);
  await optimizer.accumulate(await pass.backward(gradient));
  await optimizer.step();
  if (optimizer.steps === Number(killAfter)) process.kill(process.pid, 'SIGKILL');
  if (optimizer.steps % 2 === 0) await optimizer.save(file);
}
console.log(JSON.stringify(optimizer.ledger));
