#!/usr/bin/env python3
"""Writes test/golden/attention/video.json: tubelet embeddings and position interpolation by PyTorch in float64.

Made with torch 2.13.0 (CPU) and numpy 2.4.6.

    venv/bin/python test/golden/make_video.py            # writes
    venv/bin/python test/golden/make_video.py --check    # compares; writes nothing
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

torch.set_num_threads(1)
FILE = Path(__file__).resolve().parent / "attention" / "video.json"


def numbers(t):
    return {"dims": list(t.shape), "data": [float(f"{x:.12g}") for x in t.double().reshape(-1).tolist()]}


def draw(seed, *shape):
    return torch.from_numpy(np.round(np.random.default_rng(seed).standard_normal(shape), 3).astype(np.float32)).double()


def embedding(name, dims, tubelet, stride=None, offset=(0, 0, 0), dim=5, pixels=False, mean=None, std=None):
    """video [B, T, C, H, W]; weight [dim, C, t, h, w] as in Conv3d."""
    if pixels:
        video = torch.from_numpy(np.random.default_rng(1).integers(0, 256, dims)).double()
        x = (video / 255 - torch.tensor(mean).double().view(-1, 1, 1)) / torch.tensor(std).double().view(-1, 1, 1)
    else:
        video = x = draw(1, *dims)
    weight, bias = draw(2, dim, dims[2], *tubelet), draw(3, dim)
    t, h, w = offset
    y = F.conv3d(x.transpose(1, 2)[:, :, t:, h:, w:], weight, bias, stride or tubelet)
    options = {"tubelet": list(tubelet), "offset": list(offset)}
    if stride:
        options["stride"] = list(stride)
    if pixels:
        options |= {"mean": mean, "std": std}
    return {"name": name, "options": options, "uint8": pixels, "grid": list(y.shape[2:]), "video": numbers(video),
            "weight": numbers(weight), "bias": numbers(bias), "output": numbers(y.flatten(2).transpose(1, 2))}


def positions(source, target, mode, width=3):
    one = isinstance(source, int)
    table = draw(4, source if one else source[0] * source[1], width)
    grid = table.T.reshape(1, width, *([source] if one else source))
    y = F.interpolate(grid, size=target, mode=mode, **({} if mode == "nearest" else {"align_corners": False}))
    return {"from": source, "to": target, "mode": mode, "table": numbers(table), "output": numbers(y.reshape(width, -1).T)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    golden = {
        "embeddings": [
            embedding("ViViT", (2, 4, 3, 8, 8), (2, 4, 4)),
            embedding("trailing pixels", (1, 5, 2, 9, 11), (2, 3, 4)),
            embedding("overlapping, offset", (1, 6, 2, 9, 9), (3, 4, 2), stride=(2, 3, 1), offset=(1, 2, 3)),
            embedding("one frame", (1, 3, 1, 6, 6), (1, 6, 6)),
            embedding("pixels", (1, 2, 3, 8, 10), (2, 4, 5), pixels=True, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        ],
        "positions": [
            *[positions(a, b, mode) for mode in ("nearest", "linear") for a, b in ((8, 16), (16, 6), (7, 10), (5, 1), (1, 4))],
            *[positions(a, b, mode) for mode in ("nearest", "bilinear", "bicubic")
              for a, b in (((4, 4), (7, 7)), ((6, 5), (3, 9)), ((3, 3), (3, 3)), ((5, 5), (1, 2)))],
        ],
    }
    text = json.dumps(golden, separators=(",", ":")) + "\n"
    if check:
        same = FILE.read_text() == text
        print("same" if same else "differs")
        sys.exit(0 if same else 1)
    FILE.write_text(text)


main()
