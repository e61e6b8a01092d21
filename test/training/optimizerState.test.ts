import { readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { openCheckpointSync, Tensor } from '../../lib/index.ts';
import {
  type PrivateLayer,
  type PrivateOptimizer,
  type PrivateOptimizerOptions,
  ShuffledSampler,
} from '../../lib/privacy/index.ts';
import { expectRejection, expectThrow } from '../helpers/errors.ts';
import { temporaryFolder } from '../helpers/program.ts';
import {
  flatten,
  imageModel,
  KEY,
  layersOf,
  optimizerFor,
  type Problem,
  textModel,
} from '../helpers/training.ts';

describe('PrivateOptimizer: state and refusals', () => {
  it.each([
    { type: 'sgd', learningRate: 0.5, momentum: 0.9 },
    { type: 'adamw', learningRate: 0.01 },
    { type: 'lamb', learningRate: 0.01 },
  ] as const)('saved and resumed by another process state: the same bits ($type)', async (algorithm) => {
    const folder = temporaryFolder();
    try {
      const path = join(folder.path, 'run.safetensors');
      const train = (problem: Problem, optimizer: PrivateOptimizer, steps: number) => {
        for (let t = 0; t < steps; t++) {
          optimizer.learningRate *= 0.9;
          optimizer.accumulateSync(layersOf(problem, t % 3, 6));
          optimizer.stepSync();
        }
      };
      const make = (problem: Problem) =>
        optimizerFor(problem.model, {
          algorithm,
          noiseMultiplier: 1,
          lossScale: { initial: 4, growthInterval: 3 },
        });
      const through = textModel();
      const whole = make(through);
      train(through, whole, 2);
      const early = whole.state();
      await whole.save(path);
      train(through, whole, 4);

      for (const load of ['file', 'file, sync', 'JSON and arrays'] as const) {
        const problem = textModel();
        problem.model.initialize(99); // everything must come from the state
        const optimizer = make(problem);
        optimizer.accumulateSync(layersOf(problem)); // forgotten by the load
        if (load === 'file') await optimizer.loadFile(path);
        else if (load === 'file, sync') optimizer.loadFileSync(path);
        else optimizer.load(early);
        expect(optimizer.steps).toBe(2);
        train(problem, optimizer, 4);
        expect(flatten(problem.model)).toEqual(flatten(through.model));
        expect(optimizer.ledger.toJSON()).toEqual(whole.ledger.toJSON());
        expect(optimizer.state()).toEqual(whole.state());
      }
    } finally {
      folder.remove();
    }
  });

  it('refuses a state of another key, configuration, model, or a damaged one, and changes nothing', () => {
    const folder = temporaryFolder();
    try {
      const path = join(folder.path, 's.safetensors');
      const { model } = imageModel();
      const optimizer = optimizerFor(model, { noiseMultiplier: 1 });
      optimizer.stepSync();
      optimizer.saveSync(path);
      const metadata = openCheckpointSync(path).metadata['heddle.privacy.optimizer'];
      expect(metadata).not.toContain(Buffer.from(KEY).toString('hex'));
      const before = flatten(model);
      const refused = (more: Partial<PrivateOptimizerOptions>, message: RegExp) =>
        expectThrow(
          () => optimizerFor(model, { noiseMultiplier: 1, ...more }).loadFileSync(path),
          'ERR_CHECKPOINT',
          message,
        );
      refused({ key: KEY.map((k) => k + 1) }, /another key/);
      refused({ noiseMultiplier: 2 }, /noiseMultiplier was 1 and is 2. A changed run needs a new key/);
      refused({ maxNorm: 1 }, /clipping.maxNorm was 0.5 and is 1/);
      refused({ sampler: { sampleRate: 0.02, expectedBatch: 8 } }, /sampleRate was 0.01/);
      refused({ algorithm: { type: 'sgd', learningRate: 1, momentum: 0.9 } }, /algorithm.momentum/);
      refused({ layers: textModel().model.layers }, /parameters/);
      const state = optimizer.state();
      const other = optimizerFor(imageModel().model, { noiseMultiplier: 1 });
      expectThrow(() => other.load({ ...state, format: 'x' as never }), 'ERR_CHECKPOINT', /format/);
      expectThrow(() => other.load({ ...state, version: 1 as never }), 'ERR_CHECKPOINT', /version/);
      const fewer = { ...state.progress, steps: 0 };
      expectThrow(
        () => other.load({ ...state, progress: fewer }),
        'ERR_CHECKPOINT',
        /the ledger has 1 steps, the state 0/,
      );
      expectThrow(
        () => other.load({ ...state, tensors: {} }),
        'ERR_CHECKPOINT',
        /tensor parameter.0.weight is missing/,
      );
      writeFileSync(path, readFileSync(path).subarray(0, 2000));
      expectThrow(() => other.loadFileSync(path), 'ERR_CHECKPOINT', /./);
      rmSync(path);
      expectThrow(() => other.loadFileSync(path), 'ERR_CHECKPOINT', /no such file/);
      expectThrow(
        () => optimizer.saveSync(join(path, 'in', 'a', 'file')),
        'ERR_CHECKPOINT',
        /cannot be written/,
      );
      expect(other.steps).toBe(0);
      expect(flatten(model)).toEqual(before);
    } finally {
      folder.remove();
    }
  });

  it('refuses what would void the guarantee', async () => {
    const problem = imageModel();
    const { model } = problem;
    const layers = layersOf(problem);
    const optimizer = optimizerFor(model, { noiseMultiplier: 1 });
    const { '0': conv, ...rest } = layers;
    await expectRejection(
      optimizer.accumulate(rest),
      'ERR_ARGUMENT',
      /layers.0 is missing: every trained layer/,
    );
    await expectRejection(
      optimizer.accumulate({ ...layers, 9: conv }),
      'ERR_ARGUMENT',
      /layers.9 is not a layer/,
    );
    const lstm = { ...layers, 4: { kind: 'lstm' } as never };
    await expectRejection(optimizer.accumulate(lstm), 'ERR_ARGUMENT', /kind must be one of/);
    const unbiased = { ...layers, 4: { ...layers['4'], bias: false } as PrivateLayer };
    await expectRejection(optimizer.accumulate(unbiased), 'ERR_ARGUMENT', /bias/);
    const fewer = { ...layers, 4: layersOf(problem, 0, 2)['4'] };
    await expectRejection(
      optimizer.accumulate(fewer),
      'ERR_SHAPE',
      /layers.4: expected 6 as layers.0 samples, got 2/,
    );
    // None of these left a trace.
    const other = imageModel();
    const fresh = optimizerFor(other.model, { noiseMultiplier: 1 });
    optimizer.accumulateSync(layers);
    fresh.accumulateSync(layersOf(other));
    expectThrow(() => optimizer.state(), 'ERR_ARGUMENT', /half accumulated/);
    optimizer.stepSync();
    fresh.stepSync();
    expect(flatten(model)).toEqual(flatten(other.model));
    const together = [optimizer.accumulate(layersOf(problem)), optimizer.step()];
    await expectRejection(together[1], 'ERR_ARGUMENT', /another call of this optimizer is running/);
    await together[0];
    optimizer.learningRate = Number.NaN;
    expectThrow(() => optimizer.stepSync(), 'ERR_OPTION', /learningRate/);
    expect(optimizer.ledger.steps).toBe(1);

    const frozen = optimizerFor(model, { layers: { '4': model.layers['4'] }, frozen: ['0', '1'] });
    expect(frozen.accumulateSync(layersOf(problem)).samples).toBe(6);
    const shuffled = new ShuffledSampler({ key: KEY, size: 100, batch: 10 });
    const make = (more: object) => () => optimizerFor(model, more as Partial<PrivateOptimizerOptions>);
    expectThrow(make({ sampler: shuffled }), 'ERR_OPTION', /its batches are 'shuffled'/);
    expectThrow(make({ sampler: { sampleRate: 0, expectedBatch: 1 } }), 'ERR_OPTION', /sampleRate/);
    expectThrow(make({ sampler: { sampleRate: 0.1 } }), 'ERR_OPTION', /expectedBatch/);
    expectThrow(make({ noiseMultiplier: undefined }), 'ERR_OPTION', /noiseMultiplier/);
    expectThrow(make({ maxNorm: Infinity }), 'ERR_OPTION', /maxNorm/);
    expectThrow(make({ mode: 'softly' }), 'ERR_OPTION', /mode/);
    expectThrow(make({ key: KEY.slice(1) }), 'ERR_ARGUMENT', /32 bytes/);
    expectThrow(make({ layers: {} }), 'ERR_ARGUMENT', /at least one layer/);
    expectThrow(make({ learningRate: 1 }), 'ERR_OPTION', /unknown option 'learningRate'/);
    expectThrow(make({ grouping: { '0': 0 } }), 'ERR_OPTION', /group/);
    expectThrow(make({ grouping: { x: 0 } }), 'ERR_OPTION', /grouping.x/);
    expectThrow(make({ lossScale: 3 }), 'ERR_OPTION', /power of two/);
    expectThrow(make({ noiseMultiplier: 1, lossScale: { countNoise: 0 } }), 'ERR_OPTION', /countNoise/);
    expectThrow(make({ algorithm: { type: 'adam', learningRate: 1 } }), 'ERR_OPTION', /algorithm.type/);
    expectThrow(make({ algorithm: { type: 'sgd' } }), 'ERR_OPTION', /algorithm.learningRate/);
    expectThrow(
      make({ algorithm: { type: 'sgd', learningRate: 1, nesterov: true } }),
      'ERR_OPTION',
      /nesterov/,
    );
    expectThrow(make({ algorithm: { type: 'adamw', learningRate: 1, beta2: 1 } }), 'ERR_OPTION', /beta2/);
    const tied = { a: model.layers['4'], b: { weight: model.layers['4'].weight } };
    expectThrow(make({ layers: tied }), 'ERR_ARGUMENT', /layers.b.weight shares memory with layers.a.weight/);
    const half = { a: { weight: new Tensor('bfloat16', new Uint16Array(2), [1, 2]) } };
    expectThrow(make({ layers: half }), 'ERR_DTYPE', /layers.a.weight/);
  });
});
