import { type Steps, step } from '../../checkpoint/steps.ts';
import { gelu, geluSync } from '../../nn/gelu.ts';
import { checkOptions, optionChoice } from '../../op.ts';
import { makeTensor, type Tensor } from '../../tensor.ts';
import { elementwise } from '../ops/activation.ts';
import { product, type RunOptions } from '../ops/perform.ts';
import { type Backward, Block, type BlockInput, checkInput, type Forward, here } from './block.ts';

/** A block without parameters. */
abstract class Plain extends Block {
  readonly layers = {};
}

abstract class Activation extends Plain {
  constructor(private readonly kind: 'relu' | 'tanh') {
    super();
  }

  *run(input: BlockInput, name: string, options: RunOptions | undefined): Steps<Forward> {
    const x = checkInput(input, name, true, '');
    const output = yield* elementwise(this.kind, x, null, options);
    const kind = `${this.kind}-backward` as const;
    const backward: Backward = function* (g, recorder) {
      return yield* elementwise(kind, g, output, recorder.options);
    };
    return { output, backward };
  }
}

/** max(0, x) */
export class Relu extends Activation {
  constructor() {
    super('relu');
  }
}

/** tanh x: bounded activations keep gradients small, which suits clipping (Papernot et al. 2021). */
export class Tanh extends Activation {
  constructor() {
    super('tanh');
  }
}

const GELU: ReadonlySet<string> = new Set(['approximate']);

/** x·Φ(x), or its approximation by tanh. */
export class Gelu extends Plain {
  private readonly approximate: 'none' | 'tanh';

  /** @param options `approximate`: none (default) or tanh, as in PyTorch */
  constructor(options?: { approximate?: 'none' | 'tanh' }) {
    super();
    checkOptions(options, GELU, 'Gelu');
    this.approximate = optionChoice(options?.approximate, ['none', 'tanh'], 'none', 'approximate');
  }

  *run(input: BlockInput, name: string, options: RunOptions | undefined): Steps<Forward> {
    const x = checkInput(input, name, true, '');
    const { approximate } = this;
    const output = yield* step(
      () => geluSync(x, { ...options, approximate }),
      () => gelu(x, { ...options, approximate }),
    );
    const kind = approximate === 'tanh' ? 'gelu-tanh-backward' : 'gelu-backward';
    const backward: Backward = function* (g, recorder) {
      return yield* elementwise(kind, g, x, recorder.options);
    };
    return { output: output as Tensor<'float32'>, backward };
  }
}

/** `[B, …]` → `[B, everything]`. */
export class Flatten extends Plain {
  run(input: BlockInput, name: string): Steps<Forward> {
    const x = checkInput(input, name, input.dims.length >= 1, '[B, …]');
    const { dims } = x;
    const output = makeTensor('float32', x.data, [dims[0], product(dims.slice(1))]);
    const backward: Backward = (g) => here(() => makeTensor('float32', g.data, dims));
    return here(() => ({ output, backward }));
  }
}
