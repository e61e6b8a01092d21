import { describe, expect, it } from 'vitest';
import {
  attentionSync,
  type DecodeAttentionOptions,
  decodeAttention,
  decodeAttentionSync,
  KVCache,
} from '../../lib/attention/index.ts';
import { HeddleError, Tensor } from '../../lib/index.ts';
import { decodeAttentionCases } from '../cases/attention/decodeAttention.ts';
import { Random } from '../cases/random.ts';
import { nativeVariants } from '../helpers/backends.ts';
import { testCases } from '../helpers/cases.ts';
import { relativeError } from '../helpers/golden.ts';

testCases(decodeAttentionCases);

const variants = nativeVariants();
const everywhere = [{ name: 'reference', options: { backend: 'reference' as const }, use() {} }, ...variants];

function draw(random: Random, dims: number[]): Tensor<'float32'> {
  return new Tensor('float32', random.normals(dims.reduce((a, b) => a * b)), dims);
}

describe.each(everywhere)('decodeAttention on $name', ({ options, use }) => {
  it('equals causal attention over the same keys', () => {
    use();
    const random = new Random(1);
    const [tokens, queries] = [150, 4];
    const k = draw(random, [tokens, 2, 24]);
    const v = draw(random, [tokens, 2, 24]);
    const q = draw(random, [1, queries, 4, 24]);
    const cache = new KVCache({ keyHeads: 2, headDim: 24, pageSize: 16, pages: 10 });
    const id = cache.create();
    cache.append(id, k, v);
    const decode = decodeAttentionSync(q, cache, { ...options, sequences: [id], windowLeft: 100 });
    const whole = attentionSync(q, k.reshape([1, tokens, 2, 24]), v.reshape([1, tokens, 2, 24]), {
      ...options,
      causal: true,
      window: [100, 0],
    });
    const error = relativeError(decode.output.data as Float32Array, whole.output.data as Float32Array);
    expect(error).toBeLessThan(1e-6);
  });

  it('a sequence is bitwise the same alone, in a batch, and forked', () => {
    use();
    const random = new Random(2);
    const cache = new KVCache({ keyHeads: 2, headDim: 40, pageSize: 8, pages: 400 });
    const a = cache.create();
    const b = cache.create();
    for (let i = 0; i < 26; i++) {
      for (const id of [a, b]) cache.append(id, draw(random, [50, 2, 40]), draw(random, [50, 2, 40]));
    }
    const f = cache.fork(a);
    cache.append(a, draw(random, [3, 2, 40]), draw(random, [3, 2, 40]));
    cache.truncate(a, 1300);
    const q = random.normals(6 * 40);
    const one = new Tensor('float32', q, [1, 1, 6, 40]);
    const alone = decodeAttentionSync(one, cache, { ...options, sequences: [a] }).output.data;
    const three = new Tensor('float32', Float32Array.from([...q, ...q, ...q]), [3, 1, 6, 40]);
    const batch = decodeAttentionSync(three, cache, { ...options, sequences: [f, b, a] }).output.data;
    expect(batch.slice(0, 240)).toEqual(alone);
    expect(batch.slice(480)).toEqual(alone);
  });

  it('reads what was there when it began, whatever happens to the sequence meanwhile', async () => {
    use();
    const random = new Random(3);
    const cache = new KVCache({ keyHeads: 1, headDim: 16, pageSize: 4, pages: 50 });
    const id = cache.create();
    cache.append(id, draw(random, [199, 1, 16]), draw(random, [199, 1, 16]));
    const q = draw(random, [1, 1, 2, 16]);
    const expected = decodeAttentionSync(q, cache, { ...options, sequences: [id] }).output.data;
    const running = decodeAttention(q, cache, { ...options, sequences: [id] });
    cache.free(id);
    const other = cache.create();
    // All pages are still being read.
    expect(() => cache.append(other, draw(random, [8, 1, 16]), draw(random, [8, 1, 16]))).toThrow(
      expect.objectContaining({ code: 'ERR_MEMORY' }),
    );
    expect((await running).output.data).toEqual(expected);
    cache.append(other, draw(random, [200, 1, 16]), draw(random, [200, 1, 16]));
    expect(cache.freePages).toBe(0);
  });

  it.each(['float32', 'bfloat16', 'int8', 'int4'] as const)(
    'a window gives the same bits as a cache that keeps everything (%s)',
    (type) => {
      use();
      const random = new Random(5);
      const window = 200;
      const common = { keyHeads: 2, headDim: 24, type, pageSize: 16 };
      const ring = new KVCache({ ...common, window, pages: Math.ceil((window + 70) / 16) + 1 });
      const whole = new KVCache({ ...common, pages: 200 });
      const [a, b] = [ring.create(), whole.create()];
      let at = 0;
      for (let i = 0; at < 2900; i++) {
        const count = [1, 70, 3, 33, 16][i % 5];
        const [k, v] = [draw(random, [count, 2, 24]), draw(random, [count, 2, 24])];
        ring.append(a, k, v);
        whole.append(b, k, v);
        at += count;
        if (i % 20 !== 1) continue;
        const q = draw(random, [1, Math.min(count, 5), 4, 24]);
        const o = { ...options, windowLeft: window, returnLogSumExp: true };
        const x = decodeAttentionSync(q, ring, { ...o, sequences: [a] });
        const y = decodeAttentionSync(q, whole, { ...o, sequences: [b] });
        expect(x.output.data).toEqual(y.output.data);
        expect(x.logSumExp!.data).toEqual(y.logSumExp!.data);
      }
      expect(ring.start(a)).toBeGreaterThan(2500);
    },
  );

  it('NaN in another sequence, or behind the end of a page, never leaks', () => {
    use();
    const random = new Random(4);
    const cache = new KVCache({ keyHeads: 1, headDim: 16, pageSize: 8, pages: 4 });
    const id = cache.create();
    const bad = draw(random, [8, 1, 16]);
    bad.data.fill(NaN);
    cache.append(id, bad, bad);
    cache.truncate(id, 0);
    const k = draw(random, [5, 1, 16]);
    cache.append(id, k, k);
    const r = decodeAttentionSync(draw(random, [1, 1, 1, 16]), cache, { ...options, sequences: [id] });
    expect((r.output.data as Float32Array).every(Number.isFinite)).toBe(true);
  });
});

describe('decodeAttention refuses bad input', () => {
  const cache = new KVCache({ keyHeads: 2, headDim: 8, pages: 2 });
  const id = cache.create();
  cache.append(id, Tensor.zeros('float32', [3, 2, 8]), Tensor.zeros('float32', [3, 2, 8]));
  const freed = cache.create();
  cache.free(freed);
  const q = Tensor.zeros('float32', [1, 1, 4, 8]);
  const run = (x: Tensor, options: unknown) =>
    decodeAttentionSync(x, cache, options as DecodeAttentionOptions);
  const disposed = new KVCache({ keyHeads: 2, headDim: 8, pages: 2 });
  const gone = disposed.create();
  disposed.dispose();
  const cases: [string, () => unknown, string, RegExp][] = [
    ['no cache', () => decodeAttentionSync(q, {} as never, { sequences: [0] }), 'ERR_ARGUMENT', /^cache/],
    ['no options', () => run(q, undefined), 'ERR_OPTION', /^sequences/],
    ['count', () => run(q, { sequences: [id, id] }), 'ERR_OPTION', /^sequences must be an array of 1/],
    ['freed', () => run(q, { sequences: [freed] }), 'ERR_ARGUMENT', /sequence 1 does not exist/],
    [
      'head dim',
      () => run(Tensor.zeros('float32', [1, 1, 4, 9]), { sequences: [id] }),
      'ERR_SHAPE',
      /^q: .*head dim 8/,
    ],
    [
      'heads',
      () => run(Tensor.zeros('float32', [1, 1, 3, 8]), { sequences: [id] }),
      'ERR_SHAPE',
      /multiple of the 2/,
    ],
    [
      'too many queries',
      () => run(Tensor.zeros('float32', [1, 4, 4, 8]), { sequences: [id] }),
      'ERR_VALUE',
      /^q: 4 queries.* 3 tokens/,
    ],
    [
      'keys that left the window',
      () => {
        const ring = new KVCache({ keyHeads: 2, headDim: 8, pages: 9, pageSize: 4, window: 8 });
        const s = ring.create();
        for (let i = 0; i < 5; i++) {
          ring.append(s, Tensor.zeros('float32', [4, 2, 8]), Tensor.zeros('float32', [4, 2, 8]));
        }
        decodeAttentionSync(q, ring, { sequences: [s], windowLeft: 8 });
        decodeAttentionSync(q, ring, { sequences: [s] });
      },
      'ERR_VALUE',
      /^windowLeft: 1 queries with no window need keys from 0 on, but sequence 0 has those from 8 on/,
    ],
    ['window', () => run(q, { sequences: [id], windowLeft: -2 }), 'ERR_OPTION', /^windowLeft/],
    ['unknown option', () => run(q, { sequences: [id], causal: true }), 'ERR_OPTION', /causal/],
    ['sinks', () => run(q, { sequences: [id], sinks: new Float32Array(2) }), 'ERR_SHAPE', /^sinks/],
    [
      'out',
      () => run(q, { sequences: [id], out: { output: Tensor.zeros('float32', [1, 1, 4, 7]) } }),
      'ERR_SHAPE',
      /^out.output/,
    ],
    ['disposed', () => decodeAttentionSync(q, disposed, { sequences: [gone] }), 'ERR_DISPOSED', /dispose/],
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
});
