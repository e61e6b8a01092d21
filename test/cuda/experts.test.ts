import { afterEach, describe, expect, it } from 'vitest';
import { cudaMemory, setCudaMemoryLimit } from '../../lib/device.ts';
import { encodeFloats, type FloatType } from '../../lib/dtype.ts';
import {
  expertsForward,
  expertsForwardSync,
  type PackExpertsOptions,
  packExperts,
  packExpertsSync,
} from '../../lib/moe/experts.ts';
import type { Routing } from '../../lib/moe/routeTopK.ts';
import { Tensor } from '../../lib/tensor.ts';
import { Random } from '../cases/random.ts';
import { hasCuda } from '../helpers/cuda.ts';
import { expectRejection, expectThrow } from '../helpers/errors.ts';

const random = new Random(11);

interface Size {
  experts: number;
  d: number;
  f: number;
}

function sourcesOf({ experts, d, f }: Size) {
  const make = (rows: number, columns: number) =>
    new Tensor('float32', random.normals(experts * rows * columns, columns ** -0.5), [
      experts,
      rows,
      columns,
    ]);
  return { gate: make(f, d), up: make(f, d), down: make(d, f) };
}

function tokensOf(count: number, d: number, type: FloatType = 'float32') {
  return new Tensor(type, encodeFloats(random.normals(count * d), type) as never, [count, d]);
}

/** Every token to expert (token + slot) % experts. */
function routingOf(tokens: number, k: number, experts: number): Routing {
  const indices = Int32Array.from({ length: tokens * k }, (_, i) => (Math.floor(i / k) + (i % k)) % experts);
  const weights = Float32Array.from({ length: tokens * k }, () => random.uniform());
  return {
    indices: new Tensor('int32', indices, [tokens, k]),
    weights: new Tensor('float32', weights, [tokens, k]),
  };
}

function rowsOf(x: Tensor, r: Routing, begin: number, end: number): [Tensor, Routing] {
  const cut = (t: Tensor) => {
    const width = t.dims[1];
    return new Tensor(t.type, t.data.subarray(begin * width, end * width) as never, [end - begin, width]);
  };
  return [cut(x), { indices: cut(r.indices) as never, weights: cut(r.weights) as never }];
}

const bits = (t: Tensor) => Buffer.from(t.data.buffer, t.data.byteOffset, t.data.byteLength);
const live = () => {
  const { live: bytes, jobs } = cudaMemory();
  return { bytes, jobs };
};

describe.skipIf(!hasCuda())('expert compute on cuda', () => {
  afterEach(() => setCudaMemoryLimit(0));

  // 150 (100) rows an expert: the path for many; 17 (12): for some; 1 and 5: for few. Some sizes have more tiles than the shim has
  // blocks, so that blocks take several.
  const types: [string, Size, PackExpertsOptions][] = [
    ['float32', { experts: 2, d: 84, f: 36 }, {}],
    ['bfloat16', { experts: 2, d: 200, f: 420 }, { type: 'bfloat16' }],
    ['int8', { experts: 3, d: 100, f: 420 }, { type: 'int8' }],
    ['int4', { experts: 2, d: 160, f: 96 }, { type: 'int4' }],
    ['int4 with zero points', { experts: 2, d: 160, f: 96 }, { type: 'int4', symmetric: false }],
    ['int4 of 64', { experts: 2, d: 192, f: 64 }, { type: 'int4', groupSize: 64 }],
    [
      'int4 of 128 with zero points',
      { experts: 2, d: 256, f: 128 },
      { type: 'int4', groupSize: 128, symmetric: false },
    ],
    ['mxfp4', { experts: 2, d: 160, f: 96 }, { type: 'mxfp4' }],
    ['float8', { experts: 2, d: 140, f: 70 }, { type: 'float8' }],
  ];
  for (const [name, size, options] of types) {
    it(`${name}: a token has the same bits alone and in every batch, by every path`, () => {
      const before = live();
      const weights = packExpertsSync(sourcesOf(size), { ...options, backend: 'cuda' });
      const x = tokensOf(150, size.d);
      const routing = routingOf(150, 2, size.experts);
      const all = expertsForwardSync(x, routing, weights);
      for (const [begin, end] of [
        [0, 1],
        [149, 150],
        [60, 65],
        [100, 117],
      ]) {
        const part = expertsForwardSync(...rowsOf(x, routing, begin, end), weights);
        expect(bits(part).equals(bits(all).subarray(begin * size.d * 4, end * size.d * 4))).toBe(true);
      }
      weights.dispose();
      expect(live()).toEqual(before);
    });
  }

  it('one expert with few and many rows agrees with the reference', () => {
    const sources = sourcesOf({ experts: 1, d: 40, f: 24 });
    for (const tokens of [1, 9, 64, 130]) {
      const x = tokensOf(tokens, 40);
      const routing = routingOf(tokens, 1, 1);
      const run = (backend: 'cuda' | 'reference') => {
        const w = packExpertsSync(sources, { backend });
        const y = expertsForwardSync(x, routing, w).data as Float32Array;
        w.dispose();
        return y;
      };
      const [actual, expected] = [run('cuda'), run('reference')];
      for (const [i, v] of actual.entries()) expect(Math.abs(v - expected[i])).toBeLessThan(1e-5);
    }
  });

  it('more routes than one block plans: the same bits, masked ones too', () => {
    const weights = packExpertsSync(sourcesOf({ experts: 5, d: 20, f: 12 }), { backend: 'cuda' });
    const x = tokensOf(700, 20);
    const routing = routingOf(700, 2, 5);
    for (let i = 0; i < 1400; i += 7) routing.indices.data[i] = -1;
    const all = expertsForwardSync(x, routing, weights);
    for (const [begin, end] of [
      [0, 1],
      [300, 700],
    ]) {
      const part = expertsForwardSync(...rowsOf(x, routing, begin, end), weights);
      expect(bits(part).equals(bits(all).subarray(begin * 80, end * 80))).toBe(true);
    }
    routing.indices.data[1203] = 5;
    expectThrow(
      () => expertsForwardSync(x, routing, weights),
      'ERR_VALUE',
      /routing\.indices\[601, 1\] is 5/,
    );
    weights.dispose();
  });

  it('empty experts, masked routes, no routes and no tokens give what is left', () => {
    const sources = sourcesOf({ experts: 300, d: 16, f: 8 });
    const weights = packExpertsSync(sources, { backend: 'cuda' });
    const cpu = packExpertsSync(sources, { backend: 'cpu' });
    const x = tokensOf(3, 16);
    const routing: Routing = {
      indices: new Tensor('int32', Int32Array.of(299, -1, 0, -1, -1, 7), [3, 2]),
      weights: new Tensor('float32', new Float32Array(6).fill(1), [3, 2]),
    };
    const actual = expertsForwardSync(x, routing, weights).data as Float32Array;
    const expected = expertsForwardSync(x, routing, cpu).data as Float32Array;
    for (const [i, v] of actual.entries()) expect(Math.abs(v - expected[i])).toBeLessThan(1e-5);
    const masked = { ...routing, indices: new Tensor('int32', new Int32Array(6).fill(-1), [3, 2]) };
    expect([...(expertsForwardSync(x, masked, weights).data as Float32Array)]).toEqual(Array(48).fill(0));
    expect([...(expertsForwardSync(x, routingOf(3, 0, 1), weights).data as Float32Array)]).toEqual(
      Array(48).fill(0),
    );
    expect(expertsForwardSync(tokensOf(0, 16), routingOf(0, 2, 1), weights).dims).toEqual([0, 16]);
    weights.dispose();
    cpu.dispose();
  });

  it('a token that is not finite spoils its own row only', () => {
    for (const type of ['float32', 'bfloat16', 'int8', 'mxfp4', 'float8'] as const) {
      const sources = sourcesOf({ experts: 2, d: 64, f: 32 });
      const weights = packExpertsSync(sources, { type, backend: 'cuda' });
      const clean = tokensOf(6, 64);
      const x = new Tensor('float32', (clean.data as Float32Array).slice(), [6, 64]);
      x.data[2 * 64 + 5] = Number.NaN;
      x.data[4 * 64 + 9] = Infinity;
      const routing = routingOf(6, 2, 2);
      const actual = expertsForwardSync(x, routing, weights).data as Float32Array;
      const expected = expertsForwardSync(clean, routing, weights).data as Float32Array;
      for (const [i, v] of actual.entries()) {
        const row = Math.floor(i / 64);
        if (row === 2 || row === 4) expect(Number.isFinite(v)).toBe(false);
        else expect(v).toBe(expected[i]);
      }
      weights.dispose();
    }
  });

  it('works on tensors of the device, whatever their type, and leaves the result there', async () => {
    const before = live();
    const size = { experts: 3, d: 128, f: 48 };
    const cpu = await packExperts(sourcesOf(size), { type: 'bfloat16', backend: 'cpu' });
    const weights = await cpu.to('cuda');
    expect([cpu.location, weights.location, weights.backend]).toEqual(['cpu', 'cuda', 'cuda']);
    expect(await weights.to('cuda')).toBe(weights);
    expect(weights.bytes).toBeGreaterThanOrEqual(3 * 3 * 128 * 48 * 2);
    const shared = packExpertsSync(sourcesOf({ ...size, experts: 1 }), { backend: 'cuda' });
    const routing = routingOf(10, 2, 3);
    const gate = new Tensor('float32', random.normals(10), [10]);
    const deviceRouting = {
      indices: await routing.indices.to('cuda'),
      weights: await routing.weights.to('cuda'),
    };
    const deviceGate = await gate.to('cuda');
    for (const type of ['float32', 'bfloat16', 'float16'] as const) {
      const x = tokensOf(10, 128, type);
      const options = { shared, outType: type };
      const expected = await expertsForward(x, routing, weights, { ...options, sharedGate: gate });
      expect(expected.location).toBe('cpu');
      const on = await x.to('cuda');
      const actual = await expertsForward(on, deviceRouting, weights, { ...options, sharedGate: deviceGate });
      expect(actual.location).toBe('cuda');
      const out = await new Tensor(type, encodeFloats(new Float32Array(1280), type) as never, [10, 128]).to(
        'cuda',
      );
      const given = expertsForwardSync(on, deviceRouting, weights, {
        ...options,
        sharedGate: deviceGate,
        out,
      });
      expect(given.data).toBe(out.data);
      expect(bits(await actual.to('cpu')).equals(bits(expected))).toBe(true);
      expect(bits(await out.to('cpu')).equals(bits(expected))).toBe(true);
      for (const t of [on, actual, out]) t.dispose();
    }
    for (const h of [deviceRouting.indices, deviceRouting.weights, deviceGate, weights, shared, cpu])
      h.dispose();
    expect(live()).toEqual(before);
  });

  it('says what is where when weights and tensors do not meet', async () => {
    const sources = sourcesOf({ experts: 2, d: 16, f: 8 });
    const cpu = packExpertsSync(sources, { backend: 'cpu' });
    const cuda = packExpertsSync(sources, { backend: 'cuda' });
    const reference = packExpertsSync(sources, { backend: 'reference' });
    const shared = packExpertsSync(sourcesOf({ experts: 1, d: 16, f: 8 }), { backend: 'cpu' });
    const x = tokensOf(2, 16);
    const on = await x.to('cuda');
    const routing = routingOf(2, 2, 2);
    const onRouting = {
      indices: await routing.indices.to('cuda'),
      weights: await routing.weights.to('cuda'),
    };
    for (const w of [cpu, reference]) {
      expectThrow(
        () => expertsForwardSync(on, onRouting, w),
        'ERR_BACKEND',
        /x is on cuda but weights were packed for backend (cpu|reference); use await weights\.to\('cuda'\)/,
      );
    }
    expectThrow(
      () => expertsForwardSync(on, routing, cuda),
      'ERR_ARGUMENT',
      /x is on cuda but routing\.indices is on cpu/,
    );
    expectThrow(
      () => expertsForwardSync(x, routing, cuda, { backend: 'cpu' }),
      'ERR_BACKEND',
      /packed for backend cuda/,
    );
    expectThrow(
      () => expertsForwardSync(x, routing, cpu, { backend: 'cuda' }),
      'ERR_BACKEND',
      /packed for backend cpu/,
    );
    expectThrow(
      () => expertsForwardSync(x, routing, cuda, { shared }),
      'ERR_BACKEND',
      /packed for backend cpu/,
    );
    expectThrow(() => reference.toSync('cuda'), 'ERR_BACKEND', /backend reference/);
    expectThrow(() => cuda.toSync('cpu'), 'ERR_BACKEND', /backend cuda/);
    expectThrow(() => cpu.toSync('gpu' as never), 'ERR_OPTION', /'gpu'/);
    const wrong = { ...routing, indices: new Tensor('int32', Int32Array.of(0, 1, 2, 0), [2, 2]) };
    expectThrow(() => expertsForwardSync(x, wrong, cuda), 'ERR_VALUE', /routing\.indices\[1, 0\] is 2/);
    const onWrong = { ...onRouting, indices: await wrong.indices.to('cuda') };
    await expectRejection(expertsForward(on, onWrong, cuda), 'ERR_VALUE', /routing\.indices\[1, 0\] is 2/);
    for (const h of [on, onRouting.indices, onRouting.weights, onWrong.indices]) h.dispose();
    cuda.dispose();
    expectThrow(() => expertsForwardSync(x, routing, cuda), 'ERR_DISPOSED', /disposed/);
    for (const h of [cpu, reference, shared]) h.dispose();
  });

  it('dispose while a call runs frees the weights when it ends; limits and aborts leave nothing behind', async () => {
    const before = live();
    const size = { experts: 4, d: 64, f: 32 };
    const sources = sourcesOf(size);
    const weights = await packExperts(sources, { backend: 'cuda' });
    const [x, routing] = [tokensOf(5, 64), routingOf(5, 2, 4)];
    const expected = expertsForwardSync(x, routing, weights);
    const running = expertsForward(x, routing, weights);
    weights.dispose();
    expect(bits(await running).equals(bits(expected))).toBe(true);
    expect(live()).toEqual(before);

    setCudaMemoryLimit(4096);
    await expectRejection(packExperts(sources, { backend: 'cuda' }), 'ERR_MEMORY', /cuda/);
    setCudaMemoryLimit(0);
    const abort = new AbortController();
    const packing = packExperts(sources, { backend: 'cuda', signal: abort.signal });
    abort.abort();
    await expectRejection(packing, 'ERR_ABORTED', /aborted/);
    const cpu = packExpertsSync(sources, { backend: 'cpu' });
    const copying = cpu.to('cuda');
    cpu.dispose();
    await expectRejection(copying, 'ERR_DISPOSED', /disposed/);
    expect(live()).toEqual(before);
  });
});
