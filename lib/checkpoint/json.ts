/**
 * Walks one level of a JSON object without building it.
 *
 * `JSON.parse` alone will not do for files from strangers: it keeps the last of two equal keys without a
 * word, and it turns a hundred megabytes of `[[[[…` or `{},{},…` into gigabytes of heap before anyone can
 * look at the first entry. Here each member is handed over as text, checked by the caller, and only then
 * parsed.
 */

/** Makes the error for a reason; the caller knows the file and the tensor to name. */
export type Fail = (reason: string, cause?: unknown) => Error;

/** One member of an object: its decoded key and the text of its value, not yet checked. */
export interface Member {
  readonly key: string;
  readonly value: string;
}

/** Members allowed in one object unless the caller says less; the largest models have some 10^5 tensors. */
const MAX_MEMBERS = 1 << 20;

/** Nesting allowed inside one value; the same bound as serde_json's. */
const MAX_DEPTH = 128;

const QUOTE = 0x22;
const COMMA = 0x2c;
const COLON = 0x3a;
const OPEN_BRACKET = 0x5b;
const BACKSLASH = 0x5c;
const CLOSE_BRACKET = 0x5d;
const OPEN_BRACE = 0x7b;
const CLOSE_BRACE = 0x7d;

/**
 * The members of the object that `text` holds, in order.
 * Structure outside the values is fully checked; a value's own text is only delimited.
 * @throws what `fail` makes, for text that is not one object and for a key that occurs twice (keys are
 *   compared after decoding, so `"a"` and `"\u0061"` are the same key)
 */
export function* members(text: string, fail: Fail, limit = MAX_MEMBERS): Generator<Member, void, undefined> {
  const seen = new Set<string>();
  let at = skipSpace(text, 0);
  if (text.charCodeAt(at) !== OPEN_BRACE) throw fail('is not a JSON object');
  at = skipSpace(text, at + 1);
  let open = text.charCodeAt(at) !== CLOSE_BRACE;
  while (open) {
    if (text.charCodeAt(at) !== QUOTE) throw malformed(text, at, 'a key', fail);
    const keyEnd = stringEnd(text, at, fail);
    const key = parseValue(text.slice(at, keyEnd), fail) as string;
    // Only an escape can make half a surrogate pair: the text was decoded from UTF-8.
    if (key.length < keyEnd - at - 2 && /\p{Surrogate}/u.test(key))
      throw fail(`has the key ${quote(key)}, which is not valid Unicode`);
    if (seen.has(key)) throw fail(`has the key ${quote(key)} twice`);
    seen.add(key);
    if (seen.size > limit) throw fail(`has more than ${limit} keys`);

    at = skipSpace(text, keyEnd);
    if (text.charCodeAt(at) !== COLON) throw malformed(text, at, "':'", fail);
    at = skipSpace(text, at + 1);
    const valueEnd = endOfValue(text, at, fail);
    yield { key, value: text.slice(at, valueEnd) };

    at = skipSpace(text, valueEnd);
    const next = text.charCodeAt(at);
    if (next === COMMA) at = skipSpace(text, at + 1);
    else if (next === CLOSE_BRACE) open = false;
    else throw malformed(text, at, "',' or '}'", fail);
  }
  at = skipSpace(text, at + 1);
  if (at !== text.length) throw malformed(text, at, 'the end', fail);
}

/** `JSON.parse` with the caller's error. */
export function parseValue(text: string, fail: Fail): unknown {
  try {
    return JSON.parse(text);
  } catch (cause) {
    throw fail(`is not valid JSON at ${quote(text)}`, cause);
  }
}

/** Decodes bytes that must be UTF-8. */
export function decodeUtf8(bytes: ArrayBuffer, fail: Fail): string {
  try {
    return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch (cause) {
    throw fail('is not valid UTF-8', cause);
  }
}

/** A string for a message: in quotes, escaped, and never longer than a line or two. */
export function quote(text: string): string {
  return JSON.stringify(text.length > 160 ? text.slice(0, 160) + '…' : text);
}

function malformed(text: string, at: number, wanted: string, fail: Fail): Error {
  const found = at < text.length ? quote(text.slice(at, at + 1)) : 'the end';
  return fail(`is not valid JSON: expected ${wanted} at character ${at}, found ${found}`);
}

function skipSpace(text: string, from: number): number {
  let at = from;
  for (;;) {
    const c = text.charCodeAt(at);
    if (c !== 0x20 && c !== 0x0a && c !== 0x0d && c !== 0x09) return at;
    at++;
  }
}

/** The index after the closing quote of the string that starts at `from`. */
function stringEnd(text: string, from: number, fail: Fail): number {
  let at = text.indexOf('"', from + 1);
  while (at >= 0) {
    let before = at - 1;
    while (text.charCodeAt(before) === BACKSLASH) before--;
    // An even number of backslashes are escapes of each other; an odd one escapes the quote.
    if ((at - before) % 2 === 1) return at + 1;
    at = text.indexOf('"', at + 1);
  }
  throw fail(`is not valid JSON: the string at character ${from} does not end`);
}

function endOfValue(text: string, from: number, fail: Fail): number {
  const first = text.charCodeAt(from);
  if (first === QUOTE) return stringEnd(text, from, fail);
  let at = from;
  if (first !== OPEN_BRACE && first !== OPEN_BRACKET) {
    while (at < text.length && !/[\s,}\]]/.test(text[at])) at++;
    if (at === from) throw malformed(text, at, 'a value', fail);
    return at;
  }
  let depth = 0;
  while (at < text.length) {
    const c = text.charCodeAt(at);
    if (c === QUOTE) {
      at = stringEnd(text, at, fail);
      continue;
    }
    at++;
    if (c === OPEN_BRACE || c === OPEN_BRACKET) {
      if (++depth > MAX_DEPTH) throw fail(`is nested deeper than ${MAX_DEPTH} levels`);
    } else if (c === CLOSE_BRACE || c === CLOSE_BRACKET) {
      if (--depth === 0) return at;
    }
  }
  throw fail(`is not valid JSON: the value at character ${from} does not end`);
}
