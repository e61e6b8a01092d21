import type { Peaks } from './peaks.ts';
import type { BenchRow } from './report.ts';

const WIDTH = 860;
const HEIGHT = 520;
const MARGIN = { left: 70, right: 250, top: 46, bottom: 56 };
const COLOURS = ['#1b6ca8', '#c8553d', '#2e8b57', '#7b4f9e', '#b8860b', '#3b3b3b', '#d1495b', '#00798c'];

function escapeText(text: string): string {
  return text.replace(/&/g, '&amp;').replace(/</g, '&lt;').replace(/>/g, '&gt;');
}

/** Smallest and largest power of ten around the values. */
function decades(values: number[]): [number, number] {
  const logs = values.map(Math.log10);
  const low = Math.floor(Math.min(...logs));
  return [low, Math.max(low + 1, Math.ceil(Math.max(...logs)))];
}

interface Roof {
  label: string;
  flops: number;
}

function roofsOf(peaks: Peaks): Roof[] {
  return Object.entries(peaks.operations).flatMap(([kind, byIsa]) =>
    Object.entries(byIsa).map(([isa, flops]) => ({ label: `${kind} ${isa}`, flops: flops as number })),
  );
}

/** Roofs that some row's variant can reach: a scalar roof says nothing about an AVX-512 row. */
function relevantRoofs(peaks: Peaks, rows: BenchRow[]): Roof[] {
  const isas = new Set(rows.map((r) => r.variant.split('/')[1]));
  return roofsOf(peaks).filter((roof) => isas.has(roof.label.split(' ')[1]));
}

/**
 * The roofline picture of a run: attained GFLOP/s over arithmetic intensity, below the measured limits of memory and
 * arithmetic. Rows without both `flops` and `bytes` are left out; `null` when none is left.
 */
export function rooflineSvg(rows: BenchRow[], peaks: Peaks, title: string): string | null {
  const points = rows.filter((r) => r.flopsPerSecond && r.flops && r.bytes);
  if (points.length === 0) return null;
  const intensity = (r: BenchRow) => (r.flops as number) / (r.bytes as number);
  const roofs = relevantRoofs(peaks, points);
  const top = Math.max(...roofs.map((r) => r.flops), ...points.map((r) => r.flopsPerSecond as number));
  const ridge = top / peaks.read;
  const [x0, x1] = decades([...points.map(intensity), ridge]);
  const [y0, y1] = decades([...points.map((r) => (r.flopsPerSecond as number) / 1e9), top / 1e9]);
  const w = WIDTH - MARGIN.left - MARGIN.right;
  const h = HEIGHT - MARGIN.top - MARGIN.bottom;
  const px = (x: number) => MARGIN.left + ((Math.log10(x) - x0) / (x1 - x0)) * w;
  const py = (gflops: number) => MARGIN.top + (1 - (Math.log10(gflops) - y0) / (y1 - y0)) * h;
  const f = (v: number) => v.toFixed(1);
  const out: string[] = [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} ${HEIGHT}" font-family="sans-serif" font-size="12">`,
    `<rect width="${WIDTH}" height="${HEIGHT}" fill="#fff"/>`,
    `<text x="${MARGIN.left}" y="26" font-size="15">${escapeText(title)}</text>`,
    `<clipPath id="plot"><rect x="${MARGIN.left}" y="${MARGIN.top}" width="${w}" height="${h}"/></clipPath>`,
  ];
  for (let d = x0; d <= x1; d++) {
    const x = f(px(10 ** d));
    out.push(
      `<line x1="${x}" y1="${MARGIN.top}" x2="${x}" y2="${MARGIN.top + h}" stroke="#e4e4e4"/>`,
      `<text x="${x}" y="${MARGIN.top + h + 18}" text-anchor="middle">${10 ** d}</text>`,
    );
  }
  for (let d = y0; d <= y1; d++) {
    const y = f(py(10 ** d));
    out.push(
      `<line x1="${MARGIN.left}" y1="${y}" x2="${MARGIN.left + w}" y2="${y}" stroke="#e4e4e4"/>`,
      `<text x="${MARGIN.left - 8}" y="${y}" dy="4" text-anchor="end">${10 ** d}</text>`,
    );
  }
  out.push(
    `<text x="${MARGIN.left + w / 2}" y="${HEIGHT - 14}" text-anchor="middle">operations per byte</text>`,
    `<text transform="translate(20 ${MARGIN.top + h / 2}) rotate(-90)" text-anchor="middle">GFLOP/s</text>`,
  );
  const clipped: string[] = [];
  const slopeEnd = top / peaks.read;
  const slopeStart = 10 ** x0;
  clipped.push(
    `<line x1="${f(px(slopeStart))}" y1="${f(py((slopeStart * peaks.read) / 1e9))}" x2="${f(px(slopeEnd))}" y2="${f(py(top / 1e9))}" stroke="#333" stroke-width="1.5"/>`,
  );
  for (const roof of roofs) {
    const y = f(py(roof.flops / 1e9));
    clipped.push(
      `<line x1="${f(px(roof.flops / peaks.read))}" y1="${y}" x2="${MARGIN.left + w}" y2="${y}" stroke="#333" stroke-dasharray="5 3"/>`,
      `<text x="${MARGIN.left + w - 6}" y="${y}" dy="-4" text-anchor="end" fill="#333">${escapeText(`${roof.label}: ${(roof.flops / 1e9).toFixed(0)} GFLOP/s`)}</text>`,
    );
  }
  clipped.push(
    `<text x="${MARGIN.left + 8}" y="${MARGIN.top + h - 8}" fill="#333">read: ${(peaks.read / 1e9).toFixed(1)} GB/s, ${peaks.threads} threads</text>`,
  );
  out.push(`<g clip-path="url(#plot)">${clipped.join('')}</g>`);
  for (const [i, r] of points.entries()) {
    const colour = COLOURS[i % COLOURS.length];
    const gflops = (r.flopsPerSecond as number) / 1e9;
    const label = `${r.name} · ${r.variant}`;
    out.push(
      `<circle cx="${f(px(intensity(r)))}" cy="${f(py(gflops))}" r="5" fill="${colour}"><title>${escapeText(label)}: ${gflops.toFixed(1)} GFLOP/s</title></circle>`,
      `<text x="${f(px(intensity(r)))}" y="${f(py(gflops))}" dx="8" dy="4" font-size="10" fill="${colour}">${i + 1}</text>`,
    );
    const y = MARGIN.top + 8 + i * 16;
    if (y > HEIGHT - 10) continue;
    const x = MARGIN.left + w + 14;
    out.push(
      `<circle cx="${x}" cy="${y}" r="4" fill="${colour}"/>`,
      `<text x="${x + 10}" y="${y}" dy="4" font-size="10">${escapeText(`${i + 1} ${label}`.slice(0, 46))}</text>`,
    );
  }
  out.push('</svg>');
  return `${out.join('\n')}\n`;
}
