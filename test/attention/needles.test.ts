import { expect, it } from 'vitest';
import { info, setDefaults } from '../../lib/backend.ts';
import { equalKeysError, findNeedles } from '../helpers/needles.ts';

// The full size, ten million keys, is bench/needles.ts; its result is in bench/results.
const native = info().backends.cpu.available;
const scale = native ? 1 : 0.02;

it('every needle is found, at any depth of any length, with the weight that float64 gives', async () => {
  setDefaults({ isa: 'auto' });
  const lengths = [0.03, 0.1, 0.3, 1].map((x) => Math.floor(x * 400_000 * scale));
  const depths = [0, 0.25, 0.5, 0.75, 1];
  const r = await findNeedles(lengths, depths, 20, { threads: 2 });
  expect(r.cells.length).toBe(20);
  expect(r.cells.filter((c) => c.found !== c.index)).toEqual([]);
  expect(r.planted.recovered).toBe(21);
  expect(r.single.relativeError).toBeLessThan(1e-4);
  if (native) expect(r.rssGrowthMiB).toBeLessThan(64);
}, 60_000);

it('equal keys give the mean of the values', async () => {
  expect(await equalKeysError(Math.floor(300_000 * scale), { threads: 2 })).toBeLessThan(1e-6);
}, 60_000);
