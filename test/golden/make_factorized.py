#!/usr/bin/env python3
"""Writes test/golden/attention/factorized.json: factorized attention computed in float64 by PyTorch.

Made with torch 2.13.0 (CPU) and numpy 2.4.6.

    venv/bin/python test/golden/make_factorized.py            # writes
    venv/bin/python test/golden/make_factorized.py --check    # compares to 1e-10; writes nothing

Each case moves the axes with einops-like permutes, as the models' own code does, and calls torch's
scaled_dot_product_attention on the sequences. The class token follows TimeSformer (divided space-time attention,
timesformer/models/vit.py): repeated over the frames, concatenated in front, and averaged after. Gradients are
autograd's, of the sum of outputs times drawn gradients.
"""

import argparse
import json
import math
import sys

import numpy as np
import torch
import torch.nn.functional as F
from make_attention import DIR, draw, numbers, tensor


def attend(q, k, v, causal):
    """Sequences [..., length, heads, dim]."""
    q, k, v = (x.transpose(-2, -3) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(-2, -3)


def over_time(q, k, v, causal):
    return attend(*(x.transpose(1, 2) for x in (q, k, v)), causal).transpose(1, 2)


def over_space(q, k, v, causal):
    return attend(q, k, v, causal)


def case(name, seed, axis, b, t, n, h, hk, d, dv=None, causal=False, cls=False, keep=None):
    rng = np.random.default_rng(seed)
    dv = dv or d
    q = draw(rng, b, t, n, h, d).requires_grad_()
    k = draw(rng, b, t, n, hk, d).requires_grad_()
    v = draw(rng, b, t, n, hk, dv).requires_grad_()
    up = draw(rng, b, t, n, h, dv)
    out = {"name": name, "options": {"axis": axis, **({"causal": True} if causal else {})}}
    wanted = [q, k, v]
    class_out = None
    if cls:
        c = [draw(rng, b, 1, x, y).requires_grad_() for x, y in ((h, d), (hk, d), (hk, dv))]
        class_up = draw(rng, b, 1, h, dv)
        wanted += c
        whole = [torch.cat([x[:, None].expand(b, t, 1, *x.shape[2:]), y], 2) for x, y in zip(c, (q, k, v))]
        all_out = attend(*whole, False)
        o, class_out = all_out[:, :, 1:], all_out[:, :, :1].mean(1)
        out["classToken"] = dict(zip(["query", "key", "value", "gradOutput", "output"],
                                     map(tensor, [*c, class_up, class_out])))
    elif keep is not None:
        # A mask over all tokens: a sequence of kept tokens is a sequence whose other keys are not seen.
        kept = torch.from_numpy(rng.random((b, t, n)) < keep)
        out["kept"] = kept.reshape(-1).int().tolist()
        rows = kept.transpose(1, 2) if axis == "time" else kept
        move = (lambda x: x.transpose(1, 2)) if axis == "time" else (lambda x: x)
        qs, ks, vs = (move(x).transpose(2, 3) for x in (q, k, v))
        ks, vs = (x.repeat_interleave(h // hk, 2) for x in (ks, vs))
        seen = rows[:, :, None, None, :]
        if causal:
            seen = seen & torch.ones(t, t, dtype=torch.bool).tril()
        seen = seen.expand(b, rows.shape[1], 1, rows.shape[2], rows.shape[2])
        z = (qs @ ks.transpose(-1, -2) / math.sqrt(d)).masked_fill(~seen, -1e30)
        o = move((z.softmax(-1) @ vs).transpose(2, 3)) * kept[..., None, None]
        up = up * kept[..., None, None]
    elif axis == "joint":
        flat = [x.reshape(b, t * n, *x.shape[3:]) for x in (q, k, v)]
        if causal:
            frame = torch.arange(t * n) // n
            qs, ks, vs = (x.transpose(1, 2) for x in flat)
            ks, vs = (x.repeat_interleave(h // hk, 1) for x in (ks, vs))
            o = F.scaled_dot_product_attention(qs, ks, vs, attn_mask=frame[:, None] >= frame[None, :]).transpose(1, 2)
        else:
            o = attend(*flat, False)
        o = o.reshape(b, t, n, h, dv)
    elif axis == "split-heads":
        a, m = h // 2, hk // 2
        o = torch.cat([over_time(q[..., :a, :], k[..., :m, :], v[..., :m, :], causal),
                       over_space(q[..., a:, :], k[..., m:, :], v[..., m:, :], False)], -2)
    else:
        o = (over_time if axis == "time" else over_space)(q, k, v, causal)
    loss = (o * up).sum()
    if cls:
        loss = loss + (class_out * class_up).sum()
    grads = torch.autograd.grad(loss, wanted)
    out.update(q=tensor(q), k=tensor(k), v=tensor(v), gradOutput=tensor(up), output=tensor(o))
    out["gradients"] = dict(zip(["query", "key", "value"], map(tensor, grads)))
    if cls:
        out["classToken"]["gradients"] = dict(zip(["query", "key", "value"], map(tensor, grads[3:])))
    return out


CASES = [
    lambda: case("joint", 1, "joint", 1, 3, 4, 2, 1, 8),
    lambda: case("joint causal over frames", 2, "joint", 2, 3, 4, 2, 2, 4, causal=True),
    lambda: case("time", 3, "time", 2, 5, 3, 2, 1, 8),
    lambda: case("time causal", 4, "time", 1, 5, 3, 2, 2, 4, dv=6, causal=True),
    lambda: case("space", 5, "space", 2, 3, 5, 2, 1, 8),
    lambda: case("split heads", 6, "split-heads", 2, 3, 4, 4, 2, 4),
    lambda: case("split heads causal", 7, "split-heads", 1, 4, 3, 2, 2, 4, causal=True),
    lambda: case("class token", 8, "space", 2, 3, 4, 2, 1, 8, cls=True),
    lambda: case("kept over time", 9, "time", 2, 4, 4, 2, 1, 4, keep=0.5),
    lambda: case("kept over time, causal", 10, "time", 1, 5, 4, 2, 1, 4, keep=0.6, causal=True),
    lambda: case("kept over space", 11, "space", 2, 4, 4, 2, 1, 4, keep=0.5),
]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    cases = [make() for make in CASES]
    file = DIR / "factorized.json"
    if check:
        old = list(numbers(json.loads(file.read_text())))
        new = list(numbers(json.loads(json.dumps(cases))))
        worst = max(abs(a - b) for a, b in zip(old, new)) if len(old) == len(new) else math.inf
        print(f"{file.name}: largest difference {worst}")
        return 0 if worst < 1e-10 else 1
    file.write_text("[\n" + ",\n".join(json.dumps(c, separators=(",", ":")) for c in cases) + "\n]\n")
    print(file.name, file.stat().st_size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
