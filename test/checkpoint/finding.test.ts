import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { describe, expect, it } from 'vitest';
import { openCheckpoint, openCheckpointSync } from '../../lib/checkpoint.ts';
import { CheckpointFolder, f32, refused, using } from '../helpers/checkpointFiles.ts';
import { rejection, thrown } from '../helpers/errors.ts';
import { writeSafetensors } from '../helpers/safetensors.ts';

const files = new CheckpointFolder();
const { fresh, write, sharded } = files;

describe('finding the files', () => {
  it('reads an index and its shards, by directory or index path', async () => {
    const { dir, index } = sharded();
    for (const given of [dir, index]) {
      const c = await openCheckpoint(given);
      expect([...c.tensors.keys()]).toEqual(['x', 'y', 'z']);
      expect(c.info('x').file).toBe(path.join(dir, 'a.safetensors'));
      expect(c.info('z').file).toBe(path.join(dir, 'b.safetensors'));
      expect(c.readSync('x').data).toEqual(new Float32Array([1, 2]));
      expect((await c.read('z')).data).toEqual(new Float32Array([4, 5, 6]));
      expect({ ...c.metadata }).toEqual({ format: 'pt', only: 'a' });
      c.close();
    }
  });

  it('prefers the index, then model.safetensors, then the only file', async () => {
    const { dir, index } = sharded();
    writeSafetensors(path.join(dir, 'model.safetensors'), { single: f32(1) });
    const names = () => using(openCheckpointSync(dir), (c) => [...c.tensors.keys()]);
    expect(names()).toEqual(['x', 'y', 'z']);
    fs.rmSync(index);
    expect(names()).toEqual(['single']);
    fs.rmSync(path.join(dir, 'model.safetensors'));
    await refused(dir, dir, /holds 2 \*\.safetensors files \(a.safetensors, b.safetensors\)/);
    fs.rmSync(path.join(dir, 'b.safetensors'));
    expect(names()).toEqual(['x']);
    fs.rmSync(path.join(dir, 'a.safetensors'));
    await refused(dir, dir, /holds no safetensors file/);
  });

  it('finds an index of another stem', () => {
    const { dir, index } = sharded();
    fs.renameSync(index, path.join(dir, 'diffusion_pytorch_model.safetensors.index.json'));
    using(openCheckpointSync(dir), (c) => expect(c.tensors.size).toBe(3));
  });

  it('keeps tensors that the index does not list, and shards in folders below', () => {
    const { dir } = sharded((index) => {
      delete index.weight_map['z'];
      index.weight_map['w'] = 'sub/c.safetensors';
      return index;
    });
    fs.mkdirSync(path.join(dir, 'sub'));
    writeSafetensors(path.join(dir, 'sub', 'c.safetensors'), { w: f32(9) });
    using(openCheckpointSync(dir), (c) => expect([...c.tensors.keys()]).toEqual(['x', 'y', 'z', 'w']));
  });

  it.skipIf(process.platform === 'win32')('follows symbolic links, as model caches use them', () => {
    const { dir, index } = sharded();
    const snapshot = path.join(dir, 'snapshot');
    fs.mkdirSync(snapshot);
    for (const name of [path.basename(index), 'a.safetensors', 'b.safetensors']) {
      fs.symlinkSync(path.join('..', name), path.join(snapshot, name));
    }
    using(openCheckpointSync(snapshot), (c) => expect(c.tensors.size).toBe(3));
  });

  it('refuses what is not there or not a file', async () => {
    const missing = path.join(files.root, 'missing');
    await refused(missing, `${missing}: no such file or directory`);
    await refused(path.join(write('x'), 'below-a-file'), /no such file/);
    const { dir } = sharded();
    fs.mkdirSync(path.join(dir, 'model.safetensors'));
    fs.rmSync(path.join(dir, 'model.safetensors.index.json'));
    await refused(dir, /model\.safetensors: (is not a regular file|cannot be read)/);
    expect((await rejection(openCheckpoint('a\0b'))).code).toBe('ERR_CHECKPOINT');
    for (const bad of ['', undefined, null, 3, {}]) {
      expect(thrown(() => openCheckpointSync(bad as never)).code).toBe('ERR_ARGUMENT');
      expect((await rejection(openCheckpoint(bad as never))).code).toBe('ERR_ARGUMENT');
    }
    const option = await rejection(openCheckpoint(dir, { map: 'always' as never }));
    expect(option.code).toBe('ERR_OPTION');
    expect(option.message).toContain('"always"');
  });

  it.skipIf(process.platform === 'win32')('does not wait on a named pipe', async () => {
    const pipe = fresh();
    execFileSync('mkfifo', [pipe]);
    await refused(pipe, /not a regular file/);
  });

  it('refuses an index that does not fit its shards', async () => {
    const missing = sharded();
    fs.rmSync(path.join(missing.dir, 'b.safetensors'));
    await refused(missing.dir, /b\.safetensors: no such file/);

    const absent = sharded((index) => ({
      ...index,
      weight_map: { ...index.weight_map, gone: 'b.safetensors' },
    }));
    await refused(absent.dir, /b\.safetensors: tensor "gone" is missing; .*index\.json promises it here/);

    const wrong = sharded((index) => ({
      ...index,
      weight_map: { ...index.weight_map, y: 'a.safetensors' },
    }));
    await refused(wrong.dir, /a\.safetensors: tensor "y" is missing/);

    const earlier = sharded(() => ({ weight_map: { y: 'b.safetensors', z: 'a.safetensors' } }));
    await refused(earlier.dir, /a\.safetensors: tensor "z" is missing/);

    const twice = sharded();
    writeSafetensors(path.join(twice.dir, 'b.safetensors'), { y: f32(3), z: f32(1), x: f32(1) });
    await refused(twice.dir, /b\.safetensors: tensor "x" is also in .*a\.safetensors/);

    const damaged = sharded();
    fs.truncateSync(path.join(damaged.dir, 'b.safetensors'), 5);
    await refused(damaged.dir, /b\.safetensors: truncated/);
  });

  it.each([
    '../a.safetensors',
    'sub/../../a.safetensors',
    'sub/../a.safetensors',
    '/etc/passwd',
    '..',
    '.',
    '',
    './a.safetensors',
    'sub//a.safetensors',
    '..\\a.safetensors',
    'C:\\a.safetensors',
    'C:a.safetensors',
    '\\\\host\\a.safetensors',
    'a.safetensors\0',
    5,
    null,
    ['a.safetensors'],
  ])('refuses the shard name %j', async (name) => {
    // Files exist where a traversal would lead, so only the check can refuse.
    const { dir } = sharded((index) => ({ weight_map: { ...index.weight_map, t: name } }));
    fs.mkdirSync(path.join(dir, 'sub'));
    writeSafetensors(path.join(files.root, 'a.safetensors'), { t: f32(1), x: f32(1) });
    await refused(dir, /index\.json: tensor "t" is mapped to/);
  });

  it.each([
    ['not JSON', 'nonsense', /not a JSON object/],
    ['an array', '[]', /not a JSON object/],
    ['cut short', '{"weight_map":{"x":"a.safe', /does not end/],
    ['without weight_map', '{"metadata":{}}', /has no weight_map/],
    ['with a weight_map of another kind', '{"weight_map":["a"]}', /weight_map is not a JSON object/],
    ['with a tensor twice', '{"weight_map":{"x":"a.safetensors","x":"b.safetensors"}}', /"x" twice/],
    ['with bad metadata', '{"metadata":{nonsense},"weight_map":{}}', /not valid JSON/],
  ])('refuses an index %s', async (_, text, message) => {
    const { dir, index } = sharded(() => text);
    await refused(dir, index, message);
  });

  it('reads config.json beside the weights', async () => {
    const file = fresh('model.safetensors');
    writeSafetensors(file, { a: f32(1) });
    using(openCheckpointSync(file), (c) => expect(c.config).toBeUndefined());
    const config = path.join(path.dirname(file), 'config.json');
    fs.writeFileSync(config, '{"model_type":"mixtral","num_local_experts":8}');
    for (const given of [file, path.dirname(file)]) {
      using(openCheckpointSync(given), (c) => {
        expect(c.config).toEqual({ model_type: 'mixtral', num_local_experts: 8 });
      });
    }
    for (const bad of ['{"a":', '[]', 'null', '', Buffer.from([0x22, 0xff, 0x22])]) {
      fs.writeFileSync(config, bad);
      await refused(file, config);
    }
    fs.truncateSync(config, 9 * 1024 * 1024);
    await refused(file, config, /at most/);
  });
});
