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


def case(name, layer, kind, x, arguments, what):
    """`what` maps the layer's input to the tensor the library takes. x is rounded to float32 first: it is exact."""
    target = None

    def loss(parameters, xi, ti):
        y = functional_call(layer, parameters, (xi.unsqueeze(0),)).squeeze(0)
        return torch.tanh(y * ti).sum()

    parameters = {k: p.detach() for k, p in layer.named_parameters()}
    y = layer(x)
    target = torch.randn(y.shape)
    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, target)
    out = y.detach().requires_grad_(True)
    (g,) = torch.autograd.grad(torch.tanh(out * target).sum(), out)
    squared = sum(p.flatten(1).pow(2).sum(1) for p in per_sample.values())
    factors = torch.clamp(MAX_NORM / (squared.sqrt() + 1e-6), max=1.0)
    clipped = {k: torch.einsum("b,b...->...", factors, p) for k, p in per_sample.items()}
    return {
        "name": name,
        "kind": kind,
        "arguments": arguments,
        "inputs": {k: tensor(v) for k, v in what(x).items()},
        "gradOutputs": tensor(g),
        "squaredNorms": tensor(squared),
        "factors": tensor(factors),
        "gradients": {k: tensor(v) for k, v in clipped.items()},
    }


def exact(*dims):
    return torch.randn(*dims).float().double()


def convolution(name, dims, x, outs, kernel, **options):
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
    return case(name, layer, f"conv{dims}d", x, arguments, lambda v: {"input": v})


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


if __name__ == "__main__":
    path = pathlib.Path(__file__).parent / "privacy" / "gradients.json"
    made = {"torch": torch.__version__.split("+")[0], "maxNorm": MAX_NORM, "cases": list(cases())}
    path.write_text(json.dumps(made, separators=(",", ":")) + "\n")
