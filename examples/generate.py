"""Before and after, in plain diffusers: the same prompts from the same noise, without and with a trained LoRA.

    pip install peft        # diffusers needs it to load a LoRA
    python examples/generate.py runs/compressibility --prompts cat "a blue dog" turtle

MODEL is the pipeline that the run started from; the picture goes to RUN/generated.png, the LoRA's images below.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.utils import make_image_grid

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", type=Path, help="folder with pytorch_lora_weights.safetensors")
parser.add_argument("--model", default=str(Path(__file__).parent / "emoji-diffusion"))
parser.add_argument("--prompts", nargs="+", default=["cat", "dog", "turtle", "shark"])
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--guidance", type=float, default=3.0)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
pipe = DiffusionPipeline.from_pretrained(args.model).to(device)
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)  # what DDPO trained with; eta=1 is its noise


def draw():
    noise = torch.Generator(device).manual_seed(args.seed)
    return pipe(args.prompts, num_inference_steps=args.steps, guidance_scale=args.guidance, eta=1.0, generator=noise).images


before = draw()
pipe.load_lora_weights(args.run)
after = draw()
make_image_grid(before + after, rows=2, cols=len(args.prompts)).save(args.run / "generated.png")
print(f"saved {args.run / 'generated.png'}")
