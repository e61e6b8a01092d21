import { createCipheriv } from 'node:crypto';
import { xoroshiro128plus } from 'pure-rand/generator/xoroshiro128plus';
import { describe, expect, it } from 'vitest';
import { normalCdf } from '../../lib/privacy/accountants/special.ts';
import { chacha20Block, keyWords, quarterRound } from '../../lib/reference/privacy/chacha20.ts';
import { gaussianNoiseReference } from '../../lib/reference/privacy/gaussianNoise.ts';

const generator = xoroshiro128plus(6);

describe('ChaCha20 (RFC 8439)', () => {
  const hex = (words: Uint32Array) => [...words].map((w) => w.toString(16).padStart(8, '0')).join(' ');

  it('2.1.1: the quarter round', () => {
    const s = Uint32Array.of(0x11111111, 0x01020304, 0x9b8d6f43, 0x01234567);
    quarterRound(s, 0, 1, 2, 3);
    expect(hex(s)).toBe('ea2a92f4 cb1cf8ce 4581472e 5881c4bb');
  });

  it('2.3.2 and A.1: the block function', () => {
    const key = keyWords(Uint8Array.from({ length: 32 }, (_, i) => i));
    expect(hex(chacha20Block(key, 1, [0x09000000, 0x4a000000, 0]))).toBe(
      'e4e7f110 15593bd1 1fdd0f50 c47120a3 c7f4d1c7 0368c033 9aaa2204 4e6cd4c3 ' +
        '466482d2 09aa9f07 05d7c214 a2028bd9 d19c12b5 b94e16de e883d0cb 4e3c50a2',
    );
    expect(hex(chacha20Block(new Uint32Array(8), 0, [0, 0, 0]))).toBe(
      'ade0b876 903df1a0 e56a5d40 28bd8653 b819d2bd 1aed8da0 ccef36a8 c70d778b ' +
        '7c5941da 8d485751 3fe02477 374ad8b8 f4b8436a 1ca11815 69b687c3 8665eeb2',
    );
  });

  it('equals OpenSSL on random keys, counters and nonces', () => {
    for (let i = 0; i < 20; i++) {
      const words = Uint32Array.from({ length: 12 }, () => generator.next());
      const bytes = new Uint8Array(words.buffer);
      const stream = createCipheriv('chacha20', bytes.slice(0, 32), bytes.slice(32)).update(
        new Uint8Array(64),
      );
      const block = chacha20Block(keyWords(bytes.slice(0, 32)), words[8], words.slice(9));
      expect(Buffer.from(block.buffer).equals(stream)).toBe(true);
    }
  });
});

describe('gaussianNoise', () => {
  const key = Uint8Array.from({ length: 32 }, (_, i) => 7 * i + 1);

  it('is Box–Muller on the documented words', () => {
    const u = (low: number, high: number) => (high * 2 ** 32 + low + 0.5) / 2 ** 64;
    const first = 16 * (2 ** 28 + 5); // block 16q of group q = 2²⁸ + 5: the counter has wrapped once
    const noise = gaussianNoiseReference(128, key, 2 * 2 ** 32 + 9, 8 * first, 3);
    for (const l of [0, 1, 15]) {
      const words = chacha20Block(keyWords(key), 80 + l, [1, 9, 2]);
      for (let m = 0; m < 4; m++) {
        const radius = Math.sqrt(-2 * Math.log(u(words[4 * m], words[4 * m + 1])));
        const angle = 2 * Math.PI * u(words[4 * m + 2], words[4 * m + 3]);
        expect(noise[32 * m + l]).toBeCloseTo(3 * radius * Math.cos(angle), 12);
        expect(noise[32 * m + 16 + l]).toBeCloseTo(3 * radius * Math.sin(angle), 12);
      }
    }
  });

  it('is the same for every split into shards', () => {
    const whole = gaussianNoiseReference(101, key, 3, 1000, 1);
    for (const cut of [0, 1, 7, 8, 50, 101]) {
      const parts = [
        ...gaussianNoiseReference(cut, key, 3, 1000, 1),
        ...gaussianNoiseReference(101 - cut, key, 3, 1000 + cut, 1),
      ];
      expect(parts).toEqual([...whole]);
    }
  });

  it('is standard normal (Kolmogorov–Smirnov, moments) and uncorrelated across keys, steps and offsets', () => {
    const n = 100_000;
    const noise = gaussianNoiseReference(n, key, 1, 0, 1);
    const moment = (power: number) => noise.reduce((sum, x) => sum + x ** power, 0) / n;
    expect(Math.abs(moment(1))).toBeLessThan(4 / Math.sqrt(n));
    expect(Math.abs(moment(2) - 1)).toBeLessThan(4 * Math.sqrt(2 / n));
    expect(Math.abs(moment(3))).toBeLessThan(4 * Math.sqrt(15 / n));
    expect(Math.abs(moment(4) - 3)).toBeLessThan(4 * Math.sqrt(96 / n));
    const ks = (scale: number) => {
      const sorted = noise.slice().sort();
      let worst = 0;
      sorted.forEach((x, i) => {
        const cdf = normalCdf(x * scale);
        worst = Math.max(worst, cdf - i / n, (i + 1) / n - cdf);
      });
      return worst * Math.sqrt(n);
    };
    expect(ks(1)).toBeLessThan(1.48); // p > .025
    expect(ks(2 / 3)).toBeGreaterThan(10);
    expect(ks(1.02)).toBeGreaterThan(1.48);
    const otherKey = key.slice();
    otherKey[31] ^= 1;
    for (const other of [
      gaussianNoiseReference(n, otherKey, 1, 0, 1),
      gaussianNoiseReference(n, key, 2, 0, 1),
      gaussianNoiseReference(n, key, 1 + 2 ** 32, 0, 1),
      gaussianNoiseReference(n, key, 1, n, 1),
      gaussianNoiseReference(n, key, 1, 1, 1),
    ]) {
      const correlation = other.reduce((sum, x, i) => sum + x * noise[i], 0) / n;
      expect(Math.abs(correlation)).toBeLessThan(4 / Math.sqrt(n));
    }
  });
});
