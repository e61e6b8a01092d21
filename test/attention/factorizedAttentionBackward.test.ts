import { factorizedAttentionBackwardCases } from '../cases/attention/factorizedAttentionBackward.ts';
import { testCases } from '../helpers/cases.ts';

testCases(factorizedAttentionBackwardCases);
