"""Tiny models that the tests build themselves and save in the hub's layout, so that the real loading code runs on them."""

import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)


def tiny_unet(seed=0, **config):
    torch.manual_seed(seed)
    defaults = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
                "cross_attention_dim": 16, "attention_head_dim": 2, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}  # fmt: skip
    return UNet2DConditionModel(**{**defaults, **config})


def save_tiny_pipeline(folder, unet=None, **scheduler):
    """A random Stable Diffusion for 16 x 16 pixels (latents 4 x 8 x 8) that knows the letters a to z."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12)
    torch.manual_seed(1)
    text = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokens), hidden_size=16, intermediate_size=32, projection_dim=16,
                                        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=12,
                                        bos_token_id=52, eos_token_id=53, pad_token_id=53))  # fmt: skip
    torch.manual_seed(2)  # how transformers draws weights depends on its version
    for weights in text.parameters():
        torch.nn.init.normal_(weights, std=0.3)
    vae = AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
                        up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16)  # fmt: skip
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
              "set_alpha_to_one": False, "steps_offset": 1}  # fmt: skip
    scheduler = DDIMScheduler(**{**config, **scheduler})
    parts = (vae, text, tokenizer, unet or tiny_unet(), scheduler, None, None)
    StableDiffusionPipeline(*parts, requires_safety_checker=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Path of a tiny random StableDiffusionPipeline folder."""
    return str(save_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "model"))


def brightness(images, prompts):
    return images.mean((1, 2, 3))


BRIGHTNESS = [("brightness", 1.0, brightness)]  # as rewards.load_rewards gives it


def make_policy(model, lora_scale=0.1, device="cpu", **settings):
    """Policy and settings of a small run, with a LoRA that does something: B is random instead of zero."""
    import ddpo

    defaults = {"steps": 4, "images_per_epoch": 6, "updates_per_epoch": 1, "micro_batch": 5, "grad_clip": 1e9}
    settings = ddpo.Settings(model=str(model), device=device, **{"precision": "fp32", **defaults, **settings})
    torch.manual_seed(5)
    policy = ddpo.Policy(settings, torch.device(device))
    for name, weights in policy.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=lora_scale)
    return policy, settings
