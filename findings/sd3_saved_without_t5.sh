#!/usr/bin/env bash
# Guess: a pipeline that save_pretrained has written opens by from_pretrained with its folder alone. A Stable
# Diffusion 3 may do without its third text encoder, the T5: it is None when the pipeline is made, and
# model_index.json says so ("text_encoder_3": [null, null]).
#
# What happens (diffusers 0.42.1, transformers 5.24.0, torch 2.13.0): from_pretrained raises a ValueError
# that names all parts and asks for text_encoder_3 and tokenizer_3, until they are passed as None again.
#
# Seen:
#   saved: text_encoder_3 [None, None], tokenizer_3 [None, None]
#   from_pretrained(folder): ValueError
#   with text_encoder_3=None, tokenizer_3=None: StableDiffusion3Pipeline
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 transformers==5.24.0
FOLDER="$folder" "$folder/venv/bin/python" - <<'PY'
import json
import os
from pathlib import Path

import diffusers
import transformers

folder = Path(os.environ["FOLDER"])
config = transformers.CLIPTextConfig(
    vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    projection_dim=16, max_position_embeddings=16)
vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}
(folder / "vocab.json").write_text(json.dumps(vocabulary))
(folder / "merges.txt").write_text("#version: 0.2\n")
tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
transformer = diffusers.SD3Transformer2DModel(
    sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
    num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16,
    pooled_projection_dim=32, pos_embed_max_size=8)
vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, latent_channels=4)
encoders = [transformers.CLIPTextModelWithProjection(config) for _ in range(2)]
pipe = diffusers.StableDiffusion3Pipeline(
    transformer, diffusers.FlowMatchEulerDiscreteScheduler(), vae, encoders[0], tokenizer, encoders[1],
    tokenizer, None, None)
pipe.save_pretrained(folder / "sd3")
index = json.loads((folder / "sd3/model_index.json").read_text())
third = ("text_encoder_3", "tokenizer_3")
print("saved:", ", ".join(f"{name} {index[name]}" for name in third))
try:
    diffusers.StableDiffusion3Pipeline.from_pretrained(folder / "sd3")
    opened = "opens"
except ValueError as error:
    opened = "ValueError"
    assert "text_encoder_3" in str(error)
print("from_pretrained(folder):", opened)
again = diffusers.StableDiffusion3Pipeline.from_pretrained(folder / "sd3", **dict.fromkeys(third))
print("with text_encoder_3=None, tokenizer_3=None:", type(again).__name__)
assert index["text_encoder_3"] == [None, None] and opened == "ValueError"
PY
