import { type ParseArgsConfig, parseArgs } from 'node:util';
import { caseLabel, type OpCase } from '../../test/cases/case.ts';

/** Where a command writes, and whether somebody is watching. */
export interface Io {
  out(line: string): void;
  err(line: string): void;
  /** A terminal: progress bars and boxed tables instead of plain lines. */
  tty: boolean;
}

/** What a command works with; tests put their own in. */
export interface Context {
  io: Io;
  cases: OpCase[];
}

export interface OptionSpec {
  type: 'string' | 'boolean';
  /** Placeholder in the help text. */
  value?: string;
  help: string;
}

export const FILTER_OPTION: OptionSpec = {
  type: 'string',
  value: 'TEXT',
  help: 'only cases whose "op: name" contains TEXT, or matches it where it is /a regular expression/',
};

/** Read by {@link seedOf}. */
export const SEED_OPTION: OptionSpec = {
  type: 'string',
  value: 'N',
  help: 'repeats the data of an earlier run (default: from the clock)',
};

export type Values = Record<string, string | boolean | undefined>;

export interface Command {
  name: string;
  /** Arguments after the name, for the usage line. */
  usage: string;
  summary: string;
  /** Most positional arguments. */
  positionals: number;
  options: Record<string, OptionSpec>;
  /** Resolves to the exit code: 0 fine, 1 something is wrong with a result. */
  run(values: Values, positionals: string[], context: Context): Promise<number>;
}

/** A command line that cannot be meant: exit code 2. */
export class UsageError extends Error {}

export function parseCommand(command: Command, argv: string[]): { values: Values; positionals: string[] } {
  const options: ParseArgsConfig['options'] = { help: { type: 'boolean', short: 'h' } };
  for (const [name, spec] of Object.entries(command.options)) options[name] = { type: spec.type };
  let parsed: { values: Values; positionals: string[] };
  try {
    parsed = parseArgs({ args: argv, options, allowPositionals: true, strict: true }) as typeof parsed;
  } catch (error) {
    // node:util explains itself well; only its hint on escaping positionals does not apply here.
    throw new UsageError((error as Error).message.split('. To specify')[0]);
  }
  if (parsed.positionals.length > command.positionals) {
    throw new UsageError(`unexpected argument '${parsed.positionals[command.positionals]}'`);
  }
  return parsed;
}

export function helpOf(command: Command): string[] {
  const flag = ([name, o]: [string, OptionSpec]) => `  --${name}${o.value ? ` ${o.value}` : ''}`;
  const entries: [string, OptionSpec][] = [
    ...Object.entries(command.options),
    ['help', { type: 'boolean', help: 'this text' }],
  ];
  const width = Math.max(...entries.map((e) => flag(e).length));
  return [
    `heddle ${command.name}${command.usage ? ` ${command.usage}` : ''}`,
    `  ${command.summary}`,
    '',
    ...entries.map((e) => `${flag(e).padEnd(width)}  ${e[1].help}`),
  ];
}

/** A numeric option within bounds, or `fallback` when it was not given. */
export function numberOption(
  values: Values,
  name: string,
  bounds: { min: number; max: number; integer?: boolean },
  fallback: number,
): number {
  const text = values[name];
  if (text === undefined) return fallback;
  const value = Number(text);
  const fits =
    String(text).trim() !== '' &&
    value >= bounds.min &&
    value <= bounds.max &&
    (!bounds.integer || Number.isInteger(value));
  if (!fits) {
    const kind = bounds.integer ? 'an integer' : 'a number';
    throw new UsageError(`--${name} must be ${kind} from ${bounds.min} to ${bounds.max}, got '${text}'`);
  }
  return value;
}

/** The test of a filter: a text contained in the label, or `/a regular expression/`; neither minds case. */
function labelTest(filter: string): (label: string) => boolean {
  const pattern = /^\/(.+)\/$/.exec(filter)?.[1];
  if (pattern === undefined) {
    const wanted = filter.toLowerCase();
    return (label) => label.toLowerCase().includes(wanted);
  }
  try {
    const expression = new RegExp(pattern, 'i');
    return (label) => expression.test(label);
  } catch (error) {
    throw new UsageError(`--filter: ${(error as Error).message}`);
  }
}

/** Cases of a family (all without one) whose `op: name` passes `filter`. */
export function selectCases(cases: OpCase[], family: string | undefined, filter: unknown): OpCase[] {
  const families = [...new Set(cases.map((c) => c.family))];
  if (family !== undefined && !families.includes(family)) {
    throw new UsageError(`unknown family '${family}'; there is: ${families.join(', ')}`);
  }
  const matches = labelTest(String(filter ?? ''));
  return cases.filter((c) => (family === undefined || c.family === family) && matches(caseLabel(c)));
}

/** A seed from the clock, short enough to be typed again. */
export function seedOf(values: Values): number {
  return numberOption(
    values,
    'seed',
    { min: 0, max: 2 ** 31 - 1, integer: true },
    Date.now() % 1_000_000_007,
  );
}
