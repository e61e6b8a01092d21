import { testCudaCases } from '../helpers/cuda.ts';

testCudaCases('moe', ['routeTopK']);
