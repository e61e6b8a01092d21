import { createHash, randomBytes } from 'node:crypto';
import { HeddleError } from '../errors.ts';
import { callSync, type Op, type OpOptions } from '../op.ts';
import { chacha20Block, keyWords } from '../reference/privacy/chacha20.ts';

/** 32 bytes from the operating system's generator: the key of one run's noise and sampling. Keep it secret. */
export function createNoiseKey(): Uint8Array {
  return new Uint8Array(randomBytes(32));
}

/** @internal Checks a key and returns its eight words. */
export function keyArgument(key: unknown): Uint32Array {
  if (!(key instanceof Uint8Array) || key.length !== 32) {
    throw new HeddleError('ERR_ARGUMENT', 'key: expected a Uint8Array of 32 bytes');
  }
  return keyWords(key);
}

/** @internal Recognises a key in what is saved, and does not reveal it; another text for every use. */
export function keyFingerprint(key: Uint8Array, use: string): string {
  return createHash('sha256').update(`${use} key fingerprint`).update(key).digest('hex').slice(0, 32);
}

const op: Op = {
  name: 'chacha20Blocks',
  reference: (key: Uint32Array, counter: number, nonce: Uint32Array, count: number, out: Uint32Array) => {
    for (let b = 0; b < count; b++) out.set(chacha20Block(key, (counter + b) % 2 ** 32, nonce), 16 * b);
    return 0;
  },
};

/** @internal `count` consecutive blocks of the key stream (RFC 8439), 16 words each. */
export function chacha20Blocks(
  key: Uint32Array,
  counter: number,
  nonce: Uint32Array,
  count: number,
  options?: OpOptions,
): Uint32Array {
  const out = new Uint32Array(16 * count);
  callSync(op, [key, counter, nonce, count, out], options);
  return out;
}
