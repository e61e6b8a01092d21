import type { OpCase } from './case.ts';
import { routeTopKCases } from './moe/routeTopK.ts';
import { clippedGradientsCases } from './privacy/clippedGradients.ts';
import { gaussianNoiseCases } from './privacy/gaussianNoise.ts';
import { squaredNormsCases } from './privacy/perSampleSquaredNorms.ts';

/** Every op's table. */
export const allCases: OpCase[] = [
  ...routeTopKCases,
  ...squaredNormsCases,
  ...clippedGradientsCases,
  ...gaussianNoiseCases,
];
