"""Tiny models that the tests build themselves and save in the hub's layout, so that the real
loading code runs on them; and small runs of ddpo.py, with what they leave."""

import csv
import functools
import inspect
import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)
inspect.getsource = functools.cache(inspect.getsource)  # slow, and in every command line


# ---------------------------------------------------- models


TINY = {"layers_per_block": 1, "norm_num_groups": 4}
# With attention in one block alone it takes a third of the time.
TINIEST = {
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("UpBlock2D",),
}


def tiny_unet(seed=0, **config):
    torch.manual_seed(seed)
    defaults = {
        **TINY,
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DConditionModel(**{**defaults, **config})


def save_tiny_pixels(folder, kind=DDPMPipeline, scheduler=None, **config):
    """An unconditional model of 16 x 16 pixels."""
    torch.manual_seed(0)
    defaults = {
        **TINY,
        "sample_size": 16,
        "block_out_channels": (8,),
        "attention_head_dim": 4,
        "down_block_types": ("AttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
    }
    unet = UNet2DModel(**{**defaults, **config})
    kind(unet, scheduler or DDPMScheduler()).save_pretrained(folder)


def tiny_text_encoder(folder):
    """A tokenizer and a text encoder that know the letters a to z."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = folder / "vocab.json"
    vocab.write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    merges = folder / "merges.txt"
    merges.write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(vocab), str(merges), model_max_length=12)
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    text_encoder = CLIPTextModel(config)
    torch.manual_seed(2)  # anew, for how transformers draws weights depends on its version
    for weights in text_encoder.parameters():
        torch.nn.init.normal_(weights, std=0.3)
    return tokenizer, text_encoder


def save_tiny_pipeline(folder, unet=None, **scheduler):
    """A random Stable Diffusion for 16 x 16 pixels (latents 4 x 8 x 8)."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, text_encoder = tiny_text_encoder(folder)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16,
    )
    defaults = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    scheduler = DDIMScheduler(**{**defaults, **scheduler})
    parts = (vae, text_encoder, tokenizer, unet or tiny_unet(), scheduler, None, None)
    pipe = StableDiffusionPipeline(*parts, requires_safety_checker=False)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Path of a tiny random StableDiffusionPipeline folder."""
    return str(save_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "model"))


@pytest.fixture(scope="session")
def tiniest_model(tmp_path_factory):
    """Another, for tests in which the network does not matter."""
    folder = tmp_path_factory.mktemp("tiniest") / "model"
    return str(save_tiny_pipeline(folder, tiny_unet(**TINIEST)))


def brightness(images, prompts):
    return images.mean((1, 2, 3))


BRIGHTNESS = [("brightness", 1.0, brightness)]  # as rewards.load_rewards gives it


def make_policy(model, lora_scale=0.1, device="cpu", **settings):
    """Policy and settings of a small run. Its LoRA does something: B is random, not zero."""
    import ddpo

    defaults = {
        "precision": "fp32",
        "steps": 4,
        "images_per_epoch": 6,
        "updates_per_epoch": 1,
        "micro_batch": 5,
        "grad_clip": 1e9,
    }
    settings = ddpo.Settings(model=str(model), device=device, **{**defaults, **settings})
    torch.manual_seed(5)
    policy = ddpo.Policy(settings, torch.device(device))
    for name, weights in policy.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=lora_scale)
    return policy, settings


# ---------------------------------------------------- runs


def small_run(model, **settings):
    """Settings of a run that takes half a second."""
    defaults = {
        "epochs": 2,
        "steps": 2,
        "images_per_epoch": 8,
        "sample_batch": 3,
        "updates_per_epoch": 2,
        "eval_images": 3,
        "micro_batch": 4,
        "lr": 0.01,
        "device": "cpu",
        "precision": "fp32",
    }
    return {"model": str(model), **defaults, **settings}


def as_flags(settings):
    """Settings as a command line; those that are true have no value there."""
    argv = []
    for name, value in settings.items():
        argv.append("--" + name.replace("_", "-"))
        if value is not True:
            argv.append(str(value))
    return argv


def flags(model, **settings):
    """The command line of a small run."""
    return as_flags(small_run(model, **settings))


def failure(capsys, *argv):
    """The message with which `main` ends: all that it says to stderr, in one line, and a status
    that is not 0."""
    import ddpo

    with pytest.raises(SystemExit) as end:
        ddpo.main([str(part) for part in argv])
    said = capsys.readouterr().err
    if isinstance(end.value.code, str):  # which Python prints, and then exits with 1
        said += end.value.code + "\n"
    assert end.value.code not in (0, None)
    (line,) = said.splitlines()
    assert line.startswith("ddpo.py: ")
    return line


def read_metrics(run):
    return list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))


def draw(policy, prompts, generator):
    """A rollout from noise that is drawn first, as diffusers does."""
    import ddpo

    shape = (len(prompts), *policy.latent_shape)
    x_T = torch.randn(shape, generator=generator, device=policy.device)
    return ddpo.rollout(policy, prompts, x_T, generator)
