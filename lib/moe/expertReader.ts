import type { Checkpoint } from '../checkpoint.ts';
import { decodeFloats, type FloatType } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import { FLOAT_TYPES } from '../gemm/linear.ts';
import { makeTensor, type Tensor, type TensorLike } from '../tensor.ts';
import type { MoEBlock } from './config.ts';
import type { ExpertBiases, ExpertSources } from './experts.ts';

/** A tensor that must be in the checkpoint: with these dims, and of one of these types. */
export function checkTensor(
  c: Checkpoint,
  name: string,
  dims: readonly number[],
  types: readonly string[] = FLOAT_TYPES,
): void {
  const t = c.info(name);
  if (t.dims.length !== dims.length || t.dims.some((d, i) => d !== dims[i])) {
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
  /** Bytes read. */
  bytes: number;
}

/** One tensor of an expert: its own, or row `expert` of a stack. */
interface Part {
  name: string;
  stacked: boolean;
}

/** Reads single experts of a layer on demand; every tensor's type and dims are checked once, from the headers. */
export class ExpertReader {
  /** Element type of the weights. */
  readonly source: FloatType | 'mxfp4';
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
      const all = [
        [names.gate, f, d],
        [names.up, f, d],
        [names.down, d, f],
      ] as const;
      for (let e = 0; e < count; e++) {
        for (const [name, rows, columns] of all)
          checkTensor(checkpoint, name.replace('{}', `${e}`), [rows, columns]);
      }
      this.parts = all.map(([name]) => ({ name, stacked: false }));
      this.assemble = ([gate, up, down]) => ({ sources: { gate: [gate], up: [up], down: [down] } });
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
    this.source = checkpoint.info(down).type as FloatType;
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
