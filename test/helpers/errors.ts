import { expect } from 'vitest';
import { HeddleError, type HeddleErrorCode } from '../../lib/errors.ts';

// vitest's toMatchObject accepts any string where a RegExp is expected, so messages are checked here.
function check(error: unknown, code: HeddleErrorCode, message: RegExp): void {
  expect(error).toBeInstanceOf(HeddleError);
  expect((error as HeddleError).code).toBe(code);
  expect((error as HeddleError).message).toMatch(message);
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
