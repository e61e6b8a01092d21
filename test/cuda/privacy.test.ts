import { testCudaCases } from '../helpers/cuda.ts';

const layers = ['linear', 'embedding', 'scale', 'channel', 'conv', 'lora', 'tiedEmbedding', 'experts'];
const kernels = [
  'gaussianNoise',
  'discreteNoise',
  ...layers.flatMap((kind) => [`${kind}SquaredNorms`, `${kind}ClippedGradients`]),
];

testCudaCases('privacy', ['gaussianNoise', 'perSampleSquaredNorms', 'clippedGradients'], { kernels });
