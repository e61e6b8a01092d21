import { type Steps, step } from '../checkpoint/steps.ts';
import { writeSafetensors } from '../checkpoint/write.ts';
import { openCheckpoint, openCheckpointSync } from '../checkpoint.ts';
import { HeddleError } from '../errors.ts';
import { PrivacyLedger, type SavedLedger } from '../privacy/accountants/ledger.ts';
import type { SavedAdaptiveClipping } from '../privacy/adaptiveClipping.ts';
import { keyFingerprint } from '../privacy/chacha20.ts';
import { makeTensor, type Tensor } from '../tensor.ts';
import type { Slot } from './optimizerOptions.ts';

const FORMAT = 'heddle.privacy.optimizer';
const VERSION = 2;

/** What moves from step to step, besides the arrays. */
export interface OptimizerProgress {
  steps: number;
  learningRate: number;
  lossScale: number;
  /** Steps since the loss scale last changed. */
  quietSteps: number;
  /** Of an adaptive clipping norm: where it is. */
  clipping: SavedAdaptiveClipping | null;
  ledger: SavedLedger;
}

/** A private optimizer as it is saved: JSON and float32 tensors. */
export interface OptimizerState {
  format: typeof FORMAT;
  version: typeof VERSION;
  /** Configuration that must be the same in the run that goes on. */
  identity: Record<string, unknown>;
  /** Recognises the key; does not reveal it. */
  keyFingerprint: string;
  progress: OptimizerProgress;
  /** `parameter.<layer>.<name>`, `first.…`, `second.…`. */
  tensors: Record<string, Tensor<'float32'>>;
}

/** The arrays of a slot by their names in the state. */
function* arraysOf(
  slots: readonly Slot[],
): Generator<[name: string, array: Float32Array, dims: readonly number[]]> {
  for (const s of slots) {
    for (const [kind, array] of [
      ['parameter', s.parameter],
      ['first', s.first],
      ['second', s.second],
    ] as const) {
      if (array !== null)
        yield [[kind, s.layer, s.name].filter((part) => part !== '').join('.'), array, s.dims];
    }
  }
}

export function sealState(
  identity: Record<string, unknown>,
  key: Uint8Array,
  progress: OptimizerProgress,
  slots: readonly Slot[],
): OptimizerState {
  const tensors: OptimizerState['tensors'] = {};
  for (const [name, array, dims] of arraysOf(slots))
    tensors[name] = makeTensor('float32', array.slice(), dims);
  return {
    format: FORMAT,
    version: VERSION,
    identity: JSON.parse(JSON.stringify(identity)),
    keyFingerprint: keyFingerprint(key, FORMAT),
    progress,
    tensors,
  };
}

function bad(reason: string, cause?: unknown): HeddleError {
  return new HeddleError('ERR_CHECKPOINT', `optimizer state: ${reason}`, { cause });
}

/** The first part of the configuration that differs, as a path. */
function difference(a: unknown, b: unknown, path: string): string | undefined {
  const object = (x: unknown): x is Record<string, unknown> => x !== null && typeof x === 'object';
  if (!object(a) || !object(b)) {
    return Object.is(a, b) ? undefined : `${path} was ${JSON.stringify(a)} and is ${JSON.stringify(b)}`;
  }
  for (const key of new Set([...Object.keys(a), ...Object.keys(b)])) {
    const found = difference(a[key], b[key], path === '' ? key : `${path}.${key}`);
    if (found !== undefined) return found;
  }
  return undefined;
}

/** Checks a state against the optimizer that is to go on from it; changes nothing. */
export function openState(
  state: OptimizerState,
  identity: Record<string, unknown>,
  key: Uint8Array,
  slots: readonly Slot[],
): { progress: OptimizerProgress; ledger: PrivacyLedger; arrays: [Float32Array, Float32Array][] } {
  if (state === null || typeof state !== 'object') throw bad(`expected an object, got ${String(state)}`);
  if (state.format !== FORMAT) throw bad(`format must be '${FORMAT}', got ${JSON.stringify(state.format)}`);
  if (state.version !== VERSION)
    throw bad(`version must be ${VERSION}, got ${JSON.stringify(state.version)}`);
  if (state.keyFingerprint !== keyFingerprint(key, FORMAT)) throw bad('it belongs to another key');
  const changed = difference(state.identity, JSON.parse(JSON.stringify(identity)), '');
  if (changed !== undefined) {
    throw bad(`${changed}. A changed run needs a new key: the same noise on other sums would cancel out`);
  }
  const { progress } = state;
  const numbers = [progress?.steps, progress?.learningRate, progress?.lossScale, progress?.quietSteps];
  if (!numbers.every((n) => typeof n === 'number' && n >= 0 && n < Infinity))
    throw bad('its progress is damaged');
  const ledger = PrivacyLedger.fromJSON(progress.ledger);
  if (identity['noiseMultiplier'] !== 0 && ledger.steps !== progress.steps) {
    throw bad(`the ledger has ${ledger.steps} steps, the state ${progress.steps}`);
  }
  const arrays: [Float32Array, Float32Array][] = [];
  for (const [name, array, dims] of arraysOf(slots)) {
    const saved = state.tensors?.[name];
    if (
      saved?.type !== 'float32' ||
      saved.dims.join() !== dims.join() ||
      saved.data.length !== array.length
    ) {
      throw bad(`tensor ${name} is missing or is not float32 [${dims.join(', ')}]`);
    }
    arrays.push([array, saved.data]);
  }
  return { progress, ledger, arrays };
}

export function* writeState(path: string, state: OptimizerState): Steps<void> {
  const { tensors, ...rest } = state;
  yield* writeSafetensors(path, tensors, { [FORMAT]: JSON.stringify(rest) });
}

export function* readState(path: string): Steps<OptimizerState> {
  const options = { map: 'never' } as const;
  const file = yield* step(
    () => openCheckpointSync(path, options),
    () => openCheckpoint(path, options),
  );
  try {
    const text = file.metadata[FORMAT];
    if (text === undefined) throw bad(`${path} holds none`);
    let rest: Omit<OptimizerState, 'tensors'>;
    try {
      rest = JSON.parse(text);
    } catch (cause) {
      throw bad(`${path}: its metadata is not JSON`, cause);
    }
    const tensors: OptimizerState['tensors'] = {};
    for (const name of file.tensors.keys()) {
      const t = yield* step(
        () => file.readSync(name),
        () => file.read(name),
      );
      tensors[name] = t as Tensor<'float32'>;
    }
    return { ...rest, tensors };
  } finally {
    file.close();
  }
}
