import { basename } from 'node:path';
import { type Comparison, compareOutputs, missOf } from '../../test/cases/case.ts';
import { Random } from '../../test/cases/random.ts';
import { HeddleError } from '../errors.ts';
import { Tensor } from '../tensor.ts';
import { type LayerClass, type LayerOptions, moeLayerClass } from './layerApi.ts';
import type { Variant } from './variants.ts';
import type { VerifyResult, VerifyRow } from './verifyCases.ts';

/** Tokens: one (decoding), a few, and enough that experts get many rows. */
const TOKENS = [1, 7, 64];

/** Bound of the relative error by the type of the packed weights; the reference reads the same (dequantised) ones. */
function toleranceOf(type: string | undefined): number {
  return type === undefined || type === 'float32' ? 5e-6 : 5e-3;
}

/** One layer of a checkpoint on every variant against the reference, on random tokens. */
export async function verifyCheckpoint(
  directory: string,
  options: Omit<LayerOptions, 'backend'>,
  variants: Variant[],
  seed: number,
  MoELayer: LayerClass | null = moeLayerClass(),
): Promise<VerifyResult> {
  if (MoELayer === null) throw new HeddleError('ERR_OPTION', 'this version of heddle has no MoELayer yet');
  const op = `${basename(directory)} layer ${options.layer}`;
  const tolerance = toleranceOf(options.type);
  const reference = await MoELayer.load(directory, { ...options, backend: 'reference' });
  const random = new Random(seed);
  const inputs = TOKENS.map(
    (t) => new Tensor('float32', random.normals(t * reference.hiddenSize), [t, reference.hiddenSize]),
  );
  const expected: Tensor[] = [];
  for (const x of inputs) expected.push(await reference.forward(x));
  reference.dispose();

  const result: VerifyResult = { rows: [], failures: [] };
  for (const variant of variants) {
    const row: VerifyRow = {
      op,
      variant: variant.name,
      cases: 0,
      relative: 0,
      tolerance,
      ulp: 0,
      failed: 0,
    };
    variant.use();
    const layer = await MoELayer.load(directory, { ...options, backend: variant.options.backend as 'cpu' });
    for (const [i, x] of inputs.entries()) {
      const comparison: Comparison = compareOutputs([await layer.forward(x)], [expected[i]]);
      const miss = missOf(comparison, tolerance);
      row.cases++;
      row.relative = Math.max(row.relative, comparison.relative);
      row.ulp = Math.max(row.ulp, comparison.ulp);
      if (miss === undefined) continue;
      row.failed++;
      result.failures.push({ case: `${op} T=${TOKENS[i]}`, variant: variant.name, message: miss });
    }
    layer.dispose();
    result.rows.push(row);
  }
  return result;
}
