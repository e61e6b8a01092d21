/** Which files make up a checkpoint: one safetensors file, or an index and its shards. */
import path from 'node:path';
import { kindOf, list, readSmallFile } from './file.ts';
import { failIn, MAX_HEADER_BYTES } from './header.ts';
import { decodeUtf8, members, parseValue, quote } from './json.ts';
import type { Steps } from './steps.ts';

const INDEX = 'model.safetensors.index.json';
const SINGLE = 'model.safetensors';
const CONFIG = 'config.json';

/** Real ones have kilobytes; a label table may make a megabyte of it. */
const MAX_CONFIG_BYTES = 8 * 1024 * 1024;

export interface Layout {
  /** The directory that holds everything. */
  readonly directory: string;
  /** The index file, where there is one. */
  readonly index: string | undefined;
  /** Each safetensors file, with the tensors that the index promises in it. */
  readonly files: ReadonlyMap<string, readonly string[]>;
}

/** Finds the files for what the caller gave: a directory, an index (`.json`) or a safetensors file. */
export function* locate(given: string): Steps<Layout> {
  const kind = yield* kindOf(given);
  if (kind === undefined) throw failIn(given)('no such file or directory');
  if (kind === 'other') return yield* layoutOf(given);

  const names = yield* list(given);
  for (const preferred of [INDEX, SINGLE]) {
    if (names.includes(preferred)) return yield* layoutOf(path.join(given, preferred));
  }
  // Other libraries use other stems, for example diffusion_pytorch_model.safetensors.index.json.
  for (const suffix of ['.safetensors.index.json', '.safetensors']) {
    const found = names.filter((name) => name.endsWith(suffix));
    if (found.length === 1) return yield* layoutOf(path.join(given, found[0]));
    if (found.length > 1) {
      const shown = found.slice(0, 5).join(', ') + (found.length > 5 ? ', …' : '');
      throw failIn(given)(
        `holds ${found.length} *${suffix} files (${shown}) and no ${INDEX}: give the path of one`,
      );
    }
  }
  throw failIn(given)('holds no safetensors file');
}

function* layoutOf(file: string): Steps<Layout> {
  const directory = path.dirname(file);
  if (!file.toLowerCase().endsWith('.json')) {
    return { directory, index: undefined, files: new Map([[file, []]]) };
  }
  const text = decodeUtf8(yield* readSmallFile(file, MAX_HEADER_BYTES), failIn(file));
  return { directory, index: file, files: parseIndex(text, directory, file) };
}

/** The files an index names, with the tensors it promises in each. */
function parseIndex(text: string, directory: string, file: string): Map<string, string[]> {
  const fail = failIn(file);
  const files = new Map<string, string[]>();
  let found = false;
  for (const { key, value } of members(text, fail)) {
    if (key !== 'weight_map') {
      if (value.length > 65_536) throw fail(`${quote(key)} has ${value.length} characters`);
      parseValue(value, fail);
      continue;
    }
    found = true;
    const failMap = failIn(file, 'weight_map');
    for (const { key: tensor, value: shard } of members(value, failMap)) {
      const failEntry = failIn(file, tensor, true);
      const name = shard.length > 8192 ? undefined : parseValue(shard, failEntry);
      if (typeof name !== 'string' || !isPlainRelative(name)) {
        throw failEntry(
          `is mapped to ${quote(shard)}; a shard must be the name of a file beside or below the index`,
        );
      }
      const shardPath = path.join(directory, name);
      const tensors = files.get(shardPath);
      if (tensors === undefined) files.set(shardPath, [tensor]);
      else tensors.push(tensor);
    }
  }
  if (!found) throw fail('has no weight_map');
  return files;
}

/** True for `a.safetensors` and `sub/a.safetensors`; false for anything that could lead elsewhere. */
function isPlainRelative(name: string): boolean {
  // Backslashes and drive letters are refused on every system, so that an index means the same on all.
  if (name.includes('\\') || name.includes('\0') || /^[A-Za-z]:/.test(name)) return false;
  return name.split('/').every((part) => part !== '' && part !== '.' && part !== '..');
}

/** The parsed `config.json` of a directory, or `undefined` where there is none. */
export function* readConfig(directory: string): Steps<Readonly<Record<string, unknown>> | undefined> {
  const file = path.join(directory, CONFIG);
  if ((yield* kindOf(file)) === undefined) return undefined;
  const fail = failIn(file);
  const config = parseValue(decodeUtf8(yield* readSmallFile(file, MAX_CONFIG_BYTES), fail), fail);
  if (config === null || typeof config !== 'object' || Array.isArray(config)) {
    throw fail('is not a JSON object');
  }
  return config as Record<string, unknown>;
}
