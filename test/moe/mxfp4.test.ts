import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { decodeFloats, type FloatType } from '../../lib/dtype.ts';
import { openCheckpointSync, Tensor } from '../../lib/index.ts';
import {
  expertsBackwardSync,
  expertsForwardSync,
  MoELayer,
  type Mxfp4Blocks,
  packExpertsSync,
  type Routing,
  unpackMxfp4,
} from '../../lib/moe/index.ts';
import { compareOutputs, sameBits } from '../cases/case.ts';
import { Random } from '../cases/random.ts';
import { nativeVariants } from '../helpers/backends.ts';
import { editedCheckpoint, golden } from '../helpers/checkpoints.ts';
import { expectRejection, expectThrow } from '../helpers/errors.ts';

const everywhere = [
  { name: 'reference', options: { backend: 'reference' as const }, use() {} },
  ...nativeVariants(),
];
const u8 = (dims: number[], at: (i: number) => number = () => 0) =>
  new Tensor(
    'uint8',
    Uint8Array.from({ length: dims.reduce((a, b) => a * b, 1) }, (_, i) => at(i)),
    dims,
  );
const LAYER = 'model.layers.1.mlp.experts.';

describe('unpackMxfp4', () => {
  it('gives the weights transformers computes', () => {
    const c = openCheckpointSync(golden('gpt_oss_mxfp4'));
    const io = openCheckpointSync(join(golden('gpt_oss_mxfp4'), 'io.safetensors'));
    for (const [name, tensor] of [
      ['gate_up_proj', 'gate_up_expert_3'],
      ['down_proj', 'down_expert_3'],
    ]) {
      const blocks = c.readRangeSync(`${LAYER}${name}_blocks`, 3, 1);
      const scales = c.readRangeSync(`${LAYER}${name}_scales`, 3, 1);
      const expected = io.readSync(tensor);
      const bf16 = unpackMxfp4(blocks, scales, { type: 'bfloat16' });
      expect(bf16.dims).toEqual([1, ...expected.dims]);
      const f32 = unpackMxfp4(blocks, scales);
      expect(f32.type).toBe('float32');
      expect(Array.from(f32.data)).toEqual(
        Array.from(decodeFloats(expected.data, expected.type as FloatType)),
      );
      expect(Array.from(decodeFloats(bf16.data, 'bfloat16'))).toEqual(Array.from(f32.data));
    }
    c.close();
    io.close();
  });

  it('every code and scale has the value of its bits', () => {
    const e2m1 = (code: number) => {
      const [sign, exponent, mantissa] = [code & 8 ? -1 : 1, (code >> 1) & 3, code & 1];
      return sign * (exponent === 0 ? mantissa / 2 : (1 + mantissa / 2) * 2 ** (exponent - 1));
    };
    const scales = 253; // 0 to 252: all values are finite in float32
    const blocks = u8([scales, 1, 16], (i) => (i % 16) | ((15 - (i % 16)) << 4));
    const all = unpackMxfp4(
      blocks,
      u8([scales, 1], (i) => i),
    ).data as Float32Array;
    for (let s = 0; s < scales; s++) {
      for (let i = 0; i < 32; i++) {
        const code = i % 2 === 0 ? i / 2 : 15 - (i - 1) / 2;
        expect(all[s * 32 + i]).toBe(e2m1(code) * 2 ** (s - 127));
      }
    }
  });

  it('refuses what is not finite or not of the shape', () => {
    const scale = (e: number, code = 0) =>
      unpackMxfp4(
        u8([2, 3, 2, 16], (i) => (i === 11 * 16 + 5 ? code << 4 : 0)),
        u8([2, 3, 2], (i) => (i === 11 ? e : 120)),
      );
    expectThrow(() => scale(255), 'ERR_VALUE', /scales\[1, 2, 1\] is 255: e8m0 NaN; non-finite/);
    expectThrow(() => scale(254, 4), 'ERR_VALUE', /scales\[1, 2, 1\] is 254: values beyond float32/);
    expectThrow(() => scale(253, 14), 'ERR_VALUE', /scales\[1, 2, 1\] is 253/);
    expect(scale(254, 3).data[11 * 32 + 11]).toBe(1.5 * 2 ** 127);
    expect(scale(253, 13).data[11 * 32 + 11]).toBe(-3 * 2 ** 126);
    expect(scale(252, 7).data[11 * 32 + 11]).toBe(6 * 2 ** 125);
    expectThrow(() => unpackMxfp4(u8([2, 3, 8]), u8([2, 3])), 'ERR_SHAPE', /blocks: expected .*16\]/);
    expectThrow(() => unpackMxfp4(u8([2, 3, 16]), u8([3, 2])), 'ERR_SHAPE', /scales: expected \[2, 3\]/);
    expectThrow(() => unpackMxfp4(u8([16]), u8([1])), 'ERR_SHAPE', /blocks/);
    const floats = new Tensor('float32', new Float32Array(6), [2, 3]);
    expectThrow(() => unpackMxfp4(u8([2, 3, 16]), floats), 'ERR_DTYPE', /scales/);
    const options = (o: object) => () => unpackMxfp4(u8([2, 3, 16]), u8([2, 3]), o);
    expectThrow(options({ type: 'float16' }), 'ERR_OPTION', /^type/);
    expectThrow(options({ dtype: 'float32' }), 'ERR_OPTION', /'dtype'/);
  });
});

/** Random blocks of `[experts, rows, inputs]` with exponents that differ from block to block. */
function randomBlocks(random: Random, experts: number, rows: number, inputs: number): Mxfp4Blocks {
  const byte = () => random.integer(0, 255);
  return {
    blocks: u8([experts, rows, inputs / 32, 16], byte),
    scales: u8([experts, rows, inputs / 32], () => random.integer(117, 124)),
  };
}

const plain = (m: Mxfp4Blocks) => unpackMxfp4(m.blocks, m.scales);

describe.each(everywhere)('packExperts of MXFP4 blocks on $name', ({ options, use }) => {
  const random = new Random(77);
  const [tokens, experts, k, d, f] = [21, 3, 2, 96, 64];
  const x = new Tensor('float32', random.normals(tokens * d), [tokens, d]);
  const routing: Routing = {
    indices: new Tensor(
      'int32',
      Int32Array.from({ length: tokens * k }, (_, i) => i % experts),
      [tokens, k],
    ),
    weights: new Tensor(
      'float32',
      Float32Array.from({ length: tokens * k }, () => random.uniform()),
      [tokens, k],
    ),
  };
  const gateUp = randomBlocks(random, experts, 2 * f, d);
  const gate = randomBlocks(random, experts, f, d);
  const up = randomBlocks(random, experts, f, d);
  const down = randomBlocks(random, experts, d, f);

  it.each(['mxfp4', 'float32', 'bfloat16', 'int8', 'int4'] as const)(
    '%s: the same bits as from the dequantised weights, in every arrangement',
    (type) => {
      use();
      // Rounding a block's own values to MXFP4 again keeps each of them, so even mxfp4 must agree.
      for (const interleaved of [true, false]) {
        const a = packExpertsSync({ gateUp, down, interleaved }, { ...options, type });
        const b = packExpertsSync(
          { gateUp: plain(gateUp), down: plain(down), interleaved },
          { ...options, type },
        );
        expect(sameBits([expertsForwardSync(x, routing, a)], [expertsForwardSync(x, routing, b)])).toBe(true);
      }
      for (const s of [
        { gate, up, down },
        { up, down },
      ]) {
        const a = packExpertsSync(s, { ...options, type });
        const b = packExpertsSync(
          { gate: s.gate && plain(s.gate), up: plain(s.up), down: plain(s.down) },
          { ...options, type },
        );
        expect(sameBits([expertsForwardSync(x, routing, a)], [expertsForwardSync(x, routing, b)])).toBe(true);
      }
    },
  );

  it('is mxfp4 by default and agrees with the reference', () => {
    use();
    const weights = packExpertsSync({ gateUp, down, interleaved: true }, options);
    expect(weights.type).toBe('mxfp4');
    expect(weights.groupSize).toBe(32);
    const reference = packExpertsSync({ gateUp, down, interleaved: true }, { backend: 'reference' });
    const difference = compareOutputs(
      [expertsForwardSync(x, routing, weights)],
      [expertsForwardSync(x, routing, reference)],
    );
    expect(difference.relative).toBeLessThan(5e-3);
  });

  it('has no backward', () => {
    use();
    const gradient = new Tensor('float32', new Float32Array(tokens * d), [tokens, d]);
    expectThrow(
      () => expertsBackwardSync(gradient, x, routing, { gateUp, down }, options),
      'ERR_DTYPE',
      /^down: MXFP4 blocks have no gradient/,
    );
  });

  it('refuses bad blocks', () => {
    use();
    const pack = (s: object, o: object = {}) => packExpertsSync(s as never, { ...options, ...o });
    const scales = new Uint8Array(gateUp.scales.data as Uint8Array);
    scales[5] = 255;
    const bad = { ...gateUp, scales: new Tensor('uint8', scales, gateUp.scales.dims) };
    expectThrow(() => pack({ gateUp: bad, down }), 'ERR_VALUE', /^gateUp\.scales\[0, 1, 2\] is 255/);
    expectThrow(() => pack({ gateUp: plain(gateUp), down }), 'ERR_DTYPE', /gateUp is float32, down is mxfp4/);
    expectThrow(() => pack({ gateUp, down, layout: 'in-out' }), 'ERR_OPTION', /layout.*out-in/);
    expectThrow(() => pack({ gateUp: down, down }), 'ERR_SHAPE', /^gateUp: expected \[128, 96\]/);
    expectThrow(() => pack({ gateUp: { blocks: gateUp.blocks }, down }), 'ERR_ARGUMENT', /^gateUp\.scales/);
    expectThrow(() => pack({ gateUp: { ...gateUp, scale: 1 }, down }), 'ERR_OPTION', /'scale'/);
    expectThrow(() => pack({ gateUp, down }, { groupSize: 64 }), 'ERR_OPTION', /groupSize must be 32/);
    expectThrow(() => pack({ gateUp, down }, { type: 'int4', groupSize: 64 }), 'ERR_OPTION', /96 inputs/);
  });
});

describe('MoELayer of an MXFP4 checkpoint', () => {
  const scratch = mkdtempSync(join(tmpdir(), 'heddle-mxfp4-'));
  afterAll(() => rmSync(scratch, { recursive: true, force: true }));
  const io = openCheckpointSync(join(golden('gpt_oss_mxfp4'), 'io.safetensors'));
  const input = io.readSync('input');
  const output = io.readSync('output_float64');

  it.each(everywhere)(
    'stays near float64 and agrees with the reference on $name',
    async ({ options, use }) => {
      use();
      const layer = await MoELayer.load(golden('gpt_oss_mxfp4'), { layer: 1, ...options });
      expect(layer.type).toBe('mxfp4');
      const reference = await MoELayer.load(golden('gpt_oss_mxfp4'), { layer: 1, backend: 'reference' });
      const y = await layer.forward(input);
      const widened = new Tensor('float64', Float64Array.from(y.data as Float32Array), y.dims);
      // Activations are quantised to int8 for the products; the weights are exact (type float32 in layer.test.ts).
      expect(compareOutputs([widened], [output]).relative).toBeLessThan(0.02);
      expect(compareOutputs([y], [await reference.forward(input)]).relative).toBeLessThan(5e-3);
      layer.dispose();
    },
  );

  it('refuses damaged tensors, naming expert and tensor', async () => {
    const edited = (edit: Parameters<typeof editedCheckpoint>[2]) =>
      MoELayer.load(editedCheckpoint(scratch, 'gpt_oss_mxfp4', edit), { layer: 1 });
    await expectRejection(
      edited((t) => (t[`${LAYER}down_proj_scales`].bytes[2 * 64 * 3 + 4] = 255)),
      'ERR_CHECKPOINT',
      /expert 2 .*down\.scales\[0, 1, 1\] is 255: e8m0 NaN; non-finite scales/,
    );
    await expectRejection(
      edited((t) => (t[`${LAYER}gate_up_proj_blocks`].dims = [5, 192, 1, 32])),
      'ERR_CHECKPOINT',
      /gate_up_proj_blocks has dims \[5, 192, 1, 32\], config.json makes it \[5, 192, 2, 16\]/,
    );
    await expectRejection(
      edited((t) => (t[`${LAYER}gate_up_proj_scales`].dtype = 'I8')),
      'ERR_DTYPE',
      /gate_up_proj_scales: type I8 .* uint8/,
    );
    await expectRejection(
      edited((t) => delete t[`${LAYER}down_proj_scales`]),
      'ERR_CHECKPOINT',
      /no tensor .*down_proj_scales/,
    );
  });
});
