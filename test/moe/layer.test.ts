import { cpSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { Tensor } from '../../lib/index.ts';
import { MoELayer } from '../../lib/moe/index.ts';
import { sameBits } from '../cases/case.ts';
import { nativeVariants } from '../helpers/backends.ts';
import { golden, goldenIo, goldenLayers } from '../helpers/checkpoints.ts';
import { expectRejection } from '../helpers/errors.ts';
import { relativeError } from '../helpers/golden.ts';

const stored: Record<string, string> = { mixtral_bf16: 'bfloat16', gpt_oss_mxfp4: 'mxfp4' };
const everywhere = [
  { name: 'reference', options: { backend: 'reference' as const }, use() {} },
  ...nativeVariants(),
];

describe.each(goldenLayers)('MoE block of %s matches transformers', (name) => {
  const { input, output, logits, indices, weights } = goldenIo(name);

  it.each(everywhere)('$name', async ({ options, use }) => {
    use();
    const layer = await MoELayer.load(golden(name), { layer: 1, type: 'float32', ...options });
    const routing = await layer.route(input);
    expect(Array.from(routing.indices.data)).toEqual(Array.from(indices));
    expect(relativeError(routing.logits.data, logits)).toBeLessThan(2e-6);
    expect(relativeError(routing.weights.data, weights)).toBeLessThan(2e-6);
    const y = await layer.forward(input);
    expect(y.dims).toEqual(input.dims);
    expect(relativeError(y.data as Float32Array, output)).toBeLessThan(2e-5);
    expect(sameBits([layer.forwardSync(input)], [y])).toBe(true);
    layer.dispose();
  });

  it('packs in the checkpoint type by default and within the bound of bf16', async () => {
    const layer = await MoELayer.load(golden(name), { layer: 1 });
    expect(layer.type).toBe(stored[name] ?? 'float32');
    layer.dispose();
    const bf16 = await MoELayer.load(golden(name), { layer: 1, type: 'bfloat16' });
    const y = await bf16.forward(input);
    expect(relativeError(y.data as Float32Array, output)).toBeLessThan(name === 'mixtral_bf16' ? 5e-3 : 1e-2);
    bf16.dispose();
  });
});

describe('MoELayer', () => {
  const scratch = mkdtempSync(join(tmpdir(), 'heddle-layer-'));
  afterAll(() => rmSync(scratch, { recursive: true, force: true }));
  const edited = (name: string, edit: (config: Record<string, unknown>) => void) => {
    const dir = mkdtempSync(join(scratch, 'x-'));
    cpSync(golden(name), dir, { recursive: true });
    const config = JSON.parse(readFileSync(join(dir, 'config.json'), 'utf8'));
    edit(config);
    writeFileSync(join(dir, 'config.json'), JSON.stringify(config));
    return dir;
  };

  it('refuses what it cannot run, naming field or tensor', async () => {
    const load = (dir: string, layer = 1) => MoELayer.load(dir, { layer });
    const bad = (promise: Promise<unknown>, message: RegExp) =>
      expectRejection(promise, 'ERR_CHECKPOINT', message);
    await bad(load(golden('deepseek_v3'), 0), /layer 0 has a dense MLP/);
    await bad(load(golden('mixtral'), 0), /layers\.0\.block_sparse_moe\.gate/);
    await bad(load(edited('mixtral', (c) => (c['model_type'] = 'llama'))), /llama.*mixtral/);
    await bad(load(edited('mixtral', (c) => delete c['hidden_size'])), /hidden_size is missing/);
    await bad(
      load(edited('mixtral', (c) => (c['num_local_experts'] = 5))),
      /gate\.weight has dims \[6, 44\]/,
    );
    await bad(load(edited('olmoe', (c) => (c['hidden_act'] = 'mish'))), /hidden_act 'mish'/);
    await bad(load(join(scratch, 'nowhere')), /nowhere/);
    await expectRejection(load(golden('mixtral'), 7), 'ERR_OPTION', /layer must be/);
    const typo = MoELayer.load(golden('mixtral'), { layer: 1, typ: 'int8' } as never);
    await expectRejection(typo, 'ERR_OPTION', /'typ'/);
    const group = MoELayer.load(golden('mixtral'), { layer: 1, type: 'int4' });
    await expectRejection(group, 'ERR_OPTION', /does not divide/);
  });

  it('checks x, reports progress, and refuses use after dispose', async () => {
    const seen: number[] = [];
    const layer = await MoELayer.load(golden('qwen2_moe'), {
      layer: 1,
      onProgress: (p) => seen.push(p.done / p.total),
    });
    expect(seen.length).toBeGreaterThan(3);
    expect(Math.max(...seen)).toBeLessThanOrEqual(1);
    await expect(layer.forward(new Tensor('float32', new Float32Array(10), [2, 5]))).rejects.toMatchObject({
      code: 'ERR_SHAPE',
      message: 'x: expected [..., 52], got [2, 5]',
    });
    expect((await layer.forward(new Tensor('float32', new Float32Array(0), [0, 52]))).dims).toEqual([0, 52]);
    const running = layer.forward(new Tensor('float32', new Float32Array(52 * 64), [64, 52]));
    await running;
    layer.dispose();
    await expect(layer.forward(new Tensor('float32', new Float32Array(52), [1, 52]))).rejects.toMatchObject({
      code: 'ERR_DISPOSED',
    });
  });

  it('int8 keeps a layer close to its float32 output', async () => {
    const { input, output } = goldenIo('qwen3_moe');
    const layer = await MoELayer.load(golden('qwen3_moe'), { layer: 1, type: 'int8' });
    const y = await layer.forward(input);
    expect(relativeError(y.data as Float32Array, output)).toBeLessThan(0.03);
    layer.dispose();
  });
});
