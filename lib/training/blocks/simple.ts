import { type Steps, step } from '../../checkpoint/steps.ts';
import { gelu, geluSync } from '../../nn/gelu.ts';
import { checkOptions, optionChoice } from '../../op.ts';
import { makeTensor, product, type Tensor } from '../../tensor.ts';
import { elementwise } from '../ops/activation.ts';
import { type RunOptions, zeros } from '../ops/perform.ts';
import { type Backward, Block, type BlockInput, checkInput, type Forward, here } from './block.ts';
import { type Mask, refuseMask } from './mask.ts';

/** A block without parameters. */
abstract class Plain extends Block {
  readonly layers = {};
}

abstract class Activation extends Plain {
  constructor(private readonly kind: 'relu' | 'tanh') {
    super();
  }

  *run(input: BlockInput, name: string, options: RunOptions | undefined, mask: Mask): Steps<Forward> {
    const x = checkInput(input, name, true, '');
    const output = yield* elementwise(this.kind, x, null, options);
    const kind = `${this.kind}-backward` as const;
    const backward: Backward = function* (g, recorder) {
      return yield* elementwise(kind, g, output, recorder.options);
    };
    return { output, mask, backward };
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

  *run(input: BlockInput, name: string, options: RunOptions | undefined, mask: Mask): Steps<Forward> {
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
    return { output: output as Tensor<'float32'>, mask, backward };
  }
}

/** `[B, …]` → `[B, everything]`. */
export class Flatten extends Plain {
  run(input: BlockInput, name: string, _: RunOptions | undefined, mask: Mask): Steps<Forward> {
    refuseMask(mask, name, 'Flatten');
    const x = checkInput(input, name, input.dims.length >= 1, '[B, …]');
    const { dims } = x;
    const output = makeTensor('float32', x.data, [dims[0], product(dims.slice(1))]);
    const backward: Backward = (g) => here(() => makeTensor('float32', g.data, dims));
    return here(() => ({ output, mask: null, backward }));
  }
}

/** Mean over the tokens of each sequence, `[B, T, dim]` → `[B, dim]`; padding does not count, and of no tokens it is 0. */
export class MeanTokens extends Plain {
  run(input: BlockInput, name: string, _: RunOptions | undefined, mask: Mask): Steps<Forward> {
    return here(() => this.mean(checkInput(input, name, input.dims.length === 3, '[B, T, dim]'), mask));
  }

  private mean(x: Tensor<'float32'>, mask: Mask): Forward {
    const [batch, positions, dim] = x.dims;
    const output = zeros([batch, dim]);
    const tokens = Array.from({ length: batch }, (_, b) =>
      Array.from({ length: positions }, (_, t) => b * positions + t).filter((i) => mask?.data[i] !== 0),
    );
    const sum = new Float64Array(dim);
    tokens.forEach((own, b) => {
      sum.fill(0);
      for (const i of own) for (let d = 0; d < dim; d++) sum[d] += x.data[i * dim + d];
      for (let d = 0; d < dim; d++) output.data[b * dim + d] = sum[d] / Math.max(1, own.length);
    });
    const backward: Backward = (g) =>
      here(() => {
        const dx = zeros(x.dims);
        tokens.forEach((own, b) => {
          const share = g.data.slice(b * dim, (b + 1) * dim).map((v) => v / own.length);
          for (const i of own) dx.data.set(share, i * dim);
        });
        return dx;
      });
    return { output, mask: null, backward };
  }
}
