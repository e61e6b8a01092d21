import { type ChildProcessWithoutNullStreams, spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { packageRoot } from '../../lib/backend.ts';
import type { PeerSpec } from '../../test/cases/case.ts';
import type { Entrant } from '../harness.ts';
import type { Peer } from './peer.ts';

interface Reply {
  ready?: string;
  times?: number[];
  error?: string;
}

/** bench/peers/pytorch.py as a child: one JSON request per line, one JSON reply per line. */
class PythonChild {
  private readonly waiting: { resolve(reply: Reply): void; reject(error: Error): void }[] = [];
  private gone: Error | null = null;
  private stderr = '';

  constructor(private readonly child: ChildProcessWithoutNullStreams) {
    createInterface({ input: child.stdout }).on('line', (line) => {
      const next = this.waiting.shift();
      try {
        next?.resolve(JSON.parse(line) as Reply);
      } catch {
        next?.reject(new Error(`unexpected line from python: ${line.slice(0, 200)}`));
      }
    });
    child.stderr.on('data', (chunk: Buffer) => {
      this.stderr = (this.stderr + chunk.toString()).slice(-2000);
    });
    child.stdin.on('error', () => {}); // the exit is reported by the handlers below
    child.on('error', (error) => this.end(error));
    child.on('close', (code) => {
      const last = this.stderr.trim().split('\n').at(-1);
      this.end(new Error(last || `python ended with code ${code}`));
    });
  }

  private end(error: Error): void {
    this.gone ??= error;
    for (const w of this.waiting.splice(0)) w.reject(this.gone);
  }

  reply(): Promise<Reply> {
    if (this.gone) return Promise.reject(this.gone);
    return new Promise((resolve, reject) => this.waiting.push({ resolve, reject }));
  }

  async ask(request: object): Promise<Reply> {
    const reply = this.reply();
    this.child.stdin.write(`${JSON.stringify(request)}\n`);
    const answer = await reply;
    if (answer.error !== undefined) throw new Error(answer.error);
    return answer;
  }

  close(): void {
    this.child.stdin.end();
    this.child.kill();
  }
}

/** Starts the interpreter named by HEDDLE_PYTHON, else python3. */
export async function connectPytorch(): Promise<Peer> {
  const script = join(packageRoot(), 'bench', 'peers', 'pytorch.py');
  if (!existsSync(script)) {
    throw new Error('the peer scripts are not part of the installed package: use a clone of heddle');
  }
  const python = process.env['HEDDLE_PYTHON'] || 'python3';
  const child = new PythonChild(spawn(python, ['-u', script], { stdio: 'pipe' }));
  let hello: Reply;
  try {
    hello = await child.reply();
  } catch (error) {
    child.close();
    throw new Error(`${python}: ${(error as Error).message} (HEDDLE_PYTHON names the interpreter)`);
  }
  return {
    name: 'pytorch',
    version: hello.ready ?? 'unknown',
    async entrant(spec: PeerSpec, threads: number): Promise<Entrant> {
      await child.ask({ ...spec, threads, seconds: 0 }); // makes the data, warms up, or says what is missing
      return {
        name: 'pytorch',
        round: async (seconds) => (await child.ask({ ...spec, threads, seconds })).times ?? [],
      };
    },
    close: () => child.close(),
  };
}
