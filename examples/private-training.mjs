// Private training in a page: classify points inside and outside of a circle.
//   node examples/private-training.mjs
import { Tensor } from 'heddle';
import {
  createNoiseKey,
  crossEntropy,
  Linear,
  PoissonSampler,
  PrivateOptimizer,
  Sequential,
  Tanh,
} from 'heddle/privacy';

const size = 4000;
const points = Float32Array.from({ length: 2 * size }, () => 2 * Math.random() - 1);
const inside = Int32Array.from({ length: size }, (_, i) =>
  Math.hypot(points[2 * i], points[2 * i + 1]) < 0.8 ? 1 : 0,
);

const model = new Sequential([new Linear(2, 32), new Tanh(), new Linear(32, 2)]);
const key = createNoiseKey(); // secret: keep it as long as the run may be resumed
const sampler = new PoissonSampler({ key, size, sampleRate: 0.05 });
const algorithm = { type: 'adamw', learningRate: 0.03 };
const optimizer = new PrivateOptimizer({
  layers: model.layers,
  algorithm,
  maxNorm: 1,
  noiseMultiplier: 1,
  sampler,
  key,
});

while (optimizer.steps < 200) {
  const batch = Array.from(sampler.batch(optimizer.steps)); // another size every time, perhaps 0
  const x = new Tensor(
    'float32',
    Float32Array.from(batch.flatMap((i) => [points[2 * i], points[2 * i + 1]])),
    [batch.length, 2],
  );
  const pass = await model.forward(x);
  const labels = new Tensor(
    'int32',
    Int32Array.from(batch, (i) => inside[i]),
    [batch.length],
  );
  const { gradient } = await crossEntropy(pass.output, labels); // of each sample's own loss, not averaged
  await optimizer.accumulate(await pass.backward(gradient)); // as often as memory asks for
  await optimizer.step();
}

const { output } = await model.forward(new Tensor('float32', points, [size, 2]));
const right = inside.reduce(
  (sum, label, i) => sum + (output.data[2 * i + 1] > output.data[2 * i] === (label === 1) ? 1 : 0),
  0,
);
const { epsilon } = optimizer.epsilon({ accountant: 'prv', delta: 1e-5 });
console.log(
  `${((100 * right) / size).toFixed(1)} % right, (${epsilon.toFixed(2)}, 1e-5)-differentially private`,
);
