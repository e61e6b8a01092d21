import Table from 'cli-table3';

/** Three significant digits with the unit that keeps them short. */
function scaled(value: number, units: readonly [number, string][]): string {
  const [size, unit] = units.find(([s]) => Math.abs(value) >= s * 0.9995) ?? units[units.length - 1];
  return `${Number((value / size).toPrecision(3))} ${unit}`;
}

export function formatTime(seconds: number): string {
  return scaled(seconds, [
    [1, 's'],
    [1e-3, 'ms'],
    [1e-6, 'µs'],
    [1e-9, 'ns'],
  ]);
}

/** 1.2e9 'items/s' → 1.2 Gitems/s. */
export function formatRate(perSecond: number, unit: string): string {
  return scaled(perSecond, [
    [1e12, `T${unit}`],
    [1e9, `G${unit}`],
    [1e6, `M${unit}`],
    [1e3, `k${unit}`],
    [1, unit],
  ]);
}

export function formatBytes(bytes: number): string {
  return scaled(bytes, [
    [2 ** 30, 'GiB'],
    [2 ** 20, 'MiB'],
    [2 ** 10, 'KiB'],
    [1, 'B'],
  ]);
}

export function formatPercent(share: number): string {
  return `${Number((share * 100).toPrecision(share < 0.0995 ? 2 : 3))} %`;
}

export function formatRatio(ratio: number): string {
  return `${Number(ratio.toPrecision(ratio >= 100 ? 3 : 2))}×`;
}

/** 0, or two significant digits in scientific notation. */
export function formatError(value: number): string {
  return value === 0 ? '0' : value.toExponential(1);
}

const PLAIN = Object.fromEntries(
  [
    'top',
    'top-mid',
    'top-left',
    'top-right',
    'bottom',
    'bottom-mid',
    'bottom-left',
    'bottom-right',
    'left',
    'left-mid',
    'mid',
    'mid-mid',
    'right',
    'right-mid',
  ].map((name) => [name, '']),
);

/** A table: boxed on a terminal, aligned plain lines elsewhere. Columns in `right` are right-aligned. */
export function formatTable(
  head: string[],
  rows: string[][],
  tty: boolean,
  right: readonly number[] = [],
): string {
  const table = new Table({
    head,
    colAligns: head.map((_, i) => (right.includes(i) ? 'right' : 'left')),
    style: { head: [], border: [], compact: true, ...(tty ? {} : { 'padding-left': 0, 'padding-right': 0 }) },
    ...(tty ? {} : { chars: { ...PLAIN, middle: '  ' } }),
  });
  table.push(...rows);
  const lines = table.toString().split('\n');
  return lines
    .map((line) => line.trimEnd())
    .filter((line) => line !== '')
    .join('\n');
}

/** Drops columns in which every row is empty. */
export function withoutEmptyColumns(head: string[], rows: string[][]): { head: string[]; rows: string[][] } {
  const keep = head.map((_, i) => rows.some((row) => row[i] !== ''));
  return { head: head.filter((_, i) => keep[i]), rows: rows.map((row) => row.filter((_, i) => keep[i])) };
}
