import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { interleave, localEntrant, median } from '../../bench/harness.ts';
import type { Peaks } from '../../bench/peaks.ts';
import type { BenchReport, BenchRow } from '../../bench/report.ts';
import { rooflineSvg } from '../../bench/roofline.ts';
import { info } from '../../lib/backend.ts';
import { fakeCase, heddle } from './support.ts';

const folder = mkdtempSync(join(tmpdir(), 'heddle-bench-'));
afterAll(() => rmSync(folder, { recursive: true }));
const native = info().backends.cpu.available;
const QUICK = ['--time', '0.05', '--buffer', '16'];

function sleepBusy(ms: number): void {
  const end = performance.now() + ms;
  while (performance.now() < end);
}

describe('harness', () => {
  it('median', () => {
    expect(median([3, 1, 2])).toBe(2);
    expect(median([4, 1, 2, 3])).toBe(2.5);
    expect(median([])).toBeNaN();
  });

  it('interleaves rounds and tells what is slower', async () => {
    const order: string[] = [];
    const entrants = [localEntrant('a', () => sleepBusy(0.2)), localEntrant('b', () => sleepBusy(10))];
    const [a, b] = await interleave(entrants, {
      seconds: 0.06,
      rounds: 3,
      onRound: (e) => order.push(e.name),
    });
    expect(order.join('')).toBe('abababab'); // one round is not counted
    expect(a.rounds).toHaveLength(3);
    // The best round: a shared machine may stall any single one.
    expect(Math.min(...a.rounds)).toBeGreaterThanOrEqual(0.0002);
    expect(Math.min(...b.rounds)).toBeGreaterThan(Math.min(...a.rounds));
  });

  it('passes an exception on', () => {
    const entrant = localEntrant('thrower', () => {
      throw new Error('broken');
    });
    expect(() => entrant.round(0.01)).toThrow('broken');
  });
});

describe('heddle bench', () => {
  it('times one case and writes the report', async () => {
    const file = join(folder, 'bench.json');
    const { code, out } = await heddle([
      'bench',
      'moe',
      '--filter',
      'routeTopK: one token',
      '--threads',
      '1',
      '--json',
      file,
      ...QUICK,
    ]);
    expect(code).toBe(0);
    expect(out).toContain('one token');
    const report = JSON.parse(readFileSync(file, 'utf8')) as BenchReport;
    expect(report).toMatchObject({
      format: 'heddle-bench',
      version: 1,
      package: info().version,
      node: process.version,
      features: info().cpuFeatures,
      isa: info().isa,
      threads: 1,
    });
    expect(Number.isNaN(Date.parse(report.date))).toBe(false);
    expect(report.rows).toHaveLength(1);
    const [row] = report.rows;
    expect(row.seconds).toBeGreaterThan(0);
    expect(row.error.passed).toBe(true);
    expect(row.items?.perSecond).toBeCloseTo(1 / (row.seconds as number), 3);
    if (!native) return;
    expect(row.rounds).toHaveLength(5);
    expect(row.reference?.ratio).toBeGreaterThan(0);
    const peaks = report.peaks as Peaks;
    expect(peaks.operations.f32[info().isa as 'scalar']).toBeGreaterThan(1e8);
    expect(peaks.read).toBeGreaterThan(1e8);
    expect(peaks.copy).toBeGreaterThan(1e8);
    expect(row.peak?.share).toBeCloseTo((row.bytesPerSecond as number) / peaks.read, 6);
  });

  it.runIf(native)('gives a wrong result no time, and exit code 1', async () => {
    const file = join(folder, 'wrong.json');
    const cases = [fakeCase(0.5), fakeCase(0)];
    const { code, out } = await heddle(
      ['bench', ...QUICK, '--json', file, '--svg', join(folder, 'x.svg')],
      cases,
    );
    expect(code).toBe(1);
    expect(out).toContain('WRONG fake: off by 0.5');
    const { rows } = JSON.parse(readFileSync(file, 'utf8')) as BenchReport;
    expect(rows[0]).toMatchObject({ seconds: null, rounds: [] });
    expect(rows[1].seconds).toBeGreaterThan(0);
    expect(readFileSync(join(folder, 'x.svg'), 'utf8')).toContain('off by 0 ·');
  });

  it.runIf(native)('checks a case that is too large for the reference on its slice', async () => {
    const whole = fakeCase(0);
    const sliced = (error: number) =>
      fakeCase(error, {
        verify: false,
        prepare: (random) => ({
          ...fakeCase(error).prepare(random),
          slice: { prepared: whole.prepare(random), fraction: 0.25, of: (outputs) => outputs },
        }),
      });
    const good = await heddle(['bench', ...QUICK], [sliced(0)]);
    expect(good.code).toBe(0);
    const bad = await heddle(['bench', ...QUICK], [sliced(0.5)]);
    expect(bad.code).toBe(1);
  });

  it('goes on after a case that fails', async () => {
    const uncheckable = fakeCase(0, { name: 'uncheckable', verify: false });
    const { code, out } = await heddle(['bench', ...QUICK], [uncheckable, fakeCase(0)]);
    expect(code).toBe(1);
    expect(out).toMatch(/FAILED fake: uncheckable: .*cannot be checked/);
    expect(out).toMatch(/^fake +off by 0 .*FLOP\/s/m);
  });
});

describe('roofline', () => {
  const peaks: Peaks = {
    threads: 2,
    operations: { f32: { avx512: 2e11, scalar: 1e10 }, bf16: {}, int8: {} },
    read: 3e10,
    copy: 2e10,
    bufferBytes: 2 ** 30,
  };
  const row = (name: string, flops: number, bytes: number, seconds: number) =>
    ({
      name,
      variant: 'cpu/avx512',
      flops,
      bytes,
      seconds,
      flopsPerSecond: flops / seconds,
    }) as unknown as BenchRow;

  it('draws rows below the roofs of their instruction set', () => {
    const svg = rooflineSvg(
      [row('T=1 <decode>', 1e9, 2e9, 0.1), row('T=512', 1e11, 2e9, 0.7)],
      peaks,
      'A & B',
    );
    expect(svg).toContain('<svg');
    expect(svg).toContain('A &amp; B');
    expect(svg).toContain('T=1 &lt;decode&gt;');
    expect(svg).toContain('f32 avx512: 200 GFLOP/s');
    expect(svg).not.toContain('scalar');
    expect(svg).not.toContain('NaN');
    expect(svg?.match(/r="5"/g)).toHaveLength(2);
  });

  it('draws nothing without operations and bytes', () => {
    expect(rooflineSvg([row('routing', 0, 100, 1)], peaks, '')).toBeNull();
  });
});
