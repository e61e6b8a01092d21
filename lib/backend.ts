import { existsSync, readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import type { CudaMemory } from './device.ts';
import { HeddleError } from './errors.ts';

export type BackendName = 'cpu' | 'reference' | 'cuda';
export type IsaName = 'avx512' | 'avx2' | 'neon' | 'scalar';

/** What native/binding/addon.cpp exports; ops are looked up by name. */
export interface Addon {
  machine(): { cpuFeatures: string[]; isas: IsaName[]; hardwareThreads: number; l2Bytes: number };
  getIsa(): IsaName;
  setIsa(name: string): boolean;
  /** The CUDA library at `path`, or why it does not serve. */
  openCuda(path: string): CudaDevice | string;
  [op: string]: (...args: never[]) => unknown;
}

/** What `openCuda` of native/binding/cuda.cpp returns. `ops` is called as the addon is. */
export interface CudaDevice {
  ops: Addon;
  device: string;
  computeCapability: string;
  multiprocessors: number;
  totalBytes: number;
  alloc(bytes: number): object | null;
  dispose(handle: object): void;
  memory(): CudaMemory;
  setLimit(bytes: number): void;
  trim(): void;
  lastError(): string;
}

export interface BackendInfo {
  /** Whether ops can run on it now. */
  available: boolean;
  /** Where the binary was loaded from, for native backends. */
  path?: string;
  /** Why it is not available. */
  reason?: string;
  /** What to do about it. */
  remedy?: string;
  /** The GPU, for cuda. */
  device?: string;
}

/** What {@link info} returns. */
export interface Info {
  version: string;
  /** The backend that ops use when the call names none. */
  backend: BackendName;
  backends: Record<BackendName, BackendInfo>;
  /** CPU features that both the processor and the operating system support; empty without the native binary. */
  cpuFeatures: string[];
  /** Instruction sets that this machine can run, best first. */
  isas: IsaName[];
  /** The instruction set in use, `null` on the reference backend. */
  isa: IsaName | null;
  /** Threads one op may use. */
  threads: number;
  platform: string;
  node: string;
}

export interface Defaults {
  backend?: 'auto' | BackendName;
  /** Threads one op may use, 1 to 256. Default: `HEDDLE_THREADS`, else the processors this process may use. */
  threads?: number;
  /** Forces an instruction set. Default: `HEDDLE_ISA`, else the best one available. */
  isa?: 'auto' | IsaName;
}

const BACKENDS = ['auto', 'cpu', 'reference', 'cuda'] as const;
const MAX_THREADS = 256;

interface State {
  root: string;
  version: string;
  addon: Addon | null;
  cpu: BackendInfo;
  /** Loaded when first asked for. */
  cuda: { device: CudaDevice | null; info: BackendInfo } | null;
  chosen: 'auto' | BackendName;
  threads: number;
  hardwareThreads: number;
  /** A forced setting that cannot be met: thrown by every op until changed. */
  broken: HeddleError | null;
}

/** The folder of heddle's own package.json. */
export function packageRoot(): string {
  let dir = dirname(fileURLToPath(import.meta.url));
  for (;;) {
    const file = join(dir, 'package.json');
    if (existsSync(file)) {
      try {
        if (JSON.parse(readFileSync(file, 'utf8')).name === 'heddle') return dir;
      } catch {
        // A damaged package.json on the way up is somebody else's: keep looking.
      }
    }
    const up = dirname(dir);
    if (up === dir) throw new HeddleError('ERR_INTERNAL', 'heddle cannot find its own package.json');
    dir = up;
  }
}

function loadAddon(root: string): { addon: Addon | null; cpu: BackendInfo } {
  const require = createRequire(join(root, 'package.json'));
  const remedy =
    `no prebuilt binary fits ${process.platform}-${process.arch}, Node ${process.version}; ` +
    `to build one: install a C++17 compiler and python3, then run "npx node-gyp rebuild" in ${root}`;
  try {
    const build = require('node-gyp-build');
    const path: string = build.resolve(root);
    try {
      return { addon: require(path) as Addon, cpu: { available: true, path } };
    } catch (error) {
      return {
        addon: null,
        cpu: { available: false, path, reason: `${path} does not load: ${(error as Error).message}`, remedy },
      };
    }
  } catch (error) {
    return {
      addon: null,
      cpu: { available: false, reason: (error as Error).message.split('\n')[0], remedy },
    };
  }
}

const CUDA_FILE =
  process.platform === 'win32'
    ? 'heddle_cuda.dll'
    : process.platform === 'darwin'
      ? 'libheddle_cuda.dylib'
      : 'libheddle_cuda.so';

/** Looks for the CUDA library: HEDDLE_CUDA_LIBRARY, beside the addon, prebuilds, and what build:cuda made. */
function loadCuda(s: State): NonNullable<State['cuda']> {
  const missing = (reason: string, remedy: string, path?: string) => ({
    device: null,
    info: { available: false, ...(path === undefined ? {} : { path }), reason, remedy },
  });
  const useCpu = 'use the cpu backend';
  if (s.addon === null)
    return missing('it needs the native binary, which is not loaded', s.cpu.remedy ?? useCpu);
  if (typeof s.addon.openCuda !== 'function') {
    return missing('the native binary is older than this package', 'rebuild it');
  }
  const given = process.env['HEDDLE_CUDA_LIBRARY'];
  const places = [
    join(dirname(s.cpu.path ?? s.root), CUDA_FILE),
    join(s.root, 'prebuilds', `${process.platform}-${process.arch}`, CUDA_FILE),
    join(s.root, 'build-cuda', CUDA_FILE),
  ];
  const path = given || places.find((p) => existsSync(p));
  if (path === undefined) {
    return missing(
      `${CUDA_FILE} was not found (${places.join(', ')})`,
      'build it with "npm run build:cuda" (needs nvcc), or set HEDDLE_CUDA_LIBRARY to its path',
    );
  }
  const opened = s.addon.openCuda(path);
  if (typeof opened === 'string') return missing(opened, useCpu, path);
  const device = `${opened.device}, compute capability ${opened.computeCapability}`;
  return { device: opened, info: { available: true, path, device } };
}

/** The CUDA device, loading its library when first asked for. */
export function cudaDevice(): CudaDevice {
  const s = state ?? getState();
  s.cuda ??= loadCuda(s);
  const { device, info } = s.cuda;
  if (device !== null) return device;
  throw new HeddleError('ERR_BACKEND', `backend cuda is not available: ${info.reason}. ${info.remedy}`);
}

function parseThreads(value: unknown, name: string): number {
  if (!Number.isInteger(value) || (value as number) < 1 || (value as number) > MAX_THREADS) {
    throw new HeddleError('ERR_OPTION', `${name} must be an integer from 1 to ${MAX_THREADS}, got ${value}`);
  }
  return value as number;
}

let state: State | null = null;

function getState(): State {
  if (state !== null) return state;
  const root = packageRoot();
  const version = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')).version as string;
  const s: State = {
    root,
    version,
    addon: null,
    cpu: { available: false },
    cuda: null,
    chosen: 'auto',
    threads: 1,
    hardwareThreads: 1,
    broken: null,
  };
  const wanted = process.env['HEDDLE_BACKEND'];
  if (wanted === 'reference') {
    s.cpu = {
      available: false,
      reason: 'HEDDLE_BACKEND=reference: the native binary was not loaded',
      remedy: 'unset HEDDLE_BACKEND',
    };
  } else {
    Object.assign(s, loadAddon(root));
  }
  if (s.addon !== null) s.hardwareThreads = s.threads = s.addon.machine().hardwareThreads;
  state = s;
  try {
    applyDefaults(
      s,
      {
        backend: envChoice(wanted, 'HEDDLE_BACKEND', BACKENDS),
        isa: process.env['HEDDLE_ISA'] as IsaName | undefined,
        // An empty variable counts as unset, as for the other two.
        threads: process.env['HEDDLE_THREADS'] ? Number(process.env['HEDDLE_THREADS']) : undefined,
      },
      'HEDDLE_',
    );
  } catch (error) {
    s.broken = error as HeddleError;
  }
  return s;
}

function envChoice<T extends string>(
  value: string | undefined,
  name: string,
  allowed: readonly T[],
): T | undefined {
  if (value === undefined || value === '') return undefined;
  if ((allowed as readonly string[]).includes(value)) return value as T;
  throw new HeddleError('ERR_OPTION', `${name} must be one of ${allowed.join(', ')}, got '${value}'`);
}

function applyDefaults(s: State, defaults: Defaults, prefix: string): void {
  const label = (name: string) => (prefix === '' ? name : prefix + name.toUpperCase());
  if (defaults.threads !== undefined) s.threads = parseThreads(defaults.threads, label('threads'));
  if (defaults.backend !== undefined) {
    if (!BACKENDS.includes(defaults.backend)) {
      throw new HeddleError(
        'ERR_OPTION',
        `${label('backend')} must be one of ${BACKENDS.join(', ')}, got '${defaults.backend}'`,
      );
    }
    if (defaults.backend !== 'auto') requireBackend(s, defaults.backend);
    s.chosen = defaults.backend;
  }
  if (defaults.isa !== undefined && (defaults.isa as string) !== '') {
    if (s.addon === null) {
      throw new HeddleError(
        'ERR_BACKEND',
        `${label('isa')}=${defaults.isa} needs the native backend: ${s.cpu.reason ?? 'not loaded'}`,
      );
    }
    const isa = defaults.isa === 'auto' ? s.addon.machine().isas[0] : defaults.isa;
    if (!s.addon.setIsa(String(isa))) {
      throw new HeddleError(
        'ERR_BACKEND',
        `${label('isa')}=${isa} is not available on this machine; available: ${s.addon.machine().isas.join(', ')}`,
      );
    }
  }
}

function requireBackend(s: State, backend: BackendName): void {
  if (backend === 'cuda') cudaDevice();
  if (backend === 'cpu' && s.addon === null) {
    throw new HeddleError(
      'ERR_BACKEND',
      `backend cpu is not available: ${s.cpu.reason}. ${s.cpu.remedy ?? ''}`,
    );
  }
}

/**
 * Checks a call's `backend` and says where the call runs: the addon, the CUDA library's ops, or `null` for the
 * reference.
 */
export function resolveBackend(backend: 'auto' | BackendName | undefined): Addon | null {
  const s = state ?? getState();
  if (s.broken !== null) throw s.broken;
  const name = backend ?? s.chosen;
  if (name === 'auto') return s.addon;
  if (name === 'reference') return null;
  if (!BACKENDS.includes(name)) {
    throw new HeddleError('ERR_OPTION', `backend must be one of ${BACKENDS.join(', ')}, got '${name}'`);
  }
  if (name === 'cuda') return cudaDevice().ops;
  requireBackend(s, name);
  return s.addon;
}

/** The backend whose ops these are. */
export function backendOf(addon: Addon | null): BackendName {
  if (addon === null) return 'reference';
  return addon === state?.cuda?.device?.ops ? 'cuda' : 'cpu';
}

export function resolveThreads(threads: number | undefined): number {
  return threads === undefined ? (state ?? getState()).threads : parseThreads(threads, 'threads');
}

/** The addon for modules that need more than ops (memory maps, handles), or `null`. */
export function nativeAddon(): Addon | null {
  return (state ?? getState()).addon;
}

/**
 * What is running and why: version, backends with the reason and remedy for each that is missing, CPU features,
 * instruction set, threads. Never throws.
 */
export function info(): Info {
  const s = getState();
  s.cuda ??= loadCuda(s);
  const machine = s.addon?.machine();
  const active: BackendName = s.chosen === 'auto' ? (s.addon ? 'cpu' : 'reference') : s.chosen;
  const cpu = { ...s.cpu };
  if (s.broken !== null) {
    cpu.reason = s.broken.message;
    cpu.remedy = 'change the environment variable or call setDefaults';
  }
  return {
    version: s.version,
    backend: active,
    backends: {
      cpu,
      reference: { available: true },
      cuda: { ...s.cuda.info },
    },
    cpuFeatures: machine?.cpuFeatures ?? [],
    isas: machine?.isas ?? [],
    isa: active === 'cpu' && s.addon ? s.addon.getIsa() : null,
    threads: active === 'reference' ? 1 : s.threads,
    platform: `${process.platform}-${process.arch}`,
    node: process.version,
  };
}

/**
 * Sets what ops use when a call says nothing else. Applies to this thread (each worker has its own settings).
 * @throws HeddleError `ERR_OPTION` for a value that is not allowed, `ERR_BACKEND` for a backend or instruction
 *   set that this machine cannot run
 */
export function setDefaults(defaults: Defaults): void {
  const s = getState();
  for (const key of Object.keys(defaults)) {
    if (key !== 'backend' && key !== 'threads' && key !== 'isa') {
      throw new HeddleError(
        'ERR_OPTION',
        `setDefaults: unknown option '${key}'; known: backend, threads, isa`,
      );
    }
  }
  applyDefaults(s, defaults, '');
  s.broken = null;
}
