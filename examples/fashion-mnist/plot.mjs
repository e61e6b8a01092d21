// Test accuracy and ε by epoch as a self-contained SVG.
const WIDTH = 720;
const HEIGHT = 400;
const LEFT = 64;
const RIGHT = 64;
const TOP = 56;
const BOTTOM = 56;
const BLUE = '#1f6fb2';
const ORANGE = '#c2560c';

const line = (points, color, dash = '') =>
  `<polyline points="${points.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(' ')}" fill="none" stroke="${color}" stroke-width="2"${dash}/>`;
const text = (x, y, s, more = '') => `<text x="${x}" y="${y}" ${more}>${s}</text>`;

/** `log` is what fashion-mnist.mjs writes. */
export function plot(log) {
  const rows = log.epochs;
  const count = Math.max(Number(log.flags.epochs), 1);
  const low = Math.min(0.6, Math.floor(10 * Math.min(...rows.map((r) => r.testAccuracy))) / 10);
  const top = Math.ceil(2 * Math.max(...rows.map((r) => r.epsilonRdp))) / 2;
  const x = (epoch) => LEFT + (epoch / count) * (WIDTH - LEFT - RIGHT);
  const height = HEIGHT - TOP - BOTTOM;
  const accuracy = (a) => TOP + height * (1 - (a - low) / (1 - low));
  const epsilon = (e) => TOP + height * (1 - e / top);
  const out = [];
  for (let i = 0; i <= 4; i++) {
    const y = TOP + (height * i) / 4;
    out.push(`<line x1="${LEFT}" x2="${WIDTH - RIGHT}" y1="${y}" y2="${y}" stroke="#ddd"/>`);
    out.push(
      text(
        LEFT - 8,
        y + 4,
        `${(100 * (1 - ((1 - low) * i) / 4)).toFixed(0)} %`,
        `text-anchor="end" fill="${BLUE}"`,
      ),
    );
    out.push(text(WIDTH - RIGHT + 8, y + 4, (top * (1 - i / 4)).toFixed(2), `fill="${ORANGE}"`));
  }
  const tick = Math.max(1, Math.round(count / 8));
  for (let epoch = 0; epoch <= count; epoch += tick) {
    out.push(text(x(epoch), HEIGHT - BOTTOM + 20, epoch, 'text-anchor="middle"'));
  }
  out.push(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, 'epoch', 'text-anchor="middle"'));
  const of = (scale, key) => rows.map((r) => [x(r.epoch), scale(r[key])]);
  out.push(line(of(epsilon, 'epsilonRdp'), ORANGE, ' stroke-dasharray="2 4"'));
  out.push(line(of(epsilon, 'epsilonPrv'), ORANGE, ' stroke-dasharray="7 4"'));
  out.push(line(of(accuracy, 'testAccuracy'), BLUE));
  const last = rows[rows.length - 1];
  const title = `Fashion-MNIST: ${(100 * last.testAccuracy).toFixed(2)} % at ε = ${last.epsilonPrv.toFixed(2)}, δ = ${log.delta}`;
  out.push(text(LEFT, 24, title, 'font-size="16" font-weight="600"'));
  out.push(text(LEFT, 44, 'test accuracy', `fill="${BLUE}"`));
  out.push(
    text(WIDTH - RIGHT, 44, 'ε by PRV (dashed) and RDP (dotted)', `text-anchor="end" fill="${ORANGE}"`),
  );
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} ${HEIGHT}" font-family="system-ui, sans-serif" font-size="12" fill="#333">
<rect width="100%" height="100%" fill="#fff"/>
${out.join('\n')}
</svg>
`;
}
