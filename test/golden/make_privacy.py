"""Per-sample gradients by torch.func in float64, for every layer kind: writes privacy/gradients.json.

Each case holds what the layer read (activations ...), the gradient of each sample's own loss with respect to the
layer's output, every sample's squared gradient norm by vmap(grad), and the clipped sum for the factors of Abadi et al.

    python test/golden/make_privacy.py
"""

import json
import pathlib

import torch
from torch.func import functional_call, grad, vmap

torch.manual_seed(6)
torch.set_default_dtype(torch.float64)
MAX_NORM = 1.0


class Rms(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(width))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


def tensor(t):
    return {"dims": list(t.shape), "data": [float(f"{v:.10g}") for v in t.flatten().tolist()]}


def case(name, layer, kind, x, arguments, what, mask=None):
    """`what` maps the layer's input to the tensor the library takes. x is rounded to float32 first: it is exact.
    `mask` (of the output's places): padded ones have no loss."""

    def loss(parameters, xi, ti):
        y = functional_call(layer, parameters, (xi.unsqueeze(0),)).squeeze(0)
        return torch.tanh(y * ti).sum()

    parameters = {k: p.detach() for k, p in layer.named_parameters()}
    y = layer(x)
    target = torch.randn(y.shape)
    if mask is not None:
        target = target * (mask.unsqueeze(1) if kind == "group-norm" or kind.startswith("conv") else mask.unsqueeze(-1))
    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, target)
    out = y.detach().requires_grad_(True)
    (g,) = torch.autograd.grad(torch.tanh(out * target).sum(), out)
    inputs = what(x)
    if mask is not None:
        inputs["mask"] = mask
    return record(name, kind, arguments, inputs, {"gradOutputs": g}, per_sample)


def record(name, kind, arguments, inputs, gradients, per_sample):
    squared = sum(p.flatten(1).pow(2).sum(1) for p in per_sample.values())
    factors = torch.clamp(MAX_NORM / (squared.sqrt() + 1e-6), max=1.0)
    clipped = {k: torch.einsum("b,b...->...", factors, p) for k, p in per_sample.items()}
    return {
        "name": name,
        "kind": kind,
        "arguments": arguments,
        "inputs": {k: tensor(v) for k, v in {**inputs, **gradients}.items()},
        "squaredNorms": tensor(squared),
        "factors": tensor(factors),
        "gradients": {k: tensor(v) for k, v in clipped.items()},
    }


def exact(*dims):
    return torch.randn(*dims).float().double()


def tied():
    """x = W[ids], h = tanh(x M), logits = h Wᵀ; the loss also reads x, so that the embedding gets more than the head."""
    ids, M = torch.randint(0, 5, (3, 6)), torch.randn(4, 4)
    W, target, side = torch.randn(5, 4), torch.randn(3, 6, 5), torch.randn(3, 6, 4)

    def from_embedding(x, W, target, side):
        h = torch.tanh(x @ M)
        logits = h @ W.T
        return torch.tanh(logits * target).sum() + torch.tanh(x * side).sum(), h

    loss = lambda W, ids, target, side: from_embedding(W[ids], W, target, side)[0]
    per_sample = vmap(grad(loss), in_dims=(None, 0, 0, 0))(W, ids, target, side)
    x = W[ids].requires_grad_(True)
    total, h = from_embedding(x, W, target, side)
    (ge,) = torch.autograd.grad(total, x)
    logits = (h.detach() @ W.T).requires_grad_(True)
    (gl,) = torch.autograd.grad(torch.tanh(logits * target).sum(), logits)
    inputs = {"indices": ids, "hidden": h.detach(), "gradEmbeddings": ge, "gradLogits": gl}
    return record("tied embedding", "tied-embedding", {}, inputs, {}, {"weight": per_sample})


def lora():
    x, W, target = exact(3, 4, 5), torch.randn(6, 5), torch.randn(3, 4, 6)
    parameters = {"a": exact(2, 5), "b": exact(6, 2)}
    forward = lambda p, x: x @ W.T + 0.5 * (x @ p["a"].T) @ p["b"].T
    loss = lambda p, x, t: torch.tanh(forward(p, x) * t).sum()
    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, target)
    y = forward(parameters, x).requires_grad_(True)
    (g,) = torch.autograd.grad(torch.tanh(y * target).sum(), y)
    return record("lora", "lora", {"scale": 0.5}, {"activations": x, **parameters}, {"gradOutputs": g}, per_sample)


def experts():
    """Every token goes to two of four experts; the rows of the batch are shuffled, and some were dropped."""
    B, T, E = 3, 5, 4
    x, route = exact(B, T, 3), torch.rand(B, T, E).topk(2).indices
    kept, weight = torch.rand(B, T, 2) > 0.2, torch.rand(B, T, 2)
    parameters, target = {"weight": torch.randn(E, 2, 3), "bias": torch.randn(E, 2)}, torch.randn(B, T, 2)

    def outputs(p, x, route):
        return torch.einsum("tkpd,td->tkp", p["weight"][route], x) + p["bias"][route]

    def end(y, kept, weight, target):
        return torch.tanh((y * (kept * weight).unsqueeze(-1)).sum(-2) * target).sum()

    loss = lambda p, x, route, kept, weight, target: end(outputs(p, x, route), kept, weight, target)
    per_sample = vmap(grad(loss), in_dims=(None, 0, 0, 0, 0, 0))(parameters, x, route, kept, weight, target)
    y = torch.stack([outputs(parameters, x[i], route[i]) for i in range(B)]).requires_grad_(True)
    (g,) = torch.autograd.grad(end(y, kept, weight, target), y)
    order = torch.randperm(B * T * 2)
    inputs = {
        "activations": x.unsqueeze(2).expand(B, T, 2, 3).reshape(-1, 3)[order],
        "sampleIds": torch.arange(B).view(B, 1, 1).expand(B, T, 2).reshape(-1)[order],
        "expertIds": torch.where(kept, route, -1).reshape(-1)[order],
    }
    arguments = {"samples": B, "numExperts": E, "bias": True}
    return record("experts", "experts", arguments, inputs, {"gradOutputs": g.reshape(-1, 2)[order]}, per_sample)


def padding(*dims):
    mask = (torch.rand(*dims) > 0.4).long()
    mask[-1] = 0
    return mask


def convolution(name, dims, x, outs, kernel, mask=None, **options):
    module = [torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d][dims - 1]
    layer = module(x.shape[1], outs, kernel, **options)
    spread = lambda v: list(v) if isinstance(v, tuple) else [v] * dims
    arguments = {
        "kernel": spread(kernel),
        "stride": spread(options.get("stride", 1)),
        "padding": spread(options.get("padding", 0)),
        "dilation": spread(options.get("dilation", 1)),
        "groups": options.get("groups", 1),
        "bias": options.get("bias", True),
    }
    return case(name, layer, f"conv{dims}d", x, arguments, lambda v: {"input": v}, mask)


def cases():
    nn = torch.nn
    yield case("linear", nn.Linear(5, 3), "linear", exact(3, 4, 5), {"bias": True}, lambda x: {"activations": x})
    yield case("linear, one position", nn.Linear(6, 4, bias=False), "linear", exact(4, 6), {"bias": False},
               lambda x: {"activations": x})
    ids = torch.randint(0, 6, (3, 7))
    yield case("embedding", nn.Embedding(6, 3), "embedding", ids, {"numEmbeddings": 6}, lambda x: {"indices": x})
    yield case("embedding, padding", nn.Embedding(6, 3, padding_idx=2), "embedding", ids,
               {"numEmbeddings": 6, "paddingIndex": 2}, lambda x: {"indices": x})
    yield case("layer-norm", nn.LayerNorm(6), "layer-norm", exact(3, 4, 6), {"bias": True},
               lambda x: {"normalized": nn.functional.layer_norm(x, (6,))})
    yield case("rms-norm", Rms(6), "rms-norm", exact(3, 4, 6), {"bias": False},
               lambda x: {"normalized": x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)})
    yield case("group-norm", nn.GroupNorm(2, 4), "group-norm", exact(3, 4, 3, 2), {"bias": True},
               lambda x: {"normalized": nn.functional.group_norm(x, 2)})
    yield convolution("conv1d", 1, exact(2, 3, 9), 4, 3, stride=2, padding=1, dilation=2)
    yield convolution("conv2d", 2, exact(2, 3, 5, 6), 4, (3, 2), stride=(2, 1), padding=(1, 0))
    yield convolution("conv2d, groups", 2, exact(2, 4, 5, 5), 6, 3, padding=1, groups=2, dilation=(1, 2), bias=False)
    yield convolution("conv2d, depthwise", 2, exact(2, 3, 4, 4), 3, 2, groups=3)
    yield convolution("conv3d", 3, exact(2, 2, 3, 4, 4), 2, (2, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1))
    # Appended, so that the cases above keep their data.
    yield tied()
    yield lora()
    yield experts()
    yield case("linear, padded", nn.Linear(5, 3), "linear", exact(3, 4, 5), {"bias": True},
               lambda x: {"activations": x}, padding(3, 4))
    yield case("group-norm, padded", nn.GroupNorm(2, 4), "group-norm", exact(3, 4, 3, 2), {"bias": True},
               lambda x: {"normalized": nn.functional.group_norm(x, 2)}, padding(3, 3, 2))
    yield convolution("conv1d, padded", 1, exact(3, 4, 9), 6, 3, padding(3, 9), padding=2, dilation=2, groups=2)
    yield convolution("conv2d, padded", 2, exact(3, 3, 5, 5), 4, 3, padding(3, 3, 3), stride=2, padding=1)


if __name__ == "__main__":
    path = pathlib.Path(__file__).parent / "privacy" / "gradients.json"
    made = {"torch": torch.__version__.split("+")[0], "maxNorm": MAX_NORM, "cases": list(cases())}
    path.write_text(json.dumps(made, separators=(",", ":")) + "\n")
