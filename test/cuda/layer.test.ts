import { describe, expect, it } from 'vitest';
import { cudaMemory, setCudaMemoryLimit } from '../../lib/device.ts';
import { decodeFloats, encodeFloats } from '../../lib/dtype.ts';
import { linearSync, type WeightType } from '../../lib/gemm/linear.ts';
import { Tensor } from '../../lib/index.ts';
import { expertsForwardSync } from '../../lib/moe/experts.ts';
import { MoELayer } from '../../lib/moe/index.ts';
import type { Parts } from '../../lib/moe/load.ts';
import { sameBits } from '../cases/case.ts';
import { golden, goldenIo, goldenLayers } from '../helpers/checkpoints.ts';
import { hasCuda } from '../helpers/cuda.ts';
import { expectRejection, expectThrow } from '../helpers/errors.ts';
import { relativeError } from '../helpers/golden.ts';

const live = () => {
  const { live: bytes, jobs } = cudaMemory();
  return { bytes, jobs };
};

describe.skipIf(!hasCuda())('MoELayer on cuda', () => {
  it.each(goldenLayers)('%s matches transformers, on the device and from the host', async (name) => {
    const before = live();
    const { input, output, logits, indices, weights } = goldenIo(name);
    const layer = await MoELayer.load(golden(name), { layer: 1, type: 'float32', backend: 'cuda' });
    expect([layer.backend, layer.location]).toEqual(['cuda', 'cuda']);
    const loaded = live();
    expect(layer.bytes).toBeGreaterThan(0);
    const x = await input.to('cuda');

    const routing = await layer.route(x);
    const routed = [routing.logits, routing.indices, routing.weights];
    expect(routed.map((t) => t.location)).toEqual(['cuda', 'cuda', 'cuda']);
    const [l, i, w] = await Promise.all(routed.map((t: Tensor) => t.to('cpu')));
    expect(Array.from(i.data as Int32Array)).toEqual(Array.from(indices));
    expect(relativeError(l.data as Float32Array, logits)).toBeLessThan(2e-6);
    expect(relativeError(w.data as Float32Array, weights)).toBeLessThan(2e-6);
    const onHost = layer.routeSync(input);
    expect(sameBits([onHost.logits, onHost.indices, onHost.weights] as Tensor[], [l, i, w])).toBe(true);
    // The one job has the bits of the ops one by one.
    const { experts, shared, sharedGate } = (layer as unknown as { parts: Parts }).parts;
    const flat = x.reshape([l.dims[0], layer.hiddenSize]);
    const open = sharedGate && linearSync(flat, sharedGate, { activation: 'sigmoid' });
    const gate = open?.reshape([open.size]);
    const single = expertsForwardSync(flat, routing, experts, { shared, sharedGate: gate });
    const expected = single.reshape(input.dims).toSync('cpu');
    for (const t of [...routed, single, open]) t?.dispose();

    const y = await layer.forward(x);
    expect([y.location, y.type]).toEqual(['cuda', 'float32']);
    expect(y.dims).toEqual(input.dims);
    const result = await y.to('cpu');
    expect(relativeError(result.data as Float32Array, output)).toBeLessThan(2e-5);
    expect(sameBits([result], [expected])).toBe(true);
    const sync = layer.forwardSync(x);
    expect(sameBits([sync.toSync('cpu')], [result])).toBe(true);
    const fromHost = await layer.forward(input);
    expect(fromHost.location).toBe('cpu');
    expect(sameBits([fromHost, layer.forwardSync(input)], [result, result])).toBe(true);
    for (const t of [x, y, sync]) t.dispose();
    expect(live()).toEqual(loaded); // nothing between the ops stays
    layer.dispose();
    expect(live()).toEqual(before);
  });

  const packed: [string, WeightType | undefined, object][] = [
    ['mixtral_bf16', undefined, {}],
    ['gpt_oss_mxfp4', undefined, {}],
    ['qwen2_moe', 'int8', {}],
    ['qwen3_moe', 'float8', {}],
    ['gpt_oss_mxfp4', 'int4', { symmetric: false }],
  ];
  it.each(packed)('%s as %s: what the CPU computes', async (name, type, options) => {
    const { input } = goldenIo(name);
    const load = (backend: 'cpu' | 'cuda') =>
      MoELayer.load(golden(name), { layer: 1, type, ...options, backend });
    const [cpu, cuda] = [await load('cpu'), await load('cuda')];
    expect(cuda.type).toBe(cpu.type);
    for (const xType of ['float32', 'bfloat16', 'float16'] as const) {
      const x = new Tensor(xType, encodeFloats(input.data, xType) as never, input.dims);
      const [actual, expected] = [await cuda.forward(x), await cpu.forward(x)];
      expect([actual.type, expected.type]).toEqual([xType, xType]);
      const [a, e] = [actual, expected].map((t) => decodeFloats(t.data, xType));
      expect(relativeError(a, e)).toBeLessThan(1e-2);
    }
    cpu.dispose();
    cuda.dispose();
  });

  it('no tokens, a layer in use that is disposed, an abort, and too little memory', async () => {
    const before = live();
    const { input } = goldenIo('qwen2_moe');
    const layer = await MoELayer.load(golden('qwen2_moe'), { layer: 1, backend: 'cuda' });
    const none = await new Tensor('float32', new Float32Array(0), [0, layer.hiddenSize]).to('cuda');
    const empty = await layer.forward(none);
    expect(empty.dims).toEqual([0, layer.hiddenSize]);
    for (const t of [none, empty]) t.dispose();

    const x = await input.to('cuda');
    const abort = new AbortController();
    abort.abort();
    await expectRejection(layer.forward(x, { signal: abort.signal }), 'ERR_ABORTED', /aborted/);
    const loaded = live();
    setCudaMemoryLimit(loaded.bytes + 600);
    await expectRejection(layer.forward(x), 'ERR_MEMORY', /cuda|memory/);
    setCudaMemoryLimit(0);
    expect(live()).toEqual(loaded);

    const running = layer.forward(x);
    layer.dispose();
    (await running).dispose();
    await expectRejection(layer.forward(x), 'ERR_DISPOSED', /disposed/);
    x.dispose();
    expect(live()).toEqual(before);

    setCudaMemoryLimit(before.bytes + 4096);
    const loading = MoELayer.load(golden('qwen2_moe'), { layer: 1, backend: 'cuda' });
    await expectRejection(loading, 'ERR_MEMORY', /cuda/);
    setCudaMemoryLimit(0);
    expect(live()).toEqual(before);
  });

  it('says what the device does not do', async () => {
    const { input } = goldenIo('mixtral');
    const budget = { layer: 1, backend: 'cuda' as const, memoryBudget: 1 << 20 };
    await expectRejection(MoELayer.load(golden('mixtral'), budget), 'ERR_OPTION', /memoryBudget.*cuda/);
    const cpu = await MoELayer.load(golden('mixtral'), { layer: 1, backend: 'cpu' });
    const x = await input.to('cuda');
    await expectRejection(cpu.forward(x), 'ERR_BACKEND', /x is on cuda but the MoE layer .* backend cpu/);
    expectThrow(() => cpu.routeSync(x), 'ERR_BACKEND', /load it with backend 'cuda'/);
    x.dispose();
    cpu.dispose();
  });
});
