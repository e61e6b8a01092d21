import { mkdtempSync, readdirSync, readlinkSync, rmSync, statSync, truncateSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { openCheckpointSync, setDefaults, Tensor } from '../../lib/index.ts';
import { MoELayer } from '../../lib/moe/index.ts';
import { sameBits } from '../cases/case.ts';
import { Random } from '../cases/random.ts';
import { nativeVariants } from '../helpers/backends.ts';
import { budgeted, checkAtRest, expertBytes, inputOf, pinsOf, rows } from '../helpers/budget.ts';
import { editedCheckpoint, golden } from '../helpers/checkpoints.ts';
import { expectRejection, expectThrow } from '../helpers/errors.ts';

const natives = nativeVariants();
const everywhere = [{ name: 'reference', options: { backend: 'reference' as const }, use() {} }, ...natives];
const scratch = mkdtempSync(join(tmpdir(), 'heddle-budget-'));
afterAll(() => {
  rmSync(scratch, { recursive: true, force: true });
  if (natives.length > 0) setDefaults({ isa: 'auto' });
});

describe.each([
  ['mixtral', {}],
  ['qwen2_moe', {}],
  ['qwen3_moe', { type: 'int8' as const }],
  ['deepseek_v3', {}],
  ['gpt_oss', { type: 'bfloat16' as const }],
  ['gpt_oss_mxfp4', {}],
  ['gpt_oss_mxfp4', { type: 'int4' as const }],
])('a memory budget changes no bit of %s %o', (name, type) => {
  const input = inputOf(name);
  it.each(everywhere)('$name', async ({ options, use }) => {
    use();
    const o = { ...options, ...type };
    const whole = await MoELayer.load(golden(name), { layer: 1, ...o });
    const parts = [input, rows(input, 3, 1), rows(input, 9, 6), rows(input, 0, 0)];
    const expected = parts.map((x) => whole.forwardSync(x));
    for (const slots of [1, 2, 3, whole.experts - 1, whole.experts]) {
      const { layer, bytes } = await budgeted(golden(name), slots, o);
      expect(layer.cache).toEqual({
        hits: 0,
        misses: 0,
        evictions: 0,
        bytes: 0,
        budget: (slots + 1) * bytes - 1,
        bytesRead: 0,
      });
      for (const [i, x] of parts.entries()) {
        expect(sameBits([layer.forwardSync(x)], [expected[i]])).toBe(true);
        expect(sameBits([await layer.forward(x)], [expected[i]])).toBe(true);
        checkAtRest(layer, bytes);
      }
      if (slots === whole.experts) {
        expect(layer.bytes).toBe(whole.bytes + unused(layer, bytes));
        expect(layer.cache!.evictions).toBe(0);
      }
      layer.dispose();
    }
    whole.dispose();
  });
});

/** The difference to a fully packed layer: experts no token has needed; the reference counts no bytes itself. */
function unused(layer: MoELayer, bytes: number): number {
  const packed = pinsOf(layer).size;
  return layer.backend === 'reference' ? packed * bytes : (packed - layer.experts) * bytes;
}

describe('bfloat16 and float16 tokens', () => {
  it('keep their type and bits', async () => {
    const whole = await MoELayer.load(golden('mixtral_bf16'), { layer: 1 });
    const { layer } = await budgeted(golden('mixtral_bf16'), 2);
    const random = new Random(6);
    for (const type of ['bfloat16', 'float16'] as const) {
      const bits = Uint16Array.from({ length: 44 * 7 }, () => random.integer(0x3000, 0x3bff));
      const x = new Tensor(type, bits, [7, 44]);
      const y = await layer.forward(x);
      expect(y.type).toBe(type);
      expect(sameBits([y], [whole.forwardSync(x)])).toBe(true);
    }
    layer.dispose();
    whole.dispose();
  });
});

describe.each(everywhere)('a file that is cut short on $name', ({ options, use }) => {
  it.each([1, 2, 6])('fails the forwards that need it, and only those (budget: %d)', async (slots) => {
    use();
    const directory = editedCheckpoint(scratch, 'mixtral', (t) => {
      for (const key of Object.keys(t).filter((k) => k.includes('experts.5.'))) {
        const tensor = t[key];
        delete t[key]; // to the end
        t[key] = tensor;
      }
    });
    const whole = await MoELayer.load(golden('mixtral'), { layer: 1, ...options });
    const { layer, bytes } = await budgeted(directory, slots, options);
    const file = join(directory, 'model.safetensors');
    truncateSync(file, statSync(file).size - 36 * 44 * 4 - 1);
    const input = inputOf('mixtral');
    const outcomes = new Set<boolean>();
    const tokens = Array.from({ length: 38 }, (_, t) => rows(input, t, 1));
    await Promise.all(
      tokens.map(async (x) => {
        const needs = (layer.routeSync(x).indices.data as Int32Array).includes(5);
        outcomes.add(needs);
        if (needs)
          await expectRejection(layer.forward(x), 'ERR_CHECKPOINT', /experts\.5\..*the file ends at byte/);
        else expect(sameBits([await layer.forward(x)], [whole.forwardSync(x)])).toBe(true);
      }),
    );
    expect(outcomes.size).toBe(2);
    expect(pinsOf(layer).has(5)).toBe(false);
    checkAtRest(layer, bytes);
    expectThrow(() => layer.forwardSync(input), 'ERR_CHECKPOINT', /experts\.5\./);
    checkAtRest(layer, bytes);
    layer.dispose();
    whole.dispose();
  });

  it('a scale that is NaN is found on first use', async () => {
    use();
    const directory = editedCheckpoint(scratch, 'gpt_oss_mxfp4', (t) => {
      t['model.layers.1.mlp.experts.down_proj_scales'].bytes[2 * 64 * 3 + 4] = 255;
    });
    const { layer, bytes } = await budgeted(directory, 2, options);
    const input = inputOf('gpt_oss_mxfp4');
    await expectRejection(
      layer.forward(input),
      'ERR_CHECKPOINT',
      /expert 2 .*down\.scales\[0, 1, 1\] is 255/,
    );
    expectThrow(() => layer.forwardSync(input), 'ERR_CHECKPOINT', /non-finite scales/);
    checkAtRest(layer, bytes);
    layer.dispose();
  });
});

describe('dispose', () => {
  const openFiles = (directory: string) =>
    readdirSync('/proc/self/fd').filter((fd) => {
      try {
        return readlinkSync(`/proc/self/fd/${fd}`).startsWith(directory);
      } catch {
        return false; // closed meanwhile
      }
    }).length;
  const linux = process.platform === 'linux';

  it.each(everywhere)('during forwards lets them end, then closes the file, on $name', async (variant) => {
    variant.use();
    const directory = editedCheckpoint(scratch, 'mixtral', () => {});
    const input = inputOf('mixtral');
    const whole = await MoELayer.load(directory, { layer: 1, ...variant.options });
    if (linux) expect(openFiles(directory)).toBe(0);
    const { layer } = await budgeted(directory, 2, variant.options);
    if (linux) expect(openFiles(directory)).toBe(1); // and the refused load left nothing open
    const running = [0, 1, 2].map((i) => layer.forward(rows(input, i * 8, 8)));
    layer.dispose();
    layer.dispose();
    await expectRejection(layer.forward(input), 'ERR_DISPOSED', /MoE layer/);
    if (linux) expect(openFiles(directory)).toBe(1);
    const ys = await Promise.all(running);
    for (const [i, y] of ys.entries())
      expect(sameBits([y], [whole.forwardSync(rows(input, i * 8, 8))])).toBe(true);
    await new Promise((r) => setImmediate(r));
    if (linux) expect(openFiles(directory)).toBe(0);
    expect(layer.cache!.bytes).toBe(0);
    whole.dispose();
  });

  it('of a layer leaves a checkpoint that the caller opened to the caller', async () => {
    const checkpoint = openCheckpointSync(golden('mixtral'));
    const input = inputOf('mixtral');
    const whole = await MoELayer.load(checkpoint, { layer: 1 });
    const expected = whole.forwardSync(input);
    whole.dispose();
    const layers = [];
    for (let i = 0; i < 2; i++)
      layers.push(await MoELayer.load(checkpoint, { layer: 1, memoryBudget: 100_000 }));
    expect(sameBits([await layers[0].forward(input)], [expected])).toBe(true);
    layers[0].dispose();
    expect(sameBits([await layers[1].forward(input)], [expected])).toBe(true);
    const { bytes } = layers[1].cache!;
    checkpoint.close();
    // Closed under the layer: the experts at hand are all it can give.
    await expectRejection(layers[1].forward(input), 'ERR_DISPOSED', /checkpoint is closed/);
    expect(layers[1].cache!.bytes).toBeLessThanOrEqual(bytes);
    layers[1].dispose();
  });

  it('of a fully packed layer lets running forwards end too', async () => {
    const layer = await MoELayer.load(golden('mixtral'), { layer: 1 });
    expect(layer.cache).toBeUndefined();
    const input = inputOf('mixtral');
    const expected = layer.forwardSync(input);
    const running = layer.forward(input);
    layer.dispose();
    expect(sameBits([await running], [expected])).toBe(true);
    await expectRejection(layer.forward(input), 'ERR_DISPOSED', /MoE layer/);
  });
});

describe('memoryBudget', () => {
  it('must be a number of bytes that holds an expert', async () => {
    const load = (memoryBudget: unknown, directory = golden('mixtral')) =>
      MoELayer.load(directory, { layer: 1, memoryBudget: memoryBudget as number });
    for (const bad of [0, -1, 1.5, NaN, Infinity, '1000000', null])
      await expectRejection(load(bad), 'ERR_OPTION', /^memoryBudget must be an integer from 1/);
    const bytes = await expertBytes(golden('mixtral'), {});
    await expectRejection(
      load(bytes - 1),
      'ERR_OPTION',
      new RegExp(`^memoryBudget of ${bytes - 1} bytes holds no expert: one takes ${bytes} bytes as float32$`),
    );
    const layer = await load(bytes);
    layer.dispose();
    // Shapes are checked by load, though no expert is read.
    const wrong = editedCheckpoint(scratch, 'mixtral', (t) => {
      t['model.layers.1.block_sparse_moe.experts.4.w2.weight'].dims = [36, 44];
    });
    await expectRejection(load(1e6, wrong), 'ERR_CHECKPOINT', /experts\.4\.w2\.weight has dims \[36, 44\]/);
    expect(
      await MoELayer.load(golden('mixtral'), { layer: 1, memoryBudget: 1e6, type: 'int4' }).catch(
        (e) => e.message,
      ),
    ).toMatch(/does not divide/);
  });
});
