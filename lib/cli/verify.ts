import { writeFileSync } from 'node:fs';
import { REPORT_VERSION, type RunInfo, runInfo } from '../../bench/report.ts';
import { cudaDevice, info } from '../backend.ts';
import type { WeightType } from '../gemm/linear.ts';
import {
  type Command,
  type Context,
  FILTER_OPTION,
  numberOption,
  SEED_OPTION,
  seedOf,
  selectCases,
  UsageError,
} from './command.ts';
import { formatError, formatTable } from './format.ts';
import { startProgress } from './progress.ts';
import { keepingIsa, selectVariants, type Variant } from './variants.ts';
import { type VerifyResult, type VerifyRow, verifiable, verifyCases } from './verifyCases.ts';
import { verifyCheckpoint } from './verifyCheckpoint.ts';

/** What `--json` writes. */
export interface VerifyReport extends RunInfo, VerifyResult {
  format: 'heddle-verify';
  passed: boolean;
}

export function verifyTable(rows: VerifyRow[], tty: boolean): string {
  return formatTable(
    ['op', 'variant', 'cases', 'max error', 'bound', 'max ULP', 'result'],
    rows.map((r) => [
      r.op,
      r.variant,
      String(r.cases),
      formatError(r.relative),
      formatError(r.tolerance),
      r.ulp < 1e5 ? String(r.ulp) : formatError(r.ulp), // near zero a unit in the last place is tiny
      r.failed === 0 ? 'pass' : `FAIL (${r.failed})`,
    ]),
    tty,
    [2, 3, 4, 5],
  );
}

/** Verifies and prints; the number of failures. */
export async function runVerify(
  cases: Context['cases'],
  variants: Variant[],
  seed: number,
  { io }: Context,
): Promise<VerifyResult> {
  const progress = startProgress(io, 'verify', cases.length);
  let first = true;
  const result = await keepingIsa(() =>
    verifyCases(cases, variants, seed, (label) => {
      if (!first) progress.step();
      first = false;
      progress.note(label);
    }),
  );
  progress.step();
  progress.stop();
  io.out(verifyTable(result.rows, io.tty));
  for (const f of result.failures) io.out(`FAIL ${f.case} on ${f.variant}: ${f.message}`);
  return result;
}

/** The cases whose op the CUDA library has; says which ops it lacks. */
function withKernels(cases: Context['cases'], io: Context['io']): Context['cases'] {
  const { ops } = cudaDevice();
  const lacking = new Set(cases.filter((c) => !(c.op in ops)).map((c) => c.op));
  if (lacking.size > 0) io.out(`without a CUDA kernel: ${[...lacking].join(', ')}`);
  return cases.filter((c) => c.op in ops && c.cuda !== false);
}

export const verifyCommand: Command = {
  name: 'verify',
  usage: '[family] [--filter TEXT] [--backend B] [--isa ISA] [--seed N] [--json FILE]',
  summary:
    'Runs every case on every backend and instruction set against the reference, on fresh random data.\n' +
    '  With --checkpoint: one MoE layer of a checkpoint of yours, on random tokens.',
  positionals: 1,
  options: {
    filter: FILTER_OPTION,
    backend: { type: 'string', value: 'B', help: 'cpu, cuda or reference (default: cpu where it loads)' },
    isa: {
      type: 'string',
      value: 'ISA',
      help: 'instruction sets, comma-separated (default: all this machine has)',
    },
    seed: SEED_OPTION,
    json: { type: 'string', value: 'FILE', help: 'also writes the result as JSON' },
    checkpoint: { type: 'string', value: 'DIR', help: 'folder with config.json and model*.safetensors' },
    layer: { type: 'string', value: 'N', help: 'with --checkpoint: which layer' },
    type: {
      type: 'string',
      value: 'T',
      help: 'with --checkpoint: type of the packed weights (default: as stored)',
    },
  },
  async run(values, [family], context) {
    const { io } = context;
    const seed = seedOf(values);
    const variants = selectVariants(values, io);
    io.out(`seed ${seed}`);
    let result: VerifyResult;
    const checkpoint = values['checkpoint'];
    if (checkpoint !== undefined) {
      if (family !== undefined && family !== 'moe') {
        throw new UsageError(`--checkpoint goes with the family moe, not ${family}`);
      }
      if (values['layer'] === undefined) throw new UsageError('--checkpoint needs --layer N');
      const layer = numberOption(values, 'layer', { min: 0, max: 1e6, integer: true }, 0);
      const type = values['type'] as WeightType | undefined; // MoELayer.load says which there are
      const directory = String(checkpoint);
      result = await keepingIsa(() => verifyCheckpoint({ directory, layer, type }, variants, seed));
      io.out(verifyTable(result.rows, io.tty));
      for (const f of result.failures) io.out(`FAIL ${f.case} on ${f.variant}: ${f.message}`);
    } else {
      for (const name of ['layer', 'type']) {
        if (values[name] !== undefined) throw new UsageError(`--${name} needs --checkpoint DIR`);
      }
      let cases = verifiable(selectCases(context.cases, family, values['filter']));
      if (values['backend'] === 'cuda') cases = withKernels(cases, io);
      if (cases.length === 0) throw new UsageError('no case matches');
      result = await runVerify(cases, variants, seed, context);
    }
    const failed = result.failures.length;
    const total = result.rows.reduce((sum, r) => sum + r.cases, 0);
    io.out(failed === 0 ? `${total} passed` : `${failed} of ${total} failed; repeat with --seed ${seed}`);
    if (values['json'] !== undefined) {
      const report: VerifyReport = {
        format: 'heddle-verify',
        ...runInfo(seed, info().threads),
        version: REPORT_VERSION,
        passed: failed === 0,
        ...result,
      };
      writeFileSync(String(values['json']), `${JSON.stringify(report, null, 2)}\n`);
    }
    return failed === 0 ? 0 : 1;
  },
};
