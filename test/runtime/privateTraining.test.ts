import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, expect, it } from 'vitest';
import { requireDist, runCommand, temporaryFolder } from '../helpers/program.ts';

beforeAll(requireDist);

it('a private run that is killed and started again ends with the same file and the same ledger', async () => {
  const folder = temporaryFolder();
  try {
    const program = join(import.meta.dirname, 'programs/privateTraining.mjs');
    const file = (name: string) => join(folder.path, name);
    const run = (name: string, ...more: string[]) =>
      runCommand(process.execPath, [program, file(name), ...more]);
    const whole = await run('whole');
    expect(whole.code, whole.stderr).toBe(0);
    expect(whole.stdout).toMatch(/^from step 0\n/);
    const killed = await run('killed', '--kill-after', '5');
    expect(killed.signal).toBe('SIGKILL');
    const resumed = await run('killed');
    expect(resumed.code, resumed.stderr).toBe(0);
    expect(resumed.stdout).toMatch(/^from step 4\n/);
    expect(readFileSync(file('killed')).equals(readFileSync(file('whole')))).toBe(true);
    expect(resumed.stdout.split('\n')[1]).toBe(whole.stdout.split('\n')[1]);
    expect(whole.stdout).toContain('"steps":10');
  } finally {
    folder.remove();
  }
});
