import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { HeddleErrorCode, Info, IsaName } from '../../lib/index.ts';
import { requireDist, runProgram, temporaryFolder } from '../helpers/program.ts';

interface Failure {
  name: string;
  code: HeddleErrorCode;
  message: string;
}
interface State {
  info: Info;
  sync?: number[];
  async?: number[];
  syncError?: Failure;
  asyncError?: Failure;
  mended: number[];
}

const state = (env: Record<string, string> = {}) => runProgram<State>('state.mjs', [], { env });
const temporary = temporaryFolder();
let normal: State;

beforeAll(async () => {
  requireDist();
  normal = await state();
});
afterAll(() => temporary.remove());

/** HEDDLE_PREBUILD is node-gyp-build's own variable: the folder to look for build/Release and prebuilds in. */
function folderWith(name: string, content?: Buffer): { HEDDLE_PREBUILD: string } {
  const folder = join(temporary.path, name);
  mkdirSync(join(folder, 'build/Release'), { recursive: true });
  if (content) writeFileSync(join(folder, 'build/Release/heddle.node'), content);
  return { HEDDLE_PREBUILD: folder };
}

function expectWorking(s: State) {
  expect(s.sync).toEqual([1, 2]);
  expect(s.async).toEqual([1, 2]);
  expect(s.mended).toEqual([1, 2]);
}

function expectRefused(s: State, code: HeddleErrorCode, message: RegExp) {
  for (const error of [s.syncError, s.asyncError]) {
    expect(error).toMatchObject({ name: 'HeddleError', code });
    expect(error?.message).toMatch(message);
  }
  expect(s.info.backends.cpu.reason).toMatch(message);
  expect(s.info.backends.cpu.remedy).toMatch(/environment variable/);
  expect(s.mended).toEqual([1, 2]);
}

describe('the loader', () => {
  it('loads the binary that was built, on the best instruction set', () => {
    expectWorking(normal);
    expect(normal.info.backend).toBe('cpu');
    expect(normal.info.backends.cpu.path).toMatch(/heddle\.node$/);
    expect(normal.info.isa).toBe(normal.info.isas[0]);
    expect(normal.info.isas.at(-1)).toBe('scalar');
    expect(normal.info.threads).toBeGreaterThanOrEqual(1);
  });

  it('no binary: the reference works, and info() says why and what to do', async () => {
    const s = await state(folderWith('empty'));
    expectWorking(s);
    expect(s.info.backend).toBe('reference');
    expect(s.info.isa).toBeNull();
    expect(s.info.threads).toBe(1);
    expect(s.info.backends.cpu).toMatchObject({ available: false });
    expect(s.info.backends.cpu.reason).toMatch(/No native build was found/);
    expect(s.info.backends.cpu.remedy).toMatch(/C\+\+17 compiler and python3.*node-gyp rebuild/);
  });

  it.each([
    ['garbage', Buffer.from('this is not a shared library')],
    ['nothing', Buffer.alloc(0)],
    ['an ELF header alone', Buffer.from('7f454c4602010100000000000000000003003e0001000000', 'hex')],
  ])('a binary that is %s: the reference works, and info() names the file', async (name, content) => {
    const env = folderWith(name, content);
    const s = await state(env);
    expectWorking(s);
    expect(s.info.backend).toBe('reference');
    expect(s.info.backends.cpu.path).toBe(join(env.HEDDLE_PREBUILD, 'build/Release/heddle.node'));
    expect(s.info.backends.cpu.reason).toMatch(/heddle\.node does not load: /);
    expect(s.info.backends.cpu.remedy).toMatch(/node-gyp rebuild/);
  });
});

describe('HEDDLE_BACKEND', () => {
  it('reference', async () => {
    const s = await state({ HEDDLE_BACKEND: 'reference' });
    expectWorking(s);
    expect(s.info.backend).toBe('reference');
    expect(s.info.backends.cpu.reason).toMatch(/HEDDLE_BACKEND=reference/);
  });
  it('cpu', async () => {
    const s = await state({ HEDDLE_BACKEND: 'cpu' });
    expectWorking(s);
    expect(s.info.backend).toBe('cpu');
  });
  it('empty counts as unset, for all three', async () => {
    const s = await state({ HEDDLE_BACKEND: '', HEDDLE_ISA: '', HEDDLE_THREADS: '' });
    expectWorking(s);
    expect({ ...s.info, node: '' }).toEqual({ ...normal.info, node: '' });
  });
  it('cpu without a binary is refused with the reason', async () => {
    const s = await state({ ...folderWith('empty'), HEDDLE_BACKEND: 'cpu' });
    expectRefused(s, 'ERR_BACKEND', /backend cpu is not available: No native build was found.*compiler/);
  });
  it('cuda and nonsense are refused', async () => {
    expectRefused(await state({ HEDDLE_BACKEND: 'cuda' }), 'ERR_BACKEND', /cuda/);
    expectRefused(
      await state({ HEDDLE_BACKEND: 'gpu' }),
      'ERR_OPTION',
      /HEDDLE_BACKEND must be one of.*got 'gpu'/,
    );
  });
});

describe('HEDDLE_ISA', () => {
  it('forces each instruction set of this machine, and proves it', async () => {
    for (const isa of normal.info.isas) {
      const s = await state({ HEDDLE_ISA: isa });
      expectWorking(s);
      expect(s.info.isa).toBe(isa);
    }
  });
  it('one that this machine lacks is refused, and what there is is named', async () => {
    const known: IsaName[] = ['avx512', 'avx2', 'neon', 'scalar'];
    const missing = known.filter((isa) => !normal.info.isas.includes(isa));
    expect(missing.length).toBeGreaterThan(0); // no machine has both avx2 and neon
    for (const isa of [...missing, 'sse9']) {
      const s = await state({ HEDDLE_ISA: isa });
      expectRefused(s, 'ERR_BACKEND', new RegExp(`HEDDLE_ISA=${isa} is not available.*scalar`));
    }
  });
  it('needs the binary', async () => {
    const s = await state({ ...folderWith('empty'), HEDDLE_ISA: 'scalar' });
    expectRefused(s, 'ERR_BACKEND', /HEDDLE_ISA=scalar needs the native backend: No native build/);
  });
});

describe('HEDDLE_THREADS', () => {
  it.each(['1', '3', '256'])('%s', async (threads) => {
    const s = await state({ HEDDLE_THREADS: threads });
    expectWorking(s);
    expect(s.info.threads).toBe(Number(threads));
  });
  it.each(['0', '257', '1.5', '-1', 'many'])('%s is refused', async (threads) => {
    expectRefused(
      await state({ HEDDLE_THREADS: threads }),
      'ERR_OPTION',
      /HEDDLE_THREADS must be an integer from 1/,
    );
  });
});
