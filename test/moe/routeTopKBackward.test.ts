import { routeTopKBackwardCases } from '../cases/moe/routeTopKBackward.ts';
import { testCases } from '../helpers/cases.ts';

testCases(routeTopKBackwardCases);
