// `npm run build:cuda`: builds build-cuda/libheddle_cuda.so with nvcc, without warnings, and writes what ptxas says of
// every kernel (registers, spills, shared memory) to build-cuda/kernels.json. Fails on a warning, and on spills in a
// kernel that native/cuda/main_kernels.json lists.
//
//   npm run build:cuda -- --arch 90a-real      only that, in place of sm_80, sm_90a and PTX
import { existsSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { findProgram, run } from './process.mjs';

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const folder = join(root, 'build-cuda');
const table = join(folder, 'kernels.json');

function fail(text) {
  console.error(text);
  process.exit(1);
}

/** The nvcc to use: `NVCC`, the one on PATH, or CUDA's default place. */
async function findNvcc() {
  for (const name of [process.env.NVCC, 'nvcc', '/usr/local/cuda/bin/nvcc']) {
    if (name && (await findProgram(name))) return name;
  }
  return null;
}

/** Kernel records in the output of one compilation. */
function* records(output, file) {
  let kernel = null;
  for (const line of output.split('\n')) {
    const entry = /Compiling entry function '(\S+)' for '(\S+)'/.exec(line);
    if (entry)
      kernel = { file, symbol: entry[1], architecture: entry[2], spillStores: 0, spillLoads: 0, stack: 0 };
    const spills = /(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads/.exec(line);
    if (spills && kernel) [kernel.stack, kernel.spillStores, kernel.spillLoads] = spills.slice(1).map(Number);
    const used = /Used (\d+) registers/.exec(line);
    if (!used || !kernel) continue;
    kernel.registers = Number(used[1]);
    kernel.sharedBytes = Number(/(\d+) bytes smem/.exec(line)?.[1] ?? 0);
    yield kernel;
    kernel = null;
  }
}

const nvcc = await findNvcc();
if (nvcc === null) fail('build:cuda needs nvcc (the CUDA toolkit, 12.0 or newer); set NVCC to its path');
const generator = (await findProgram('ninja')) ? ['-G', 'Ninja'] : [];
const [option, value] = process.argv.slice(2);
if (option !== undefined && (option !== '--arch' || !value))
  fail(`unknown option ${option}; there is --arch LIST`);
const architectures = `-DHEDDLE_CUDA_ARCHITECTURES=${value ?? '80-real;90a-real;90-virtual'}`;
const configure = ['--preset', 'cuda', ...generator, `-DCMAKE_CUDA_COMPILER=${nvcc}`, architectures];
let step = await run('cmake', configure, { cwd: root });
if (step.code !== 0) {
  rmSync(folder, { recursive: true, force: true });
  step = await run('cmake', configure, { cwd: root });
}
if (step.code !== 0) fail(step.output);
if (!existsSync(table))
  await run('cmake', ['--build', '--preset', 'cuda', '--target', 'clean'], { cwd: root });
step = await run('cmake', ['--build', '--preset', 'cuda', '--parallel', String(availableParallelism())], {
  cwd: root,
});
if (step.code !== 0) fail(step.output);
const warnings = step.output.match(/.*\bwarning\b.*/gi) ?? [];
if (warnings.length > 0) {
  rmSync(table, { force: true }); // so that the next build compiles everything and says it again
  fail(`warnings:\n${warnings.join('\n')}`);
}

// Files that were not compiled this time keep their records.
const kernels = existsSync(table) ? JSON.parse(readFileSync(table, 'utf8')) : [];
const parts = step.output.split(/^(?=\[.*Building CUDA object )/m);
const fresh = parts.flatMap((part) => {
  const file = /Building CUDA object \S*?(native\/\S+)\.o/.exec(part)?.[1];
  return file ? [{ file, kernels: [...records(part, file)] }] : [];
});
const sources = new Set(JSON.parse(readFileSync(join(root, 'native/sources.json'), 'utf8')).cuda);
const kept = kernels.filter((k) => sources.has(k.file) && !fresh.some((f) => f.file === k.file));
const all = [...kept, ...fresh.flatMap((f) => f.kernels)];
const names = await run('c++filt', [], { input: all.map((k) => k.symbol).join('\n') });
const readable = names.code === 0 ? names.output.trimEnd().split('\n') : [];
for (const [i, k] of all.entries()) {
  k.name = (readable[i] ?? k.symbol)
    .replaceAll(/heddle::|\(anonymous namespace\)::|^void /g, '')
    .replaceAll(/\(\w+\)(?=\d)/g, '') // casts of enumerators and booleans
    .replace(/\(.*$/, '');
}
all.sort((a, b) =>
  `${a.file} ${a.name} ${a.architecture}`.localeCompare(`${b.file} ${b.name} ${b.architecture}`),
);
writeFileSync(table, JSON.stringify(all, null, 1) + '\n');

for (const k of all) {
  const spills = k.spillStores + k.spillLoads > 0 ? `, spills ${k.spillStores} + ${k.spillLoads} bytes` : '';
  console.log(`${k.file} ${k.name} ${k.architecture}: ${k.registers} registers${spills}`);
}
const main = JSON.parse(readFileSync(join(root, 'native/cuda/main_kernels.json'), 'utf8'));
const missing = main.filter((name) => !all.some((k) => k.name.startsWith(name)));
if (missing.length > 0)
  fail(`native/cuda/main_kernels.json lists kernels that do not exist: ${missing.join(', ')}`);
const spilling = all.filter(
  (k) => k.spillStores + k.spillLoads > 0 && main.some((name) => k.name.startsWith(name)),
);
if (spilling.length > 0)
  fail(`main kernels spill: ${spilling.map((k) => `${k.name} ${k.architecture}`).join(', ')}`);
console.log(`${all.length} kernels, none of the main ones spills`);
