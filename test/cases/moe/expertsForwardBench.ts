import {
  type ExpertWeights,
  expertsForward,
  expertsForwardSync,
  packExpertsSync,
} from '../../../lib/moe/experts.ts';
import type { Routing } from '../../../lib/moe/routeTopK.ts';
import type { OpOptions } from '../../../lib/op.ts';
import type { WeightType } from '../../../lib/reference/gemm/quantize.ts';
import { Tensor } from '../../../lib/tensor.ts';
import type { OpCase, PeerSpec, PreparedCase } from '../case.ts';
import { Random } from '../random.ts';

interface Model {
  name: string;
  experts: number;
  k: number;
  hidden: number;
  intermediate: number;
  /** Too large in float32 to stand beside a peer's copy on a 24 GiB machine. */
  alone?: boolean;
  clamped?: boolean;
}

/**
 * One layer of each model. DeepSeek-V3's 256 experts are 45 GB in float32; its name says how many of them stand here,
 * which changes the experts that a batch spreads over but not the cost of a token.
 */
const models: Model[] = [
  { name: '64/8/2048/768', experts: 64, k: 8, hidden: 2048, intermediate: 768 },
  { name: '8/2/2048/7168', experts: 8, k: 2, hidden: 2048, intermediate: 7168 },
  { name: 'Qwen3-30B-A3B', experts: 128, k: 8, hidden: 2048, intermediate: 768 },
  { name: 'OLMoE', experts: 64, k: 8, hidden: 2048, intermediate: 1024 },
  { name: 'gpt-oss-20b', experts: 32, k: 4, hidden: 2880, intermediate: 2880, clamped: true },
  { name: 'Mixtral-8x7B', experts: 8, k: 2, hidden: 4096, intermediate: 14336, alone: true },
  {
    name: 'DeepSeek-V3 (32 of 256 experts)',
    experts: 32,
    k: 8,
    hidden: 7168,
    intermediate: 2048,
    alone: true,
  },
];

const TOKENS = [1, 4, 8, 16, 64, 512, 4096];
const TYPES: WeightType[] = ['float32', 'bfloat16', 'float8', 'int8', 'int4', 'mxfp4'];
const BYTES_PER_WEIGHT: Record<WeightType, number> = {
  float32: 4,
  bfloat16: 2,
  float8: 1 + 4 / 128,
  int8: 1,
  int4: 0.5 + 4 / 32,
  mxfp4: 0.5 + 1 / 32,
};
const TOLERANCE: Record<WeightType, number> = {
  float32: 5e-6,
  bfloat16: 5e-3,
  float8: 5e-6,
  int8: 5e-3,
  int4: 5e-3,
  mxfp4: 5e-3,
};

// Few tokens touch few experts: a fixed routing would find them in the last-level cache the second time.
const ROUTINGS = 8;

/** Numbers without a generator's cost: a layer has up to 10^9 weights. Each expert is a shifted view of one block. */
function block(random: Random, size: number, experts: number, scale: number): (e: number) => Float32Array {
  const shift = 1024;
  const base = random.normals(Math.min(size, 1 << 18), scale);
  const all = new Float32Array(size + experts * shift);
  for (let i = 0; i < all.length; i += base.length)
    all.set(base.subarray(0, Math.min(base.length, all.length - i)), i);
  return (e) => all.subarray(e * shift, e * shift + size);
}

/** The weights of a model's layer in one type. Packing takes longer than timing, so all token counts share them. */
class Layer {
  private static last: { key: string; layer: Layer } | undefined;
  private readonly gate;
  private readonly up;
  private readonly down;
  private packed: ExpertWeights | undefined;
  private reference: ExpertWeights | undefined;

  /** One layer is kept: the last one asked for. */
  static of(m: Model, type: WeightType): Layer {
    const key = `${m.name} ${type}`;
    if (Layer.last?.key !== key) {
      Layer.last?.layer.free();
      Layer.last = undefined;
      Layer.last = { key, layer: new Layer(m, type) };
    }
    return Layer.last.layer;
  }

  private constructor(
    private readonly m: Model,
    private readonly type: WeightType,
  ) {
    const { experts, hidden: d, intermediate: f } = m;
    const weights = 3 * d * f;
    const needed = experts * weights * BYTES_PER_WEIGHT[type] + 4 * weights;
    const free = process.availableMemory();
    if (needed > 0.9 * free) {
      const gib = (n: number) => `${(n / 2 ** 30).toFixed(1)} GiB`;
      throw new Error(`the layer's weights need ${gib(needed)}, and ${gib(free)} are free`);
    }
    const random = new Random(1);
    this.gate = block(random, f * d, experts, d ** -0.5);
    this.up = block(random, f * d, experts, d ** -0.5);
    this.down = block(random, d * f, experts, f ** -0.5);
  }

  private pack(ids: number[], backend?: OpOptions['backend']): ExpertWeights {
    const { hidden: d, intermediate: f, clamped } = this.m;
    const sources = {
      gate: ids.map((e) => new Tensor('float32', this.gate(e), [f, d])),
      up: ids.map((e) => new Tensor('float32', this.up(e), [f, d])),
      down: ids.map((e) => new Tensor('float32', this.down(e), [d, f])),
    };
    return packExpertsSync(sources, {
      type: this.type,
      activation: clamped ? 'clamped-swiglu' : 'silu',
      backend,
    });
  }

  get weights(): ExpertWeights {
    this.packed ??= this.pack(Array.from({ length: this.m.experts }, (_, e) => e));
    return this.packed;
  }

  /** The first k experts alone: those of every case's first token. */
  firstExperts(backend: OpOptions['backend']): ExpertWeights {
    this.reference ??= this.pack(
      Array.from({ length: this.m.k }, (_, e) => e),
      backend,
    );
    return this.reference;
  }

  private free(): void {
    this.packed?.dispose();
    this.reference?.dispose();
  }
}

function routings(random: Random, m: Model, tokens: number): Routing[] {
  return Array.from({ length: tokens > 64 ? 1 : ROUTINGS }, (_, r) => {
    const indices = new Int32Array(tokens * m.k);
    for (let t = 0; t < tokens; t++) {
      // The first token of the first routing is what the reference computes: experts 0, 1, ... k - 1.
      const ids = new Set<number>(r === 0 && t === 0 ? Array(m.k).keys() : []);
      while (ids.size < m.k) ids.add(random.integer(0, m.experts - 1));
      indices.set([...ids], t * m.k);
    }
    const weights = new Float32Array(tokens * m.k).fill(1 / m.k);
    return {
      indices: new Tensor('int32', indices, [tokens, m.k]),
      weights: new Tensor('float32', weights, [tokens, m.k]),
    };
  });
}

function prepare(m: Model, tokens: number, type: WeightType, random: Random): PreparedCase {
  const { hidden: d, k } = m;
  const layer = Layer.of(m, type);
  layer.firstExperts('reference'); // packed outside the reference's time
  const x = new Tensor('float32', random.normals(tokens * d), [tokens, d]);
  const list = routings(random, m, tokens);
  // The reference computes the first token only.
  const first = (o: OpOptions): Tensor[] => {
    const routing: Routing = {
      indices: new Tensor('int32', Int32Array.from(Array(k).keys()), [1, k]),
      weights: new Tensor('float32', list[0].weights.data.slice(0, k), [1, k]),
    };
    const row = new Tensor('float32', x.data.slice(0, d), [1, d]);
    return [expertsForwardSync(row, routing, layer.firstExperts(o.backend), { threads: o.threads })];
  };
  const slice: PreparedCase = { run: first, runAsync: async (o) => first(o) };
  return {
    run: (o) => [expertsForwardSync(x, list[0], layer.weights, o)],
    runAsync: async (o) => [await expertsForward(x, list[0], layer.weights, o)],
    timed(o) {
      const w = layer.weights;
      const out = expertsForwardSync(x, list[0], w, o);
      let i = 0;
      return () => expertsForwardSync(x, list[i++ % list.length], w, { ...o, out });
    },
    slice: {
      prepared: slice,
      fraction: 1 / tokens,
      of: ([y]) => [new Tensor('float32', (y.data as Float32Array).slice(0, d), [1, d])],
    },
  };
}

function peersOf(m: Model, tokens: number, type: WeightType): OpCase['peers'] {
  const { experts, k, hidden, intermediate } = m;
  const spec: PeerSpec = { op: 'experts_loop', tokens, experts, k, hidden, intermediate, type };
  if (m.clamped || (m.alone && type === 'float32')) return undefined;
  if (type === 'bfloat16') return { pytorch: spec };
  if (type === 'float32') return { pytorch: spec, onnxruntime: { ...spec, op: 'moe' } };
  if ((type === 'int8' || type === 'int4') && !m.alone) {
    return { onnxruntime: { ...spec, op: 'qmoe', bits: type === 'int8' ? 8 : 4 } };
  }
  return undefined;
}

/** Layers of published models at decode and prefill sizes, in every weight type. */
export const expertsForwardBenchCases: OpCase[] = models.flatMap((m) =>
  TYPES.flatMap((type) =>
    TOKENS.map((tokens): OpCase => {
      const perExpert = 3 * m.hidden * m.intermediate * BYTES_PER_WEIGHT[type];
      const active = m.experts * (1 - (1 - m.k / m.experts) ** tokens);
      return {
        family: 'moe',
        op: 'expertsForward',
        name: `layer ${m.name} ${type} T=${tokens}`,
        tolerance: TOLERANCE[type],
        flops: tokens * m.k * m.hidden * m.intermediate * 6,
        bytes: active * perExpert + 2 * 4 * tokens * m.hidden,
        peak: type === 'int8' || type === 'int4' || type === 'mxfp4' ? 'int8' : 'f32',
        items: { unit: 'token', count: tokens },
        bench: true,
        verify: false,
        peers: peersOf(m, tokens, type),
        prepare: (random) => prepare(m, tokens, type, random),
      };
    }),
  ),
);
