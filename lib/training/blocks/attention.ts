import { attention, attentionSync } from '../../attention/attention.ts';
import { attentionBackward, attentionBackwardSync } from '../../attention/attentionBackward.ts';
import { type Steps, step } from '../../checkpoint/steps.ts';
import { HeddleError } from '../../errors.ts';
import { checkOptions, optionInteger } from '../../op.ts';
import { makeTensor, type Tensor } from '../../tensor.ts';
import { add } from '../ops/activation.ts';
import type { RunOptions } from '../ops/perform.ts';
import {
  type Backward,
  Block,
  type BlockInput,
  checkInput,
  type Forward,
  type LayerParameters,
} from './block.ts';
import { Linear } from './linear.ts';
import { clearPadding, type Mask } from './mask.ts';

const OPTIONS: ReadonlySet<string> = new Set(['causal', 'bias']);
const PARTS = ['query', 'key', 'value', 'output'] as const;

/**
 * Multi-head self-attention on `[B, T, dim]`: linear layers query, key, value and output around exact attention. Padding is
 * seen by nobody; where a sequence is padding alone, attention gives 0.
 */
export class SelfAttention extends Block {
  readonly layers: Readonly<Record<string, LayerParameters>>;
  private readonly parts: Readonly<Record<(typeof PARTS)[number], Linear>>;
  private readonly causal: boolean;

  /** @param options `causal` default false, `bias` default true */
  constructor(
    readonly dim: number,
    readonly heads: number,
    options?: { causal?: boolean; bias?: boolean },
  ) {
    super();
    checkOptions(options, OPTIONS, 'SelfAttention');
    optionInteger(dim, 1, 2 ** 31 - 1, 'dim');
    optionInteger(heads, 1, dim, 'heads');
    if (dim % heads !== 0) throw new HeddleError('ERR_OPTION', `heads must divide dim ${dim}, got ${heads}`);
    this.causal = options?.causal === true;
    const bias = options?.bias !== false;
    const linear = () => new Linear(dim, dim, { bias });
    this.parts = { query: linear(), key: linear(), value: linear(), output: linear() };
    this.layers = Object.fromEntries(PARTS.map((p) => [p, this.parts[p].layers['']]));
  }

  override initial(): { range: number } {
    return { range: 1 / Math.sqrt(this.dim) };
  }

  *run(input: BlockInput, name: string, options: RunOptions | undefined, mask: Mask): Steps<Forward> {
    const { dim, heads, causal, parts } = this;
    const fits = input.dims.length === 3 && input.dims[2] === dim;
    const x = clearPadding(checkInput(input, name, fits, `[B, T, ${dim}]`), mask);
    const split = [x.dims[0], x.dims[1], heads, dim / heads];
    const as = (t: Tensor, dims: readonly number[]) => makeTensor('float32', t.data as Float32Array, dims);
    const q = yield* parts.query.run(x, `${name}query.`, options, mask);
    const k = yield* parts.key.run(x, `${name}key.`, options, mask);
    const v = yield* parts.value.run(x, `${name}value.`, options, mask);
    const qkv = [q, k, v].map((f) => as(f.output, split)) as [Tensor, Tensor, Tensor];
    // Nobody looks at padding; what it looks at itself gets no gradient from it, since its own is cleared.
    const keys = mask === null ? {} : { mask: makeTensor('uint8', mask.data, [x.dims[0], 1, 1, x.dims[1]]) };
    const how = { ...options, ...keys, causal, returnLogSumExp: true };
    const mixed = yield* step(
      () => attentionSync(...qkv, how),
      () => attention(...qkv, how),
    );
    const out = yield* parts.output.run(as(mixed.output, x.dims), `${name}output.`, options, mask);
    const backward: Backward = function* (g, recorder, wantInput) {
      const through = (yield* out.backward(g, recorder, true)) as Tensor<'float32'>;
      const inner = clearPadding(through, mask);
      const kept = {
        ...recorder.options,
        ...keys,
        causal,
        output: mixed.output,
        logSumExp: mixed.logSumExp as Tensor,
      };
      const gradients = yield* step(
        () => attentionBackwardSync(as(inner, split), ...qkv, kept),
        () => attentionBackward(as(inner, split), ...qkv, kept),
      );
      let sum: Tensor<'float32'> | null = null;
      const ways = [
        [q, gradients.query],
        [k, gradients.key],
        [v, gradients.value],
      ] as const;
      for (const [part, gradient] of ways) {
        const dx: Tensor<'float32'> | null = yield* part.backward(as(gradient, x.dims), recorder, wantInput);
        sum = sum === null || dx === null ? dx : yield* add(sum, dx, recorder.options);
      }
      return sum;
    };
    return { output: out.output, mask, backward };
  }
}
