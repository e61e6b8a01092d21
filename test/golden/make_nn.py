#!/usr/bin/env python3
"""Writes test/golden/nn/blocks.json: norms with gradients, GELU, gated residuals and attention pooling in float64.

Made with torch 2.13.0 (CPU), transformers 5.17.0 and numpy 2.4.6.

    venv/bin/python test/golden/make_nn.py            # writes
    venv/bin/python test/golden/make_nn.py --check    # compares; writes nothing
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import VideoPrismVisionConfig
from transformers.models.videoprism.modeling_videoprism import VideoPrismMultiheadAttentionPoolingHead

torch.set_num_threads(1)
FILE = Path(__file__).resolve().parent / "nn" / "blocks.json"


def numbers(t):
    return {"dims": list(t.shape), "data": [float(f"{x:.12g}") for x in t.detach().double().reshape(-1).tolist()]}


def draw(seed, *shape, mean=0.0):
    x = np.random.default_rng(seed).standard_normal(shape) + mean
    return torch.from_numpy(np.round(x, 3).astype(np.float32)).double()


def norm(name, kind, shape, epsilon, mean=0.0, unit=False, affine=True, residual=False):
    width = shape[-1]
    x = draw(1, *shape, mean=mean).requires_grad_()
    r = draw(2, *shape) if residual else None
    weight = (draw(3, width) if affine else torch.full((width,), 0.0 if unit else 1.0, dtype=torch.float64)).requires_grad_()
    bias = draw(4, width).requires_grad_() if affine and kind == "layer" else None
    scale = weight + 1 if unit else weight
    v = x if r is None else x + r
    if kind == "layer":
        y = F.layer_norm(v, (width,), scale, bias, epsilon)
    else:
        y = F.rms_norm(v, (width,), scale, epsilon)
    g = draw(5, *shape)
    y.backward(g)
    options = {"epsilon": epsilon, **({"unitOffset": True} if unit else {})}
    case = {"name": name, "kind": kind, "options": options, "x": numbers(x), "output": numbers(y), "gradOutput": numbers(g),
            "gradX": numbers(x.grad)}
    if affine:
        case |= {"weight": numbers(weight), "gradWeight": numbers(weight.grad)}
    if bias is not None:
        case |= {"bias": numbers(bias), "gradBias": numbers(bias.grad)}
    if r is not None:
        case |= {"residual": numbers(r), "sum": numbers(v)}
    return case


def gelu(approximate):
    x = torch.cat([torch.linspace(-8, 8, 65, dtype=torch.float64), draw(6, 40)]).float().double()
    return {"approximate": approximate, "x": numbers(x), "output": numbers(F.gelu(x, approximate=approximate))}


def gated():
    x, y, a = draw(7, 3, 17), draw(8, 3, 17), draw(9, 17)
    return {"x": numbers(x), "y": numbers(y), "gate": numbers(a), "output": numbers(x + torch.tanh(a) * y)}


def pooling():
    """VideoPrism's pooling head of transformers with random weights; float64."""
    config = VideoPrismVisionConfig(hidden_size=24, intermediate_size=32, num_attention_heads=4, attention_probs_dropout_prob=0.0)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    head = VideoPrismMultiheadAttentionPoolingHead(config).double().eval()
    weights = {}
    with torch.no_grad():
        for i, (name, p) in enumerate(head.named_parameters()):
            p.copy_(draw(20 + i, *p.shape) * (0.3 if p.dim() > 1 else 1))
            weights[name] = numbers(p)
        x = draw(19, 2, 7, 24)
        return {"heads": 4, "weights": weights, "x": numbers(x), "output": numbers(head(x)[0])}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    golden = {
        "norms": [
            norm("ViT", "layer", (4, 48), 1e-6),
            norm("odd width", "layer", (2, 3, 37), 1e-5),
            norm("far mean", "layer", (3, 70), 1e-12, mean=5000.0),
            norm("VideoPrism", "layer", (3, 33), 1e-6, unit=True),
            norm("plain", "layer", (5, 9), 1e-5, affine=False),
            norm("residual", "layer", (4, 65), 1e-6, residual=True),
            norm("Llama", "rms", (4, 48), 1e-6),
            norm("Gemma", "rms", (3, 70), 1e-6, unit=True),
            norm("residual", "rms", (2, 35), 1e-5, residual=True),
        ],
        "gelu": [gelu("none"), gelu("tanh")],
        "gated": gated(),
        "pooling": pooling(),
    }
    text = json.dumps(golden, separators=(",", ":")) + "\n"
    if check:
        same = FILE.read_text() == text
        print("same" if same else "differs")
        sys.exit(0 if same else 1)
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(text)


main()
