import type { OpCase } from '../cases/case.ts';
import { testCudaCases } from '../helpers/cuda.ts';

const layers = ['linear', 'embedding', 'scale', 'channel'];
const kernels = [
  'gaussianNoise',
  ...layers.flatMap((kind) => [`${kind}SquaredNorms`, `${kind}ClippedGradients`]),
];

/** Convolutions, adapters, tied embeddings, experts and discrete noise run on the CPU only. */
const serve = (c: OpCase) => !/conv|lora|adapter|tied|expert|discrete/i.test(c.name);

testCudaCases('privacy', ['gaussianNoise', 'perSampleSquaredNorms', 'clippedGradients'], { kernels, serve });
