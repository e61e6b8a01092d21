import type { Steps } from '../../checkpoint/steps.ts';
import { checkOptions, optionChoice } from '../../op.ts';
import type { Elementwise } from '../../reference/training/activation.ts';
import { makeTensor } from '../../tensor.ts';
import { elementwise } from '../ops/activation.ts';
import { product, type RunOptions } from '../ops/perform.ts';
import { type Backward, Block, type BlockInput, checkInput, type Forward } from './block.ts';

/** A block without parameters. */
abstract class Plain extends Block {
  readonly layers = {};
}

abstract class Activation extends Plain {
  constructor(
    private readonly kind: 'relu' | 'tanh' | 'gelu' | 'gelu-tanh',
    /** Whether the derivative is computed from the result (or from the input). */
    private readonly fromOutput: boolean,
  ) {
    super();
  }

  *run(input: BlockInput, name: string, options: RunOptions | undefined): Steps<Forward> {
    const x = checkInput(input, name, true, '');
    const output = yield* elementwise(this.kind, x, null, options);
    const kept = this.fromOutput ? output : x;
    const kind: Elementwise = `${this.kind}-backward`;
    const backward: Backward = function* (g, recorder) {
      return yield* elementwise(kind, g, kept, recorder.options);
    };
    return { output, backward };
  }
}

/** max(0, x) */
export class Relu extends Activation {
  constructor() {
    super('relu', true);
  }
}

/** tanh x: bounded activations keep gradients small, which suits clipping (Papernot et al. 2021). */
export class Tanh extends Activation {
  constructor() {
    super('tanh', true);
  }
}

const GELU: ReadonlySet<string> = new Set(['approximate']);

/** x·Φ(x), or its approximation by tanh. */
export class Gelu extends Activation {
  /** @param options `approximate`: none (default) or tanh, as in PyTorch */
  constructor(options?: { approximate?: 'none' | 'tanh' }) {
    checkOptions(options, GELU, 'Gelu');
    const tanh = optionChoice(options?.approximate, ['none', 'tanh'], 'none', 'approximate') === 'tanh';
    super(tanh ? 'gelu-tanh' : 'gelu', false);
  }
}

/** `[B, …]` → `[B, everything]`. */
export class Flatten extends Plain {
  // biome-ignore lint/correctness/useYield: see Embedding
  *run(input: BlockInput, name: string): Steps<Forward> {
    const x = checkInput(input, name, input.dims.length >= 1, '[B, …]');
    const { dims } = x;
    const output = makeTensor('float32', x.data, [dims[0], product(dims.slice(1))]);
    const backward: Backward = function* (g) {
      return makeTensor('float32', g.data, dims);
    };
    return { output, backward };
  }
}
