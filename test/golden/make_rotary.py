#!/usr/bin/env python3
"""Writes test/golden/attention/rotary.json: rotary embeddings by transformers' functions.

Made with transformers 5.17.0, torch 2.13.0 (CPU) and numpy 2.4.6.

    venv/bin/python test/golden/make_rotary.py            # writes
    venv/bin/python test/golden/make_rotary.py --check    # compares; writes nothing

Frequencies come from transformers' ROPE_INIT_FUNCTIONS (float32 there), except `ntk` (formula). Rotations are
its functions for Llama, GPT-J and V-JEPA 2, fed with float64; for Qwen2-VL the joining of sections that the
model's code describes, then Llama's rotation. x is in heddle's layout [batch, sequence, heads, dim].
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gptj.modeling_gptj import rotate_every_two
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.vjepa2.modeling_vjepa2 import rotate_queries_or_keys

torch.set_num_threads(1)
FILE = Path(__file__).resolve().parent / "attention" / "rotary.json"


def tensor(t):
    return {"dims": list(t.shape), "data": [float(f"{x:.12g}") for x in t.double().reshape(-1).tolist()]}


def draw(seed, *shape):
    return torch.from_numpy(np.round(np.random.default_rng(seed).standard_normal(shape), 3).astype(np.float32)).double()


def frequencies(dim, kind, **parameters):
    config = LlamaConfig(hidden_size=dim * 2, num_attention_heads=2, max_position_embeddings=131072,
                         rope_parameters={"rope_type": kind, "rope_theta": parameters.pop("base"), **parameters})
    inv, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    return {"frequencies": inv.double().tolist(), "factor": factor}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    scalings = [
        {"name": "linear", "dim": 32, "base": 10000, "scaling": {"type": "linear", "factor": 4},
         **frequencies(32, "linear", base=10000.0, factor=4.0)},
        {"name": "yarn", "dim": 64, "base": 10000, "scaling": {"type": "yarn", "factor": 16, "originalLength": 4096},
         **frequencies(64, "yarn", base=10000.0, factor=16.0, original_max_position_embeddings=4096)},
        {"name": "yarn with betas", "dim": 64, "base": 150000,
         "scaling": {"type": "yarn", "factor": 32, "originalLength": 4096, "betaFast": 16, "betaSlow": 2, "attentionFactor": 1.25},
         **frequencies(64, "yarn", base=150000.0, factor=32.0, original_max_position_embeddings=4096, beta_fast=16.0,
                       beta_slow=2.0, attention_factor=1.25)},
        {"name": "llama3", "dim": 128, "base": 500000,
         "scaling": {"type": "llama3", "factor": 8, "originalLength": 8192, "lowFrequencyFactor": 1, "highFrequencyFactor": 4},
         **frequencies(128, "llama3", base=500000.0, factor=8.0, original_max_position_embeddings=8192,
                       low_freq_factor=1.0, high_freq_factor=4.0)},
        {"name": "ntk", "dim": 16, "base": 10000, "scaling": {"type": "ntk", "factor": 2}, "factor": 1.0,
         "frequencies": [(10000.0 * 2.0 ** (16 / 14)) ** (-i / 8) for i in range(8)]},
    ]
    rotations = []
    inv = lambda d: 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)

    x = draw(1, 2, 5, 2, 12)
    at = torch.tensor([[0, 1, 2, 3, 4], [7, 100, 5000, 131071, 1000000]])
    angle = at[..., None].double() * inv(12)
    emb = torch.cat([angle, angle], -1)
    q, _ = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), emb.cos(), emb.sin())
    rotations.append({"name": "Llama", "options": {}, "positions": at, "x": x, "out": q.transpose(1, 2)})

    angle = at[..., None].double() * inv(8)
    cos, sin = (f(angle).repeat_interleave(2, -1)[:, :, None] for f in (torch.cos, torch.sin))
    out = torch.cat([x[..., :8] * cos + rotate_every_two(x[..., :8]) * sin, x[..., 8:]], -1)
    rotations.append({"name": "GPT-J, partial", "options": {"interleaved": True, "rotaryDim": 8}, "positions": at, "x": x,
                      "out": out})

    x = draw(2, 2, 4, 2, 16)
    at = torch.from_numpy(np.random.default_rng(3).integers(0, 60, (3, 2, 4)))
    angle = at[..., None].double() * inv(16)
    emb = torch.cat([angle, angle], -1)
    section = [2, 3, 3]
    # As Qwen2-VL joins its sections: block i of the doubled list comes from axis i % 3.
    cos, sin = (torch.cat([m[i % 3] for i, m in enumerate(f(emb).split(section * 2, dim=-1))], -1) for f in (torch.cos, torch.sin))
    q, _ = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)
    rotations.append({"name": "Qwen2-VL", "options": {"sections": section}, "positions": at, "x": x, "out": q.transpose(1, 2)})

    x = draw(4, 1, 6, 2, 26)
    at = torch.from_numpy(np.random.default_rng(5).integers(0, 24, (3, 1, 6)))
    size = 2 * ((26 // 3) // 2)
    parts = [rotate_queries_or_keys(x.transpose(1, 2)[..., a * size:(a + 1) * size], at[a].double()[:, None]) for a in range(3)]
    out = torch.cat([*parts, x.transpose(1, 2)[..., 3 * size:]], -1).transpose(1, 2)
    rotations.append({"name": "V-JEPA 2", "options": {"axes": 3, "interleaved": True, "tiledAngles": True}, "positions": at,
                      "x": x, "out": out})

    for r in rotations:
        r["positions"] = {"dims": list(r["positions"].shape), "data": r["positions"].reshape(-1).tolist()}
        r["x"], r["out"] = tensor(r["x"]), tensor(r["out"])
    made = {"scalings": scalings, "rotations": rotations}
    if check:
        same = json.loads(json.dumps(made)) == json.loads(FILE.read_text())
        print(f"{FILE.name}: {'same' if same else 'differs'}")
        return 0 if same else 1
    FILE.write_text(json.dumps(made, separators=(",", ":")) + "\n")
    print(FILE.name, FILE.stat().st_size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
