import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { packageRoot } from '../../lib/backend.ts';
import type { PeerSpec } from '../../test/cases/case.ts';
import { Random } from '../../test/cases/random.ts';
import { asyncEntrant, type Entrant } from '../harness.ts';
import {
  MAX_CONSTANT_BYTES,
  ONNX_FLOAT,
  ONNX_INT64,
  ONNX_UINT8,
  type OnnxGraph,
  type OnnxTensor,
  onnxModel,
} from './onnxModel.ts';
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
  /** Works of the same name have the same graph: one session serves them, one after the other. */
  session?: string;
}

/** The sizes of a tensor of the graph, whose one size of -1 follows from the data. */
function dimsOf(tensor: OnnxTensor, length: number): number[] {
  const known = tensor.dims.reduce((a, b) => (b < 0 ? a : a * b), 1);
  return tensor.dims.map((d) => (d < 0 ? length / known : d));
}

/** Graph and data of each op, by its name in a case's `peers.onnxruntime`. */
const OPS: Record<string, (spec: PeerSpec) => OnnxWork> = {
  route_softmax_topk: routeSoftmaxTopK,
  moe,
  qmoe,
  attention,
};

/** com.microsoft MultiHeadAttention: fp32, q, k, v as `[batch, sequence, heads * dim]`; causal is `unidirectional`. */
function attention(spec: PeerSpec): OnnxWork {
  const [batch, queries, keys, heads, dim] = ['batch', 'queries', 'keys', 'heads', 'dim'].map((n) =>
    Number(spec[n]),
  );
  const input = (name: string, length: number) => ({
    name,
    type: ONNX_FLOAT,
    dims: [batch, length, heads * dim],
  });
  const inputs = [input('q', queries), input('k', keys), input('v', keys)];
  const graph: OnnxGraph = {
    nodes: [
      {
        op: 'MultiHeadAttention',
        domain: 'com.microsoft',
        inputs: ['q', 'k', 'v'],
        outputs: ['y'],
        attributes: { num_heads: heads, unidirectional: spec['causal'] ? 1 : 0 },
      },
    ],
    constants: [],
    inputs,
    outputs: [input('y', queries)],
  };
  const random = new Random(1);
  const feeds = Object.fromEntries(
    inputs.map((t) => [t.name, random.normals(t.dims.reduce((a, b) => a * b))]),
  );
  return { graph, feeds };
}

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

interface MoeShape {
  tokens: number;
  experts: number;
  k: number;
  hidden: number;
  intermediate: number;
}

function moeShape(spec: PeerSpec): MoeShape {
  const number = (name: string) => Number(spec[name]);
  return {
    tokens: number('tokens'),
    experts: number('experts'),
    k: number('k'),
    hidden: number('hidden'),
    intermediate: number('intermediate'),
  };
}

/** SwiGLU: gate and up interleaved in fc1, plain SiLU (alpha 1, beta 0), logits as router input. */
const SWIGLU = {
  activation_type: 'swiglu',
  swiglu_fusion: 1,
  activation_alpha: { float: 1 },
  activation_beta: { float: 0 },
  normalize_routing_weights: 1,
};

function moeWork(
  { tokens, experts, k, hidden, intermediate }: MoeShape,
  op: string,
  weightInputs: string[],
  attributes: Record<string, number>,
): Required<OnnxWork> {
  const random = new Random(1);
  const graph: OnnxGraph = {
    nodes: [
      {
        op,
        domain: 'com.microsoft',
        inputs: ['x', 'router', ...weightInputs],
        outputs: ['y'],
        attributes: { k, ...SWIGLU, ...attributes },
      },
    ],
    constants: [],
    inputs: [
      { name: 'x', type: ONNX_FLOAT, dims: [-1, hidden] },
      { name: 'router', type: ONNX_FLOAT, dims: [-1, experts] },
    ],
    outputs: [{ name: 'y', type: ONNX_FLOAT, dims: [-1, hidden] }],
  };
  const feeds = { x: random.normals(tokens * hidden), router: random.normals(tokens * experts) };
  // Few tokens touch few experts, which would otherwise stay in the last-level cache.
  const data = Array.from({ length: tokens <= 64 ? 8 : 1 }, () => random.normals(tokens * experts));
  const session = JSON.stringify([op, experts, k, hidden, intermediate, attributes]);
  return { graph, feeds, turns: { input: 'router', data }, session };
}

/** The weights of the last layer asked for: filling gigabytes takes longer than timing them. */
let lastWeights: { session: string; weights: Required<OnnxTensor>[] } | null = null;

function weightsOf(session: string, make: () => Required<OnnxTensor>[]): Required<OnnxTensor>[] {
  if (lastWeights?.session !== session) {
    lastWeights = null; // before the next are made: there may not be room for both
    lastWeights = { session, weights: make() };
  }
  return lastWeights.weights;
}

/** com.microsoft MoE. */
function moe(spec: PeerSpec): OnnxWork {
  const shape = moeShape(spec);
  const { experts, hidden, intermediate } = shape;
  const work = moeWork(shape, 'MoE', ['fc1', '', 'fc2'], {});
  const weights = weightsOf(work.session, () =>
    [
      { name: 'fc1', dims: [experts, 2 * intermediate, hidden] },
      { name: 'fc2', dims: [experts, hidden, intermediate] },
    ].map((w) => ({
      ...w,
      type: ONNX_FLOAT,
      data: filler(
        w.dims.reduce((a, b) => a * b),
        0.03,
      ),
    })),
  );
  // Constants, as in an exported model, are a little faster than inputs; only too large a layer falls back to those.
  const bytes = weights.reduce((sum, w) => sum + w.data.byteLength, 0);
  if (bytes <= MAX_CONSTANT_BYTES) work.graph.constants.push(...weights);
  else {
    for (const { data, ...tensor } of weights) {
      work.graph.inputs.push(tensor);
      work.feeds[tensor.name] = data as Float32Array;
    }
  }
  return work;
}

/** com.microsoft QMoE: 8 bits with one scale per output, or 4 bits with one scale per 32 inputs. */
function qmoe(spec: PeerSpec): OnnxWork {
  const shape = moeShape(spec);
  const { experts, hidden, intermediate } = shape;
  const bits = Number(spec['bits']);
  const block = bits === 4 ? 32 : 0;
  const work = moeWork(shape, 'QMoE', ['fc1', 'fc1_scales', '', 'fc2', 'fc2_scales', ''], {
    expert_weight_bits: bits,
    ...(block ? { block_size: block } : {}),
  });
  const matrix = (name: string, rows: number, columns: number): Required<OnnxTensor>[] => {
    const values = new Uint8Array((experts * rows * columns * bits) / 8);
    for (let i = 0, s = 1; i < values.length; i++) {
      s = (Math.imul(s, 1664525) + 1013904223) | 0;
      values[i] = s >>> 24;
    }
    const scaleDims = block ? [experts, rows, columns / block] : [experts, rows];
    const scales = new Float32Array(scaleDims.reduce((a, b) => a * b)).fill(bits === 4 ? 0.004 : 0.0003);
    return [
      { name, type: ONNX_UINT8, dims: [experts, rows, (columns * bits) / 8], data: values },
      { name: `${name}_scales`, type: ONNX_FLOAT, dims: scaleDims, data: scales },
    ];
  };
  work.graph.constants.push(
    ...weightsOf(work.session, () => [
      ...matrix('fc1', 2 * intermediate, hidden),
      ...matrix('fc2', hidden, intermediate),
    ]),
  );
  return work;
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
  let last: { session: OrtSession; name: string | undefined } | null = null;
  async function prepare(spec: PeerSpec, threads: number) {
    const make = OPS[spec.op];
    if (!make) throw new Error(`onnxruntime: no op '${spec.op}'; it has: ${Object.keys(OPS).join(', ')}`);
    const work = make(spec);
    const name = work.session === undefined ? undefined : `${work.session} on ${threads} threads`;
    if (last === null || name === undefined || last.name !== name) {
      await last?.session.release();
      last = null;
      const created = await ort.InferenceSession.create(onnxModel(work.graph), {
        intraOpNumThreads: threads,
        interOpNumThreads: 1,
        executionProviders: ['cpu'],
      });
      last = { session: created, name };
    }
    const { session } = last;
    const tensor = (input: OnnxTensor, data: Float32Array) =>
      new ort.Tensor('float32', data, dimsOf(input, data.length));
    const feeds = Object.fromEntries(work.graph.inputs.map((i) => [i.name, tensor(i, work.feeds[i.name])]));
    const { turns } = work;
    const turning = work.graph.inputs.find((i) => i.name === turns?.input) as OnnxTensor;
    const others = (turns?.data ?? []).map((data) => tensor(turning, data));
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
      void last?.session.release();
    },
  };
}
