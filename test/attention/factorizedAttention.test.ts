import { factorizedAttentionCases } from '../cases/attention/factorizedAttention.ts';
import { testCases } from '../helpers/cases.ts';

testCases(factorizedAttentionCases);
