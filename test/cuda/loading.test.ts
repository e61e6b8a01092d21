import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import type { Info } from '../../lib/backend.ts';
import { hasCuda } from '../helpers/cuda.ts';
import { requireDist, root, runCommand } from '../helpers/program.ts';

const library = process.env['HEDDLE_CUDA_LIBRARY'] ?? '';

/** Runs an ES module against the built package and returns the JSON that it prints last. */
async function evaluate<T>(program: string, env: Record<string, string>): Promise<T> {
  const dist = JSON.stringify(join(root, 'dist/index.js'));
  const moe = JSON.stringify(join(root, 'dist/moe/index.js'));
  const source = `import * as heddle from ${dist}; import * as moe from ${moe}; ${program}`;
  const result = await runCommand(process.execPath, ['--input-type=module', '-e', source], { env });
  if (result.code !== 0) throw new Error(`ended with ${result.code ?? result.signal}\n${result.stderr}`);
  return JSON.parse(result.stdout.trimEnd().split('\n').at(-1) as string);
}

const STATE = `
  const logits = new heddle.Tensor('float32', Float32Array.of(1, 3, 2), [1, 3]);
  const attempt = (options) => {
    try { return [...moe.routeTopKSync(logits, { k: 2, ...options }).indices.data]; } catch (e) { return [e.code, e.message]; }
  };
  console.log(JSON.stringify({ info: heddle.info(), auto: attempt({}), cuda: attempt({ backend: 'cuda' }) }));`;
interface State {
  info: Info;
  auto: unknown[];
  cuda: unknown[];
}

function expectCpuServes(s: State, reason: RegExp): void {
  expect(s.info.backends.cuda.available).toBe(false);
  expect(s.info.backends.cuda.reason).toMatch(reason);
  expect(s.info.backends.cuda.remedy).toBeTruthy();
  expect(s.auto).toEqual([1, 2]);
  expect(s.cuda[0]).toBe('ERR_BACKEND');
  expect(s.cuda[1]).toMatch(reason);
}

describe('the CUDA library', () => {
  beforeAll(requireDist);

  it('absent: the CPU serves, and info() says why', async () => {
    const s = await evaluate<State>(STATE, { HEDDLE_CUDA_LIBRARY: '/nonexistent/libheddle_cuda.so' });
    expectCpuServes(s, /nonexistent.*(No such file|cannot open|no such file)/);
  });

  it('another library in its place', async () => {
    const addon = join(root, 'build/Release/heddle.node');
    expectCpuServes(
      await evaluate<State>(STATE, { HEDDLE_CUDA_LIBRARY: addon }),
      /it has no heddle_cuda_abi/,
    );
  });
});

describe.skipIf(!hasCuda())('the CUDA library, loaded', () => {
  beforeAll(requireDist);
  const env = { HEDDLE_CUDA_LIBRARY: library };

  it('serves the calls that ask for it', async () => {
    const s = await evaluate<State>(STATE, env);
    expect(s.info.backends.cuda).toMatchObject({ available: true, path: library });
    expect(s.info.backend).toBe('cpu');
    expect([s.auto, s.cuda]).toEqual([
      [1, 2],
      [1, 2],
    ]);
  });

  it('HEDDLE_BACKEND=cuda makes it the default', async () => {
    const s = await evaluate<State>(STATE, { ...env, HEDDLE_BACKEND: 'cuda' });
    expect(s.info.backend).toBe('cuda');
    expect(s.info.isa).toBeNull();
    expect(s.auto).toEqual([1, 2]);
  });

  it.skipIf(!library.includes('host'))('no device', async () => {
    const s = await evaluate<State>(STATE, { ...env, HEDDLE_CUDA_HOST_NO_DEVICE: '1' });
    expectCpuServes(s, /no CUDA device/);
  });

  it.skipIf(!library.includes('host'))('a device that runs out of memory', async () => {
    const program = `
      const big = heddle.Tensor.zeros('float32', [1000, 1000]);
      const small = heddle.Tensor.zeros('float32', [10, 10]);
      let code;
      try { await big.to('cuda'); } catch (e) { code = e.code; }
      const there = await small.to('cuda');
      console.log(JSON.stringify({ code, live: heddle.cudaMemory().live, location: there.location }));`;
    const s = await evaluate<object>(program, { ...env, HEDDLE_CUDA_HOST_BYTES: '1000000' });
    expect(s).toEqual({ code: 'ERR_MEMORY', live: 512, location: 'cuda' });
  });

  it('a worker may end while its calls run', async () => {
    const program = `
      const { Worker } = await import('node:worker_threads');
      const dist = ${JSON.stringify(join(root, 'dist/moe/index.cjs'))};
      const code = \`
        const moe = require(\${JSON.stringify(dist)});
        const { Tensor } = require(\${JSON.stringify(dist.replace('moe/', ''))});
        const logits = new Tensor('float32', new Float32Array(300 * 512), [300, 512]);
        for (let i = 0; i < 10; i++) moe.routeTopK(logits, { k: 8, backend: 'cuda' }).catch(() => {});
        require('node:worker_threads').parentPort.postMessage('running');\`;
      for (let i = 0; i < 3; i++) {
        const worker = new Worker(code, { eval: true, execArgv: [] });
        await new Promise((resolve) => worker.once('message', resolve));
        await worker.terminate();
      }
      const r = await moe.routeTopK(new heddle.Tensor('float32', Float32Array.of(1, 2), [1, 2]), { k: 1, backend: 'cuda' });
      const { live, jobs } = heddle.cudaMemory();
      console.log(JSON.stringify({ ids: [...r.indices.data], live, jobs }));`;
    expect(await evaluate<object>(program, env)).toEqual({ ids: [1], live: 0, jobs: 0 });
  });
});
