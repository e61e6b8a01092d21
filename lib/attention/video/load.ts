import { step } from '../../checkpoint/steps.ts';
import type { Checkpoint } from '../../checkpoint.ts';
import type { FloatType } from '../../dtype.ts';
import { FLOAT_TYPES } from '../../dtype.ts';
import { HeddleError } from '../../errors.ts';
import { asTensor, makeTensor, type Tensor, type TensorLike } from '../../tensor.ts';
import type { Architecture } from './architectures.ts';
import { type ResolvedConfig, tensorShapes } from './config.ts';
import type { ReadTensor } from './weights.ts';

const withoutOnes = (dims: readonly number[]) => dims.filter((d) => d !== 1).join();

/** The first of some names, and how many more. */
function listed(names: readonly string[]): string {
  const more = names.length > 3 ? ` and ${names.length - 3} more` : '';
  return names.slice(0, 3).join(', ') + more;
}

/** What stands before the encoder's names in a checkpoint of a model that wraps it: `vivit.` of a classifier, say. */
function prefixOf(c: Checkpoint, architecture: Architecture): string {
  const [patch] = architecture.source('patch.weight');
  const found = [...c.tensors.keys()].find((name) => name === patch || name.endsWith(`.${patch}`));
  if (found === undefined) {
    throw new HeddleError('ERR_CHECKPOINT', `${c.path}: there is no tensor ${patch}`);
  }
  return found.slice(0, found.length - patch.length);
}

/**
 * A reader of the encoder's tensors in a checkpoint. Every name and every dim is checked here, before anything is read.
 * @throws HeddleError `ERR_CHECKPOINT` naming the tensor that is missing, has other dims, or has no place in the encoder
 */
export function checkpointReader(
  c: Checkpoint,
  a: Architecture,
  config: ResolvedConfig,
  signal?: AbortSignal,
): ReadTensor {
  const prefix = prefixOf(c, a);
  const used = new Set<string>();
  for (const [name, dims] of tensorShapes(config)) {
    const sources = a.source(name).map((s) => prefix + s);
    for (const source of sources) {
      used.add(source);
      const info = c.info(source);
      const expected = sources.length === 1 ? dims : [dims[0] / sources.length, ...dims.slice(1)];
      if (withoutOnes(info.dims) !== withoutOnes(expected)) {
        throw new HeddleError(
          'ERR_CHECKPOINT',
          `${c.path}: ${source} has dims [${info.dims.join(', ')}], config.json makes it [${expected.join(', ')}]`,
        );
      }
      if (!(FLOAT_TYPES as readonly unknown[]).includes(info.type)) {
        throw new HeddleError(
          'ERR_DTYPE',
          `${c.path}: ${source}: type ${info.dtype} is not supported here; allowed: ${FLOAT_TYPES.join(', ')}`,
        );
      }
    }
  }
  const surplus = [...c.tensors.keys()].filter(
    (name) =>
      !used.has(name) && !a.ignored.some((head) => name.startsWith(head) || name.startsWith(prefix + head)),
  );
  if (surplus.length > 0) {
    throw new HeddleError(
      'ERR_CHECKPOINT',
      `${c.path}: ${listed(surplus)} ${surplus.length === 1 ? 'has' : 'have'} no place in a ${a.modelType} encoder of this config.json`,
    );
  }
  return function* (name, dims) {
    const parts: Tensor<FloatType>[] = [];
    for (const source of a.source(name)) {
      const part = yield* step(
        () => c.readSync(prefix + source),
        () => c.read(prefix + source, { signal }),
      );
      parts.push(part as Tensor<FloatType>);
    }
    return concatenated(parts, dims);
  };
}

/** Parts along the first dim as one tensor of these dims. */
function concatenated(parts: Tensor<FloatType>[], dims: readonly number[]): Tensor<FloatType> {
  const [first] = parts;
  if (parts.length === 1) return makeTensor(first.type, first.data, dims);
  const odd = parts.find((p) => p.type !== first.type);
  if (odd)
    throw new HeddleError('ERR_CHECKPOINT', `query, key and value have types ${first.type}, ${odd.type}`);
  const size = parts.reduce((sum, p) => sum + p.size, 0);
  const data = first.type === 'float32' ? new Float32Array(size) : new Uint16Array(size);
  let at = 0;
  for (const p of parts) {
    data.set(p.data, at);
    at += p.size;
  }
  return makeTensor(first.type, data as never, dims);
}

/**
 * A reader of tensors that the caller has.
 * @throws HeddleError `ERR_ARGUMENT` for tensors that are missing or have no place; `ERR_SHAPE`, `ERR_DTYPE`
 */
export function recordReader(
  tensors: Readonly<Record<string, TensorLike>>,
  config: ResolvedConfig,
): ReadTensor {
  if (tensors === null || typeof tensors !== 'object') {
    throw new HeddleError('ERR_ARGUMENT', 'tensors: expected an object of tensors by name');
  }
  const shapes = tensorShapes(config);
  const missing = [...shapes.keys()].filter((name) => !Object.hasOwn(tensors, name));
  if (missing.length > 0) throw new HeddleError('ERR_ARGUMENT', `tensors: ${listed(missing)} missing`);
  const surplus = Object.keys(tensors).filter((name) => !shapes.has(name));
  if (surplus.length > 0) {
    const verb = surplus.length === 1 ? 'has' : 'have';
    throw new HeddleError('ERR_ARGUMENT', `tensors: ${listed(surplus)} ${verb} no place in this config`);
  }
  const checked = new Map<string, Tensor<FloatType>>();
  for (const [name, dims] of shapes) {
    const t = asTensor(tensors[name], `tensors['${name}']`, FLOAT_TYPES);
    if (t.dims.length !== dims.length || t.dims.some((v, i) => v !== dims[i])) {
      throw new HeddleError(
        'ERR_SHAPE',
        `tensors['${name}']: expected [${dims.join(', ')}], got [${t.dims.join(', ')}]`,
      );
    }
    checked.set(name, t);
  }
  // biome-ignore lint/correctness/useYield: what the caller has needs no reading
  return function* (name) {
    return checked.get(name) as Tensor<FloatType>;
  };
}
