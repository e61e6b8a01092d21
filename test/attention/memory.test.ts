import { describe, expect, it } from 'vitest';
import { attentionSync } from '../../lib/attention/index.ts';
import { Tensor } from '../../lib/index.ts';
import { Random } from '../cases/random.ts';
import { nativeVariants } from '../helpers/backends.ts';

// Scores of 65,536 queries and keys would take 16 GiB; the window keeps the time of this test short and, with scores
// in blocks, changes nothing about the scratch memory.
describe.each(nativeVariants())('attention at 65,536 tokens on $name', ({ options, use }) => {
  it('takes less than 32 MiB besides its tensors', () => {
    use();
    const s = 65_536;
    const draw = (seed: number) => new Tensor('float32', new Random(seed).normals(s * 8), [1, s, 1, 8]);
    const [q, k, v] = [draw(1), draw(2), draw(3)];
    const out = { output: Tensor.zeros('float32', [1, s, 1, 8]) };
    out.output.data.fill(1); // its pages exist before the call
    const all = { ...options, causal: true, window: [511, 0] as const, out, threads: 2 };
    const before = process.resourceUsage().maxRSS; // KiB, the high-water mark of the process
    attentionSync(q, k, v, all);
    expect(process.resourceUsage().maxRSS - before).toBeLessThan(32 * 1024);
    expect(out.output.data.every((x) => Number.isFinite(x))).toBe(true);
  });
});
