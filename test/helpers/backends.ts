import { info, setDefaults } from '../../lib/backend.ts';
import type { OpOptions } from '../../lib/op.ts';

/** One way to compute: a backend, and for cpu an instruction set. */
export interface Variant {
  name: string;
  options: OpOptions;
  /** Makes this the variant in use and proves that it is. */
  use(): void;
}

/** Every native variant this machine can run. Empty, with the reason printed, when there is no binary. */
export function nativeVariants(): Variant[] {
  const state = info();
  if (!state.backends.cpu.available) {
    console.log(`native variants skipped: ${state.backends.cpu.reason}`);
    return [];
  }
  return state.isas.map((isa) => ({
    name: `cpu/${isa}`,
    options: { backend: 'cpu' },
    use() {
      setDefaults({ isa });
      const running = info().isa;
      if (running !== isa) throw new Error(`asked for ${isa}, but ${running} runs`);
    },
  }));
}

/** The reference, then every native variant. */
export function everyVariant(): Variant[] {
  return [{ name: 'reference', options: { backend: 'reference' }, use() {} }, ...nativeVariants()];
}
