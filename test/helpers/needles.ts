/** Needles in long haystacks: keys made block by block from counters, so that any number of them needs two blocks. */
import {
  type KeyValueBlock,
  type StreamAttentionOptions,
  streamAttention,
} from '../../lib/attention/index.ts';
import { Tensor } from '../../lib/index.ts';
import type { AsyncOpOptions } from '../../lib/op.ts';

export const DIM = 128;
export const BLOCK = 8192;

/** Vectors whose elements are ±[0.5, 1), a function of the seed and their index alone. */
export function fillVectors(out: Float32Array, seed: number, first: number): void {
  const bits = new Uint32Array(out.buffer, out.byteOffset, out.length);
  let counter = (Math.imul(first, DIM) + Math.imul(seed, 0x9e3779b1)) | 0;
  for (let i = 0; i < bits.length; i++) {
    let h = Math.imul(counter ^ (counter >>> 16), 0x21f0aaad);
    h = Math.imul(h ^ (h >>> 15), 0x735a2d97);
    bits[i] = ((h ^ (h >>> 15)) & 0x807fffff) | 0x3f000000;
    counter = (counter + 1) | 0;
  }
}

export function vectors(seed: number, count: number): Float32Array {
  const out = new Float32Array(count * DIM);
  fillVectors(out, seed, 0);
  return out;
}

/** A query, the key that it must find, and the keys that it sees: those before `length`. */
export interface Needle {
  query: Float32Array;
  index: number;
  length: number;
}

/** Needle keys are their query times this: a logit of about 16.5, about half of the softmax over 10M keys. */
const STRENGTH = 2.5;

/** Needles at `depths` of each of `lengths`; no two at the same key. */
export function plantNeedles(lengths: number[], depths: number[], seed: number): Needle[] {
  const queries = vectors(seed, lengths.length * depths.length);
  const taken = new Set<number>();
  return lengths.flatMap((length, i) =>
    depths.map((depth, j) => {
      let index = Math.min(length - 1, Math.floor(depth * length));
      while (taken.has(index)) index = (index + 1) % length;
      taken.add(index);
      const row = i * depths.length + j;
      return { query: queries.slice(row * DIM, (row + 1) * DIM), index, length };
    }),
  );
}

export interface Haystack {
  length: number;
  seed: number;
  needles: Needle[];
}

/** The keys (and values) [first, first + tokens) of a haystack into memory that is given. */
function fillBlock(hay: Haystack, first: number, keys: Float32Array, values: Float32Array): void {
  fillVectors(keys, hay.seed, first);
  fillVectors(values, hay.seed + 1, first);
  const tokens = keys.length / DIM;
  for (const { query, index } of hay.needles) {
    if (index < first || index >= first + tokens) continue;
    for (let d = 0; d < DIM; d++) keys[(index - first) * DIM + d] = Math.fround(STRENGTH * query[d]);
  }
}

/**
 * One haystack, generated once, for several readers that end at different lengths: block b is made when every reader
 * that still runs has asked for it, which it does after it is done with block b - 2. A reader runs until its result is
 * there: it asks for what follows its last block while it still reads that block.
 */
class SharedHaystack {
  private readonly rooms = [0, 1].map(() => [new Float32Array(BLOCK * DIM), new Float32Array(BLOCK * DIM)]);
  private waiting: (() => void)[] = [];
  private made = -1;
  private active = 0;
  /** Time spent on making keys and values (and in `onBlock`), in milliseconds. */
  generating = 0;
  peakRss = 0;

  constructor(
    private readonly hay: Haystack,
    private readonly onBlock?: (first: number, keys: Float32Array) => void,
  ) {}

  /** Attention of queries `[queries, 1, DIM]` over the first `length` keys. */
  async attend(q: Tensor<'float32'>, length: number, options: StreamAttentionOptions) {
    this.active++;
    try {
      return await streamAttention(q, this.stream(length), options);
    } finally {
      this.active--;
      this.makeWhenAllWait(this.made + 1);
    }
  }

  private async *stream(length: number): AsyncGenerator<KeyValueBlock> {
    for (let block = 0; block * BLOCK < length; block++) {
      if (this.made < block) {
        const ready = new Promise<void>((resolve) => this.waiting.push(resolve));
        this.makeWhenAllWait(block);
        await ready;
      }
      const tokens = Math.min(BLOCK, length - block * BLOCK);
      const [k, v] = this.rooms[block % 2];
      const part = (x: Float32Array) => new Tensor('float32', x.subarray(0, tokens * DIM), [tokens, 1, DIM]);
      yield { keys: part(k), values: part(v) };
    }
  }

  private makeWhenAllWait(block: number): void {
    if (this.waiting.length === 0 || this.waiting.length < this.active) return;
    const start = performance.now();
    const first = block * BLOCK;
    const tokens = Math.min(BLOCK, this.hay.length - first);
    const [k, v] = this.rooms[block % 2].map((x) => x.subarray(0, tokens * DIM));
    fillBlock(this.hay, first, k, v);
    this.onBlock?.(first, k);
    this.generating += performance.now() - start;
    this.peakRss = Math.max(this.peakRss, process.memoryUsage.rss());
    this.made = block;
    for (const resolve of this.waiting.splice(0)) resolve();
  }
}

/** log-sum-exp of one query over a haystack, in float64, fed block by block. */
class Float64Softmax {
  private readonly query: Float64Array;
  private max = -Infinity;
  private sum = 0;

  constructor(query: Float32Array) {
    this.query = Float64Array.from(query);
  }

  add(keys: Float32Array): void {
    const scale = 1 / Math.sqrt(DIM);
    for (let at = 0; at < keys.length; at += DIM) {
      let z = 0;
      for (let d = 0; d < DIM; d++) z += this.query[d] * keys[at + d];
      z *= scale;
      if (z > this.max) {
        this.sum *= Math.exp(this.max - z);
        this.max = z;
      }
      this.sum += Math.exp(z - this.max);
    }
  }

  /** Weight of a key. */
  weight(key: Float32Array): number {
    let z = 0;
    for (let d = 0; d < DIM; d++) z += this.query[d] * key[d];
    return Math.exp(z / Math.sqrt(DIM) - this.max) / this.sum;
  }
}

export interface NeedleReport {
  cells: { length: number; depth: number; index: number; found: number; weight: number }[];
  wrong: number;
  planted: { count: number; recovered: number };
  single: { keys: number; weight: number; float64: number; relativeError: number };
  keys: number;
  seconds: number;
  generatingSeconds: number;
  rssGrowthMiB: number;
}

/**
 * One pass over a haystack with all needles in it answers all questions: a stream per length with one query per depth
 * (it ends at its length), one stream with a query for each of `planted` further needles, and one with a single
 * query whose weight is compared with float64 over the same keys.
 */
export async function findNeedles(
  lengths: number[],
  depths: number[],
  planted: number,
  options: AsyncOpOptions & { onProgress?(tokens: number): void } = {},
): Promise<NeedleReport> {
  const length = Math.max(...lengths);
  const cells = plantNeedles(lengths, depths, 11);
  const taken = new Set(cells.map((c) => c.index));
  const spread = Array.from({ length: planted + 1 }, (_, i) => (i + 0.37) / (planted + 1));
  const others = plantNeedles([length], spread, 12).map((n) => {
    while (taken.has(n.index)) n.index--;
    return n;
  });
  const single = others[planted >> 1];
  const exact = new Float64Softmax(single.query);
  const hay = { length, seed: 1, needles: [...cells, ...others] };
  const { onProgress, ...op } = options;
  const shared = new SharedHaystack(hay, (first, keys) => {
    exact.add(keys);
    onProgress?.(first);
  });
  const ask = (needles: Needle[], upTo: number) => {
    const q = new Float32Array(needles.length * DIM);
    for (const [i, n] of needles.entries()) q.set(n.query, i * DIM);
    const queries = new Tensor('float32', q, [needles.length, 1, DIM]);
    return shared.attend(queries, upTo, { ...op, returnArgmax: true });
  };
  // Everything is loaded and warm before memory is looked at.
  const small: Haystack = { length: 2 * BLOCK, seed: 1, needles: [] };
  await new SharedHaystack(small).attend(new Tensor('float32', single.query, [1, 1, DIM]), small.length, op);
  const before = process.memoryUsage.rss();
  const start = performance.now();
  const streams = [
    ...lengths.map((l) =>
      ask(
        cells.filter((c) => c.length === l),
        l,
      ),
    ),
    ask(others, length),
    ask([single], length),
  ];
  const results = await Promise.all(streams);
  const seconds = (performance.now() - start) / 1000;
  const report: NeedleReport['cells'] = [];
  for (const [i, l] of lengths.entries()) {
    const own = cells.filter((c) => c.length === l);
    for (const [j, c] of own.entries()) {
      const { index, weight } = results[i].argmax!;
      report.push({ length: l, depth: depths[j], index: c.index, found: index[j], weight: weight[j] });
    }
  }
  const many = results[lengths.length].argmax!;
  const one = results[lengths.length + 1].argmax!;
  const needleKey = Float32Array.from(single.query, (x) => Math.fround(STRENGTH * x));
  const expected = exact.weight(needleKey);
  return {
    cells: report,
    wrong: report.filter((c) => c.found !== c.index).length,
    planted: { count: others.length, recovered: others.filter((n, i) => many.index[i] === n.index).length },
    single: {
      keys: length,
      weight: one.weight[0],
      float64: expected,
      relativeError: one.index[0] === single.index ? Math.abs(one.weight[0] / expected - 1) : Infinity,
    },
    keys: length,
    seconds,
    generatingSeconds: shared.generating / 1000,
    rssGrowthMiB: (shared.peakRss - before) / 2 ** 20,
  };
}

/** Equal keys weigh the same, so the output is the mean of the values: the largest error over the largest mean. */
export async function equalKeysError(length: number, options: AsyncOpOptions = {}): Promise<number> {
  const key = vectors(5, 1);
  const keys = new Float32Array(BLOCK * DIM);
  for (let i = 0; i < BLOCK; i++) keys.set(key, i * DIM);
  const rooms = [new Float32Array(BLOCK * DIM), new Float32Array(BLOCK * DIM)];
  const mean = new Float64Array(DIM);
  function* blocks(): Generator<KeyValueBlock> {
    for (let first = 0, turn = 0; first < length; first += BLOCK, turn ^= 1) {
      const tokens = Math.min(BLOCK, length - first);
      const values = rooms[turn].subarray(0, tokens * DIM);
      fillVectors(values, 6, first);
      for (let i = 0; i < values.length; i++) {
        values[i] = Math.abs(values[i]);
        mean[i % DIM] += values[i];
      }
      const dims = [tokens, 1, DIM];
      yield {
        keys: new Tensor('float32', keys.subarray(0, tokens * DIM), dims),
        values: new Tensor('float32', values, dims),
      };
    }
  }
  const q = new Tensor('float32', vectors(7, 1), [1, 1, DIM]);
  const { output } = await streamAttention(q, blocks(), options);
  let worst = 0;
  let largest = 0;
  for (let d = 0; d < DIM; d++) {
    worst = Math.max(worst, Math.abs((output.data as Float32Array)[d] - mean[d] / length));
    largest = Math.max(largest, mean[d] / length);
  }
  return worst / largest;
}
