import { spawn } from 'node:child_process';
import { existsSync, mkdtempSync, readdirSync, rmSync, statSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

export const root = dirname(dirname(dirname(fileURLToPath(import.meta.url))));

function newest(folder: string): number {
  let time = 0;
  for (const entry of readdirSync(folder, { withFileTypes: true })) {
    const path = join(folder, entry.name);
    time = Math.max(time, entry.isDirectory() ? newest(path) : statSync(path).mtimeMs);
  }
  return time;
}

/** The runtime tests use the built package, as users do: throws when dist/ is missing or older than lib/. */
export function requireDist(): void {
  const built = join(root, 'dist/index.js');
  if (!existsSync(built)) throw new Error('dist/ is missing: run "npm run setup"');
  if (statSync(built).mtimeMs < newest(join(root, 'lib'))) {
    throw new Error('dist/ is older than lib/: run "npm run setup"');
  }
}

export interface ProgramResult {
  code: number | null;
  signal: NodeJS.Signals | null;
  stdout: string;
  stderr: string;
  milliseconds: number;
}

/** The environment of this process without what would steer heddle, plus `env`. */
export function cleanEnvironment(env: Record<string, string> = {}): NodeJS.ProcessEnv {
  const clean: NodeJS.ProcessEnv = {};
  for (const [name, value] of Object.entries(process.env)) {
    if (!/^(HEDDLE_|VITEST|NODE_OPTIONS|FORCE_COLOR)/.test(name)) clean[name] = value;
  }
  return { ...clean, ...env };
}

/** Runs a program to its end; killed after `timeout` ms, which shows as signal SIGKILL. */
export function runCommand(
  command: string,
  args: string[],
  {
    cwd = root,
    env = {},
    timeout = 60_000,
  }: { cwd?: string; env?: Record<string, string>; timeout?: number } = {},
): Promise<ProgramResult> {
  return new Promise((resolve, reject) => {
    const started = Date.now();
    const child = spawn(command, args, {
      cwd,
      env: cleanEnvironment(env),
      stdio: ['ignore', 'pipe', 'pipe'],
    });
    const timer = setTimeout(() => child.kill('SIGKILL'), timeout);
    let stdout = '';
    let stderr = '';
    child.stdout.setEncoding('utf8').on('data', (text) => {
      stdout += text;
    });
    child.stderr.setEncoding('utf8').on('data', (text) => {
      stderr += text;
    });
    child.on('error', reject);
    child.on('close', (code, signal) => {
      clearTimeout(timer);
      resolve({ code, signal, stdout, stderr, milliseconds: Date.now() - started });
    });
  });
}

/** Runs test/runtime/programs/`name` with this Node and returns the JSON on its last line; throws if it fails. */
export async function runProgram<T>(
  name: string,
  args: string[] = [],
  options: { env?: Record<string, string>; timeout?: number; nodeArgs?: string[] } = {},
): Promise<T & { milliseconds: number }> {
  const file = join(root, 'test/runtime/programs', name);
  const result = await runCommand(process.execPath, [...(options.nodeArgs ?? []), file, ...args], options);
  if (result.code !== 0) {
    throw new Error(
      `${name} ended with ${result.code ?? result.signal} after ${result.milliseconds} ms\n${result.stdout}${result.stderr}`,
    );
  }
  const line = result.stdout.trimEnd().split('\n').at(-1) ?? '';
  return { ...JSON.parse(line), milliseconds: result.milliseconds };
}

/** A temporary folder that is removed by `remove`. */
export function temporaryFolder(): { path: string; remove(): void } {
  const path = mkdtempSync(join(tmpdir(), 'heddle-'));
  return { path, remove: () => rmSync(path, { recursive: true, force: true }) };
}
