import { describe } from 'vitest';
import {
  type FactorizedAttentionForwardOptions,
  factorizedAttentionBackwardSync,
  factorizedAttentionSync,
} from '../../lib/attention/index.ts';
import { Tensor } from '../../lib/index.ts';
import type { OpOptions } from '../../lib/op.ts';
import { type Refusal, testRefusals } from '../helpers/errors.ts';

const zeros = (...dims: number[]) => Tensor.zeros('float32', dims);
const q = zeros(2, 3, 4, 2, 8);
const kv = zeros(2, 3, 4, 1, 8);
const run = (options: object) => (o: OpOptions) =>
  factorizedAttentionSync(q, kv, kv, {
    axis: 'time',
    ...options,
    ...o,
  } as FactorizedAttentionForwardOptions);
const one = (heads: number) => zeros(2, 1, heads, 8);
const classToken = { mode: 'time-skip-space-mean', query: one(2), key: one(1), value: one(1) };
const ints = (...x: number[]) => Int32Array.from(x);
const tokens = { indices: ints(0, 5, 1), batchOffsets: ints(0, 2, 3), frames: 3, patches: 4 };
const packed = (t: object, options: object = {}) => {
  return (o: OpOptions) =>
    factorizedAttentionSync(zeros(3, 2, 8), zeros(3, 1, 8), zeros(3, 1, 8), {
      axis: 'space',
      tokens: t,
      ...options,
      ...o,
    } as FactorizedAttentionForwardOptions);
};

describe('factorizedAttention refuses bad input on every backend alike', () => {
  const refusals: Refusal[] = [
    [
      'no axis',
      run({ axis: undefined }),
      'ERR_OPTION',
      /^axis must be one of joint, time, space, split-heads/,
    ],
    ['axis', run({ axis: 'width' }), 'ERR_OPTION', /^axis.*"width"/],
    ['unknown option', run({ casual: true }), 'ERR_OPTION', /casual/],
    [
      'odd key heads',
      run({ axis: 'split-heads' }),
      'ERR_SHAPE',
      /even numbers of heads, got 2 in q and 1 in k/,
    ],
    [
      'rank',
      (o) => factorizedAttentionSync(zeros(2, 3, 2, 8), kv, kv, { axis: 'time', ...o }),
      'ERR_SHAPE',
      /^q: expected 5/,
    ],
    [
      'dims of k',
      (o) => factorizedAttentionSync(q, zeros(2, 3, 5, 1, 8), kv, { axis: 'time', ...o }),
      'ERR_SHAPE',
      /^k: expected \[2, 3, 4, 1, 8\], got \[2, 3, 5, 1, 8\]/,
    ],
    [
      'bias',
      run({ bias: zeros(1, 1, 2, 2) }),
      'ERR_SHAPE',
      /^bias: expected \[2 or 1, 4 or 1, 2 or 1, 3 or 1, 3\]/,
    ],
    ['split bias', run({ axis: 'split-heads', bias: zeros(1, 1, 1, 1) }), 'ERR_SHAPE', /even/],
    ['joint class token', run({ axis: 'joint', classToken }), 'ERR_OPTION', /^classToken: axis/],
    [
      'class token mode',
      run({ classToken: { ...classToken, mode: 'mean' } }),
      'ERR_OPTION',
      /^classToken.mode/,
    ],
    [
      'class token dims',
      run({ axis: 'space', classToken: { ...classToken, key: one(2) } }),
      'ERR_SHAPE',
      /^classToken.key: expected \[2, 1, 1, 8\]/,
    ],
    ['causal class token', run({ axis: 'space', classToken, causal: true }), 'ERR_OPTION', /^causal/],
    ['strides', run({ strides: { query: [1, 2, 3] } }), 'ERR_OPTION', /^strides of q must be five/],
    ['strides without out', run({ strides: { output: [192, 64, 16, 8, 1] } }), 'ERR_OPTION', /out.output/],
    ['token order', packed({ ...tokens, indices: ints(5, 0, 1) }), 'ERR_VALUE', /^tokens.indices\[1\] is 0/],
    ['token range', packed({ ...tokens, indices: ints(0, 12, 1) }), 'ERR_VALUE', /from 0 to 11/],
    ['token offsets', packed({ ...tokens, batchOffsets: ints(0, 2) }), 'ERR_VALUE', /^tokens.batchOffsets/],
    [
      'token count',
      packed({ ...tokens, indices: ints(0, 5), batchOffsets: ints(0, 2, 2) }),
      'ERR_SHAPE',
      /^q:/,
    ],
    [
      'tokens and mask',
      packed(tokens, { mask: zeros(1) }),
      'ERR_OPTION',
      /^mask is not available with tokens/,
    ],
    ['joint causal tokens', packed(tokens, { axis: 'joint', causal: true }), 'ERR_OPTION', /^causal/],
    [
      'backward without results',
      (o) => factorizedAttentionBackwardSync(q, q, kv, kv, { axis: 'time', ...o } as never),
      'ERR_ARGUMENT',
      /output and logSumExp/,
    ],
    [
      'backward without the class gradient',
      (o) =>
        factorizedAttentionBackwardSync(q, q, kv, kv, {
          axis: 'space',
          classToken: classToken as never,
          output: q,
          logSumExp: zeros(2, 2, 3, 4),
          ...o,
        }),
      'ERR_ARGUMENT',
      /^gradClassToken/,
    ],
  ];
  testRefusals(refusals);
});
