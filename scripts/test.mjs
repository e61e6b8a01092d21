// Everything that `npm test` runs, one part after another. Ends with the plain line `N passed, N failed`.
//
//   npm test                 all parts
//   npm test -- routeTopK    only vitest, with that filter
//   npm test -- --part native,types      only the parts whose name contains one of these words
//
// A part that cannot run here says why; that is neither a pass nor a failure. What counts: every vitest test, every
// native test, and one each for lint, types and builds.
import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { findProgram, run } from './process.mjs';

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const temporary = mkdtempSync(join(tmpdir(), 'heddle-test-'));
const environment = { ...process.env, NO_COLOR: '1' };
for (const name of [
  'FORCE_COLOR',
  'HEDDLE_BACKEND',
  'HEDDLE_ISA',
  'HEDDLE_THREADS',
  'HEDDLE_PREBUILD',
  'HEDDLE_CUDA_LIBRARY',
]) {
  delete environment[name];
}
const PART_TIMEOUT = 900;

const bin = {
  biome: 'node_modules/@biomejs/biome/bin/biome',
  tsc: 'node_modules/typescript/bin/tsc',
  vitest: 'node_modules/vitest/vitest.mjs',
  cmakeJs: 'node_modules/cmake-js/bin/cmake-js',
};

function node(script, args, options = {}) {
  const env = { ...environment, ...options.env };
  return run(process.execPath, [join(root, script), ...args], {
    cwd: root,
    timeout: PART_TIMEOUT,
    ...options,
    env,
  });
}

/** A part that passes or fails as one. */
async function single(promise) {
  const { code, output } = await promise;
  return { passed: code === 0 ? 1 : 0, failed: code === 0 ? 0 : 1, output };
}

let vitestRuns = 0;

/** One vitest run, counted through its JSON reporter. */
async function vitest(args, env = {}, echo = false) {
  const file = join(temporary, `vitest-${vitestRuns++}.json`);
  const reporters = ['--reporter=default', '--reporter=json', `--outputFile.json=${file}`];
  const { code, output } = await node(bin.vitest, ['run', ...reporters, ...args], { env, echo });
  let passed = 0;
  let failed = 0;
  let skipped = 0;
  if (existsSync(file)) {
    const report = JSON.parse(readFileSync(file, 'utf8'));
    passed = report.numPassedTests;
    failed = report.numFailedTests;
    skipped = report.numPendingTests + report.numTodoTests;
    // A file that does not load has no tests to fail.
    failed += report.testResults.filter(
      (f) => f.status === 'failed' && f.assertionResults.length === 0,
    ).length;
  }
  if (code !== 0 && failed === 0) failed = 1;
  const reasons = [...new Set(output.match(/.*\bskipped: .*/g) ?? [])];
  return { passed, failed, output, notes: skipped > 0 ? [`${skipped} skipped`, ...reasons] : reasons };
}

/** Configures, builds and runs one preset of CMakePresets.json. */
async function preset(name) {
  const cmake = (args) => run('cmake', args, { cwd: root, env: environment, timeout: PART_TIMEOUT });
  const generator = (await findProgram('ninja')) ? ['-G', 'Ninja'] : [];
  let configured = await cmake(['--preset', name, ...generator]);
  if (configured.code !== 0) {
    // A folder left by another generator or compiler.
    rmSync(join(root, `build-${name}`), { recursive: true, force: true });
    configured = await cmake(['--preset', name, ...generator]);
  }
  if (configured.code !== 0) return { passed: 0, failed: 1, output: configured.output };
  const built = await cmake(['--build', '--preset', name, '--parallel', '2']);
  if (built.code !== 0) return { passed: 0, failed: 1, output: built.output };
  return ctest(['--preset', name], built.output);
}

/** Runs the native tests of a build folder. */
async function ctest(where, builtOutput) {
  const tested = await run('ctest', [...where, '--verbose'], {
    cwd: root,
    env: environment,
    timeout: PART_TIMEOUT,
  });
  let passed = 0;
  let failed = 0;
  for (const [, p, f] of tested.output.matchAll(/^\d+: (\d+) passed, (\d+) failed\s*$/gm)) {
    passed += Number(p);
    failed += Number(f);
  }
  if (tested.code !== 0 && failed === 0) failed = 1; // crashed, or a sanitizer ended it
  const warnings = builtOutput.match(/.*\bwarning: .*/g) ?? [];
  const notes = [...warnings, ...new Set(tested.output.match(/skipped: .*/g) ?? [])];
  return { passed, failed, output: tested.output, notes };
}

async function sanitizerMissing(flag) {
  const out = join(temporary, `probe-${flag.replace(',', '-')}`);
  const args = ['-x', 'c++', '-', `-fsanitize=${flag}`, '-pthread', '-o', out];
  const compiler = process.env.CXX ?? 'c++';
  const { code } = await run(compiler, args, { input: 'int main() { return 0; }' });
  if (code !== 0) return `${compiler} has no -fsanitize=${flag}`;
  return (await run(out, [])).code === 0 ? null : `a program built with -fsanitize=${flag} does not run here`;
}

const has = {
  cmake: (await findProgram('cmake')) !== null,
  clang: (await findProgram('clang++')) !== null,
  cross: (await findProgram('aarch64-linux-gnu-g++')) !== null,
  qemu: (await findProgram('qemu-aarch64-static', 'qemu-aarch64')) !== null,
};
has.nvcc = (await findProgram(process.env.NVCC ?? 'nvcc', '/usr/local/cuda/bin/nvcc')) !== null;
const needsCmake = () => (has.cmake ? null : 'cmake is not installed');

/** What the built package says about this machine. */
async function packageInfo(env = {}) {
  const program = "import('./dist/index.js').then((h) => console.log(JSON.stringify(h.info())))";
  const { output } = await run(process.execPath, ['-e', program], {
    cwd: root,
    env: { ...environment, ...env },
  });
  return JSON.parse(output);
}

const machine = await packageInfo();
const families = ['test/moe'];

const parts = [
  { name: 'lint (biome)', run: () => single(node(bin.biome, ['check', '.'])) },
  { name: 'types (tsc)', run: () => single(node(bin.tsc, ['--noEmit'])) },
  { name: 'types of the package, ESM', run: () => single(node(bin.tsc, ['-p', 'test/types/esm'])) },
  { name: 'types of the package, CommonJS', run: () => single(node(bin.tsc, ['-p', 'test/types/cjs'])) },
  { name: 'vitest', run: () => vitest(['--exclude', 'test/runtime/**']) },
  // These measure lateness: one file at a time, beside nothing else.
  { name: 'vitest, runtime', alone: true, run: () => vitest(['test/runtime', '--no-file-parallelism']) },
  { name: 'vitest, HEDDLE_BACKEND=reference', run: () => vitest(families, { HEDDLE_BACKEND: 'reference' }) },
  {
    name: 'vitest, no native binary',
    async run() {
      const env = { HEDDLE_PREBUILD: temporary };
      const { cpu } = (await packageInfo(env)).backends;
      if (cpu.available)
        return { passed: 0, failed: 1, output: `the binary was found all the same: ${cpu.path}` };
      return vitest(families, env);
    },
  },
  ...machine.isas.slice(1).map((isa) => ({
    name: `vitest, HEDDLE_ISA=${isa}`,
    run: () => vitest(families, { HEDDLE_ISA: isa }),
  })),
  // The longest first: two run at a time.
  {
    name: 'CUDA kernels on the host shim',
    skip: () =>
      needsCmake() ??
      (process.platform === 'linux' ? null : 'the shim needs Linux') ??
      (machine.backends.cpu.available ? null : machine.backends.cpu.reason),
    async run() {
      // Under AddressSanitizer where that runs: then every access out of bounds is found.
      const asan = (await sanitizerMissing('address')) === null;
      const name = asan ? 'cuda-host-asan' : 'cuda-host';
      const native = await preset(name);
      if (native.failed > 0) return native;
      const env = {
        HEDDLE_CUDA_LIBRARY: join(root, `build-${name}`, 'libheddle_cuda_host.so'),
        HEDDLE_TEST_CUDA: 'required',
      };
      if (asan) {
        const { output } = await run(process.env.CXX ?? 'c++', ['-print-file-name=libasan.so']);
        env.LD_PRELOAD = output.trim();
        env.ASAN_OPTIONS = 'detect_leaks=0';
      }
      const result = await vitest(['test/cuda'], env);
      return { ...result, passed: native.passed + result.passed };
    },
  },
  {
    name: 'native tests, and the addon, built by cmake-js',
    skip: needsCmake,
    async run() {
      const folder = 'build-cmake/build';
      const built = await node(bin.cmakeJs, ['compile', '--out', folder, '--CDHEDDLE_TESTS=ON']);
      if (built.code !== 0) return { passed: 0, failed: 1, output: built.output };
      const native = await ctest(['--test-dir', folder], built.output);
      if (native.failed > 0) return native;
      const env = { HEDDLE_PREBUILD: join(root, 'build-cmake'), HEDDLE_BACKEND: 'cpu' };
      const { cpu } = (await packageInfo(env)).backends;
      if (!cpu.available || !cpu.path.includes('build-cmake')) {
        return { passed: 0, failed: 1, output: `loaded ${cpu.path}: ${cpu.reason}` };
      }
      const addon = await vitest(['test/moe/routeTopK.test.ts'], env);
      return { ...addon, passed: native.passed + addon.passed };
    },
  },
  {
    name: 'native tests, ASan + UBSan',
    skip: () => needsCmake() ?? sanitizerMissing('address,undefined'),
    run: () => preset('asan-ubsan'),
  },
  {
    name: 'native tests of the pool, TSan',
    skip: () => needsCmake() ?? sanitizerMissing('thread'),
    run: () => preset('tsan'),
  },
  {
    name: 'native tests, clang',
    skip: () => needsCmake() ?? (has.clang ? null : 'clang++ is not installed'),
    run: () => preset('clang'),
  },
  {
    name: 'native tests, 64-bit Arm under qemu',
    skip: () =>
      needsCmake() ??
      (has.cross ? null : 'aarch64-linux-gnu-g++ is not installed') ??
      (has.qemu ? null : 'qemu-aarch64-static is not installed'),
    run: () => preset('neon-cross'),
  },
  {
    // `npm run build:cuda` compiles for sm_80 and PTX as well, which takes minutes more.
    name: 'CUDA library compiles (sm_90a), no spills',
    skip: () => needsCmake() ?? (has.nvcc ? null : 'nvcc is not installed'),
    run: () => single(node('scripts/build-cuda.mjs', ['--arch', '90a-real'])),
  },
];

async function runPart(part) {
  const reason = await part.skip?.();
  if (reason) {
    console.log(`--   ${part.name}: skipped, ${reason}`);
    return { passed: 0, failed: 0 };
  }
  const started = Date.now();
  const result = await part.run();
  const seconds = ((Date.now() - started) / 1000).toFixed(1);
  if (result.failed > 0) console.log(result.output.split('\n').slice(-150).join('\n'));
  const mark = result.failed === 0 ? 'ok  ' : 'FAIL';
  console.log(`${mark} ${part.name}: ${result.passed} passed, ${result.failed} failed (${seconds} s)`);
  for (const note of result.notes ?? []) console.log(`       ${note.trim()}`);
  return result;
}

let chosen = parts;
const args = process.argv.slice(2);
if (args[0] === '--part') {
  const words = (args[1] ?? '').split(',');
  chosen = parts.filter((p) => words.some((w) => p.name.includes(w)));
} else if (args.length > 0) {
  chosen = [{ name: `vitest ${args.join(' ')}`, run: () => vitest(args, {}, true) }];
}

let passed = 0;
let failed = 0;
async function count(part) {
  const result = await runPart(part);
  passed += result.passed;
  failed += result.failed;
}
try {
  // Two at a time: linkers, test programs and the start of a run leave a core idle, a third of the time in all.
  const queue = chosen.filter((part) => !part.alone);
  const worker = async () => {
    for (let part = queue.shift(); part; part = queue.shift()) await count(part);
  };
  await Promise.all([worker(), worker()]);
  for (const part of chosen) if (part.alone) await count(part);
} finally {
  rmSync(temporary, { recursive: true, force: true });
}
console.log(`${passed} passed, ${failed} failed`);
process.exitCode = failed > 0 || passed === 0 ? 1 : 0;
