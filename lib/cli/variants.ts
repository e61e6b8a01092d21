import { nativeVariants, type Variant } from '../../test/helpers/backends.ts';
import { info, setDefaults } from '../backend.ts';
import { type Io, UsageError, type Values } from './command.ts';

export type { Variant };

const REFERENCE: Variant = {
  name: 'reference',
  options: { backend: 'reference' },
  use() {},
};

/** The variants that --backend and --isa ask for; `fallback` chooses among the native ones when neither is given. */
export function selectVariants(
  values: Values,
  io: Io,
  fallback: (native: Variant[]) => Variant[] = (native) => native,
): Variant[] {
  const backend = values['backend'];
  const isa = values['isa'];
  if (backend !== undefined && backend !== 'cpu' && backend !== 'reference' && backend !== 'cuda') {
    throw new UsageError(`--backend must be cpu, cuda or reference, got '${backend}'`);
  }
  if (backend === 'cuda') {
    if (isa !== undefined) throw new UsageError('--isa needs the cpu backend');
    const { cuda } = info().backends;
    if (!cuda.available)
      throw new UsageError(`backend cuda is not available: ${cuda.reason}. ${cuda.remedy}`);
    io.out(`cuda: ${cuda.device}`);
    return [{ name: 'cuda', options: { backend: 'cuda' }, use() {} }];
  }
  if (backend === 'reference') {
    if (isa !== undefined) throw new UsageError('--isa needs the cpu backend');
    return [REFERENCE];
  }
  const { cpu } = info().backends;
  if (!cpu.available) {
    if (backend === 'cpu' || isa !== undefined) {
      throw new UsageError(`backend cpu is not available: ${cpu.reason}. ${cpu.remedy ?? ''}`);
    }
    io.out(`backend cpu is not available: ${cpu.reason}`);
    if (cpu.remedy) io.out(`  ${cpu.remedy}`);
    io.out('only the reference runs, compared with itself');
    return [REFERENCE];
  }
  const native = nativeVariants();
  if (isa === undefined) return fallback(native);
  if (isa === 'all') return native;
  return String(isa)
    .split(',')
    .map((name) => {
      const found = native.find((v) => v.name === `cpu/${name}`);
      if (!found) {
        throw new UsageError(
          `--isa ${name} is not available on this machine; available: ${info().isas.join(', ')}`,
        );
      }
      return found;
    });
}

/** Runs `body` and puts the instruction set back. */
export async function keepingIsa<T>(body: () => Promise<T>): Promise<T> {
  const before = info().isa;
  try {
    return await body();
  } finally {
    if (before !== null) setDefaults({ isa: before });
  }
}
