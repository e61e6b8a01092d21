import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, describe, expect, it } from 'vitest';
import { info } from '../../lib/backend.ts';
import type { VerifyReport } from '../../lib/cli/verify.ts';
import { type LayerLoader, verifyCheckpoint } from '../../lib/cli/verifyCheckpoint.ts';
import { MoELayer } from '../../lib/moe/index.ts';
import { nativeVariants } from '../helpers/backends.ts';
import { fakeCase, heddle } from './support.ts';

const folder = mkdtempSync(join(tmpdir(), 'heddle-verify-'));
afterAll(() => rmSync(folder, { recursive: true }));
const native = info().backends.cpu.available;
const variantCount = Math.max(1, info().isas.length);

describe('heddle verify', () => {
  it('passes on real cases, prints its seed and writes JSON', async () => {
    const file = join(folder, 'verify.json');
    const { code, out } = await heddle([
      'verify',
      'moe',
      '--filter',
      'routeTopK: Mixtral T=67',
      '--json',
      file,
    ]);
    expect(code).toBe(0);
    expect(out).toMatch(/^seed \d+$/m);
    for (const isa of info().isas) expect(out).toContain(`cpu/${isa}`);
    expect(out).toContain(`${variantCount} passed`);
    const report = JSON.parse(readFileSync(file, 'utf8')) as VerifyReport;
    expect(report).toMatchObject({ format: 'heddle-verify', version: 1, passed: true, failures: [] });
    expect(report.rows).toHaveLength(variantCount);
    expect(report.rows.every((r) => r.relative <= r.tolerance)).toBe(true);
  });

  it('leaves the instruction set as it was', async () => {
    const before = info().isa;
    await heddle(['verify', '--filter', 'one expert']);
    expect(info().isa).toBe(before);
  });

  it.runIf(native)('ends with 1 on a miss and names the case', async () => {
    const { code, out } = await heddle(['verify'], [fakeCase(0), fakeCase(0.5)]);
    expect(code).toBe(1);
    expect(out).toContain('FAIL fake: off by 0.5 on cpu/');
    expect(out).not.toContain('FAIL fake: off by 0 on');
    expect(out).toMatch(/repeat with --seed \d+/);
  });

  it.runIf(native)('takes a regular expression as filter', async () => {
    const names = (out: string) => [...new Set(out.match(/\bT=\d+/g) ?? [])];
    const cases = [4, 16, 4096].map((t) => ({ ...fakeCase(0.5), name: `fake T=${t}` }));
    const { out } = await heddle(['verify', '--filter', '/fake t=(4|16)$/'], cases);
    expect(names(out)).toEqual(['T=4', 'T=16']);
  });

  it('a case that throws is a miss', async () => {
    const broken = fakeCase(0, {
      prepare: () => {
        throw new Error('no data today');
      },
    });
    const { code, out } = await heddle(['verify'], [broken]);
    expect(code).toBe(1);
    expect(out).toContain('no data today');
  });

  it('the same seed draws the same data, with and without a filter', async () => {
    const drawn: number[] = [];
    const watching = (name: string) =>
      fakeCase(0, {
        name,
        prepare: (random) => {
          drawn.push(random.uniform());
          return fakeCase(0).prepare(random);
        },
      });
    const cases = [watching('first'), watching('second')];
    await heddle(['verify', '--seed', '7'], cases);
    await heddle(['verify', '--seed', '7', '--filter', 'second'], cases);
    await heddle(['verify', '--seed', '8', '--filter', 'second'], cases);
    expect(drawn[2]).toBe(drawn[1]);
    expect(drawn[3]).not.toBe(drawn[1]);
  });
});

describe('verify --checkpoint', () => {
  const golden = fileURLToPath(new URL('../golden/moe', import.meta.url));

  it('verifies a layer as it is on the hub', async () => {
    const { code, out } = await heddle([
      'verify',
      'moe',
      '--checkpoint',
      join(golden, 'olmoe'),
      '--layer',
      '1',
    ]);
    expect(out).toContain('olmoe layer 1');
    expect(out).toContain(`${3 * variantCount} passed`);
    expect(code).toBe(0);
  });

  it('says what is wrong with the checkpoint or the type', async () => {
    const nowhere = await heddle(['verify', '--checkpoint', join(folder, 'nowhere'), '--layer', '0']);
    expect(nowhere.code).toBe(1);
    expect(nowhere.err).toContain('nowhere');
    const argv = ['verify', '--checkpoint', join(golden, 'olmoe'), '--layer', '1', '--type', 'int3'];
    const wrong = await heddle(argv);
    expect(wrong.code).toBe(1);
    expect(wrong.err).toContain('int3');
  });

  /** The real layer, with the native result or the native logits made wrong. */
  function spoiled(what: 'y' | 'logits'): LayerLoader {
    return {
      async load(directory, options) {
        const layer = await MoELayer.load(directory, options);
        if (options.backend === 'reference') return layer;
        return {
          type: layer.type,
          hiddenSize: layer.hiddenSize,
          routing: layer.routing,
          async route(x) {
            const r = await layer.route(x);
            if (what === 'logits') r.logits.data[0] += 1;
            return r;
          },
          async forward(x) {
            const y = await layer.forward(x);
            if (what === 'y') y.data[0] += 1;
            return y;
          },
          dispose: () => layer.dispose(),
        };
      },
    };
  }

  it.runIf(native)('finds a wrong output and a wrong router', async () => {
    const layer = { directory: join(golden, 'mixtral'), layer: 1 };
    for (const [what, message] of [
      ['y', 'relative error'],
      ['logits', 'router logits: relative error'],
    ] as const) {
      const { rows, failures } = await verifyCheckpoint(layer, nativeVariants(), 3, spoiled(what));
      expect(rows).toHaveLength(variantCount);
      expect(failures).toHaveLength(3 * variantCount);
      expect(failures[0].case).toBe('mixtral layer 1 T=1');
      expect(failures[0].message).toContain(message);
    }
  });
});
