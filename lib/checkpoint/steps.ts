/**
 * File work written once and run either way: a generator yields steps, each of which knows how to run
 * synchronously and asynchronously, and a runner drives it. So `openCheckpoint` and `openCheckpointSync`
 * (and every pair of reads) share one body and cannot drift apart.
 */
export interface Step {
  sync(): unknown;
  async(): Promise<unknown>;
}

/** A computation that returns `T` after some file work. */
export type Steps<T> = Generator<Step, T, unknown>;

/** One step; used as `const value = yield* step(() => readNow(), () => readLater())`. */
export function* step<T>(sync: () => T, async: () => Promise<T>): Steps<T> {
  return (yield { sync, async }) as T;
}

/** Runs all steps on the calling thread. */
export function runSync<T>(steps: Steps<T>): T {
  let result = steps.next();
  while (!result.done) {
    let value: unknown;
    let failure: { error: unknown } | undefined;
    try {
      value = result.value.sync();
    } catch (error) {
      failure = { error };
    }
    result = failure ? steps.throw(failure.error) : steps.next(value);
  }
  return result.value;
}

/** Runs all steps without blocking the event loop on file access. */
export async function runAsync<T>(steps: Steps<T>): Promise<T> {
  let result = steps.next();
  while (!result.done) {
    let value: unknown;
    let failure: { error: unknown } | undefined;
    try {
      value = await result.value.async();
    } catch (error) {
      failure = { error };
    }
    result = failure ? steps.throw(failure.error) : steps.next(value);
  }
  return result.value;
}
