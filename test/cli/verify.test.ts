import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { info } from '../../lib/backend.ts';
import type { Layer, LayerClass } from '../../lib/cli/layerApi.ts';
import type { VerifyReport } from '../../lib/cli/verify.ts';
import { verifyCheckpoint } from '../../lib/cli/verifyCheckpoint.ts';
import { Tensor, type TensorLike } from '../../lib/tensor.ts';
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
  /** A layer that doubles its input; the native one is off by `error`. */
  function fakeLayer(error: number): LayerClass {
    return {
      async load(_directory, { backend }): Promise<Layer> {
        return {
          hiddenSize: 4,
          async forward(x: TensorLike) {
            const data = Float32Array.from(x.data as Float32Array, (v) => 2 * v);
            if (backend !== 'reference') data[0] += error;
            return new Tensor('float32', data, x.dims) as Tensor;
          },
          dispose() {},
        };
      },
    };
  }

  it.runIf(native)('compares every variant with the reference', async () => {
    const good = await verifyCheckpoint('some/olmoe', { layer: 1 }, nativeVariants(), 3, fakeLayer(0));
    expect(good.failures).toEqual([]);
    expect(good.rows).toHaveLength(variantCount);
    expect(good.rows[0]).toMatchObject({ op: 'olmoe layer 1', cases: 3, failed: 0 });
    const bad = await verifyCheckpoint('some/olmoe', { layer: 1 }, nativeVariants(), 3, fakeLayer(1));
    expect(bad.failures).toHaveLength(3 * variantCount);
    expect(bad.failures[0].case).toBe('olmoe layer 1 T=1');
  });
});
