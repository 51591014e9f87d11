"""Before and after, in plain diffusers: the same prompts from the same noise, without and with
what a run has learned.

    pip install peft   # diffusers needs it to load a LoRA
    python examples/generate.py runs/compressibility --prompts cat dog turtle

Images are sampled as in training, with the settings in RUN/config.json, or with another sampler of
diffusers' (--scheduler PNDMScheduler), other --steps, other --guidance. The picture goes to
RUN/generated.png: above before, below after training. --kohya FILE.safetensors also writes the LoRA
under the names that A1111, ComfyUI and InvokeAI read.
"""

import argparse
import inspect
import json
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_state_dict_to_kohya, logging, make_image_grid
from PIL import ImageDraw, ImageOps
from safetensors.torch import load_file, save_file

LORA = "pytorch_lora_weights.safetensors"


def load(model, scheduler="DDIMScheduler"):
    """A pipeline with that scheduler; training samples with DDIM's."""
    pipe = DiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    set_scheduler(pipe, scheduler)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def set_scheduler(pipe, name):
    kinds = {kind.__name__: kind for kind in pipe.scheduler.compatibles
             if "beta_start" in inspect.signature(kind).parameters}  # else of other noise levels
    if name not in kinds:
        raise ValueError(f"no scheduler {name} for it; there are {', '.join(sorted(kinds))}")
    pipe.scheduler = kinds[name].from_config({"clip_sample": False, **pipe.scheduler.config})


def draw(pipe, prompts, seed, config):
    """A PIL image for each prompt."""
    generator = torch.Generator(pipe.device).manual_seed(seed)
    how = {"num_inference_steps": config["steps"], "guidance_scale": config["guidance_scale"]}
    return pipe(prompts, generator=generator, eta=config.get("eta", 1.0), **how).images


def caption(picture, prompt):
    tile = ImageOps.expand(picture, (2, 2, 2, 16), "white")
    ImageDraw.Draw(tile).text((4, tile.height - 14), prompt[: tile.width // 6], fill="black")
    return tile


def save_kohya(run, path):
    """A run's LoRA in Kohya's layout. At rank 1 without the alphas: all are 1, as no alpha means,
    too, and stable-diffusion.cpp would divide such ones by the layer's width."""
    lora = convert_state_dict_to_kohya(load_file(run / LORA))
    rank = min(min(weights.shape) for weights in lora.values() if weights.dim())
    if rank == 1:
        lora = {name: weights for name, weights in lora.items() if not name.endswith(".alpha")}
    save_file(lora, path, {"format": "pt"})


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("run", type=Path, help="folder that ddpo.py has left")
    parser.add_argument("--prompts", nargs="+", default=["cat", "dog", "turtle", "shark"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scheduler", default="DDIMScheduler", help="a class of diffusers")
    parser.add_argument("--steps", type=int, help="default: as in training")
    parser.add_argument("--guidance", type=float, help="default: as in training")
    parser.add_argument("--kohya", help="file for the LoRA in Kohya's layout")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        config = json.loads((args.run / "config.json").read_text())
        if args.steps is not None:
            config["steps"] = args.steps
        if config["steps"] < 1:
            raise ValueError("--steps must be at least 1")
        if args.guidance is not None:
            config["guidance_scale"] = args.guidance
        bundled = Path(__file__).parent / "models" / "emoji-diffusion"
        model = bundled if config["model"] == bundled.name else config["model"]
        animals = (Path(__file__).parent / "prompts/animals.txt").read_text().split("\n")[1:-1]
        if model == bundled and not any(a in p for a in animals for p in args.prompts):
            print("the bundled model knows the words of examples/prompts/animals.txt alone")
        pipe = load(model, args.scheduler)
        if not hasattr(pipe, "tokenizer"):
            raise ValueError(f"{config['model']} draws without prompts")
        before = draw(pipe, args.prompts, args.seed, config)
        if (args.run / "pipeline").is_dir():  # the whole UNet was trained
            pipe = load(args.run / "pipeline", args.scheduler)
        else:
            pipe.load_lora_weights(args.run, weight_name=LORA)
        after = draw(pipe, args.prompts, args.seed, config)
        if args.kohya:
            save_kohya(args.run, args.kohya)
    except Exception as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        sys.exit(f"generate.py: error: cannot draw {args.run} ({why})")
    tiles = [caption(*tile) for tile in zip(before + after, args.prompts * 2)]
    picture = make_image_grid(tiles, rows=2, cols=len(args.prompts))
    picture.save(args.run / "generated.png")
    print(f"saved {args.run / 'generated.png'}")


if __name__ == "__main__":
    main()
