import { chmodSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, describe, expect, it } from 'vitest';
import { ONNX_FLOAT, onnxModel } from '../../bench/peers/onnxModel.ts';
import { connectOnnxruntime, type OnnxruntimePeer } from '../../bench/peers/onnxruntime.ts';
import { connectPytorch } from '../../bench/peers/pytorch.ts';
import { routeTopKSync } from '../../lib/moe/index.ts';
import { Tensor } from '../../lib/tensor.ts';
import { allCases } from '../cases/index.ts';
import { heddle } from './support.ts';

const folder = mkdtempSync(join(tmpdir(), 'heddle-peers-'));
afterAll(() => rmSync(folder, { recursive: true }));

describe('PyTorch peer', () => {
  const before = process.env['HEDDLE_PYTHON'];
  afterEach(() => {
    if (before === undefined) delete process.env['HEDDLE_PYTHON'];
    else process.env['HEDDLE_PYTHON'] = before;
  });

  it('gives its reason when the interpreter is missing', async () => {
    process.env['HEDDLE_PYTHON'] = join(folder, 'no-such-python');
    await expect(connectPytorch()).rejects.toThrow(/no-such-python.*ENOENT.*HEDDLE_PYTHON/);
    const run = ['bench', '--filter', 'routeTopK: one token', '--time', '0.02', '--buffer', '4', '--peers'];
    const { code, out } = await heddle(run);
    expect(code).toBe(0);
    expect(out).toMatch(/^peer pytorch: .*no-such-python/m);
  });

  // An interpreter of our own that speaks the protocol, so that the client is tested without PyTorch.
  it.skipIf(process.platform === 'win32')('speaks the line protocol', async () => {
    const script = join(folder, 'python');
    writeFileSync(
      script,
      `#!${process.execPath}
console.log(JSON.stringify({ ready: '9.9' }));
require('readline').createInterface({ input: process.stdin }).on('line', (line) => {
  const { op, threads, seconds } = JSON.parse(line);
  if (op === 'die') process.exit(3);
  console.log(JSON.stringify(op === 'known' ? { times: seconds ? [threads, seconds] : [] } : { error: 'no op ' + op }));
});`,
    );
    chmodSync(script, 0o755);
    process.env['HEDDLE_PYTHON'] = script;
    const peer = await connectPytorch();
    expect(peer.version).toBe('9.9');
    const entrant = await peer.entrant({ op: 'known' }, 2);
    expect(await entrant.round(0.5)).toEqual([2, 0.5]);
    await expect(peer.entrant({ op: 'unknown' }, 2)).rejects.toThrow('no op unknown');
    await expect(peer.entrant({ op: 'die' }, 2)).rejects.toThrow('python ended with code 3');
    peer.close();
  });
});

describe('onnx models', () => {
  it('are written as protobuf', () => {
    const graph = {
      nodes: [{ op: 'Relu', inputs: ['x'], outputs: ['y'] }],
      constants: [],
      inputs: [{ name: 'x', type: ONNX_FLOAT, dims: [300] }],
      outputs: [{ name: 'y', type: ONNX_FLOAT, dims: [300] }],
    };
    const bytes = onnxModel(graph);
    expect([...bytes.subarray(0, 2)]).toEqual([0x08, 8]); // field 1 (IR version), varint 8
    expect(bytes.includes(Buffer.from([0x22, 4, ...Buffer.from('Relu')]))).toBe(true); // field 4, four bytes
    expect(bytes.includes(Buffer.from([0x08, 0xac, 0x02]))).toBe(true); // 300 as a varint
  });
});

const ort: OnnxruntimePeer | string = await connectOnnxruntime().catch((e: Error) => e.message);
if (typeof ort === 'string') console.log(`onnxruntime peer tests skipped: ${ort}`);

describe.skipIf(typeof ort === 'string')('onnxruntime peer', () => {
  const peer = ort as OnnxruntimePeer;
  afterAll(() => peer.close());

  it('routes as heddle does', async () => {
    const spec = { op: 'route_softmax_topk', tokens: 20, experts: 64, k: 8, normalize: true };
    const { work, outputs } = await peer.compute(spec, 1);
    const own = routeTopKSync(new Tensor('float32', work.feeds['logits'], [20, 64]), {
      k: 8,
      normalize: true,
    });
    expect(Array.from(outputs['ids'], Number)).toEqual([...own.indices.data]);
    for (const [i, w] of own.weights.data.entries()) expect(Number(outputs['weights'][i])).toBeCloseTo(w, 5);
  });

  it('MoE node: SwiGLU experts on renormalised softmax routing', async () => {
    const [tokens, experts, k, hidden, intermediate] = [3, 4, 2, 8, 6];
    const spec = { op: 'moe', tokens, experts, k, hidden, intermediate };
    const { work, outputs } = await peer.compute(spec, 1);
    const { x, router } = work.feeds;
    const [fc1, fc2] = work.graph.constants.map((c) => c.data as Float32Array);
    const { indices, weights } = routeTopKSync(new Tensor('float32', router, [tokens, experts]), {
      k,
      normalize: true,
    });
    const dot = (a: Float32Array, i: number, b: ArrayLike<number>, j: number, n: number) => {
      let sum = 0;
      for (let c = 0; c < n; c++) sum += a[i + c] * b[j + c];
      return sum;
    };
    for (let t = 0; t < tokens; t++) {
      const y = new Float64Array(hidden);
      for (let j = 0; j < k; j++) {
        const e = indices.data[t * k + j];
        const row = (r: number) => dot(fc1, (e * 2 * intermediate + r) * hidden, x, t * hidden, hidden);
        const act = Float64Array.from({ length: intermediate }, (_, r) => {
          const gate = row(2 * r);
          return (gate / (1 + Math.exp(-gate))) * row(2 * r + 1);
        });
        for (let h = 0; h < hidden; h++) {
          y[h] += weights.data[t * k + j] * dot(fc2, (e * hidden + h) * intermediate, act, 0, intermediate);
        }
      }
      for (let h = 0; h < hidden; h++) {
        const difference = Math.abs(Number(outputs['y'][t * hidden + h]) - y[h]);
        expect(difference).toBeLessThan(1e-5 * Math.hypot(...y));
      }
    }
  });
});

describe('cases', () => {
  it('name peers by ops that exist', async () => {
    const { readFileSync } = await import('node:fs');
    const python = readFileSync(new URL('../../bench/peers/pytorch.py', import.meta.url), 'utf8');
    for (const c of allCases) {
      const op = c.peers?.pytorch?.op;
      if (op) expect(python, `${c.op}: ${c.name}`).toContain(`\ndef ${op}(`);
    }
  });
});
