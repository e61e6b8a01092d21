#!/usr/bin/env python3
"""Writes the golden video encoders in test/golden/video/.

Each directory holds a tiny random checkpoint of one architecture, as it would lie on the hub (config.json and
model.safetensors written by transformers' own save_pretrained), and io.safetensors: what transformers' model answers
to random frames.

Made with: Python 3.11, torch 2.13.0 (CPU), transformers 5.17.0, safetensors 0.8.0, numpy 2.4.6. To set up and run:

    python3 -m venv venv && venv/bin/pip install torch==2.13.0 transformers==5.17.0
    venv/bin/python test/golden/make_video_encoder.py            # writes the files
    venv/bin/python test/golden/make_video_encoder.py --check    # regenerates and compares; writes nothing
    venv/bin/python test/golden/make_video_encoder.py --only vivit

Random numbers come from numpy's PCG64. Weights and frames are float32 numbers that bfloat16 holds too, so that a bf16
encoder has no rounding of weights. --check wants weights and frames bit for bit and results to 1e-12, relative to the
largest magnitude, because matrix products may differ in the last bits between machines.

io.safetensors:
    frames   [B, T, channels, height, width]  float32
    hidden   last_hidden_state                float64, the model made float64
    pooled   pooler_output                    float64, where the model has one
    other_frames, other_hidden                the same of frames of another size, where the model resizes its tables
"""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import directories
import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()

HERE = Path(__file__).resolve().parent / "video"

TIMESFORMER = dict(
    model=transformers.TimesformerModel,
    config=transformers.TimesformerConfig,
    # 3 x 3 patches; the last 3 pixels of 21 are left out
    arguments=dict(image_size=21, patch_size=6, num_channels=3, num_frames=5, hidden_size=36, intermediate_size=52,
                   num_attention_heads=3, num_hidden_layers=2),
    frames=(2, 5, 3, 21, 21),
)

ARCHITECTURES = {
    "timesformer_divided": dict(TIMESFORMER, seed=1, more=dict(attention_type="divided_space_time")),
    # Also frames of another size and number, for which transformers resizes the position tables (nearest).
    "timesformer_joint": dict(
        TIMESFORMER, seed=2, more=dict(attention_type="joint_space_time"), other=(1, 7, 3, 13, 26)
    ),
    "timesformer_space": dict(TIMESFORMER, seed=3, more=dict(attention_type="space_only", qkv_bias=False)),
    "vivit": dict(
        model=transformers.VivitModel,
        config=transformers.VivitConfig,
        # 3 x 3 x 5 tubelets; the last of 7 frames and the last pixels of both axes are left out
        arguments=dict(image_size=[20, 26], num_frames=7, tubelet_size=[2, 6, 5], num_channels=3, hidden_size=36,
                       intermediate_size=52, num_attention_heads=3, num_hidden_layers=2, pooler_output_size=10),
        frames=(2, 7, 3, 20, 26),
        seed=4,
    ),
    "videoprism": dict(
        model=transformers.VideoPrismVisionModel,
        config=transformers.VideoPrismVisionConfig,
        # 3 x 3 patches; logits large enough that the cap at 5 is felt
        arguments=dict(image_size=20, num_frames=7, tubelet_size=[1, 6, 6], num_channels=3, hidden_size=36,
                       intermediate_size=52, num_attention_heads=3, num_spatial_layers=2, num_temporal_layers=1,
                       num_auxiliary_layers=1, attn_logit_softcapping=5.0),
        frames=(2, 7, 3, 20, 20),
        seed=5,
    ),
    "vjepa2": dict(
        model=transformers.VJEPA2Model,
        config=transformers.VJEPA2Config,
        # heads of 14: 4 + 4 + 4 rotated, 2 left as they are
        arguments=dict(crop_size=19, patch_size=6, frames_per_clip=6, tubelet_size=2, in_chans=3, hidden_size=42,
                       num_attention_heads=3, num_hidden_layers=2, mlp_ratio=1.5, pred_hidden_size=12,
                       pred_num_attention_heads=2, pred_num_hidden_layers=1, pred_num_mask_tokens=1,
                       pred_mlp_ratio=1.0),
        # 5 tubelets in time where the clips of the config have 3: positions extrapolate
        frames=(2, 10, 3, 19, 19),
        seed=6,
        call=dict(skip_predictor=True),
    ),
}


class Float64(TorchFunctionMode):
    """Runs float32 code in float64: transformers' softmax asks for float32 by name even in a double model."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def swap(value):
            return torch.float64 if value is torch.float32 else value

        return func(*[swap(a) for a in args], **{k: swap(v) for k, v in (kwargs or {}).items()})


def rounded(array):
    """float32 numbers that bfloat16 holds."""
    return torch.from_numpy(array).to(torch.bfloat16).float()


def initialise(model, rng):
    """Weights of unit gain and more, so that every part moves the output."""
    with torch.no_grad():
        for name, tensor in sorted(model.named_parameters()):
            shape = tuple(tensor.shape)
            if "norm" in name:
                # VideoPrism's scale is 1 + weight.
                offset = model.config.model_type.startswith("videoprism")
                centre = 1.0 if name.endswith("weight") and not offset else 0.0
                values = centre + 0.3 * rng.standard_normal(shape)
            elif len(shape) >= 2 and name.endswith("weight"):
                values = rng.standard_normal(shape) * 1.5 / np.prod(shape[1:]) ** 0.5
            else:
                values = rng.standard_normal(shape) * 0.5
            tensor.copy_(rounded(values))


def make(name, spec, directory):
    rng = np.random.default_rng(spec["seed"])
    config = spec["config"](**spec["arguments"], **spec.get("more", {}))
    model = spec["model"]._from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    initialise(model, rng)
    frames = rounded(rng.standard_normal(spec["frames"]))
    directory.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        output32 = model(frames, **spec.get("call", {})).last_hidden_state
        model.save_pretrained(directory)
        again = spec["model"].from_pretrained(directory).state_dict()
        for key, value in model.state_dict().items():
            assert torch.equal(value, again[key]), f"{name}: {key} did not survive the round trip"
        model.double()
        with Float64():
            output = model(frames.double(), **spec.get("call", {}))
    hidden = output.last_hidden_state
    error = float((output32 - hidden).norm() / hidden.norm())
    assert hidden.dtype == torch.float64 and error < 2e-5, f"{name}: float32 and float64 differ by {error}"
    io = {"frames": frames, "hidden": hidden}
    if getattr(output, "pooler_output", None) is not None:
        io["pooled"] = output.pooler_output
    if "other" in spec:
        io["other_frames"] = rounded(rng.standard_normal(spec["other"]))
        with torch.no_grad(), Float64():
            io["other_hidden"] = model(io["other_frames"].double()).last_hidden_state
    save_file({key: value.contiguous() for key, value in io.items()}, directory / "io.safetensors")
    sizes = ", ".join(f"{f.name} {f.stat().st_size // 1024} KiB" for f in sorted(directory.iterdir()))
    print(f"{name}: hidden {list(hidden.shape)}, rms {float(hidden.square().mean().sqrt()):.2f}, "
          f"float32 error {error:.1e}; {sizes}")


def bound(key, tensor):
    """Results are the float64 tensors; all else is the same bit for bit."""
    return 1e-12 if tensor.dtype == torch.float64 else None


if __name__ == "__main__":
    directories.main(__doc__, ARCHITECTURES, HERE, make, bound)
