import type { Checkpoint } from '../../checkpoint.ts';
import { HeddleError } from '../../errors.ts';
import type { VideoEncoderConfig } from './config.ts';

/** Where an encoder's tensor is in a checkpoint: under one name, or rows of several one after the other. */
export type TensorSource = readonly string[];

/** A published architecture: its config, and where its tensors are. */
export interface Architecture {
  modelType: string;
  config: VideoEncoderConfig;
  /** Names without the prefix of a model that wraps the encoder. */
  source(name: string): TensorSource;
  /** Tensors that belong to a head or a predictor and are not read, by the start of their names. */
  ignored: readonly string[];
}

/** `model_type` of the checkpoints that `VideoEncoder.load` reads. */
export const VIDEO_MODEL_TYPES = ['timesformer', 'vivit', 'videoprism_vision_model', 'vjepa2'] as const;

/** Reads fields of config.json with messages that name the field. */
class Fields {
  constructor(
    private readonly config: Readonly<Record<string, unknown>>,
    private readonly path: string,
  ) {}

  fail(message: string): HeddleError {
    return new HeddleError('ERR_CHECKPOINT', `${this.path}: config.json: ${message}`);
  }

  integer(name: string, fallback: number): number {
    const v = this.config[name] ?? fallback;
    if (!Number.isInteger(v) || (v as number) < 1)
      throw this.fail(`${name} must be a positive integer, got ${JSON.stringify(v)}`);
    return v as number;
  }

  number(name: string, fallback: number): number {
    const v = this.config[name] ?? fallback;
    if (typeof v !== 'number' || !Number.isFinite(v))
      throw this.fail(`${name} must be a number, got ${JSON.stringify(v)}`);
    return v;
  }

  /** One integer, which counts for every axis, or a list of `count`. */
  integers(name: string, count: number, fallback: readonly number[]): number[] {
    const v = this.config[name] ?? fallback;
    const list = Array.isArray(v) ? v : Array.from({ length: count }, () => v);
    if (list.length !== count || list.some((x) => !Number.isInteger(x) || x < 1))
      throw this.fail(`${name} must be ${count} positive integers, got ${JSON.stringify(v)}`);
    return list;
  }

  flag(name: string, fallback: boolean): boolean {
    const v = this.config[name] ?? fallback;
    if (typeof v !== 'boolean') throw this.fail(`${name} must be true or false, got ${JSON.stringify(v)}`);
    return v;
  }

  text(name: string, fallback: string): string {
    return String(this.config[name] ?? fallback);
  }

  activation(fallback: string): NonNullable<VideoEncoderConfig['activation']> {
    const name = this.text('hidden_act', fallback);
    const activation = ACTIVATIONS[name];
    if (activation === undefined)
      throw this.fail(
        `hidden_act '${name}' is not supported; supported: ${Object.keys(ACTIVATIONS).join(', ')}`,
      );
    return activation;
  }
}

const ACTIVATIONS: Readonly<Record<string, NonNullable<VideoEncoderConfig['activation']>>> = {
  gelu: 'gelu',
  gelu_python: 'gelu',
  gelu_fast: 'gelu-tanh',
  gelu_new: 'gelu-tanh',
  gelu_pytorch_tanh: 'gelu-tanh',
  relu: 'relu',
  silu: 'silu',
};

/** Splits `layers.3.mlp.up.weight` into the layer's prefix, the part and `weight` or `bias`. */
function parts(name: string): { layer: string | null; part: string; leaf: string } {
  const found = /^(layers|timeLayers)\.(\d+)\.(.*)$/.exec(name);
  const rest = found ? found[3] : name;
  const dot = rest.lastIndexOf('.');
  return {
    layer: found ? `${found[1]}.${found[2]}` : null,
    part: dot < 0 ? rest : rest.slice(0, dot),
    leaf: dot < 0 ? '' : rest.slice(dot + 1),
  };
}

/** Sources from a table of parts; `{}` stands for the layer's prefix in the checkpoint. */
function sources(
  table: Readonly<Record<string, string | readonly string[]>>,
  layerPrefix: (layer: string) => string,
): (name: string) => TensorSource {
  return (name) => {
    const whole = table[name];
    if (whole !== undefined) return typeof whole === 'string' ? [whole] : whole;
    const { layer, part, leaf } = parts(name);
    const entry = table[layer === null ? part : `{}.${part}`];
    if (entry === undefined) throw new HeddleError('ERR_INTERNAL', `no source of ${name}`);
    const list = typeof entry === 'string' ? [entry] : entry;
    return list.map((s) => `${layer === null ? s : `${layerPrefix(layer)}.${s}`}.${leaf}`);
  };
}

const index = (layer: string) => layer.slice(layer.indexOf('.') + 1);
const VIT_LAYER = {
  '{}.norm': 'layernorm_before',
  '{}.attention.output': 'attention.output.dense',
  '{}.mlpNorm': 'layernorm_after',
  '{}.mlp.up': 'intermediate.dense',
  '{}.mlp.down': 'output.dense',
};
const EMBEDDINGS = {
  patch: 'embeddings.patch_embeddings.projection',
  classToken: 'embeddings.cls_token',
  norm: 'layernorm',
};

function timesformer(f: Fields): Omit<Architecture, 'modelType'> {
  const type = f.text('attention_type', 'divided_space_time');
  const attention = {
    divided_space_time: 'divided-space-time',
    joint_space_time: 'joint',
    space_only: 'space-only',
  }[type] as VideoEncoderConfig['attention'] | undefined;
  if (attention === undefined) throw f.fail(`attention_type '${type}' is not supported`);
  const patch = f.integers('patch_size', 2, [16, 16]);
  return {
    config: {
      attention,
      imageSize: f.integers('image_size', 2, [224, 224]) as [number, number],
      frames: f.integer('num_frames', 8),
      tubelet: [1, patch[0], patch[1]],
      channels: f.integer('num_channels', 3),
      hiddenSize: f.integer('hidden_size', 768),
      heads: f.integer('num_attention_heads', 12),
      intermediateSize: f.integer('intermediate_size', 3072),
      layers: f.integer('num_hidden_layers', 12),
      classToken: true,
      positions: attention === 'space-only' ? 'space' : 'space-time',
      activation: f.activation('gelu'),
      layerNormEpsilon: f.number('layer_norm_eps', 1e-6),
      qkvBias: f.flag('qkv_bias', true),
      tokenOrder: attention === 'space-only' ? 'frames' : 'patches',
    },
    source: sources(
      {
        ...EMBEDDINGS,
        ...VIT_LAYER,
        'positions.space': 'embeddings.position_embeddings',
        'positions.time': 'embeddings.time_embeddings',
        '{}.attention.qkv': 'attention.attention.qkv',
        '{}.timeNorm': 'temporal_layernorm',
        '{}.timeAttention.qkv': 'temporal_attention.attention.qkv',
        '{}.timeAttention.output': 'temporal_attention.output.dense',
        '{}.timeProjection': 'temporal_dense',
      },
      (layer) => `encoder.layer.${index(layer)}`,
    ),
    ignored: ['classifier.'],
  };
}

function vivit(f: Fields, c: Checkpoint): Omit<Architecture, 'modelType'> {
  const tubelet = f.integers('tubelet_size', 3, [2, 16, 16]) as [number, number, number];
  const hiddenSize = f.integer('hidden_size', 768);
  const pooled = [...c.tensors.keys()].some((name) => name.endsWith('pooler.dense.weight'));
  if (pooled && f.text('pooler_act', 'tanh') !== 'tanh') {
    throw f.fail(`pooler_act '${f.text('pooler_act', '')}' is not supported; supported: tanh`);
  }
  return {
    config: {
      attention: 'joint',
      imageSize: f.integers('image_size', 2, [224, 224]) as [number, number],
      frames: f.integer('num_frames', 32),
      tubelet,
      channels: f.integer('num_channels', 3),
      hiddenSize,
      heads: f.integer('num_attention_heads', 12),
      intermediateSize: f.integer('intermediate_size', 3072),
      layers: f.integer('num_hidden_layers', 12),
      classToken: true,
      positions: 'joint',
      activation: f.activation('gelu_fast'),
      layerNormEpsilon: f.number('layer_norm_eps', 1e-6),
      qkvBias: f.flag('qkv_bias', true),
      poolerSize: pooled ? f.integer('pooler_output_size', hiddenSize) : 0,
    },
    source: sources(
      {
        ...EMBEDDINGS,
        ...VIT_LAYER,
        positions: 'embeddings.position_embeddings',
        '{}.attention.qkv': ['query', 'key', 'value'].map((p) => `attention.attention.${p}`),
        pooler: 'pooler.dense',
      },
      (layer) => `encoder.layer.${index(layer)}`,
    ),
    ignored: ['classifier.'],
  };
}

function videoprism(f: Fields): Omit<Architecture, 'modelType'> {
  return {
    config: {
      attention: 'factorized-encoder',
      framePooling: 'none',
      imageSize: f.integers('image_size', 2, [288, 288]) as [number, number],
      frames: f.integer('num_frames', 16),
      tubelet: f.integers('tubelet_size', 3, [1, 18, 18]) as [number, number, number],
      channels: f.integer('num_channels', 3),
      hiddenSize: f.integer('hidden_size', 768),
      heads: f.integer('num_attention_heads', 12),
      intermediateSize: f.integer('intermediate_size', 3072),
      layers: f.integer('num_spatial_layers', 12),
      timeLayers: f.integer('num_temporal_layers', 4),
      positions: 'space-time',
      activation: f.activation('gelu_python'),
      layerNormEpsilon: f.number('layer_norm_eps', 1e-6),
      unitOffset: true,
      softcap: f.number('attn_logit_softcapping', 50),
      qkvBias: f.flag('qkv_bias', true),
    },
    source: sources(
      {
        patch: 'spatial_embeddings.patch_embeddings.projection',
        'positions.space': ['spatial_embeddings.position_embeddings'],
        'positions.time': ['temporal_embeddings.position_embeddings'],
        norm: 'layernorm1',
        timeNorm: 'layernorm2',
        '{}.norm': 'layernorm_before',
        '{}.attention.qkv': ['q', 'k', 'v'].map((p) => `attention.${p}_proj`),
        '{}.attention.output': 'attention.o_proj',
        '{}.mlpNorm': 'layernorm_after',
        '{}.mlp.up': 'mlp.fc1',
        '{}.mlp.down': 'mlp.fc2',
      },
      (layer) => `${layer.startsWith('time') ? 'temporal' : 'spatial'}_layers.${index(layer)}`,
    ),
    ignored: ['auxiliary_layers.', 'head.', 'head_layernorm.', 'classifier.'],
  };
}

function vjepa2(f: Fields): Omit<Architecture, 'modelType'> {
  const hiddenSize = f.integer('hidden_size', 1024);
  const patch = f.integer('patch_size', 16);
  return {
    config: {
      attention: 'joint',
      imageSize: f.integer('crop_size', 256),
      frames: f.integer('frames_per_clip', 64),
      tubelet: [f.integer('tubelet_size', 2), patch, patch],
      channels: f.integer('in_chans', 3),
      hiddenSize,
      heads: f.integer('num_attention_heads', 16),
      intermediateSize: Math.trunc(hiddenSize * f.number('mlp_ratio', 4)),
      layers: f.integer('num_hidden_layers', 24),
      positions: 'rotary',
      activation: f.activation('gelu'),
      layerNormEpsilon: f.number('layer_norm_eps', 1e-6),
      qkvBias: f.flag('qkv_bias', true),
    },
    source: sources(
      {
        patch: 'encoder.embeddings.patch_embeddings.proj',
        norm: 'encoder.layernorm',
        '{}.norm': 'norm1',
        '{}.attention.qkv': ['query', 'key', 'value'].map((p) => `attention.${p}`),
        '{}.attention.output': 'attention.proj',
        '{}.mlpNorm': 'norm2',
        '{}.mlp.up': 'mlp.fc1',
        '{}.mlp.down': 'mlp.fc2',
      },
      (layer) => `encoder.layer.${index(layer)}`,
    ),
    ignored: ['predictor.', 'pooler.', 'classifier.'],
  };
}

/**
 * Describes the encoder of a checkpoint from its config.json.
 * @throws HeddleError `ERR_CHECKPOINT` naming the field when the config is missing or of an unsupported architecture
 */
export function videoArchitecture(c: Checkpoint): Architecture {
  if (c.config === undefined)
    throw new HeddleError('ERR_CHECKPOINT', `${c.path}: no config.json beside the weights`);
  const f = new Fields(c.config, c.path);
  const modelType = f.text('model_type', 'missing');
  switch (modelType) {
    case 'timesformer':
      return { modelType, ...timesformer(f) };
    case 'vivit':
      return { modelType, ...vivit(f, c) };
    case 'videoprism_vision_model':
      return { modelType, ...videoprism(f) };
    case 'vjepa2':
      return { modelType, ...vjepa2(f) };
    default:
      throw f.fail(`model_type '${modelType}' is not supported; supported: ${VIDEO_MODEL_TYPES.join(', ')}`);
  }
}
