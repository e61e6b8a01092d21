import { expect, it } from 'vitest';
import { HeddleError } from '../../lib/errors.ts';
import type { OpOptions } from '../../lib/op.ts';

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
