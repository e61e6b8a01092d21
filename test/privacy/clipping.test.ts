import { describe, expect, it } from 'vitest';
import { HeddleError, Tensor } from '../../lib/index.ts';
import {
  clipFactors,
  clipFactorsSync,
  clippedGradients,
  clippedGradientsSync,
  type PrivateLayer,
  perSampleSquaredNorms,
  perSampleSquaredNormsSync,
} from '../../lib/privacy/index.ts';
import { sameBits } from '../cases/case.ts';
import { layerShapes } from '../cases/privacy/layerShapes.ts';
import { makeLayer } from '../cases/privacy/layers.ts';
import { Random } from '../cases/random.ts';
import { everyVariant } from '../helpers/backends.ts';

const everywhere = everyVariant();
const f32 = (data: number[], dims: number[]) => new Tensor('float32', Float32Array.from(data), dims);

describe.each(everywhere)('private clipping on $name', ({ options, use }) => {
  it('worked by hand: [3, 4] clipped to 1 is [.6, .8]', () => {
    use();
    const layer = {
      kind: 'linear',
      activations: f32([1], [1, 1]),
      gradOutputs: f32([3, 4], [1, 2]),
      bias: false,
    } as const;
    const squared = perSampleSquaredNormsSync(layer, options);
    expect(squared.data[0]).toBe(25);
    const { weight } = clippedGradientsSync(layer, clipFactorsSync(squared, { maxNorm: 1 }), options);
    expect(weight.data[0]).toBeCloseTo(0.6, 6);
    expect(weight.data[1]).toBeCloseTo(0.8, 6);
  });

  it("Opacus' embedding_norm_sample_test: ids [[1,1],[2,0],[2,0]]", () => {
    use();
    const ids = new Tensor('int32', Int32Array.of(1, 1, 2, 0, 2, 0), [3, 2]);
    const gradOutputs = f32([0.2, 0.2, 0.3, 0.1, 0.3, 0.1], [3, 2, 1]);
    const squared = perSampleSquaredNormsSync(
      { kind: 'embedding', indices: ids, gradOutputs, numEmbeddings: 3 },
      options,
    );
    [0.4, 0.3162, 0.3162].forEach((n, i) => {
      expect(Math.sqrt(squared.data[i])).toBeCloseTo(n, 4);
    });
  });

  it('a sample with a NaN or an infinity is left out of the sum and reported', async () => {
    use();
    const [B, T, d, p] = [5, 3, 40, 33];
    const random = new Random(3);
    const A = random.normals(B * T * d);
    const G = random.normals(B * T * p);
    const layer = (drop: number[]) => ({
      kind: 'linear' as const,
      activations: new Tensor('float32', A, [B, T, d]),
      gradOutputs: new Tensor('float32', G, [B, T, p]),
      bias: true,
      mask: new Tensor(
        'uint8',
        Uint8Array.from({ length: B * T }, (_, r) => (drop.includes(Math.floor(r / T)) ? 0 : 1)),
        [B, T],
      ),
    });
    const clean = perSampleSquaredNormsSync(layer([]), options);
    A[1 * T * d + 7] = Number.NaN;
    G[3 * T * p + 50] = -Infinity;
    for (const method of ['ghost', 'instantiate'] as const) {
      const squared = perSampleSquaredNormsSync(layer([]), { ...options, method });
      expect(Array.from(squared.data, Number.isFinite)).toEqual([true, false, true, false, true]);
      const factors = await clipFactors(squared, { maxNorm: 0.5 });
      expect(factors.nonFinite).toEqual([1, 3]);
      expect(factors.data[1]).toBe(0);
      expect(factors.data[3]).toBe(0);
      const sums = clippedGradientsSync(layer([]), factors, options);
      const without = clippedGradientsSync(layer([1, 3]), factors, options);
      expect(sums.weight.data.every(Number.isFinite)).toBe(true);
      expect(sameBits([sums.weight, sums.bias as Tensor], [without.weight, without.bias as Tensor])).toBe(
        true,
      );
    }
    expect(clean.data.every(Number.isFinite)).toBe(true);
  });

  it('accumulates into out; nothing but zeros from all-padded, empty and zero-factor batches', () => {
    use();
    const shape = { ...layerShapes[0], lead: [4, 6] };
    const layer = makeLayer(shape, new Random(4)) as PrivateLayer;
    const factors = Float32Array.of(1, 0.5, 0.25, 2);
    const once = clippedGradientsSync(layer, factors, options);
    const out = {
      weight: f32(Array.from(once.weight.data), once.weight.dims as number[]),
      bias: once.bias as Tensor,
    };
    clippedGradientsSync(layer, factors, { ...options, out });
    for (let i = 0; i < 20; i++) expect(out.weight.data[i]).toBeCloseTo(2 * once.weight.data[i], 4);
    const zero = clippedGradientsSync(layer, new Float32Array(4), options);
    expect(zero.weight.data.every((x) => x === 0)).toBe(true);
    const padded = { ...layer, mask: new Tensor('uint8', new Uint8Array(24), [4, 6]) } as PrivateLayer;
    expect(Array.from(perSampleSquaredNormsSync(padded, options).data)).toEqual([0, 0, 0, 0]);
    expect(clippedGradientsSync(padded, factors, options).weight.data.every((x) => x === 0)).toBe(true);
  });

  it('auto takes the ghost norm exactly where 2T² ≤ p·d', () => {
    use();
    for (const [T, ghost] of [
      [4, true],
      [5, false],
    ] as const) {
      const layer = makeLayer(
        { name: '', kind: 'linear', lead: [60, T], inputs: 8, outputs: 4, bias: true },
        new Random(8),
      );
      const by = (method: 'auto' | 'ghost' | 'instantiate') => [
        perSampleSquaredNormsSync(layer, { ...options, method }),
      ];
      expect(sameBits(by('auto'), by(ghost ? 'ghost' : 'instantiate'))).toBe(true);
      // In float64 both round to the same float32.
      if (options.backend === 'cpu')
        expect(sameBits(by('auto'), by(ghost ? 'instantiate' : 'ghost'))).toBe(false);
    }
  });

  it('bad arguments: one class, one code, one text', async () => {
    use();
    const a = f32([1, 2, 3, 4], [2, 2]);
    const bad: [unknown, string, RegExp][] = [
      [{ kind: 'lstm' }, 'ERR_ARGUMENT', /layer.kind must be one of/],
      [null, 'ERR_ARGUMENT', /^layer/],
      [{ kind: 'linear', activations: a, gradOutputs: a }, 'ERR_ARGUMENT', /layer.bias/],
      [{ kind: 'linear', activations: a, gradOutputs: a, bias: true, maks: a }, 'ERR_OPTION', /maks/],
      [
        { kind: 'linear', activations: a, gradOutputs: f32([1, 2], [1, 2]), bias: true },
        'ERR_SHAPE',
        /gradOutputs/,
      ],
      [
        { kind: 'linear', activations: f32([1], [1]), gradOutputs: a, bias: true },
        'ERR_SHAPE',
        /activations/,
      ],
      [{ kind: 'linear', activations: a, gradOutputs: a, bias: true, mask: a }, 'ERR_DTYPE', /mask/],
      [
        {
          kind: 'embedding',
          indices: new Tensor('int32', Int32Array.of(0, 3), [2]),
          gradOutputs: a,
          numEmbeddings: 3,
        },
        'ERR_VALUE',
        /element 1 is 3: expected 0 to 2/,
      ],
      [
        {
          kind: 'embedding',
          indices: new Tensor('int64', BigInt64Array.of(0n, -1n), [2]),
          gradOutputs: a,
          numEmbeddings: 3,
        },
        'ERR_VALUE',
        /element 1 is -1/,
      ],
      [
        {
          kind: 'embedding',
          indices: new Tensor('int32', Int32Array.of(0, 1), [2]),
          gradOutputs: a,
          numEmbeddings: 3,
          paddingIndex: 3,
        },
        'ERR_OPTION',
        /paddingIndex/,
      ],
      ...(
        [
          [{ kernel: 2, bias: true, stride: 0 }, 'ERR_OPTION', /layer.stride/],
          [{ kernel: [2, 2], bias: true }, 'ERR_OPTION', /layer.kernel/],
          [{ bias: true }, 'ERR_ARGUMENT', /layer.kernel/],
          [{ kernel: 2 }, 'ERR_ARGUMENT', /layer.bias/],
          [{ kernel: 2, bias: true }, 'ERR_SHAPE', /gradOutputs: expected \[1, C_out, 3\]/],
          [{ kernel: 9, bias: true }, 'ERR_SHAPE', /too small/],
          [{ kernel: 1, groups: 2, bias: true }, 'ERR_OPTION', /layer.groups/],
          [{ kernel: 1, mask: a, bias: true }, 'ERR_DTYPE', /mask/],
        ] as [object, string, RegExp][]
      ).map(([o, code, text]): [unknown, string, RegExp] => [
        {
          kind: 'conv1d',
          input: f32([1, 2, 3, 4], [1, 1, 4]),
          gradOutputs: f32([1, 2, 3, 4], [1, 1, 4]),
          ...o,
        },
        code,
        text,
      ]),
      [{ kind: 'rms-norm', normalized: a, gradOutputs: f32([1, 2], [2, 1]) }, 'ERR_SHAPE', /gradOutputs/],
    ];
    for (const [layer, code, text] of bad) {
      const l = layer as PrivateLayer;
      for (const call of [
        () => perSampleSquaredNorms(l, options),
        () => clippedGradients(l, new Float32Array(2), options),
        async () => perSampleSquaredNormsSync(l, options),
      ]) {
        const error = await call().then(
          () => undefined,
          (e: unknown) => e,
        );
        expect(error).toBeInstanceOf(HeddleError);
        expect((error as HeddleError).code).toBe(code);
        expect((error as HeddleError).message).toMatch(text);
      }
    }
    const layer = { kind: 'linear', activations: a, gradOutputs: a, bias: false } as const;
    const code = (run: () => unknown) => {
      try {
        run();
      } catch (e) {
        return (e as HeddleError).code;
      }
      return 'none';
    };
    expect(code(() => clippedGradientsSync(layer, Float32Array.of(1), options))).toBe('ERR_SHAPE');
    expect(code(() => clippedGradientsSync(layer, Float32Array.of(1, Number.NaN), options))).toBe(
      'ERR_VALUE',
    );
    expect(code(() => clippedGradientsSync(layer, Float32Array.of(1, -1), options))).toBe('ERR_VALUE');
    expect(
      code(() => clippedGradientsSync(layer, Float32Array.of(1, 1), { ...options, out: { weight: a } })),
    ).toBe('ERR_ARGUMENT');
    expect(code(() => perSampleSquaredNormsSync(layer, { ...options, method: 'fast' as 'auto' }))).toBe(
      'ERR_OPTION',
    );
    expect(code(() => perSampleSquaredNormsSync(layer, { ...options, out: a }))).toBe('ERR_SHAPE');
  });

  it('an aborted call rejects', async () => {
    use();
    const layer = makeLayer(layerShapes[0], new Random(4));
    const signal = AbortSignal.abort(new Error('enough'));
    await expect(perSampleSquaredNorms(layer, { ...options, signal })).rejects.toMatchObject({
      code: 'ERR_ABORTED',
    });
    await expect(clippedGradients(layer, new Float32Array(3), { ...options, signal })).rejects.toMatchObject({
      code: 'ERR_ABORTED',
    });
  });
});
