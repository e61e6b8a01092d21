// Helpers of the scripts beside it: hashing inputs and running programs. Plain Node, no dependencies.
import { spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync, readdirSync, readFileSync, realpathSync, statSync } from 'node:fs';
import { dirname, join } from 'node:path';

function* filesUnder(root, path) {
  const stat = statSync(join(root, path), { throwIfNoEntry: false });
  if (stat === undefined) return;
  if (stat.isFile()) {
    yield path;
    return;
  }
  for (const name of readdirSync(join(root, path)).sort()) yield* filesUnder(root, `${path}/${name}`);
}

/** Hash of the names and contents of files (folders are walked), and of `extra`. */
export function hashFiles(root, paths, extra = '') {
  const hash = createHash('sha256').update(extra);
  for (const path of paths) {
    for (const file of filesUnder(root, path)) {
      hash.update(`\0${file}\0`).update(readFileSync(join(root, file)));
    }
  }
  return hash.digest('hex');
}

/**
 * Runs a program to its end and never rejects: `{ code, error, output }`, stdout and stderr together. `echo` also
 * prints what arrives; `timeout` is in seconds.
 */
export function run(command, args, { cwd, env, input, echo = false, timeout } = {}) {
  return new Promise((resolve) => {
    const child = spawn(command, args, { cwd, env: env ?? process.env, stdio: ['pipe', 'pipe', 'pipe'] });
    let output = '';
    let timer;
    if (timeout !== undefined) {
      timer = setTimeout(() => {
        output += `\nstopped after ${timeout} s`;
        child.kill('SIGKILL');
      }, timeout * 1000);
    }
    for (const stream of [child.stdout, child.stderr]) {
      stream.setEncoding('utf8');
      stream.on('data', (text) => {
        output += text;
        if (echo) process.stdout.write(text);
      });
    }
    child.on('error', (error) => {
      clearTimeout(timer);
      resolve({ code: null, error: error.message, output });
    });
    child.on('close', (code, signal) => {
      clearTimeout(timer);
      resolve({ code, error: signal ?? undefined, output });
    });
    child.stdin.on('error', () => {});
    child.stdin.end(input ?? '');
  });
}

/** The first of these programs that runs, or null. */
export async function findProgram(...names) {
  for (const name of names) {
    if ((await run(name, ['--version'])).code === 0) return name;
  }
  return null;
}

/**
 * Where Node's headers are on this machine, so that node-gyp need not download them: beside the running node, or
 * in a system folder (Node-API is ABI-stable, so another version's headers serve as well).
 */
export function findNodeHeaders() {
  const beside = dirname(dirname(realpathSync(process.execPath)));
  for (const prefix of [beside, process.env.npm_config_nodedir, '/usr/local', '/usr']) {
    if (!prefix) continue;
    const include = join(prefix, 'include/node');
    if (existsSync(join(include, 'node_api.h')) && existsSync(join(include, 'common.gypi'))) return prefix;
  }
  return null;
}
