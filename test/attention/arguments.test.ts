import { describe, expect, it } from 'vitest';
import { type AttentionForwardOptions, attention, attentionSync } from '../../lib/attention/index.ts';
import { HeddleError, Tensor, type TensorLike } from '../../lib/index.ts';

const zeros = (dims: number[], type: 'float32' | 'bfloat16' = 'float32') => Tensor.zeros(type, dims);
const q = zeros([1, 4, 2, 8]);
const kv = zeros([1, 6, 1, 8]);
const bytes = (dims: number[]) => Tensor.zeros('uint8', dims);
const run = (options: unknown) => attentionSync(q, kv, kv, options as AttentionForwardOptions);
const ints = (...x: number[]) => Int32Array.from(x);

describe('attention refuses bad input with a code and the name of the argument', () => {
  const cases: [string, () => unknown, string, RegExp][] = [
    ['no tensor', () => attentionSync(5 as never, kv, kv), 'ERR_ARGUMENT', /^q:/],
    ['rank', () => attentionSync(q, zeros([6, 1, 8]), kv), 'ERR_SHAPE', /^k: expected 4/],
    [
      'dtype',
      () => attentionSync(new Tensor('int32', ints(1), [1, 1, 1, 1]), kv, kv),
      'ERR_DTYPE',
      /^q:.*int32/,
    ],
    [
      'mixed types',
      () => attentionSync(q, kv, zeros([1, 6, 1, 8], 'bfloat16')),
      'ERR_DTYPE',
      /^v: expected float32/,
    ],
    ['batch', () => attentionSync(q, zeros([2, 6, 1, 8]), kv), 'ERR_SHAPE', /^k:/],
    ['head dim of k', () => attentionSync(q, zeros([1, 6, 1, 7]), kv), 'ERR_SHAPE', /^k:/],
    ['keys of v', () => attentionSync(q, kv, zeros([1, 5, 1, 8])), 'ERR_SHAPE', /^v: expected \[1, 6, 1,/],
    [
      'heads',
      () => attentionSync(zeros([1, 4, 3, 8]), zeros([1, 6, 2, 8]), zeros([1, 6, 2, 8])),
      'ERR_SHAPE',
      /multiple of the 2 heads/,
    ],
    [
      'no key heads',
      () => attentionSync(q, zeros([1, 6, 0, 8]), zeros([1, 6, 0, 8])),
      'ERR_SHAPE',
      /multiple of the 0/,
    ],
    [
      'head dim 0',
      () => attentionSync(zeros([1, 4, 2, 0]), zeros([1, 6, 1, 0]), kv),
      'ERR_SHAPE',
      /^q: the head dim.*got 0/,
    ],
    [
      'head dim 513',
      () => attentionSync(q, kv, zeros([1, 6, 1, 513])),
      'ERR_SHAPE',
      /^v: the head dim.*got 513/,
    ],
    ['unknown option', () => run({ casual: true }), 'ERR_OPTION', /casual/],
    ['causal', () => run({ causal: 1 }), 'ERR_OPTION', /^causal/],
    ['window', () => run({ window: 5 }), 'ERR_OPTION', /^window/],
    ['window left', () => run({ window: [-2, 0] }), 'ERR_OPTION', /^window\[0\]/],
    ['window right', () => run({ window: [0, 1.5] }), 'ERR_OPTION', /^window\[1\]/],
    ['softcap', () => run({ softcap: -1 }), 'ERR_OPTION', /^softcap/],
    ['scale', () => run({ scale: Number.NaN }), 'ERR_OPTION', /^scale/],
    ['emptyRows', () => run({ emptyRows: 'nan' }), 'ERR_OPTION', /^emptyRows/],
    [
      'bias dims',
      () => run({ bias: zeros([1, 2, 4, 5]) }),
      'ERR_SHAPE',
      /^bias: expected \[1 or 1, 2 or 1, 4 or 1, 6\]/,
    ],
    ['bias rank', () => run({ bias: zeros([4, 6]) }), 'ERR_SHAPE', /^bias/],
    ['bias type', () => run({ bias: bytes([1, 2, 4, 6]) }), 'ERR_DTYPE', /^bias/],
    ['mask dims', () => run({ mask: bytes([1, 1, 3, 6]) }), 'ERR_SHAPE', /^mask/],
    ['mask type', () => run({ mask: zeros([1, 1, 4, 6]) }), 'ERR_DTYPE', /^mask/],
    [
      'block mask dims',
      () => run({ blockMask: { mask: bytes([1, 1, 2, 2]), query: 2, key: 2 } }),
      'ERR_SHAPE',
      /^blockMask.mask/,
    ],
    [
      'block size',
      () => run({ blockMask: { mask: bytes([1, 1, 2, 3]), query: 0, key: 2 } }),
      'ERR_OPTION',
      /^blockMask.query/,
    ],
    [
      'block mask property',
      () => run({ blockMask: { mask: bytes([1, 1, 2, 3]), rows: 2, key: 2 } }),
      'ERR_OPTION',
      /rows/,
    ],
    ['slopes', () => run({ alibiSlopes: new Float32Array(3) }), 'ERR_SHAPE', /^alibiSlopes: expected \[2\]/],
    ['sinks', () => run({ sinks: new Float32Array(1) }), 'ERR_SHAPE', /^sinks/],
    [
      'offsets begin',
      () => run({ segments: { query: ints(1, 4), key: ints(0, 6) } }),
      'ERR_VALUE',
      /^segments.query/,
    ],
    [
      'offsets end',
      () => run({ segments: { query: ints(0, 4), key: ints(0, 5) } }),
      'ERR_VALUE',
      /^segments.key.*end at 6/,
    ],
    [
      'offsets fall',
      () => run({ segments: { query: ints(0, 4, 3, 4), key: ints(0, 1, 2, 6) } }),
      'ERR_VALUE',
      /^segments.query\[2\]/,
    ],
    [
      'offset counts',
      () => run({ segments: { query: ints(0, 2, 4), key: ints(0, 6) } }),
      'ERR_SHAPE',
      /^segments.key/,
    ],
    [
      'segments of a batch',
      () =>
        attentionSync(zeros([2, 4, 2, 8]), zeros([2, 6, 1, 8]), zeros([2, 6, 1, 8]), {
          segments: { query: ints(0, 4), key: ints(0, 6) },
        }),
      'ERR_SHAPE',
      /batch of 1/,
    ],
    [
      'block ids',
      () => run({ blockIds: { query: ints(0, 1), key: new Int32Array(6) } }),
      'ERR_SHAPE',
      /^blockIds.query/,
    ],
    ['strides', () => run({ strides: { query: [1, 2, 3] } }), 'ERR_OPTION', /^strides of q/],
    ['negative stride', () => run({ strides: { key: [1, -2, 3, 1] } }), 'ERR_OPTION', /^strides of k/],
    ['strides name', () => run({ strides: { q: [1, 2, 3, 1] } }), 'ERR_OPTION', /unknown property 'q'/],
    [
      'strides reach beyond the data',
      () => run({ strides: { value: [48, 9, 8, 1] } }),
      'ERR_SHAPE',
      /^v: .*need 53 elements, data has 48/,
    ],
    ['out dims', () => run({ out: { output: zeros([1, 4, 2, 7]) } }), 'ERR_SHAPE', /^out.output/],
    ['out type', () => run({ out: { output: zeros([1, 4, 2, 8], 'bfloat16') } }), 'ERR_DTYPE', /^out.output/],
    ['out overlaps', () => run({ out: { output: q } }), 'ERR_ARGUMENT', /^out.output overlaps/],
    [
      'out log-sum-exp',
      () => run({ out: { output: zeros([1, 4, 2, 8]), logSumExp: zeros([1, 4, 2]) } }),
      'ERR_SHAPE',
      /^out.logSumExp/,
    ],
    ['threads', () => run({ threads: 0 }), 'ERR_OPTION', /threads/],
  ];
  it.each(cases)('%s', (_, call, code, message) => {
    let error: unknown;
    try {
      call();
    } catch (e) {
      error = e;
    }
    expect(error).toBeInstanceOf(HeddleError);
    expect((error as HeddleError).message).toMatch(message);
    expect((error as HeddleError).code).toBe(code);
  });

  it('an aborted signal rejects with ERR_ABORTED and its reason', async () => {
    const reason = new Error('enough');
    await expect(attention(q, kv, kv, { signal: AbortSignal.abort(reason) })).rejects.toMatchObject({
      code: 'ERR_ABORTED',
      cause: reason,
    });
  });

  it('accepts structural tensors', () => {
    const like = (t: Tensor): TensorLike => ({ type: t.type, data: t.data, dims: t.dims, location: 'cpu' });
    const r = attentionSync(like(q), like(kv), like(kv));
    expect(r.output.dims).toEqual([1, 4, 2, 8]);
  });
});
