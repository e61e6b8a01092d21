type Visit = (output: number, inputs: number[], plane: number) => void;

/** Calls visit for every output place with the inputs of its window, plane by plane. */
function visit(planes: number, geometry: Int32Array, f: Visit): void {
  const [h, w, oh, ow, kh, kw, sh, sw, ph, pw] = geometry;
  for (let o = 0; o < planes * oh * ow; o++) {
    const plane = Math.floor(o / (oh * ow)) * h * w;
    const y = (Math.floor(o / ow) % oh) * sh - ph;
    const x = (o % ow) * sw - pw;
    const inputs: number[] = [];
    for (let i = Math.max(y, 0); i < Math.min(y + kh, h); i++) {
      for (let j = Math.max(x, 0); j < Math.min(x + kw, w); j++) inputs.push(plane + i * w + j);
    }
    f(o, inputs, plane);
  }
}

/** See native/training/pooling.h. */
export function poolingReference(
  average: boolean,
  planes: number,
  geometry: Int32Array,
  x: Float32Array,
  out: Float32Array,
  index: Int32Array | null,
): number {
  visit(planes, geometry, (o, inputs, plane) => {
    if (average) {
      out[o] = inputs.reduce((sum, i) => sum + x[i], 0) / (geometry[4] * geometry[5]);
      return;
    }
    let best = inputs[0];
    for (const i of inputs) {
      if (x[i] > x[best] || (Number.isNaN(x[i]) && !Number.isNaN(x[best]))) best = i;
    }
    out[o] = x[best];
    (index as Int32Array)[o] = best - plane;
  });
  return 0;
}

/** See native/training/pooling.h. */
export function poolingBackwardReference(
  average: boolean,
  planes: number,
  geometry: Int32Array,
  gradOutput: Float32Array,
  out: Float32Array,
  index: Int32Array | null,
): number {
  const sums = new Float64Array(out.length);
  visit(planes, geometry, (o, inputs, plane) => {
    if (!average) sums[plane + (index as Int32Array)[o]] += gradOutput[o];
    else for (const i of inputs) sums[i] += gradOutput[o] / (geometry[4] * geometry[5]);
  });
  out.set(sums);
  return 0;
}
