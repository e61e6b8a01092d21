import type { Checkpoint } from '../checkpoint.ts';
import { HeddleError } from '../errors.ts';
import type { PackExpertsOptions } from './experts.ts';
import type { RouteTopKOptions } from './routeTopK.ts';

/** A MoE block of a published architecture: where its tensors are and how it computes. */
export interface MoEBlock {
  modelType: string;
  hiddenSize: number;
  intermediateSize: number;
  experts: number;
  /** Routing options; the selection bias, a tensor, is named below. */
  routing: Omit<RouteTopKOptions, 'selectionBias' | 'mask' | 'out'>;
  activation: Pick<PackExpertsOptions, 'activation' | 'alpha' | 'limit'>;
  tensors: {
    router: string;
    routerBias?: string;
    selectionBias?: string;
    /** One matrix per expert (`{}` stands for its index), or all experts stacked as in gpt-oss. */
    experts:
      | { gate: string; up: string; down: string }
      | { gateUp: string; gateUpBias: string; down: string; downBias: string };
    shared?: { gate: string; up: string; down: string; intermediateSize: number };
    sharedGate?: string;
  };
}

type Config = Record<string, unknown>;

/** Architectures that {@link moeBlock} reads. */
export const MOE_MODEL_TYPES = [
  'mixtral',
  'qwen2_moe',
  'qwen3_moe',
  'olmoe',
  'deepseek_v3',
  'gpt_oss',
] as const;

/** Reads fields of config.json with messages that name the file's field. */
class Fields {
  constructor(
    private readonly config: Config,
    private readonly path: string,
  ) {}

  fail(message: string): HeddleError {
    return new HeddleError('ERR_CHECKPOINT', `${this.path}: config.json: ${message}`);
  }

  integer(...names: string[]): number {
    for (const name of names) {
      const v = this.config[name];
      if (v === undefined || v === null) continue;
      if (!Number.isInteger(v) || (v as number) < 1)
        throw this.fail(`${name} must be a positive integer, got ${JSON.stringify(v)}`);
      return v as number;
    }
    throw this.fail(`${names.join(' or ')} is missing`);
  }

  number(name: string, fallback: number): number {
    const v = this.config[name] ?? fallback;
    if (typeof v !== 'number' || !Number.isFinite(v))
      throw this.fail(`${name} must be a number, got ${JSON.stringify(v)}`);
    return v;
  }

  boolean(name: string, fallback: boolean): boolean {
    const v = this.config[name] ?? fallback;
    if (typeof v !== 'boolean') throw this.fail(`${name} must be true or false, got ${JSON.stringify(v)}`);
    return v;
  }

  get raw(): Config {
    return this.config;
  }
}

const ACTIVATION_OF: Readonly<Record<string, 'silu' | 'gelu' | 'gelu-tanh' | 'relu'>> = {
  silu: 'silu',
  swish: 'silu',
  gelu: 'gelu',
  gelu_pytorch_tanh: 'gelu-tanh',
  gelu_new: 'gelu-tanh',
  relu: 'relu',
};

function activationOf(f: Fields): Pick<PackExpertsOptions, 'activation'> {
  const name = String(f.raw['hidden_act'] ?? 'silu');
  const activation = ACTIVATION_OF[name];
  if (activation === undefined)
    throw f.fail(
      `hidden_act '${name}' is not supported; supported: ${Object.keys(ACTIVATION_OF).join(', ')}`,
    );
  return { activation };
}

function projections(prefix: string): { gate: string; up: string; down: string } {
  return {
    gate: `${prefix}.gate_proj.weight`,
    up: `${prefix}.up_proj.weight`,
    down: `${prefix}.down_proj.weight`,
  };
}

function mixtral(f: Fields, layer: number): Omit<MoEBlock, 'modelType' | 'hiddenSize'> {
  const p = `model.layers.${layer}.block_sparse_moe`;
  return {
    intermediateSize: f.integer('intermediate_size'),
    experts: f.integer('num_local_experts', 'num_experts'),
    routing: { k: f.integer('num_experts_per_tok'), normalize: true },
    activation: activationOf(f),
    tensors: {
      router: `${p}.gate.weight`,
      experts: {
        gate: `${p}.experts.{}.w1.weight`,
        up: `${p}.experts.{}.w3.weight`,
        down: `${p}.experts.{}.w2.weight`,
      },
    },
  };
}

function qwenLike(
  f: Fields,
  layer: number,
  sizeField: string,
  shared: boolean,
): Omit<MoEBlock, 'modelType' | 'hiddenSize'> {
  const p = `model.layers.${layer}.mlp`;
  const dense = f.raw['mlp_only_layers'];
  const step = f.raw['decoder_sparse_step'] === undefined ? 1 : f.integer('decoder_sparse_step');
  if ((Array.isArray(dense) && dense.includes(layer)) || (layer + 1) % step !== 0) {
    throw f.fail(`layer ${layer} has a dense MLP (mlp_only_layers, decoder_sparse_step), no experts`);
  }
  return {
    intermediateSize: f.integer(sizeField),
    experts: f.integer('num_experts', 'num_local_experts'),
    routing: { k: f.integer('num_experts_per_tok'), normalize: f.boolean('norm_topk_prob', false) },
    activation: activationOf(f),
    tensors: {
      router: `${p}.gate.weight`,
      experts: projections(`${p}.experts.{}`),
      ...(shared
        ? {
            shared: {
              ...projections(`${p}.shared_expert`),
              intermediateSize: f.integer('shared_expert_intermediate_size'),
            },
            sharedGate: `${p}.shared_expert_gate.weight`,
          }
        : {}),
    },
  };
}

function deepseekV3(f: Fields, layer: number): Omit<MoEBlock, 'modelType' | 'hiddenSize'> {
  const p = `model.layers.${layer}.mlp`;
  const firstDense = f.number('first_k_dense_replace', 0);
  const frequency = f.raw['moe_layer_freq'] === undefined ? 1 : f.integer('moe_layer_freq');
  if (layer < firstDense || layer % frequency !== 0) {
    throw f.fail(`layer ${layer} has a dense MLP (first_k_dense_replace is ${firstDense}), no experts`);
  }
  const size = f.integer('moe_intermediate_size');
  const sharedCount = f.number('n_shared_experts', 0);
  const scoring = String(f.raw['scoring_func'] ?? 'sigmoid');
  if (scoring !== 'sigmoid' && scoring !== 'softmax')
    throw f.fail(`scoring_func '${scoring}' is not supported`);
  const experts = f.integer('n_routed_experts', 'num_local_experts');
  const count = f.integer('n_group');
  return {
    intermediateSize: size,
    experts,
    routing: {
      k: f.integer('num_experts_per_tok'),
      score: scoring,
      groups: count > 1 ? { count, keep: f.integer('topk_group'), score: 'top2' } : undefined,
      normalize: f.boolean('norm_topk_prob', true),
      normalizeEpsilon: 1e-20,
      scale: f.number('routed_scaling_factor', 1),
    },
    activation: activationOf(f),
    tensors: {
      router: `${p}.gate.weight`,
      selectionBias: `${p}.gate.e_score_correction_bias`,
      experts: projections(`${p}.experts.{}`),
      ...(sharedCount > 0
        ? { shared: { ...projections(`${p}.shared_experts`), intermediateSize: size * sharedCount } }
        : {}),
    },
  };
}

function gptOss(f: Fields, layer: number): Omit<MoEBlock, 'modelType' | 'hiddenSize'> {
  const p = `model.layers.${layer}.mlp`;
  return {
    intermediateSize: f.integer('intermediate_size'),
    experts: f.integer('num_local_experts', 'num_experts'),
    routing: { k: f.integer('num_experts_per_tok', 'experts_per_token'), softmaxOver: 'selected' },
    // Its hidden_act says silu; the block computes the clamped variant (transformers GptOssExperts).
    activation: { activation: 'clamped-swiglu', alpha: 1.702, limit: f.number('swiglu_limit', 7) },
    tensors: {
      router: `${p}.router.weight`,
      routerBias: `${p}.router.bias`,
      experts: {
        gateUp: `${p}.experts.gate_up_proj`,
        gateUpBias: `${p}.experts.gate_up_proj_bias`,
        down: `${p}.experts.down_proj`,
        downBias: `${p}.experts.down_proj_bias`,
      },
    },
  };
}

/**
 * Describes the MoE block of a layer from config.json.
 * @throws HeddleError `ERR_CHECKPOINT` naming the field when the config is missing, incomplete or of an unsupported
 *   architecture, or the layer is dense
 */
export function moeBlock(checkpoint: Checkpoint, layer: number): MoEBlock {
  const config = checkpoint.config as Config | undefined;
  if (config === undefined)
    throw new HeddleError('ERR_CHECKPOINT', `${checkpoint.path}: no config.json beside the weights`);
  const f = new Fields(config, checkpoint.path);
  const modelType = String(config['model_type']);
  if (config['num_hidden_layers'] !== undefined && layer >= f.integer('num_hidden_layers')) {
    throw new HeddleError(
      'ERR_OPTION',
      `layer must be from 0 to ${f.integer('num_hidden_layers') - 1}, got ${layer}`,
    );
  }
  const hiddenSize = f.integer('hidden_size');
  const common = { modelType, hiddenSize };
  switch (modelType) {
    case 'mixtral':
      return { ...common, ...mixtral(f, layer) };
    case 'qwen2_moe':
      return { ...common, ...qwenLike(f, layer, 'moe_intermediate_size', true) };
    case 'qwen3_moe':
      return { ...common, ...qwenLike(f, layer, 'moe_intermediate_size', false) };
    case 'olmoe':
      return { ...common, ...qwenLike(f, layer, 'intermediate_size', false) };
    case 'deepseek_v3':
      return { ...common, ...deepseekV3(f, layer) };
    case 'gpt_oss':
      return { ...common, ...gptOss(f, layer) };
    default:
      throw f.fail(`model_type '${modelType}' is not supported; supported: ${MOE_MODEL_TYPES.join(', ')}`);
  }
}
