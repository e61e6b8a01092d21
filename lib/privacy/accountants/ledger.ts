import { createHash } from 'node:crypto';
import { HeddleError } from '../../errors.ts';
import { type AccountantOptions, computeEpsilon, type EpsilonResult } from './epsilon.ts';
import { checkOptionsObject, checkPhase, type PrivacyPhase, sameMechanism, show } from './options.ts';

const FORMAT = 'heddle.privacy.ledger';
const VERSION = 1;

/** A ledger as it is saved. */
export interface SavedLedger {
  format: typeof FORMAT;
  version: typeof VERSION;
  phases: PrivacyPhase[];
  /** SHA-256 over format, version and phases: finds damage and edits by hand; it is not a signature. */
  checksum: string;
}

/**
 * What a training run has spent, step by step. Entries can be added and never changed or removed; consecutive
 * entries that differ in steps alone are merged. Save it with every checkpoint, in the same file or before the
 * parameters it accounts for, and a resumed run cannot forget what it spent.
 *
 * ```js
 * const ledger = new PrivacyLedger();
 * ledger.record({ noiseMultiplier: 1.1, sampleRate: 256 / 60000, steps: 1 });
 * const text = JSON.stringify(ledger);
 * const { epsilon } = PrivacyLedger.fromJSON(text).epsilon({ accountant: 'prv', delta: 1e-5 });
 * ```
 */
export class PrivacyLedger {
  #phases: PrivacyPhase[] = [];

  /** Adds steps that were taken; empty batches count. `steps` is 1 where it is left out. */
  record(phase: Omit<PrivacyPhase, 'steps'> & { steps?: number }): this {
    checkOptionsObject(phase, 'phase');
    const checked = checkPhase({ ...phase, steps: phase.steps ?? 1 });
    if (checked.steps === 0) return this;
    const last = this.#phases.at(-1);
    if (last !== undefined && sameMechanism(last, checked)) {
      const steps = last.steps + checked.steps;
      if (!Number.isSafeInteger(steps)) {
        throw new HeddleError('ERR_OPTION', `steps: ${last.steps} + ${checked.steps} is too large to count`);
      }
      last.steps = steps;
    } else {
      this.#phases.push(checked);
    }
    return this;
  }

  /** A copy of the entries, oldest first. */
  get phases(): PrivacyPhase[] {
    return this.#phases.map((phase) => ({ ...phase }));
  }

  /** Number of steps recorded. */
  get steps(): number {
    return this.#phases.reduce((sum, phase) => sum + phase.steps, 0);
  }

  /** ε spent so far; see {@link computeEpsilon}. */
  epsilon(options: AccountantOptions & { delta: number }): EpsilonResult {
    checkOptionsObject(options, 'options');
    const { accountant, delta, orders, epsilonError, deltaError } = options;
    return computeEpsilon({ accountant, delta, orders, epsilonError, deltaError, phases: this.#phases });
  }

  /** Whether this ledger is `earlier` with nothing or more recorded after it: the check of a resumed run. */
  continues(earlier: PrivacyLedger): boolean {
    const mine = this.#phases;
    const theirs = earlier.#phases;
    return theirs.every((phase, i) => {
      if (mine[i] === undefined || !sameMechanism(mine[i], phase)) return false;
      return i === theirs.length - 1 ? mine[i].steps >= phase.steps : mine[i].steps === phase.steps;
    });
  }

  /** The saved form; called by `JSON.stringify`. */
  toJSON(): SavedLedger {
    const phases = this.phases;
    return { format: FORMAT, version: VERSION, phases, checksum: checksum(phases) };
  }

  /**
   * Restores a saved ledger.
   * @param saved the JSON text, or what it parses to
   * @throws HeddleError `ERR_CHECKPOINT` where it is damaged, edited, of another format or of a later version
   */
  static fromJSON(saved: string | SavedLedger): PrivacyLedger {
    let value: unknown = saved;
    if (typeof saved === 'string') {
      try {
        value = JSON.parse(saved);
      } catch (cause) {
        throw damaged('it is not JSON', cause);
      }
    }
    if (value === null || typeof value !== 'object' || Array.isArray(value)) {
      throw damaged(`expected an object, got ${show(value)}`);
    }
    const { format, version, phases, checksum: sum } = value as Record<keyof SavedLedger, unknown>;
    if (format !== FORMAT) throw damaged(`format must be '${FORMAT}', got ${show(format)}`);
    if (version !== VERSION) throw damaged(`version must be ${VERSION}, got ${show(version)}`);
    if (!Array.isArray(phases)) throw damaged(`phases must be an array, got ${show(phases)}`);
    const ledger = new PrivacyLedger();
    phases.forEach((phase, i) => {
      try {
        checkOptionsObject(phase, `phases[${i}]`);
        const checked = checkPhase(phase, `phases[${i}].`);
        if (checked.steps === 0) throw new HeddleError('ERR_OPTION', `phases[${i}].steps: must not be 0`);
        ledger.#phases.push(checked);
      } catch (cause) {
        throw damaged((cause as Error).message, cause);
      }
    });
    if (sum !== checksum(ledger.#phases)) {
      throw damaged('its checksum does not match its phases, so an entry was changed, added or removed');
    }
    return ledger;
  }
}

/** Numbers are written as JavaScript writes them: the shortest text that reads back as the same float64. */
function checksum(phases: readonly PrivacyPhase[]): string {
  const rows = phases.map((p) => {
    const numbers = [p.noiseMultiplier, p.sampleRate, p.steps];
    return p.overflowProbability === undefined ? numbers : [...numbers, p.overflowProbability];
  });
  return createHash('sha256')
    .update(JSON.stringify([FORMAT, VERSION, rows]))
    .digest('hex');
}

function damaged(reason: string, cause?: unknown): HeddleError {
  return new HeddleError('ERR_CHECKPOINT', `privacy ledger: ${reason}`, { cause });
}
