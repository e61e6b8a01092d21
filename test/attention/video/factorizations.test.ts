import { describe, expect, it } from 'vitest';
import { type ResolvedConfig, resolveConfig } from '../../../lib/attention/video/config.ts';
import { VideoEncoder, type VideoEncoderConfig } from '../../../lib/attention/video/index.ts';
import { Tensor } from '../../../lib/index.ts';
import { videoEncoderReference } from '../../../lib/reference/attention/videoEncoder.ts';
import { randomTensors } from '../../cases/attention/videoEncoder.ts';
import { sameBits } from '../../cases/case.ts';
import { Random } from '../../cases/random.ts';
import { everyVariant } from '../../helpers/backends.ts';
import { expectNear } from '../../helpers/golden.ts';
import { referenceTensors } from '../../helpers/videoEncoders.ts';

const SHAPE = {
  imageSize: [14, 22] as [number, number],
  frames: 7,
  tubelet: [2, 6, 4] as [number, number, number], // 3 x 2 x 5 tubelets
  channels: 2,
  hiddenSize: 24,
  heads: 4,
  intermediateSize: 40,
  layers: 2,
};

const CONFIGS: Record<string, VideoEncoderConfig> = {
  'ViViT 1, without a class token': { ...SHAPE, attention: 'joint' },
  'ViViT 2': { ...SHAPE, attention: 'factorized-encoder', timeLayers: 2, poolerSize: 6 },
  'ViViT 2, frames averaged': {
    ...SHAPE,
    attention: 'factorized-encoder',
    timeLayers: 1,
    framePooling: 'mean',
  },
  'ViViT 3': { ...SHAPE, attention: 'factorized-self-attention', positions: 'space-time' },
  'ViViT 3, space first': { ...SHAPE, attention: 'factorized-self-attention', order: 'space-time' },
  'ViViT 4': { ...SHAPE, attention: 'factorized-dot-product', activation: 'gelu-tanh' },
  LongViViT: {
    ...SHAPE,
    attention: 'factorized-self-attention',
    order: 'space-time',
    timeGate: true,
    positions: 'none',
  },
  TimeSformer: {
    ...SHAPE,
    attention: 'divided-space-time',
    positions: 'space-time',
    tokenOrder: 'patches',
    qkvBias: false,
  },
  'V-JEPA 2': { ...SHAPE, attention: 'joint', positions: 'rotary', softcap: 3 },
};

function framesOf(c: VideoEncoderConfig, clips: number, seed = 5): Tensor<'float32'> {
  const [height, width] = c.imageSize as [number, number];
  const dims = [clips, c.frames, c.channels as number, height, width];
  return new Tensor('float32', new Random(seed).normals(dims.reduce((a, b) => a * b, 1)), dims);
}

/** About half of the tokens, with a frame and a patch that keep nothing. */
function someTokens(c: ResolvedConfig, clips: number, even: boolean) {
  const [time, height, width] = c.grid;
  const patches = height * width;
  const random = new Random(11);
  const kept: number[][] = [];
  for (let b = 0; b < clips; b++) {
    const all = Array.from({ length: time * patches }, (_, i) => i).filter(
      (i) => Math.floor(i / patches) !== b % time && i % patches !== 3,
    );
    const order = random.normals(all.length);
    const count = even ? 7 : 5 + 2 * b;
    kept.push(
      all
        .map((token, i) => ({ token, key: order[i] }))
        .sort((x, y) => x.key - y.key)
        .slice(0, count)
        .map((x) => x.token)
        .sort((x, y) => x - y),
    );
  }
  const batchOffsets = [0];
  for (const k of kept) batchOffsets.push(batchOffsets[batchOffsets.length - 1] + k.length);
  return {
    kept,
    mask: {
      indices: Int32Array.from(kept.flat()),
      batchOffsets: Int32Array.from(batchOffsets),
      frames: time,
      patches,
    },
  };
}

describe.each(Object.entries(CONFIGS))('%s', (_, config) => {
  const tensors = randomTensors(config, new Random(3));
  const resolved = resolveConfig(config);
  const frames = framesOf(config, 2);
  const expected = videoEncoderReference(resolved, referenceTensors(tensors), frames.data, frames.dims);

  it.each(everyVariant())('equals its definition on $name', async ({ options, use }) => {
    use();
    const encoder = await VideoEncoder.create(config, tensors, options);
    const y = await encoder.forward(frames);
    expect(y.dims).toEqual(expected.dims);
    expectNear(y.data, expected.hidden, 2e-6);
    if (expected.pooled) expectNear(y.pooled!.data, expected.pooled, 2e-6);
    for (const blockTokens of [1, 4, 11]) {
      const z = await encoder.forward(frames, { blockTokens, threads: 1 });
      expect(sameBits([z], [y])).toBe(true);
    }
    const one = await encoder.forward(
      new Tensor('float32', frames.data.slice(0, frames.size / 2), [1, ...frames.dims.slice(1)]),
    );
    const half = y.data.slice(0, one.size);
    expect(sameBits([one], [new Tensor('float32', half, one.dims)])).toBe(true);
    encoder.dispose();
  });

  it.each([true, false])('computes kept tokens alone, as many per clip: %s', async (even) => {
    const { kept, mask } = someTokens(resolved, 2, even);
    const want = videoEncoderReference(resolved, referenceTensors(tensors), frames.data, frames.dims, kept);
    const encoder = await VideoEncoder.create(config, tensors);
    const y = await encoder.forward(frames, { mask });
    expectNear(y.data, want.hidden, 2e-6);
    const rows = want.hidden.length / resolved.hiddenSize;
    const [, first, all] = y.offsets!.data;
    expect(all).toBe(rows);
    expect(y.dims).toEqual([...(2 * first === all ? [2, first] : [1, rows]), resolved.hiddenSize]);
    if (even) expect(first).toBe(rows / 2);
    for (const blockTokens of [1, 4]) {
      const z = await encoder.forward(frames, { mask, blockTokens });
      expect(sameBits([z], [y])).toBe(true);
    }
    encoder.dispose();
  });

  it('with every token kept is the same as without a mask', async () => {
    const count = resolved.grid[0] * resolved.grid[1] * resolved.grid[2];
    const mask = {
      indices: Int32Array.from({ length: 2 * count }, (_, i) => i % count),
      batchOffsets: Int32Array.of(0, count, 2 * count),
      frames: resolved.grid[0],
      patches: count / resolved.grid[0],
    };
    const encoder = await VideoEncoder.create(config, tensors);
    const [a, b] = [await encoder.forward(frames, { mask }), await encoder.forward(frames)];
    expect(sameBits([a], [b])).toBe(true);
    encoder.dispose();
  });
});

describe('what a token depends on, by finite differences', () => {
  // One layer, no norm of positions: the derivative of token i by the pixels of token j.
  const config = { ...SHAPE, layers: 1, positions: 'none' as const };
  const influence = (c: VideoEncoderConfig): number[][] => {
    const resolved = resolveConfig(c);
    const get = referenceTensors(randomTensors(c, new Random(9)));
    const frames = Float64Array.from(framesOf(c, 1).data);
    const dims = framesOf(c, 1).dims;
    const run = (x: Float64Array) => videoEncoderReference(resolved, get, x, dims).hidden;
    const [time, height, width] = resolved.grid;
    const count = time * height * width;
    const d = resolved.hiddenSize;
    const base = run(frames);
    return Array.from({ length: count }, (_, j) => {
      const [t, n] = [Math.floor(j / (height * width)), j % (height * width)];
      const [row, column] = [Math.floor(n / width) * 6, (n % width) * 4];
      const moved = frames.slice();
      moved[(t * 2 * 2 * 14 + row) * 22 + column] += 1e-4;
      const y = run(moved);
      return Array.from({ length: count }, (_, i) => {
        let sum = 0;
        for (let k = 0; k < d; k++) sum += Math.abs(y[i * d + k] - base[i * d + k]);
        return sum / 1e-4;
      });
    });
  };
  const patches = 10;
  const sameFrame = (i: number, j: number) => Math.floor(i / patches) === Math.floor(j / patches);
  const samePatch = (i: number, j: number) => i % patches === j % patches;

  it.each([
    ['joint', () => true],
    ['factorized-self-attention', () => true],
    ['factorized-dot-product', (i, j) => sameFrame(i, j) || samePatch(i, j)],
    ['space-only', sameFrame],
  ] as [VideoEncoderConfig['attention'], (i: number, j: number) => boolean][])('%s', (attention, sees) => {
    const matrix = influence({ ...config, attention });
    for (const [j, row] of matrix.entries()) {
      for (const [i, value] of row.entries()) {
        if (sees(i, j)) expect(value).toBeGreaterThan(1e-6);
        else expect(value).toBe(0);
      }
    }
  });
});

describe('one axis of length 1 is joint attention', () => {
  const zeroed = (tensors: Record<string, Tensor<'float32'>>, part: string) =>
    Object.fromEntries(
      Object.entries(tensors).map(([name, t]) =>
        name.includes(part) ? [name, Tensor.zeros('float32', t.dims)] : [name, t],
      ),
    );
  const run = async (config: VideoEncoderConfig, tensors: Record<string, Tensor<'float32'>>) => {
    const encoder = await VideoEncoder.create(config, tensors);
    const y = await encoder.forward(framesOf(config, 2));
    encoder.dispose();
    return y;
  };

  it('a single frame, time left out', async () => {
    const config = { ...SHAPE, frames: 2, positions: 'none' as const };
    const factorized: VideoEncoderConfig = {
      ...config,
      attention: 'factorized-self-attention',
      timeGate: true,
    };
    const tensors = zeroed(randomTensors(factorized, new Random(1)), 'timeGate');
    const joint = Object.fromEntries(Object.entries(tensors).filter(([name]) => !/\.time/.test(name)));
    const a = await run(factorized, tensors);
    const b = await run({ ...config, attention: 'joint' }, joint);
    expect(sameBits([a], [b])).toBe(true);
    const c = await run({ ...config, attention: 'space-only' }, joint);
    expect(sameBits([c], [b])).toBe(true);
  });

  it('a single patch, space left out', async () => {
    const config = { ...SHAPE, imageSize: [6, 4] as [number, number], positions: 'none' as const };
    const factorized: VideoEncoderConfig = { ...config, attention: 'factorized-self-attention' };
    const tensors = zeroed(randomTensors(factorized, new Random(2)), '.attention.output');
    const joint: Record<string, Tensor<'float32'>> = {};
    for (const [name, t] of Object.entries(tensors)) {
      if (/\.(norm|attention)\./.test(name)) continue;
      joint[name.replace('.timeNorm.', '.norm.').replace('.timeAttention.', '.attention.')] = t;
    }
    const a = await run(factorized, tensors);
    const b = await run({ ...config, attention: 'joint' }, joint);
    expectNear(a.data, b.data, 1e-6);
  });
});

it('a joint table is resized within frames, then along time', async () => {
  const config: VideoEncoderConfig = { ...SHAPE, attention: 'joint', layers: 1, classToken: true };
  const tensors = randomTensors(config, new Random(8));
  // A table that is linear in time, row and column stays so, inside of its edges, when it is resized by halves.
  const table = tensors['positions'];
  const at = (t: number, y: number, x: number, j: number) => 0.3 * t + 0.2 * y - 0.1 * x + 0.01 * j;
  for (let i = 1; i < 31; i++) {
    const [t, y, x] = [Math.floor((i - 1) / 10), Math.floor(((i - 1) % 10) / 5), (i - 1) % 5];
    for (let j = 0; j < 24; j++) table.data[i * 24 + j] = at(t, y, x, j);
  }
  const encoder = await VideoEncoder.create(config, tensors);
  const wide = { ...config, frames: 6, imageSize: [12, 40] as [number, number] };
  const y = await encoder.forward(framesOf(wide, 1), { resizePositions: 'bilinear' });
  const resized = Tensor.zeros('float32', [61, 24]);
  resized.data.set(table.data.subarray(0, 24));
  for (let i = 1; i < 61; i++) {
    const [t, row, column] = [Math.floor((i - 1) / 20), Math.floor(((i - 1) % 20) / 10), (i - 1) % 10];
    const x = Math.min(Math.max((column + 0.5) / 2 - 0.5, 0), 4);
    for (let j = 0; j < 24; j++) resized.data[i * 24 + j] = at(t, row, x, j);
  }
  const same = await VideoEncoder.create(wide, { ...tensors, positions: resized });
  expectNear(y.data, (await same.forward(framesOf(wide, 1))).data, 1e-6);
  encoder.dispose();
  same.dispose();
});
