import { describe, expect, it } from 'vitest';
import { linearSync, packMatrix, packMatrixSync, setDefaults, Tensor } from '../lib/index.ts';
import { linearCases } from './cases/linear.ts';
import { Random } from './cases/random.ts';
import { nativeVariants } from './helpers/backends.ts';
import { testCases } from './helpers/cases.ts';
import { expectRejection, expectThrow } from './helpers/errors.ts';

testCases(linearCases);

describe.each(nativeVariants())('linear on $name', ({ use }) => {
  it.each([
    { type: 'float32' },
    { type: 'bfloat16' },
    { type: 'int8' },
    { type: 'int4' },
    { type: 'int4', symmetric: false },
    { type: 'mxfp4' },
    { type: 'float8' },
  ] as const)('$type, symmetric $symmetric: a row alone has the bits it has in a batch', (options) => {
    use();
    const random = new Random(77);
    const [rows, n, k] = [61, 70, 1664]; // several blocks of k and scale groups
    const w = packMatrixSync(new Tensor('float32', random.normals(n * k), [n, k]), options);
    const x = random.normals(rows * k);
    const all = linearSync(new Tensor('float32', x, [rows, k]), w).data as Float32Array;
    for (let r = 0; r < rows; r++) {
      const one = linearSync(new Tensor('float32', x.slice(r * k, (r + 1) * k), [1, k]), w)
        .data as Float32Array;
      expect(one).toEqual(all.slice(r * n, (r + 1) * n));
    }
  });
});

describe('packMatrix and linear refuse bad input', () => {
  const w = new Tensor('float32', new Float32Array(12), [3, 4]);
  const x = new Tensor('float32', new Float32Array(8), [2, 4]);
  it('with codes and names', async () => {
    setDefaults({});
    expectThrow(
      () => packMatrixSync(new Tensor('float32', new Float32Array(12), [12])),
      'ERR_SHAPE',
      /^weight/,
    );
    expectThrow(
      () => packMatrixSync(new Tensor('int32', new Int32Array(12), [3, 4])),
      'ERR_DTYPE',
      /^weight/,
    );
    expectThrow(() => packMatrixSync(w, { type: 'int5' as never }), 'ERR_OPTION', /^type/);
    expectThrow(
      () => packMatrixSync(w, { type: 'int4' }),
      'ERR_OPTION',
      /groupSize 32 does not divide the 4 inputs/,
    );
    expectThrow(
      () => packMatrixSync(w, { type: 'mxfp4', groupSize: 64 }),
      'ERR_OPTION',
      /groupSize must be 32/,
    );
    expectThrow(() => packMatrixSync(w, { groupSize: 64 }), 'ERR_OPTION', /groupSize needs/);
    await expectRejection(packMatrix(w, { signal: AbortSignal.abort() }), 'ERR_ABORTED', /packMatrix/);
    const p = packMatrixSync(w);
    expectThrow(
      () => linearSync(new Tensor('float32', new Float32Array(6), [2, 3]), p),
      'ERR_SHAPE',
      /expected \[\.\.\., 4\]/,
    );
    expectThrow(() => linearSync(x, w as never), 'ERR_ARGUMENT', /PackedMatrix/);
    expectThrow(
      () => linearSync(x, p, { bias: new Tensor('float32', new Float32Array(2), [2]) }),
      'ERR_SHAPE',
      /^bias/,
    );
    expectThrow(() => linearSync(x, p, { activation: 'softmax' as never }), 'ERR_OPTION', /^activation/);
    expectThrow(
      () => linearSync(x, p, { out: new Tensor('float32', new Float32Array(6), [3, 2]) }),
      'ERR_SHAPE',
      /^out/,
    );
    p.dispose();
    p.dispose();
    expectThrow(() => linearSync(x, p), 'ERR_DISPOSED', /disposed/);
    const r = packMatrixSync(w, { backend: 'reference' });
    if (nativeVariants().length > 0)
      expectThrow(() => linearSync(x, r, { backend: 'cpu' }), 'ERR_BACKEND', /packed for backend reference/);
  });
});
