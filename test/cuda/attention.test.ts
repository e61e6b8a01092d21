import { testCudaCases } from '../helpers/cuda.ts';

testCudaCases('attention', ['attention']);
