// Encodes a video, clip by clip as its frames arrive:
//
//   node examples/encode-video.mjs CHECKPOINT film.mp4                        # frames decoded by ffmpeg
//   node examples/encode-video.mjs CHECKPOINT frames/*.ppm                    # binary PPM images, in this order
//   node examples/encode-video.mjs CHECKPOINT film.rgb --raw 224x224          # raw rgb24 frames of this size
//   ffmpeg -i film.mp4 -vf scale=224:224 -f rawvideo -pix_fmt rgb24 - | \
//     node examples/encode-video.mjs CHECKPOINT - --raw 224x224
//
// CHECKPOINT is a directory of a TimeSformer, ViViT, VideoPrism or V-JEPA 2 model (config.json, model.safetensors).
//   --type float32|bfloat16|int8   how weights are packed        --fps N         frames per second that ffmpeg gives
//   --mask 0.75                    share of patches to drop (tube) --threads N
//   --out FILE                     last_hidden_state of every clip, float32, one after the other
//
// Prints one line per clip. Frames of another size than the model's are scaled by ffmpeg; PPM and raw frames must fit.
// At any time there is one clip of frames in memory, whatever the length of the video.
import { spawn } from 'node:child_process';
import { createReadStream, createWriteStream } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { parseArgs } from 'node:util';
import { Tensor } from 'heddle';
import { maskTokens, VideoEncoder } from 'heddle/attention';

const { values: flags, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    type: { type: 'string' },
    raw: { type: 'string' },
    fps: { type: 'string' },
    mask: { type: 'string' },
    threads: { type: 'string' },
    out: { type: 'string' },
  },
});
const [checkpoint, ...inputs] = positionals;
if (checkpoint === undefined || inputs.length === 0) {
  console.error(
    'usage: node examples/encode-video.mjs CHECKPOINT VIDEO|-|IMAGE.ppm… [options]; see the file',
  );
  process.exit(2);
}

/** Cuts a stream of bytes into frames of `size` bytes. */
async function* framesOfStream(stream, size) {
  let frame = new Uint8Array(size);
  let filled = 0;
  for await (const chunk of stream) {
    for (let at = 0; at < chunk.length; ) {
      const count = Math.min(size - filled, chunk.length - at);
      frame.set(chunk.subarray(at, at + count), filled);
      filled += count;
      at += count;
      if (filled === size) {
        yield frame;
        frame = new Uint8Array(size);
        filled = 0;
      }
    }
  }
  if (filled > 0) console.error(`the last ${filled} bytes are not a whole frame and are left out`);
}

/** Frames of a video file, decoded and scaled by ffmpeg. */
async function* framesOfVideo(file, height, width) {
  const filter = [...(flags.fps ? [`fps=${Number(flags.fps)}`] : []), `scale=${width}:${height}`].join(',');
  const options = ['-v', 'error', '-i', file, '-vf', filter, '-f', 'rawvideo', '-pix_fmt', 'rgb24', '-'];
  const child = spawn('ffmpeg', options, { stdio: ['ignore', 'pipe', 'inherit'] });
  const ended = new Promise((resolve, reject) => {
    child.on('error', (error) =>
      reject(
        error.code === 'ENOENT' ? new Error('ffmpeg is not installed; give PPM images or --raw') : error,
      ),
    );
    child.on('close', (code) =>
      code === 0 ? resolve() : reject(new Error(`ffmpeg ended with code ${code}`)),
    );
  });
  ended.catch(() => {}); // awaited below
  yield* framesOfStream(child.stdout, height * width * 3);
  await ended;
}

/** One image of the portable pixmap format: "P6 width height 255", white space, then rgb bytes. */
async function readPpm(file, height, width) {
  const bytes = await readFile(file);
  const header = /^P6(?:\s+|#[^\n]*\n)+(\d+)(?:\s+|#[^\n]*\n)+(\d+)(?:\s+|#[^\n]*\n)+(\d+)\s/.exec(
    bytes.subarray(0, 1024).toString('latin1'),
  );
  if (header === null || header[3] !== '255') throw new Error(`${file} is not a binary PPM of 8 bits`);
  const [w, h] = [Number(header[1]), Number(header[2])];
  if (w !== width || h !== height)
    throw new Error(`${file} has ${w} x ${h} pixels, the model ${width} x ${height}`);
  const pixels = bytes.subarray(header[0].length, header[0].length + w * h * 3);
  if (pixels.length !== w * h * 3) throw new Error(`${file} is cut off`);
  return pixels;
}

async function* allFrames(height, width) {
  if (flags.raw !== undefined) {
    if (flags.raw !== `${width}x${height}`) {
      throw new Error(`--raw ${flags.raw}: the model takes frames of ${width}x${height}`);
    }
    for (const input of inputs) {
      yield* framesOfStream(input === '-' ? process.stdin : createReadStream(input), height * width * 3);
    }
    return;
  }
  for (const input of inputs) {
    if (/\.ppm$/i.test(input)) yield await readPpm(input, height, width);
    else yield* framesOfVideo(input, height, width);
  }
}

const threads = flags.threads === undefined ? undefined : Number(flags.threads);
const show = process.stderr.isTTY === true;
const progress = (text) => show && process.stderr.write(`\r\x1b[K${text}`);

const encoder = await VideoEncoder.load(checkpoint, {
  type: flags.type,
  threads,
  onProgress: ({ done, total }) => progress(`loading ${done} of ${total}`),
});
const { imageSize, frames: clipFrames, channels, grid } = encoder.config;
const [height, width] = imageSize;
progress('');
console.log(
  `${encoder.modelType}: clips of ${clipFrames} frames of ${width} x ${height}, ${grid.join(' x ')} tubelets`,
);

const out = flags.out === undefined ? undefined : createWriteStream(flags.out);
const mask =
  flags.mask === undefined
    ? undefined
    : maskTokens({
        frames: grid[0],
        patches: grid[1] * grid[2],
        ratio: Number(flags.mask),
        kind: 'tube',
        seed: 0,
      });
const clip = new Uint8Array(clipFrames * height * width * channels);
let held = 0;
let clips = 0;

async function encode() {
  const start = performance.now();
  const frames = new Tensor('uint8', clip, [1, clipFrames, height, width, channels]);
  const hidden = await encoder.forward(frames, {
    layout: 'THWC',
    mask,
    onProgress: ({ done, total, stage }) => progress(`clip ${clips}: ${stage} (${done} of ${total})`),
  });
  progress('');
  const [, tokens, size] = hidden.dims;
  let squares = 0;
  for (const v of hidden.data) squares += v * v;
  const seconds = (performance.now() - start) / 1000;
  const rms = Math.sqrt(squares / hidden.size).toFixed(4);
  console.log(`clip ${clips}: [${tokens}, ${size}], rms ${rms}, ${seconds.toFixed(3)} s`);
  if (out !== undefined && !out.write(Buffer.from(hidden.data.buffer, 0, hidden.data.byteLength))) {
    await new Promise((resolve) => out.once('drain', resolve));
  }
  clips++;
}

try {
  for await (const frame of allFrames(height, width)) {
    clip.set(frame, held * frame.length);
    if (++held < clipFrames) continue;
    await encode();
    held = 0;
  }
  if (held > 0)
    console.error(`the last ${held} frames are less than a clip of ${clipFrames} and are left out`);
} catch (error) {
  console.error(error.message);
  process.exitCode = 1;
}
if (out !== undefined) await new Promise((resolve) => out.end(resolve));
encoder.dispose();
