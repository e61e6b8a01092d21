import { chacha20Block, keyWords } from './chacha20.ts';
import { DISCRETE_STREAM } from './gaussianNoise.ts';

const BLOCKS = 256;
const HALVES = 32;

/** The key stream of one element: 16-bit halves of its words, low half first. */
class Halves {
  private block = -1;
  private half = HALVES;
  private words: Uint32Array = new Uint32Array(16);

  constructor(
    private readonly key: Uint32Array,
    private readonly step: number,
    private readonly element: number,
    private readonly stream: number,
  ) {}

  get exhausted(): boolean {
    return this.block === BLOCKS;
  }

  next(): bigint {
    if (this.half === HALVES) {
      this.half = 0;
      if (++this.block < BLOCKS) {
        const high = Math.floor(this.element / 2 ** 32);
        const nonce = [
          this.stream * 2 ** 24 + high * 2 ** 8 + this.block,
          this.step % 2 ** 32,
          Math.floor(this.step / 2 ** 32),
        ];
        this.words = chacha20Block(this.key, this.element % 2 ** 32, nonce);
      }
    }
    const word = this.words[this.half >> 1];
    return BigInt(this.half++ % 2 === 1 ? word >>> 16 : word & 0xffff);
  }
}

/** True with probability n/d ≤ 1: a uniform number is compared with n/d, 16 binary digits at a time. */
function bernoulli(bits: Halves, n: bigint, d: bigint): boolean {
  if (n === 0n || n === d) return n === d;
  while (!bits.exhausted) {
    const digit = (n << 16n) / d;
    const drawn = bits.next();
    if (drawn !== digit) return drawn < digit;
    n = (n << 16n) - digit * d;
    if (n === 0n) return false;
  }
  return false;
}

/** True with probability e^(−n/d), n ≤ d (algorithm 1): k − 1 successes of n/(d·1), n/(d·2), … in a row. */
function bernoulliExp(bits: Halves, n: bigint, d: bigint): boolean {
  let k = 1n;
  while (bernoulli(bits, n, d) && bernoulli(bits, 1n, k)) k++;
  return k % 2n === 1n;
}

function bernoulliExpInteger(bits: Halves, n: bigint): boolean {
  for (; n > 0n; n--) if (!bernoulliExp(bits, 1n, 1n)) return false;
  return true;
}

/** True with probability e^(−(u + σv − σ)²/2σ²). */
function accept(bits: Halves, u: bigint, v: bigint, sigma: bigint): boolean {
  const d = 2n * sigma * sigma;
  if (v === 0n) return bernoulliExp(bits, (sigma - u) * (sigma - u), d);
  const w = v - 1n;
  if (!bernoulliExpInteger(bits, (w * w) / 2n + (u * w) / sigma)) return false;
  let n = u * u + 2n * sigma * ((u * w) % sigma) + (w % 2n) * sigma * sigma;
  for (; n >= d; n -= d) if (!bernoulliExp(bits, 1n, 1n)) return false;
  return bernoulliExp(bits, n, d);
}

function draw(bits: Halves, sigma: bigint, mask: bigint): number {
  while (sigma > 0n && !bits.exhausted) {
    let u = bits.next();
    if (mask > 0xffffn) u |= bits.next() << 16n;
    u &= mask;
    if (u >= sigma || !bernoulliExp(bits, u, sigma)) continue;
    let v = 0n;
    while (bernoulliExp(bits, 1n, 1n) && !bits.exhausted) v++;
    const negative = (bits.next() & 1n) === 1n;
    if (negative && u === 0n && v === 0n) continue; // one zero, not two
    if (!accept(bits, u, v, sigma) || bits.exhausted) continue;
    return Number(negative ? -(u + sigma * v) : u + sigma * v);
  }
  return 0;
}

/**
 * Integers z with P(z) ∝ e^(−z²/2σ²), exactly: Canonne, Kamath & Steinke 2020, "The Discrete Gaussian for
 * Differential Privacy", algorithms 1 to 3 with t = σ an integer; every comparison is of integers. Element e of a step
 * draws from its own key stream: counter = e mod 2³², nonce = (2²⁴·stream + 2⁸·⌊e/2³²⌋ + block, step low, step high),
 * block = 0 … 255.
 */
export function discreteGaussianReference(
  count: number,
  key: Uint8Array,
  step: number,
  offset: number,
  sigma: number,
  stream: number = DISCRETE_STREAM,
): Float64Array {
  const words = keyWords(key);
  let mask = 0;
  while (mask < sigma - 1) mask = 2 * mask + 1;
  return Float64Array.from({ length: count }, (_, i) =>
    draw(new Halves(words, step, offset + i, stream), BigInt(sigma), BigInt(mask)),
  );
}
