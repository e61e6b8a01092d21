import { describe, expect, it } from 'vitest';
import { cudaMemory } from '../../lib/device.ts';
import { encodeFloats, type FloatType } from '../../lib/dtype.ts';
import {
  linear,
  linearSync,
  type PackMatrixOptions,
  packMatrix,
  packMatrixSync,
} from '../../lib/gemm/linear.ts';
import { Tensor } from '../../lib/tensor.ts';
import { sameBits } from '../cases/case.ts';
import { Random } from '../cases/random.ts';
import { hasCuda, testCudaCases } from '../helpers/cuda.ts';
import { expectRejection, expectThrow } from '../helpers/errors.ts';

testCudaCases('core', ['linear']);

const random = new Random(5);
const weightOf = (n: number, k: number) => new Tensor('float32', random.normals(n * k, k ** -0.5), [n, k]);
const rowsOf = (rows: number, k: number, type: FloatType = 'float32') =>
  new Tensor(type, encodeFloats(random.normals(rows * k), type) as never, [rows, k]);
const live = () => {
  const { live: bytes, jobs } = cudaMemory();
  return { bytes, jobs };
};

describe.skipIf(!hasCuda())('linear on cuda', () => {
  // 150 rows: the path for many; 17: for some; 1 and 5: for few. The first and the last are cut along k.
  const types: [string, number, number, PackMatrixOptions][] = [
    ['float32', 37, 530, {}],
    ['bfloat16', 100, 96, { type: 'bfloat16' }],
    ['int8', 37, 70, { type: 'int8' }],
    ['int4', 20, 128, { type: 'int4', symmetric: false, groupSize: 64 }],
    ['mxfp4', 20, 96, { type: 'mxfp4' }],
    ['float8', 20, 1056, { type: 'float8' }],
  ];
  it.each(types)('%s: a row has the same bits alone and in every batch', (_, n, k, options) => {
    const before = live();
    const weight = packMatrixSync(weightOf(n, k), { ...options, backend: 'cuda' });
    const x = rowsOf(150, k);
    const bias = new Tensor('float32', random.normals(n), [n]);
    const all = linearSync(x, weight, { bias, activation: 'silu' });
    for (const [begin, end] of [
      [0, 1],
      [149, 150],
      [60, 65],
      [100, 117],
    ]) {
      const part = new Tensor('float32', x.data.subarray(begin * k, end * k) as never, [end - begin, k]);
      const y = linearSync(part, weight, { bias, activation: 'silu' });
      const expected = all.data.subarray(begin * n, end * n) as Float32Array;
      expect(sameBits([y], [new Tensor('float32', expected, y.dims)])).toBe(true);
    }
    weight.dispose();
    expect(live()).toEqual(before);
  });

  it('works on tensors of the device, whatever their type, and leaves the result there', async () => {
    const before = live();
    const bias = new Tensor('float32', random.normals(30), [30]);
    const deviceBias = await bias.to('cuda');
    for (const [type, k] of [
      ['float32', 640],
      ['bfloat16', 64],
    ] as const) {
      const cpu = await packMatrix(weightOf(30, k), { type, backend: 'cpu' });
      const weight = await cpu.to('cuda');
      expect([cpu.location, weight.location, weight.backend]).toEqual(['cpu', 'cuda', 'cuda']);
      expect(await weight.to('cuda')).toBe(weight);
      expect(weight.bytes).toBeGreaterThanOrEqual(30 * k * (type === 'float32' ? 4 : 2));
      for (const xType of ['float32', 'bfloat16', 'float16'] as const) {
        const x = new Tensor(xType, rowsOf(6, k, xType).data, [2, 3, k]);
        const options = { outType: xType, activation: 'gelu' as const };
        const expected = await linear(x, weight, { ...options, bias });
        expect([expected.location, expected.type]).toEqual(['cpu', xType]);
        const on = await x.to('cuda');
        const actual = await linear(on, weight, { ...options, bias: deviceBias });
        expect([actual.location, ...actual.dims]).toEqual(['cuda', 2, 3, 30]);
        const out = await expected.to('cuda');
        expect(linearSync(on, weight, { ...options, bias: deviceBias, out }).data).toBe(out.data);
        expect(sameBits([await actual.to('cpu'), await out.to('cpu')], [expected, expected])).toBe(true);
        for (const t of [on, actual, out]) t.dispose();
      }
      weight.dispose();
      cpu.dispose();
    }
    deviceBias.dispose();
    expect(live()).toEqual(before);
  });

  it('rows that are not finite spoil themselves only', () => {
    for (const type of ['float32', 'bfloat16', 'int8', 'mxfp4', 'float8'] as const) {
      const weight = packMatrixSync(weightOf(20, 64), { type, backend: 'cuda' });
      const clean = rowsOf(6, 64);
      const x = new Tensor('float32', (clean.data as Float32Array).slice(), [6, 64]);
      x.data[2 * 64 + 5] = Number.NaN;
      x.data[4 * 64 + 9] = Infinity;
      const [actual, expected] = [x, clean].map((t) => linearSync(t, weight).data as Float32Array);
      for (const [i, v] of actual.entries()) {
        const row = Math.floor(i / 20);
        if (row === 2 || row === 4) expect(Number.isFinite(v)).toBe(false);
        else expect(v).toBe(expected[i]);
      }
      weight.dispose();
    }
  });

  it('says what is where when weight and tensors do not meet', async () => {
    const before = live();
    const source = weightOf(8, 16);
    const cpu = packMatrixSync(source, { backend: 'cpu' });
    const cuda = packMatrixSync(source, { backend: 'cuda' });
    const reference = packMatrixSync(source, { backend: 'reference' });
    const x = rowsOf(2, 16);
    const on = await x.to('cuda');
    for (const w of [cpu, reference]) {
      expectThrow(
        () => linearSync(on, w),
        'ERR_BACKEND',
        /x is on cuda but weight was packed for backend (cpu|reference); use await weight\.to\('cuda'\)/,
      );
    }
    const bias = new Tensor('float32', new Float32Array(8), [8]);
    expectThrow(() => linearSync(on, cuda, { bias }), 'ERR_ARGUMENT', /x is on cuda but bias is on cpu/);
    expectThrow(() => linearSync(x, cuda, { backend: 'cpu' }), 'ERR_BACKEND', /packed for backend cuda/);
    expectThrow(() => linearSync(x, cpu, { backend: 'cuda' }), 'ERR_BACKEND', /packed for backend cpu/);
    expectThrow(() => reference.toSync('cuda'), 'ERR_BACKEND', /backend reference/);
    expectThrow(() => cuda.toSync('cpu'), 'ERR_BACKEND', /backend cuda/);
    expectThrow(() => cpu.toSync('gpu' as never), 'ERR_OPTION', /'gpu'/);
    const copying = cpu.to('cuda');
    cpu.dispose();
    (await copying).dispose(); // the copy under way keeps what it reads
    await expectRejection(cpu.to('cuda'), 'ERR_DISPOSED', /disposed/);
    const running = linear(on, cuda);
    cuda.dispose();
    (await running).dispose();
    expectThrow(() => linearSync(on, cuda), 'ERR_DISPOSED', /disposed/);
    on.dispose();
    reference.dispose();
    expect(live()).toEqual(before);
  });
});
