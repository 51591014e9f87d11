"""How fast ddpo.py samples and learns here, and how much of that time is the network itself.

    cd examples/experiments
    python benchmark.py               # the bundled model, in two minutes on one CPU core
    python benchmark.py --arch sd15   # Stable Diffusion 1.5 at 512 x 512, for a GPU
    python benchmark.py --arch sdxl --json FILE   # XL base 1.0 at 1024 x 1024

FILE, a new one, gets all the numbers. --arch builds the model from its published configuration
with random weights, which are as fast as trained ones, without a download; the other settings are
those of examples/stable-diffusion.flags or stable-diffusion-xl.flags. Any flag of ddpo.py can be
added (--precision, --batch-size, --steps, --lora-rank, --reward, ...).

A batch is sampled, decoded and scored, and then learned from. Each of these is timed --repeats
times after a warm-up; medians count. All denoising steps cost the same, so only the first
--measure-steps are run, with a call for each image (groups would share their first one). The batch
is copied if need be, to learn from at least two calls of --batch-size pairs; optimizer steps are as
rare as in a real epoch, but there is one at least.

Sampling and update take turns with their floor: the same UNet, called as often with inputs of the
same shape (twice the batch with guidance), dtype and autocast, and nothing else. For sampling that
is the forward pass without the LoRA, for the update forward with it and backward, from the mean
square of the guided prediction to the weights in training. What a flag does to the UNet
(--save-memory) it does to the floor too: compare two commands by `per second`, not by
`ratio`.

    calls       of the network in what was timed: for a batch of images, or the (image, step) pairs
    ms, bare    for one call: the whole phase, and the floor
    ratio       ms / bare, and the smallest and largest of the repetitions
    per second  images of all --steps, pairs, images decoded, images scored
    share       of an epoch's time
    peak GB     the most GPU memory allocated at a time, in units of 10^9 bytes, with the models
"""

import argparse
import contextlib
import dataclasses
import json
import math
import platform
import sys
import time
from pathlib import Path
from statistics import median
from unittest import mock

import diffusers
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import ddpo
import rewards
from ddpo import UserError, explained

# ---------------------------------------------------- published architectures, random weights

DOWN, DOWN_X = "DownBlock2D", "CrossAttnDownBlock2D"
UP, UP_X = "UpBlock2D", "CrossAttnUpBlock2D"
UNETS = {
    "sd15": {
        "sample_size": 64, "layers_per_block": 2, "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": (DOWN_X, DOWN_X, DOWN_X, DOWN),
        "up_block_types": (UP, UP_X, UP_X, UP_X),
        "cross_attention_dim": 768, "attention_head_dim": 8,
    },
    "sdxl": {
        "sample_size": 128, "layers_per_block": 2, "block_out_channels": (320, 640, 1280),
        "down_block_types": (DOWN, DOWN_X, DOWN_X),
        "up_block_types": (UP_X, UP_X, UP),
        "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
       "down_block_types": ("DownEncoderBlock2D",) * 4,
       "up_block_types": ("UpDecoderBlock2D",) * 4}  # fmt: skip
VAES = {"sd15": {"sample_size": 512, "scaling_factor": 0.18215},
        "sdxl": {"sample_size": 1024, "scaling_factor": 0.13025}}  # fmt: skip
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
          "num_attention_heads": 12}  # fmt: skip
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
          "num_attention_heads": 20, "projection_dim": 1280, "hidden_act": "gelu"}  # fmt: skip
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
             "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}  # fmt: skip
FLAGS = {"sd15": "stable-diffusion.flags", "sdxl": "stable-diffusion-xl.flags"}  # in examples


def random_pipeline(arch, device):
    """A pipeline of that architecture, made on the device, in float32 as a file's would be. The
    tokenizer is the bundled model's, whose ids the text encoder knows."""
    with torch.device(device):
        unet = diffusers.UNet2DConditionModel(**UNETS[arch])
        vae = diffusers.AutoencoderKL(**VAE, **VAES[arch])
        config = transformers.CLIPTextConfig(**CLIP_L)
        text = [transformers.CLIPTextModel(config)]
        if arch == "sdxl":
            config = transformers.CLIPTextConfig(**CLIP_G)
            text.append(transformers.CLIPTextModelWithProjection(config))
    vocabulary = ddpo.EXAMPLES / "models/emoji-diffusion/tokenizer"
    tokenizer = transformers.CLIPTokenizer.from_pretrained(vocabulary, model_max_length=77)
    tokenizers = [tokenizer] * len(text)
    parts = (vae, *text, *tokenizers, unet, diffusers.DDIMScheduler(**SCHEDULER))
    if arch == "sdxl":
        return diffusers.StableDiffusionXLPipeline(*parts, add_watermarker=False)
    return diffusers.StableDiffusionPipeline(*parts, None, None, requires_safety_checker=False)


# ---------------------------------------------------- the floor


class Recorder:
    """A UNet that notes its calls: of each the arguments, whether it will be learned from, and
    whether autocast is on. Calls alike in shape and purpose share the arguments of the first, so
    as not to fill the memory."""

    def __init__(self, unet):
        self.unet = unet
        self.known = {}
        self.calls = []

    def __call__(self, *inputs, **context):
        learning = torch.is_grad_enabled()
        autocast = torch.is_autocast_enabled(inputs[0].device.type)
        call = (inputs, context, learning, autocast)
        self.calls.append(self.known.setdefault((inputs[0].shape, learning), call))
        return self.unet(*inputs, **context)

    def __getattr__(self, name):
        return getattr(self.unet, name)


def record(policy, phase, *args):
    """What phase(*args) returns, and its calls of the network."""
    with mock.patch.object(policy, "unet", Recorder(policy.unet)) as recorder:
        return phase(*args), recorder.calls


def floor(policy, calls):
    """The same network calls and nothing else: without the LoRA, or with it and backward to its
    weights."""
    for inputs, context, learning, autocast in calls:
        lora = contextlib.nullcontext() if learning else ddpo.without_lora()
        half = torch.autocast(policy.device.type, policy.dtype, enabled=autocast)
        with lora, half, torch.set_grad_enabled(learning):
            eps = policy.unet(*inputs, **context).sample.float()
        if learning and policy.guidance_scale > 1:
            uncond, conditional = eps.chunk(2)
            eps = uncond + policy.guidance_scale * (conditional - uncond)
        if learning:
            eps.square().mean().backward()


# ---------------------------------------------------- measuring


class Laps:
    """Seconds, and gigabytes at the peak, of every time that something was done."""

    def __init__(self, device):
        self.cuda = device.type == "cuda"
        self.synchronize = getattr(torch, device.type).synchronize
        self.seconds = {}
        self.peaks = {}

    def time(self, name, function, *args):
        self.synchronize()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        result = function(*args)
        self.synchronize()
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() / 1e9 if self.cuda else 0
        self.peaks.setdefault(name, []).append(peak)
        return result


def load_policy(settings, device, arch):
    """The policy of the settings, but with the model of `arch` if there is one."""

    def make(model, dtype):
        pipe = random_pipeline(arch, device)
        pipe.unet.to(dtype)
        for encoder in (pipe.text_encoder, getattr(pipe, "text_encoder_2", pipe.text_encoder)):
            encoder.to("cpu")  # where ddpo.py has them read the prompts
        return pipe

    torch.set_flush_denormal(True)  # as ddpo.launch does
    load = make if arch else ddpo.load_pipeline
    with mock.patch.object(ddpo, "load_pipeline", load):
        with explained(f"--model {settings.model}: it cannot be measured"):
            return ddpo.Policy(settings, device)


def measure(settings, repeats, measure_steps, arch=None):
    """All the numbers, as --json writes them. `arch` takes the place of the settings' model."""
    s = settings
    device = ddpo.pick_device(s.device)
    reward_device = ddpo.pick_device(s.reward_device or s.device)
    terms = rewards.load_rewards(s.reward, s.monitor, reward_device)
    noise, choice = ddpo.random_numbers(s, 0, device)
    policy = load_policy(s, device, arch)
    batch = policy.batch_size
    steps = min(measure_steps, s.steps)
    trained = len(policy.trained_steps)  # of an image, in training
    policy.scheduler.timesteps = policy.scheduler.timesteps[:steps]
    policy.trained_steps = [step for step in policy.trained_steps if step < steps]
    learned = len(policy.trained_steps)
    if not learned:
        what = f"--min-std {s.min_std} leaves out the first {steps} steps"
        raise UserError(f"{what}: use more --measure-steps")

    # How much there is to learn from, and with how many optimizer steps.
    share = s.images_per_epoch // s.updates_per_epoch * trained  # pairs of a step in training
    wanted = 2 * min(policy.batch_size, share)
    copies = math.ceil(wanted / (batch * learned))
    pairs = copies * batch * learned
    updates = max(1, min(pairs // share, s.updates_per_epoch))
    while copies * batch % updates or s.images_per_epoch % updates:
        updates -= 1
    run = ddpo.Run(dataclasses.replace(s, updates_per_epoch=updates), policy)
    prompts = ddpo.load_prompts(s.prompts) if policy.conditional else [""]
    prompts = [prompts[i % len(prompts)] for i in range(batch)]
    cond = policy.encode(prompts * copies)
    adv = torch.linspace(-1, 1, batch * copies, device=device)

    def samples(x, logp):
        x = x.repeat(copies, 1, 1, 1, 1)
        return ddpo.Samples(prompts * copies, cond, x, logp.repeat(copies, 1), None, adv)

    x_T = torch.randn(batch, *policy.latent_shape, generator=noise, device=device)
    (x, logp), sampling = record(policy, ddpo.rollout, policy, prompts, x_T, noise)
    _, update = record(policy, ddpo.update, run, samples(x, logp), choice)
    skipped = 0
    for repeat in range(1 + repeats):
        if repeat < 2:  # begin, and begin again after the first one, which warms up
            laps = Laps(device)
            skipped = 0
        laps.time("sampling floor", floor, policy, sampling)
        x, logp = laps.time("sampling", ddpo.rollout, policy, prompts, x_T, noise)
        laps.time("update floor", floor, policy, update)
        run.optimizer.zero_grad()
        row = laps.time("update", ddpo.update, run, samples(x, logp), choice)
        skipped += row["skipped"]
        images = laps.time("decode", policy.decode, x[:, -1])
        laps.time("reward", ddpo.score, terms, images, prompts)
        del images  # not to be counted as the next phase's memory

    made = {"sampling": batch * steps / s.steps, "update": pairs, "decode": batch, "reward": batch}
    phases = {name: summary(laps, name, count) for name, count in made.items()}
    phases["sampling"] |= compare(laps, "sampling", len(sampling))
    phases["update"] |= compare(laps, "update", len(update))
    phases["update"] |= {"pairs": pairs, "optimizer_steps": updates, "skipped": skipped}
    cost = {name: 1 / row["per_second"] for name, row in phases.items()}  # of an image
    cost["update"] *= trained
    for name, row in phases.items():
        row["share"] = cost[name] / sum(cost.values())
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{platform.machine()} {device.type}, threads: {torch.get_num_threads()}"
    return {
        "model": s.model, "latent": policy.latent_shape, "lora_rank": s.lora_rank,
        "device": name, "dtype": str(policy.dtype).removeprefix("torch."),
        "torch": torch.__version__, "diffusers": diffusers.__version__,
        "images": batch, "batch_size": policy.batch_size, "steps": s.steps,
        "measured_steps": steps, "repeats": repeats,
        "settings": dataclasses.asdict(s), "phases": phases,
    }  # fmt: skip


def summary(laps, phase, made):
    """What is said of every phase. `made` is how much was made in the time."""
    seconds = laps.seconds[phase]
    peak = max(laps.peaks[phase]) if laps.cuda else None
    return {"seconds": seconds, "per_second": made / median(seconds), "peak_gb": peak}


def compare(laps, phase, calls):
    """What is said of a phase beside its floor."""
    ours = laps.seconds[phase]
    bare = laps.seconds[f"{phase} floor"]
    ratios = [one / other for one, other in zip(ours, bare)]
    return {
        "floor_seconds": bare, "calls": calls, "ms_per_call": 1e3 * median(ours) / calls,
        "floor_ms_per_call": 1e3 * median(bare) / calls, "ratio": median(ours) / median(bare),
        "ratio_min": min(ratios), "ratio_max": max(ratios),
    }  # fmt: skip


CELLS = {
    "calls": "{calls}",
    "ms_per_call": "{ms_per_call:.2f}",
    "floor_ms_per_call": "{floor_ms_per_call:.2f}",
    "ratio": "{ratio:.3f} ({ratio_min:.3f}..{ratio_max:.3f})",
    "per_second": "{per_second:.4g}",
    "share": "{share:.1%}",
    "peak_gb": "{peak_gb:.2f}",
}


def show(r):
    """Print what was measured as a table."""
    update = r["phases"]["update"]
    latent = " x ".join(map(str, r["latent"]))
    print(f"model    {r['model']}, latents {latent}, guidance {r['settings']['guidance_scale']},"
          f" LoRA of rank {r['lora_rank']}\n"
          f"device   {r['device']}, {r['dtype']}; torch {r['torch']}, diffusers {r['diffusers']}\n"
          f"timed    {r['measured_steps']} of {r['steps']} steps of {r['images']} images;"
          f" {update['pairs']} pairs, {r['batch_size']} a call; {update['optimizer_steps']}"
          f" optimizer steps; medians of {r['repeats']}\n\n"
          "| phase | calls | ms | bare | ratio | per second | share | peak GB |\n"
          "|---|---|---|---|---|---|---|---|")  # fmt: skip
    for phase, row in r["phases"].items():
        cells = [phase]
        for key, text in CELLS.items():
            cells.append(text.format(**row) if row.get(key) is not None else "-")
        print(f"| {' | '.join(cells)} |")
    if update["skipped"]:
        print(f"note     {update['skipped']} optimizer steps were skipped: not finite")


# ---------------------------------------------------- the command line


def main(argv=None):
    style = argparse.RawDescriptionHelpFormatter
    how = {"formatter_class": style, "allow_abbrev": False}
    parser = argparse.ArgumentParser("benchmark.py", description=__doc__, **how)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--arch", choices=UNETS, help="a published architecture, random weights")
    what.add_argument("--model", help="as for ddpo.py; default: the bundled one")
    add = parser.add_argument
    add("--repeats", type=int, default=5, metavar="INT", help="default: 5")
    add("--measure-steps", type=int, default=4, metavar="INT", help="of an image; default: 4")
    add("--json", type=Path, metavar="FILE", help="a new file for all the numbers")
    args, flags = parser.parse_known_args(argv)
    model = f"{args.arch}, random weights" if args.arch else args.model
    if model:
        flags = [f"--model={model}", *flags]
    if args.arch:
        flags = [f"@{ddpo.EXAMPLES / FLAGS[args.arch]}", *flags]
    try:
        settings, resumed = ddpo.parse(flags)
        if resumed:
            raise UserError("--resume: a benchmark always starts anew")
        if min(args.repeats, args.measure_steps) < 1:
            raise UserError("--repeats and --measure-steps must be at least 1")
        if args.json:
            with explained(f"--json {args.json}: name a new file"):
                args.json.touch(exist_ok=False)
                args.json.unlink()
        result = measure(settings, args.repeats, args.measure_steps, args.arch)
        show(result)
        if args.json:
            with explained(f"--json {args.json}: cannot write it"):
                args.json.write_text(json.dumps(result, indent=2) + "\n")
    except UserError as error:
        sys.exit(f"benchmark.py: error: {error}")
    except torch.cuda.OutOfMemoryError:
        now = f"--batch-size {settings.batch_size}, --precision {settings.precision}"
        sys.exit(f"benchmark.py: error: out of GPU memory with {now}")
    except KeyboardInterrupt:
        sys.exit("\nbenchmark.py: stopped")


if __name__ == "__main__":
    main()
