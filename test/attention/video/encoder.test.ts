import { describe, expect, it } from 'vitest';
import { VideoEncoder } from '../../../lib/attention/video/index.ts';
import { videoEncoderReference } from '../../../lib/reference/attention/videoEncoder.ts';
import { sameBits } from '../../cases/case.ts';
import { everyVariant } from '../../helpers/backends.ts';
import { expectNear } from '../../helpers/golden.ts';
import { GOLDEN_ENCODERS, goldenIo, goldenModel, goldenVideo } from '../../helpers/videoEncoders.ts';

describe.each(GOLDEN_ENCODERS)('%s matches transformers', (name) => {
  const { frames, hidden, pooled } = goldenIo(name);

  it('in the reference', () => {
    const { config, get } = goldenModel(name);
    const y = videoEncoderReference(config, get, frames.data, frames.dims);
    expect(y.dims).toEqual(hidden.dims);
    expectNear(y.hidden, hidden.data, 1e-12);
    expect(y.pooled === undefined).toBe(pooled === undefined);
    if (pooled) expectNear(y.pooled as Float64Array, pooled.data, 1e-12);
  });

  it.each(everyVariant())('on $name', async ({ options, use }) => {
    use();
    const encoder = await VideoEncoder.load(goldenVideo(name), { type: 'float32', ...options });
    const y = await encoder.forward(frames);
    expect(y.dims).toEqual(hidden.dims);
    expectNear(y.data, hidden.data, 2e-6);
    expect(y.pooled?.dims).toEqual(pooled?.dims);
    if (pooled) expectNear(y.pooled!.data, pooled.data, 2e-6);
    // Blocks of any size: sequences cut into query blocks, and blocks of several sequences.
    for (const blockTokens of [7, 16]) {
      const z = await encoder.forward(frames, { blockTokens, threads: 1 });
      expect(sameBits([z], [y])).toBe(true);
    }
    encoder.dispose();
  });
});

it('resizes position tables as transformers does for TimeSformer', async () => {
  const name = 'timesformer_joint';
  const { otherFrames, otherHidden } = goldenIo(name);
  const encoder = await VideoEncoder.load(goldenVideo(name));
  const y = await encoder.forward(otherFrames!, { resizePositions: 'nearest' });
  expect(y.dims).toEqual(otherHidden!.dims);
  expectNear(y.data, otherHidden!.data, 2e-6);
  encoder.dispose();
});
