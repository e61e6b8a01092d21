// How MoELayer.load reads float8 checkpoints and hands its rounding options on.
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { openCheckpointSync, setDefaults } from '../../lib/index.ts';
import { MoELayer } from '../../lib/moe/index.ts';
import { decodeE4M3 } from '../../lib/reference/gemm/codes.ts';
import { sameBits } from '../cases/case.ts';
import { Random } from '../cases/random.ts';
import { nativeVariants } from '../helpers/backends.ts';
import { budgeted, inputOf } from '../helpers/budget.ts';
import { editedCheckpoint, golden } from '../helpers/checkpoints.ts';
import { expectRejection } from '../helpers/errors.ts';
import { relativeError } from '../helpers/golden.ts';
import { bytesOf, type TensorBytes } from '../helpers/safetensors.ts';

const natives = nativeVariants();
const everywhere = [{ name: 'reference', options: { backend: 'reference' as const }, use() {} }, ...natives];
const scratch = mkdtempSync(join(tmpdir(), 'heddle-layer-weights-'));
afterAll(() => {
  rmSync(scratch, { recursive: true, force: true });
  if (natives.length > 0) setDefaults({ isa: 'auto' });
});

const EXPERT = /experts\.(\d+\.)?(gate|up|down)_proj\.weight$/;

/** The same random weights twice: as float8 codes with scales, and as the float32 values those stand for. */
function checkpoints(): { float8: string; float32: string } {
  const make = (stored: boolean) =>
    editedCheckpoint(scratch, 'deepseek_v3', (tensors: Record<string, TensorBytes>) => {
      const random = new Random(21);
      for (const [name, { dims }] of Object.entries(tensors)) {
        if (!EXPERT.test(name)) continue;
        const codes = Uint8Array.from({ length: dims[0] * dims[1] }, () => {
          const code = random.integer(0, 255);
          return (code & 0x7f) === 0x7f ? code - 1 : code; // 0x7f is NaN
        });
        const scale = Float32Array.of(Math.fround(0.0001 * (1 + random.integer(0, 999) / 1000)));
        if (stored) {
          tensors[name] = { dtype: 'F8_E4M3', dims, bytes: codes };
          tensors[`${name}_scale_inv`] = { dtype: 'F32', dims: [1, 1], bytes: bytesOf(scale) };
        } else {
          const values = Float32Array.from(codes, (c) => decodeE4M3(c) * scale[0]);
          tensors[name] = { dtype: 'F32', dims, bytes: bytesOf(values) };
        }
      }
    });
  return { float8: make(true), float32: make(false) };
}

describe('float8 checkpoints', () => {
  const dirs = checkpoints();
  const x = inputOf('deepseek_v3');

  it.each(everywhere)('hold the values of their codes and scales: $name', async ({ options, use }) => {
    use();
    const plain = await MoELayer.load(dirs.float32, { layer: 1, ...options });
    const decoded = await MoELayer.load(dirs.float8, { layer: 1, type: 'float32', ...options });
    const kept = await MoELayer.load(dirs.float8, { layer: 1, ...options });
    expect(kept.type).toBe('float8');
    const y = await plain.forward(x);
    expect(sameBits([await decoded.forward(x)], [y])).toBe(true);
    const eight = await kept.forward(x);
    expect(relativeError(eight.data as Float32Array, y.data as Float32Array)).toBeLessThan(5e-6);
    const { layer } = await budgeted(dirs.float8, 2, options);
    expect(sameBits([await layer.forward(x)], [eight])).toBe(true);
    for (const l of [plain, decoded, kept, layer]) l.dispose();
  });

  it('refuses scales that are missing, of another grid, or not finite', async () => {
    const name = 'model.layers.1.mlp.experts.3.up_proj.weight';
    const damaged = (change: (t: Record<string, TensorBytes>) => void) => {
      const directory = editedCheckpoint(scratch, 'deepseek_v3', (t) => {
        const c = openCheckpointSync(dirs.float8);
        for (const [n, { dtype, dims }] of c.tensors) t[n] = { dtype, dims, bytes: c.readBytesSync(n) };
        c.close();
        change(t);
      });
      return MoELayer.load(directory, { layer: 1 });
    };
    const scale = `${name}_scale_inv`;
    const bad = (change: (t: Record<string, TensorBytes>) => void, message: RegExp) =>
      expectRejection(damaged(change), 'ERR_CHECKPOINT', message);
    await bad((t) => delete t[scale], /experts\.3\.up_proj\.weight_scale_inv/);
    await bad((t) => {
      t[scale] = { dtype: 'F32', dims: [1, 2], bytes: new Uint8Array(8) };
    }, /up_proj\.weight_scale_inv has dims \[1, 2\], config.json makes it \[1, 1\]/);
    await bad((t) => {
      t[scale] = { dtype: 'F32', dims: [1, 1], bytes: bytesOf(Float32Array.of(Number.NaN)) };
    }, /expert 3 .*scales\.up\[0\]\[0, 0\] is NaN/);
    await expectRejection(
      damaged((t) => {
        t[name] = { dtype: 'F32', dims: t[name].dims, bytes: new Uint8Array(4 * 36 * 52) };
      }),
      'ERR_DTYPE',
      /experts\.3\.up_proj\.weight: type F32/,
    );
  });
});

describe('rounding options of MoELayer.load', () => {
  const dir = golden('gpt_oss_mxfp4');
  const x = inputOf('gpt_oss_mxfp4');
  const load = (options: object) => MoELayer.load(dir, { layer: 1, type: 'int4', ...options });

  it('reach every expert, with and without a budget', async () => {
    const exact = await MoELayer.load(dir, { layer: 1 });
    const y = (await exact.forward(x)).data as Float32Array;
    const errors: number[] = [];
    const calibration = { hidden: new Float32Array(exact.hiddenSize).fill(2) };
    for (const options of [{}, { search: true }, { symmetric: false, search: true }, { calibration }]) {
      const layer = await load(options);
      const out = await layer.forward(x);
      errors.push(relativeError(out.data as Float32Array, y));
      const { layer: small } = await budgeted(dir, 1, { type: 'int4', ...options });
      expect(sameBits([await small.forward(x)], [out])).toBe(true);
      layer.dispose();
      small.dispose();
    }
    const [plain, searched, asymmetric, calibrated] = errors;
    expect(searched).toBeLessThan(plain);
    expect(asymmetric).not.toBe(searched);
    expect(calibrated).not.toBe(plain);
    exact.dispose();
  });

  it('are refused where they mean nothing, before anything is packed', async () => {
    await expectRejection(
      MoELayer.load(dir, { layer: 1, type: 'int8', search: true }),
      'ERR_OPTION',
      /search needs type int4/,
    );
    const calibration = { hidden: new Float32Array(3) };
    const budget = { memoryBudget: 1 << 30 };
    await expectRejection(load({ calibration, ...budget }), 'ERR_SHAPE', /calibration\.hidden: expected/);
  });
});
