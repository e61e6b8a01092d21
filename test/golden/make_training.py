"""Training blocks and optimisers by PyTorch in float64: writes training/{blocks,optimizers,masked}.json.

Each block: parameters, input, the gradient of its output, and what torch.autograd makes of them: output, gradient of the
input, gradients of the parameters summed over the batch. Optimisers: a few steps of torch.optim on given gradients, and
LAMB (You et al. 2019) written out. Padded batches: each sample by itself, without its padding.

    python test/golden/make_training.py
"""

import json
import pathlib

import torch
from torch import nn

torch.manual_seed(11)
torch.set_default_dtype(torch.float64)
FOLDER = pathlib.Path(__file__).parent / "training"


def numbers(t):
    return {"dims": list(t.shape), "data": [float(f"{v:.9g}") for v in t.detach().flatten().tolist()]}


class Position(nn.Module):
    def __init__(self, length, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(length, dim))

    def forward(self, x):
        return x + self.weight[: x.shape[1]]


class SelfAttention(nn.Module):
    def __init__(self, dim, heads, causal):
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(dim, dim) for _ in range(4))
        self.heads, self.causal = heads, causal

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.output(y.transpose(1, 2).flatten(2))


class Residual(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return x + self.block(x)


def block(name, module, x):
    for p in module.parameters():
        p.data = (p.data + 0.1 * torch.randn_like(p)).float().double()
    integers = not x.is_floating_point()
    x = x if integers else x.float().double().requires_grad_(True)
    y = module(x)
    g = torch.randn_like(y).float().double()
    y.backward(g)
    return {
        "name": name,
        "parameters": {k.replace("block.", ""): numbers(p) for k, p in module.named_parameters()},
        "x": {"type": "int32" if integers else "float32", **numbers(x)},
        "output": numbers(y),
        "gradOutput": numbers(g),
        "gradX": None if integers else numbers(x.grad),
        "gradients": {k.replace("block.", ""): numbers(p.grad) for k, p in module.named_parameters()},
    }


def blocks():
    transformer = nn.Sequential(
        nn.Embedding(9, 8),
        Position(6, 8),
        Residual(nn.Sequential(nn.LayerNorm(8), SelfAttention(8, 2, True))),
        Residual(nn.Sequential(nn.RMSNorm(8, eps=1e-6), nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))),
        nn.Linear(8, 9, bias=False),
    )
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1),
        nn.GroupNorm(2, 4),
        nn.Tanh(),
        nn.MaxPool2d(2, stride=1),
        nn.Conv2d(4, 6, 2, groups=2),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(6, 3),
    )
    cases = [
        block("linear", nn.Linear(5, 7), torch.randn(3, 4, 5)),
        block("embedding", nn.Embedding(6, 3), torch.tensor([[1, 5, 1], [0, 2, 2]])),
        block("position", Position(5, 3), torch.randn(2, 4, 3)),
        block("layer-norm", nn.LayerNorm(9), torch.randn(3, 2, 9)),
        block("rms-norm", nn.RMSNorm(9, eps=1e-6), torch.randn(3, 9)),
        block("group-norm", nn.GroupNorm(3, 6), torch.randn(2, 6, 3, 5)),
        block("conv1d", nn.Conv1d(3, 4, 3, stride=2, padding=2, dilation=2), torch.randn(2, 3, 11)),
        block("conv2d", nn.Conv2d(4, 6, (2, 3), stride=(1, 2), padding=(0, 1), groups=2), torch.randn(2, 4, 5, 6)),
        block("conv3d", nn.Conv3d(2, 3, 2, padding=1, bias=False), torch.randn(2, 2, 3, 3, 3)),
        block("relu", nn.ReLU(), torch.randn(3, 7)),
        block("tanh", nn.Tanh(), 2 * torch.randn(3, 7)),
        block("gelu", nn.GELU(), 2 * torch.randn(3, 7)),
        block("gelu-tanh", nn.GELU("tanh"), 2 * torch.randn(3, 7)),
        block("max-pool", nn.MaxPool2d(3, stride=2, padding=1), torch.randn(2, 2, 6, 7)),
        block("avg-pool", nn.AvgPool2d((2, 3), stride=2, padding=(1, 1)), torch.randn(2, 2, 6, 7)),
        block("attention", SelfAttention(6, 2, False), torch.randn(2, 4, 6)),
        block("attention, causal", SelfAttention(6, 3, True), torch.randn(2, 5, 6)),
        block("network", network, torch.randn(2, 1, 9, 9)),
        block("transformer", transformer, torch.randint(0, 9, (2, 5))),
    ]
    for c in cases:
        c["parameters"] = {k: v for k, v in c["parameters"].items()}
    logits = (3 * torch.randn(4, 3, 5)).float().double().requires_grad_(True)
    labels = torch.randint(0, 5, (4, 3))
    labels[0, 1] = labels[2, 2] = -1
    losses = torch.stack(
        [nn.functional.cross_entropy(x, y, ignore_index=-1) for x, y in zip(logits, labels)]
    )
    losses.sum().backward()
    entropy = {
        "logits": numbers(logits),
        "labels": numbers(labels),
        "losses": numbers(losses),
        "gradient": numbers(logits.grad),
    }
    return {"blocks": cases, "crossEntropy": entropy}


def lamb(p, grads, lr, b1, b2, eps, decay):
    m = v = torch.zeros_like(p)
    out = []
    for t, g in enumerate(grads, 1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        r = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps) + decay * p
        p = p - lr * p.norm() / r.norm() * r
        out.append(p)
    return out


def optimizers():
    p = torch.randn(4, 5).float().double()
    grads = [torch.randn(4, 5).float().double() for _ in range(4)]
    runs = []

    def run(options, make):
        q = nn.Parameter(p.clone())
        optimizer = make([q])
        steps = []
        for g in grads:
            q.grad = g.clone()
            optimizer.step()
            steps.append(numbers(q))
        runs.append({"options": options, "steps": steps})

    run({"type": "sgd", "learningRate": 0.1}, lambda q: torch.optim.SGD(q, 0.1))
    run(
        {"type": "sgd", "learningRate": 0.1, "momentum": 0.9, "weightDecay": 0.05},
        lambda q: torch.optim.SGD(q, 0.1, momentum=0.9, weight_decay=0.05),
    )
    run(
        {"type": "sgd", "learningRate": 0.1, "momentum": 0.9, "nesterov": True},
        lambda q: torch.optim.SGD(q, 0.1, momentum=0.9, nesterov=True),
    )
    run({"type": "adamw", "learningRate": 0.02}, lambda q: torch.optim.AdamW(q, 0.02))
    run(
        {"type": "adamw", "learningRate": 0.02, "beta1": 0.8, "beta2": 0.9, "epsilon": 1e-3, "weightDecay": 0.3},
        lambda q: torch.optim.AdamW(q, 0.02, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.3),
    )
    options = {"type": "lamb", "learningRate": 0.02, "beta1": 0.8, "beta2": 0.9, "epsilon": 1e-6, "weightDecay": 0.3}
    runs.append({"options": options, "steps": [numbers(q) for q in lamb(p, grads, 0.02, 0.8, 0.9, 1e-6, 0.3)]})
    return {"parameter": numbers(p), "gradients": [numbers(g) for g in grads], "runs": runs}


class MeanTokens(nn.Module):
    def forward(self, x):
        return x.mean(1)


def transformer(causal, *head):
    model = nn.Sequential(
        nn.Embedding(9, 8),
        Position(7, 8),
        Residual(nn.Sequential(nn.LayerNorm(8), SelfAttention(8, 2, causal))),
        Residual(nn.Sequential(nn.RMSNorm(8, eps=1e-6), nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))),
        *head,
    )
    for p in model.parameters():
        p.data = (p.data + 0.1 * torch.randn_like(p)).float().double()
    return model


def masked():
    """Padded batches. A sample's loss and gradient are those of its tokens alone: each is computed without padding."""
    torch.manual_seed(12)
    mask = torch.tensor(
        [
            [1, 1, 1, 1, 1, 1, 1],
            [1, 1, 1, 1, 0, 0, 0],
            [0, 0, 0, 0, 1, 1, 1],
            [0, 1, 1, 0, 1, 0, 1],
            [0, 0, 1, 0, 0, 0, 0],
        ]
    )
    models = {
        "language model": (transformer(True, nn.Linear(8, 9, bias=False)), torch.randint(0, 9, (5, 7))),
        "classifier": (transformer(False, MeanTokens(), nn.Linear(8, 3)), torch.randint(0, 3, (5,))),
    }
    cases = []
    for name, (model, labels) in models.items():
        ids = torch.randint(0, 9, (5, 7))
        losses, norms = [], []
        total = [torch.zeros_like(p) for p in model.parameters()]
        for i in range(5):
            tokens = mask[i].bool()
            y = model(ids[i][tokens][None])[0]
            loss = nn.functional.cross_entropy(y, labels[i][tokens] if labels.dim() == 2 else labels[i])
            gradients = torch.autograd.grad(loss, model.parameters())
            losses.append(loss)
            norms.append(sum(g.square().sum() for g in gradients))
            total = [t + g for t, g in zip(total, gradients)]
        names = [k.replace("block.", "") for k, _ in model.named_parameters()]
        cases.append(
            {
                "name": name,
                "parameters": dict(zip(names, map(numbers, model.parameters()))),
                "ids": numbers(ids),
                "mask": numbers(mask),
                "labels": numbers(labels),
                "losses": numbers(torch.stack(losses)),
                "squaredNorms": numbers(torch.stack(norms)),
                "gradients": dict(zip(names, map(numbers, total))),
            }
        )
    return cases


FOLDER.mkdir(exist_ok=True)
for name, content in (("blocks", blocks()), ("optimizers", optimizers()), ("masked", masked())):
    (FOLDER / f"{name}.json").write_text(json.dumps(content, separators=(",", ":")) + "\n")
