// How expert weights are rounded when they are packed: float8 block scales, the reference's matrices, bad values.
import { DTYPE_CODE } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import { blockScaleOf, checkScales, type MatrixSource, packReference, unfitError } from '../gemm/weights.ts';
import { checkOptions, type Op } from '../op.ts';
import { decodeMxfp4 } from '../reference/gemm/mxfp4.ts';
import { BLOCK, dequantizedRows, type Rounding, type WeightType } from '../reference/gemm/quantize.ts';
import type { ReferenceBank } from '../reference/moe/expertsForward.ts';
import { asTensor, type TensorLike } from '../tensor.ts';
import type { Biases, ExpertSources, Layout, Stacked } from './expertSources.ts';

/** float32 factors of 128 x 128 blocks, per expert: `[experts, ⌈rows/128⌉, ⌈columns/128⌉]` or a list of matrices. */
export interface ExpertScales {
  gate?: Stacked;
  up?: Stacked;
  gateUp?: Stacked;
  down?: Stacked;
}

/** The scales as the boundary takes them; `upRow0`: row of up in the grid of a joint gateUp. */
interface ScaleLists {
  gate: Float32Array[] | null;
  up: Float32Array[] | null;
  upRow0: number;
  down: Float32Array[] | null;
}

const SCALE_KEYS: ReadonlySet<string> = new Set(['gate', 'up', 'gateUp', 'down']);

function listOf(value: Stacked | undefined, name: string, experts: number, n: number, k: number) {
  if (value === undefined) return null;
  if (Array.isArray(value)) {
    if (value.length !== experts) {
      throw new HeddleError('ERR_SHAPE', `${name}: expected ${experts} experts, got ${value.length}`);
    }
    return value.map((v, e) => blockScaleOf(v, 'float8_e4m3', n, k, `${name}[${e}]`) as Float32Array);
  }
  const t = asTensor(value as TensorLike, name, ['float32'], 3);
  const dims = [experts, Math.ceil(n / BLOCK), Math.ceil(k / BLOCK)];
  if (dims.some((d, i) => d !== t.dims[i])) {
    throw new HeddleError(
      'ERR_SHAPE',
      `${name}: expected [${dims.join(', ')}], blocks of 128 x 128, got [${t.dims.join(', ')}]`,
    );
  }
  const size = dims[1] * dims[2];
  return Array.from({ length: experts }, (_, e) => {
    const part = t.data.subarray(e * size, (e + 1) * size);
    checkScales(part, dims[2], `${name}[${e}]`);
    return part;
  });
}

export function scaleLists(value: ExpertScales | undefined, sources: ExpertSources, l: Layout): ScaleLists {
  checkOptions(value, SCALE_KEYS, 'scales');
  const given = Object.entries(value ?? {}).filter(([, v]) => v !== undefined);
  if (given.length === 0) return { gate: null, up: null, upRow0: 0, down: null };
  const [first] = given[0];
  if (l.source !== 'float8_e4m3') {
    throw new HeddleError('ERR_OPTION', `scales.${first} needs float8_e4m3 weights, got ${l.source}`);
  }
  if (sources.layout === 'in-out' || sources.interleaved) {
    throw new HeddleError('ERR_OPTION', `scales need layout 'out-in' and gate and up not interleaved`);
  }
  for (const [key] of given) {
    if (sources[key as keyof ExpertSources] === undefined)
      throw new HeddleError('ERR_OPTION', `scales.${key} has no matrix: sources.${key} is not given`);
  }
  const { experts, hidden: d, intermediate: f } = l.shape;
  const both = listOf(value?.gateUp, 'scales.gateUp', experts, 2 * f, d);
  return {
    gate: both ?? listOf(value?.gate, 'scales.gate', experts, f, d),
    up: both ?? listOf(value?.up, 'scales.up', experts, f, d),
    upRow0: both === null ? 0 : f,
    down: listOf(value?.down, 'scales.down', experts, d, f),
  };
}

type Part = 'gate' | 'up' | 'down';
const PARTS: readonly Part[] = ['gate', 'up', 'down'];

function sourceOf(l: Layout, s: ScaleLists, part: Part, e: number): MatrixSource | null {
  const data = l[part];
  if (data === null || l.source === 'mxfp4') return null;
  const { hidden: d, intermediate: f } = l.shape;
  const [n, k] = part === 'down' ? [d, f] : [f, d];
  return {
    data: data[e],
    code: DTYPE_CODE[l.source],
    n,
    k,
    strides: part === 'down' ? l.downStrides : l.upStrides,
    scale: s[part]?.[e] ?? null,
    row0: part === 'up' ? s.upRow0 : 0,
  };
}

/** MXFP4 blocks as rows of the packed type: their own values, or those rounded again. */
function mxfp4Rows(l: Layout, part: Part, e: number, type: WeightType, group: number, rounding: Rounding) {
  const { hidden: d, intermediate: f } = l.shape;
  const [n, k] = part === 'down' ? [d, f] : [f, d];
  const data = l[part];
  const exponents = l.exponents[PARTS.indexOf(part)];
  if (data === null || exponents === null) return undefined;
  const [stride] = part === 'down' ? l.downStrides : l.upStrides;
  const decoded = Array.from({ length: n }, (_, i) => {
    const from = i * stride;
    const blocks = (data[e] as Uint8Array).subarray(from, from + k / 2);
    return decodeMxfp4(blocks, exponents[e].subarray(from / 16, (from + k / 2) / 16));
  });
  const rows = type === 'mxfp4' ? decoded : dequantizedRows(decoded, type, group, rounding);
  return { type, group, n, k, rows };
}

/** The op for one layer: its reference fills the bank, its errors name expert, matrix, output and input. */
export function packOpOf(
  l: Layout,
  [gb, ub, db]: Biases,
  s: ScaleLists,
  type: WeightType,
  first: number,
): Op {
  const { experts, hidden: d, intermediate: f } = l.shape;
  return {
    name: 'packExperts',
    reference: (bank: ReferenceBank, group: number, ...rest: unknown[]) => {
      // After group come type, gate, up, 2 strides, down, 2 strides, 3 biases; then how to round.
      const [symmetric, search, hidden, intermediate] = rest.slice(11) as [
        boolean,
        boolean,
        Float32Array | null,
        Float32Array | null,
      ];
      for (let e = 0; e < experts; e++) {
        const [gate, up, down] = PARTS.map((part, i) => {
          const rounding: Rounding = {
            symmetric,
            search,
            meanSquare: part === 'down' ? intermediate : hidden,
          };
          if (l.source === 'mxfp4') return mxfp4Rows(l, part, e, type, group, rounding);
          const source = sourceOf(l, s, part, e);
          if (source === null) return undefined;
          const rows = packReference(source, type, group, rounding);
          if (typeof rows === 'number') return (3 * e + i) * d * f + rows;
          const { n, k } = source;
          return { type, group, n, k, rows };
        });
        for (const m of [gate, up, down]) if (typeof m === 'number') return m;
        bank.experts[first + e] = {
          gate: gate as never,
          up: up as never,
          down: down as never,
          gateBias: gb?.[e].slice(),
          upBias: ub?.[e].slice(),
          downBias: db?.[e].slice(),
        };
      }
      return 0;
    },
    invalid: (index) => {
      const e = Math.floor(index / (3 * d * f));
      const part = PARTS[Math.floor(index / (d * f)) % 3];
      const source = sourceOf(l, s, part, e) as MatrixSource;
      const at = index % (d * f);
      return unfitError(`${part}[${e}]`, source, Math.floor(at / source.k), at % source.k, type);
    },
  };
}
