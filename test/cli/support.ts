import type { Context } from '../../lib/cli/command.ts';
import { runCli } from '../../lib/cli/run.ts';
import { Tensor } from '../../lib/tensor.ts';
import type { OpCase } from '../cases/case.ts';
import { allCases } from '../cases/index.ts';

/** Runs a command line in this process and catches what it writes. */
export async function heddle(argv: string[], cases: OpCase[] = allCases) {
  const out: string[] = [];
  const err: string[] = [];
  const context: Context = {
    io: { out: (line) => out.push(line), err: (line) => err.push(line), tty: false },
    cases,
  };
  const code = await runCli(argv, context);
  return { code, out: out.join('\n'), err: err.join('\n') };
}

/** A case whose native result is off by `error`, and that can be timed. */
export function fakeCase(error: number, more: Partial<OpCase> = {}): OpCase {
  const values = (backend: string | undefined) => {
    const off = backend === 'reference' ? 0 : error;
    return [new Tensor('float32', Float32Array.of(1 + off, 2), [2])] as Tensor[];
  };
  return {
    family: 'moe',
    op: 'fake',
    name: `off by ${error}`,
    tolerance: 1e-6,
    bench: true,
    flops: 1000,
    bytes: 100,
    prepare: () => ({
      run: (o) => values(o.backend),
      runAsync: async (o) => values(o.backend),
    }),
    ...more,
  };
}
