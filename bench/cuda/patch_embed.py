"""Tubelet embedding of video: see bench.py for what `cases` returns."""
import ctypes as C

import torch

from attention import I64, PTR
from heddle_cuda import DTYPES, Case, ptr, relative

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PatchProblem(C.Structure):  # native/attention/patch_problem.h
    _fields_ = [('video', PTR), ('type', C.c_int32), ('batch', I64), ('channels', I64), ('batch_stride', I64),
                ('channel_stride', I64), ('pixel_stride', I64 * 3), ('grid', I64 * 3), ('size', I64 * 3),
                ('step', I64 * 3), ('start', I64), ('channels_last', C.c_bool), ('scale', PTR), ('shift', PTR),
                ('indices', PTR), ('batch_offsets', PTR), ('bias', PTR), ('out', PTR), ('out_type', C.c_int32),
                ('out_rows', I64), ('out_first', I64)]


class PatchEmbedDeviceArgs(C.Structure):
    _fields_ = [('problem', PatchProblem), ('weight', PTR), ('weight_type', C.c_int32), ('columns', I64), ('k', I64),
                ('rows', I64)]


def embed(lib, name, dims, tubelet, columns, pixels, weights, last=False, keep=1.0, out_type=None):
    """dims: batch, frames, height, width; 3 channels. `last`: interleaved channels. `keep`: share of the tokens."""
    batch, frames, height, width = dims
    shape = (batch, frames, height, width, 3) if last else (batch, frames, 3, height, width)
    if pixels == torch.uint8:
        video = torch.randint(0, 256, shape, dtype=torch.uint8, device=lib.device)
    else:
        video = torch.rand(shape, device=lib.device).to(pixels)
    unit = 1 / 255 if pixels == torch.uint8 else 1.0
    scale = torch.tensor([unit / s for s in STD], device=lib.device)
    shift = torch.tensor([-m / s for m, s in zip(MEAN, STD)], device=lib.device)
    k = 3 * tubelet[0] * tubelet[1] * tubelet[2]
    weight = (torch.randn(columns, k, device=lib.device) * k**-0.5).to(weights)
    bias = torch.randn(columns, device=lib.device)
    grid = [n // s for n, s in zip((frames, height, width), tubelet)]
    tokens = grid[0] * grid[1] * grid[2]
    kept = max(1, round(tokens * keep))
    rows = batch * kept
    indices = offsets = None
    if keep < 1:
        chosen = [torch.randperm(tokens, device=lib.device)[:kept].sort()[0] for _ in range(batch)]
        indices = torch.cat(chosen).int()
        offsets = (torch.arange(batch + 1, device=lib.device) * kept).int()
    out = torch.empty(rows, columns, dtype=out_type or weights, device=lib.device)
    b, f, y, x, c = (video if last else video.permute(0, 1, 3, 4, 2)).stride()
    p = PatchProblem(video=ptr(video), type=DTYPES[pixels], batch=batch, channels=3, batch_stride=b, channel_stride=c,
                     scale=ptr(scale), shift=ptr(shift), indices=ptr(indices), batch_offsets=ptr(offsets), bias=ptr(bias),
                     out=ptr(out), out_type=DTYPES[out.dtype], out_rows=tokens)
    p.pixel_stride[:], p.grid[:] = (f, y, x), grid
    p.size[:] = p.step[:] = tubelet
    launch = lib.launcher('patch_embed', PatchEmbedDeviceArgs(p, ptr(weight), DTYPES[weights], columns, k, rows))
    launch.tensors = (video, scale, shift, weight, bias, indices, offsets, out)

    def places(some):
        """Batch entry and token of some rows."""
        if indices is None:
            return some // tokens, some % tokens
        return some // kept, indices[some].long()

    def check():
        """Up to 64 rows in float64."""
        some = torch.randint(0, rows, (min(rows, 64),), device=lib.device)
        entry, token = places(some)
        at = torch.stack([token // (grid[1] * grid[2]), token // grid[2] % grid[1], token % grid[2]], -1)
        planes = video.permute(0, 4, 1, 2, 3) if last else video.transpose(1, 2)
        cubes = torch.stack([
            planes[e, :, t * tubelet[0]:(t + 1) * tubelet[0], i * tubelet[1]:(i + 1) * tubelet[1],
                   j * tubelet[2]:(j + 1) * tubelet[2]] for e, (t, i, j) in zip(entry.tolist(), at.tolist())]).double()
        normal = cubes * scale.double()[:, None, None, None] + shift.double()[:, None, None, None]
        expected = normal.reshape(len(some), k) @ weight.double().T + bias.double()
        return relative(out[some], expected)

    kernel = weight.view(columns, 3, *tubelet)

    def peer():
        planes = (video.permute(0, 4, 1, 2, 3) if last else video.transpose(1, 2)).to(weights)
        normal = planes * scale.to(weights)[:, None, None, None] + shift.to(weights)[:, None, None, None]
        y = torch.nn.functional.conv3d(normal, kernel, bias.to(weights), stride=tubelet).flatten(2).transpose(1, 2)
        if indices is None:
            return y.contiguous()
        entry, token = places(torch.arange(rows, device=lib.device))
        return y[entry, token]

    title = f'{name} B={batch} {frames}x{height}x{width} {str(pixels)[6:]} {"THWC" if last else "TCHW"}, {str(weights)[6:]}'
    if keep < 1:
        title += f', {keep:.0%} kept'
    traffic = rows * k * video.element_size() + weight.numel() * weight.element_size() + out.numel() * out.element_size()
    exact = weights == torch.float32
    return Case('patch_embed', title, launch, check, 5e-6 if exact else 5e-3, traffic, 2 * rows * k * columns,
                'f32' if exact else 'bf16', peer, 'torch normalise, conv3d')


def cases(lib, small):
    byte, half, full = torch.uint8, torch.bfloat16, torch.float32
    if small:
        for pixels, weights in ((byte, full), (byte, half), (half, torch.float16), (full, half)):
            for last in (False, True):
                yield embed(lib, 'small', (2, 4, 17, 26), (2, 8, 8), 40, pixels, weights, last)
        yield embed(lib, 'odd', (1, 4, 13, 19), (2, 3, 5), 33, full, full)
        yield embed(lib, 'odd', (1, 4, 13, 19), (2, 3, 5), 33, byte, half, last=True)
        yield embed(lib, 'many', (2, 4, 32, 64), (1, 4, 8), 130, byte, half)
        yield embed(lib, 'masked', (3, 4, 32, 32), (2, 8, 8), 130, byte, half, keep=0.25)
        return
    clip, sides = (32, 224, 224), (2, 16, 16)
    for pixels, last in ((byte, True), (byte, False), (half, False), (full, False)):
        yield embed(lib, 'ViViT-B', (1, *clip), sides, 768, pixels, half, last)
    for batch in (8, 32):
        yield embed(lib, 'ViViT-B', (batch, *clip), sides, 768, byte, half, last=True)
    yield embed(lib, 'ViViT-B', (8, *clip), sides, 768, byte, half, last=True, keep=0.1)
    yield embed(lib, 'ViViT-B', (1, *clip), sides, 768, full, full)
    yield embed(lib, 'TimeSformer-B', (8, 8, 224, 224), (1, 16, 16), 768, byte, half, last=True)
