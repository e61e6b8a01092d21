import { describe, expect, it } from 'vitest';
import { attentionSync } from '../../lib/attention/index.ts';
import { decodeFloats, encodeFloats } from '../../lib/dtype.ts';
import { Tensor } from '../../lib/index.ts';
import { Random } from '../cases/random.ts';
import { hasCuda, testCudaCases } from '../helpers/cuda.ts';

testCudaCases('attention', ['attention', 'decodeAttention', 'attentionBackward', 'factorizedAttentionBackward']);

describe.skipIf(!hasCuda())('cuda, attention rows that see only NaN logits', () => {
  it.each(['float32', 'bfloat16'] as const)('are NaN and leave the others alone: %s', (type) => {
    const random = new Random(3);
    const draw = () => Float32Array.from(random.normals(4 * 16));
    const [q, k, v] = [draw(), draw(), draw()];
    q.fill(Number.NaN, 16, 32); // the second query
    const tensors = [q, k, v].map((x) => new Tensor(type, encodeFloats(x, type) as never, [1, 4, 1, 16]));
    const { output, logSumExp } = attentionSync(tensors[0], tensors[1], tensors[2], {
      backend: 'cuda',
      returnLogSumExp: true,
    });
    const values = decodeFloats(output.data, type);
    expect(values.map((x) => (Number.isNaN(x) ? 1 : 0))).toEqual(
      Float32Array.from({ length: 64 }, (_, i) => (i >= 16 && i < 32 ? 1 : 0)),
    );
    expect(Array.from(logSumExp!.data, Number.isNaN)).toEqual([false, true, false, false]);
  });
});
