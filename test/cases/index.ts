import { attentionCases } from './attention/attention.ts';
import { attentionBackwardCases } from './attention/attentionBackward.ts';
import { decodeAttentionCases } from './attention/decodeAttention.ts';
import { factorizedAttentionCases } from './attention/factorizedAttention.ts';
import { factorizedAttentionBackwardCases } from './attention/factorizedAttentionBackward.ts';
import { patchEmbedCases } from './attention/patchEmbed.ts';
import { rotaryEmbeddingCases } from './attention/rotaryEmbedding.ts';
import { tokenCases } from './attention/tokens.ts';
import { videoEncoderCases } from './attention/videoEncoder.ts';
import type { OpCase } from './case.ts';
import { linearCases } from './linear.ts';
import { combineCases } from './moe/combine.ts';
import { expertsBackwardCases } from './moe/expertsBackward.ts';
import { expertsForwardCases } from './moe/expertsForward.ts';
import { expertsForwardBenchCases } from './moe/expertsForwardBench.ts';
import { permuteCases } from './moe/permute.ts';
import { planDispatchCases } from './moe/planDispatch.ts';
import { routeExpertChoiceCases } from './moe/routeExpertChoice.ts';
import { routerLossCases } from './moe/routerLoss.ts';
import { routeSinkhornCases } from './moe/routeSinkhorn.ts';
import { routeTopKCases } from './moe/routeTopK.ts';
import { routeTopKBackwardCases } from './moe/routeTopKBackward.ts';
import { elementwiseCases } from './nn/elementwise.ts';
import { normBackwardCases, normCases } from './nn/norm.ts';
import { clippedGradientsCases } from './privacy/clippedGradients.ts';
import { gaussianNoiseCases } from './privacy/gaussianNoise.ts';
import { squaredNormsCases } from './privacy/perSampleSquaredNorms.ts';
import { privateStepCases } from './privacy/privateStep.ts';
import { activationCases } from './training/activation.ts';
import { convolutionCases } from './training/convolution.ts';
import { crossEntropyCases } from './training/crossEntropy.ts';
import { groupNormCases } from './training/groupNorm.ts';
import { optimizerUpdateCases } from './training/optimizerUpdate.ts';
import { poolingCases } from './training/pooling.ts';

/** Every op's table. */
export const allCases: OpCase[] = [
  ...routeTopKCases,
  ...planDispatchCases,
  ...permuteCases,
  ...combineCases,
  ...routeExpertChoiceCases,
  ...routeSinkhornCases,
  ...routerLossCases,
  ...routeTopKBackwardCases,
  ...expertsForwardCases,
  ...linearCases,
  ...expertsBackwardCases,
  ...attentionCases,
  ...attentionBackwardCases,
  ...factorizedAttentionCases,
  ...factorizedAttentionBackwardCases,
  ...decodeAttentionCases,
  ...rotaryEmbeddingCases,
  ...videoEncoderCases,
  ...tokenCases,
  ...patchEmbedCases,
  ...normCases,
  ...normBackwardCases,
  ...elementwiseCases,
  ...squaredNormsCases,
  ...clippedGradientsCases,
  ...gaussianNoiseCases,
  ...activationCases,
  ...convolutionCases,
  ...crossEntropyCases,
  ...groupNormCases,
  ...optimizerUpdateCases,
  ...poolingCases,
  ...privateStepCases,
  ...expertsForwardBenchCases,
];
