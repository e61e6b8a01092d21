type Visit = (input: number, output: number, weight: number) => void;

/** Calls visit for every (input, output, weight) triple that a convolution multiplies. */
function visit(
  samples: number,
  inChannels: number,
  outChannels: number,
  groups: number,
  geometry: Int32Array,
  f: Visit,
): void {
  const part = (i: number) => Array.from(geometry.subarray(3 * i, 3 * i + 3));
  const [size, out, kernel, stride, padding, dilation] = [0, 1, 2, 3, 4, 5].map(part);
  const volume = (d: number[]) => d[0] * d[1] * d[2];
  const [plane, places, taps] = [size, out, kernel].map(volume);
  const [c, p] = [inChannels / groups, outChannels / groups];
  const at = (i: number, d: number[]) => [Math.floor(i / d[2] / d[1]), Math.floor(i / d[2]) % d[1], i % d[2]];
  for (let o = 0; o < samples * outChannels; o++) {
    const sample = Math.floor(o / outChannels);
    const group = Math.floor((o % outChannels) / p);
    for (let place = 0; place < places; place++) {
      const to = at(place, out);
      for (let j = 0; j < c * taps; j++) {
        const tap = at(j % taps, kernel);
        const from = to.map((x, axis) => x * stride[axis] - padding[axis] + tap[axis] * dilation[axis]);
        if (from.some((x, axis) => x < 0 || x >= size[axis])) continue;
        const channel = sample * inChannels + group * c + Math.floor(j / taps);
        const input = channel * plane + (from[0] * size[1] + from[1]) * size[2] + from[2];
        f(input, o * places + place, (o % outChannels) * c * taps + j);
      }
    }
  }
}

/** See native/training/convolution.h. */
export function convolutionReference(
  samples: number,
  inChannels: number,
  outChannels: number,
  groups: number,
  geometry: Int32Array,
  weight: Float32Array,
  bias: Float32Array | null,
  x: Float32Array,
  out: Float32Array,
): number {
  const sums = new Float64Array(out.length);
  visit(samples, inChannels, outChannels, groups, geometry, (i, o, w) => {
    sums[o] += x[i] * weight[w];
  });
  const places = geometry[3] * geometry[4] * geometry[5];
  for (let o = 0; o < out.length; o++) {
    out[o] = sums[o] + (bias === null ? 0 : bias[Math.floor(o / places) % outChannels]);
  }
  return 0;
}

/** See native/training/convolution.h. */
export function convolutionInputGradientReference(
  samples: number,
  inChannels: number,
  outChannels: number,
  groups: number,
  geometry: Int32Array,
  weight: Float32Array,
  _bias: null,
  gradOutput: Float32Array,
  out: Float32Array,
): number {
  const sums = new Float64Array(out.length);
  visit(samples, inChannels, outChannels, groups, geometry, (i, o, w) => {
    sums[i] += gradOutput[o] * weight[w];
  });
  out.set(sums);
  return 0;
}
