import { cpSync, existsSync, mkdirSync, readdirSync, symlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { requireDist, root, runCommand, temporaryFolder } from '../helpers/program.ts';

// The package as users get it: packed, installed without a network in a folder of its own, and run from ESM and
// CommonJS, first without prebuilt binaries, then with.
const temporary = temporaryFolder();
afterAll(() => temporary.remove());

const MODULES = ['dist', 'package.json', 'README.md', 'LICENSE'];

async function succeed(command: string, args: string[], cwd: string, timeout = 120_000): Promise<string> {
  const r = await runCommand(command, args, { cwd, timeout, env: { NO_COLOR: '1' } });
  if (r.code !== 0)
    throw new Error(`${command} ${args.join(' ')}: ${r.code ?? r.signal}\n${r.stdout}${r.stderr}`);
  return r.stdout;
}

interface Packed {
  file: string;
  contents: string[];
}

async function pack(folder: string): Promise<Packed> {
  const text = await succeed(
    'npm',
    ['pack', '--json', '--ignore-scripts', '--pack-destination', temporary.path],
    folder,
  );
  const [{ filename, files }] = JSON.parse(text);
  return { file: join(temporary.path, filename), contents: files.map((f: { path: string }) => f.path) };
}

/** A program's folder that depends on the tarball; node-gyp-build is packed from node_modules, so no registry. */
async function install(name: string, tarball: string, dependency: string): Promise<string> {
  const app = join(temporary.path, name);
  mkdirSync(app);
  const dependencies = { heddle: `file:${tarball}`, 'node-gyp-build': `file:${dependency}` };
  writeFileSync(join(app, 'package.json'), JSON.stringify({ name, private: true, dependencies }));
  await succeed('npm', ['install', '--offline', '--no-audit', '--no-fund'], app);
  const body = `
    const logits = new Tensor('float32', Float32Array.from([1, 3, 2, 0]), [1, 4]);
    const { indices } = await routeTopK(logits, { k: 2, normalize: true });
    const { weights } = routeTopKSync(logits, { k: 2, normalize: true });
    const { backend, backends, version } = info();
    console.log(JSON.stringify({ backend, cpu: backends.cpu, version, ids: [...indices.data], weights: [...weights.data] }));`;
  writeFileSync(
    join(app, 'esm.mjs'),
    `import { Tensor, info } from 'heddle';\nimport { routeTopK, routeTopKSync } from 'heddle/moe';\n${body}`,
  );
  writeFileSync(
    join(app, 'cjs.cjs'),
    `const { Tensor, info } = require('heddle');\nconst { routeTopK, routeTopKSync } = require('heddle/moe');\n` +
      `(async () => {${body}})();`,
  );
  return app;
}

async function expectRuns(app: string, backend: string) {
  for (const file of ['esm.mjs', 'cjs.cjs']) {
    const out = JSON.parse(await succeed(process.execPath, [file], app));
    expect(out.ids).toEqual([1, 2]);
    expect(out.weights[0] + out.weights[1]).toBeCloseTo(1, 6);
    expect(out.backend).toBe(backend);
    expect(out.cpu.available).toBe(backend === 'cpu');
    if (backend === 'cpu') expect(out.cpu.path).toMatch(/node_modules.heddle.prebuilds./);
    else expect(out.cpu.reason).toMatch(/No native build/);
  }
}

describe('the packed tarball', () => {
  let bare: Packed;
  let dependency: string;
  beforeAll(async () => {
    requireDist();
    // A copy, so that prebuilds that lie in the working tree do not matter.
    const copy = join(temporary.path, 'bare');
    for (const name of MODULES) {
      if (existsSync(join(root, name))) cpSync(join(root, name), join(copy, name), { recursive: true });
    }
    bare = await pack(copy);
    dependency = (await pack(join(root, 'node_modules/node-gyp-build'))).file;
  });

  it('holds the built package and nothing that would make npm compile', async () => {
    const { contents } = await pack(root);
    expect(contents).toContain('dist/index.js');
    expect(contents).toContain('dist/index.cjs');
    expect(contents).toContain('dist/moe/index.d.ts');
    expect(contents).toContain('dist/moe/index.d.cts');
    expect(contents).toContain('LICENSE');
    const foreign = contents.filter(
      (f) => !/^(dist|prebuilds)\/|^(package\.json|README\.md|LICENSE)$/.test(f),
    );
    expect(foreign).toEqual([]);
    expect(contents.filter((f) => f.includes('stamp'))).toEqual([]);
  });

  it('without prebuilds: ESM and CommonJS run on the reference', async () => {
    await expectRuns(await install('app-bare', bare.file, dependency), 'reference');
  });

  it('with prebuilds: node-gyp-build finds the binary', { timeout: 300_000 }, async () => {
    const copy = join(temporary.path, 'prebuilt');
    for (const name of [...MODULES, 'native', 'binding.gyp']) {
      if (existsSync(join(root, name))) cpSync(join(root, name), join(copy, name), { recursive: true });
    }
    symlinkSync(join(root, 'node_modules'), join(copy, 'node_modules'), 'junction');
    await succeed(process.execPath, [join(root, 'scripts/prebuild.mjs'), '--cwd', copy], root, 280_000);
    const folder = `prebuilds/${process.platform}-${process.arch}`;
    const [binary, ...others] = readdirSync(join(copy, folder));
    expect(binary).toMatch(/\.node$/);
    expect(others).toEqual([]);
    const packed = await pack(copy);
    expect(packed.contents).toContain(`${folder}/${binary}`);
    await expectRuns(await install('app-prebuilt', packed.file, dependency), 'cpu');
  });

  it('passes publint', async () => {
    const { publint } = await import('publint');
    const { formatMessage } = await import('publint/utils');
    const pkg = JSON.parse(
      await succeed(process.execPath, ['-p', 'JSON.stringify(require("./package.json"))'], root),
    );
    const { messages } = await publint({ pkgDir: root, strict: true });
    let found = messages.map((m) => formatMessage(m, pkg, { color: false }) ?? m.code);
    if (!existsSync(join(root, 'lib/cli/main.ts'))) {
      console.log('publint on the command line skipped: lib/cli/main.ts does not exist yet');
      found = found.filter((text) => !text.includes('pkg.bin'));
    }
    expect(found).toEqual([]);
  });

  it('passes attw: types resolve for ESM, CommonJS and bundlers', async () => {
    // The profile leaves out node10, a resolution that ignores "exports"; Node 20 does not use it.
    const attw = join(root, 'node_modules/@arethetypeswrong/cli/dist/index.js');
    await succeed(process.execPath, [attw, bare.file, '--profile', 'node16', '--no-color'], temporary.path);
  });
});
