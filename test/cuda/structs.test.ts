import { spawnSync } from 'node:child_process';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { root } from '../helpers/program.ts';

const run = (command: string, args: string[], input?: string) =>
  spawnSync(command, args, { cwd: root, input, encoding: 'utf8', timeout: 60_000 });
const compile = (source: string) =>
  run('c++', ['-std=c++17', '-fsyntax-only', '-I', join(root, 'native'), '-x', 'c++', '-'], source);

function missing(): string | null {
  if (run('python3', ['-c', 'import ctypes']).status !== 0) return 'python3 is not installed';
  return compile('').status === 0 ? null : 'c++ is not installed';
}
const reason = missing();
if (reason !== null) console.log(`structs of bench/cuda skipped: ${reason}`);

describe.skipIf(reason !== null)('structs of bench/cuda', () => {
  const made = reason === null ? run('python3', ['bench/cuda/structs.py']) : null;
  const sources = (made?.status === 0 ? JSON.parse(made.stdout) : {}) as Record<string, string>;

  it('are all compared', () => {
    expect(made?.stderr).toBe('');
    const all = Object.values(sources).join();
    for (const name of [
      'RouteTopKArgs',
      'AttentionArgs',
      'DecodeAttentionArgs',
      'PatchEmbedDeviceArgs',
      'NormsArgs',
    ]) {
      expect(all).toContain(`sizeof(heddle::${name})`);
    }
  });

  it.each(Object.keys(sources))('are those of native/%s, field by field', (folder) => {
    const compiled = compile(sources[folder]);
    expect(compiled.stderr.match(/error: .*/g) ?? []).toEqual([]);
    expect(compiled.status).toBe(0);
  });

  it('do not pass when a field moves', () => {
    const source = sources['attention'];
    const moved = source.replace(/(?<=heddle::AttentionProblem, longest\) == )\d+/, '0');
    expect(moved).not.toBe(source);
    expect(compile(moved).stderr).toMatch(/AttentionProblem::longest: place/);
  });
});
