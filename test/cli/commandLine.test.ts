import { describe, expect, it } from 'vitest';
import { info } from '../../lib/backend.ts';
import { heddle } from './support.ts';

describe('command line', () => {
  it('tells its commands', async () => {
    for (const argv of [[], ['--help'], ['help']]) {
      const { code, out } = await heddle(argv);
      expect(code).toBe(0);
      for (const name of ['info', 'verify', 'bench', 'demo']) expect(out).toContain(`heddle ${name}`);
    }
    expect((await heddle(['--version'])).out).toBe(info().version);
  });

  it.each(['info', 'verify', 'bench', 'demo'])('%s --help tells every option', async (name) => {
    const { code, out } = await heddle([name, '--help']);
    expect(code).toBe(0);
    expect(out).toContain(`heddle ${name}`);
    for (const option of out.split('\n')[0].match(/--[a-z]+/g) ?? []) expect(out).toMatch(`\n  ${option}`);
  });

  it.each([
    [['nonsense'], "unknown command 'nonsense'"],
    [['info', '--jsn'], "Unknown option '--jsn'"],
    [['info', 'extra'], "unexpected argument 'extra'"],
    [['verify', '--filter'], '--filter'],
    [['verify', 'nofamily'], "unknown family 'nofamily'"],
    [['verify', '--filter', 'no such case'], 'no case matches'],
    [['verify', '--filter', '/routeTopK (/'], 'Invalid regular expression'],
    [['verify', '--seed', 'x'], '--seed must be an integer'],
    [['verify', '--backend', 'gpu'], '--backend must be cpu, cuda or reference'],
    [['verify', '--backend', 'reference', '--isa', 'avx2'], '--isa needs the cpu backend'],
    [['verify', '--isa', 'mmx'], '--isa mmx is not available'],
    [['verify', '--checkpoint', 'x'], '--checkpoint needs --layer'],
    [['verify', '--layer', '1'], '--layer needs --checkpoint'],
    [['bench', '--time', '0'], '--time must be a number from'],
    [['bench', '--threads', '1.5'], '--threads must be an integer'],
    [['bench', 'moe', '--study'], "--study needs the family 'video'"],
    [['bench', '--frames', '16'], '--frames needs --study'],
    [['bench', 'video', '--study', '--frames', '8'], '--frames must be an integer from 16'],
    [['bench', '--filter', 'no such case'], 'no benchmark case matches'],
  ])('%j is refused with exit code 2', async (argv, message) => {
    if (argv.includes('mmx') && !info().backends.cpu.available) return;
    const { code, err } = await heddle(argv);
    expect(code).toBe(2);
    expect(err).toContain(message);
  });

  it('info says what runs', async () => {
    const { code, out } = await heddle(['info']);
    expect(code).toBe(0);
    expect(out).toContain(info().version);
    expect(out).toContain('reference');
    const json = await heddle(['info', '--json']);
    expect(JSON.parse(json.out)).toEqual(info());
  });
});
