"""How fast ddpo.py samples and learns here, and how much of that time is the network itself.

    python examples/benchmark.py                            # the bundled model, in less than two minutes on one CPU core
    python examples/benchmark.py --arch sd15                # Stable Diffusion 1.5 at 512 x 512: for a GPU, without a download
    python examples/benchmark.py --arch sdxl --json FILE    # XL base 1.0 at 1024 x 1024; FILE, a new one, gets all the numbers

--arch builds the model from its published configuration with random weights, which are as fast as trained ones. Any flag of
ddpo.py can be added (--precision, --sample-batch, --micro-batch, --steps, --lora-rank, --guidance-scale, --reward, ...).

A batch is sampled, decoded and scored, and then learned from. Each of these is timed --repeats times after a warm-up; medians
count. All denoising steps cost the same, so only the first --measure-steps are run. The batch is copied if need be, to learn from
at least two calls of --micro-batch pairs; optimizer steps are as rare as in a real epoch, but there is one at least.

Sampling and update take turns with their floor: the same UNet, called as often with inputs of the same shape (twice the batch
with guidance), dtype and autocast, and nothing else. For sampling that is the forward pass without the LoRA, for the update
forward with it and backward, from the mean square of the guided prediction to the weights in training. What a flag does to the
UNet (--compile, --grad-checkpointing) it does to the floor too: compare two commands by `per second`, not by `ratio`.

    calls       of the network in what was timed: for a batch of images, or for the (image, step) pairs
    ms, bare    for one call: the whole phase, and the floor
    ratio       ms / bare, and the smallest and largest of the repetitions
    per second  images of all --steps, pairs, images decoded, images scored
    share       of an epoch's time; in training the reward costs less than this, as it works while the next batch is sampled
    peak GB     the most GPU memory allocated at a time, in units of 10^9 bytes, with the models (CUDA only)
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

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ddpo
import rewards
from ddpo import diffusers, transformers  # imported by it, they are quiet
from rewards import UserError

# ---------------------------------------------------------------- the published architectures, with random weights

DOWN, DOWN_X, UP, UP_X = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
UNETS = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8, "layers_per_block": 2,
             "block_out_channels": (320, 640, 1280, 1280), "down_block_types": (DOWN_X, DOWN_X, DOWN_X, DOWN),
             "up_block_types": (UP, UP_X, UP_X, UP_X)},
    "sdxl": {"sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20), "layers_per_block": 2,
             "block_out_channels": (320, 640, 1280), "down_block_types": (DOWN, DOWN_X, DOWN_X),
             "up_block_types": (UP_X, UP_X, UP), "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
             "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816},
}  # fmt: skip
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "down_block_types": ("DownEncoderBlock2D",) * 4,
       "up_block_types": ("UpDecoderBlock2D",) * 4}  # fmt: skip
VAES = {"sd15": {"sample_size": 512, "scaling_factor": 0.18215}, "sdxl": {"sample_size": 1024, "scaling_factor": 0.13025}}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
          "projection_dim": 1280, "hidden_act": "gelu"}  # fmt: skip
BATCHES = {"sdxl": ["--sample-batch=4"]}  # to decode more at once would take tens of GB


def random_pipeline(arch, device):
    """A pipeline of that architecture, made on the device; on CUDA in half precision, as Policy wants it. The tokenizer is the
    bundled model's, whose ids are among those that the text encoder knows."""
    usual, clip = torch.get_default_dtype(), transformers.CLIPTextConfig
    torch.set_default_dtype(torch.float16 if device.type == "cuda" else usual)
    try:
        with torch.device(device):
            unet, vae = diffusers.UNet2DConditionModel(**UNETS[arch]), diffusers.AutoencoderKL(**VAE, **VAES[arch])
            text = [transformers.CLIPTextModel(clip(**CLIP_L))]
            if arch == "sdxl":
                text += [transformers.CLIPTextModelWithProjection(clip(**CLIP_G))]
    finally:
        torch.set_default_dtype(usual)
    vocabulary = ddpo.EXAMPLES / "emoji-diffusion/tokenizer"
    tokens = [transformers.CLIPTokenizer.from_pretrained(vocabulary, model_max_length=77)] * len(text)
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                                        clip_sample=False, set_alpha_to_one=False)  # fmt: skip
    parts = (vae, *text, *tokens, unet, scheduler)
    if arch == "sdxl":
        return diffusers.StableDiffusionXLPipeline(*parts, add_watermarker=False)
    return diffusers.StableDiffusionPipeline(*parts, None, None, requires_safety_checker=False)


# ---------------------------------------------------------------- the floor


class Recorder:
    """A UNet that notes its calls: of each the arguments, whether it will be learned from, and whether autocast is on. Calls
    alike in shape and purpose share the arguments of the first, so as not to fill the memory."""

    def __init__(self, unet):
        self.unet, self.known, self.calls = unet, {}, []

    def __call__(self, *inputs, **context):
        learning, autocast = torch.is_grad_enabled(), torch.is_autocast_enabled(inputs[0].device.type)
        self.calls.append(self.known.setdefault((inputs[0].shape, learning), (inputs, context, learning, autocast)))
        return self.unet(*inputs, **context)

    def __getattr__(self, name):
        return getattr(self.unet, name)


def record(policy, phase, *args):
    """What phase(*args) returns, and its calls of the network."""
    with mock.patch.object(policy, "unet", Recorder(policy.unet)) as recorder:
        return phase(*args), recorder.calls


def floor(policy, calls):
    """The same network calls and nothing else: without the LoRA, or with it and backward to its weights."""
    for inputs, context, learning, autocast in calls:
        with contextlib.nullcontext() if learning else ddpo.without_lora():
            with torch.set_grad_enabled(learning), torch.autocast(policy.device.type, policy.dtype, enabled=autocast):
                eps = policy.unet(*inputs, **context).sample.float()
        if learning and policy.guidance_scale > 1:
            uncond, conditional = eps.chunk(2)
            eps = uncond + policy.guidance_scale * (conditional - uncond)
        if learning:
            eps.square().mean().backward()


# ---------------------------------------------------------------- measuring


def measure(settings, repeats, measure_steps, arch=None):
    """All the numbers, as --json writes them. `arch` takes the place of the settings' model."""
    s, device = settings, ddpo.pick_device(settings.device)
    terms = rewards.load_rewards(s.reward, s.monitor, ddpo.pick_device(s.reward_device or device.type), s.reward_batch_size)
    noise, choice = ddpo.random_numbers(s, 0, device)
    torch.set_flush_denormal(True)  # as ddpo.launch does
    made_here = mock.patch.object(ddpo, "load_pipeline", lambda model: random_pipeline(arch, device))
    with made_here if arch else contextlib.nullcontext():
        policy = ddpo.Policy(s, device)
    batch, steps, trained = min(s.sample_batch, s.images_per_epoch), min(measure_steps, s.steps), policy.steps_learned
    policy.scheduler.timesteps = policy.scheduler.timesteps[:steps]
    policy.trained_steps = policy.trained_steps[policy.trained_steps < steps]
    policy.steps_learned = min(trained, len(policy.trained_steps))
    if not len(policy.trained_steps):
        raise UserError(f"--min-std {s.min_std} leaves out the first {steps} steps: use more --measure-steps")
    share = s.images_per_epoch // s.updates_per_epoch * trained  # (image, step) pairs of an optimizer step in training
    copies = math.ceil(2 * min(policy.micro_batch, share) / (batch * policy.steps_learned))  # of the batch, to learn from
    pairs = copies * batch * policy.steps_learned
    most = max(1, min(pairs // share, s.updates_per_epoch))
    updates = max(n for n in range(1, most + 1) if math.gcd(copies * batch, s.images_per_epoch) % n == 0)
    run = ddpo.Run(dataclasses.replace(s, updates_per_epoch=updates), policy)
    prompts = ddpo.load_prompts(s.prompts) if policy.conditional else [""]
    prompts = (prompts * batch)[:batch]
    cond, adv = policy.encode(prompts * copies), torch.linspace(-1, 1, batch * copies, device=device)

    laps, cuda, synchronize = {}, device.type == "cuda", getattr(torch, device.type).synchronize

    def timed(name, function, *args):
        synchronize()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        result = function(*args)
        synchronize()
        laps.setdefault(name, []).append((time.perf_counter() - start, torch.cuda.max_memory_allocated() / 1e9 if cuda else None))
        return result

    def samples(x, logp):
        return x.repeat(copies, 1, 1, 1, 1), logp.repeat(copies, 1), cond, adv

    calls, skipped = {}, []
    (x, logp), calls["sampling"] = record(policy, ddpo.rollout, policy, prompts, s.eta, noise)
    _, calls["update"] = record(policy, ddpo.update, run, samples(x, logp), choice)
    for _ in range(1 + repeats):  # the first one warms up
        timed("sampling floor", floor, policy, calls["sampling"])
        x, logp = timed("sampling", ddpo.rollout, policy, prompts, s.eta, noise)
        timed("update floor", floor, policy, calls["update"])
        run.optimizer.zero_grad()
        skipped.append(timed("update", ddpo.update, run, samples(x, logp), choice)["skipped"])
        images = timed("decode", policy.decode, x[:, -1])
        timed("reward", ddpo.score, terms, images, prompts)
        del images  # not to be counted as the next phase's memory
    seconds, peaks = ({name: [lap[i] for lap in timings[1:]] for name, timings in laps.items()} for i in (0, 1))

    phases, cost = {}, {}  # cost: seconds of an epoch for each of its images
    for phase, made, for_image in (("sampling", batch * steps / s.steps, 1), ("update", pairs, trained), ("decode", batch, 1),
                                   ("reward", batch, 1)):  # fmt: skip
        ours, bare, n = seconds[phase], seconds.get(f"{phase} floor"), len(calls.get(phase, []))
        cost[phase] = for_image * median(ours) / made
        phases[phase] = {"seconds": ours, "per_second": made / median(ours), "peak_gb": max(peaks[phase]) if cuda else None}
        if bare:
            ratios = [one / other for one, other in zip(ours, bare)]
            phases[phase] |= {"floor_seconds": bare, "calls": n, "ms_per_call": 1e3 * median(ours) / n,
                              "floor_ms_per_call": 1e3 * median(bare) / n, "ratio": median(ours) / median(bare),
                              "ratio_min": min(ratios), "ratio_max": max(ratios)}  # fmt: skip
    for phase in phases:
        phases[phase]["share"] = cost[phase] / sum(cost.values())
    phases["update"] |= {"pairs": pairs, "optimizer_steps": updates, "skipped": sum(skipped[1:])}
    cpu = f"{platform.machine()} cpu, threads: {torch.get_num_threads()}"
    name = torch.cuda.get_device_name() if cuda else cpu if device.type == "cpu" else device.type
    return {"model": s.model, "latent": policy.latent_shape, "device": name, "dtype": str(policy.dtype)[6:],
            "torch": torch.__version__, "diffusers": diffusers.__version__, "lora_rank": s.lora_rank, "sample_batch": batch,
            "micro_batch": policy.micro_batch, "steps": s.steps, "measured_steps": steps, "repeats": repeats,
            "settings": dataclasses.asdict(s), "phases": phases}  # fmt: skip


def show(r):
    """Print what was measured as a table."""
    update, latent = r["phases"]["update"], " x ".join(map(str, r["latent"]))
    print(f"model    {r['model']}, latents {latent}, guidance {r['settings']['guidance_scale']}, LoRA of rank {r['lora_rank']}\n"
          f"device   {r['device']}, {r['dtype']}; torch {r['torch']}, diffusers {r['diffusers']}\n"
          f"timed    {r['measured_steps']} of {r['steps']} steps of {r['sample_batch']} images; {update['pairs']} pairs, "
          f"{r['micro_batch']} a call; {update['optimizer_steps']} optimizer steps; medians of {r['repeats']}\n\n"
          "| phase | calls | ms | bare | ratio | per second | share | peak GB |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    texts = {"calls": "{calls}", "ms_per_call": "{ms_per_call:.2f}", "floor_ms_per_call": "{floor_ms_per_call:.2f}",
             "ratio": "{ratio:.3f} ({ratio_min:.3f}..{ratio_max:.3f})", "per_second": "{per_second:.4g}", "share": "{share:.1%}",
             "peak_gb": "{peak_gb:.2f}"}  # fmt: skip
    for phase, row in r["phases"].items():
        cells = [text.format(**row) if row.get(key) is not None else "-" for key, text in texts.items()]
        print("| " + " | ".join([phase, *cells]) + " |")
    if update["skipped"]:
        print(f"note     {update['skipped']} optimizer steps were skipped: their gradient was not finite")


# ---------------------------------------------------------------- main


def main(argv=None):
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("benchmark.py", description=__doc__, formatter_class=style, allow_abbrev=False)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--arch", choices=UNETS, help="a published architecture, with random weights")
    what.add_argument("--model", help="as for ddpo.py; default: the bundled one")
    parser.add_argument("--repeats", type=int, default=5, metavar="INT", help="default: 5")
    parser.add_argument("--measure-steps", type=int, default=4, metavar="INT", help="denoising steps to run; default: 4")
    parser.add_argument("--json", type=Path, metavar="FILE", help="a new file for all the numbers")
    args, flags = parser.parse_known_args(argv)
    model = f"{args.arch}, random weights" if args.arch else args.model
    try:
        s, folder, _ = ddpo.parse([*BATCHES.get(args.arch, []), *([f"--model={model}"] if model else []), *flags])
        if folder:
            raise UserError("--resume: a benchmark always starts anew")
        for flag, value in (("--repeats", args.repeats), ("--measure-steps", args.measure_steps)):
            if value < 1:
                raise UserError(f"{flag} must be at least 1, not {value}")
        if args.json and (args.json.exists() or not args.json.parent.is_dir()):
            raise UserError(f"--json {args.json}: {'it exists' if args.json.exists() else 'no such folder'}; name a new file")
        result = measure(s, args.repeats, args.measure_steps, args.arch)
        show(result)
        if args.json:
            with ddpo.explained(f"--json {args.json}: cannot write it"), open(args.json, "x") as file:
                file.write(json.dumps(result, indent=2) + "\n")
    except UserError as error:
        sys.exit(f"benchmark.py: error: {error}")
    except torch.cuda.OutOfMemoryError:
        knobs = f"--micro-batch {s.micro_batch}, --sample-batch {s.sample_batch}, --precision {s.precision}"
        sys.exit(f"benchmark.py: error: out of GPU memory; present values: {knobs}")
    except KeyboardInterrupt:
        sys.exit("\nbenchmark.py: stopped")


if __name__ == "__main__":
    main()
