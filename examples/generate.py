"""Before and after, in plain diffusers: the same prompts from the same noise, without and with a trained LoRA.

    pip install peft        # diffusers needs it to load a LoRA
    python examples/generate.py runs/compressibility --prompts cat "a blue dog" turtle

Images are sampled as in training, with the settings in RUN/config.json. The picture goes to RUN/generated.png, the LoRA's below.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.utils import make_image_grid

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", type=Path, help="folder with config.json and pytorch_lora_weights.safetensors")
parser.add_argument("--prompts", nargs="+", default=["cat", "dog", "turtle", "shark"])
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

config = json.loads((args.run / "config.json").read_text())
bundled = Path(__file__).parent / config["model"]
device = "cuda" if torch.cuda.is_available() else "cpu"
pipe = DiffusionPipeline.from_pretrained(bundled if bundled.is_dir() else config["model"]).to(device)
pipe.scheduler = DDIMScheduler.from_config({"clip_sample": False, **pipe.scheduler.config})  # as in training


def draw():
    settings = {"num_inference_steps": config["steps"], "guidance_scale": config["guidance_scale"], "eta": config["eta"]}
    return pipe(args.prompts, generator=torch.Generator(device).manual_seed(args.seed), **settings).images


before = draw()
pipe.load_lora_weights(args.run)
after = draw()
make_image_grid(before + after, rows=2, cols=len(args.prompts)).save(args.run / "generated.png")
print(f"saved {args.run / 'generated.png'}")
