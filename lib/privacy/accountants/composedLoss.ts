/**
 * Numerical composition: the distribution of the sum of independent discretised privacy losses, by one
 * Fourier transform per kind of step. Source: Gopi, Lee & Wutschitz (2021), algorithms 1 and 2.
 *
 * The transform computes the sum modulo the length of its window. Where that window must lie is not taken
 * from an RDP estimate but from a Chernoff bound on the discretised variables themselves, so the probability
 * that the sum leaves the window (and wraps around) is proven to be below `tail` on either side.
 */
import FFT from 'fft.js';
import type { DiscreteLoss } from './lossVariable.ts';

/** `steps` independent copies of one discretised loss. */
export interface RepeatedLoss {
  readonly loss: DiscreteLoss;
  readonly steps: number;
}

/** The distribution of a sum of losses on a regular mesh. */
export interface ComposedLoss {
  /** probability of low + i·mesh */
  readonly probabilities: Float64Array;
  readonly low: number;
  readonly mesh: number;
  /**
   * Bound on the rounding error of a sum of these probabilities. The error of a transform is spread evenly
   * over its points; its size shows in the most negative value, since probabilities are not. Twice that,
   * on every point, all of one sign, is far more than was ever seen (the signs alternate).
   */
  readonly rounding: number;
}

/** Values and spread that hold the sum but for `tail` probability on either side. */
export interface SumRange {
  readonly low: number;
  readonly high: number;
}

/** ln E[e^{λY}] of one discretised loss, by Horner's rule from the end where the terms are smallest. */
function cumulant(loss: DiscreteLoss, mesh: number, lambda: number): number {
  const p = loss.probabilities;
  const ratio = Math.exp(-Math.abs(lambda) * mesh);
  let sum = 0;
  let anchor: number;
  if (lambda > 0) {
    for (let i = 0; i < p.length; i++) sum = sum * ratio + p[i];
    anchor = loss.first + p.length - 1;
  } else {
    for (let i = p.length - 1; i >= 0; i--) sum = sum * ratio + p[i];
    anchor = loss.first;
  }
  if (sum === 0) return Infinity; // underflow: this λ tells nothing
  return Math.log(sum) + lambda * (anchor * mesh + loss.shift);
}

/**
 * Chernoff: P(S ≥ b) ≤ e^{K(λ) − λb} for every λ > 0, K the cumulant generating function of the sum; hence
 * b = (K(λ) + ln(1/tail))/λ, at whatever λ makes it smallest (any λ is valid). Likewise below with λ < 0.
 */
export function sumRange(losses: readonly RepeatedLoss[], mesh: number, tail: number): SumRange {
  const logTail = -Math.log(tail);
  let variance = mesh * mesh;
  for (const { loss, steps } of losses) variance += steps * varianceOf(loss, mesh);
  const start = Math.sqrt((2 * logTail) / variance);
  const bound = (sign: number): number => {
    const at = (logLambda: number): number => {
      const lambda = sign * Math.exp(logLambda);
      let sum = logTail;
      for (const { loss, steps } of losses) sum += steps * cumulant(loss, mesh, lambda);
      return sum / Math.abs(lambda);
    };
    // Golden-section search over ln λ; the best value seen counts.
    const golden = (Math.sqrt(5) - 1) / 2;
    let a = Math.log(start) - 6;
    let b = Math.log(start) + 3;
    let x1 = b - golden * (b - a);
    let x2 = a + golden * (b - a);
    let f1 = at(x1);
    let f2 = at(x2);
    let best = Math.min(f1, f2);
    for (let i = 0; i < 14; i++) {
      if (f1 <= f2) {
        b = x2;
        x2 = x1;
        f2 = f1;
        x1 = b - golden * (b - a);
        f1 = at(x1);
        best = Math.min(best, f1);
      } else {
        a = x1;
        x1 = x2;
        f1 = f2;
        x2 = a + golden * (b - a);
        f2 = at(x2);
        best = Math.min(best, f2);
      }
    }
    return sign * best;
  };
  return { low: bound(-1), high: bound(1) };
}

function varianceOf(loss: DiscreteLoss, mesh: number): number {
  const p = loss.probabilities;
  let mean = 0;
  for (let i = 0; i < p.length; i++) mean += p[i] * i;
  let variance = 0;
  for (let i = 0; i < p.length; i++) variance += p[i] * (i - mean) * (i - mean);
  return variance * mesh * mesh;
}

/**
 * The distribution of the sum on `size` mesh points around the middle of `range`.
 *
 * @param size a power of two, at least the number of bins of every loss and of the range
 */
export function compose(
  losses: readonly RepeatedLoss[],
  mesh: number,
  range: SumRange,
  size: number,
): ComposedLoss {
  const fft = new FFT(size);
  const buffer = new Float64Array(size);
  const scratch = new Float64Array(2 * size);
  let spectrum: Float64Array | undefined;
  let origin = 0; // value of the sum that index 0 stands for
  for (const { loss, steps } of losses) {
    const p = loss.probabilities;
    // Centred at its mean, so that the phases that are multiplied by `steps` are small.
    let mean = 0;
    for (let i = 0; i < p.length; i++) mean += p[i] * i;
    const centre = Math.round(mean);
    buffer.fill(0);
    for (let i = 0; i < p.length; i++) buffer[(i - centre + size) % size] = p[i];
    origin += steps * ((loss.first + centre) * mesh + loss.shift);
    const out = spectrum === undefined ? scratch : new Float64Array(2 * size);
    fft.realTransform(out, buffer);
    raise(out, steps, size);
    if (spectrum === undefined) spectrum = out;
    else multiply(spectrum, out, size);
  }
  const result = new Float64Array(2 * size);
  fft.completeSpectrum(spectrum!);
  fft.inverseTransform(result, spectrum!);
  const lowIndex = Math.round((0.5 * (range.low + range.high) - origin) / mesh) - size / 2;
  let lowest = -Number.EPSILON / size;
  for (let i = 0; i < size; i++) {
    const wrapped = (((lowIndex + i) % size) + size) % size;
    buffer[i] = result[2 * wrapped];
    if (buffer[i] < lowest) lowest = buffer[i];
  }
  return { probabilities: buffer, low: origin + lowIndex * mesh, mesh, rounding: -2 * size * lowest };
}

/**
 * Raises the first half of an interleaved spectrum to the power `steps`, in place, in polar form. It is first
 * divided by its value at frequency 0, which is 1 but for rounding that the power would multiply.
 */
function raise(spectrum: Float64Array, steps: number, size: number): void {
  const scale = 1 / spectrum[0];
  for (let i = 0; i <= size; i += 2) {
    const re = spectrum[i] * scale;
    const im = spectrum[i + 1] * scale;
    const magnitude = Math.exp(0.5 * steps * Math.log(re * re + im * im));
    const angle = steps * Math.atan2(im, re);
    spectrum[i] = magnitude * Math.cos(angle);
    spectrum[i + 1] = magnitude * Math.sin(angle);
  }
}

function multiply(into: Float64Array, by: Float64Array, size: number): void {
  for (let i = 0; i <= size; i += 2) {
    const re = into[i] * by[i] - into[i + 1] * by[i + 1];
    into[i + 1] = into[i] * by[i + 1] + into[i + 1] * by[i];
    into[i] = re;
  }
}

/**
 * δ(ε) = Σ_{t > ε} p(t)·(1 − e^{ε−t}) solved for ε: the ε at which it equals `delta`, or −Infinity where it
 * is smaller everywhere in the window. One pass from the top.
 */
export function epsilonAt(sum: ComposedLoss, delta: number): number {
  const { probabilities, low, mesh } = sum;
  const decay = Math.exp(-mesh);
  let mass = 0; // Σ p(t)
  let discounted = 0; // Σ p(t)·e^{t_i − t}
  for (let i = probabilities.length - 1; i >= 0; i--) {
    // Here mass and discounted are over t > t_i, discounted relative to t_{i+1}.
    if (mass - discounted * decay >= delta) {
      return low + (i + 1) * mesh + Math.log((mass - delta) / discounted);
    }
    mass += probabilities[i];
    discounted = discounted * decay + probabilities[i];
  }
  return -Infinity;
}

/** δ(ε) of the sum. */
export function deltaAt(sum: ComposedLoss, epsilon: number): number {
  const { probabilities, low, mesh } = sum;
  let delta = 0;
  const first = Math.max(0, Math.floor((epsilon - low) / mesh) + 1);
  for (let i = probabilities.length - 1; i >= first; i--) {
    delta -= probabilities[i] * Math.expm1(epsilon - (low + i * mesh));
  }
  return delta;
}
