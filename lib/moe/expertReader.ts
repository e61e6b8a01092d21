import type { Checkpoint } from '../checkpoint.ts';
import { decodeFloats, FLOAT_TYPES, type FloatType } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import { SOURCE_TYPES, type SourceType } from '../gemm/weights.ts';
import { BLOCK } from '../reference/gemm/quantize.ts';
import { makeTensor, sameDims, type Tensor, type TensorLike } from '../tensor.ts';
import type { MoEBlock } from './config.ts';
import type { ExpertBiases, ExpertSources } from './experts.ts';
import type { ExpertScales } from './expertWeights.ts';

/** A tensor that must be in the checkpoint: with these dims, and of one of these types. */
export function checkTensor(
  c: Checkpoint,
  name: string,
  dims: readonly number[],
  types: readonly string[] = FLOAT_TYPES,
): void {
  const t = c.info(name);
  if (!sameDims(t.dims, dims)) {
    throw new HeddleError(
      'ERR_CHECKPOINT',
      `${c.path}: ${name} has dims [${t.dims.join(', ')}], config.json makes it [${dims.join(', ')}]`,
    );
  }
  if (t.type === undefined || !types.includes(t.type)) {
    throw new HeddleError(
      'ERR_DTYPE',
      `${c.path}: ${name}: type ${t.dtype} is not supported here; allowed: ${types.join(', ')}`,
    );
  }
}

export function toFloat32(t: Tensor): Tensor<'float32'> {
  return t.type === 'float32'
    ? (t as Tensor<'float32'>)
    : makeTensor('float32', decodeFloats(t.data, t.type as FloatType), t.dims);
}

/** One expert as {@link ExpertSources}. */
export interface ExpertData {
  sources: ExpertSources;
  biases?: ExpertBiases;
  /** Factors of float8 weights' blocks. */
  scales?: ExpertScales;
  /** Bytes read. */
  bytes: number;
}

const MATRICES = ['gate', 'up', 'down'] as const;
type MatrixNames = Record<(typeof MATRICES)[number], string>;
/** What DeepSeek-V3 appends to a float8 weight's name for the factors of its blocks of 128 x 128. */
const SCALE = '_scale_inv';

function at(names: MatrixNames, expert: number): MatrixNames {
  const name = (part: keyof MatrixNames) => names[part].replace('{}', `${expert}`);
  return { gate: name('gate'), up: name('up'), down: name('down') };
}

/** Checks the three matrices of an expert and, where they are float8, their scales; all of one type. */
function matrixTensors(
  c: Checkpoint,
  names: MatrixNames,
  d: number,
  f: number,
  like?: SourceType,
): { type: SourceType; scaled: boolean } {
  const type = like ?? (c.info(names.gate).type as SourceType);
  const scaled = type === 'float8_e4m3';
  for (const part of MATRICES) {
    const [rows, columns] = part === 'down' ? [d, f] : [f, d];
    // The first matrix says which types are allowed at all, the others must have its own.
    const types = like === undefined && part === 'gate' ? SOURCE_TYPES : [type];
    checkTensor(c, names[part], [rows, columns], types);
    if (!scaled) continue;
    const blocks = [Math.ceil(rows / BLOCK), Math.ceil(columns / BLOCK)];
    checkTensor(c, names[part] + SCALE, blocks, ['float32']);
  }
  return { type, scaled };
}

function matricesOf([gate, up, down, gateScale, upScale, downScale]: Tensor[]): Omit<ExpertData, 'bytes'> {
  const sources = { gate: [gate], up: [up], down: [down] };
  if (gateScale === undefined) return { sources };
  return { sources, scales: { gate: [gateScale], up: [upScale], down: [downScale] } };
}

/** One expert of three matrices by their names, such as the shared experts. */
export async function readMatrices(
  c: Checkpoint,
  names: MatrixNames,
  d: number,
  f: number,
  signal?: AbortSignal,
): Promise<Omit<ExpertData, 'bytes'>> {
  const { scaled } = matrixTensors(c, names, d, f);
  const all = MATRICES.map((part) => names[part]);
  if (scaled) all.push(...all.map((name) => name + SCALE));
  return matricesOf(await Promise.all(all.map((name) => c.read(name, { signal }))));
}

/** One tensor of an expert: its own, or row `expert` of a stack. */
interface Part {
  name: string;
  stacked: boolean;
}

/** Reads single experts of a layer on demand; every tensor's type and dims are checked once, from the headers. */
export class ExpertReader {
  /** Element type of the weights. */
  readonly source: SourceType | 'mxfp4';
  readonly biased: boolean;
  private readonly checkpoint: Checkpoint;
  private readonly parts: Part[];
  private readonly assemble: (tensors: Tensor[]) => Omit<ExpertData, 'bytes'>;

  constructor(checkpoint: Checkpoint, block: MoEBlock) {
    const { experts: count, hiddenSize: d, intermediateSize: f } = block;
    const names = block.tensors.experts;
    const stack = (name: string, dims: number[], types?: readonly string[]): Part => {
      checkTensor(checkpoint, name, [count, ...dims], types);
      return { name, stacked: true };
    };
    this.checkpoint = checkpoint;
    this.biased = 'gateUp' in names;
    let down: string;
    if (!('gateUp' in names)) {
      const first = matrixTensors(checkpoint, at(names, 0), d, f);
      for (let e = 1; e < count; e++) matrixTensors(checkpoint, at(names, e), d, f, first.type);
      this.parts = MATRICES.map((part) => ({ name: names[part], stacked: false }));
      if (first.scaled)
        this.parts.push(...this.parts.map(({ name }) => ({ name: name + SCALE, stacked: false })));
      this.assemble = matricesOf;
      down = names.down.replace('{}', '0');
    } else if (checkpoint.has(`${names.gateUp}_blocks`)) {
      const u8 = ['uint8'];
      this.parts = [
        stack(`${names.gateUp}_blocks`, [2 * f, d / 32, 16], u8),
        stack(`${names.gateUp}_scales`, [2 * f, d / 32], u8),
        stack(`${names.down}_blocks`, [d, f / 32, 16], u8),
        stack(`${names.down}_scales`, [d, f / 32], u8),
        stack(names.gateUpBias, [2 * f]),
        stack(names.downBias, [d]),
      ];
      this.assemble = ([blocks, scales, downBlocks, downScales, gateUpBias, downBias]) => ({
        sources: {
          gateUp: { blocks, scales },
          down: { blocks: downBlocks, scales: downScales },
          interleaved: true,
        },
        biases: { gateUp: toFloat32(gateUpBias), down: toFloat32(downBias) },
      });
      this.source = 'mxfp4';
      return;
    } else {
      this.parts = [
        stack(names.gateUp, [d, 2 * f]),
        stack(names.down, [f, d]),
        stack(names.gateUpBias, [2 * f]),
        stack(names.downBias, [d]),
      ];
      this.assemble = ([gateUp, down, gateUpBias, downBias]) => ({
        sources: { gateUp, down, interleaved: true, layout: 'in-out' },
        biases: { gateUp: toFloat32(gateUpBias), down: toFloat32(downBias) },
      });
      down = names.down;
    }
    this.source = checkpoint.info(down).type as SourceType;
  }

  async read(expert: number, signal?: AbortSignal): Promise<ExpertData> {
    const c = this.checkpoint;
    const tensors = await Promise.all(
      this.parts.map(({ name, stacked }) =>
        stacked
          ? c.readRange(name, expert, 1, { signal })
          : c.read(name.replace('{}', `${expert}`), { signal }),
      ),
    );
    return this.data(tensors);
  }

  readSync(expert: number): ExpertData {
    const c = this.checkpoint;
    return this.data(
      this.parts.map(({ name, stacked }) =>
        stacked ? c.readRangeSync(name, expert, 1) : c.readSync(name.replace('{}', `${expert}`)),
      ),
    );
  }

  /** What packing an expert threw, as an error of the checkpoint where its values are to blame. */
  failure(expert: number, error: unknown): unknown {
    if (!(error instanceof HeddleError) || error.code !== 'ERR_VALUE') return error;
    const { name } = this.parts[0];
    return new HeddleError(
      'ERR_CHECKPOINT',
      `${this.checkpoint.path}: expert ${expert} (${name} …): ${error.message}`,
      { cause: error },
    );
  }

  close(): void {
    this.checkpoint.close();
  }

  private data(tensors: Tensor[]): ExpertData {
    const bytes = tensors.reduce((sum, t) => sum + t.data.byteLength, 0);
    return { ...this.assemble(tensors), bytes };
  }
}

/** A whole float tensor, by its name. */
export async function readFloats(
  c: Checkpoint,
  name: string,
  dims: readonly number[],
  signal?: AbortSignal,
): Promise<Tensor<FloatType>> {
  checkTensor(c, name, dims);
  return (await c.read(name, { signal })) as TensorLike as Tensor<FloatType>;
}
