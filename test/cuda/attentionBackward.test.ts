import { describe, expect, it } from 'vitest';
import {
  attention,
  attentionBackward,
  attentionBackwardSync,
  attentionSync,
  factorizedAttentionBackward,
  factorizedAttentionBackwardSync,
  factorizedAttentionSync,
} from '../../lib/attention/index.ts';
import { cudaMemory } from '../../lib/device.ts';
import { decodeFloats, encodeFloats, type FloatType } from '../../lib/dtype.ts';
import { type DTypeArrays, Tensor } from '../../lib/index.ts';
import { Random } from '../cases/random.ts';
import { hasCuda, testCudaCases } from '../helpers/cuda.ts';
import { expectThrow } from '../helpers/errors.ts';

const backward = ['attentionBackward', 'factorizedAttentionBackward'];
testCudaCases('attention', backward, { kernels: backward });

const TYPES = ['float32', 'bfloat16', 'float16'] as const;
const random = new Random(11);

function draw<T extends FloatType>(type: T, dims: number[]): Tensor<T> {
  const count = dims.reduce((a, b) => a * b, 1);
  return new Tensor(type, encodeFloats(random.normals(count), type) as DTypeArrays[T], dims);
}
const bytes = (t: Tensor) => Buffer.from(t.data.buffer, t.data.byteOffset, t.data.byteLength);
const numbers = (t: Tensor<FloatType>) => decodeFloats(t.data, t.type);

/** One entry of the batch, or one sequence's rows. */
function part<T extends FloatType>(t: Tensor<T>, begin: number, count: number): Tensor<T> {
  const row = t.size / t.dims[1];
  return new Tensor(t.type, t.data.slice(begin * row, (begin + count) * row) as DTypeArrays[T], [
    1,
    count,
    ...t.dims.slice(2),
  ]);
}

describe.skipIf(!hasCuda())('cuda, attentionBackward', () => {
  it.each(TYPES)(
    'computes on the device from the forward to the gradients, with the bits of host tensors: %s',
    async (type) => {
      const before = cudaMemory();
      const [q, g] = [0, 1].map(() => draw(type, [2, 37, 4, 40]));
      const [k, v] = [0, 1].map(() => draw(type, [2, 45, 2, 40]));
      const bias = draw('float32', [2, 4, 37, 45]);
      const options = { causal: true, bias, sinks: random.normals(4) };
      const forward = attentionSync(q, k, v, { ...options, backend: 'cuda', returnLogSumExp: true });
      const expected = attentionBackwardSync(g, q, k, v, {
        ...options,
        ...(forward as Required<typeof forward>),
        backend: 'cuda',
      });

      const [dg, dq, dk, dv, db] = await Promise.all([g, q, k, v, bias].map((t) => t.to('cuda')));
      const onDevice = { ...options, bias: db };
      const kept = await attention(dq, dk, dv, { ...onDevice, returnLogSumExp: true });
      expect([kept.output.location, kept.logSumExp!.location]).toEqual(['cuda', 'cuda']);
      const all = { ...onDevice, output: kept.output, logSumExp: kept.logSumExp as Tensor };
      const fresh = await attentionBackward(dg, dq, dk, dv, all);
      // Into tensors with something in them: what nobody sees must be written as well.
      const out = { ...fresh, bias: await draw('float32', bias.dims.slice()).to('cuda') };
      const again = attentionBackwardSync(dg, dq, dk, dv, { ...all, out });
      for (const name of ['query', 'key', 'value', 'bias'] as const) {
        expect(again[name]!.location).toBe('cuda');
        const host: Tensor = await again[name]!.to('cpu');
        expect(bytes(host).equals(bytes(expected[name] as Tensor)), name).toBe(true);
      }
      for (const t of [dg, dq, dk, dv, db, kept.output, kept.logSumExp!, out.bias, ...Object.values(fresh)])
        t.dispose();
      expect(cudaMemory().live).toBe(before.live);
    },
  );

  it('wants all tensors in one place', () => {
    const [q, k, v, g] = [0, 1, 2, 3].map(() => draw('float32', [1, 3, 1, 4]));
    const { output, logSumExp } = attentionSync(q, k, v, { backend: 'cuda', returnLogSumExp: true });
    const onDevice = output.toSync('cuda');
    expectThrow(
      () => attentionBackwardSync(g, q, k, v, { output: onDevice, logSumExp: logSumExp as Tensor }),
      'ERR_ARGUMENT',
      /^attentionBackward: output is on cuda but q is on cpu/,
    );
    onDevice.dispose();
  });

  it.each(TYPES)('gives a sequence the bits that it has alone: %s', (type) => {
    const lengths = [70, 1, 31]; // with blocks of four warps, and of two
    const total = 102;
    const [q, g] = [0, 1].map(() => draw(type, [1, total, 4, 64]));
    const [k, v] = [0, 1].map(() => draw(type, [1, total, 2, 64]));
    const offsets = Int32Array.of(0, 70, 71, 102);
    const segments = { query: offsets, key: offsets };
    const run = (x: Tensor[], more: object) => {
      const options = { causal: true, ...more, backend: 'cuda' } as const;
      const { output, logSumExp } = attentionSync(x[1], x[2], x[3], { ...options, returnLogSumExp: true });
      const all = { ...options, output, logSumExp: logSumExp as Tensor };
      return attentionBackwardSync(x[0], x[1], x[2], x[3], all);
    };
    const packed = run([g, q, k, v], { segments });
    for (const [i, length] of lengths.entries()) {
      const cut = <T extends FloatType>(t: Tensor<T>) => part(t, offsets[i], length);
      const alone = run([g, q, k, v].map(cut), {});
      for (const name of ['query', 'key', 'value'] as const) {
        expect(bytes(alone[name]).equals(bytes(cut(packed[name]))), `${name} of sequence ${i}`).toBe(true);
      }
    }
  });

  it.each(TYPES)('keeps what is masked out of the gradients, whatever its numbers are: %s', (type) => {
    const [q, g] = [0, 1].map(() => draw(type, [1, 40, 2, 32]));
    const [k, v] = [0, 1].map(() => draw(type, [1, 50, 2, 32]));
    const mask = new Tensor(
      'uint8',
      Uint8Array.from({ length: 40 * 50 }, (_, i) => (i % 50 === 7 || i < 50 ? 0 : 1)),
      [1, 1, 40, 50],
    );
    const { output, logSumExp } = attentionSync(q, k, v, {
      mask,
      backend: 'reference',
      returnLogSumExp: true,
    });
    const options = { mask, output, logSumExp: logSumExp as Tensor, backend: 'cuda' } as const;
    const clean = attentionBackwardSync(g, q, k, v, options);
    // Key 7, which nobody sees, and query 0, which sees nothing.
    const spoil = <T extends FloatType>(t: Tensor<T>, at: number, value: number) => {
      const values = numbers(t as Tensor<FloatType>);
      values.fill(value, at * 64, at * 64 + 64);
      return new Tensor(t.type, encodeFloats(values, t.type) as DTypeArrays[T], t.dims);
    };
    for (const value of [Number.NaN, Number.POSITIVE_INFINITY]) {
      const spoiled = attentionBackwardSync(
        spoil(g, 0, value),
        spoil(q, 0, value),
        spoil(k, 7, value),
        spoil(v, 7, value),
        options,
      );
      for (const name of ['query', 'key', 'value'] as const) {
        expect(numbers(spoiled[name]).every(Number.isFinite), name).toBe(true);
        // Other factors take part in the careful sums, in another order of rounding.
        const [x, y] = [numbers(spoiled[name]), numbers(clean[name])];
        const norm = Math.hypot(...y);
        expect(Math.hypot(...x.map((a, i) => a - y[i])) / norm).toBeLessThan(
          type === 'float32' ? 1e-6 : 4e-3,
        );
      }
    }
  });

  it.each(TYPES)('lets NaN through where it is seen: %s', (type) => {
    const [q, k, v, g] = [0, 1, 2, 3].map(() => draw(type, [1, 40, 1, 16]));
    const values = numbers(k);
    values.fill(Number.NaN, 20 * 16, 21 * 16); // key 20: queries 20 to 39
    const broken = new Tensor(type, encodeFloats(values, type) as DTypeArrays[FloatType], k.dims);
    const forward = { causal: true, backend: 'cuda' } as const;
    const { output, logSumExp } = attentionSync(q, broken, v, { ...forward, returnLogSumExp: true });
    const grads = attentionBackwardSync(g, q, broken, v, {
      ...forward,
      output,
      logSumExp: logSumExp as Tensor,
    });
    const query = numbers(grads.query);
    expect(query.map((x) => (Number.isNaN(x) ? 1 : 0))).toEqual(
      Float32Array.from({ length: 640 }, (_, i) => (i >= 320 ? 1 : 0)),
    );
  });
});

describe.skipIf(!hasCuda())('cuda, factorizedAttentionBackward', () => {
  it.each(TYPES)('computes on the device with the bits of host tensors: %s', async (type) => {
    const before = cudaMemory();
    const [q, g] = [0, 1].map(() => draw(type, [2, 3, 5, 4, 16]));
    const [k, v] = [0, 1].map(() => draw(type, [2, 3, 5, 2, 16]));
    const [cq, cg] = [0, 1].map(() => draw(type, [2, 1, 4, 16]));
    const [ck, cv] = [0, 1].map(() => draw(type, [2, 1, 2, 16]));
    const shared = { axis: 'space', sinks: random.normals(4) } as const;
    const classToken = { mode: 'time-skip-space-mean', query: cq, key: ck, value: cv } as const;
    const forward = { ...shared, classToken, returnLogSumExp: true, backend: 'reference' } as const;
    const { output, logSumExp } = factorizedAttentionSync(q, k, v, forward);
    const saved = { output, logSumExp: logSumExp as Tensor, gradClassToken: cg };
    const host = { ...shared, classToken, ...saved, backend: 'cuda' } as const;
    const expected = factorizedAttentionBackwardSync(g, q, k, v, host);

    const all = [g, q, k, v, cq, ck, cv, output, saved.logSumExp, cg];
    const moved = await Promise.all(all.map((t) => t.to('cuda')));
    const [dg, dq, dk, dv, dcq, dck, dcv, dOutput, dLogSumExp, dcg] = moved;
    const actual = await factorizedAttentionBackward(dg, dq, dk, dv, {
      ...shared,
      classToken: { mode: 'time-skip-space-mean', query: dcq, key: dck, value: dcv },
      output: dOutput,
      logSumExp: dLogSumExp,
      gradClassToken: dcg,
    });
    for (const name of ['query', 'key', 'value'] as const) {
      for (const [a, e] of [
        [actual[name], expected[name]],
        [actual.classToken![name], expected.classToken![name]],
      ]) {
        expect(a.location).toBe('cuda');
        const back: Tensor = await a.to('cpu');
        expect(bytes(back).equals(bytes(e)), name).toBe(true);
        a.dispose();
      }
    }
    for (const t of moved) t.dispose();
    expect(cudaMemory().live).toBe(before.live);
  });

  it('wants all tensors in one place', () => {
    const [q, k, v, g] = [0, 1, 2, 3].map(() => draw('float32', [1, 2, 3, 1, 4]));
    const { output, logSumExp } = factorizedAttentionSync(q, k, v, { axis: 'time', returnLogSumExp: true });
    const device = q.toSync('cuda');
    const saved = { axis: 'time', output, logSumExp: logSumExp as Tensor } as const;
    expectThrow(
      () => factorizedAttentionBackwardSync(g, device, k, v, saved),
      'ERR_ARGUMENT',
      /^factorizedAttentionBackward: q is on cuda but k is on cpu/,
    );
    device.dispose();
  });
});
