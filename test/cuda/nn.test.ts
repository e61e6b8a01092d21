import { describe, expect, it } from 'vitest';
import { rotaryEmbedding, rotaryEmbeddingSync } from '../../lib/attention/index.ts';
import { cudaMemory } from '../../lib/device.ts';
import { encodeFloats, type FloatType } from '../../lib/dtype.ts';
import { addResidual, addResidualSync } from '../../lib/nn/addResidual.ts';
import { gelu, geluSync } from '../../lib/nn/gelu.ts';
import { layerNorm, layerNormSync, rmsNormSync } from '../../lib/nn/norm.ts';
import { makeTensor, Tensor } from '../../lib/tensor.ts';
import { sameBits } from '../cases/case.ts';
import { Random } from '../cases/random.ts';
import { hasCuda, testCudaCases } from '../helpers/cuda.ts';
import { expectThrow } from '../helpers/errors.ts';

testCudaCases('nn', ['layerNorm', 'rmsNorm', 'gelu', 'addResidual']);

const random = new Random(9);
function draw(type: FloatType, ...dims: number[]): Tensor<FloatType> {
  const values = random.normals(dims.reduce((a, b) => a * b));
  return new Tensor(type, encodeFloats(values, type) as never, dims);
}
const live = () => {
  const { live: bytes, jobs } = cudaMemory();
  return { bytes, jobs };
};
/** Elements of a tensor, on the device or not, as one of these dims. */
const view = (t: Tensor<FloatType>, begin: number, dims: number[]) =>
  makeTensor(t.type, t.data.subarray(begin, begin + dims.reduce((a, b) => a * b)) as never, dims);

describe.skipIf(!hasCuda())('norms, elementwise ops and rotary embedding on cuda', () => {
  // Rows of a warp and of a block, in words and not, in registers and read again.
  it.each([63, 64, 1100, 8200])('a row of %i has the same bits at any address and in any batch', (n) => {
    const before = live();
    for (const type of ['float32', 'bfloat16'] as const) {
      const [weight, bias] = [draw('float32', n).toSync('cuda'), draw('float32', n).toSync('cuda')];
      const memory = draw(type, 9 * n + 1).toSync('cuda');
      const copy = view(memory.toSync('cpu'), 1, [9, n]);
      const x = new Tensor(type, copy.data.slice() as never, [9, n]).toSync('cuda');
      const run = (t: Tensor<FloatType>) => {
        const on = [
          layerNormSync(t, { weight, bias }).output,
          rmsNormSync(t, { weight }).output,
          geluSync(t),
          addResidualSync(t, t, { gate: 0.5 }),
        ];
        return on.map((y) => {
          const host = y.toSync('cpu');
          y.dispose();
          return host;
        });
      };
      const all = run(x);
      for (const row of [0, 4, 8]) {
        const expected = all.map((t) => view(t, row * n, [1, n]));
        expect(sameBits(run(view(x, row * n, [1, n])), expected)).toBe(true);
        expect(sameBits(run(view(memory, 1 + row * n, [1, n])), expected)).toBe(true); // one element off
      }
      for (const t of [weight, bias, memory, x]) t.dispose();
    }
    expect(live()).toEqual(before);
  });

  it('work on tensors of the device, in place too, and leave results there', async () => {
    const before = live();
    for (const type of ['float32', 'bfloat16', 'float16'] as const) {
      const [x, y, heads] = [draw(type, 5, 36), draw(type, 5, 36), draw(type, 2, 3, 2, 8)];
      const [weight, bias] = [draw('float32', 36), draw('float32', 36)];
      const positions = new Tensor('int32', Int32Array.of(4, 5, 100, 7, 8, 9), [2, 3]);
      const on = await Promise.all([x, y, heads, weight, bias].map((t: Tensor) => t.to('cuda')));
      const [dx, dy, dh, dw, db] = on as Tensor<FloatType>[];
      const deviceIds = await positions.to('cuda');
      const norm = { returnSum: true, returnStatistics: true, outType: 'float32' as const };
      const backend = 'cuda' as const;
      const host = await layerNorm(x, { ...norm, weight, bias, residual: y, backend });
      const device = await layerNorm(dx, { ...norm, weight: dw, bias: db, residual: dy });
      const pairs: [Tensor | undefined, Tensor | undefined][] = [
        [device.output, host.output],
        [device.sum, host.sum],
        [device.mean, host.mean],
        [device.rstd, host.rstd],
        [await gelu(dx), await gelu(x, { backend })],
        [await addResidual(dx, dy, { gate: weight }), await addResidual(x, y, { gate: weight, backend })],
        [await rotaryEmbedding(dh, { positions }), await rotaryEmbedding(heads, { positions, backend })],
        [
          rotaryEmbeddingSync(dh, { positions: deviceIds }),
          rotaryEmbeddingSync(heads, { positions, backend }),
        ],
      ];
      const sum = addResidualSync(dx, dy, { out: dx }); // last: x is the sum from here on
      expect(sum.data).toBe(dx.data);
      pairs.push([sum, addResidualSync(x, y, { backend })]);
      const normed = layerNormSync(dx, { weight: dw, out: { output: dx } }).output;
      pairs.push([normed, layerNormSync(addResidualSync(x, y, { backend }), { weight, backend }).output]);
      for (const [actual, expected] of pairs.slice(0, -2)) {
        expect((actual as Tensor).location).toBe('cuda');
        expect(sameBits([await (actual as Tensor).to('cpu')], [expected as Tensor])).toBe(true);
        (actual as Tensor).dispose();
      }
      const [actual, expected] = pairs[pairs.length - 1] as [Tensor, Tensor];
      expect(sameBits([await actual.to('cpu')], [expected])).toBe(true);
      for (const t of [...on, deviceIds]) t.dispose();
    }
    expect(live()).toEqual(before);
  });

  it('say what is where', () => {
    const x = draw('float32', 2, 8);
    const on = x.toSync('cuda');
    const weight = draw('float32', 8);
    expectThrow(
      () => layerNormSync(on, { weight }),
      'ERR_ARGUMENT',
      /layerNorm: x is on cuda but weight is on cpu/,
    );
    expectThrow(
      () => rmsNormSync(x, { out: { output: on } }),
      'ERR_ARGUMENT',
      /out\.output is on cuda but x is on cpu/,
    );
    expectThrow(() => geluSync(on, { backend: 'cpu' }), 'ERR_BACKEND', /gelu: x is on cuda/);
    expectThrow(() => addResidualSync(on, x), 'ERR_ARGUMENT', /x is on cuda but y is on cpu/);
    const gate = weight.toSync('cuda');
    expectThrow(() => addResidualSync(on, on, { gate }), 'ERR_ARGUMENT', /gate: location must be 'cpu'/);
    expectThrow(
      () => geluSync(view(on, 0, [1, 8]), { out: view(on, 4, [1, 8]) }),
      'ERR_ARGUMENT',
      /out overlaps an input/,
    );
    for (const t of [on, gate]) t.dispose();
  });
});
