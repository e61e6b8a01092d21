import { routerLossCases } from '../cases/moe/routerLoss.ts';
import { testCases } from '../helpers/cases.ts';

testCases(routerLossCases);
