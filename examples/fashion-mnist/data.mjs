import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { gunzipSync } from 'node:zlib';

/** One IDX file (http://yann.lecun.com/exdb/mnist), gzipped or not. */
function readIdx(directory, name, magic) {
  const path = [name, `${name}.gz`].map((file) => join(directory, file)).find(existsSync);
  if (path === undefined) {
    throw new Error(
      `${join(directory, name)} is missing: apt-get install dataset-fashion-mnist, or --data DIRECTORY`,
    );
  }
  const raw = readFileSync(path);
  const bytes = path.endsWith('.gz') ? gunzipSync(raw) : raw;
  if (bytes.length < 8 || bytes.readUInt32BE(0) !== magic)
    throw new Error(`${path}: not an IDX file of this kind`);
  const dims = Array.from({ length: magic & 255 }, (_, i) => bytes.readUInt32BE(4 + 4 * i));
  const data = bytes.subarray(4 + 4 * dims.length);
  if (data.length !== dims.reduce((a, b) => a * b, 1)) throw new Error(`${path}: truncated`);
  return { dims, data };
}

/** `part`: train or t10k. */
export function loadFashionMnist(directory, part) {
  const images = readIdx(directory, `${part}-images-idx3-ubyte`, 0x803);
  const labels = readIdx(directory, `${part}-labels-idx1-ubyte`, 0x801);
  if (images.dims[0] !== labels.dims[0])
    throw new Error(`${directory}: ${part} has more images than labels, or fewer`);
  return { count: images.dims[0], pixels: images.data, labels: labels.data };
}

// Pixels to mean 0 and deviation 1 over the published dataset.
const SCALED = Float32Array.from({ length: 256 }, (_, v) => (v / 255 - 0.286) / 0.353);

/** The images `[B, 1, 28, 28]` and labels `[B]` at these indices. */
export function gather({ pixels, labels }, indices, Tensor) {
  const data = new Float32Array(indices.length * 784);
  indices.forEach((index, i) => {
    for (let p = 0; p < 784; p++) data[i * 784 + p] = SCALED[pixels[index * 784 + p]];
  });
  return {
    images: new Tensor('float32', data, [indices.length, 1, 28, 28]),
    labels: new Tensor(
      'int32',
      Int32Array.from(indices, (index) => labels[index]),
      [indices.length],
    ),
  };
}
