import { basename } from 'node:path';
import { type Comparison, compareOutputs, missOf } from '../../test/cases/case.ts';
import { Random } from '../../test/cases/random.ts';
import type { BackendName } from '../backend.ts';
import { decodeFloats, encodeFloats } from '../dtype.ts';
import type { WeightType } from '../gemm/linear.ts';
import { MoELayer, type MoELayerOptions, routeTopKSync } from '../moe/index.ts';
import { Tensor } from '../tensor.ts';
import type { Variant } from './variants.ts';
import type { VerifyResult, VerifyRow } from './verifyCases.ts';

type Layer = Pick<MoELayer, 'type' | 'hiddenSize' | 'routing' | 'route' | 'forward' | 'dispose'>;

/** The part of MoELayer that is used; tests put their own in. */
export interface LayerLoader {
  load(directory: string, options: MoELayerOptions): Promise<Layer>;
}

export interface CheckpointLayer {
  directory: string;
  layer: number;
  type?: WeightType;
}

/** What a model with such weights is given: the comparison is of the layer, not of a rounding of its input. */
function asBfloat16(values: Float32Array): Float32Array {
  return decodeFloats(encodeFloats(values, 'bfloat16'), 'bfloat16');
}

/** Tokens: one (decoding), a few, and enough that experts get many rows. */
const TOKENS = [1, 7, 64];

/** Bound of the relative error by the type of the packed weights; the reference reads the same (dequantised) ones. */
function toleranceOf(type: WeightType): number {
  return type === 'float32' ? 5e-6 : 5e-3;
}

/** Router logits are float32 products whatever the experts' type. */
const LOGITS_TOLERANCE = 5e-6;

interface Expected {
  x: Tensor;
  y: Tensor;
  logits: Tensor;
  indices: Tensor<'int32'>;
}

async function runLayer(layer: Layer, x: Tensor): Promise<Expected> {
  const { logits, indices } = await layer.route(x);
  return { x, y: (await layer.forward(x)) as Tensor, logits: logits as Tensor, indices };
}

/** The rows of `t` for which `keep` is true. */
function rowsWhere(t: Tensor, keep: boolean[]): Tensor {
  const width = t.dims[1];
  const data = (t.data as Float32Array).filter((_, i) => keep[Math.floor(i / width)]);
  return new Tensor('float32', data, [data.length / width, width]) as Tensor;
}

/**
 * Two logits that agree to rounding may be ranked differently by two right implementations, and a token sent to
 * another expert has another output. So three things are checked: the logits agree; the experts chosen are those that
 * the reference chooses from the same logits; the outputs agree for every token that took the same experts.
 */
function compareLayer(layer: Layer, own: Expected, expected: Expected): Comparison {
  const logits = compareOutputs([own.logits], [expected.logits]);
  const k = own.indices.dims[1];
  const sameIds = (a: Tensor<'int32'>, b: Tensor<'int32'>, t: number) =>
    a.data.subarray(t * k, (t + 1) * k).every((id, j) => id === b.data[t * k + j]);
  const chosen = routeTopKSync(own.logits, { ...layer.routing, backend: 'reference' }).indices;
  const tokens = Array.from({ length: own.indices.dims[0] }, (_, t) => t);
  const same = tokens.map((t) => sameIds(own.indices, expected.indices, t));
  const c = compareOutputs([rowsWhere(own.y, same)], [rowsWhere(expected.y, same)]);
  const miss = missOf(logits, LOGITS_TOLERANCE);
  if (miss !== undefined) {
    c.mismatches++;
    c.detail = `router logits: ${miss}`;
  }
  const misrouted = tokens.find((t) => !same[t] && !sameIds(own.indices, chosen, t));
  if (misrouted !== undefined) {
    c.mismatches++;
    c.detail ??= `token ${misrouted}: not the experts that the reference chooses from the same logits`;
  }
  return c;
}

/** One layer of a checkpoint on every variant against the reference, on random tokens. */
export async function verifyCheckpoint(
  { directory, layer, type }: CheckpointLayer,
  variants: Variant[],
  seed: number,
  loader: LayerLoader = MoELayer,
): Promise<VerifyResult> {
  const op = `${basename(directory)} layer ${layer}`;
  const load = (backend: BackendName) => loader.load(directory, { layer, type, backend });
  const reference = await load('reference');
  const { hiddenSize } = reference;
  const tolerance = toleranceOf(reference.type);
  const random = new Random(seed);
  const expected: Expected[] = [];
  for (const t of TOKENS) {
    const values = random.normals(t * hiddenSize);
    const x = reference.type === 'float32' ? values : asBfloat16(values);
    expected.push(await runLayer(reference, new Tensor('float32', x, [t, hiddenSize]) as Tensor));
  }
  reference.dispose();

  const result: VerifyResult = { rows: [], failures: [] };
  for (const variant of variants) {
    const row: VerifyRow = { op, variant: variant.name, cases: 0, relative: 0, tolerance, ulp: 0, failed: 0 };
    result.rows.push(row);
    variant.use(); // before loading: weights are packed for an instruction set
    const own = await load(variant.options.backend as BackendName);
    for (const e of expected) {
      const comparison = compareLayer(own, await runLayer(own, e.x), e);
      const miss = missOf(comparison, tolerance);
      row.cases++;
      row.relative = Math.max(row.relative, comparison.relative);
      row.ulp = Math.max(row.ulp, comparison.ulp);
      if (miss === undefined) continue;
      row.failed++;
      result.failures.push({ case: `${op} T=${e.x.dims[0]}`, variant: variant.name, message: miss });
    }
    own.dispose();
  }
  return result;
}
