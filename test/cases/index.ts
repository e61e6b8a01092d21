import type { OpCase } from './case.ts';
import { linearCases } from './linear.ts';
import { expertsBackwardCases } from './moe/expertsBackward.ts';
import { expertsForwardCases } from './moe/expertsForward.ts';
import { routeTopKCases } from './moe/routeTopK.ts';

/** Every op's table. */
export const allCases: OpCase[] = [
  ...routeTopKCases,
  ...expertsForwardCases,
  ...expertsBackwardCases,
  ...linearCases,
];
