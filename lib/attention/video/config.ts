import { HeddleError } from '../../errors.ts';
import { optionChoice, optionFlag, optionInteger, optionNumber } from '../../op.ts';

/** How the layers of a video encoder attend; T frames of N patches. */
export type VideoAttention =
  /** All T·N tokens at once: ViViT 1, TimeSformer's joint attention, V-JEPA 2, LongViViT. */
  | 'joint'
  /** Layers over each frame, then layers over time: ViViT 2, VideoPrism. */
  | 'factorized-encoder'
  /** Each layer attends over time and over space, one after the other: ViViT 3, LongViViT's factorized variant. */
  | 'factorized-self-attention'
  /** Half of the heads attend over time, half over space: ViViT 4. */
  | 'factorized-dot-product'
  /** Time, then space with a class token copied to every frame: TimeSformer. */
  | 'divided-space-time'
  /** Every frame for itself: TimeSformer's space-only attention. */
  | 'space-only';

const ATTENTIONS: readonly VideoAttention[] = [
  'joint',
  'factorized-encoder',
  'factorized-self-attention',
  'factorized-dot-product',
  'divided-space-time',
  'space-only',
];

/** A video encoder's shape. */
export interface VideoEncoderConfig {
  attention: VideoAttention;
  /** Height and width of a frame in pixels. */
  imageSize: number | readonly [height: number, width: number];
  /** Frames of a clip, before tubelets are cut. */
  frames: number;
  /** Frames, rows and columns of a tubelet. */
  tubelet: readonly [time: number, height: number, width: number];
  /** Colour channels. Default 3. */
  channels?: number;
  hiddenSize: number;
  heads: number;
  intermediateSize: number;
  /** Layers; of the spatial encoder with `attention: 'factorized-encoder'`. */
  layers: number;
  /** `'factorized-encoder'`: layers of the temporal encoder. */
  timeLayers?: number;
  /**
   * `'factorized-encoder'`: what the temporal encoder sees of a frame: its class token, the mean of its patches
   * (ViViT 2), or every patch by itself (VideoPrism). Default `'class'`.
   */
  framePooling?: 'class' | 'mean' | 'none';
  /** `'factorized-self-attention'`: what attends first. Default `'time-space'`, as in scenic. */
  order?: 'time-space' | 'space-time';
  /** `'factorized-self-attention'`: attention over time is scaled by tanh of a trained number (LongViViT). */
  timeGate?: boolean;
  /** Whether a class token comes before the patches. The factorized layers of ViViT 3 and 4 have none. Default false. */
  classToken?: boolean;
  /**
   * `'joint'`: a table of a row per token; `'space'`: per patch of a frame; `'space-time'`: per patch plus one per
   * frame; `'rotary'`: V-JEPA 2's rotation of queries and keys by time, row and column; `'none'`. The class token has
   * the first row of `'joint'` and `'space'` tables. Default `'joint'`.
   */
  positions?: 'joint' | 'space' | 'space-time' | 'rotary' | 'none';
  /** Default `'gelu'`. */
  activation?: 'gelu' | 'gelu-tanh' | 'relu' | 'silu';
  /** Default 1e-6. */
  layerNormEpsilon?: number;
  /** Norms scale by 1 + weight (VideoPrism). Default false. */
  unitOffset?: boolean;
  /** Logits become softcap · tanh(logits / softcap); 0 = off. Default 0. */
  softcap?: number;
  /** Whether query, key and value have a bias. Default true. */
  qkvBias?: boolean;
  /** Order of the tokens in the output: frames outermost, or patches outermost (TimeSformer). Default `'frames'`. */
  tokenOrder?: 'frames' | 'patches';
  /** Size of a tanh(dense(class token)) output; 0 = none. Default 0. */
  poolerSize?: number;
}

/** A checked config with its defaults filled in and the token grid. */
export interface ResolvedConfig extends Required<Omit<VideoEncoderConfig, 'imageSize'>> {
  imageSize: readonly [height: number, width: number];
  /** Tubelets along time, height and width of a clip of the configured size. */
  grid: readonly [time: number, height: number, width: number];
}

const KNOWN = new Set([
  'attention',
  'imageSize',
  'frames',
  'tubelet',
  'channels',
  'hiddenSize',
  'heads',
  'intermediateSize',
  'layers',
  'timeLayers',
  'framePooling',
  'order',
  'timeGate',
  'classToken',
  'positions',
  'activation',
  'layerNormEpsilon',
  'unitOffset',
  'softcap',
  'qkvBias',
  'tokenOrder',
  'poolerSize',
]);

function refuse(message: string): HeddleError {
  return new HeddleError('ERR_OPTION', `config: ${message}`);
}

function sizes(value: unknown, count: number, name: string): number[] {
  if (!Array.isArray(value) || value.length !== count) throw refuse(`${name} must be ${count} integers`);
  return value.map((v, i) => optionInteger(v, 1, 2 ** 20, `config: ${name}[${i}]`));
}

/** Tubelets along an axis of `size`: a valid convolution, the rest is left out. */
export function tubeletCount(size: number, length: number): number {
  return Math.floor(size / length);
}

/**
 * Checks a config and fills in defaults.
 * @throws HeddleError `ERR_OPTION` naming the field
 */
export function resolveConfig(config: VideoEncoderConfig): ResolvedConfig {
  if (config === null || typeof config !== 'object') {
    throw new HeddleError('ERR_ARGUMENT', 'config: expected an object');
  }
  for (const key in config) {
    if (!KNOWN.has(key)) throw refuse(`unknown field '${key}'; known: ${[...KNOWN].join(', ')}`);
  }
  const integer = (name: keyof VideoEncoderConfig, min: number, fallback?: number) =>
    optionInteger(config[name] ?? fallback, min, 2 ** 24, `config: ${name}`);
  const c = config;
  const attention = optionChoice<VideoAttention | 'missing'>(
    c.attention,
    ATTENTIONS,
    'missing',
    'config: attention',
  );
  if (attention === 'missing') throw refuse(`attention must be one of ${ATTENTIONS.join(', ')}`);
  const size = Array.isArray(c.imageSize) ? c.imageSize : [c.imageSize, c.imageSize];
  const imageSize = sizes(size, 2, 'imageSize') as [number, number];
  const tubelet = sizes(c.tubelet, 3, 'tubelet') as [number, number, number];
  const frames = integer('frames', 1);
  const hiddenSize = integer('hiddenSize', 1);
  const heads = integer('heads', 1);
  if (hiddenSize % heads !== 0) throw refuse(`heads ${heads} must divide hiddenSize ${hiddenSize}`);
  if (attention === 'factorized-dot-product' && heads % 2 !== 0) {
    throw refuse(`heads must be even for factorized-dot-product attention, got ${heads}`);
  }
  const encoder = attention === 'factorized-encoder';
  const factorized = attention === 'factorized-self-attention';
  for (const [name, allowed] of [
    ['timeLayers', encoder],
    ['framePooling', encoder],
    ['order', factorized],
    ['timeGate', factorized],
  ] as const) {
    if (c[name] !== undefined && c[name] !== false && !allowed)
      throw refuse(`${name} has no meaning with ${attention} attention`);
  }
  const pooling = optionChoice(c.framePooling, ['class', 'mean', 'none'], 'class', 'config: framePooling');
  const classToken = optionFlag(
    c.classToken,
    attention === 'divided-space-time' || (encoder && pooling === 'class'),
    'config: classToken',
  );
  if (classToken && (factorized || attention === 'factorized-dot-product')) {
    throw refuse(`${attention} attention has no class token; pool the patches instead`);
  }
  if (!classToken && (attention === 'divided-space-time' || (encoder && pooling === 'class'))) {
    throw refuse(`classToken must be true for ${attention} attention`);
  }
  if (classToken && encoder && pooling !== 'class') {
    throw refuse(`classToken has no meaning with framePooling '${pooling}'`);
  }
  const positions = optionChoice(
    c.positions,
    ['joint', 'space', 'space-time', 'rotary', 'none'],
    encoder ? 'space-time' : 'joint',
    'config: positions',
  );
  if (
    positions === 'joint' &&
    (encoder || attention === 'divided-space-time' || attention === 'space-only')
  ) {
    throw refuse(`positions 'joint' does not fit ${attention} attention; use 'space' or 'space-time'`);
  }
  if (positions === 'rotary' && (attention !== 'joint' || classToken)) {
    throw refuse("positions 'rotary' needs joint attention without a class token");
  }
  const poolerSize = integer('poolerSize', 0, 0);
  if (poolerSize > 0 && !classToken && !(encoder && pooling === 'mean')) {
    throw refuse('poolerSize needs a class token');
  }
  const grid = [
    tubeletCount(frames, tubelet[0]),
    tubeletCount(imageSize[0], tubelet[1]),
    tubeletCount(imageSize[1], tubelet[2]),
  ] as const;
  if (grid.includes(0)) {
    throw refuse(
      `tubelets of [${tubelet.join(', ')}] do not fit once into ${frames} frames of ${imageSize.join(' x ')} pixels`,
    );
  }
  return {
    attention,
    imageSize,
    frames,
    tubelet,
    channels: integer('channels', 1, 3),
    hiddenSize,
    heads,
    intermediateSize: integer('intermediateSize', 1),
    layers: integer('layers', 0),
    timeLayers: encoder ? integer('timeLayers', 0) : 0,
    framePooling: pooling,
    order: optionChoice(c.order, ['time-space', 'space-time'], 'time-space', 'config: order'),
    timeGate: optionFlag(c.timeGate, false, 'config: timeGate'),
    classToken,
    positions,
    activation: optionChoice(
      c.activation,
      ['gelu', 'gelu-tanh', 'relu', 'silu'],
      'gelu',
      'config: activation',
    ),
    layerNormEpsilon: optionNumber(c.layerNormEpsilon, 0, 1e-6, 'config: layerNormEpsilon'),
    unitOffset: optionFlag(c.unitOffset, false, 'config: unitOffset'),
    softcap: optionNumber(c.softcap, 0, 0, 'config: softcap'),
    qkvBias: optionFlag(c.qkvBias, true, 'config: qkvBias'),
    tokenOrder: optionChoice(c.tokenOrder, ['frames', 'patches'], 'frames', 'config: tokenOrder'),
    poolerSize,
    grid,
  };
}

/** Dimensions of every tensor that an encoder of this config needs, by name. */
export function tensorShapes(c: ResolvedConfig): Map<string, readonly number[]> {
  const shapes = new Map<string, readonly number[]>();
  const { hiddenSize: d, intermediateSize: f } = c;
  const norm = (name: string) => {
    shapes.set(`${name}.weight`, [d]);
    shapes.set(`${name}.bias`, [d]);
  };
  const dense = (name: string, outputs: number, inputs: number, bias = true) => {
    shapes.set(`${name}.weight`, [outputs, inputs]);
    if (bias) shapes.set(`${name}.bias`, [outputs]);
  };
  const attend = (name: string) => {
    dense(`${name}.qkv`, 3 * d, d, c.qkvBias);
    dense(`${name}.output`, d, d);
  };
  const block = (p: string, time: boolean) => {
    if (time) {
      norm(`${p}.timeNorm`);
      attend(`${p}.timeAttention`);
      if (c.attention === 'divided-space-time') dense(`${p}.timeProjection`, d, d);
      if (c.timeGate) shapes.set(`${p}.timeGate`, [1]);
    }
    norm(`${p}.norm`);
    attend(`${p}.attention`);
    norm(`${p}.mlpNorm`);
    dense(`${p}.mlp.up`, f, d);
    dense(`${p}.mlp.down`, d, f);
  };
  const [time, height, width] = c.grid;
  const cls = c.classToken ? 1 : 0;
  shapes.set('patch.weight', [d, c.channels, ...c.tubelet]);
  shapes.set('patch.bias', [d]);
  if (cls) shapes.set('classToken', [d]);
  if (c.positions === 'joint') shapes.set('positions', [cls + time * height * width, d]);
  if (c.positions === 'space' || c.positions === 'space-time') {
    shapes.set('positions.space', [cls + height * width, d]);
  }
  if (c.positions === 'space-time') {
    // The temporal encoder of ViViT 2 has a class token of its own, whose row comes first.
    shapes.set('positions.time', [time + (ownTimeClass(c) ? 1 : 0), d]);
  }
  const both = c.attention === 'factorized-self-attention' || c.attention === 'divided-space-time';
  for (let i = 0; i < c.layers; i++) block(`layers.${i}`, both);
  norm('norm');
  if (c.attention === 'factorized-encoder') {
    if (ownTimeClass(c)) shapes.set('timeClassToken', [d]);
    for (let i = 0; i < c.timeLayers; i++) block(`timeLayers.${i}`, false);
    norm('timeNorm');
  }
  if (c.poolerSize > 0) dense('pooler', c.poolerSize, d);
  return shapes;
}

/** Whether the temporal encoder of `'factorized-encoder'` has a class token of its own. */
export function ownTimeClass(c: ResolvedConfig): boolean {
  return c.attention === 'factorized-encoder' && c.framePooling !== 'none';
}
