import { afterEach, describe, expect, it } from 'vitest';
import { info } from '../../lib/backend.ts';
import { cudaMemory, DeviceData, releaseCudaCache, setCudaMemoryLimit } from '../../lib/device.ts';
import { type HeddleError, Tensor } from '../../lib/index.ts';
import {
  combine,
  permute,
  planDispatch,
  planDispatchSync,
  routeSinkhorn,
  routeTopK,
  routeTopKSync,
  routeWithSync,
} from '../../lib/moe/index.ts';
import { Random } from '../cases/random.ts';
import { hasCuda } from '../helpers/cuda.ts';
import { expectRejection, expectThrow } from '../helpers/errors.ts';

const random = new Random(5);
const floats = (...dims: number[]) =>
  new Tensor(
    'float32',
    random.normals(
      dims.reduce((a, b) => a * b, 1),
      1,
    ),
    dims,
  );
const bytes = (t: Tensor) => Buffer.from(t.data.buffer, t.data.byteOffset, t.data.byteLength);

/** What is in use must be what was in use before. */
async function withoutLeak(run: () => unknown) {
  const before = cudaMemory();
  await run();
  const after = cudaMemory();
  expect({ ...after, cached: 0, peak: 0, pinned: 0 }).toEqual({ ...before, cached: 0, peak: 0, pinned: 0 });
}

describe.skipIf(!hasCuda())('tensors on cuda', () => {
  afterEach(() => setCudaMemoryLimit(0));

  it('info names the device', () => {
    const { cuda } = info().backends;
    expect(cuda.available).toBe(true);
    expect(cuda.device).toMatch(/compute capability \d+\.\d+/);
  });

  it('go there and come back bit by bit, of every type and size', () =>
    withoutLeak(async () => {
      const host = [
        floats(3, 5),
        new Tensor('bfloat16', Uint16Array.of(1, 0xffff, 0x7fc0), [3]),
        new Tensor('uint8', Uint8Array.of(7), [1, 1]),
        new Tensor('int64', BigInt64Array.of(-1n, 2n ** 62n), [2]),
        new Tensor('float64', Float64Array.of(Math.PI), [1]),
        new Tensor('int8', new Int8Array(0), [0, 4]),
        floats(1500, 1500), // larger than the staging buffers
      ];
      for (const t of host) {
        const device = await t.to('cuda');
        expect(device.location).toBe('cuda');
        expect(device.dims).toEqual(t.dims);
        expect(device.size).toBe(t.size);
        expect(device.data).toBeInstanceOf(DeviceData);
        for (const back of [await device.to('cpu'), device.toSync('cpu')]) {
          expect(back.location).toBe('cpu');
          expect(back.type).toBe(t.type);
          expect(bytes(back).equals(bytes(t))).toBe(true);
        }
        expect(await device.to('cuda')).toBe(device);
        device.dispose();
      }
      expect(await host[0].to('cpu')).toBe(host[0]);
    }));

  it('run a mixture of experts from routing to combination without leaving the device', () =>
    withoutLeak(async () => {
      const logits = floats(37, 16);
      const x = floats(37, 24);
      const k = 3;
      const capacity = 6;
      const reference = { backend: 'reference' } as const;
      const r = await routeTopK(logits, { k, ...reference });
      const p = await planDispatch(r.indices, { numExperts: 16, capacity, ...reference });
      const expected = await combine(await permute(x, p, reference), p, r.weights, reference);

      const d = { logits: await logits.to('cuda'), x: await x.to('cuda') };
      const routing = await routeTopK(d.logits, { k });
      expect(routing.indices.location).toBe('cuda');
      const plan = await planDispatch(routing.indices, { numExperts: 16, capacity });
      expect(plan.order.dims).toEqual(p.order.dims);
      expect(bytes(await plan.order.to('cpu')).equals(bytes(p.order))).toBe(true);
      expect(bytes(await plan.dropped.to('cpu')).equals(bytes(p.dropped))).toBe(true);
      const rows = await permute(d.x, plan);
      const out = await combine(rows, plan, routing.weights);
      expect(out.location).toBe('cuda');
      const given = await new Tensor('float32', new Float32Array(37 * 24), [37, 24]).to('cuda');
      expect(await combine(rows, plan, routing.weights, { out: given })).toMatchObject({ data: given.data });
      const actual = (await out.to('cpu')).data as Float32Array;
      const again = (await given.to('cpu')).data as Float32Array;
      actual.forEach((v, i) => {
        expect(Math.abs(v - (expected.data[i] as number))).toBeLessThan(1e-5);
        expect(again[i]).toBe(v);
      });
      const all = [
        d.logits,
        d.x,
        routing.indices,
        routing.weights,
        plan.order,
        plan.offsets,
        plan.inverse,
        plan.dropped,
        rows,
        out,
        given,
      ];
      for (const t of all) t.dispose();
    }));

  it('are reshaped in place, and views share memory', () =>
    withoutLeak(async () => {
      const t = await floats(4, 6).to('cuda');
      const view = t.reshape([2, 12]);
      expect(view.dims).toEqual([2, 12]);
      expect(view.data).toBe(t.data);
      expectThrow(() => t.reshape([5, 5]), 'ERR_SHAPE', /reshape: dims \[5, 5\] do not hold 24 elements/);
      view.dispose();
      expectThrow(
        () => routeTopKSync(t, { k: 1 }),
        'ERR_DISPOSED',
        /logits: the tensor on cuda was disposed/,
      );
      await expectRejection(t.to('cpu'), 'ERR_DISPOSED', /disposed/);
      t.dispose();
    }));

  it('keep their memory while a call uses it', () =>
    withoutLeak(async () => {
      const logits = floats(64, 32);
      const device = await logits.to('cuda');
      const running = routeTopK(device, { k: 2 });
      device.dispose();
      const routing = await running;
      const expected = routeTopKSync(logits, { k: 2, backend: 'reference' });
      expect(bytes(await routing.indices.to('cpu')).equals(bytes(expected.indices))).toBe(true);
      routing.indices.dispose();
      routing.weights.dispose();
    }));

  it('do not mix with tensors on the CPU', () =>
    withoutLeak(async () => {
      const device = await floats(4, 8).to('cuda');
      const bias = new Tensor('float32', new Float32Array(8), [8]);
      expectThrow(
        () => routeTopKSync(device, { k: 1, selectionBias: bias }),
        'ERR_ARGUMENT',
        /routeTopK: logits is on cuda but selectionBias is on cpu/,
      );
      expectThrow(
        () => routeTopKSync(device, { k: 1, backend: 'cpu' }),
        'ERR_BACKEND',
        /logits is on cuda, which backend cpu cannot read/,
      );
      expectThrow(() => routeTopKSync(device, { k: 1, backend: 'reference' }), 'ERR_BACKEND', /on cuda/);
      device.dispose();
    }));

  it('are refused by ops without a kernel, which also refuse backend cuda', async () => {
    const device = await floats(4, 8).to('cuda');
    await expectRejection(
      routeSinkhorn(device, { k: 1 }),
      'ERR_ARGUMENT',
      /location must be 'cpu', got 'cuda'/,
    );
    await expectRejection(
      routeSinkhorn(floats(4, 8), { k: 1, backend: 'cuda' }),
      'ERR_BACKEND',
      /routeSinkhorn does not run on cuda/,
    );
    device.dispose();
  });

  it('report the first value that is not allowed, as the CPU does', () =>
    withoutLeak(async () => {
      const logits = floats(5, 4);
      const ids = Int32Array.of(0, 1, 2, 9, 1, -7, 0, 0, 0, 0);
      const indices = new Tensor('int32', ids, [5, 2]);
      const text = /indices\[1, 1\] is 9: expected -1 to 3/;
      expectThrow(() => routeWithSync(indices, logits, { backend: 'cuda' }), 'ERR_VALUE', text);
      expectThrow(() => planDispatchSync(indices, { numExperts: 4, backend: 'cuda' }), 'ERR_VALUE', text);
      const device = [await indices.to('cuda'), await logits.to('cuda')];
      expectThrow(() => routeWithSync(device[0], device[1]), 'ERR_VALUE', text);
      await expectRejection(planDispatch(device[0], { numExperts: 4 }), 'ERR_VALUE', text);
      for (const t of device) t.dispose();
    }));

  it('say when memory runs out, and go on afterwards', async () => {
    releaseCudaCache();
    const logits = floats(64, 32);
    await withoutLeak(async () => {
      setCudaMemoryLimit(cudaMemory().live + 4096);
      await expectRejection(
        logits.to('cuda'),
        'ERR_MEMORY',
        /cannot allocate 2048 elements of float32 on cuda/,
      );
      expectThrow(() => routeTopKSync(logits, { k: 2, backend: 'cuda' }), 'ERR_MEMORY', /not enough memory/);
      await expectRejection(routeTopK(logits, { k: 2, backend: 'cuda' }), 'ERR_MEMORY', /not enough memory/);
      setCudaMemoryLimit(0);
      expect(routeTopKSync(logits, { k: 2, backend: 'cuda' }).indices.data).toEqual(
        routeTopKSync(logits, { k: 2, backend: 'reference' }).indices.data,
      );
    });
    expectThrow(() => setCudaMemoryLimit(-1), 'ERR_OPTION', /bytes must be/);
  });

  it('cache what is freed, within the limit, and give it back when asked', async () => {
    releaseCudaCache();
    expect(cudaMemory().cached).toBe(0);
    const { live } = cudaMemory();
    (await floats(1024).to('cuda')).dispose();
    expect(cudaMemory()).toMatchObject({ live, cached: 4096 });
    const again = await floats(1000).to('cuda');
    expect(cudaMemory()).toMatchObject({ live: live + 4096, cached: 0 });
    again.dispose();
    setCudaMemoryLimit(live + 7000);
    const other = await floats(1300).to('cuda'); // another size: the cached block has to go
    expect(cudaMemory().cached).toBe(0);
    other.dispose();
    releaseCudaCache();
    expect(cudaMemory()).toMatchObject({ live, cached: 0 });
  });

  it('are freed by the garbage collector when nobody disposes them', async () => {
    const { live } = cudaMemory();
    for (let i = 0; i < 8; i++) await floats(1000).to('cuda');
    expect(cudaMemory().live).toBeGreaterThan(live);
    const { setFlagsFromString } = await import('node:v8');
    const { runInNewContext } = await import('node:vm');
    setFlagsFromString('--expose-gc');
    const collect = runInNewContext('gc') as () => void;
    for (let i = 0; i < 50 && cudaMemory().live > live; i++) {
      collect();
      await new Promise((resolve) => setTimeout(resolve, 10));
    }
    expect(cudaMemory().live).toBeLessThanOrEqual(live);
  });

  it('many calls at once, each on its stream', () =>
    withoutLeak(async () => {
      const inputs = Array.from({ length: 24 }, (_, i) => floats(i + 1, 24));
      const results = await Promise.all(inputs.map((l) => routeTopK(l, { k: 3, backend: 'cuda' })));
      for (const [i, r] of results.entries()) {
        const expected = routeTopKSync(inputs[i], { k: 3, backend: 'reference' });
        expect(bytes(r.indices).equals(bytes(expected.indices))).toBe(true);
      }
    }));

  it('an aborted call rejects and leaks nothing', () =>
    withoutLeak(async () => {
      const controller = new AbortController();
      const calls = Array.from({ length: 10 }, () =>
        routeTopK(floats(200, 512), { k: 8, backend: 'cuda', signal: controller.signal }),
      );
      const settled = Promise.allSettled(calls);
      controller.abort();
      const outcomes = await settled;
      const rejected = outcomes.filter((o) => o.status === 'rejected');
      expect(rejected.length).toBeGreaterThan(0);
      for (const o of rejected) expect((o.reason as HeddleError).code).toBe('ERR_ABORTED');
    }));

  it('the event loop turns while the device works', async () => {
    let turns = 0;
    const timer = setInterval(() => turns++, 1);
    await routeTopK(floats(2000, 512), { k: 16, backend: 'cuda' });
    clearInterval(timer);
    // A GPU may be done within a turn; the shim takes many.
    if (info().backends.cuda.device?.includes('shim')) expect(turns).toBeGreaterThan(3);
  });
});
