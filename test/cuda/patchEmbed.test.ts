import { readFileSync } from 'node:fs';
import { afterEach, describe, expect, it } from 'vitest';
import {
  maskTokens,
  type PatchEmbedOptions,
  patchEmbed,
  patchEmbedSync,
  type Size3,
} from '../../lib/attention/index.ts';
import { cudaMemory, type DeviceData, setCudaMemoryLimit } from '../../lib/device.ts';
import { encodeFloats, type FloatType } from '../../lib/dtype.ts';
import { packMatrixSync, Tensor } from '../../lib/index.ts';
import { type DType, makeTensor } from '../../lib/tensor.ts';
import { Random } from '../cases/random.ts';
import { hasCuda } from '../helpers/cuda.ts';
import { expectRejection, expectThrow } from '../helpers/errors.ts';
import { floatTensor, relativeError } from '../helpers/golden.ts';

const random = new Random(21);
const draw = (type: FloatType, ...dims: number[]) => {
  const values = random.normals(dims.reduce((a, b) => a * b, 1));
  return new Tensor(type, encodeFloats(values, type) as never, dims) as Tensor<FloatType>;
};
const bytes = (t: Tensor) => Buffer.from(t.data.buffer, t.data.byteOffset, t.data.byteLength);
const cuda = { backend: 'cuda' } as const;

/** Nothing may be in use that was not before. */
async function withoutLeak(run: () => unknown) {
  const live = () => {
    const m = cudaMemory();
    return { live: m.live, blocks: m.liveBlocks, jobs: m.jobs };
  };
  const before = live();
  await run();
  expect(live()).toEqual(before);
}

/** The same elements on the device, one element behind where an allocation begins. */
function shifted<T extends DType>(t: Tensor<T>): { view: Tensor<T>; dispose: () => void } {
  const one = new Tensor(t.type, (t.data as Uint8Array).slice(0, 1) as never, [1]);
  const all = new (t.data.constructor as Float32ArrayConstructor)(t.size + 1);
  all.set(t.data as Float32Array, 1);
  const whole = new Tensor(one.type, all as never, [t.size + 1]).toSync('cuda');
  const data = (whole.data as unknown as DeviceData).subarray(1, t.size + 1);
  return { view: makeTensor(t.type, data as never, t.dims), dispose: () => whole.dispose() };
}

describe.skipIf(!hasCuda())('patchEmbed on cuda', () => {
  afterEach(() => setCudaMemoryLimit(0));

  interface Numbers {
    dims: number[];
    data: number[];
  }
  interface Embedding {
    name: string;
    options: PatchEmbedOptions & { tubelet: Size3 };
    uint8: boolean;
    video: Numbers;
    weight: Numbers;
    bias: Numbers;
    output: Numbers;
  }
  const golden = JSON.parse(
    readFileSync(new URL('../golden/attention/video.json', import.meta.url), 'utf8'),
  ) as { embeddings: Embedding[] };

  it.each(golden.embeddings)("PyTorch's conv3d, from device to device: $name", (c) =>
    withoutLeak(async () => {
      const video: Tensor = c.uint8
        ? new Tensor('uint8', Uint8Array.from(c.video.data), c.video.dims)
        : floatTensor(c.video);
      const kernel = floatTensor(c.weight);
      const there = [video, kernel, floatTensor(c.bias)].map((t) => t.toSync('cuda'));
      const [x, w, bias] = there;
      const weight = w.reshape([kernel.dims[0], kernel.size / kernel.dims[0]]);
      const out = await patchEmbed(x, weight, { ...c.options, bias });
      expect(out.location).toBe('cuda');
      expect(out.dims).toEqual(c.output.dims);
      const got = await out.to('cpu');
      expect(relativeError(got.data as Float32Array, c.output.data)).toBeLessThan(1e-6);
      expect(patchEmbedSync(x, weight, { ...c.options, bias, out }).data).toBe(out.data);
      expect(bytes(out.toSync('cpu')).equals(bytes(got))).toBe(true);
      for (const t of [...there, out]) t.dispose();
    }),
  );

  it.each(['float32', 'bfloat16', 'float16'] as const)(
    'a token has the same bits alone, among kept ones and in any batch, by tiles of any size (%s)',
    (type) =>
      withoutLeak(() => {
        // 288 tokens: tiles of 64 fill the shim's 4 multiprocessors; 72 and fewer take those of 32.
        const [batch, frames, side, dim] = [4, 4, 24, 70];
        const video = draw('float32', batch, frames, 1, side, side);
        const weight = draw(type, dim, 32);
        const options = { ...cuda, tubelet: [2, 4, 4] as Size3 };
        const all = patchEmbedSync(video, weight, options);
        expect(all.dims).toEqual([batch, 72, dim]);
        const clip = frames * side * side;
        for (let b = 0; b < batch; b++) {
          const one = new Tensor('float32', video.data.slice(b * clip, (b + 1) * clip) as Float32Array, [
            1,
            frames,
            1,
            side,
            side,
          ]);
          const alone = patchEmbedSync(one, weight, options);
          expect(alone.data).toEqual(all.data.slice(b * 72 * dim, (b + 1) * 72 * dim));
        }
        for (const [kind, ratio] of [
          ['random', 0.5],
          ['tube', 0.9],
          ['frame', 0.5],
        ] as const) {
          const tokens = maskTokens({ frames: 2, patches: 36, ratio, kind, seed: 8, batch });
          const kept = patchEmbedSync(video, weight, { ...options, tokens });
          expect(kept.dims).toEqual([tokens.indices.length, dim]);
          tokens.inverse.forEach((at, token) => {
            if (at < 0) return;
            expect(kept.data.slice(at * dim, (at + 1) * dim)).toEqual(
              all.data.slice(token * dim, (token + 1) * dim),
            );
          });
        }
      }),
  );

  it.each([
    ['uint8', 'bfloat16', 'TCHW'],
    ['uint8', 'float32', 'THWC'],
    ['bfloat16', 'float16', 'THWC'],
    ['float32', 'bfloat16', 'TCHW'],
  ] as const)(
    'memory that is not aligned gives the same bits: %s pixels, %s weights, %s',
    (pixels, type, layout) =>
      withoutLeak(() => {
        const dims = layout === 'TCHW' ? [1, 2, 3, 8, 16] : [1, 2, 8, 16, 3];
        const video =
          pixels === 'uint8'
            ? new Tensor(
                'uint8',
                Uint8Array.from({ length: 768 }, () => random.integer(0, 255)),
                dims,
              )
            : draw(pixels, ...dims);
        const weight = draw(type, 10, 192);
        const options = { tubelet: [1, 8, 8] as Size3, layout, mean: 0.5, weightOrder: 'CTHW' as const };
        const aligned = patchEmbedSync(video, weight, { ...options, ...cuda });
        const [v, w] = [shifted<DType>(video), shifted(weight)];
        const out = patchEmbedSync(v.view, w.view, options);
        expect(bytes(out.toSync('cpu')).equals(bytes(aligned))).toBe(true);
        v.dispose();
        w.dispose();
        out.dispose();
      }),
  );

  it('a NaN or an infinity stays in its token, and in its output', () => {
    for (const type of ['float32', 'bfloat16'] as const) {
      const video = draw('float32', 1, 2, 1, 9, 9); // 8 x 8 pixels are used
      (video.data as Float32Array)[9 * 8] = Number.NaN; // behind the last tubelet
      (video.data as Float32Array)[9 * 5 + 6] = Number.POSITIVE_INFINITY;
      const weight = draw(type, 5, 32);
      const nan = encodeFloats([Number.NaN], type)[0];
      weight.data[3 * 32 + 31] = nan;
      const out = patchEmbedSync(video, weight, { ...cuda, tubelet: [2, 4, 4] }).data as Float32Array;
      for (let i = 0; i < 20; i++) {
        const [token, output] = [Math.floor(i / 5), i % 5];
        expect(Number.isFinite(out[i])).toBe(token !== 3 && output !== 3);
      }
    }
  });

  it('several tubes, and one that fails for memory leaves nothing behind', () =>
    withoutLeak(async () => {
      const video = draw('float32', 2, 8, 1, 16, 16).toSync('cuda');
      const host = [draw('bfloat16', 5, 64), draw('bfloat16', 5, 128)];
      const weights = host.map((w) => w.toSync('cuda'));
      const tubelet: Size3[] = [
        [4, 4, 4],
        [2, 8, 8],
      ];
      const both = patchEmbedSync(video, weights, { tubelet });
      expect(both.dims).toEqual([2, 32 + 16, 5]);
      const got = both.toSync('cpu').data;
      weights.forEach((w, i) => {
        const one = patchEmbedSync(video, w, { tubelet: tubelet[i] });
        const [n, from] = i === 0 ? [160, 0] : [80, 160];
        const rows = one.toSync('cpu').data;
        for (let b = 0; b < 2; b++) {
          expect(got.slice(b * 240 + from, b * 240 + from + n)).toEqual(rows.slice(b * n, (b + 1) * n));
        }
        one.dispose();
      });
      // Weights in the other order are copied: there is room for the result (24,576 bytes) and the first copy only.
      const flax = { tubelet: [[4, 1, 1] as Size3, [2, 8, 8] as Size3], weightOrder: 'THWC' as const };
      const color = draw('float32', 2, 8, 3, 16, 16).toSync('cuda');
      const wide = [draw('bfloat16', 5, 12), draw('bfloat16', 5, 384)].map((w) => w.toSync('cuda'));
      setCudaMemoryLimit(cudaMemory().live + 24_576 + 5 * 512);
      expectThrow(() => patchEmbedSync(color, wide, flax), 'ERR_MEMORY', /./);
      setCudaMemoryLimit(0);
      const fits = patchEmbedSync(color, wide, flax);
      for (const t of [video, color, both, fits, ...weights, ...wide]) t.dispose();
    }));

  it('refuses tensors of two devices, packed weights, and what is disposed', () =>
    withoutLeak(async () => {
      const video = draw('float32', 1, 4, 3, 8, 8);
      const weight = draw('float32', 5, 96);
      const bias = draw('float32', 5);
      const options = { tubelet: [2, 4, 4] as Size3 };
      const there = { video: video.toSync('cuda'), weight: weight.toSync('cuda'), bias: bias.toSync('cuda') };
      expectThrow(
        () => patchEmbedSync(there.video, weight, options),
        'ERR_ARGUMENT',
        /^patchEmbed: video is on cuda but weights is on cpu/,
      );
      expectThrow(
        () => patchEmbedSync(video, there.weight, options),
        'ERR_ARGUMENT',
        /weights is on cuda but video is on cpu/,
      );
      expectThrow(
        () => patchEmbedSync(there.video, there.weight, { ...options, bias }),
        'ERR_ARGUMENT',
        /video is on cuda but bias is on cpu/,
      );
      expectThrow(
        () =>
          patchEmbedSync(there.video, there.weight, { ...options, out: Tensor.zeros('float32', [1, 8, 5]) }),
        'ERR_ARGUMENT',
        /video is on cuda but out is on cpu/,
      );
      for (const backend of ['cpu', 'reference'] as const) {
        await expectRejection(
          patchEmbed(there.video, there.weight, { ...options, backend }),
          'ERR_BACKEND',
          /video is on cuda, which backend/,
        );
      }
      const packed = packMatrixSync(weight, { backend: 'cpu' });
      for (const run of [
        () => patchEmbedSync(video, packed, { ...options, ...cuda }),
        () => patchEmbedSync(there.video, packed, options),
      ]) {
        expectThrow(
          run,
          'ERR_BACKEND',
          /weights packed for backend cpu cannot be used on cuda; give the matrix/,
        );
      }
      expect(patchEmbedSync(video, packed, options).location).toBe('cpu');
      const signal = AbortSignal.abort();
      await expectRejection(
        patchEmbed(there.video, there.weight, { ...options, signal }),
        'ERR_ABORTED',
        /patchEmbed/,
      );
      there.weight.dispose();
      expectThrow(
        () => patchEmbedSync(there.video, there.weight, options),
        'ERR_DISPOSED',
        /^weights: the tensor on cuda was disposed/,
      );
      there.video.dispose();
      there.bias.dispose();
    }));
});
