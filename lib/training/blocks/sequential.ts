import type { Steps } from '../../checkpoint/steps.ts';
import { HeddleError } from '../../errors.ts';
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
import type { Mask } from './mask.ts';

/**
 * Blocks one after another. A list names its layers '0', '1', …, as PyTorch does; an object by its keys; nested ones
 * are joined by dots.
 *
 * ```js
 * const model = new Sequential([new Conv2d(1, 16, 8, { stride: 2, padding: 3 }), new Tanh(), new Flatten(), …]);
 * const pass = await model.forward(images);                       // [B, 1, 28, 28]
 * const { gradient } = await crossEntropy(pass.output, labels);
 * await optimizer.accumulate(await pass.backward(gradient));
 * ```
 */
export class Sequential extends Block {
  readonly blocks: Readonly<Record<string, Block>>;
  readonly layers: Readonly<Record<string, LayerParameters>>;

  /** @throws HeddleError `ERR_ARGUMENT` for an entry that is not a block or a name with a dot */
  constructor(blocks: readonly Block[] | Readonly<Record<string, Block>>) {
    super();
    // Integer keys of an object would be moved to the front: a list's numbers are in order anyway.
    this.blocks = { ...blocks } as Record<string, Block>;
    const layers: Record<string, LayerParameters> = {};
    for (const [name, block] of Object.entries(this.blocks)) {
      if (!(block instanceof Block))
        throw new HeddleError('ERR_ARGUMENT', `blocks.${name}: expected a block`);
      if (name.includes('.')) throw new HeddleError('ERR_ARGUMENT', `blocks.${name}: a name has no dot`);
      for (const [layer, parameters] of Object.entries(block.layers)) layers[join(name, layer)] = parameters;
    }
    this.layers = layers;
  }

  override initial(layer: string, parameter: string): { range: number } | { value: number } {
    const [name, ...rest] = layer.split('.');
    return this.blocks[name].initial(rest.join('.'), parameter);
  }

  *run(x: BlockInput, name: string, options: RunOptions | undefined, mask: Mask): Steps<Forward> {
    const ways: { way: Backward; trains: boolean }[] = [];
    let at = x;
    let left = mask;
    for (const [key, block] of Object.entries(this.blocks)) {
      const next: Forward = yield* block.run(at, `${name}${key}.`, options, left);
      ways.push({ way: next.backward, trains: Object.keys(block.layers).length > 0 });
      at = next.output;
      left = next.mask;
    }
    const output = checkInput(at, name, true, '');
    const backward: Backward = function* (gradOutput, recorder, wantInput) {
      // Nothing below the first trained block needs a gradient, unless the caller wants the input's.
      const first = wantInput ? 0 : ways.findIndex((w) => w.trains);
      let g: typeof gradOutput | null = gradOutput;
      for (let i = ways.length - 1; i >= Math.max(first, 0) && first >= 0; i--) {
        g = yield* ways[i].way(g as typeof gradOutput, recorder, wantInput || i > first);
      }
      return wantInput ? g : null;
    };
    return { output, mask: left, backward };
  }
}

/** x + block(x). */
export class Residual extends Block {
  readonly layers: Readonly<Record<string, LayerParameters>>;

  constructor(readonly block: Block) {
    super();
    if (!(block instanceof Block)) throw new HeddleError('ERR_ARGUMENT', 'block: expected a block');
    this.layers = block.layers;
  }

  override initial(layer: string, parameter: string): { range: number } | { value: number } {
    return this.block.initial(layer, parameter);
  }

  *run(input: BlockInput, name: string, options: RunOptions | undefined, mask: Mask): Steps<Forward> {
    const x = checkInput(input, name, true, '');
    const { output: inner, backward: way } = yield* this.block.run(x, name, options, mask);
    checkInput(
      inner,
      name,
      inner.dims.join() === x.dims.join(),
      `[${x.dims.join(', ')}] from the block, as it read`,
    );
    const output = yield* add(x, inner, options);
    const backward: Backward = function* (g, recorder, wantInput) {
      const through = yield* way(g, recorder, wantInput);
      return through === null ? null : yield* add(g, through, recorder.options);
    };
    return { output, mask, backward };
  }
}

/** @internal Names of a block's layers within its parent: the layer of a single one is ''. */
export function join(name: string, layer: string): string {
  return layer === '' ? name : `${name}.${layer}`;
}
