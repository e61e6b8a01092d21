import { attentionCases } from '../cases/attention/attention.ts';
import { testCases } from '../helpers/cases.ts';

testCases(attentionCases);
