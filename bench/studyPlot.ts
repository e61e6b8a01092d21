/** Time and memory of the video study, measured and predicted, over the number of frames. */

export interface StudyPoint {
  variant: string;
  frames: number;
  seconds: number;
  predictedSeconds: number;
  bytes: number;
  predictedBytes: number;
}

const PANEL = { width: 380, height: 360 };
const MARGIN = { left: 62, top: 56, gap: 80, bottom: 54, legend: 250 };
const COLOURS = [
  '#1b6ca8',
  '#c8553d',
  '#2e8b57',
  '#7b4f9e',
  '#b8860b',
  '#d1495b',
  '#00798c',
  '#5b8c2a',
  '#8c564b',
  '#3b3b3b',
  '#e377c2',
  '#7f7f7f',
  '#17becf',
];

const escapeText = (text: string) => text.replace(/&/g, '&amp;').replace(/</g, '&lt;').replace(/>/g, '&gt;');

function decades(values: number[]): [number, number] {
  const logs = values.filter((v) => v > 0).map(Math.log10);
  const low = Math.floor(Math.min(...logs));
  return [low, Math.max(low + 1, Math.ceil(Math.max(...logs)))];
}

function panel(
  points: StudyPoint[],
  variants: string[],
  left: number,
  title: string,
  unit: string,
  measured: (p: StudyPoint) => number,
  predicted: (p: StudyPoint) => number,
): string[] {
  const frames = [...new Set(points.map((p) => p.frames))].sort((a, b) => a - b);
  const [y0, y1] = decades(points.flatMap((p) => [measured(p), predicted(p)]));
  const [x0, x1] = [
    Math.log2(frames[0]),
    Math.max(Math.log2(frames[frames.length - 1]), Math.log2(frames[0]) + 1),
  ];
  const px = (x: number) => (left + ((Math.log2(x) - x0) / (x1 - x0)) * PANEL.width).toFixed(1);
  const py = (y: number) => (MARGIN.top + (1 - (Math.log10(y) - y0) / (y1 - y0)) * PANEL.height).toFixed(1);
  const bottom = MARGIN.top + PANEL.height;
  const out = [`<text x="${left}" y="${MARGIN.top - 10}" font-size="13">${escapeText(title)}</text>`];
  for (let d = y0; d <= y1; d++) {
    const y = py(10 ** d);
    out.push(
      `<line x1="${left}" y1="${y}" x2="${left + PANEL.width}" y2="${y}" stroke="#e4e4e4"/>`,
      `<text x="${left - 6}" y="${y}" dy="4" text-anchor="end">${10 ** d} ${unit}</text>`,
    );
  }
  for (const f of frames) {
    out.push(`<text x="${px(f)}" y="${bottom + 18}" text-anchor="middle">${f}</text>`);
  }
  out.push(`<text x="${left + PANEL.width / 2}" y="${bottom + 38}" text-anchor="middle">frames</text>`);
  for (const [i, name] of variants.entries()) {
    const own = points.filter((p) => p.variant === name).sort((a, b) => a.frames - b.frames);
    const colour = COLOURS[i % COLOURS.length];
    const path = (value: (p: StudyPoint) => number) =>
      own
        .filter((p) => value(p) > 0)
        .map((p) => `${px(p.frames)},${py(value(p))}`)
        .join(' ');
    out.push(
      `<polyline points="${path(predicted)}" fill="none" stroke="${colour}" stroke-dasharray="4 3" opacity="0.6"/>`,
      `<polyline points="${path(measured)}" fill="none" stroke="${colour}" stroke-width="1.6"/>`,
    );
    for (const p of own.filter((q) => measured(q) > 0)) {
      out.push(`<circle cx="${px(p.frames)}" cy="${py(measured(p))}" r="3" fill="${colour}"/>`);
    }
  }
  return out;
}

/** Two panels: time and peak memory, solid as measured, dashed as the arithmetic predicts. */
export function studySvg(points: StudyPoint[], title: string): string {
  const variants = [...new Set(points.map((p) => p.variant))];
  const second = MARGIN.left + PANEL.width + MARGIN.gap;
  const width = second + PANEL.width + MARGIN.legend;
  const height = MARGIN.top + PANEL.height + MARGIN.bottom;
  const out = [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${height}" font-family="sans-serif" font-size="11">`,
    `<rect width="${width}" height="${height}" fill="#fff"/>`,
    `<text x="${MARGIN.left}" y="24" font-size="15">${escapeText(title)}</text>`,
    ...panel(
      points,
      variants,
      MARGIN.left,
      'time of the layers: measured, dashed predicted',
      's',
      (p) => p.seconds,
      (p) => p.predictedSeconds,
    ),
    ...panel(
      points,
      variants,
      second,
      'memory of the forward: measured, dashed predicted',
      'MB',
      (p) => p.bytes / 1e6,
      (p) => p.predictedBytes / 1e6,
    ),
  ];
  for (const [i, name] of variants.entries()) {
    const y = MARGIN.top + 8 + i * 18;
    const x = second + PANEL.width + 18;
    out.push(
      `<circle cx="${x}" cy="${y}" r="4" fill="${COLOURS[i % COLOURS.length]}"/>`,
      `<text x="${x + 10}" y="${y}" dy="4">${escapeText(name)}</text>`,
    );
  }
  out.push('</svg>');
  return `${out.join('\n')}\n`;
}
