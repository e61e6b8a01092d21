import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { packageRoot } from '../../lib/backend.ts';
import type { PeerSpec } from '../../test/cases/case.ts';
import { Random } from '../../test/cases/random.ts';
import { asyncEntrant, type Entrant } from '../harness.ts';
import { MAX_CONSTANT_BYTES, ONNX_FLOAT, ONNX_INT64, type OnnxGraph, onnxModel } from './onnxModel.ts';
import type { Peer } from './peer.ts';

/** The part of onnxruntime-node that is used here. */
interface Ort {
  Tensor: new (type: string, data: Float32Array, dims: number[]) => object;
  InferenceSession: { create(model: Uint8Array, options: object): Promise<OrtSession> };
}
interface OrtSession {
  run(feeds: Record<string, object>): Promise<Record<string, { data: ArrayLike<number | bigint> }>>;
  release(): Promise<void>;
}

export interface OnnxWork {
  graph: OnnxGraph;
  /** Data of the graph's inputs by name. */
  feeds: Record<string, Float32Array>;
  /** Other values of one input, taken in turn. */
  turns?: { input: string; data: Float32Array[] };
}

/** Graph and data of each op, by its name in a case's `peers.onnxruntime`. */
const OPS: Record<string, (spec: PeerSpec) => OnnxWork> = { route_softmax_topk: routeSoftmaxTopK, moe };

/** Softmax, TopK and, where wanted, the division by the sum: what an exported router becomes. */
function routeSoftmaxTopK(spec: PeerSpec): OnnxWork {
  const [tokens, experts, k] = [spec['tokens'], spec['experts'], spec['k']].map(Number);
  const top = spec['normalize'] ? 'top' : 'weights';
  const graph: OnnxGraph = {
    nodes: [
      { op: 'Softmax', inputs: ['logits'], outputs: ['scores'], attributes: { axis: -1 } },
      { op: 'TopK', inputs: ['scores', 'k'], outputs: [top, 'ids'], attributes: { axis: -1 } },
    ],
    constants: [{ name: 'k', type: ONNX_INT64, dims: [1], data: BigInt64Array.of(BigInt(k)) }],
    inputs: [{ name: 'logits', type: ONNX_FLOAT, dims: [tokens, experts] }],
    outputs: [
      { name: 'weights', type: ONNX_FLOAT, dims: [tokens, k] },
      { name: 'ids', type: ONNX_INT64, dims: [tokens, k] },
    ],
  };
  if (spec['normalize']) {
    graph.constants.push({ name: 'last', type: ONNX_INT64, dims: [1], data: BigInt64Array.of(1n) });
    graph.nodes.push(
      { op: 'ReduceSum', inputs: ['top', 'last'], outputs: ['sum'] },
      { op: 'Div', inputs: ['top', 'sum'], outputs: ['weights'] },
    );
  }
  return { graph, feeds: { logits: new Random(1).normals(tokens * experts, 2) } };
}

/** Cheap values for weights: a layer has too many for a good generator. */
function filler(count: number, scale: number): Float32Array {
  const out = new Float32Array(count);
  let s = 12345;
  for (let i = 0; i < count; i++) {
    s = (Math.imul(s, 1664525) + 1013904223) | 0;
    out[i] = (s / 2 ** 31) * scale;
  }
  return out;
}

/** com.microsoft MoE with SwiGLU: gate and up interleaved in fc1, plain SiLU (alpha 1, beta 0), logits as router input. */
function moe(spec: PeerSpec): OnnxWork {
  const [tokens, experts, k, hidden, intermediate] = [
    spec['tokens'],
    spec['experts'],
    spec['k'],
    spec['hidden'],
    spec['intermediate'],
  ].map(Number);
  const graph: OnnxGraph = {
    nodes: [
      {
        op: 'MoE',
        domain: 'com.microsoft',
        inputs: ['x', 'router', 'fc1', '', 'fc2'],
        outputs: ['y'],
        attributes: {
          k,
          activation_type: 'swiglu',
          swiglu_fusion: 1,
          activation_alpha: { float: 1 },
          activation_beta: { float: 0 },
          normalize_routing_weights: 1,
        },
      },
    ],
    constants: [],
    inputs: [
      { name: 'x', type: ONNX_FLOAT, dims: [tokens, hidden] },
      { name: 'router', type: ONNX_FLOAT, dims: [tokens, experts] },
    ],
    outputs: [{ name: 'y', type: ONNX_FLOAT, dims: [tokens, hidden] }],
  };
  const random = new Random(1);
  const feeds: OnnxWork['feeds'] = {
    x: random.normals(tokens * hidden),
    router: random.normals(tokens * experts),
  };
  // Few tokens touch few experts, which would otherwise stay in the last-level cache.
  const turns = {
    input: 'router',
    data: Array.from({ length: tokens <= 64 ? 8 : 1 }, () => random.normals(tokens * experts)),
  };
  const weights = [
    { name: 'fc1', dims: [experts, 2 * intermediate, hidden] },
    { name: 'fc2', dims: [experts, hidden, intermediate] },
  ].map((w) => ({
    ...w,
    type: ONNX_FLOAT,
    data: filler(
      w.dims.reduce((a, b) => a * b),
      0.03,
    ),
  }));
  // Constants, as in an exported model, are a little faster than inputs; only too large a layer falls back to those.
  const bytes = weights.reduce((sum, w) => sum + w.data.byteLength, 0);
  if (bytes <= MAX_CONSTANT_BYTES) graph.constants.push(...weights);
  else {
    for (const { data, ...tensor } of weights) {
      graph.inputs.push(tensor);
      feeds[tensor.name] = data;
    }
  }
  return { graph, feeds, turns };
}

function load(): { ort: Ort; version: string } {
  // bench/peers of a clone, else whatever the user's own project has installed.
  const own = join(packageRoot(), 'bench', 'peers', 'package.json');
  for (const from of [own, join(process.cwd(), 'package.json')]) {
    try {
      const require = createRequire(from);
      const { version } = require('onnxruntime-node/package.json') as { version: string };
      return { ort: require('onnxruntime-node') as Ort, version };
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'MODULE_NOT_FOUND') throw error;
    }
  }
  const remedy = existsSync(own) ? 'npm --prefix bench/peers ci' : 'npm install onnxruntime-node';
  throw new Error(`not installed (${remedy})`);
}

export interface OnnxruntimePeer extends Peer {
  /** The outputs of one run on the op's data, to compare with heddle's. */
  compute(
    spec: PeerSpec,
    threads: number,
  ): Promise<{ work: OnnxWork; outputs: Record<string, ArrayLike<number | bigint>> }>;
}

export async function connectOnnxruntime(): Promise<OnnxruntimePeer> {
  const { ort, version } = load();
  let last: OrtSession | null = null;
  async function prepare(spec: PeerSpec, threads: number) {
    const make = OPS[spec.op];
    if (!make) throw new Error(`onnxruntime: no op '${spec.op}'; it has: ${Object.keys(OPS).join(', ')}`);
    await last?.release();
    const work = make(spec);
    const session = await ort.InferenceSession.create(onnxModel(work.graph), {
      intraOpNumThreads: threads,
      interOpNumThreads: 1,
      executionProviders: ['cpu'],
    });
    last = session;
    const feeds = Object.fromEntries(
      work.graph.inputs.map((i) => [i.name, new ort.Tensor('float32', work.feeds[i.name], i.dims)]),
    );
    const { turns } = work;
    const dims = work.graph.inputs.find((i) => i.name === turns?.input)?.dims ?? [];
    const others = (turns?.data ?? []).map((data) => new ort.Tensor('float32', data, dims));
    let turn = 0;
    const next = () => {
      if (!turns || others.length === 0) return session.run(feeds);
      return session.run({ ...feeds, [turns.input]: others[turn++ % others.length] });
    };
    return { work, run: () => session.run(feeds), next };
  }
  return {
    name: 'onnxruntime',
    version,
    async entrant(spec: PeerSpec, threads: number): Promise<Entrant> {
      const { next } = await prepare(spec, threads);
      await next();
      return asyncEntrant('onnxruntime', next);
    },
    async compute(spec, threads) {
      const { work, run } = await prepare(spec, threads);
      const outputs = await run();
      return { work, outputs: Object.fromEntries(Object.entries(outputs).map(([n, t]) => [n, t.data])) };
    },
    close() {
      void last?.release();
    },
  };
}
