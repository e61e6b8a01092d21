import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import {
  attentionSync,
  type KeyValueBlock,
  type StreamAttentionOptions,
  streamAttention,
} from '../../lib/attention/index.ts';
import { encodeFloats, type FloatType } from '../../lib/dtype.ts';
import { type DTypeArrays, Tensor } from '../../lib/index.ts';
import { compareOutputs, sameBits } from '../cases/case.ts';
import { Random } from '../cases/random.ts';
import { nativeVariants } from '../helpers/backends.ts';
import { expectRejection } from '../helpers/errors.ts';
import { writeSafetensors } from '../helpers/safetensors.ts';

const scratch = mkdtempSync(join(tmpdir(), 'heddle-stream-'));
afterAll(() => rmSync(scratch, { recursive: true, force: true }));
const variants = nativeVariants();
const everywhere = [{ name: 'reference', options: { backend: 'reference' as const }, use() {} }, ...variants];

function draw<T extends FloatType>(random: Random, dims: number[], type: T): Tensor<T> {
  const values = random.normals(dims.reduce((a, b) => a * b, 1));
  return new Tensor(type, encodeFloats(values, type) as DTypeArrays[T], dims);
}

function* cut(k: Tensor, v: Tensor, sizes: number[]): Generator<KeyValueBlock> {
  let at = 0;
  const part = (t: Tensor, n: number) => {
    const size = t.dims[1] * t.dims[2];
    const data = t.data.slice(at * size, (at + n) * size) as Float32Array;
    return new Tensor(t.type as 'float32', data, [n, t.dims[1], t.dims[2]]);
  };
  for (const n of sizes) {
    yield { keys: part(k, n), values: part(v, n) };
    at += n;
  }
}

const shapes: {
  name: string;
  queries: number;
  heads: number;
  keyHeads: number;
  dim: number;
  valueDim: number;
  sizes: number[];
  type?: FloatType;
  options?: StreamAttentionOptions;
  sinks?: boolean;
}[] = [
  { name: 'one head', queries: 1, heads: 1, keyHeads: 1, dim: 32, valueDim: 32, sizes: [2048, 1024, 77] },
  {
    name: 'odd blocks',
    queries: 3,
    heads: 4,
    keyHeads: 2,
    dim: 19,
    valueDim: 21,
    sizes: [1, 700, 0, 333, 1500],
  },
  {
    name: 'causal window',
    queries: 40,
    heads: 2,
    keyHeads: 2,
    dim: 16,
    valueDim: 16,
    sizes: [900, 300],
    options: { causal: true, window: [600, -1] },
  },
  {
    name: 'softcap, ALiBi, sinks',
    queries: 2,
    heads: 4,
    keyHeads: 1,
    dim: 24,
    valueDim: 40,
    sizes: [500, 600],
    sinks: true,
    options: { softcap: 3, scale: 0.7, alibiSlopes: Float32Array.of(0.5, 0.1, 0.01, 0.001) },
  },
  {
    name: 'bf16',
    queries: 2,
    heads: 4,
    keyHeads: 2,
    dim: 64,
    valueDim: 64,
    sizes: [300, 900],
    type: 'bfloat16',
  },
  { name: 'fp16', queries: 2, heads: 2, keyHeads: 2, dim: 64, valueDim: 48, sizes: [1200], type: 'float16' },
];

describe.each(everywhere)('streamAttention on $name', ({ options: backend, use }) => {
  it.each(shapes)('equals attention over all keys: $name', async (s) => {
    use();
    const random = new Random(5);
    const type = s.type ?? 'float32';
    const total = s.sizes.reduce((a, b) => a + b);
    const k = draw(random, [total, s.keyHeads, s.dim], type);
    const v = draw(random, [total, s.keyHeads, s.valueDim], type);
    const q = draw(random, [s.queries, s.heads, s.dim], type);
    const options = { ...s.options, ...(s.sinks ? { sinks: random.normals(s.heads) } : {}) };
    const whole = attentionSync(
      q.reshape([1, ...q.dims]),
      k.reshape([1, ...k.dims]),
      v.reshape([1, ...v.dims]),
      { ...options, backend: 'reference', returnLogSumExp: true },
    );
    const run = (threads: number) =>
      streamAttention(q, cut(k, v, s.sizes), {
        ...options,
        ...backend,
        threads,
        totalKeys: total,
        returnArgmax: true,
      });
    const r = await run(1);
    expect(r.keys).toBe(total);
    expect(r.output.dims).toEqual([s.queries, s.heads, s.valueDim]);
    const floats = (t: Tensor<FloatType>, dims: number[]) =>
      t.type === 'float32'
        ? new Tensor('float32', t.data as Float32Array, dims)
        : new Tensor('float32', Float32Array.from(decode(t)), dims);
    const dims = [s.queries * s.heads * s.valueDim];
    const bound = { float32: 5e-6, float16: 1e-3, bfloat16: 5e-3 }[type];
    expect(compareOutputs([floats(r.output, dims)], [floats(whole.output, dims)]).relative).toBeLessThan(
      bound,
    );
    const lse = whole.logSumExp!.reshape([s.heads, s.queries]);
    expect(compareOutputs([r.logSumExp], [lse]).relative).toBeLessThan(1e-6);
    const again = await run(2);
    expect(sameBits([again.output, again.logSumExp], [r.output, r.logSumExp])).toBe(true);
    expect(again.argmax).toEqual(r.argmax);
    if (backend.backend === 'reference') return;
    const exact = await streamAttention(q, cut(k, v, s.sizes), {
      ...options,
      backend: 'reference',
      totalKeys: total,
      returnArgmax: true,
    });
    expect(Array.from(r.argmax!.index)).toEqual(Array.from(exact.argmax!.index));
    for (const [i, w] of exact.argmax!.weight.entries()) {
      expect(Math.abs(r.argmax!.weight[i] / w - 1)).toBeLessThan(2e-5);
      expect(Math.abs(r.argmax!.logit[i] - exact.argmax!.logit[i])).toBeLessThan(2e-5);
    }
  });

  it('blocks of whole parts give the same bits whatever their size', async () => {
    use();
    const random = new Random(6);
    const tokens = backend.backend === 'reference' ? 1300 : 5000;
    const k = draw(random, [tokens, 2, 16], 'float32');
    const v = draw(random, [tokens, 2, 16], 'float32');
    const q = draw(random, [2, 4, 16], 'float32');
    const run = (blockTokens?: number) =>
      streamAttention(q, { keys: k, values: v }, { ...backend, blockTokens });
    const one = await run();
    for (const size of [1024, 2048, 4096]) {
      if (backend.backend === 'reference' && size !== 1024) continue;
      const r = await run(size);
      expect(sameBits([r.output, r.logSumExp], [one.output, one.logSumExp])).toBe(true);
    }
  });

  it('int8 with scales equals float32 of the products', async () => {
    use();
    const random = new Random(7);
    const integers = () =>
      Int8Array.from(random.normals(300 * 2 * 16), (x) => Math.max(-127, Math.min(127, 40 * x)));
    const scale = () => Float32Array.from(random.normals(600), (x) => 0.01 + Math.abs(x) / 50);
    const [k, v, keyScales, valueScales] = [integers(), integers(), scale(), scale()];
    const product = (x: Int8Array, s: Float32Array) =>
      new Tensor(
        'float32',
        Float32Array.from(x, (y, i) => y * s[i >> 4]),
        [300, 2, 16],
      );
    const block = {
      keys: new Tensor('int8', k, [300, 2, 16]),
      values: new Tensor('int8', v, [300, 2, 16]),
      keyScales,
      valueScales,
    };
    const q = draw(random, [1, 2, 16], 'float32');
    const a = await streamAttention(q, block, backend);
    const b = await streamAttention(
      q,
      { keys: product(k, keyScales), values: product(v, valueScales) },
      { backend: 'reference' },
    );
    expect(compareOutputs([a.output, a.logSumExp], [b.output, b.logSumExp]).relative).toBeLessThan(5e-6);
  });

  it('a key that is not visible, or weighs nothing, never brings in NaN', async () => {
    use();
    const random = new Random(8);
    const k = draw(random, [100, 1, 8], 'float32');
    const v = draw(random, [100, 1, 8], 'float32');
    k.data.fill(Number.NaN, 99 * 8);
    v.data.fill(Number.NaN, 99 * 8);
    k.data.fill(-1e4, 0, 8);
    v.data.fill(Number.POSITIVE_INFINITY, 0, 8);
    const q = new Tensor('float32', new Float32Array(16).fill(1), [2, 1, 8]);
    const r = await streamAttention(q, { keys: k, values: v }, { ...backend, causal: true });
    const [first, second] = [r.output.data.slice(0, 8), r.output.data.slice(8)];
    expect(Array.from(first).every(Number.isFinite)).toBe(true);
    expect(Array.from(second).every(Number.isNaN)).toBe(true);
  });
});

function decode(t: Tensor<FloatType>): number[] {
  const view = new DataView(new ArrayBuffer(4));
  return Array.from(t.data as Uint16Array, (bits) => {
    if (t.type === 'bfloat16') {
      view.setUint32(0, bits << 16);
      return view.getFloat32(0);
    }
    const sign = bits & 0x8000 ? -1 : 1;
    const exponent = (bits >> 10) & 31;
    const fraction = bits & 1023;
    return sign * (exponent === 0 ? fraction * 2 ** -24 : (1 + fraction / 1024) * 2 ** (exponent - 15));
  });
}

describe('sources of streamAttention', () => {
  const random = new Random(9);
  const k = draw(random, [3000, 2, 16], 'float32');
  const v = draw(random, [3000, 2, 16], 'float32');
  const q = draw(random, [1, 2, 2, 16], 'float32');
  const expected = () => streamAttention(q, { keys: k, values: v });

  it('a safetensors file and raw files give what memory gives', async () => {
    const bytes = (t: Tensor<'float32'>) =>
      new Uint8Array(t.data.buffer, t.data.byteOffset, t.data.byteLength);
    const file = join(scratch, 'kv.safetensors');
    writeSafetensors(file, {
      k: { dtype: 'F32', dims: [3000, 2, 16], bytes: bytes(k) },
      v: { dtype: 'F32', dims: [3000, 2, 16], bytes: bytes(v) },
    });
    const raw = join(scratch, 'v.bin');
    writeFileSync(raw, Buffer.concat([Buffer.alloc(24), bytes(v)]));
    const want = await expected();
    expect(want.output.dims).toEqual([1, 2, 2, 16]);
    const type = 'float32' as const;
    for (const source of [
      { path: file, keys: 'k', values: 'v' },
      { path: file, valuesPath: raw, keys: 'k', values: { type, dims: [3000, 2, 16] as const, offset: 24 } },
    ]) {
      const r = await streamAttention(q, source, { blockTokens: 1024 });
      expect(sameBits([r.output, r.logSumExp], [want.output, want.logSumExp])).toBe(true);
    }
    const missing = streamAttention(q, { path: file, keys: 'k', values: 'w' });
    await expectRejection(missing, 'ERR_CHECKPOINT', /no tensor 'w' for values/);
    const short = { path: raw, keys: { type, dims: [3000, 2, 16] as const, offset: 25 }, values: 'v' };
    await expectRejection(streamAttention(q, short), 'ERR_SHAPE', /^keys: .* from byte 25 on need/);
    await expectRejection(
      streamAttention(q, { path: join(scratch, 'none'), keys: 'k', values: 'v' }),
      'ERR_CHECKPOINT',
      /none/,
    );
  });

  it('an async generator is asked for at most one block ahead, and told to end', async () => {
    let asked = 0;
    let done = 0;
    let ended = false;
    async function* blocks() {
      try {
        for (const block of cut(k, v, [1024, 1024, 952])) {
          asked++;
          expect(asked - done).toBeLessThanOrEqual(2);
          yield block;
        }
      } finally {
        ended = true;
      }
    }
    const seen: number[] = [];
    const r = await streamAttention(q, blocks(), {
      onProgress: ({ tokens, total }) => {
        done++;
        seen.push(tokens);
        expect(total).toBeUndefined();
      },
    });
    const want = await expected();
    expect(sameBits([r.output], [want.output])).toBe(true);
    expect(seen).toEqual([1024, 2048, 3000]);
    expect(ended).toBe(true);
    ended = false;
    asked = done = 0;
    const stop = streamAttention(q, blocks(), {
      onProgress() {
        throw new Error('enough');
      },
    });
    await expect(stop).rejects.toThrow('enough');
    await new Promise((resolve) => setImmediate(resolve));
    expect(ended).toBe(true);
  });

  it('an abort ends it, even while a block never comes', async () => {
    const controller = new AbortController();
    async function* stuck() {
      yield* cut(k, v, [1024]);
      await new Promise(() => {});
    }
    const running = streamAttention(q, stuck(), {
      signal: controller.signal,
      onProgress: () => setImmediate(() => controller.abort('late')),
    });
    await expectRejection(running, 'ERR_ABORTED', /streamAttention was aborted/);
    await expectRejection(
      streamAttention(q, stuck(), { signal: AbortSignal.abort() }),
      'ERR_ABORTED',
      /aborted/,
    );
  });

  const good = { keys: k, values: v };
  const refusals: [string, () => Promise<unknown>, Parameters<typeof expectRejection>[1], RegExp][] = [
    ['no source', () => streamAttention(q, undefined as never), 'ERR_ARGUMENT', /^source/],
    ['no block', () => streamAttention(q, []), 'ERR_VALUE', /^source: it has no block/],
    ['q rank', () => streamAttention(Tensor.zeros('float32', [2, 1, 2, 16]), good), 'ERR_SHAPE', /^q: /],
    ['head dim', () => streamAttention(Tensor.zeros('float32', [1, 2, 8]), good), 'ERR_SHAPE', /^k: .*8/],
    [
      'heads',
      () => streamAttention(Tensor.zeros('float32', [1, 3, 16]), good),
      'ERR_SHAPE',
      /multiple of the 2/,
    ],
    ['unknown option', () => streamAttention(q, good, { mask: 1 } as never), 'ERR_OPTION', /mask/],
    ['totalKeys', () => streamAttention(q, good, { totalKeys: 2999 }), 'ERR_OPTION', /^totalKeys/],
    [
      'causal without',
      () => streamAttention(q, [good], { causal: true }),
      'ERR_OPTION',
      /^totalKeys must be given/,
    ],
    [
      'more than told',
      () => streamAttention(q, [good, good], { totalKeys: 4000 }),
      'ERR_VALUE',
      /^block 1: key 4000/,
    ],
    [
      'tokens differ',
      () => streamAttention(q, { keys: k, values: Tensor.zeros('float32', [2, 2, 16]) }),
      'ERR_SHAPE',
      /^values/,
    ],
    [
      'a block of another type',
      () =>
        streamAttention(q, [
          good,
          { keys: Tensor.zeros('int8', [1, 2, 16]), values: Tensor.zeros('int8', [1, 2, 16]) },
        ]),
      'ERR_DTYPE',
      /^block 1: values/,
    ],
    [
      'a block of other dims',
      () =>
        streamAttention(q, [
          good,
          { keys: Tensor.zeros('float32', [1, 2, 16]), values: Tensor.zeros('float32', [1, 2, 8]) },
        ]),
      'ERR_SHAPE',
      /^block 1: values: expected \[1, 2, 16\]/,
    ],
    [
      'scales',
      () => streamAttention(q, [{ ...good, keyScales: new Float32Array(3) }]),
      'ERR_SHAPE',
      /keyScales: expected a Float32Array of 6000/,
    ],
    [
      'the source throws',
      () =>
        streamAttention(
          q,
          (function* () {
            yield good;
            throw new RangeError('broken');
          })(),
        ).catch((e) => {
          expect(e).toBeInstanceOf(RangeError);
          return streamAttention(q, []);
        }),
      'ERR_VALUE',
      /no block/,
    ],
  ];
  it.each(refusals)('refuses: %s', async (_, run, code, message) => {
    await expectRejection(run(), code, message);
  });
});
