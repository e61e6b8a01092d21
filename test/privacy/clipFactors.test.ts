import { describe, expect, it } from 'vitest';
import { type HeddleError, Tensor } from '../../lib/index.ts';
import { clipFactors, clipFactorsSync } from '../../lib/privacy/index.ts';

const f32 = (data: number[], dims: number[]) => new Tensor('float32', Float32Array.from(data), dims);

describe('clipFactors', () => {
  const squared = f32([0, 0.25, 1, 4, Number.NaN, Infinity], [6]);

  it('every mode, by hand', () => {
    const by = (mode: 'abadi' | 'auto-s' | 'auto-v' | 'indicator', maxNorm = 1) =>
      Array.from(clipFactorsSync(squared, { maxNorm, mode }).data);
    const close = (actual: number[], expected: number[]) =>
      expected.forEach((e, i) => {
        expect(actual[i]).toBeCloseTo(e, 6);
      });
    close(by('abadi'), [1, 1, 1 / (1 + 1e-6), 1 / (2 + 1e-6), 0, 0]);
    close(by('auto-s'), [100, 1 / 0.51, 1 / 1.01, 1 / 2.01, 0, 0]);
    close(by('auto-v'), [0, 2, 1, 0.5, 0, 0]);
    close(by('indicator'), [1, 1, 1, 0, 0, 0]);
    close(by('abadi', 0), [0, 0, 0, 0, 0, 0]);
    close(by('abadi', Infinity), [1, 1, 1, 1, 0, 0]);
    close(by('indicator', Infinity), [1, 1, 1, 1, 0, 0]);
  });

  it('grouping: flat sums layers, K groups share R²', async () => {
    const layers = [f32([9, 1], [2]), f32([16, Number.NaN], [2]), f32([0, 1], [2])];
    const flat = await clipFactors(layers, { maxNorm: 1, stability: 0 });
    expect(flat.data[0]).toBeCloseTo(0.2, 6);
    expect(Array.from(flat.nonFinite)).toEqual([1]);
    const each = await clipFactors(layers, { maxNorm: 1, stability: 0, grouping: 'layer' });
    expect(each.length).toBe(3);
    expect(each[0].data[0]).toBeCloseTo(1 / Math.sqrt(3) / 3, 6);
    expect(each[1].data[0]).toBeCloseTo(1 / Math.sqrt(3) / 4, 6);
    expect(each.every((f) => f.data[1] === 0 && f.nonFinite[0] === 1)).toBe(true);
    const two = clipFactorsSync(layers, { maxNorm: 1, stability: 0, grouping: [1, 0, 1] });
    expect(two.length).toBe(2);
    expect(two[0].data[0]).toBeCloseTo(1 / Math.sqrt(2) / 4, 6);
    expect(two[1].data[0]).toBeCloseTo(1 / Math.sqrt(2) / 3, 6);
    expect(clipFactorsSync(f32([], [0]), { maxNorm: 1 }).dims).toEqual([0]);
  });

  it('refuses what it does not know', () => {
    const code = (options: object, norms: unknown = squared) => {
      try {
        clipFactorsSync(norms as Tensor, options as { maxNorm: number });
      } catch (e) {
        return `${(e as HeddleError).code} ${(e as HeddleError).message}`;
      }
      return 'none';
    };
    expect(code({})).toMatch(/ERR_OPTION.*maxNorm/);
    expect(code({ maxNorm: -1 })).toMatch(/ERR_OPTION.*maxNorm/);
    expect(code({ maxNorm: Infinity, mode: 'auto-s' })).toMatch(/ERR_OPTION.*maxNorm/);
    expect(code({ maxNorm: 1, mode: 'auto' })).toMatch(/ERR_OPTION.*mode/);
    expect(code({ maxNorm: 1, mode: 'auto-s', gamma: 0 })).toMatch(/ERR_OPTION.*gamma/);
    expect(code({ maxNorm: 1, clip: 1 })).toMatch(/ERR_OPTION.*clip/);
    expect(code({ maxNorm: 1, grouping: [0, 1] })).toMatch(/ERR_OPTION.*grouping/);
    expect(code({ maxNorm: 1, grouping: [1] })).toMatch(/ERR_OPTION.*grouping/);
    expect(code({ maxNorm: 1, grouping: 'all' })).toMatch(/ERR_OPTION.*grouping/);
    expect(code({ maxNorm: 1, threads: 0 })).toMatch(/threads/);
    expect(code({ maxNorm: 1 }, [])).toMatch(/ERR_ARGUMENT.*squaredNorms/);
    expect(code({ maxNorm: 1 }, [squared, f32([1], [1])])).toMatch(/ERR_SHAPE.*squaredNorms\[1\]/);
  });
});
