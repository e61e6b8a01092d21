import { readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import {
  type InterpolationMode,
  inflateWeights,
  interpolatePositions,
  maskTokens,
  type PatchEmbedOptions,
  patchEmbed,
  patchEmbedSync,
  patchGrid,
  type Size3,
} from '../../lib/attention/index.ts';
import { encodeFloats } from '../../lib/dtype.ts';
import { linearSync, packMatrixSync, Tensor } from '../../lib/index.ts';
import { patchEmbedCases, TUBES } from '../cases/attention/patchEmbed.ts';
import { Random } from '../cases/random.ts';
import { everyVariant, nativeVariants } from '../helpers/backends.ts';
import { testCases } from '../helpers/cases.ts';
import { expectRejection, testRefusals } from '../helpers/errors.ts';
import { floatTensor, relativeError } from '../helpers/golden.ts';

testCases(patchEmbedCases);

interface Numbers {
  dims: number[];
  data: number[];
}
interface Golden {
  embeddings: {
    name: string;
    options: PatchEmbedOptions & { tubelet: Size3 };
    uint8: boolean;
    grid: number[];
    video: Numbers;
    weight: Numbers;
    bias: Numbers;
    output: Numbers;
  }[];
  positions: {
    from: number | [number, number];
    to: number | [number, number];
    mode: InterpolationMode;
    table: Numbers;
    output: Numbers;
  }[];
}
const golden: Golden = JSON.parse(
  readFileSync(new URL('../golden/attention/video.json', import.meta.url), 'utf8'),
);

/** `[outputs, inputs]` of a convolution's weight. */
const flat = (t: Tensor<'float32'>) => t.reshape([t.dims[0], t.size / t.dims[0]]);

/** `[a, c, ...]` to `[a, ..., c]`: the second axis last. */
function channelsLast<T extends 'float32' | 'uint8'>(t: Tensor<T>, axis: number): Tensor<T> {
  const outer = t.dims.slice(0, axis).reduce((a, b) => a * b, 1);
  const channels = t.dims[axis];
  const inner = t.size / outer / channels;
  const data = t.data.slice() as Tensor<T>['data'];
  for (let o = 0; o < outer; o++) {
    for (let c = 0; c < channels; c++) {
      for (let i = 0; i < inner; i++)
        data[(o * inner + i) * channels + c] = t.data[(o * channels + c) * inner + i];
    }
  }
  return new Tensor(t.type, data, [...t.dims.slice(0, axis), ...t.dims.slice(axis + 1), channels]);
}

describe.each(everyVariant())('patchEmbed on $name', ({ options, use }) => {
  it.each(golden.embeddings)("PyTorch's conv3d: $name", async (c) => {
    use();
    const video = c.uint8
      ? new Tensor('uint8', Uint8Array.from(c.video.data), c.video.dims)
      : floatTensor(c.video);
    const kernel = floatTensor(c.weight);
    const weight = packMatrixSync(flat(kernel), options);
    const o = { ...options, ...c.options, bias: floatTensor(c.bias) };
    const out = patchEmbedSync(video, weight, o);
    expect(out.dims).toEqual(c.output.dims);
    expect(relativeError(out.data as Float32Array, c.output.data)).toBeLessThan(1e-6);
    expect(
      patchGrid([video.dims[1], video.dims[3], video.dims[4]], {
        tubelet: c.options.tubelet,
        stride: c.options.stride as Size3,
        offset: c.options.offset as Size3,
      }),
    ).toEqual(c.grid);
    // The same video and weight in the other layouts.
    const last = channelsLast(video as Tensor<'float32'>, 2);
    const flax = packMatrixSync(flat(channelsLast(kernel, 1)), options);
    for (const [v, layout] of [
      [video, 'TCHW'],
      [last, 'THWC'],
    ] as const) {
      for (const [w, weightOrder] of [
        [weight, 'CTHW'],
        [flax, 'THWC'],
      ] as const) {
        const y = await patchEmbed(v, w, { ...o, layout, weightOrder });
        expect(relativeError(y.data as Float32Array, c.output.data)).toBeLessThan(1e-6);
      }
    }
  });

  it('a token has the bits of linear on its pixels, alone and among kept ones', () => {
    use();
    const random = new Random(11);
    const [batch, frames, side, dim] = [2, 4, 24, 70];
    const video = new Tensor('float32', random.normals(batch * frames * side * side), [
      batch,
      frames,
      1,
      side,
      side,
    ]);
    const weight = packMatrixSync(new Tensor('float32', random.normals(dim * 32), [dim, 32]), options);
    const all = patchEmbedSync(video, weight, { ...options, tubelet: [2, 4, 4] });
    expect(all.dims).toEqual([2, 72, dim]);
    const rows = new Float32Array(batch * 72 * 32);
    for (let r = 0; r < batch * 72; r++) {
      const [b, t, y, x] = [Math.floor(r / 72), Math.floor(r / 36) % 2, Math.floor(r / 6) % 6, r % 6];
      for (let k = 0; k < 32; k++) {
        const [dt, dy, dx] = [k >> 4, (k >> 2) & 3, k & 3];
        rows[r * 32 + k] = video.data[((b * frames + 2 * t + dt) * side + 4 * y + dy) * side + 4 * x + dx];
      }
    }
    expect(all.data).toEqual(linearSync(new Tensor('float32', rows, [batch * 72, 32]), weight, options).data);
    for (const kind of ['random', 'tube', 'frame'] as const) {
      const tokens = maskTokens({ frames: 2, patches: 36, ratio: 0.5, kind, seed: 8, batch });
      const kept = patchEmbedSync(video, weight, { ...options, tubelet: [2, 4, 4], tokens });
      expect(kept.dims).toEqual([tokens.indices.length, dim]);
      tokens.inverse.forEach((at, token) => {
        if (at < 0) return;
        expect(kept.data.slice(at * dim, (at + 1) * dim)).toEqual(
          all.data.slice(token * dim, (token + 1) * dim),
        );
      });
    }
    const one = new Tensor('float32', video.data.slice(frames * side * side), [1, frames, 1, side, side]);
    const alone = patchEmbedSync(one, weight, { ...options, tubelet: [2, 4, 4] });
    expect(alone.data).toEqual(all.data.slice(72 * dim));
  });

  it.each(['float32', 'bfloat16', 'float16'] as const)(
    'a matrix that is not packed gives the bits of the packed one: %s',
    async (type) => {
      use();
      const random = new Random(15);
      const video = new Tensor('float32', random.normals(2 * 4 * 64), [2, 4, 1, 8, 8]);
      const matrix = new Tensor(type, encodeFloats(random.normals(9 * 32), type) as never, [9, 32]);
      const packed = packMatrixSync(matrix, options);
      const o = { ...options, tubelet: [2, 4, 4] as Size3 };
      const expected = patchEmbedSync(video, packed, o).data;
      expect(patchEmbedSync(video, matrix, o).data).toEqual(expected);
      expect((await patchEmbed(video, [matrix, packed], o)).data.slice(0, 72)).toEqual(expected.slice(0, 72));
    },
  );

  it('several tubes: tokens of one after those of the other', () => {
    use();
    const random = new Random(12);
    const video = new Tensor('float32', random.normals(2 * 8 * 256), [2, 8, 1, 16, 16]);
    const weights = [64, 128].map((k) =>
      packMatrixSync(new Tensor('float32', random.normals(5 * k), [5, k]), options),
    );
    const sizes: Size3[] = [
      [4, 4, 4],
      [2, 8, 8],
    ];
    const both = patchEmbedSync(video, weights, { ...options, tubelet: sizes });
    expect(both.dims).toEqual([2, 32 + 16, 5]);
    const [a, b] = sizes.map((tubelet, i) => patchEmbedSync(video, weights[i], { ...options, tubelet }).data);
    for (let clip = 0; clip < 2; clip++) {
      const got = both.data.slice(clip * 240, (clip + 1) * 240);
      expect(got.slice(0, 160)).toEqual(a.slice(clip * 160, (clip + 1) * 160));
      expect(got.slice(160)).toEqual(b.slice(clip * 80, (clip + 1) * 80));
    }
  });
});

describe('grids', () => {
  it("TubeViT's 539 tokens, ViViT's 3136", () => {
    const counts = TUBES.tubelet.map((tubelet, i) => {
      const grid = patchGrid([32, 224, 224], { tubelet, stride: TUBES.stride[i], offset: TUBES.offset[i] });
      return grid[0] * grid[1] * grid[2];
    });
    expect(counts).toEqual([98, 147, 98, 196]);
    expect(patchGrid([32, 224, 224], { tubelet: [2, 16, 16] })).toEqual([16, 14, 14]);
    expect(patchGrid([33, 230, 239], { tubelet: [2, 16, 16] })).toEqual([16, 14, 14]);
  });
});

describe('inflateWeights', () => {
  const image = new Tensor('float32', new Random(13).normals(3 * 2 * 4 * 5), [3, 2, 4, 5]);

  it.each([1, 2, 3, 4])('%i frames: a still video gives the tokens of the image', (frames) => {
    const still = new Tensor('float32', new Random(14).normals(2 * 8 * 10), [1, 1, 2, 8, 10]);
    const video = new Tensor(
      'float32',
      Float32Array.from({ length: frames * 160 }, (_, i) => still.data[i % 160]),
      [1, frames, 2, 8, 10],
    );
    const expected = patchEmbedSync(still, packMatrixSync(flat(image)), { tubelet: [1, 4, 5] });
    for (const mode of ['central-frame', 'average'] as const) {
      const w = inflateWeights(image, { frames, mode }) as Tensor<'float32'>;
      expect(w.dims).toEqual([3, 2, frames, 4, 5]);
      const y = patchEmbedSync(video, packMatrixSync(flat(w)), { tubelet: [frames, 4, 5] });
      expect(relativeError(y.data as Float32Array, expected.data as Float32Array)).toBeLessThan(1e-6);
    }
  });

  it('central frame: frame floor(t / 2) alone', () => {
    const w = inflateWeights(image, { frames: 4, mode: 'central-frame' });
    for (let filter = 0; filter < 6; filter++) {
      for (let t = 0; t < 4; t++) {
        const got = w.data.slice((filter * 4 + t) * 20, (filter * 4 + t + 1) * 20);
        expect(got).toEqual(
          t === 2 ? image.data.slice(filter * 20, (filter + 1) * 20) : new Float32Array(20),
        );
      }
    }
  });
});

describe('interpolatePositions', () => {
  it.each(golden.positions)(
    "PyTorch's interpolate: $mode $from to $to",
    ({ from, to, mode, table, output }) => {
      const y = interpolatePositions(floatTensor(table), { from, to, mode });
      expect(y.dims).toEqual(output.dims);
      expect(relativeError(y.data as Float32Array, output.data)).toBeLessThan(1e-6);
      const cls = new Tensor('float32', Float32Array.of(7, 8, 9, ...table.data), [table.dims[0] + 1, 3]);
      const z = interpolatePositions(cls, { from, to, mode, prefix: 1 });
      expect(Array.from(z.data.slice(0, 3))).toEqual([7, 8, 9]);
      expect(z.data.slice(3)).toEqual(y.data);
    },
  );
});

describe('tubelet ops refuse bad input', () => {
  const video = Tensor.zeros('float32', [1, 4, 3, 8, 8]);
  const pack = (o: object, k = 96) => packMatrixSync(Tensor.zeros('float32', [5, k]), o);
  const run = (o: object, more: object, v: Tensor = video) =>
    patchEmbedSync(v, pack(o), { tubelet: [2, 4, 4], ...o, ...more } as never);
  const tokens = maskTokens({ frames: 2, patches: 4, ratio: 0.5, seed: 1, batch: 2 });
  const table = Tensor.zeros('float32', [6, 2]);
  testRefusals([
    [
      'no options',
      (o) => patchEmbedSync(video, pack(o), undefined as never),
      'ERR_ARGUMENT',
      /options with a tubelet/,
    ],
    ['no tubelet', (o) => run(o, { tubelet: undefined }), 'ERR_OPTION', /^tubelet must be/],
    ['tubelet', (o) => run(o, { tubelet: [2, 0, 4] }), 'ERR_OPTION', /^tubelet\[1\]/],
    ['rank', (o) => run(o, {}, Tensor.zeros('float32', [4, 3, 8, 8])), 'ERR_SHAPE', /^video: expected 5/],
    [
      'no channels',
      (o) => run(o, {}, Tensor.zeros('float32', [1, 4, 0, 8, 8])),
      'ERR_SHAPE',
      /^video: expected at least one channel/,
    ],
    ['type', (o) => run(o, {}, Tensor.zeros('int8', [1, 4, 3, 8, 8])), 'ERR_DTYPE', /^video/],
    [
      'matrix type',
      (o) => patchEmbedSync(video, Tensor.zeros('int8', [5, 96]), { ...o, tubelet: [2, 4, 4] }),
      'ERR_DTYPE',
      /^weights/,
    ],
    [
      'matrix rank',
      (o) => patchEmbedSync(video, Tensor.zeros('float32', [5, 3, 32]), { ...o, tubelet: [2, 4, 4] }),
      'ERR_SHAPE',
      /^weights: expected 2 dimensions/,
    ],
    [
      'matrix shape',
      (o) => patchEmbedSync(video, Tensor.zeros('float32', [5, 48]), { ...o, tubelet: [2, 4, 4] }),
      'ERR_SHAPE',
      /^weights: expected \[5, 96\].*got \[5, 48\]/,
    ],
    [
      'no token',
      (o) => run(o, {}, Tensor.zeros('float32', [1, 1, 3, 8, 8])),
      'ERR_SHAPE',
      /^video: 1 frames of 8 x 8 pixels give no token/,
    ],
    ['offset', (o) => run(o, { offset: [0, 5, 0] }), 'ERR_SHAPE', /give no token/],
    [
      'weights',
      (o) => run(o, { tubelet: [2, 4, 2] }),
      'ERR_SHAPE',
      /^weights: expected \[5, 48\].*got \[5, 96\]/,
    ],
    [
      'no weights',
      (o) => patchEmbedSync(video, [], { ...o, tubelet: [2, 4, 4] }),
      'ERR_ARGUMENT',
      /^weights/,
    ],
    [
      'lists',
      (o) => patchEmbedSync(video, [pack(o), pack(o)], { ...o, tubelet: [[2, 4, 4]] }),
      'ERR_OPTION',
      /^tubelet: expected one, or a list of 2/,
    ],
    ['mean', (o) => run(o, { mean: [1, 2] }), 'ERR_OPTION', /^mean must be 1 or 3/],
    ['std', (o) => run(o, { std: 0 }), 'ERR_OPTION', /^std must be/],
    ['layout', (o) => run(o, { layout: 'CTHW' }), 'ERR_OPTION', /^layout/],
    ['bias', (o) => run(o, { bias: Tensor.zeros('float32', [4]) }), 'ERR_SHAPE', /^bias/],
    [
      'tokens',
      (o) => run(o, { tokens }),
      'ERR_SHAPE',
      /^tokens: expected 1 entries of 2 frames of 4 patches, got 2/,
    ],
    [
      'tokens of two',
      (o) => patchEmbedSync(video, [pack(o), pack(o)], { ...o, tubelet: [2, 4, 4], tokens }),
      'ERR_OPTION',
      /^tokens/,
    ],
    ['out', (o) => run(o, { out: Tensor.zeros('float32', [1, 8, 4]) }), 'ERR_SHAPE', /^out/],
    [
      'frames',
      () => inflateWeights(Tensor.zeros('float32', [1, 1, 2, 2]), { frames: 0, mode: 'average' }),
      'ERR_OPTION',
      /^frames/,
    ],
    [
      'mode',
      () => inflateWeights(Tensor.zeros('float32', [1, 1, 2, 2]), { frames: 2 } as never),
      'ERR_OPTION',
      /^mode/,
    ],
    [
      'table rows',
      () => interpolatePositions(table, { from: 5, to: 2, mode: 'linear' }),
      'ERR_SHAPE',
      /^table: expected 5/,
    ],
    [
      'mode of length',
      () => interpolatePositions(table, { from: 6, to: 2, mode: 'bicubic' }),
      'ERR_OPTION',
      /^mode must be nearest or linear for a length/,
    ],
    [
      'mode of size',
      () => interpolatePositions(table, { from: [2, 3], to: [2, 2], mode: 'linear' }),
      'ERR_OPTION',
      /^mode/,
    ],
    [
      'from and to',
      () => interpolatePositions(table, { from: [2, 3], to: 3, mode: 'nearest' }),
      'ERR_OPTION',
      /^from and to/,
    ],
  ]);

  it('weights of another backend, and an aborted signal', async () => {
    const options: PatchEmbedOptions = { tubelet: [2, 4, 4] };
    const signal = AbortSignal.abort();
    await expectRejection(patchEmbed(video, pack({}), { ...options, signal }), 'ERR_ABORTED', /patchEmbed/);
    if (nativeVariants().length === 0) return;
    const reference = pack({ backend: 'reference' });
    await expectRejection(
      patchEmbed(video, reference, { ...options, backend: 'cpu' }),
      'ERR_BACKEND',
      /packed for/,
    );
  });
});
