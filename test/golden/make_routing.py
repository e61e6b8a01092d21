#!/usr/bin/env python3
"""Writes test/golden/moe/routing.json: small routing cases computed in float64 by PyTorch.

Made with torch 2.13.0 (CPU) and numpy 2.4.6; set up as in make_moe.py.

    venv/bin/python test/golden/make_routing.py            # writes
    venv/bin/python test/golden/make_routing.py --check    # compares to 1e-12; writes nothing

Logits come from numpy's PCG64 and are rounded to 4 decimals, so that float32 and float64 see nearly the
same numbers; a case is drawn again until no two scores that a selection compares are closer than 1e-3 (2e-4 for
probabilities of the softmax over experts, and for sinkhorn's small matrix 1e-5).
Tensors are { "dims", "data" }. Indices are in descending selection score, except that an expert-choice
list is per expert. `gradient` is d(sum(weights * upstream)) / d(logits) by autograd, selection held fixed.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)

FILE = Path(__file__).resolve().parent / "moe" / "routing.json"


def tensor(value):
    data = value.detach().reshape(-1).tolist()
    return {"dims": list(value.shape), "data": data}


def draw(rng, *shape, std=1.5):
    return torch.from_numpy(np.round(rng.standard_normal(shape) * std, 4))


def clear(scores, gap, dim=-1):
    """True if no two finite scores along `dim` are closer than `gap`."""
    step = scores.sort(dim=dim, descending=True)[0].diff(dim=dim).abs()
    return bool((step[step.isfinite()] > gap).all())


def again(seed, tries, attempt):
    """The first attempt that has a clear selection."""
    for i in range(tries):
        result = attempt(np.random.default_rng(seed * 1000 + i))
        if result is not None:
            return result
    raise RuntimeError(f"no clear case for seed {seed}")


def grouped(scores, bias, groups, kept_groups, group_score, mask=-torch.inf):
    """Selection scores with the experts of dropped groups set to `mask`, and the group scores."""
    choice = scores + bias
    parts = choice.view(len(choice), groups, -1)
    value = parts.topk(2, dim=-1)[0].sum(-1) if group_score == "top2" else parts.max(-1)[0]
    keep = torch.zeros_like(value, dtype=torch.bool).scatter_(1, value.topk(kept_groups)[1], True)
    keep = keep.repeat_interleave(parts.shape[-1], dim=1)
    return choice.masked_fill(~keep, mask), value


def top_k_case(name, seed, tokens, experts, k, score, normalize=False, scale=1.0, epsilon=0.0, bias=None,
               groups=None, kept_groups=None, group_score=None, positive=False):
    def attempt(rng):
        logits = draw(rng, tokens, experts).requires_grad_()
        shift = draw(rng, experts, std=bias) if bias else torch.zeros(experts)
        upstream = draw(rng, tokens, k, std=1.0)
        if score == "softmaxSelected":
            scores = logits
        else:
            scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
        choice = scores.detach() + shift
        if groups:
            choice, value = grouped(scores.detach(), shift, groups, kept_groups, group_score)
            if not clear(value, 1e-3):
                return None
        if not clear(choice, 2e-4 if score == "softmax" else 1e-3):
            return None
        indices = choice.topk(k)[1]
        weights = scores.gather(1, indices)
        if score == "softmaxSelected":
            weights = weights.softmax(-1)
        if normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + epsilon)
        weights = weights * scale
        (gradient,) = torch.autograd.grad((weights * upstream).sum(), logits)
        case = {
            "name": name,
            "options": {"k": k, "score": score, "normalize": normalize, "epsilon": epsilon, "scale": scale},
            "logits": tensor(logits),
            "indices": tensor(indices),
            "weights": tensor(weights),
            "upstream": tensor(upstream),
            "gradient": tensor(gradient),
        }
        if bias:
            case["bias"] = tensor(shift)
        if groups:
            case["options"] |= {"groups": groups, "topkGroups": kept_groups, "groupScore": group_score}
            zero = grouped(scores.detach(), shift, groups, kept_groups, group_score, mask=0.0)[0].topk(k)[1]
            same = torch.equal(zero.sort()[0], indices.sort()[0])
            if positive is same:  # `positive`: a token must exist where masking with 0.0 chooses otherwise
                return None
            if positive:
                case["note"] = "dropped groups are masked with -inf; masking with 0.0 would choose indicesMaskedWithZero"
                case["indicesMaskedWithZero"] = tensor(zero)
        return case

    return again(seed, 3000, attempt)


def expert_choice_case(name, seed, tokens, experts, capacity):
    def attempt(rng):
        logits = draw(rng, tokens, experts)
        scores = logits.softmax(-1)
        if not clear(scores, 2e-4, dim=0):
            return None
        weights, indices = scores.t().topk(capacity)
        return {
            "name": name,
            "options": {"capacity": capacity, "score": "softmax over experts", "normalize": False},
            "logits": tensor(logits),
            "tokensPerExpert": tensor(indices),
            "weightsPerExpert": tensor(weights),
        }

    return again(seed, 3000, attempt)


def sinkhorn(logits, tolerance=1e-4, epsilon=1e-8):
    """Alternating row and column scaling of exp(logits), as Megatron does it. Returns (matrix, iterations)."""
    cost = logits.exp()
    rows, columns = cost.shape
    right = torch.ones(columns)
    for iteration in range(1, 10000):
        left = 1 / (rows * ((cost * right).sum(1) + epsilon))
        fresh = 1 / (columns * ((left[:, None] * cost).sum(0) + epsilon))
        error = (right - fresh).abs().mean()
        right = fresh
        if error <= tolerance:
            return left[:, None] * cost * right, iteration
    raise RuntimeError("sinkhorn did not converge")


def sinkhorn_case(name, seed, tokens, experts, k):
    def attempt(rng):
        logits = draw(rng, tokens, experts)
        matrix, iterations = sinkhorn(logits)
        if not clear(matrix, 1e-5):
            return None
        indices = matrix.topk(k)[1]
        weights = (logits.sigmoid() if k == 1 else logits.softmax(-1)).gather(1, indices)
        return {
            "name": name,
            "options": {"k": k, "tolerance": 1e-4, "epsilon": 1e-8},
            "note": "as Megatron does while training (it skips the scaling when evaluating): indices from the scaled matrix; weights from the logits: sigmoid if k = 1, else softmax over experts",
            "logits": tensor(logits),
            "matrix": tensor(matrix),
            "iterations": iterations,
            "indices": tensor(indices),
            "weights": tensor(weights),
        }

    return again(seed, 3000, attempt)


def losses_case(name, seed, tokens, experts, k):
    def attempt(rng):
        logits = draw(rng, tokens, experts).requires_grad_()
        p = logits.softmax(-1)
        if not clear(p, 2e-4):
            return None
        indices = p.topk(k)[1]
        count = torch.bincount(indices.reshape(-1), minlength=experts).double()
        balance = experts * (count / (k * tokens) * p.mean(0)).sum()
        z = logits.logsumexp(-1).square().mean()
        importance = p.sum(0)
        importance_loss = importance.var(correction=0) / importance.mean() ** 2
        load_loss = count.var(correction=0) / count.mean() ** 2

        def gradient(loss):
            return tensor(torch.autograd.grad(loss, logits, retain_graph=True)[0])

        return {
            "name": name,
            "options": {"k": k},
            "logits": tensor(logits),
            "indices": tensor(indices),
            "counts": [int(c) for c in count],
            "loadBalancing": {"form": "E sum_e count_e / (k T) mean_t p_te", "loss": (balance).item(), "gradient": gradient(balance)},
            "loadBalancingTransformers": {"form": "E sum_e count_e / T mean_t p_te", "loss": (k * balance).item(), "gradient": gradient(k * balance)},
            "z": {"form": "mean_t logsumexp(l_t)^2", "loss": (z).item(), "gradient": gradient(z)},
            "importance": {"form": "population variance / mean^2 of sum_t p_te", "loss": (importance_loss).item(), "gradient": gradient(importance_loss)},
            "load": {"form": "population variance / mean^2 of the counts; no gradient", "loss": (load_loss).item()},
        }

    return again(seed, 3000, attempt)


def make():
    v3 = dict(score="sigmoid", normalize=True, epsilon=1e-20, scale=2.5, groups=4, kept_groups=2, group_score="top2")
    return {
        "routeTopK": [
            top_k_case("softmax, top k", 1, 7, 9, 3, "softmax"),
            top_k_case("softmax, top k, normalised", 2, 7, 9, 3, "softmax", normalize=True),
            top_k_case("softmax, k = 1", 3, 5, 6, 1, "softmax"),
            top_k_case("softmax, k = E, normalised", 4, 5, 6, 6, "softmax", normalize=True),
            top_k_case("top k, softmax of the selected", 5, 7, 10, 3, "softmaxSelected"),
            top_k_case("sigmoid, normalised, scaled", 6, 7, 9, 3, "sigmoid", normalize=True, epsilon=1e-20, scale=2.5),
            top_k_case("sigmoid, not normalised", 7, 6, 7, 2, "sigmoid"),
            top_k_case("sigmoid with bias in groups (DeepSeek-V3)", 8, 9, 12, 3, bias=0.2, **v3),
            top_k_case("the same where a negative score is chosen", 9, 6, 12, 5, bias=0.7, positive=True, **v3),
            top_k_case("softmax in groups by maximum, scaled (DeepSeek-V2)", 10, 8, 12, 3, "softmax", scale=16.0,
                       groups=3, kept_groups=2, group_score="max"),
        ],
        "routeExpertChoice": [
            expert_choice_case("expert choice", 11, 10, 6, 3),
            expert_choice_case("expert choice, every token", 12, 5, 7, 5),
        ],
        "sinkhorn": [sinkhorn_case("k = 1", 13, 8, 6, 1), sinkhorn_case("k = 3", 14, 10, 7, 3)],
        "losses": [losses_case("k = 1", 15, 10, 6, 1), losses_case("k = 3", 16, 9, 7, 3)],
    }


def differences(a, b, path=""):
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for key in a for d in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{path}/{i}")]
    if isinstance(a, float) and isinstance(b, float):
        return [] if abs(a - b) <= 1e-12 * max(1.0, abs(a)) else [f"{path}: {a} became {b}"]
    return [] if a == b else [f"{path}: {a} became {b}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed file; write nothing")
    fresh = make()
    if parser.parse_args().check:
        found = differences(json.loads(FILE.read_text()), fresh)
        print("\n".join(found[:20]) or "the committed file is what this script makes")
        sys.exit(1 if found else 0)
    lines = []
    for op, cases in fresh.items():
        lines.append(f' "{op}": [\n' + ",\n".join("  " + json.dumps(case) for case in cases) + "\n ]")
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{FILE.name}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
