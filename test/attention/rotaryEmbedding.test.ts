import { readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import {
  type RotaryEmbeddingOptions,
  type RotaryScaling,
  rotaryEmbeddingSync,
} from '../../lib/attention/index.ts';
import { rotaryFrequencies } from '../../lib/attention/rotaryFrequencies.ts';
import { HeddleError, Tensor } from '../../lib/index.ts';
import { rotaryEmbeddingCases } from '../cases/attention/rotaryEmbedding.ts';
import { Random } from '../cases/random.ts';
import { nativeVariants } from '../helpers/backends.ts';
import { testCases } from '../helpers/cases.ts';
import { floatTensor, relativeError } from '../helpers/golden.ts';

testCases(rotaryEmbeddingCases);

interface Numbers {
  dims: number[];
  data: number[];
}
interface Golden {
  scalings: {
    name: string;
    dim: number;
    base: number;
    scaling: RotaryScaling;
    frequencies: number[];
    factor: number;
  }[];
  rotations: {
    name: string;
    options: RotaryEmbeddingOptions;
    positions: Numbers;
    x: Numbers;
    out: Numbers;
  }[];
}
const golden: Golden = JSON.parse(
  readFileSync(new URL('../golden/attention/rotary.json', import.meta.url), 'utf8'),
);

const variants = nativeVariants();
const everywhere = [{ name: 'reference', options: { backend: 'reference' as const }, use() {} }, ...variants];

describe("transformers' frequencies", () => {
  it.each(golden.scalings)('$name', (c) => {
    const { frequencies, factor } = rotaryFrequencies(c.dim, c.base, c.scaling);
    expect(factor).toBeCloseTo(c.factor, 12);
    expect(frequencies.length).toBe(c.frequencies.length);
    for (const [i, f] of c.frequencies.entries()) expect(Math.abs(frequencies[i] / f - 1)).toBeLessThan(1e-6);
  });
});

describe.each(everywhere)('rotaryEmbedding on $name', ({ options, use }) => {
  it.each(golden.rotations)("transformers' rotation: $name", (c) => {
    use();
    const positions = new Tensor('int32', Int32Array.from(c.positions.data), c.positions.dims);
    const out = rotaryEmbeddingSync(floatTensor(c.x), { ...options, ...c.options, positions });
    expect(relativeError(out.data as Float32Array, c.out.data)).toBeLessThan(5e-7);
  });

  it('products of rotated vectors depend on the distance alone', () => {
    use();
    const random = new Random(8);
    const [a, b] = [random.normals(64), random.normals(64)];
    const dot = (i: number, j: number, o: RotaryEmbeddingOptions) => {
      const at = (x: Float32Array, offset: number) =>
        rotaryEmbeddingSync(new Tensor('float32', x, [1, 1, 1, 64]), {
          ...options,
          ...o,
          offset,
        }).data as Float32Array;
      const [x, y] = [at(a, i), at(b, j)];
      return x.reduce((sum, value, e) => sum + value * y[e], 0);
    };
    for (const o of [{}, { interleaved: true }, { rotaryDim: 32 }]) {
      expect(dot(1003, 1000, o)).toBeCloseTo(dot(3, 0, o), 4);
      expect(Math.abs(dot(1003, 1000, o) - dot(50, 0, o))).toBeGreaterThan(0.01);
    }
  });

  it('position 0 changes nothing; a token is bitwise the same alone', () => {
    use();
    const x = new Tensor('float32', new Random(9).normals(40 * 3 * 48), [1, 40, 3, 48]);
    const all = rotaryEmbeddingSync(x, options).data;
    expect(all.slice(0, 144)).toEqual(x.data.slice(0, 144));
    const one = new Tensor('float32', x.data.slice(17 * 144, 18 * 144), [1, 1, 3, 48]);
    expect(rotaryEmbeddingSync(one, { ...options, offset: 17 }).data).toEqual(all.slice(17 * 144, 18 * 144));
  });
});

describe('rotaryEmbedding refuses bad input', () => {
  const x = Tensor.zeros('float32', [1, 4, 2, 8]);
  const run = (options: unknown) => rotaryEmbeddingSync(x, options as RotaryEmbeddingOptions);
  const yarn = { type: 'yarn', factor: 2, originalLength: 100 };
  const cases: [string, () => unknown, string, RegExp][] = [
    ['rank', () => rotaryEmbeddingSync(Tensor.zeros('float32', [4, 8])), 'ERR_SHAPE', /^x: expected 4/],
    [
      'dim 1',
      () => rotaryEmbeddingSync(Tensor.zeros('float32', [1, 1, 1, 1])),
      'ERR_SHAPE',
      /^x: the head dim/,
    ],
    ['unknown option', () => run({ theta: 1 }), 'ERR_OPTION', /theta/],
    ['odd rotaryDim', () => run({ rotaryDim: 5 }), 'ERR_OPTION', /^rotaryDim/],
    ['large rotaryDim', () => run({ rotaryDim: 10 }), 'ERR_OPTION', /^rotaryDim/],
    ['base', () => run({ base: 0 }), 'ERR_OPTION', /^base/],
    ['tiled halves', () => run({ tiledAngles: true }), 'ERR_OPTION', /^tiledAngles/],
    ['sections sum', () => run({ sections: [1, 2] }), 'ERR_OPTION', /^sections must add up to .* 4, got 3/],
    ['sections and axes', () => run({ sections: [4], axes: 1 }), 'ERR_OPTION', /exclude/],
    ['too many axes', () => run({ axes: 5 }), 'ERR_OPTION', /^axes/],
    ['no positions', () => run({ axes: 2 }), 'ERR_OPTION', /^positions are required/],
    [
      'positions dims',
      () => run({ positions: Int32Array.from([1, 2]) }),
      'ERR_SHAPE',
      /^positions: expected \[1 or 1, 4\]/,
    ],
    [
      'positions of axes',
      () => run({ axes: 2, positions: new Int32Array(4) }),
      'ERR_SHAPE',
      /^positions: expected \[2, 1 or 1, 4\]/,
    ],
    ['offset too', () => run({ positions: new Int32Array(4), offset: 3 }), 'ERR_OPTION', /^offset/],
    ['scaling type', () => run({ scaling: { type: 'longrope', factor: 2 } }), 'ERR_OPTION', /^scaling.type/],
    ['no scaling type', () => run({ scaling: { factor: 2 } }), 'ERR_OPTION', /^scaling.type/],
    ['no factor', () => run({ scaling: { type: 'linear' } }), 'ERR_OPTION', /^scaling.factor/],
    ['scaling property', () => run({ scaling: { ...yarn, beta: 1 } }), 'ERR_OPTION', /beta/],
    [
      'no original length',
      () => run({ scaling: { type: 'yarn', factor: 2 } }),
      'ERR_OPTION',
      /^scaling.originalLength/,
    ],
    ['out', () => run({ out: Tensor.zeros('float32', [1, 4, 2, 7]) }), 'ERR_SHAPE', /^out/],
    ['out overlaps', () => run({ out: x }), 'ERR_ARGUMENT', /^out overlaps/],
  ];
  it.each(cases)('%s', (_, call, code, message) => {
    let error: unknown;
    try {
      call();
    } catch (e) {
      error = e;
    }
    expect(error).toBeInstanceOf(HeddleError);
    expect((error as HeddleError).message).toMatch(message);
    expect((error as HeddleError).code).toBe(code);
  });
});
