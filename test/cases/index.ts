import type { OpCase } from './case.ts';
import { combineCases } from './moe/combine.ts';
import { permuteCases } from './moe/permute.ts';
import { planDispatchCases } from './moe/planDispatch.ts';
import { routeTopKCases } from './moe/routeTopK.ts';

/** Every op's table. */
export const allCases: OpCase[] = [...routeTopKCases, ...planDispatchCases, ...permuteCases, ...combineCases];
