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
  const made = run('python3', ['bench/cuda/structs.py']);

  it('are those of the CUDA library, field by field', () => {
    expect(made.stderr).toBe('');
    expect(made.status).toBe(0);
    const compiled = compile(made.stdout);
    expect(compiled.stderr.match(/error: .*/g) ?? []).toEqual([]);
    expect(compiled.status).toBe(0);
    for (const name of ['AttentionArgs', 'DecodeAttentionArgs', 'PatchEmbedDeviceArgs', 'ExpertsDeviceArgs']) {
      expect(made.stdout).toContain(`sizeof(heddle::${name})`);
    }
  });

  it('do not pass when one moves', () => {
    const moved = made.stdout.replace(/(?<=heddle::AttentionProblem, longest\) == )\d+/, '0');
    expect(moved).not.toBe(made.stdout);
    expect(compile(moved).stderr).toMatch(/AttentionProblem::longest: place/);
  });
});
