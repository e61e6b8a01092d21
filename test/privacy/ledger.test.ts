import { describe, expect, it } from 'vitest';
import { computeEpsilon, PrivacyLedger } from '../../lib/privacy/index.ts';
import { phase } from '../helpers/accountants.ts';
import { thrown } from '../helpers/errors.ts';

describe('PrivacyLedger', () => {
  const filled = () =>
    new PrivacyLedger()
      .record(phase(1.1, 256 / 60000, 100))
      .record({ noiseMultiplier: 1.1, sampleRate: 256 / 60000 })
      .record(phase(0.9, 0.01, 5))
      .record(phase(0.9, 0.01, 0))
      .record(phase(1.1, 256 / 60000, 7));

  it('merges consecutive equal phases and keeps the order of the others', () => {
    const ledger = filled();
    expect(ledger.phases).toEqual([
      phase(1.1, 256 / 60000, 101),
      phase(0.9, 0.01, 5),
      phase(1.1, 256 / 60000, 7),
    ]);
    expect(ledger.steps).toBe(113);
    ledger.phases[0].steps = 0;
    expect(ledger.steps).toBe(113);
  });

  it('epsilon is that of its phases', () => {
    const ledger = filled();
    for (const accountant of ['rdp', 'prv', 'gdp'] as const) {
      expect(ledger.epsilon({ accountant, delta: 1e-5 })).toEqual(
        computeEpsilon({ accountant, delta: 1e-5, phases: ledger.phases }),
      );
    }
    expect(new PrivacyLedger().epsilon({ accountant: 'rdp', delta: 1e-5 }).epsilon).toBe(0);
  });

  it('survives JSON to the last bit, and goes on where it stopped', () => {
    const whole = new PrivacyLedger();
    let resumed = new PrivacyLedger();
    for (let i = 0; i < 10; i++) {
      whole.record({ noiseMultiplier: 1 / 3, sampleRate: 0.1 + 0.2 });
      resumed = PrivacyLedger.fromJSON(JSON.stringify(resumed)).record({
        noiseMultiplier: 1 / 3,
        sampleRate: 0.1 + 0.2,
      });
    }
    expect(JSON.stringify(resumed)).toBe(JSON.stringify(whole));
    expect(PrivacyLedger.fromJSON(whole.toJSON()).phases).toEqual([phase(1 / 3, 0.1 + 0.2, 10)]);
  });

  it('knows whether it continues another', () => {
    const earlier = filled();
    const later = PrivacyLedger.fromJSON(earlier.toJSON()).record(phase(1.1, 256 / 60000, 1));
    expect(later.continues(earlier)).toBe(true);
    expect(later.record(phase(2, 0.5, 1)).continues(earlier)).toBe(true);
    expect(earlier.continues(later)).toBe(false);
    expect(new PrivacyLedger().continues(earlier)).toBe(false);
    expect(earlier.continues(new PrivacyLedger())).toBe(true);
    expect(new PrivacyLedger().record(phase(1.1, 256 / 60000, 200)).continues(earlier)).toBe(false);
  });

  it('refuses damaged, edited, foreign and future files', () => {
    const saved = filled().toJSON();
    const edited = (change: (copy: typeof saved) => void) => {
      const copy = JSON.parse(JSON.stringify(saved));
      change(copy);
      const error = thrown(() => PrivacyLedger.fromJSON(copy));
      expect(error.code).toBe('ERR_CHECKPOINT');
      return error.message;
    };
    const changed = /checksum does not match/;
    expect(edited((c) => (c.phases[0].steps = 1))).toMatch(changed);
    expect(edited((c) => (c.phases[1].noiseMultiplier = 9))).toMatch(changed);
    expect(edited((c) => c.phases.pop())).toMatch(changed);
    expect(edited((c) => c.phases.push(phase(1, 1, 1)))).toMatch(changed);
    expect(edited((c) => c.phases.reverse().reverse().splice(0, 1))).toMatch(changed);
    expect(edited((c) => (c.checksum = ''))).toMatch(changed);
    expect(edited((c) => (c.phases[0].steps = -1))).toMatch(
      /phases\[0\]\.steps: must be a non-negative integer, got -1/,
    );
    expect(edited((c) => (c.version = 2 as never))).toMatch(/version must be 1, got 2/);
    expect(edited((c) => (c.format = 'x' as never))).toMatch(
      /format must be 'heddle.privacy.ledger', got 'x'/,
    );
    expect(edited((c) => (c.phases = null as never))).toMatch(/phases must be an array, got null/);
    const text = JSON.stringify(saved);
    expect(thrown(() => PrivacyLedger.fromJSON(text.slice(0, 40))).message).toMatch(/it is not JSON/);
    expect(thrown(() => PrivacyLedger.fromJSON('[]')).message).toMatch(/expected an object, got an array/);
    expect(thrown(() => new PrivacyLedger().record(phase(0, 0.1, 1))).code).toBe('ERR_OPTION');
  });
});
