import { cpSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { predictStudy, STUDY_VARIANTS } from '../../../bench/videoStudy.ts';
import { maskTokens } from '../../../lib/attention/maskTokens.ts';
import {
  inflateImageEncoder,
  VideoEncoder,
  type VideoEncoderConfig,
  videoEncoderTensors,
} from '../../../lib/attention/video/index.ts';
import { openCheckpointSync, Tensor } from '../../../lib/index.ts';
import { randomFrames, randomTensors } from '../../cases/attention/videoEncoder.ts';
import { sameBits } from '../../cases/case.ts';
import { Random } from '../../cases/random.ts';
import { expectRejection, expectThrow } from '../../helpers/errors.ts';
import { expectNear } from '../../helpers/golden.ts';
import { type TensorBytes, writeSafetensors } from '../../helpers/safetensors.ts';
import { GOLDEN_ENCODERS, goldenIo, goldenVideo } from '../../helpers/videoEncoders.ts';

const scratch = mkdtempSync(join(tmpdir(), 'heddle-video-'));
afterAll(() => rmSync(scratch, { recursive: true, force: true }));

/** A copy of a golden checkpoint with other config fields or tensors. */
function edited(
  name: string,
  config: (c: Record<string, unknown>) => void,
  edit: (t: Record<string, TensorBytes>) => Record<string, TensorBytes> = (t) => t,
): string {
  const directory = mkdtempSync(join(scratch, 'x-'));
  cpSync(goldenVideo(name), directory, { recursive: true });
  const fields = JSON.parse(readFileSync(join(directory, 'config.json'), 'utf8'));
  config(fields);
  writeFileSync(join(directory, 'config.json'), JSON.stringify(fields));
  const c = openCheckpointSync(goldenVideo(name));
  const tensors: Record<string, TensorBytes> = {};
  for (const [tensor, { dtype, dims }] of c.tensors) {
    tensors[tensor] = { dtype, dims, bytes: c.readBytesSync(tensor) };
  }
  c.close();
  writeSafetensors(join(directory, 'model.safetensors'), edit(tensors));
  rmSync(join(directory, 'io.safetensors'));
  return directory;
}

const CONFIG: VideoEncoderConfig = {
  attention: 'factorized-self-attention',
  imageSize: 12,
  frames: 4,
  tubelet: [2, 4, 4],
  hiddenSize: 24,
  heads: 2,
  intermediateSize: 32,
  layers: 3,
};

describe('VideoEncoder.load', () => {
  it('names what is missing, has other dims, or has no place', async () => {
    const bad = (directory: string, message: RegExp) =>
      expectRejection(VideoEncoder.load(directory), 'ERR_CHECKPOINT', message);
    const without = ({ 'layernorm.bias': _, ...rest }: Record<string, TensorBytes>) => rest;
    await bad(
      edited('vivit', () => {}, without),
      /layernorm\.bias/,
    );
    await bad(
      edited(
        'vivit',
        () => {},
        (t) => ({ ...t, 'embeddings.extra': t['layernorm.bias'] }),
      ),
      /embeddings\.extra has no place in a vivit encoder/,
    );
    await bad(
      edited('timesformer_divided', (c) => (c['attention_type'] = 'joint_space_time')),
      /temporal_\w+.* and \d+ more have no place/,
    );
    await bad(
      edited('vivit', (c) => (c['intermediate_size'] = 50)),
      /intermediate\.dense\.\w+ has dims \[52/,
    );
    await bad(
      edited('vivit', (c) => (c['model_type'] = 'vit')),
      /'vit' is not supported.*timesformer/,
    );
    await bad(
      edited('vivit', (c) => (c['hidden_act'] = 'mish')),
      /hidden_act 'mish'/,
    );
    await bad(
      edited('vjepa2', (c) => (c['patch_size'] = 'six')),
      /patch_size must be a positive integer/,
    );
    await expectRejection(
      VideoEncoder.load(goldenVideo('vivit'), { typ: 'int8' } as never),
      'ERR_OPTION',
      /'typ'/,
    );
    await expectRejection(
      VideoEncoder.load(goldenVideo('vivit'), { type: 'int4' as never }),
      'ERR_OPTION',
      /type must be one of float32, bfloat16, int8/,
    );
  });

  it('finds the encoder inside a classifier', async () => {
    const wrapped = edited(
      'timesformer_joint',
      () => {},
      (t) => ({
        ...Object.fromEntries(Object.entries(t).map(([name, x]) => [`timesformer.${name}`, x])),
        'classifier.bias': t['layernorm.bias'],
      }),
    );
    const { frames, hidden } = goldenIo('timesformer_joint');
    const encoder = await VideoEncoder.load(wrapped);
    expectNear((await encoder.forward(frames)).data, hidden.data, 2e-6);
    encoder.dispose();
  });

  it.each(GOLDEN_ENCODERS)('%s in bf16 loses nothing here, in int8 a little', async (name) => {
    // The golden weights are numbers that bfloat16 holds.
    const { frames, hidden } = goldenIo(name);
    const seen: number[] = [];
    const onProgress = (p: { done: number; total: number }) => seen.push(p.done / p.total);
    const bf16 = await VideoEncoder.load(goldenVideo(name), { type: 'bfloat16', onProgress });
    expect(seen.length).toBeGreaterThan(10);
    expect(seen.at(-1)).toBe(1);
    expectNear((await bf16.forward(frames)).data, hidden.data, 2e-6);
    const int8 = await VideoEncoder.load(goldenVideo(name), { type: 'int8' });
    const float32 = await VideoEncoder.load(goldenVideo(name), { type: 'float32' });
    expect(bf16.bytes).toBeLessThan(float32.bytes);
    expect(int8.bytes).toBeLessThan(float32.bytes);
    float32.dispose();
    expectNear((await int8.forward(frames)).data, hidden.data, 0.06);
    bf16.dispose();
    int8.dispose();
  });
});

describe('VideoEncoder.create', () => {
  const tensors = randomTensors(CONFIG, new Random(1));

  it('names tensors and fields', async () => {
    const create = (config: object, given: object = tensors) =>
      VideoEncoder.create({ ...CONFIG, ...config } as VideoEncoderConfig, given as typeof tensors);
    const { 'norm.bias': _, ...less } = tensors;
    await expectRejection(create({}, less), 'ERR_ARGUMENT', /tensors: norm\.bias missing/);
    const more = { ...tensors, mean: tensors['norm.bias'] };
    await expectRejection(create({}, more), 'ERR_ARGUMENT', /tensors: mean has no place/);
    const other = { ...tensors, 'norm.bias': Tensor.zeros('float32', [25]) };
    await expectRejection(
      create({}, other),
      'ERR_SHAPE',
      /tensors\['norm\.bias'\]: expected \[24\], got \[25\]/,
    );
    await expectRejection(create({ heads: 5 }), 'ERR_OPTION', /heads 5 must divide hiddenSize 24/);
    await expectRejection(create({ attention: 'both' }), 'ERR_OPTION', /attention must be one of joint/);
    await expectRejection(create({ frames: 1 }), 'ERR_OPTION', /do not fit once into 1 frames/);
    await expectRejection(create({ color: 3 }), 'ERR_OPTION', /unknown field 'color'/);
    await expectRejection(create({ classToken: true }), 'ERR_OPTION', /has no class token/);
    await expectRejection(
      create({ attention: 'factorized-dot-product', heads: 3 }),
      'ERR_OPTION',
      /heads must be even/,
    );
  });

  it('checks frames and masks, and refuses use after dispose', async () => {
    const encoder = await VideoEncoder.create(CONFIG, tensors);
    const frames = randomFrames(CONFIG, 2, new Random(2));
    const forward = (dims: number[], options = {}) => encoder.forward(Tensor.zeros('float32', dims), options);
    await expectRejection(forward([1, 4, 1, 12, 12]), 'ERR_SHAPE', /frames: expected 3 channels .* got 1/);
    await expectRejection(forward([1, 4, 3, 3, 12]), 'ERR_SHAPE', /frames: .* give no token/);
    await expectRejection(forward([1, 1, 3, 12, 12]), 'ERR_SHAPE', /frames: 1 frames .* give no token/);
    await expectRejection(forward([1, 6, 3, 12, 12]), 'ERR_SHAPE', /3 x 3 x 3 tubelets.*rows for 2 x 3 x 3/);
    await expectRejection(forward([4, 3, 12, 12]), 'ERR_SHAPE', /frames: expected 5 dimensions/);
    const mask = {
      indices: Int32Array.of(0, 3),
      batchOffsets: Int32Array.of(0, 2, 2),
      frames: 2,
      patches: 9,
    };
    await expectRejection(encoder.forward(frames, { mask }), 'ERR_VALUE', /mask keeps no token of clip 1/);
    await expectRejection(
      forward([1, 6, 3, 12, 12], { resizePositions: 'cubic' }),
      'ERR_OPTION',
      /resizePositions must be one of nearest/,
    );
    const wrong = maskTokens({ frames: 3, patches: 9, ratio: 0.5, seed: 1, batch: 2 });
    await expectRejection(
      encoder.forward(frames, { mask: wrong }),
      'ERR_SHAPE',
      /mask: expected 2 clips of 2 frames/,
    );
    await expectRejection(encoder.forward(frames, { lastLayers: 4 }), 'ERR_OPTION', /lastLayers must be/);
    const gone = new AbortController();
    gone.abort();
    await expectRejection(encoder.forward(frames, { signal: gone.signal }), 'ERR_ABORTED', /aborted/);
    expect((await forward([0, 4, 3, 12, 12])).dims).toEqual([0, 0, 24]);
    const running = encoder.forward(frames);
    encoder.dispose();
    expect((await running).dims).toEqual([2, 18, 24]);
    await expectRejection(encoder.forward(frames), 'ERR_DISPOSED', /disposed/);
  });

  it('reads uint8 frames in either order of axes', async () => {
    const encoder = await VideoEncoder.create(CONFIG, tensors);
    const dims = [2, 4, 12, 12, 3];
    const bytes = Uint8Array.from({ length: 2 * 4 * 12 * 12 * 3 }, (_, i) => (i * 97) % 256);
    const normalization = { mean: [0.4, 0.5, 0.6], std: [0.2, 0.25, 0.3] };
    const planes = new Uint8Array(bytes.length);
    const floats = new Float32Array(bytes.length);
    for (let f = 0; f < 8; f++)
      for (let i = 0; i < 144; i++)
        for (let c = 0; c < 3; c++) {
          const value = bytes[(f * 144 + i) * 3 + c];
          const at = (f * 3 + c) * 144 + i;
          planes[at] = value;
          floats[at] = (value / 255 - normalization.mean[c]) / normalization.std[c];
        }
    const last = await encoder.forward(new Tensor('uint8', bytes, dims), { layout: 'THWC', normalization });
    const first = await encoder.forward(new Tensor('uint8', planes, [2, 4, 3, 12, 12]), { normalization });
    const float = await encoder.forward(new Tensor('float32', floats, [2, 4, 3, 12, 12]));
    expect(sameBits([last], [first])).toBe(true);
    expectNear(first.data, float.data, 1e-6);
    encoder.dispose();
  });

  it('keeps the activations of the last layers, and nothing changes by it', async () => {
    const encoder = await VideoEncoder.create(CONFIG, tensors);
    const frames = randomFrames(CONFIG, 2, new Random(2));
    const plain = await encoder.forward(frames);
    expect(plain.activations).toBeUndefined();
    const hidden = await encoder.forward(frames, { lastLayers: 2 });
    expect(sameBits([hidden], [plain])).toBe(true);
    const { activations } = hidden;
    expect(activations!.map((a) => a.layer)).toEqual([1, 2]);
    const steps = activations![1].steps;
    expect(steps.map((s) => s.axis ?? s.kind)).toEqual(['time', 'space', 'mlp']);
    expect(steps[0].query!.dims).toEqual([36, 2, 12]);
    expect(steps[2].hidden!.dims).toEqual([36, 32]);
    // The MLP's input and values give the stream after it, and the final norm of that is the result.
    const w = tensors['layers.2.mlp.down.weight'].data;
    const { input, hidden: values } = steps[2];
    const row = Array.from({ length: 24 }, (_, o) => {
      let sum = input.data[o] + tensors['layers.2.mlp.down.bias'].data[o];
      for (let i = 0; i < 32; i++) sum += values!.data[i] * w[o * 32 + i];
      return sum;
    });
    const mean = row.reduce((a, b) => a + b, 0) / 24;
    const rstd = 1 / Math.sqrt(row.reduce((a, b) => a + (b - mean) ** 2, 0) / 24 + 1e-6);
    const normed = row.map(
      (v, i) => (v - mean) * rstd * tensors['norm.weight'].data[i] + tensors['norm.bias'].data[i],
    );
    expectNear(hidden.data.slice(0, 24), normed, 1e-5);
    const [time] = steps;
    expect(time.offsets!.length).toBe(2 * 9 + 1);
    expect(time.logSumExp!.size).toBe(36 * 2);
    encoder.dispose();
  });

  it('starts from an image encoder', async () => {
    const image = {
      ...CONFIG,
      attention: 'space-only',
      frames: 1,
      tubelet: [1, 4, 4],
      positions: 'space',
    } as const;
    const flat = { ...CONFIG, frames: 1, tubelet: [1, 4, 4] } as const;
    const weights = randomTensors(image, new Random(4));
    const still = randomFrames(flat, 1, new Random(5));
    const video: VideoEncoderConfig = {
      ...CONFIG,
      timeGate: true,
      order: 'space-time',
      positions: 'space-time',
    };
    const source: Record<string, Tensor> = {
      ...weights,
      'patch.weight': weights['patch.weight'].reshape([24, 3, 4, 4]),
    };
    const long = inflateImageEncoder(video, source, { mode: 'average' });
    expect(Object.keys(long).sort()).toEqual([...videoEncoderTensors(video).keys()].sort());
    expect(long['layers.1.timeAttention.qkv.weight']).toBe(weights['layers.1.attention.qkv.weight']);
    // The gates are closed: a video of one image, twice and four times, is that image twice.
    const encoder = await VideoEncoder.create(video, long);
    const imageEncoder = await VideoEncoder.create(image, weights);
    const clip = new Float32Array(4 * still.size);
    for (let t = 0; t < 4; t++) clip.set(still.data, t * still.size);
    const y = await encoder.forward(new Tensor('float32', clip, [1, 4, 3, 12, 12]));
    const x = await imageEncoder.forward(still);
    expectNear(y.data.slice(0, x.size), x.data, 1e-6);
    expectNear(y.data.slice(x.size), x.data, 1e-6);
    const { 'patch.bias': _, ...less } = source;
    expectThrow(() => inflateImageEncoder(CONFIG, less), 'ERR_ARGUMENT', /patch\.bias missing/);
    encoder.dispose();
    imageEncoder.dispose();
  });
});

describe('the study', () => {
  it('predicts what the arithmetic of a layer of 256 x 256 tokens says', () => {
    const gflop = (name: string) => {
      const variant = STUDY_VARIANTS.find((v) => v.name === name)!;
      return Math.round(predictStudy(variant, 256).flops / 1e9);
    };
    expect(gflop('joint')).toBe(14122);
    expect(gflop('ViViT 3')).toBe(1340);
    expect(gflop('ViViT 4')).toBe(979);
    expect(gflop('joint, 75 % masked')).toBe(1057);
    expect(gflop('joint, tubelets of 2 frames')).toBe(3762);
    expect(gflop('ViViT 3, 75 % tube masked')).toBe(325);
  });
});
