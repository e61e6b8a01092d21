import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { VideoEncoder } from '../../lib/attention/video/index.ts';
import { Tensor } from '../../lib/index.ts';
import { sameBits } from '../cases/case.ts';
import { requireDist } from '../helpers/program.ts';
import { goldenVideo } from '../helpers/videoEncoders.ts';

beforeAll(requireDist);

const scratch = mkdtempSync(join(tmpdir(), 'heddle-encode-'));
afterAll(() => rmSync(scratch, { recursive: true, force: true }));

const run = (...argv: string[]) => {
  const example = join(import.meta.dirname, '../../examples/encode-video.mjs');
  return execFileSync(process.execPath, [example, ...argv], { encoding: 'utf8', stdio: 'pipe' });
};

it('examples/encode-video.mjs writes what forward gives, from raw frames and from images', async () => {
  const checkpoint = goldenVideo('timesformer_divided');
  const size = 21 * 21 * 3;
  const bytes = Uint8Array.from({ length: 11 * size }, (_, i) => (i * 2654435761) >>> 24);
  const raw = join(scratch, 'film.rgb');
  writeFileSync(raw, bytes);
  const out = join(scratch, 'hidden.f32');
  const said = run(checkpoint, raw, '--raw', '21x21', '--out', out);
  expect(said).toMatch(/clip 0: \[46, 36\].*\nclip 1: \[46, 36\]/);
  const encoder = await VideoEncoder.load(checkpoint);
  const frames = new Tensor('uint8', bytes.subarray(0, 10 * size), [2, 5, 21, 21, 3]);
  const hidden = await encoder.forward(frames, { layout: 'THWC' });
  encoder.dispose();
  const written = readFileSync(out);
  const floats = new Float32Array(new Uint8Array(written).buffer);
  expect(sameBits([new Tensor('float32', floats, hidden.dims)], [hidden])).toBe(true);

  const images = Array.from({ length: 5 }, (_, i) => {
    const file = join(scratch, `${i}.ppm`);
    const pixels = Buffer.from(bytes.subarray(i * size, (i + 1) * size));
    writeFileSync(file, Buffer.concat([Buffer.from('P6\n# a frame\n21 21\n255\n'), pixels]));
    return file;
  });
  const again = join(scratch, 'images.f32');
  run(checkpoint, ...images, '--out', again);
  expect(readFileSync(again).equals(written.subarray(0, written.length / 2))).toBe(true);
  expect(() => run(checkpoint, raw, '--raw', '20x20')).toThrow(/takes frames of 21x21/);
});
