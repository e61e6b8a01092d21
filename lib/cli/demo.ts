import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { asyncEntrant, interleave } from '../../bench/harness.ts';
import { Random } from '../../test/cases/random.ts';
import { info, packageRoot } from '../backend.ts';
import { MoELayer } from '../moe/index.ts';
import { Tensor } from '../tensor.ts';
import { missesOf, runBench } from './bench.ts';
import { type Command, type Context, SEED_OPTION, seedOf } from './command.ts';
import { formatRate, formatRatio, formatTable, formatTime } from './format.ts';
import { infoCommand } from './info.ts';
import { keepingIsa, selectVariants, type Variant } from './variants.ts';
import { runVerify, verifyTable } from './verify.ts';
import { type VerifyResult, verifiable } from './verifyCases.ts';
import { verifyCheckpoint } from './verifyCheckpoint.ts';

interface GoldenLayer {
  directory: string;
  model: string;
  layer: number;
}

/** The checkpoints of test/golden/moe that a clone carries, each with its last layer (the first may be dense). */
export function goldenLayers(root = packageRoot()): GoldenLayer[] {
  const folder = join(root, 'test', 'golden', 'moe');
  if (!existsSync(folder)) return [];
  return readdirSync(folder, { withFileTypes: true })
    .filter((entry) => entry.isDirectory() && existsSync(join(folder, entry.name, 'config.json')))
    .map((entry) => {
      const directory = join(folder, entry.name);
      const config = JSON.parse(readFileSync(join(directory, 'config.json'), 'utf8'));
      return { directory, model: entry.name, layer: Number(config.num_hidden_layers) - 1 };
    });
}

const TOKENS = 64;

/** A row of the table of times: the layer on the default backend beside the reference. */
async function timeLayer({ directory, model, layer }: GoldenLayer, seed: number): Promise<string[]> {
  const own = await MoELayer.load(directory, { layer });
  const reference = await MoELayer.load(directory, { layer, backend: 'reference' });
  const random = new Random(seed);
  const x = new Tensor('float32', random.normals(TOKENS * own.hiddenSize), [TOKENS, own.hiddenSize]);
  const entrants = [own, reference].map((l) => asyncEntrant(l.backend, () => l.forward(x)));
  const [a, b] = await interleave(entrants, { seconds: 0.2, rounds: 3 });
  for (const l of [own, reference]) l.dispose();
  return [
    model,
    String(own.hiddenSize),
    formatTime(a.seconds),
    formatRate(TOKENS / a.seconds, 'token/s'),
    formatRatio(b.seconds / a.seconds),
  ];
}

/** Every golden checkpoint's MoE layer: verified on every variant, then timed on the one in use. */
async function showLayers(layers: GoldenLayer[], variants: Variant[], seed: number, { io }: Context) {
  if (layers.length === 0) return 0; // an installed package carries no checkpoints
  io.out('\nMoE layers read from checkpoints as they are on the hub, against the reference:');
  const all: VerifyResult = { rows: [], failures: [] };
  await keepingIsa(async () => {
    for (const { directory, layer } of layers) {
      const result = await verifyCheckpoint({ directory, layer }, variants, seed);
      all.rows.push(...result.rows);
      all.failures.push(...result.failures);
    }
  });
  io.out(verifyTable(all.rows, io.tty));
  for (const f of all.failures) io.out(`FAIL ${f.case} on ${f.variant}: ${f.message}`);

  io.out(`\nforward of ${TOKENS} tokens:`);
  const rows: string[][] = [];
  for (const layer of layers) rows.push(await timeLayer(layer, seed));
  io.out(formatTable(['checkpoint', 'hidden', 'time', 'rate', 'reference'], rows, io.tty, [1, 2, 3, 4]));
  return all.failures.length;
}

export const demoCommand: Command = {
  name: 'demo',
  usage: '',
  summary: 'Shows heddle at work on this machine: what runs, that it is right, and how fast it is.',
  positionals: 0,
  options: {
    seed: SEED_OPTION,
  },
  async run(values, _positionals, context) {
    const { io } = context;
    await infoCommand.run({}, [], context);
    const seed = seedOf(values);
    const variants = selectVariants({}, io);
    io.out(`\nevery MoE case on every instruction set, against the reference (seed ${seed}):`);
    const moe = context.cases.filter((c) => c.family === 'moe');
    const verified = await runVerify(verifiable(moe), variants, seed, context);
    const layerFailures = await showLayers(goldenLayers(), variants, seed, context);
    io.out('\nrouting speed:');
    const used = variants.filter((v) => v.name === 'reference' || v.name === `cpu/${info().isa}`);
    const report = await runBench(
      {
        cases: moe.filter((c) => c.bench && c.op === 'routeTopK'),
        variants: used,
        threads: info().threads,
        seconds: 0.3,
        seed,
        peers: false,
      },
      context,
    );
    const misses = verified.failures.length + layerFailures + missesOf(report);
    io.out('');
    io.out(misses === 0 ? 'every result is right' : `${misses} wrong results: see above`);
    return misses === 0 ? 0 : 1;
  },
};
