"""PyTorch side of `heddle bench --peers`: one JSON request per line on stdin, one JSON reply per line on stdout.

Request: {"op": name, ...parameters, "threads": n, "seconds": s}. Reply: {"times": [seconds per call, ...]} with one
sample per batch of calls of at least a millisecond, or {"error": text}. With "seconds": 0 the op is only prepared
and run once. An op is a function that takes its parameters and returns the call to be timed; prepared ops are kept,
so that rounds can be interleaved with heddle's.

The code of each op is what transformers runs in eager mode (named beside it), without autograd.
"""

import functools
import itertools
import json
import sys
import time

import torch

OPS = {}
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def op(function):
    OPS[function.__name__] = function
    return function


def normals(*dims, type="float32", scale=1.0):
    return (torch.randn(*dims, generator=torch.Generator().manual_seed(1)) * scale).to(TYPES[type])


@op
def route_softmax_topk(tokens, experts, k, normalize, type="float32"):
    """MixtralTopKRouter, Qwen3MoeTopKRouter, OlmoeTopKRouter."""
    logits = normals(tokens, experts, type=type, scale=2)

    def call():
        probabilities = torch.nn.functional.softmax(logits, dim=-1, dtype=torch.float)
        weights, ids = torch.topk(probabilities, k, dim=-1)
        if normalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights, ids

    return call


@op
def route_topk_softmax(tokens, experts, k, type="float32"):
    """GptOssTopKRouter."""
    logits = normals(tokens, experts, type=type, scale=2)

    def call():
        top, ids = torch.topk(logits, k, dim=-1)
        return torch.nn.functional.softmax(top, dim=1, dtype=top.dtype), ids

    return call


@op
def route_grouped(tokens, experts, k, groups, keep, scale, type="float32"):
    """DeepseekV3MoE.route_tokens_to_experts."""
    logits = normals(tokens, experts, type=type, scale=2)
    bias = normals(experts, scale=0.1)

    def call():
        scores = logits.float().sigmoid()
        choice = scores + bias
        group_scores = choice.view(-1, groups, experts // groups).topk(2, dim=-1)[0].sum(dim=-1)
        group_ids = torch.topk(group_scores, k=keep, dim=-1, sorted=False)[1]
        group_mask = torch.zeros_like(group_scores)
        group_mask.scatter_(1, group_ids, 1)
        mask = group_mask.unsqueeze(-1).expand(-1, groups, experts // groups).reshape(-1, experts)
        choice = choice.masked_fill(~mask.bool(), 0.0)
        ids = torch.topk(choice, k=k, dim=-1, sorted=False)[1]
        weights = scores.gather(1, ids)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * scale, ids

    return call


@op
def decode_attention(batch, keys, heads, key_heads, dim, type="float32"):
    """sdpa_attention_forward for one new token, on a contiguous cache [batch, key heads, keys, dim]."""
    k = normals(1, key_heads, 2048, dim, type=type).repeat(batch, 1, keys // 2048, 1)
    v = normals(1, key_heads, 2048, dim, type=type).repeat(batch, 1, keys // 2048, 1)
    q = normals(batch, heads, 1, dim, type=type)

    @torch.no_grad()
    def call():
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=heads != key_heads)

    return call


@functools.lru_cache(maxsize=1)
def expert_weights(experts, hidden, intermediate, dtype):
    """Those of the last layer asked for: filling gigabytes takes longer than timing them."""
    gate_up = torch.empty(experts, 2 * intermediate, hidden, dtype=dtype).uniform_(-0.03, 0.03)
    down = torch.empty(experts, hidden, intermediate, dtype=dtype).uniform_(-0.03, 0.03)
    return gate_up, down


@op
def experts_loop(tokens, experts, k, hidden, intermediate, type="float32"):
    """MixtralExperts, Qwen3MoeExperts in eager mode: a loop over the experts that were hit."""
    dtype = TYPES[type]
    gate_up, down = expert_weights(experts, hidden, intermediate, dtype)
    x = normals(tokens, hidden, type=type)
    # Several routings in turn: few tokens touch few experts, which would otherwise stay in the last-level cache.
    routings = []
    for _ in range(8 if tokens <= 64 else 1):
        weights, ids = torch.topk(torch.rand(tokens, experts), k, dim=-1)
        routings.append(((weights / weights.sum(-1, keepdim=True)).to(dtype), ids))
    turn = itertools.count()

    @torch.no_grad()
    def call():
        weights, ids = routings[next(turn) % len(routings)]
        out = torch.zeros_like(x)
        mask = torch.nn.functional.one_hot(ids, num_classes=experts).permute(2, 1, 0)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for e in hit:
            e = e[0]
            position, token = torch.where(mask[e])
            gate, up = torch.nn.functional.linear(x[token], gate_up[e]).chunk(2, dim=-1)
            y = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, down[e])
            out.index_add_(0, token, (y * weights[token, position, None]).to(out.dtype))
        return out

    return call


@op
def video_encoder(model, frames, type="float32"):
    """VivitModel and TimesformerModel of base size with one layer, eval, scaled_dot_product_attention where they have it."""
    import transformers

    if model == "vivit":
        config = transformers.VivitConfig(num_frames=frames, num_hidden_layers=1)
        module = transformers.VivitModel(config, add_pooling_layer=False)
    else:
        config = transformers.TimesformerConfig(num_frames=frames, num_hidden_layers=1)
        module = transformers.TimesformerModel(config)
    module = module.eval().to(TYPES[type])
    pixels = normals(1, frames, 3, 224, 224, type=type)
    return lambda: module(pixels).last_hidden_state


@op
def ghost_norm(samples, positions, inputs, outputs):
    """Opacus' compute_linear_norm_sample: two Gram matrices of T x T by einsum, their product, summed."""
    a, g = normals(samples, positions, inputs), normals(samples, positions, outputs)

    def call():
        gg = torch.einsum("bti,bsi->bts", g, g)
        aa = torch.einsum("bti,bsi->bts", a, a)
        return (gg * aa).sum(dim=(1, 2))

    return call


def per_sample(samples, positions, inputs, outputs):
    """The gradient of every sample at once, [B, p, d], by vmap, and its squared norm."""
    a, g = normals(samples, positions, inputs), normals(samples, positions, outputs)
    gradients = torch.vmap(lambda x, y: y.T @ x)

    def call():
        w = gradients(a, g)
        return w, w.flatten(1).pow(2).sum(1)

    return call


@op
def vmap_norm(samples, positions, inputs, outputs):
    call = per_sample(samples, positions, inputs, outputs)
    return lambda: call()[1]


def pairs(widths):
    sizes = [int(n) for n in widths.split(",")]
    return list(zip(sizes[::2], sizes[1::2]))


@op
def vmap_clipped_sum(samples, positions, widths):
    """A private step of linear layers (inputs, outputs, inputs, ...) by per-sample gradients: clipped, summed, noised."""
    layers = [per_sample(samples, positions, d, p) for d, p in pairs(widths)]

    def call():
        gradients, squared = zip(*(layer() for layer in layers))
        factors = (1 / (sum(squared).sqrt() + 1e-6)).clamp(max=1.0)
        return [torch.einsum("b,bpd->pd", factors, w).add_(torch.randn(w.shape[1:])) for w in gradients]

    return call


@op
def weight_gradients(samples, positions, widths):
    """The plain gradients of linear layers, without clipping or noise: what a private step is compared with."""
    layers = [(normals(samples * positions, d), normals(samples * positions, p)) for d, p in pairs(widths)]
    return lambda: [g.T @ a for a, g in layers]


@op
def embedding_norm(samples, positions, width, rows):
    """The gradient of the table, one sample after the other, by index_add."""
    g = normals(samples, positions, width)
    ids = torch.randint(0, rows, (samples, positions), generator=torch.Generator().manual_seed(2))

    def call():
        return torch.stack([torch.zeros(rows, width).index_add_(0, ids[i], g[i]).pow(2).sum() for i in range(samples)])

    return call


@op
def randn(count):
    return lambda: torch.randn(count)



@op
def attention(batch, queries, keys, heads, key_heads, dim, causal=False, window=0, layout="sequence", backward=False,
              type="float32"):
    """scaled_dot_product_attention on [batch, sequence, heads, dim]; `window` as a dense mask, for it has no other.

    layout "frames": q, k, v are [batch / patches, frames, patches, heads, dim] and attend over the frames, by views.
    """

    def tensor(length, n):
        x = normals(batch, length, n, dim, type=type)
        if layout == "frames":  # sequences of a batch lie beside each other
            x = normals(length, batch, n, dim, type=type).transpose(0, 1)
        return x.transpose(1, 2).requires_grad_(backward)

    with torch.inference_mode(False):
        q, k, v = tensor(queries, heads), tensor(keys, key_heads), tensor(keys, key_heads)
    mask = None
    if window:
        i, j = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)[None, :]
        mask = (j <= i) & (j >= i - window)
    options = {"attn_mask": mask, "is_causal": causal and not window, "enable_gqa": heads != key_heads}
    sdpa = torch.nn.functional.scaled_dot_product_attention
    if not backward:
        return lambda: sdpa(q, k, v, **options)
    with torch.inference_mode(False), torch.enable_grad():
        out = sdpa(q, k, v, **options)
        g = torch.randn_like(out)

    def call():
        with torch.inference_mode(False):
            return torch.autograd.grad(out, (q, k, v), g, retain_graph=True)

    return call


def sample(call, seconds):
    times, batch = [], 1
    end = time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        for _ in range(batch):
            call()
        elapsed = time.perf_counter() - start
        if elapsed < 1e-3:
            batch *= 2
        else:
            times.append(elapsed / batch)
        if time.perf_counter() >= end and times:
            return times


def main():
    prepared = {}
    print(json.dumps({"ready": torch.__version__}), flush=True)
    for line in sys.stdin:
        try:
            request = json.loads(line)
            torch.set_num_threads(request.pop("threads"))
            seconds = request.pop("seconds")
            key = json.dumps(request, sort_keys=True)
            if key not in prepared:
                name = request.pop("op")
                if name not in OPS:
                    raise ValueError(f"pytorch.py has no op '{name}'; it has: {', '.join(OPS)}")
                prepared.clear()  # one op at a time: the weights of a layer may take gigabytes
                prepared[key] = OPS[name](**request)
            with torch.inference_mode():
                if seconds > 0:
                    reply = {"times": sample(prepared[key], seconds)}
                else:
                    prepared[key]()
                    reply = {"times": []}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
