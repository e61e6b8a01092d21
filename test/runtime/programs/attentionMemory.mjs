// What full attention over 65,536 keys takes beyond its tensors; scores would be 16 GiB.
import { attention } from '../../../dist/attention/index.js';
import { Tensor } from '../../../dist/index.js';
import { canMeasure, peakGrowth } from '../../helpers/memory.mjs';

const length = 65_536;
const tensor = (seed) => {
  const data = new Float32Array(length * 16);
  for (let i = 0; i < data.length; i++) data[i] = Math.fround(Math.sin(seed * (i + 1)));
  return new Tensor('float32', data, [1, length, 1, 16]);
};
if (!canMeasure()) {
  console.log(JSON.stringify({ skipped: 'no resettable high-water mark in /proc/self' }));
} else {
  const [q, k, v, output] = [1, 2, 3, 4].map(tensor);
  const grown = await peakGrowth(() => attention(q, k, v, { out: { output } }));
  console.log(JSON.stringify({ grown, finite: output.data.every(Number.isFinite) }));
}
