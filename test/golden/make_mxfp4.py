#!/usr/bin/env python3
"""Writes test/golden/moe/gpt_oss_mxfp4: a tiny gpt-oss MoE block in MXFP4, laid out as openai/gpt-oss-20b on the hub.

    mlp.router.{weight,bias}                 bfloat16
    mlp.experts.gate_up_proj_blocks          uint8 [E, 2I, H/32, 16]   rows g0, u0, g1, u1 ...
    mlp.experts.gate_up_proj_scales          uint8 [E, 2I, H/32]
    mlp.experts.gate_up_proj_bias            bfloat16 [E, 2I]
    mlp.experts.down_proj_{blocks,scales}    uint8 [E, H, I/32, 16], [E, H, I/32]
    mlp.experts.down_proj_bias               bfloat16 [E, H]

Codes and exponents are random; transformers' own convert_moe_packed_tensors turns them into weights, and
transformers' own GptOssMLP with those weights gives io.safetensors (the tensors that make_moe.py lists) and,
for one expert, the weights themselves: gate_up [2I, H] and down [H, I], outputs as rows, in bfloat16, which
holds MXFP4 exactly.

Set up as in make_moe.py, then:

    venv/bin/python test/golden/make_mxfp4.py            # writes the files
    venv/bin/python test/golden/make_mxfp4.py --check    # regenerates and compares; writes nothing
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from make_moe import BATCH, COMMON, HERE, LAYER, MIN_GAP, SEQUENCE, Float64, compare, route

NAME = "gpt_oss_mxfp4"
HIDDEN, INTERMEDIATE, EXPERTS, K = 64, 96, 5, 2


def blocks_and_scales(rng, rows, inputs, exponents):
    codes = rng.integers(0, 256, (EXPERTS, rows, inputs // 32, 16), dtype=np.uint8)
    scales = rng.integers(*exponents, (EXPERTS, rows, inputs // 32)).astype(np.uint8)
    return torch.from_numpy(codes), torch.from_numpy(scales)


def make(directory):
    config = transformers.GptOssConfig(
        **COMMON,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        head_dim=32,
        num_local_experts=EXPERTS,
        num_experts_per_tok=K,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=32,
        swiglu_limit=7.0,
    )
    for seed in range(8000, 9000):
        rng = np.random.default_rng(seed)

        def bf16(*dims, std):
            return torch.from_numpy(rng.standard_normal(dims) * std).bfloat16()

        gate_up = blocks_and_scales(rng, 2 * INTERMEDIATE, HIDDEN, (121, 127))
        down = blocks_and_scales(rng, HIDDEN, INTERMEDIATE, (116, 122))
        stored = {
            "router.weight": bf16(EXPERTS, HIDDEN, std=1.7 / HIDDEN**0.5),
            "router.bias": bf16(EXPERTS, std=0.6),
            "experts.gate_up_proj_blocks": gate_up[0],
            "experts.gate_up_proj_scales": gate_up[1],
            "experts.gate_up_proj_bias": bf16(EXPERTS, 2 * INTERMEDIATE, std=0.6),
            "experts.down_proj_blocks": down[0],
            "experts.down_proj_scales": down[1],
            "experts.down_proj_bias": bf16(EXPERTS, HIDDEN, std=0.6),
        }
        x = torch.from_numpy(rng.standard_normal((BATCH, SEQUENCE, HIDDEN)).astype(np.float32))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager").eval()
        block = model.model.layers[LAYER].mlp
        weights = {key: value.float() for key, value in stored.items() if value.dtype == torch.bfloat16}
        weights["experts.gate_up_proj"] = convert_moe_packed_tensors(*gate_up, dtype=torch.float32)
        weights["experts.down_proj"] = convert_moe_packed_tensors(*down, dtype=torch.float32)
        block.load_state_dict(weights)
        with torch.no_grad():
            logits, gates, indices, margin = route(block, x)
        if margin > MIN_GAP and len(indices.unique()) == EXPERTS:
            break
    else:
        raise RuntimeError("no seed gives a clear routing")

    with torch.no_grad():
        output = block(x)[0]
        model.double()
        torch.set_default_dtype(torch.float64)
        with Float64():
            logits64, gates64, indices64, _ = route(block, x.double())
            output64 = block(x.double())[0]
        torch.set_default_dtype(torch.float32)
    assert output64.dtype == torch.float64 and torch.equal(indices, indices64)
    error = float((output - output64).norm() / output64.norm())
    assert error < 1e-6, f"float32 and float64 differ by {error}"

    directory.mkdir(parents=True, exist_ok=True)
    prefix = f"model.layers.{LAYER}.mlp."
    save_file({prefix + key: value.contiguous() for key, value in stored.items()}, directory / "model.safetensors")
    text = config.to_dict()
    text["dtype"] = "bfloat16"
    text["quantization_config"] = {
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
        "quant_method": "mxfp4",
    }
    (directory / "config.json").write_text(json.dumps(text, indent=2, sort_keys=True) + "\n")
    io = {
        "input": x,
        "output": output,
        "output_float64": output64,
        "router_logits": logits.float(),
        "router_logits_float64": logits64,
        "indices": indices.int(),
        "weights": gates.float(),
        "weights_float64": gates64,
        "gate_up_expert_3": weights["experts.gate_up_proj"][3].T.bfloat16(),
        "down_expert_3": weights["experts.down_proj"][3].T.bfloat16(),
    }
    assert torch.equal(io["down_expert_3"].float(), weights["experts.down_proj"][3].T)
    save_file({key: value.contiguous() for key, value in io.items()}, directory / "io.safetensors")
    for file in directory.iterdir():
        file.chmod(0o644)
    rms = float(output.square().mean().sqrt())
    print(f"{NAME}: seed {seed}, margin {margin:.1e}, output rms {rms:.2f}, float32 error {error:.1e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed files; write nothing")
    if not parser.parse_args().check:
        return make(HERE / NAME)
    with tempfile.TemporaryDirectory() as fresh:
        make(Path(fresh))
        if compare(NAME, HERE / NAME, Path(fresh)):
            sys.exit(1)
    print("the committed files are what this script makes")


if __name__ == "__main__":
    main()
