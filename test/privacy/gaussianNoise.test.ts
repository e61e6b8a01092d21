import { createCipheriv } from 'node:crypto';
import { describe, expect, it } from 'vitest';
import { HeddleError, Tensor } from '../../lib/index.ts';
import { normalCdf } from '../../lib/privacy/accountants/special.ts';
import { chacha20Blocks } from '../../lib/privacy/chacha20.ts';
import { addNoise, createNoiseKey, gaussianNoise, gaussianNoiseSync } from '../../lib/privacy/index.ts';
import { keyWords } from '../../lib/reference/privacy/chacha20.ts';
import { gaussianNoiseCases } from '../cases/privacy/gaussianNoise.ts';
import { nativeVariants } from '../helpers/backends.ts';
import { testCases } from '../helpers/cases.ts';

testCases(gaussianNoiseCases);

const native = nativeVariants();
const everywhere = [{ name: 'reference', options: { backend: 'reference' as const }, use() {} }, ...native];
const key = Uint8Array.from({ length: 32 }, (_, i) => 7 * i + 1);
const hex = (words: Uint32Array) => [...words].map((w) => w.toString(16).padStart(8, '0')).join(' ');

describe.each(everywhere)('ChaCha20 on $name', ({ options, use }) => {
  it('RFC 8439, 2.3.2 and A.1', () => {
    use();
    const sequence = keyWords(Uint8Array.from({ length: 32 }, (_, i) => i));
    expect(hex(chacha20Blocks(sequence, 1, Uint32Array.of(0x09000000, 0x4a000000, 0), 1, options))).toBe(
      'e4e7f110 15593bd1 1fdd0f50 c47120a3 c7f4d1c7 0368c033 9aaa2204 4e6cd4c3 ' +
        '466482d2 09aa9f07 05d7c214 a2028bd9 d19c12b5 b94e16de e883d0cb 4e3c50a2',
    );
    // Test vectors 1 and 2: blocks 0 and 1 of the zero key.
    expect(hex(chacha20Blocks(new Uint32Array(8), 0, new Uint32Array(3), 2, options))).toBe(
      'ade0b876 903df1a0 e56a5d40 28bd8653 b819d2bd 1aed8da0 ccef36a8 c70d778b ' +
        '7c5941da 8d485751 3fe02477 374ad8b8 f4b8436a 1ca11815 69b687c3 8665eeb2 ' +
        'bee7079f 7a385155 7c97ba98 0d082d73 a0290fcb 6965e348 3e53c612 ed7aee32 ' +
        '7621b729 434ee69c b03371d5 d539d874 281fed31 45fb0a51 1f0ae1ac 6f4d794b',
    );
  });

  it('equals OpenSSL over many blocks and a wrapping counter', () => {
    use();
    const nonce = Uint32Array.of(0, 0xdeadbeef, 3);
    const start = Uint32Array.of(0xffffff00, ...nonce);
    const stream = createCipheriv('chacha20', key, new Uint8Array(start.buffer)).update(
      new Uint8Array(64 * 256),
    );
    const blocks = chacha20Blocks(keyWords(key), 0xffffff00, nonce, 256, { ...options, threads: 2 });
    expect(Buffer.from(blocks.buffer).equals(stream)).toBe(true);
    const wrapped = chacha20Blocks(keyWords(key), 0xffffffff, nonce, 19, options);
    expect(hex(wrapped.subarray(16))).toBe(hex(chacha20Blocks(keyWords(key), 0, nonce, 18, options)));
  });
});

describe.each(everywhere)('gaussianNoise on $name', ({ options, use }) => {
  it('is the same for every split into shards and every number of threads', () => {
    use();
    const o = { ...options, key, step: 3, stddev: 1 };
    const n = options.backend === 'reference' ? 2_001 : 70_001;
    const whole = gaussianNoiseSync([n], { ...o, offset: 1000, threads: 2 });
    const bytes = (data: Float32Array) => Buffer.from(data.buffer);
    const one = gaussianNoiseSync([n], { ...o, offset: 1000, threads: 1 });
    expect(bytes(one.data).equals(bytes(whole.data))).toBe(true);
    for (const cut of [0, 1, 15, 16, 100, 128, n - 100, n]) {
      const parts = [
        gaussianNoiseSync([cut], { ...o, offset: 1000 }).data,
        gaussianNoiseSync([n - cut], { ...o, offset: 1000 + cut }).data,
      ];
      expect(Buffer.concat(parts.map(bytes)).equals(bytes(whole.data))).toBe(true);
    }
  });

  it('refuses bad arguments', async () => {
    use();
    const good = { ...options, key, step: 1, stddev: 1 };
    const code = (o: object, shape: unknown = [4]) =>
      gaussianNoise(shape as number[], o as typeof good).then(
        () => 'none',
        (e: HeddleError) => `${e instanceof HeddleError} ${e.code} ${e.message}`,
      );
    expect(await code({ ...good, key: new Uint8Array(31) })).toMatch(/true ERR_ARGUMENT key/);
    expect(await code({ ...good, key: 'secret' })).toMatch(/true ERR_ARGUMENT key/);
    expect(await code({ ...good, step: -1 })).toMatch(/ERR_OPTION step/);
    expect(await code({ ...good, step: undefined })).toMatch(/ERR_OPTION step/);
    expect(await code({ ...good, offset: 0.5 })).toMatch(/ERR_OPTION offset/);
    expect(await code({ ...good, stddev: -1 })).toMatch(/ERR_OPTION stddev/);
    expect(await code({ ...good, stddev: undefined })).toMatch(/ERR_OPTION stddev/);
    expect(await code({ ...good, seed: 1 })).toMatch(/ERR_OPTION.*seed/);
    expect(await code(good, 4)).toMatch(/ERR_ARGUMENT shape/);
    expect(await code(good, [-4])).toMatch(/ERR_SHAPE shape/);
    expect(await code({ ...good, out: new Tensor('float32', new Float32Array(3), [3]) })).toMatch(
      /ERR_SHAPE out/,
    );
    const values = new Tensor('int32', new Int32Array(3), [3]);
    await expect(addNoise(values, good)).rejects.toMatchObject({ code: 'ERR_DTYPE' });
    await expect(gaussianNoise([4], { ...good, signal: AbortSignal.abort() })).rejects.toMatchObject({
      code: 'ERR_ABORTED',
    });
    expect(createNoiseKey()).toHaveLength(32);
    expect(createNoiseKey()).not.toEqual(createNoiseKey());
  });
});

function kolmogorov(sorted: Float32Array, scale = 1): number {
  let worst = 0;
  const n = sorted.length;
  for (let i = 0; i < n; i++) {
    const cdf = normalCdf(sorted[i] * scale);
    worst = Math.max(worst, cdf - i / n, (i + 1) / n - cdf);
  }
  return worst * Math.sqrt(n);
}

function correlation(a: Float32Array, b: Float32Array): number {
  let sum = 0;
  for (let i = 0; i < b.length; i++) sum += a[i] * b[i];
  return sum / b.length;
}

describe.each(native.slice(0, 2))('distribution on $name', ({ name, options, use }) => {
  it('is standard normal, without correlation across keys, steps, shards and neighbours', () => {
    use();
    const n = name === native[0].name ? 10_000_000 : 1_000_000;
    const draw = (o: object = {}, count = n) =>
      gaussianNoiseSync([count], { ...options, key, step: 1, stddev: 1, ...o }).data;
    const noise = draw();
    const moments = [0, 0, 0, 0, 0];
    let far = 0;
    for (let i = 0; i < n; i++) {
      const x = noise[i];
      const square = x * x;
      moments[1] += x;
      moments[2] += square;
      moments[3] += square * x;
      moments[4] += square * square;
      if (square > 16) far++;
    }
    expect(Math.abs(moments[1] / n)).toBeLessThan(4 / Math.sqrt(n));
    expect(Math.abs(moments[2] / n - 1)).toBeLessThan(4 * Math.sqrt(2 / n));
    expect(Math.abs(moments[3] / n)).toBeLessThan(4 * Math.sqrt(15 / n));
    expect(Math.abs(moments[4] / n - 3)).toBeLessThan(4 * Math.sqrt(96 / n));
    const expected = 6.334e-5 * n; // beyond 4 standard deviations
    expect(Math.abs(far - expected)).toBeLessThan(4 * Math.sqrt(expected));
    const m = 1_000_000;
    const otherKey = key.slice();
    otherKey[31] ^= 1;
    for (const other of [
      draw({ key: otherKey }, m),
      draw({ step: 2 }, m),
      draw({ step: 1 + 2 ** 32 }, m),
      draw({ offset: n }, m),
      ...[1, 2, 15, 16, 17, 32, 112, 127, 128].map((offset) => draw({ offset }, m)),
    ]) {
      expect(Math.abs(correlation(noise, other))).toBeLessThan(4 / Math.sqrt(m));
    }
    const sorted = noise.slice().sort();
    expect(kolmogorov(sorted)).toBeLessThan(1.48); // p > .025
    expect(kolmogorov(sorted, 1.02)).toBeGreaterThan(3); // it would see an error of 2 %
    // JAX-Privacy's noise_addition_test rejects both.
    expect(kolmogorov(sorted, 2 / 3)).toBeGreaterThan(50);
    expect(kolmogorov(sorted, 3 / 2)).toBeGreaterThan(50);
  });
});
