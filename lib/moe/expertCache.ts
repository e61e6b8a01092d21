/**
 * Experts that are read and packed on first use and evicted, the least recently used first, so that packed bytes
 * stay within a budget. Every expert of a layer takes the same bytes, so the budget is a number of slots.
 *
 * Experts of a running forward are pinned. One forward at a time takes slots (the lock), and it holds pins of one
 * group only, all of which fit: whoever it waits for has its pins already and gives them back without the lock.
 * So nothing can wait in a circle.
 */
import { type Steps, step } from '../checkpoint/steps.ts';
import { HeddleError } from '../errors.ts';
import { type AsyncOpOptions, call, callSync } from '../op.ts';
import type { ExpertData, ExpertReader } from './expertReader.ts';
import { type ExpertWeights, preparePackInto } from './experts.ts';

/** Counters of a layer with a `memoryBudget`, since it was loaded. */
export interface ExpertCacheStats {
  /** Experts that a forward needed and found packed; each expert counts once per forward. */
  hits: number;
  /** Experts that a forward had to read and pack. */
  misses: number;
  evictions: number;
  /** Bytes of packed experts now, the one being packed included. */
  bytes: number;
  /** The `memoryBudget`. */
  budget: number;
  /** Bytes of experts read from the checkpoint. */
  bytesRead: number;
}

export type CacheOptions = Pick<AsyncOpOptions, 'threads' | 'signal'>;

type Wake = () => void;

export class ExpertCache {
  readonly weights: ExpertWeights;
  /** Experts that fit the budget together. */
  readonly capacity: number;
  private readonly reader: ExpertReader;
  private readonly ownsCheckpoint: boolean;
  private readonly expertBytes: number;
  private readonly counters: ExpertCacheStats;
  /** Packed experts, the least recently used first, with the number of forwards that use each. */
  private readonly pins = new Map<number, number>();
  private locked = false;
  private readonly queue: Wake[] = [];
  /** The lock's holder while it waits for pins to be given back. */
  private readonly roomWaiters: Wake[] = [];

  /** @throws HeddleError `ERR_OPTION` when the budget holds no expert */
  constructor(weights: ExpertWeights, reader: ExpertReader, budget: number, ownsCheckpoint: boolean) {
    this.weights = weights;
    this.reader = reader;
    this.ownsCheckpoint = ownsCheckpoint;
    this.expertBytes = weights.expertBytes(reader.biased);
    this.capacity = Math.min(weights.experts, Math.floor(budget / this.expertBytes));
    if (this.capacity === 0) {
      throw new HeddleError(
        'ERR_OPTION',
        `memoryBudget of ${budget} bytes holds no expert: one takes ${this.expertBytes} bytes as ${weights.type}`,
      );
    }
    this.counters = { hits: 0, misses: 0, evictions: 0, bytes: 0, budget, bytesRead: 0 };
  }

  get stats(): ExpertCacheStats {
    return { ...this.counters };
  }

  /**
   * Packs and pins experts of `wanted`: all of them where they fit together, else as many as do, packed ones first.
   * @returns those pinned; to be given to {@link release}
   */
  *acquire(wanted: ReadonlySet<number>, options: CacheOptions): Steps<number[]> {
    // Nothing to pack: no need to queue behind another forward's reads. Not past one that waits for pins, which
    // a stream of such forwards could keep from it for ever.
    if (this.roomWaiters.length === 0 && [...wanted].every((e) => this.pins.has(e))) return this.hit(wanted);
    yield* step(
      () => this.lockNow(),
      () => this.lock(options.signal),
    );
    const pinned: number[] = [];
    try {
      const packed = [...wanted].filter((e) => this.pins.has(e));
      const absent = [...wanted]
        .filter((e) => !this.pins.has(e))
        .slice(0, Math.max(0, this.capacity - packed.length));
      pinned.push(...this.hit(packed));
      let ahead: Promise<ExpertData> | undefined;
      for (const [i, expert] of absent.entries()) {
        const reading = ahead;
        const data: ExpertData = yield* this.makeRoomAndRead(expert, reading, options.signal);
        this.counters.bytesRead += data.bytes;
        ahead = yield* this.pack(expert, data, absent[i + 1], options);
        this.pins.set(expert, 1);
        pinned.push(expert);
        this.counters.misses++;
      }
      return pinned;
    } catch (error) {
      this.release(pinned);
      throw error;
    } finally {
      this.unlock();
    }
  }

  /** Ends a forward's use of experts. */
  release(experts: readonly number[]): void {
    for (const e of experts) this.pins.set(e, (this.pins.get(e) as number) - 1);
    for (const wake of this.roomWaiters.splice(0)) wake();
  }

  /** Frees everything; no forward may be running. */
  dispose(): void {
    this.pins.clear();
    this.counters.bytes = 0;
    if (this.ownsCheckpoint) this.reader.close();
    this.weights.dispose();
  }

  private hit(experts: Iterable<number>): number[] {
    const list = [...experts];
    for (const e of list) {
      const pins = this.pins.get(e) as number;
      this.pins.delete(e); // to the end of the order
      this.pins.set(e, pins + 1);
    }
    this.counters.hits += list.length;
    return list;
  }

  /** A free slot, and meanwhile the expert's weights. */
  private *makeRoomAndRead(
    expert: number,
    ahead: Promise<ExpertData> | undefined,
    signal: AbortSignal | undefined,
  ): Steps<ExpertData> {
    const reading = yield* step(
      () => undefined,
      // In an object: a step's own promise would be awaited.
      async () => ({ data: ahead ?? this.read(expert, signal) }),
    );
    while (this.pins.size >= this.capacity) {
      let victim: number | undefined;
      for (const [e, pins] of this.pins) {
        if (pins === 0) {
          victim = e;
          break;
        }
      }
      if (victim === undefined) {
        yield* step(
          () => {
            throw held();
          },
          () => waitIn(this.roomWaiters, signal),
        );
        continue;
      }
      this.pins.delete(victim);
      this.counters.evictions++;
      this.free(victim);
    }
    return yield* step(
      () => this.reader.readSync(expert),
      () => reading?.data as Promise<ExpertData>,
    );
  }

  /** Packs into the expert's slot; asynchronously, the read of `next` begins at the same time and is returned. */
  private *pack(
    expert: number,
    data: ExpertData,
    next: number | undefined,
    options: CacheOptions,
  ): Steps<Promise<ExpertData> | undefined> {
    const { weights } = this;
    const o = { ...options, backend: weights.backend };
    this.count(this.expertBytes);
    try {
      const { op, args } = preparePackInto(weights, expert, data);
      const { ahead } = yield* step<{ ahead?: Promise<ExpertData> }>(
        () => {
          callSync(op, args, { threads: o.threads, backend: o.backend });
          return {};
        },
        async () => {
          const ahead = next === undefined ? undefined : this.read(next, o.signal);
          await call(op, args, o);
          return { ahead };
        },
      );
      return ahead;
    } catch (error) {
      this.free(expert); // packed in part, perhaps
      throw this.reader.failure(expert, error);
    }
  }

  private read(expert: number, signal: AbortSignal | undefined): Promise<ExpertData> {
    const reading = this.reader.read(expert, signal);
    reading.catch(() => {}); // awaited later, or not at all when another step fails first
    return reading;
  }

  private free(expert: number): void {
    this.weights.evict(expert);
    this.count(-this.expertBytes);
  }

  private count(change: number): void {
    this.counters.bytes += change;
    this.weights.accountAs(this.counters.bytes);
  }

  private lockNow(): void {
    if (this.locked) throw held();
    this.locked = true;
  }

  private async lock(signal: AbortSignal | undefined): Promise<void> {
    if (!this.locked && signal?.aborted !== true) this.locked = true;
    else await waitIn(this.queue, signal); // woken as the holder
  }

  private unlock(): void {
    const next = this.queue.shift();
    if (next === undefined) this.locked = false;
    else next();
  }
}

/** Waits until somebody takes the wake-up out of `list` and calls it. */
function waitIn(list: Wake[], signal: AbortSignal | undefined): Promise<void> {
  return new Promise((resolve, reject) => {
    const abort = () => {
      const at = list.indexOf(wake);
      if (at >= 0) list.splice(at, 1);
      reject(
        new HeddleError('ERR_ABORTED', 'MoELayer.forward was aborted while it waited for memory', {
          cause: signal?.reason,
        }),
      );
    };
    const wake = () => {
      signal?.removeEventListener('abort', abort);
      resolve();
    };
    if (signal?.aborted) return abort();
    signal?.addEventListener('abort', abort, { once: true });
    list.push(wake);
  });
}

function held(): HeddleError {
  return new HeddleError(
    'ERR_MEMORY',
    'forwardSync cannot wait for the asynchronous forwards that hold the memoryBudget; await them first',
  );
}
