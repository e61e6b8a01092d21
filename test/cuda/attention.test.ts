import { describe, expect, it } from 'vitest';
import { attentionSync, decodeAttentionSync, KVCache } from '../../lib/attention/index.ts';
import { decodeFloats, encodeFloats } from '../../lib/dtype.ts';
import { Tensor } from '../../lib/index.ts';
import { Random } from '../cases/random.ts';
import { hasCuda, testCudaCases } from '../helpers/cuda.ts';

// Those of the backward passes run in attentionBackward.test.ts: two files share the time.
testCudaCases(
  'attention',
  [
    'patchEmbed',
    'attention',
    'factorizedAttention',
    'decodeAttention',
    'attentionBackward',
    'factorizedAttentionBackward',
    'rotaryEmbedding',
  ],
  { serve: (c) => !c.op.endsWith('Backward') },
);

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

describe.skipIf(!hasCuda())('cuda, decodeAttention', () => {
  const random = new Random(7);
  const draw = (...dims: number[]) =>
    new Tensor('float32', random.normals(dims.reduce((a, b) => a * b)), dims);

  it.each(['float32', 'bfloat16', 'int8', 'int4'] as const)(
    'a sequence is bitwise the same alone, in a batch, and with any page size (%s)',
    (type) => {
      const common = { keyHeads: 1, headDim: 24, type };
      const cache = new KVCache({ ...common, pageSize: 16, pages: 90 });
      const odd = new KVCache({ ...common, pageSize: 7, pages: 100 });
      const [a, b, c] = [cache.create(), cache.create(), odd.create()];
      for (let i = 0; i < 12; i++) {
        const [k, v] = [draw(50, 1, 24), draw(50, 1, 24)];
        cache.append(a, k, v);
        odd.append(c, k, v);
        cache.append(b, draw(50, 1, 24), draw(50, 1, 24));
      }
      const f = cache.fork(a);
      cache.truncate(b, 70);
      const q = random.normals(3 * 24);
      const options = { backend: 'cuda', returnLogSumExp: true } as const;
      const one = new Tensor('float32', q, [1, 1, 3, 24]);
      const alone = decodeAttentionSync(one, cache, { ...options, sequences: [a] });
      const three = new Tensor('float32', Float32Array.from([...q, ...q, ...q]), [3, 1, 3, 24]);
      const batch = decodeAttentionSync(three, cache, { ...options, sequences: [f, b, a] });
      expect(batch.output.data.slice(0, 72)).toEqual(alone.output.data);
      expect(batch.output.data.slice(144)).toEqual(alone.output.data);
      expect(batch.output.data.slice(72, 144)).not.toEqual(alone.output.data);
      const other = decodeAttentionSync(one, odd, { ...options, sequences: [c] });
      expect(other.output.data).toEqual(alone.output.data);
      expect(other.logSumExp!.data).toEqual(alone.logSumExp!.data);
    },
  );

  it.each(['float32', 'bfloat16'] as const)(
    'what is behind the end, or weighs nothing, never leaks; what is seen does (%s)',
    (type) => {
      const cache = new KVCache({ keyHeads: 1, headDim: 16, type, pageSize: 16, pages: 8 });
      const id = cache.create();
      const bad = draw(90, 1, 16);
      bad.data.fill(Number.NaN);
      cache.append(id, bad, bad);
      cache.truncate(id, 0);
      const [k, v] = [draw(77, 1, 16), draw(77, 1, 16)];
      v.data.fill(Number.POSITIVE_INFINITY, 0, 16);
      cache.append(id, k, v);
      const q = draw(1, 1, 2, 16);
      const run = (options: object) =>
        decodeAttentionSync(q, cache, { sequences: [id], ...options }).output.data as Float32Array;
      const seen = run({ windowLeft: 70, backend: 'cuda' });
      const expected = run({ windowLeft: 70, backend: 'reference' });
      expect(seen.every(Number.isFinite)).toBe(true);
      seen.forEach((x, i) => {
        expect(Math.abs(x - expected[i])).toBeLessThan(1e-5);
      });
      expect(run({ backend: 'cuda' })).toEqual(run({ backend: 'reference' }));
    },
  );
});
