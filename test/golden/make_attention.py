#!/usr/bin/env python3
"""Writes test/golden/attention/*.json: small attention cases computed in float64 by PyTorch.

Made with torch 2.13.0 (CPU) and numpy 2.4.6.

    venv/bin/python test/golden/make_attention.py            # writes
    venv/bin/python test/golden/make_attention.py --check    # compares to 1e-10; writes nothing

q, k, v and the upstream gradient come from numpy's PCG64, rounded to 3 decimals, in heddle's layout
[batch, sequence, heads, dim]. Where `sdpa` is true the output comes from torch's own
scaled_dot_product_attention; the others are written out with torch operations, because it has no softcap,
sinks, ALiBi or bottom-right causal mask. Gradients are autograd's. A row without a visible key is 0.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
DIR = Path(__file__).resolve().parent / "attention"


def draw(rng, *shape, std=1.0):
    # float32 first: float32 and float64 then see the same numbers
    return torch.from_numpy(np.round(rng.standard_normal(shape) * std, 3).astype(np.float32).astype(np.float64))


def tensor(t):
    return {"dims": list(t.shape), "data": [float(f"{x:.12g}") for x in t.detach().reshape(-1).tolist()]}


def visible(sq, sk, causal, window, ids):
    i = torch.arange(sq)[:, None] + sk - sq
    j = torch.arange(sk)[None, :]
    left, right = window or (-1, -1)
    if causal:
        right = 0
    seen = torch.ones(sq, sk, dtype=torch.bool)
    if left >= 0:
        seen &= j >= i - left
    if right >= 0:
        seen &= j <= i + right
    if ids is not None:
        q, k = ids
        seen |= (q[:, None] == k[None, :]) & (q[:, None] >= 0)
    return seen, -(i - j).abs().double()


def case(name, seed, b, sq, sk, h, hk, d, dv=None, causal=False, window=None, softcap=0.0, scale=None, bias=False,
         alibi=False, sinks=False, mask=False, ids=None, sdpa=False, std=1.0):
    rng = np.random.default_rng(seed)
    dv = dv or d
    q = draw(rng, b, sq, h, d, std=std).requires_grad_()
    k = draw(rng, b, sk, hk, d, std=std).requires_grad_()
    v = draw(rng, b, sk, hk, dv).requires_grad_()
    upstream = draw(rng, b, sq, h, dv)
    options = {}
    if causal:
        options["causal"] = True
    if window:
        options["window"] = list(window)
    if softcap:
        options["softcap"] = softcap
    if scale is not None:
        options["scale"] = scale
    id_tensors = None
    if ids:
        id_tensors = (torch.tensor(ids[0]), torch.tensor(ids[1]))
        options["blockIds"] = {"query": ids[0], "key": ids[1]}
    seen, distance = visible(sq, sk, causal, window, id_tensors)
    seen = seen.expand(b, h, sq, sk).clone()
    out = {"name": name}
    if mask:
        m = torch.from_numpy(rng.random((b, 1, sq, sk)) < 0.7)
        out["mask"] = {"dims": list(m.shape), "data": m.reshape(-1).int().tolist()}
        seen &= m
    bias_t = draw(rng, 1, h, sq, sk).requires_grad_() if bias else None
    slopes = torch.tensor([2.0 ** -(i + 1) for i in range(h)]) if alibi else None
    sink_t = draw(rng, h) if sinks else None

    qh, kh, vh = (x.transpose(1, 2) for x in (q, k, v))
    kh = kh.repeat_interleave(h // hk, 1)
    vh = vh.repeat_interleave(h // hk, 1)
    z = qh @ kh.transpose(2, 3) * (scale if scale is not None else 1 / math.sqrt(d))
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    if bias:
        z = z + bias_t
    if alibi:
        z = z + slopes[None, :, None, None] * distance
    z = z.masked_fill(~seen, -math.inf)
    full = torch.cat([z, sink_t[None, :, None, None].expand(b, h, sq, 1)], -1) if sinks else z
    lse = torch.logsumexp(full, -1)
    p = torch.exp(z - torch.where(lse.isinf(), torch.zeros_like(lse), lse)[..., None])
    o = (p @ vh).transpose(1, 2)
    if sdpa:
        attn = seen if not bias else torch.where(seen, bias_t.expand(b, h, sq, sk), torch.tensor(-math.inf))
        theirs = F.scaled_dot_product_attention(qh, kh, vh, attn_mask=attn, scale=scale).transpose(1, 2)
        if (theirs - o).abs().max() > 1e-12:
            raise SystemExit(f"{name}: torch's attention differs")
    wanted = [q, k, v] + ([bias_t] if bias else [])
    grads = torch.autograd.grad((o * upstream).sum(), wanted)
    out.update(options=options, sdpa=sdpa, q=tensor(q), k=tensor(k), v=tensor(v), gradOutput=tensor(upstream),
               output=tensor(o), logSumExp=[x if math.isfinite(x) else None for x in tensor(lse)["data"]])
    if bias:
        out["bias"] = tensor(bias_t)
    if alibi:
        out["alibiSlopes"] = slopes.tolist()
    if sinks:
        out["sinks"] = sink_t.tolist()
    out["gradients"] = dict(zip(["query", "key", "value", "bias"], map(tensor, grads)))
    return out


IMAGE = [-1, -1, 0, 0, 0, -1, 1, 1, 1, 1, -1, -1]
CASES = [
    lambda: case("plain", 1, 2, 5, 7, 2, 2, 8, sdpa=True),
    lambda: case("causal, bottom right", 2, 1, 5, 9, 2, 1, 8, causal=True, sdpa=True),
    lambda: case("causal, empty rows", 3, 1, 9, 5, 2, 1, 8, causal=True),
    lambda: case("window 3, 1", 4, 1, 12, 14, 2, 2, 4, window=(3, 1), sdpa=True),
    lambda: case("softcap 2", 5, 1, 6, 40, 2, 2, 8, softcap=2.0, std=2.0),
    lambda: case("bias", 6, 2, 5, 9, 2, 1, 8, bias=True, sdpa=True),
    lambda: case("ALiBi causal", 7, 1, 9, 9, 4, 4, 4, alibi=True, causal=True),
    lambda: case("sinks", 8, 1, 6, 9, 4, 2, 8, sinks=True, causal=True),
    lambda: case("mask, scale, value dim 5", 9, 2, 6, 8, 2, 1, 7, dv=5, mask=True, scale=0.7, sdpa=True),
    lambda: case("Gemma 3 images", 10, 1, 12, 12, 2, 1, 4, causal=True, window=(2, 0), ids=(IMAGE, IMAGE), sdpa=True),
    lambda: case("softcap, bias, causal", 11, 1, 8, 11, 2, 1, 6, softcap=3.0, bias=True, causal=True, window=(5, -1)),
]


def numbers(x):
    if isinstance(x, dict):
        for value in x.values():
            yield from numbers(value)
    elif isinstance(x, list):
        for value in x:
            yield from numbers(value)
    elif isinstance(x, float):
        yield x


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    cases = [make() for make in CASES]
    file = DIR / "attention.json"
    if check:
        old = list(numbers(json.loads(file.read_text())))
        new = list(numbers(json.loads(json.dumps(cases))))
        worst = max(abs(a - b) for a, b in zip(old, new)) if len(old) == len(new) else math.inf
        print(f"{file.name}: largest difference {worst}")
        return 0 if worst < 1e-10 else 1
    DIR.mkdir(exist_ok=True)
    file.write_text("[\n" + ",\n".join(json.dumps(c, separators=(",", ":")) for c in cases) + "\n]\n")
    print(file.name, file.stat().st_size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
