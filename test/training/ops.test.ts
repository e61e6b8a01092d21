import { activationCases } from '../cases/training/activation.ts';
import { convolutionCases } from '../cases/training/convolution.ts';
import { crossEntropyCases } from '../cases/training/crossEntropy.ts';
import { groupNormCases } from '../cases/training/groupNorm.ts';
import { optimizerUpdateCases } from '../cases/training/optimizerUpdate.ts';
import { poolingCases } from '../cases/training/pooling.ts';
import { testCases } from '../helpers/cases.ts';

testCases([
  ...activationCases,
  ...convolutionCases,
  ...crossEntropyCases,
  ...groupNormCases,
  ...optimizerUpdateCases,
  ...poolingCases,
]);
