import type { OpCase } from '../cases/case.ts';
import { testCudaCases } from '../helpers/cuda.ts';

/** Convolutions, adapters, tied embeddings and experts run on the CPU only. */
const served = (c: OpCase) => !/conv|lora|adapter|tied|expert/i.test(c.name);

testCudaCases('privacy', ['gaussianNoise', 'perSampleSquaredNorms', 'clippedGradients'], served);
