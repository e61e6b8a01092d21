#!/usr/bin/env python3
"""Writes the golden mixture-of-experts checkpoints in test/golden/moe/.

Each directory holds a tiny random checkpoint of one architecture, as it would lie on the hub
(config.json and tensors written by transformers' own save_pretrained, then reduced to the MoE block of
layer 1; deepseek_v3 also keeps the dense MLP of layer 0), and io.safetensors: what transformers' own MoE block answers to a random input.

Made with: Python 3.11, torch 2.13.0 (CPU), transformers 5.17.0, huggingface-hub 1.33.0,
safetensors 0.8.0, numpy 2.4.6. To set up and run:

    python3 -m venv venv && venv/bin/pip install torch==2.13.0 transformers==5.17.0
    venv/bin/python test/golden/make_moe.py            # writes the files
    venv/bin/python test/golden/make_moe.py --check    # regenerates and compares; writes nothing
    venv/bin/python test/golden/make_moe.py --only olmoe

Random numbers come from numpy's PCG64 (the same on every machine). --check wants weights, inputs and
indices bit for bit, float32 results to 1e-5 and float64 results to 1e-12 (relative to the largest
magnitude), because matrix products may differ in the last bits between machines.

io.safetensors:
    input           [2, 19, hidden]  float32
    output          [2, 19, hidden]  float32   the block's output, shared experts included
    output_float64  [2, 19, hidden]  float64   the same code with every float32 in it made float64
    router_logits   [38, E]          float32
    router_logits_float64            float64
    indices         [38, k]          int32     descending selection score
    weights         [38, k]          float32   as applied to the experts' outputs
    weights_float64                  float64
"""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import directories
import numpy as np
import torch
import transformers
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()

HERE = Path(__file__).resolve().parent / "moe"
BATCH, SEQUENCE, LAYER = 2, 19, 1
MIN_GAP = 1e-4  # between neighbouring selection scores, so that routing is not a matter of rounding

# What the attention and the embeddings need in order to exist at all; none of it is kept.
COMMON = dict(
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=7,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)

MIXTRAL = dict(
    config=transformers.MixtralConfig,
    arguments=dict(hidden_size=44, intermediate_size=36, num_local_experts=6, num_experts_per_tok=3),
    block="block_sparse_moe",
)

ARCHITECTURES = {
    "mixtral": dict(MIXTRAL, seed=1),
    "mixtral_bf16": dict(MIXTRAL, seed=2, dtype=torch.bfloat16),
    "qwen2_moe": dict(
        config=transformers.Qwen2MoeConfig,
        arguments=dict(
            hidden_size=52,
            intermediate_size=84,  # of dense layers, of which there are none
            moe_intermediate_size=28,
            shared_expert_intermediate_size=60,
            num_experts=10,
            num_experts_per_tok=3,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            norm_topk_prob=False,
        ),
        block="mlp",
        seed=3,
    ),
    "qwen3_moe": dict(
        config=transformers.Qwen3MoeConfig,
        arguments=dict(
            hidden_size=52,
            intermediate_size=84,
            moe_intermediate_size=28,
            head_dim=26,
            num_experts=14,
            num_experts_per_tok=5,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            norm_topk_prob=True,
        ),
        block="mlp",
        seed=4,
        shards=2,
    ),
    "olmoe": dict(
        config=transformers.OlmoeConfig,
        arguments=dict(
            hidden_size=36,
            intermediate_size=20,
            num_experts=11,
            num_experts_per_tok=5,
            norm_topk_prob=False,
        ),
        block="mlp",
        seed=5,
    ),
    "deepseek_v3": dict(
        config=transformers.DeepseekV3Config,
        arguments=dict(
            hidden_size=52,
            intermediate_size=68,  # layer 0, which is dense
            moe_intermediate_size=36,
            n_routed_experts=12,
            n_shared_experts=2,
            num_experts_per_tok=3,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=2.5,
            norm_topk_prob=True,
            first_k_dense_replace=1,
            num_key_value_heads=2,
            q_lora_rank=12,
            kv_lora_rank=12,
            qk_rope_head_dim=6,
            qk_nope_head_dim=10,
            v_head_dim=10,
            # transformers does not read these, but the published config.json has them
            scoring_func="sigmoid",
            topk_method="noaux_tc",
            moe_layer_freq=1,
        ),
        block="mlp",
        dense_layers=[0],
        seed=6,
    ),
    "gpt_oss": dict(
        config=transformers.GptOssConfig,
        arguments=dict(
            hidden_size=44,
            intermediate_size=28,
            head_dim=22,
            num_local_experts=9,
            num_experts_per_tok=3,
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=32,
            swiglu_limit=7.0,  # as published; transformers has it as a constant
        ),
        block="mlp",
        seed=7,
    ),
}


class Float64(TorchFunctionMode):
    """Runs float32 code in float64: transformers' routers ask for float32 by name even in a double model."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def swap(value):
            return torch.float64 if value is torch.float32 else value

        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*[swap(a) for a in args], **{k: swap(v) for k, v in (kwargs or {}).items()})


def initialise(model, rng):
    """Weights of unit gain and more, so that outputs are O(1) and routing is well separated."""
    hidden = model.config.hidden_size
    with torch.no_grad():
        for layer in model.model.layers:
            for name, tensor in sorted([*layer.mlp.named_parameters(), *layer.mlp.named_buffers()]):
                if name.endswith("e_score_correction_bias"):
                    std = 0.2
                elif name in ("gate.weight", "router.weight"):
                    std = 1.7 / hidden**0.5
                elif name.endswith("bias"):
                    std = 0.6
                elif "down_proj" in name:
                    std = 0.05 if model.config.model_type == "gpt_oss" else 0.2
                elif model.config.model_type == "gpt_oss":
                    std = 3.5 / hidden**0.5  # large enough that the clamp at 7 is met
                else:
                    std = 1.3 / hidden**0.5
                tensor.copy_(torch.from_numpy(rng.standard_normal(tuple(tensor.shape)) * std))


def route(block, x):
    """The router's own answer, ordered by descending selection score. Returns (logits, weights, indices, margin)."""
    router = block.router if hasattr(block, "router") else block.gate
    logits, weights, indices = router(x.reshape(-1, x.shape[-1]))
    margins = []
    if hasattr(router, "e_score_correction_bias"):
        choice = logits.sigmoid() + router.e_score_correction_bias
        groups = choice.view(len(choice), router.num_group, -1).topk(2, dim=-1)[0].sum(-1)
        top = groups.sort(dim=-1, descending=True)[0]
        margins.append((top[:, router.topk_group - 1] - top[:, router.topk_group]).min())
        kept = torch.zeros_like(groups).scatter_(1, groups.topk(router.topk_group)[1], 1).bool()
        kept = kept.repeat_interleave(choice.shape[1] // router.num_group, dim=1)
        # Older releases mask dropped groups with 0.0 instead of -inf: keep to data where both agree.
        margins.append(choice.gather(1, indices).min())
        free = choice.topk(router.top_k)[1]
        facts["tokens whose groups change the choice"] = int((free.sort()[0] != indices.sort()[0]).any(-1).sum())
        plain = logits.sigmoid().masked_fill(~kept, -torch.inf).topk(router.top_k)[1]
        facts["tokens whose bias changes the choice"] = int((plain.sort()[0] != indices.sort()[0]).any(-1).sum())
        choice = choice.masked_fill(~kept, -torch.inf)
    elif hasattr(router, "bias"):
        choice = logits
    else:
        choice = logits.softmax(-1)
    k = indices.shape[1]
    top = choice.sort(dim=-1, descending=True)[0][:, : k + 1]
    margins.append((top[:, :-1] - top[:, 1:]).min())
    order = choice.gather(1, indices).argsort(dim=-1, descending=True)
    return logits, weights.gather(1, order), indices.gather(1, order), float(min(margins))


facts = {}


def make(name, spec, directory):
    """Writes one checkpoint and its io.safetensors into `directory`."""
    for seed in range(spec["seed"] * 1000, spec["seed"] * 1000 + 1000):
        rng = np.random.default_rng(seed)
        config = spec["config"](**{**COMMON, **spec["arguments"]})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager").eval()
        initialise(model, rng)
        dtype = spec.get("dtype", torch.float32)
        model.to(dtype).float()  # round the weights to the stored type; compute in float32
        x = torch.from_numpy(rng.standard_normal((BATCH, SEQUENCE, config.hidden_size)).astype(np.float32))
        block = model.model.layers[LAYER].mlp
        facts.clear()
        with torch.no_grad():
            logits, weights, indices, margin = route(block, x)
            if margin <= MIN_GAP:
                continue
        break
    else:
        raise RuntimeError(f"{name}: no seed gives a clear routing")

    def run(x):
        y = block(x)
        return y[0] if isinstance(y, tuple) else y  # gpt-oss also returns its scores

    with torch.no_grad():
        output = run(x)

        # Save first: what is stored is the model the float32 output came from.
        model.to(dtype)
        with tempfile.TemporaryDirectory() as scratch:
            model.save_pretrained(scratch)
            full = {}
            for file in sorted(Path(scratch).glob("*.safetensors")):
                full.update(load_file(file))
            again = AutoModelForCausalLM.from_pretrained(scratch, dtype=dtype).state_dict()
            for key, value in model.state_dict().items():
                assert torch.equal(value, again[key]), f"{name}: {key} did not survive the round trip"
            config_text = (Path(scratch) / "config.json").read_text()

        model.double()
        torch.set_default_dtype(torch.float64)
        with Float64():
            logits64, weights64, indices64, _ = route(block, x.double())
            output64 = run(x.double())
        torch.set_default_dtype(torch.float32)

    assert output64.dtype == weights64.dtype == logits64.dtype == torch.float64
    assert torch.equal(indices, indices64), f"{name}: float32 and float64 route differently"
    assert (weights - weights64).abs().max() < 1e-6
    error = float((output - output64).norm() / output64.norm())
    assert error < 1e-6, f"{name}: float32 and float64 differ by {error}"

    prefixes = [f"model.layers.{LAYER}.{spec['block']}."]
    prefixes += [f"model.layers.{layer}.mlp." for layer in spec.get("dense_layers", [])]
    kept = {key: value.contiguous() for key, value in full.items() if key.startswith(tuple(prefixes))}
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("*.safetensors*"):
        old.unlink()
    (directory / "config.json").write_text(config_text)
    shards = spec.get("shards", 1)
    size = sum(value.nbytes for value in kept.values())
    save_torch_state_dict(kept, directory, max_shard_size=int(size / shards * 1.1) if shards > 1 else size + 1)
    assert len(list(directory.glob("model*.safetensors"))) == shards

    io = {
        "input": x,
        "output": output,
        "output_float64": output64,
        "router_logits": logits.float(),
        "router_logits_float64": logits64,
        "indices": indices.int(),
        "weights": weights.float(),
        "weights_float64": weights64,
    }
    save_file({key: value.contiguous() for key, value in io.items()}, directory / "io.safetensors")

    if name == "gpt_oss":
        experts = block.experts
        h = torch.einsum("th,ehi->eti", x.double().reshape(-1, x.shape[-1]), experts.gate_up_proj)
        h = h + experts.gate_up_proj_bias[:, None]
        facts["share of gates over 7"] = round(float((h[..., ::2] > 7).float().mean()), 3)
        facts["share of ups over 7"] = round(float((h[..., 1::2].abs() > 7).float().mean()), 3)
    print(
        f"{name}: seed {seed}, margin {margin:.1e}, output rms {float(output.square().mean().sqrt()):.2f}, "
        f"experts hit {len(indices.unique())}/{logits.shape[1]}, float32 error {error:.1e}",
        *[f"; {key}: {value}" for key, value in facts.items()],
        sep="",
    )


def bound(key, tensor):
    """Weights, inputs and indices bit for bit; results may differ in the last bits between machines."""
    if key[0] != "io.safetensors" or key[1] in ("input", "indices"):
        return None
    return 1e-12 if tensor.dtype == torch.float64 else 1e-5


if __name__ == "__main__":
    directories.main(__doc__, ARCHITECTURES, HERE, make, bound)
