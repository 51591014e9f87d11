#!/usr/bin/env bash
# Guess: load_lora_weights either loads a LoRA or raises. A state dict of the UNet's layers alone, as
# AttnProcsLayers.state_dict() was saved by training scripts of 2023 (ddpo-pytorch's among them), names no
# "unet." before them.
#
# What happens (diffusers 0.42.1, peft 0.21.2, torch 2.13.0, transformers 5.24.0): nothing of it is loaded,
# the pictures stay those of the pretrained model to the last bit, and all that is said is a warning in the
# log. With "unet." before each name the same weights are loaded.
#
# Seen:
#   as saved: pictures changed: False
#   with unet.: pictures changed: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 transformers==5.24.0 peft==0.21.2
FOLDER="$folder" "$folder/venv/bin/python" - <<'PY'
import json
import os
from pathlib import Path

import diffusers
import torch
import transformers

folder = Path(os.environ["FOLDER"])
vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}
(folder / "vocab.json").write_text(json.dumps(vocabulary))
(folder / "merges.txt").write_text("#version: 0.2\n")
tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
config = transformers.CLIPTextConfig(
    vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=16)
torch.manual_seed(0)


def pipeline():
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=2, layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=16, attention_head_dim=2)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=2)
    pipe = diffusers.StableDiffusionPipeline(
        vae, transformers.CLIPTextModel(config), tokenizer, unet, diffusers.DDIMScheduler(), None, None,
        requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe):
    how = {"num_inference_steps": 2, "output_type": "latent"}
    return pipe("a", generator=torch.Generator().manual_seed(0), **how).images


pipe = pipeline()
layers = {}
for name, layer in pipe.unet.named_modules():
    if name.endswith(("attn1.to_q", "attn1.to_v", "attn2.to_q", "attn2.to_v")):
        attention, _, projection = name.rpartition(".")
        layers[f"{attention}.processor.{projection}_lora.down.weight"] = torch.randn(4, layer.in_features)
        layers[f"{attention}.processor.{projection}_lora.up.weight"] = torch.randn(layer.out_features, 4)
before = latents(pipe)
changed = {}
for how, prefix in (("as saved", ""), ("with unet.", "unet.")):
    pipe = pipeline()
    pipe.load_lora_weights({prefix + name: weights for name, weights in layers.items()})
    changed[how] = not torch.equal(latents(pipe), before)
    print(f"{how}: pictures changed: {changed[how]}")
assert changed == {"as saved": False, "with unet.": True}
PY
