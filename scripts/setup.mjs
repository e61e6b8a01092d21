// Makes a clone ready to run, and does nothing when it already is: dependencies, the native binary, dist/.
//
//   node scripts/setup.mjs                     all three; fails when the native binary cannot be built
//   node scripts/setup.mjs --optional-native   goes on with the TypeScript reference in that case
//
// Needs Node and npm only (it runs before `npm ci`). Exit codes: 0 ready, 1 a step failed, 2 something is missing.
import { existsSync, mkdirSync, readFileSync, rmSync, statSync, utimesSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { findNodeHeaders, hashFiles, run } from './process.mjs';

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const optionalNative = process.argv.includes('--optional-native');
const STAMP = '.heddle-stamp.json';

function say(text) {
  console.log(`heddle setup: ${text}`);
}

class SetupError extends Error {
  constructor(code, message) {
    super(message);
    this.code = code;
  }
}

function checkNode() {
  const [major, minor] = process.versions.node.split('.').map(Number);
  if (major < 20 || (major === 20 && minor < 17)) {
    throw new SetupError(
      2,
      `Node ${process.versions.node} is too old: heddle needs 20.17 or newer (https://nodejs.org)`,
    );
  }
}

/** A stamp lives inside the folder that it describes, so that deleting the folder deletes the stamp. */
function isFresh(folder, product, hash) {
  try {
    return (
      existsSync(join(root, product)) &&
      JSON.parse(readFileSync(join(root, folder, STAMP), 'utf8')).hash === hash
    );
  } catch {
    return false;
  }
}

function writeStamp(folder, hash) {
  mkdirSync(join(root, folder), { recursive: true });
  writeFileSync(join(root, folder, STAMP), JSON.stringify({ hash }) + '\n');
}

async function step(title, command, args) {
  say(`${title} ...`);
  const started = Date.now();
  const result = await run(command, args, { cwd: root });
  if (result.code !== 0) {
    const lines = result.output.trimEnd().split('\n');
    const shown = lines.length <= 80 ? lines : [...lines.slice(0, 20), '...', ...lines.slice(-60)];
    const ending = result.code ?? result.error;
    const error = new SetupError(
      1,
      `${title} failed: ${command} ${args.join(' ')} ended with ${ending}\n${shown.join('\n')}`,
    );
    error.output = result.output;
    throw error;
  }
  say(`${title}: done in ${((Date.now() - started) / 1000).toFixed(1)} s`);
  return result.output;
}

/** The npm that runs this script, else the one on PATH. */
function npmCommand() {
  const path = process.env.npm_execpath;
  if (path?.endsWith('.js')) return [process.execPath, [path]];
  return process.platform === 'win32' ? ['cmd', ['/c', 'npm']] : ['npm', []];
}

/** Whether what is installed is what package-lock.json says (for a node_modules that this script did not make). */
function installedMatchesLock() {
  try {
    const wanted = JSON.parse(readFileSync(join(root, 'package-lock.json'), 'utf8')).packages;
    const found = JSON.parse(readFileSync(join(root, 'node_modules/.package-lock.json'), 'utf8')).packages;
    return Object.entries(wanted).every(
      ([path, entry]) => path === '' || entry.optional || found[path]?.version === entry.version,
    );
  } catch {
    return false;
  }
}

async function installDependencies() {
  const hash = hashFiles(root, ['package-lock.json']);
  if (isFresh('node_modules', 'node_modules/.package-lock.json', hash)) return;
  if (!installedMatchesLock()) {
    const [command, args] = npmCommand();
    const quiet = ['--no-audit', '--no-fund', '--no-update-notifier'];
    try {
      await step('installing dependencies (npm ci)', command, [...args, 'ci', ...quiet]);
    } catch (error) {
      // npm ci refuses a lock file that lacks other platforms' optional packages, which npm install leaves out when
      // a registry does not carry them.
      if (!error.output?.includes('EUSAGE')) throw error;
      say('npm ci refuses package-lock.json; trying npm install, which still takes its versions from there');
      await step('installing dependencies (npm install)', command, [
        ...args,
        'install',
        '--no-save',
        ...quiet,
      ]);
    }
  }
  writeStamp('node_modules', hash);
}

async function works(command, args, input) {
  return (await run(command, args, { cwd: root, input })).code === 0;
}

/** Names what is missing to build the binary; Visual Studio is found (or reported) by node-gyp itself. */
async function missingTools() {
  if (process.platform === 'win32') return [];
  const missing = [];
  const program =
    '#include <atomic>\ntemplate <class T> int f() { if constexpr (sizeof(T) > 1) return 1; return 0; }';
  const compilers = process.env.CXX ? [process.env.CXX] : ['g++', 'c++', 'clang++'];
  let compiler = false;
  for (const name of compilers) {
    const [command, ...flags] = name.split(' ');
    compiler ||= await works(command, [...flags, '-std=c++17', '-fsyntax-only', '-x', 'c++', '-'], program);
  }
  if (!compiler) missing.push(`a C++17 compiler (tried ${compilers.join(', ')})`);
  if (!(await works('make', ['--version']))) missing.push('make');
  if (!(await works(process.env.PYTHON ?? 'python3', ['--version']))) missing.push('python3');
  return missing;
}

async function buildNative() {
  const inputs = ['native', 'binding.gyp', 'node_modules/node-addon-api/package.json'];
  const hash = hashFiles(root, inputs, `${process.platform}-${process.arch}`);
  const product = 'build/Release/heddle.node';
  if (isFresh('build', product, hash)) return;
  const missing = await missingTools();
  if (missing.length > 0) {
    const remedy =
      process.platform === 'darwin'
        ? 'xcode-select --install'
        : 'apt-get install g++ make python3 (or the like)';
    throw new SetupError(
      2,
      `the native binary cannot be built: ${missing.join(' and ')} not found. Remedy: ${remedy}`,
    );
  }
  const headers = findNodeHeaders();
  const args = [join(root, 'node_modules/node-gyp/bin/node-gyp.js'), 'configure', 'build', '--jobs', 'max'];
  if (headers !== null) args.push(`--nodedir=${headers}`);
  try {
    await step('building the native binary (node-gyp)', process.execPath, args);
  } catch (error) {
    if (headers === null) {
      error.message +=
        '\nNode headers were not found beside node, so node-gyp tried to download them. Without a network, install ' +
        "your distribution's headers (libnode-dev) or set npm_config_nodedir=<folder with include/node>.";
    }
    throw error;
  }
  if (!existsSync(join(root, product))) throw new SetupError(1, `node-gyp ended well but left no ${product}`);
  writeStamp('build', hash);
}

async function buildTypeScript() {
  const hash = hashFiles(root, [
    'lib',
    'tsup.config.ts',
    'tsconfig.json',
    'package.json',
    'package-lock.json',
  ]);
  if (isFresh('dist', 'dist/index.js', hash)) {
    // A checkout gives sources new times and the same content: the tests that compare times must not call it stale.
    const now = new Date();
    utimesSync(join(root, 'dist/index.js'), now, now);
    return;
  }
  rmSync(join(root, 'dist'), { recursive: true, force: true });
  await step('building TypeScript (tsup)', process.execPath, [
    join(root, 'node_modules/tsup/dist/cli-default.js'),
  ]);
  if (!existsSync(join(root, 'dist/index.js')))
    throw new SetupError(1, 'tsup ended well but left no dist/index.js');
  writeStamp('dist', hash);
}

try {
  checkNode();
  if (!statSync(join(root, 'package-lock.json'), { throwIfNoEntry: false })) {
    throw new SetupError(2, 'package-lock.json is missing: this is not a full clone');
  }
  await installDependencies();
  try {
    await buildNative();
  } catch (error) {
    if (!optionalNative) throw error;
    say(`${error.message}\nheddle setup: going on with the TypeScript reference, which is slower`);
  }
  await buildTypeScript();
} catch (error) {
  console.error(`heddle setup: ${error instanceof SetupError ? error.message : error.stack}`);
  process.exitCode = error instanceof SetupError ? error.code : 1;
}
