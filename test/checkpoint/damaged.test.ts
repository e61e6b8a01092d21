import { describe, expect, it } from 'vitest';
import { MAX_HEADER_BYTES } from '../../lib/checkpoint/header.ts';
import { openCheckpointSync } from '../../lib/checkpoint.ts';
import { CheckpointFolder, refused, using } from '../helpers/checkpointFiles.ts';
import { rawSafetensors } from '../helpers/safetensors.ts';

const files = new CheckpointFolder();
const { write } = files;

describe('damaged files', () => {
  const entry = (dtype: unknown, shape: unknown, offsets: unknown) =>
    JSON.stringify({ dtype, shape, data_offsets: offsets });
  const good = entry('U8', [2], [0, 2]);
  const two = new Uint8Array(2);

  it('refuses truncated files', async () => {
    await refused(write(''), /truncated: 0 bytes/);
    const five = write('hello');
    await refused(five, five, /truncated: 5 bytes/);
    await refused(write(new Uint8Array(8)), /the header is not a JSON object/);
    const bytes = rawSafetensors(`{"a":${good}}`, two);
    await refused(write(bytes.subarray(0, 20)), /truncated: the header claims 53 bytes, the file has 20/);
    await refused(write(bytes.subarray(0, bytes.length - 1)), /tensor "a" lies outside the file \(truncated/);
  });

  it.each([
    ['longer than the file', 1000n, /claims 1000 bytes, the file has/],
    ['one byte too long', 56n, /claims 56 bytes/],
    [
      'just over the limit',
      BigInt(MAX_HEADER_BYTES) + 1n,
      /claims 100000001 bytes; the format allows 100000000/,
    ],
    ['of 100 GB', 100_000_000_000n, /claims 100000000000 bytes/],
    ['of 2^64 - 1', 2n ** 64n - 1n, /claims 18446744073709551615 bytes/],
  ])('refuses a header length %s without allocating it', async (_, length, message) => {
    const before = process.memoryUsage().arrayBuffers;
    await refused(write(rawSafetensors(`{"a":${good}}`, two, length)), message);
    expect(process.memoryUsage().arrayBuffers - before).toBeLessThan(1e6);
  });

  it.each([
    ['not JSON', 'hello world', /the header is not a JSON object/],
    ['an array', '[]', /the header is not a JSON object/],
    ['a string', '"{}"', /the header is not a JSON object/],
    ['null', 'null', /the header is not a JSON object/],
    ['cut short', '{"a":{"dtype":"U8"', /does not end/],
    ['cut in a string', '{"a', /string at character 1 does not end/],
    ['cut in an escape', '{"a\\', /string at character 1 does not end/],
    ['cut after the colon', '{"a":', /expected a value at character 5, found the end/],
    ['with a trailing comma', `{"a":${good},}`, /expected a key/],
    ['without a colon', '{"a" 1}', /expected ':'/],
    ['without a comma', `{"a":${good} "b":1}`, /expected ',' or '}'/],
    ['with text behind it', `{"a":${good}} x`, /expected the end/],
    ['two objects', `{"a":${good}}{}`, /expected the end/],
    ['with zero bytes behind it', `{"a":${good}}\0`, /expected the end/],
    ['with a byte order mark', `\ufeff{"a":${good}}`, /not a JSON object/],
    ['with a bad escape in a name', `{"\\x":${good}}`, /not valid JSON/],
    ['with a raw newline in a name', `{"a\n":${good}}`, /not valid JSON/],
    ['with half a surrogate pair in a name', `{"\\ud800":${good}}`, /not valid Unicode/],
    ['with mismatched brackets', '{"a":[}}', /does not end|not a JSON object/],
    ['nested 10^6 deep', `{"a":${'['.repeat(1e6)}${']'.repeat(1e6)}}`, /deeper than 128/],
  ])('refuses a header %s', async (_, text, message) => {
    const file = write(rawSafetensors(text, two));
    await refused(file, file, message);
  });

  it('refuses invalid UTF-8', async () => {
    const text = Buffer.from(`{"a?":${good}}`);
    text[text.indexOf('?')] = 0xff;
    await refused(write(rawSafetensors(text, two)), /not valid UTF-8/);
  });

  it.each([
    ['plain', '"a"', '"a"'],
    ['empty', '""', '""'],
    ['escaped', '"a"', '"\\u0061"'],
    ['escaped in two ways', '"\\n/"', '"\\u000a\\/"'],
    ['with quotes and backslashes', '"\\\\\\""', '"\\u005c\\u0022"'],
    ['__proto__', '"__proto__"', '"__proto__"'],
    ['astral', '"🧵"', '"\\ud83e\\uddf5"'],
  ])('refuses a name that occurs twice: %s', async (_, first, second) => {
    const name = JSON.stringify(JSON.parse(first));
    const text = `{${first}:${good},${second}:${good}}`;
    const error = await refused(write(rawSafetensors(text, two)), /twice/);
    expect(error.message).toContain(name);
  });

  it('refuses other duplicate keys, and is not fooled by keys inside values', async () => {
    await refused(
      write(rawSafetensors(`{"a":{"dtype":"U8",${good.slice(1)}}`, two)),
      /"a" has the key "dtype" twice/,
    );
    await refused(write(rawSafetensors(`{"__metadata__":{},"__metadata__":{},"a":${good}}`, two)), /twice/);
    await refused(write(rawSafetensors(`{"__metadata__":{"k":"1","k":"2"},"a":${good}}`, two)), /"k" twice/);
    const text = `{"__metadata__":{"a":"\\",\\"a\\":{"},"a":${good}}`;
    using(openCheckpointSync(write(rawSafetensors(text, two))), (c) => {
      expect(c.metadata).toEqual({ a: '","a":{' });
    });
  });

  it.each([
    ['an unknown dtype', entry('F7', [2], [0, 2]), /unknown dtype "F7"; known: F64/],
    ['a dtype in small letters', entry('u8', [2], [0, 2]), /unknown dtype/],
    ['a dtype that is a number', entry(8, [2], [0, 2]), /unknown dtype 8/],
    ['a dtype that is null', entry(null, [2], [0, 2]), /unknown dtype null/],
    ['a dtype named like a method', entry('constructor', [2], [0, 2]), /unknown dtype/],
    ['a negative dim', entry('U8', [-2], [0, 2]), /shape \[-2\]/],
    ['a negative zero', '{"dtype":"U8","shape":[-0],"data_offsets":[0,2]}', /shape/],
    ['a fractional dim', entry('U8', [1.5], [0, 2]), /shape \[1.5\]/],
    ['a string dim', entry('U8', ['2'], [0, 2]), /shape \["2"\]/],
    ['a null dim', entry('U8', [null], [0, 2]), /shape/],
    ['a nested shape', entry('U8', [[2]], [0, 2]), /shape/],
    ['a shape that is a number', entry('U8', 2, [0, 2]), /shape 2/],
    ['a shape that is an object', entry('U8', { length: 1, 0: 2 }, [0, 2]), /shape/],
    ['a dim beyond 2^53', '{"dtype":"U8","shape":[9007199254740993],"data_offsets":[0,2]}', /shape/],
    ['a dim of 1e999', '{"dtype":"U8","shape":[1e999],"data_offsets":[0,2]}', /shape/],
    ['dims that overflow', entry('U8', [2 ** 40, 2 ** 40], [0, 2]), /overflows/],
    ['dims that overflow before a zero', entry('U8', [2 ** 40, 2 ** 40, 0], [0, 2]), /overflows/],
    ['100 000 dims', entry('U8', new Array(100_000).fill(1), [0, 2]), /field "shape" of/],
    ['offsets that are strings', entry('U8', [2], ['0', '2']), /data_offsets/],
    ['one offset', entry('U8', [2], [2]), /data_offsets \[2\]/],
    ['three offsets', entry('U8', [2], [0, 2, 2]), /data_offsets \[0,2,2\]/],
    ['offsets that are null', entry('U8', [2], null), /data_offsets null/],
    ['a negative offset', entry('U8', [2], [-1, 1]), /data_offsets/],
    ['a fractional offset', entry('U8', [2], [0, 1.5]), /data_offsets/],
    ['begin after end', entry('U8', [2], [2, 0]), /end before they begin/],
    ['offsets behind the file', entry('U8', [2], [0, 4]), /needs 2 bytes, its data_offsets hold 4/],
    ['offsets out of range', entry('U8', [4], [0, 4]), /lies outside the file/],
    ['offsets of 2^52', entry('U8', [2], [2 ** 52, 2 ** 52 + 2]), /lies outside the file/],
    ['a size that is not its shape', entry('U8', [1], [0, 2]), /needs 1 bytes, its data_offsets hold 2/],
    ['a size that is not its dtype', entry('F32', [2], [0, 2]), /needs 8 bytes, its data_offsets hold 2/],
    ['half a byte', entry('F4', [5], [0, 2]), /whole bytes/],
    ['no dtype', '{"shape":[2],"data_offsets":[0,2]}', /has no dtype/],
    ['no shape', '{"dtype":"U8","data_offsets":[0,2]}', /has no shape/],
    ['no offsets', '{"dtype":"U8","shape":[2]}', /has no data_offsets/],
    ['an entry that is null', 'null', /is not a JSON object/],
    ['an entry that is an array', '[]', /is not a JSON object/],
    ['an entry that is not JSON', 'nonsense', /is not a JSON object/],
    ['a field that is not JSON', '{"dtype":U8}', /not valid JSON/],
    [
      'a thousand fields',
      JSON.stringify(Object.fromEntries(Array.from({ length: 1000 }, (_, i) => [i, i]))),
      /more than 64 keys/,
    ],
  ])('refuses a tensor with %s', async (_, text, message) => {
    const file = write(rawSafetensors(`{"the.name":${text}}`, two));
    await refused(file, file, /tensor "the.name" /, message);
  });

  it.each([
    ['overlap', { a: [0, 2], b: [1, 3] }, 3, /tensor "b" overlaps another tensor/],
    ['lie on each other', { a: [0, 2], b: [0, 2] }, 2, /tensor "b" overlaps/],
    ['leave a hole', { a: [0, 2], b: [3, 5] }, 5, /tensor "b" leaves a hole/],
    ['begin late', { a: [1, 3] }, 3, /tensor "a" leaves a hole/],
    ['end early', { a: [0, 2] }, 5, /3 bytes after the last tensor/],
    ['are none, with data', {}, 5, /5 bytes after the last tensor/],
  ])('refuses tensors that %s', async (_, tensors, size, message) => {
    const parts = Object.entries(tensors as Record<string, number[]>).map(
      ([name, [begin, end]]) => `"${name}":${entry('U8', [end - begin], [begin, end])}`,
    );
    await refused(write(rawSafetensors(`{${parts}}`, new Uint8Array(size))), message);
  });

  it.each(['null', '[]', '"x"', '{"a":1}', '{"a":null}', '{"a":{"b":"c"}}', '{"a":["b"]}', '{"a":tru}'])(
    'refuses __metadata__ %s',
    async (value) => {
      await refused(write(rawSafetensors(`{"__metadata__":${value},"a":${good}}`, two)), /__metadata__/);
    },
  );

  it('keeps messages short for very long names', async () => {
    const error = await refused(write(rawSafetensors(`{"${'n'.repeat(1e6)}":null}`)));
    expect(error.message.length).toBeLessThan(1000);
  });
});
