import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { gzipSync } from 'node:zlib';
import { beforeAll, expect, it } from 'vitest';
import { requireDist, root, runCommand, temporaryFolder } from '../helpers/program.ts';

beforeAll(requireDist);

const run = (name: string, ...args: string[]) =>
  runCommand(process.execPath, [join(root, 'examples', name), ...args], { cwd: root });

/** IDX files of images whose brighter half says the class: the training files gzipped, the others not. */
function writeImages(folder: string, part: string, count: number, zip: boolean): void {
  const images = Buffer.alloc(16 + 784 * count);
  [0x803, count, 28, 28].forEach((v, i) => {
    images.writeUInt32BE(v, 4 * i);
  });
  const labels = Buffer.alloc(8 + count);
  [0x801, count].forEach((v, i) => {
    labels.writeUInt32BE(v, 4 * i);
  });
  for (let i = 0; i < count; i++) {
    labels[8 + i] = i % 2;
    for (let p = 0; p < 784; p++) images[16 + 784 * i + p] = p < 392 === (i % 2 === 0) ? 200 : (i * p) % 60;
  }
  for (const [name, data] of [
    [`${part}-images-idx3-ubyte`, images],
    [`${part}-labels-idx1-ubyte`, labels],
  ] as const) {
    writeFileSync(join(folder, zip ? `${name}.gz` : name), zip ? gzipSync(data) : data);
  }
}

it('fashion-mnist: trains from the command line, stops, resumes, logs and plots', {
  timeout: 120_000,
}, async () => {
  const folder = temporaryFolder();
  try {
    const out = join(folder.path, 'run');
    const args = ['--data', folder.path, '--out', out, '--epochs', '3', '--batch', '60', '--epsilon', '8'];
    const missing = await run('fashion-mnist.mjs', ...args);
    expect(missing.code).toBe(1);
    expect(missing.stderr).toContain('apt-get install dataset-fashion-mnist');

    writeImages(folder.path, 'train', 600, true);
    writeImages(folder.path, 't10k', 200, false);
    const first = await run('fashion-mnist.mjs', ...args, '--stop-after', '2');
    expect(first.code, first.stderr).toBe(0);
    expect(first.stdout).toMatch(/26010 parameters, 30 steps of 60 expected samples/);
    expect((await run('fashion-mnist.mjs', ...args)).stderr).toContain('--resume it, or choose another');
    const second = await run('fashion-mnist.mjs', ...args, '--resume');
    expect(second.code, second.stderr).toBe(0);
    expect(second.stdout).toContain('resumed after 2 epochs');

    const log = JSON.parse(readFileSync(`${out}.json`, 'utf8'));
    expect(log.epochs.map((e: { steps: number }) => e.steps)).toEqual([10, 20, 30]);
    const last = log.epochs[2];
    expect(last.testAccuracy).toBeGreaterThan(0.9);
    expect(last.epsilonPrv).toBeLessThanOrEqual(8);
    expect(last.epsilonPrv).toBeGreaterThan(7.9);
    expect(last.epsilonRdp).toBeGreaterThan(last.epsilonPrv);
    expect(log.ledger.phases).toEqual([{ noiseMultiplier: log.noiseMultiplier, sampleRate: 0.1, steps: 30 }]);
    expect(readFileSync(`${out}.svg`, 'utf8')).toMatch(/^<svg .*Fashion-MNIST: .*<\/svg>\n$/s);
  } finally {
    folder.remove();
  }
});

it('private-training: the page of code learns', async () => {
  const { code, stdout, stderr } = await run('private-training.mjs');
  expect(code, stderr).toBe(0);
  const [, right, epsilon] = /^([\d.]+) % right, \(([\d.]+), 1e-5\)/.exec(stdout) ?? [];
  expect(Number(right)).toBeGreaterThan(85);
  expect(Number(epsilon)).toBeLessThan(6);
});
