import { testCudaCases } from '../helpers/cuda.ts';

testCudaCases('moe', ['routeTopK', 'planDispatch', 'permute', 'combine', 'expertsForward']);
