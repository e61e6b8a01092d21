import { expect, it } from 'vitest';
import { HeddleError, type HeddleErrorCode } from '../../lib/errors.ts';
import type { OpOptions } from '../../lib/op.ts';

// vitest's toMatchObject accepts any string where a RegExp is expected, so messages are checked here.
function check(error: unknown, code: HeddleErrorCode, message: RegExp): void {
  expect(error).toBeInstanceOf(HeddleError);
  expect((error as HeddleError).code).toBe(code);
  expect((error as HeddleError).message).toMatch(message);
}

/** The error that `run` throws. */
export function thrown(run: () => unknown): HeddleError {
  try {
    run();
  } catch (error) {
    expect(error).toBeInstanceOf(HeddleError);
    return error as HeddleError;
  }
  throw new Error('expected an error');
}

/** The error that a promise rejects with. */
export async function rejection(promise: Promise<unknown>): Promise<HeddleError> {
  const error = await promise.then(
    () => new Error('expected an error'),
    (e) => e,
  );
  expect(error).toBeInstanceOf(HeddleError);
  return error;
}

/** The promise must reject with this code and message. */
export async function expectRejection(
  promise: Promise<unknown>,
  code: HeddleErrorCode,
  message: RegExp,
): Promise<void> {
  let error: unknown;
  try {
    await promise;
  } catch (e) {
    error = e;
  }
  check(error, code, message);
}

/** The call must throw with this code and message. */
export function expectThrow(run: () => unknown, code: HeddleErrorCode, message: RegExp): void {
  let error: unknown;
  try {
    run();
  } catch (e) {
    error = e;
  }
  check(error, code, message);
}

/** Name, call, code and message of one refusal. The call passes `options` on, so that the backend can be chosen. */
export type Refusal = [name: string, run: (options: OpOptions) => unknown, code: string, message: RegExp];

/** Bad input must give the same `HeddleError` whatever the backend. */
export function testRefusals(refusals: Refusal[]): void {
  it.each(refusals)('%s', (_, run, code, message) => {
    const caught = (['auto', 'reference'] as const).map((backend) => {
      try {
        run({ backend });
      } catch (e) {
        return e;
      }
      return undefined;
    });
    for (const error of caught) {
      expect(error).toBeInstanceOf(HeddleError);
      expect((error as HeddleError).code).toBe(code);
      expect((error as HeddleError).message).toMatch(message);
    }
    expect((caught[0] as HeddleError).message).toBe((caught[1] as HeddleError).message);
  });
}
