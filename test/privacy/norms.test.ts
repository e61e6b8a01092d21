import { clippedGradientsCases } from '../cases/privacy/clippedGradients.ts';
import { squaredNormsCases } from '../cases/privacy/perSampleSquaredNorms.ts';
import { testCases } from '../helpers/cases.ts';

testCases(squaredNormsCases);
testCases(clippedGradientsCases);
