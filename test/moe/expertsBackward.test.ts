import { expertsBackwardCases } from '../cases/moe/expertsBackward.ts';
import { testCases } from '../helpers/cases.ts';

testCases(expertsBackwardCases);
