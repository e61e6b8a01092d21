/**
 * Video encoders in float64, written as their papers and transformers' modelling files define them: one token, one
 * row, one loop after the other. The engine in lib/attention/video computes the same with packed weights and blocks.
 */
import { ownTimeClass, type ResolvedConfig } from '../../attention/video/config.ts';
import { gatedActivation } from '../gemm/activation.ts';
import { dot } from '../gemm/linear.ts';

type Row = Float64Array;

/** A token: where it is in the grid of tubelets (a class token is at t = -1) and its value. */
interface Token {
  t: number;
  n: number;
  x: Row;
}

/** Weights by the names of `tensorShapes`. */
export type ReferenceTensors = (name: string) => ArrayLike<number>;

export interface ReferenceOutput {
  /** `[clips, tokens, hidden]`; `[clips * frames, 1 + patches, hidden]` of space-only attention. */
  hidden: Float64Array;
  dims: number[];
  /** `[clips, pooler size]`. */
  pooled?: Float64Array;
}

const add = (a: Row, b: ArrayLike<number>, scale = 1): Row => a.map((v, i) => v + scale * b[i]);
const rowOf = (table: ArrayLike<number>, i: number, d: number): Row =>
  Float64Array.from({ length: d }, (_, j) => table[i * d + j]);

/** Groups of tokens with the same key, in order of first appearance. */
function groupBy(tokens: readonly Token[], key: (t: Token) => number): Token[][] {
  const groups = new Map<number, Token[]>();
  for (const token of tokens) {
    const group = groups.get(key(token));
    if (group) group.push(token);
    else groups.set(key(token), [token]);
  }
  return [...groups.values()];
}

class Encoder {
  constructor(
    private readonly c: ResolvedConfig,
    private readonly w: ReferenceTensors,
    /** Patches along the height and width of these frames. */
    private readonly gridSize: readonly [number, number],
  ) {}

  norm(x: Row, name: string): Row {
    const weight = this.w(`${name}.weight`);
    const bias = this.w(`${name}.bias`);
    const mean = x.reduce((a, b) => a + b, 0) / x.length;
    const variance = x.reduce((a, b) => a + (b - mean) ** 2, 0) / x.length;
    const inverse = 1 / Math.sqrt(variance + this.c.layerNormEpsilon);
    const offset = this.c.unitOffset ? 1 : 0;
    return x.map((v, i) => (v - mean) * inverse * (weight[i] + offset) + bias[i]);
  }

  dense(x: Row, name: string, bias = true): Row {
    const weight = this.w(`${name}.weight`);
    const b = bias ? this.w(`${name}.bias`) : null;
    const k = x.length;
    return Float64Array.from({ length: weight.length / k }, (_, n) => {
      let sum = b === null ? 0 : b[n];
      for (let i = 0; i < k; i++) sum += x[i] * weight[n * k + i];
      return sum;
    });
  }

  /** V-JEPA 2: thirds of a head turn by time, row and column; pairs interleaved, angles tiled. */
  rotate(head: Row, token: Token): Row {
    const each = 2 * Math.floor(Math.floor(head.length / 3) / 2);
    const positions = [token.t, Math.floor(token.n / this.gridSize[1]), token.n % this.gridSize[1]];
    const out = head.slice();
    for (const [axis, position] of positions.entries()) {
      const start = axis * each;
      for (let i = 0; i < each; i++) {
        const angle = position * 10000 ** (-(i % (each / 2)) / (each / 2));
        const pair = start + (i ^ 1);
        const turned = i % 2 === 0 ? -head[pair] : head[pair];
        out[start + i] = head[start + i] * Math.cos(angle) + turned * Math.sin(angle);
      }
    }
    return out;
  }

  /** Multi-head attention inside groups of rows; `groups[h]` is what head h attends within. */
  attend(tokens: Token[], normed: Row[], name: string, groups: (head: number) => Token[][]): Row[] {
    const { heads, hiddenSize: c, softcap, positions, qkvBias } = this.c;
    const d = c / heads;
    const at = new Map(tokens.map((t, i) => [t, i]));
    const qkv = normed.map((x) => this.dense(x, `${name}.qkv`, qkvBias));
    const context = tokens.map(() => new Float64Array(c));
    for (let h = 0; h < heads; h++) {
      const part = (i: number, which: number) =>
        qkv[i].subarray(which * c + h * d, which * c + (h + 1) * d) as Row;
      for (const group of groups(h)) {
        const rows = group.map((t) => at.get(t) as number);
        const turn = (row: number, x: Row) => (positions === 'rotary' ? this.rotate(x, tokens[row]) : x);
        const q = rows.map((i) => turn(i, part(i, 0)));
        const k = rows.map((i) => turn(i, part(i, 1)));
        const v = rows.map((i) => part(i, 2));
        for (const [i, row] of rows.entries()) {
          const logits = k.map((key) => {
            const logit = dot(q[i], key) / Math.sqrt(d);
            return softcap > 0 ? softcap * Math.tanh(logit / softcap) : logit;
          });
          const max = Math.max(...logits);
          const p = logits.map((l) => Math.exp(l - max));
          const sum = p.reduce((a, b) => a + b, 0);
          for (let j = 0; j < d; j++) {
            context[row][h * d + j] = p.reduce((a, pj, key) => a + pj * v[key][j], 0) / sum;
          }
        }
      }
    }
    return context.map((x) => this.dense(x, `${name}.output`));
  }

  /** x += scale · MHA(norm x), within groups. */
  attention(tokens: Token[], norm: string, name: string, groups: (head: number) => Token[][], scale = 1) {
    const y = this.attend(
      tokens,
      tokens.map((t) => this.norm(t.x, norm)),
      name,
      groups,
    );
    for (const [i, t] of tokens.entries()) t.x = add(t.x, y[i], scale);
  }

  mlp(tokens: Token[], p: string) {
    for (const t of tokens) {
      const up = this.dense(this.norm(t.x, `${p}.mlpNorm`), `${p}.mlp.up`);
      const hidden = up.map((v) => gatedActivation(this.c.activation, v, 1, 0, 0));
      t.x = add(t.x, this.dense(hidden, `${p}.mlp.down`));
    }
  }

  /** A block of a plain transformer over groups of tokens. */
  block(tokens: Token[], p: string, groups: Token[][]) {
    this.attention(tokens, `${p}.norm`, `${p}.attention`, () => groups);
    this.mlp(tokens, p);
  }

  /** ViViT 3 and LongViViT. */
  factorized(tokens: Token[], p: string) {
    const time = () => {
      const scale = this.c.timeGate ? Math.tanh(this.w(`${p}.timeGate`)[0]) : 1;
      const groups = groupBy(tokens, (t) => t.n);
      this.attention(tokens, `${p}.timeNorm`, `${p}.timeAttention`, () => groups, scale);
    };
    const space = () => {
      const groups = groupBy(tokens, (t) => t.t);
      this.attention(tokens, `${p}.norm`, `${p}.attention`, () => groups);
    };
    for (const step of this.c.order === 'time-space' ? [time, space] : [space, time]) step();
    this.mlp(tokens, p);
  }

  /** ViViT 4. */
  splitHeads(tokens: Token[], p: string) {
    const time = groupBy(tokens, (t) => t.n);
    const space = groupBy(tokens, (t) => t.t);
    this.attention(tokens, `${p}.norm`, `${p}.attention`, (h) => (h < this.c.heads / 2 ? time : space));
    this.mlp(tokens, p);
  }

  /** TimeSformer: the class token skips time, is copied to every frame, and the copies' updates are averaged. */
  divided(tokens: Token[], p: string) {
    const [cls, ...patches] = tokens;
    const groups = groupBy(patches, (t) => t.n);
    const y = this.attend(
      patches,
      patches.map((t) => this.norm(t.x, `${p}.timeNorm`)),
      `${p}.timeAttention`,
      () => groups,
    );
    for (const [i, t] of patches.entries()) t.x = add(t.x, this.dense(y[i], `${p}.timeProjection`));
    const frames = groupBy(patches, (t) => t.t);
    const update = new Float64Array(cls.x.length);
    for (const frame of frames) {
      const own = [{ ...cls }, ...frame];
      const z = this.attend(
        own,
        own.map((t) => this.norm(t.x, `${p}.norm`)),
        `${p}.attention`,
        () => [own],
      );
      for (const [i, t] of frame.entries()) t.x = add(t.x, z[i + 1]);
      for (let j = 0; j < update.length; j++) update[j] += z[0][j] / frames.length;
    }
    cls.x = add(cls.x, update);
    this.mlp(tokens, p);
  }

  layer(tokens: Token[], i: number) {
    const p = `layers.${i}`;
    switch (this.c.attention) {
      case 'factorized-self-attention':
        return this.factorized(tokens, p);
      case 'factorized-dot-product':
        return this.splitHeads(tokens, p);
      case 'divided-space-time':
        return this.divided(tokens, p);
      default:
        return this.block(tokens, p, [tokens]);
    }
  }

  /** Tokens of one clip, embedded, in the order of `kept` (indices t · N + n, ascending). */
  embed(clip: ArrayLike<number>, dims: readonly number[], kept: readonly number[]): Token[] {
    const [frames, channels, height, width] = dims;
    const [dt, dh, dw] = this.c.tubelet;
    const patches = this.gridSize[0] * this.gridSize[1];
    const d = this.c.hiddenSize;
    const weight = this.w('patch.weight');
    return kept.map((index) => {
      const t = Math.floor(index / patches);
      const n = index % patches;
      const row = Math.floor(n / this.gridSize[1]) * dh;
      const column = (n % this.gridSize[1]) * dw;
      const x = Float64Array.from(this.w('patch.bias'));
      let at = 0;
      for (let o = 0; o < d; o++)
        for (let ch = 0; ch < channels; ch++)
          for (let i = 0; i < dt; i++)
            for (let y = 0; y < dh; y++)
              for (let z = 0; z < dw; z++) {
                // V-JEPA 2 repeats a clip that is shorter than a tubelet.
                const frame = (t * dt + i) % frames;
                const pixel = ((frame * channels + ch) * height + row + y) * width + column + z;
                x[o] += weight[at++] * clip[pixel];
              }
      return { t, n, x };
    });
  }

  /** Adds what the position tables say and puts the class token in front. */
  place(tokens: Token[]): Token[] {
    const { positions, hiddenSize: d, classToken, attention } = this.c;
    const cls = classToken ? 1 : 0;
    const patches = this.gridSize[0] * this.gridSize[1];
    let all = tokens;
    if (classToken) all = [{ t: -1, n: -1, x: Float64Array.from(this.w('classToken')) }, ...tokens];
    for (const token of all) {
      const first = token.t < 0;
      if (positions === 'joint') {
        const row = first ? 0 : cls + token.t * patches + token.n;
        token.x = add(token.x, rowOf(this.w('positions'), row, d));
      } else if (positions === 'space' || positions === 'space-time') {
        token.x = add(token.x, rowOf(this.w('positions.space'), first ? 0 : cls + token.n, d));
        if (positions === 'space-time' && !first && attention !== 'factorized-encoder') {
          token.x = add(token.x, rowOf(this.w('positions.time'), token.t, d));
        }
      }
    }
    return all;
  }

  /** ViViT 2 and VideoPrism. */
  factorizedEncoder(tokens: Token[]): Token[] {
    const { framePooling: pooling, hiddenSize: d, positions } = this.c;
    const patches = pooling === 'class' ? tokens.slice(1) : tokens;
    let frames = groupBy(patches, (t) => t.t);
    if (pooling === 'class') {
      frames = frames.map((f) => [{ t: f[0].t, n: -1, x: tokens[0].x }, ...f]);
    }
    for (let i = 0; i < this.c.layers; i++) this.block(frames.flat(), `layers.${i}`, frames);
    for (const t of frames.flat()) t.x = this.norm(t.x, 'norm');
    const time = (t: Token, extra: number) =>
      positions === 'space-time' ? add(t.x, rowOf(this.w('positions.time'), t.t + extra, d)) : t.x;
    let all: Token[];
    let groups: Token[][];
    if (pooling === 'none') {
      all = frames.flat();
      for (const t of all) t.x = time(t, 0);
      groups = groupBy(all, (t) => t.n);
    } else {
      const pooled = frames.map((f) => {
        if (pooling === 'class') return f[0];
        const sum = f.reduce((a, t) => add(a, t.x, 1 / f.length), new Float64Array(d) as Row);
        return { t: f[0].t, n: -1, x: sum };
      });
      all = [{ t: -1, n: -1, x: Float64Array.from(this.w('timeClassToken')) }, ...pooled];
      for (const t of all) t.x = time(t, 1);
      groups = [all];
    }
    for (let i = 0; i < this.c.timeLayers; i++) this.block(all, `timeLayers.${i}`, groups);
    for (const t of all) t.x = this.norm(t.x, 'timeNorm');
    return all;
  }

  /** One clip to its rows of last_hidden_state, in output order. */
  clip(clip: ArrayLike<number>, dims: readonly number[], kept: readonly number[]): Token[][] {
    const tokens = this.place(this.embed(clip, dims, kept));
    if (this.c.attention === 'factorized-encoder') return [this.factorizedEncoder(tokens)];
    if (this.c.attention === 'space-only') {
      const patches = tokens.filter((t) => t.t >= 0);
      const cls = tokens.find((t) => t.t < 0);
      const frames = groupBy(patches, (t) => t.t).map((f) => (cls ? [{ ...cls, t: f[0].t }, ...f] : f));
      for (const frame of frames) {
        for (let i = 0; i < this.c.layers; i++) this.block(frame, `layers.${i}`, [frame]);
        for (const t of frame) t.x = this.norm(t.x, 'norm');
      }
      return frames;
    }
    for (let i = 0; i < this.c.layers; i++) this.layer(tokens, i);
    for (const t of tokens) t.x = this.norm(t.x, 'norm');
    if (this.c.tokenOrder === 'patches') {
      tokens.sort((a, b) => a.n - b.n || a.t - b.t);
    }
    return [tokens];
  }
}

/**
 * last_hidden_state of a video encoder.
 * @param frames `[clips, frames, channels, height, width]`, row-major
 * @param kept per clip: the tokens that are not masked, ascending indices t · N + n. Default: all
 */
export function videoEncoderReference(
  config: ResolvedConfig,
  tensors: ReferenceTensors,
  frames: ArrayLike<number>,
  dims: readonly number[],
  kept?: readonly (readonly number[])[],
): ReferenceOutput {
  const [clips, time, channels, height, width] = dims;
  const [dt, dh, dw] = config.tubelet;
  const steps = config.positions === 'rotary' && time < dt ? 1 : Math.floor(time / dt);
  const grid = [steps, Math.floor(height / dh), Math.floor(width / dw)];
  const encoder = new Encoder(config, tensors, [grid[1], grid[2]]);
  const every = Array.from({ length: grid[0] * grid[1] * grid[2] }, (_, i) => i);
  const size = time * channels * height * width;
  const sequences: Token[][] = [];
  for (let b = 0; b < clips; b++) {
    const clip = Float64Array.from({ length: size }, (_, i) => frames[b * size + i]);
    sequences.push(...encoder.clip(clip, dims.slice(1), kept ? kept[b] : every));
  }
  const d = config.hiddenSize;
  const hidden = Float64Array.from(sequences.flatMap((s) => s.flatMap((t) => [...t.x])));
  const result: ReferenceOutput = { hidden, dims: [sequences.length, sequences[0]?.length ?? 0, d] };
  if (config.poolerSize > 0 && (config.classToken || ownTimeClass(config))) {
    result.pooled = Float64Array.from(
      sequences.flatMap((s) => [...encoder.dense(s[0].x, 'pooler').map(Math.tanh)]),
    );
  }
  return result;
}
