"""DDPO: Denoising Diffusion Policy Optimization (Black et al., "Training Diffusion Models with Reinforcement Learning",
ICLR 2024, arXiv 2305.13301), for Stable Diffusion, its XL, and DDPMs of pixels, in one file.

    python ddpo.py --reward compressibility            # a small bundled model, on any machine, in minutes
    python ddpo.py --reward aesthetic --model stable-diffusion-v1-5/stable-diffusion-v1-5      # needs a GPU

Denoising is a Markov decision process: the state is (c, t, x_t), the action is x_{t-1}, the policy is the Gaussian that
one denoising step draws it from, and a reward r(x_0, c) comes only at the end. So the policy gradient applies:

    for every epoch:
        draw prompts c and sample images x_T, ..., x_0, keeping every latent and its log-probability     (rollout)
        reward = r(x_0, c)                                                                               (score)
        adv = (reward - mean) / std, with the mean and std of the same prompt's recent rewards           (PromptStats)
        for every (image, step) pair: ratio = p_theta(x_{t-1} | x_t, c) / p_theta_old(x_{t-1} | x_t, c)  (ddim_step)
            loss = max(-adv * ratio, -adv * clip(ratio, 1 - clip_range, 1 + clip_range))                 (clipped_loss)
        average the gradient over the pairs, step the optimizer                                          (update)

Names: x_t, x_prev (x_{t-1}); cond (c, as a row of the table of encoded prompts); eps (predicted noise, after guidance);
mean, std, logp (of the policy); logp_old (of the policy that sampled); B images, T denoising steps, latents of C x H x W.
Left out of the textbook algorithm: a value network (the statistics of each prompt take its place), discounting (the paper
has none). A KL penalty to the pretrained model is there, but off: the clip range bounds each update, not their sum.
"""

import argparse
import csv
import itertools
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from zipfile import ZipFile

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it remarks on packages that nothing here needs

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionXLPipeline
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

import rewards
from rewards import UserError, explained

# ---------------------------------------------------------------- settings


def option(default, help, least=None, above=None, most=None, choices=None):
    """A field of Settings: its default, one line of help, and the values that are allowed."""
    return field(default=default, metadata={"help": help, "least": least, "above": above, "most": most, "choices": choices})


EXAMPLES = Path(__file__).resolve().parent / "examples"
DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """All settings of a run. The defaults are for Stable Diffusion on one GPU of 24 GB: the values of the authors' LoRA runs,
    with fewer images and steps in an epoch so that an epoch takes minutes. `make_settings` says what overrides them."""

    reward: str = option("compressibility", "what to maximise: a name from rewards.py, FILE.py:FUNCTION, or a mix: 'A + 0.1*B'")
    model: str = option("emoji-diffusion", "hub id or folder of a pipeline: Stable Diffusion 1.x, 2.x, XL, or DDPM of pixels")
    prompts: str = option("animals", "animals, activities or imagenet (the paper's sets), or a text file with one prompt a line")
    out: str = option("", "run folder; empty means runs/REWARD, or runs/REWARD-2 and so on if that exists")
    seed: int = option(0, "seed of every random number", least=0)
    device: str = option("auto", "cuda, mps or cpu; auto takes the first of these that is there")
    precision: str = option("auto", "fp32, bf16 or fp16; auto: fp16 on cuda, bf16 on the cpu, else fp32", choices=DTYPES)
    # sampling
    epochs: int = option(50, "rounds of sampling and training", least=1)
    images_per_epoch: int = option(64, "images sampled in an epoch (the paper: 256)", least=2)
    steps: int = option(20, "denoising steps of an image (the paper: 50)", least=1)
    guidance_scale: float = option(5.0, "classifier-free guidance, in sampling and training; none at 1 or below", least=0)
    samples_per_prompt: int = option(1, "prompts are drawn in groups of this size, each with its own baseline", least=1)
    eta: float = option(1.0, "noise in a DDIM step: 1 is DDPM's; at 0 there would be nothing to learn from", above=0, most=1)
    sample_batch: int = option(8, "images sampled at once: speed and memory (and which noise an image gets)", least=1)
    reward_batch_size: int = option(8, "images that a reward's network sees at once: speed and memory only", least=1)
    reward_device: str = option("", "where the rewards' networks run; empty means on the device that trains")
    # learning
    objective: str = option("clipped", "clipped (DDPO-IS) or reinforce (DDPO-SF)", choices=("clipped", "reinforce"))
    updates_per_epoch: int = option(4, "optimizer steps in an epoch, each on a minibatch of its own", least=1)
    micro_batch: int = option(0, "(image, step) pairs in a network call; 0: as many as --sample-batch, if they fit", least=0)
    train_steps_fraction: float = option(1.0, "share of each image's steps to learn from, drawn at random", above=0, most=1)
    grad_checkpointing: bool = option(False, "compute activations anew in the backward pass: slower, in less memory")
    compile: bool = option(False, "torch.compile the network: minutes at the start, faster from then on")
    lr: float = option(3e-4, "AdamW's learning rate; with --lora-rank 0 the default is 1e-5", above=0)
    # The log-probability is a mean over the latent's dimensions, so the paper's 1e-4 on 4 x 64 x 64 of them clips the joint
    # log-ratio at 1.6384 nats. The same trust in nats is another number for every other size of latent: that is the default.
    clip_range: float = option(0.0, "the ratio is clipped to 1 +- this; 0 means 1.6384 / the latent's dimensions", least=0)
    min_std: float = option(0.0, "only steps that add noise of more than this std are learned from (the paper: all)", least=0)
    adv_min: float = option(0.0, "images with a smaller abs(advantage) are not learned from: they would hardly pull", least=0)
    adv_clip: float = option(5.0, "advantages are clipped to - this ... + this", above=0)
    lora_rank: int = option(4, "rank of the LoRA matrices; 0 trains the whole UNet instead", least=0)
    init_lora: str = option("", "a LoRA file in diffusers' layout to start from; the rank is read from it")
    weight_decay: float = option(1e-4, "AdamW's weight decay", least=0)
    grad_clip: float = option(1.0, "the gradient's norm is clipped to this", above=0)
    stats_buffer: int = option(32, "rewards remembered of each prompt", least=1)
    stats_min_count: int = option(16, "with fewer rewards than this (or a group) a prompt is compared with the batch", least=1)
    # against over-optimisation
    kl_coef: float = option(0.0, "what a nat of KL to the pretrained model costs, in standard deviations of the reward", least=0)
    kl_stop: float = option(0.0, "the run ends once this many nats lie between it and the pretrained model; 0: never", least=0)
    monitor: str = option("", "rewards to log but not to optimise, NAME[,NAME]: they show when the reward is gamed")
    # evaluating and saving
    eval_every: int = option(5, "epochs between two evaluations, on the same prompts and noise each time", least=1)
    eval_prompts: str = option("", "a set or file as for --prompts, to evaluate on others than those trained on; empty: the same")
    eval_images: int = option(12, "images of an evaluation", least=1)
    save_every: int = option(1, "epochs between two saved states, from which --resume goes on", least=1)

    def __post_init__(self):
        for f in fields(self):
            flag, value = "--" + f.name.replace("_", "-"), getattr(self, f.name)
            if f.type is float and type(value) is int:
                object.__setattr__(self, f.name, value := float(value))
            if type(value) is not f.type or (f.type is float and not math.isfinite(value)):
                kind = "finite number" if f.type is float else f.type.__name__
                raise UserError(f"{flag} must be a {kind}, not {value!r}")
            least, above, most, choices = (f.metadata[k] for k in ("least", "above", "most", "choices"))
            if least is not None and value < least:
                raise UserError(f"{flag} must be at least {least}, not {value}")
            if above is not None and value <= above:
                raise UserError(f"{flag} must be more than {above}, not {value}")
            if most is not None and value > most:
                raise UserError(f"{flag} must be at most {most}, not {value}")
            if choices and value not in choices:
                raise UserError(f"{flag} must be one of {', '.join(choices)}, not {value!r}")
        if self.objective == "reinforce" and self.updates_per_epoch != 1:
            raise UserError("--objective reinforce needs fresh samples for every update: use --updates-per-epoch 1")
        if self.stats_min_count > self.stats_buffer:
            raise UserError(f"--stats-min-count {self.stats_min_count} is never reached: --stats-buffer is {self.stats_buffer}")
        for flag, value in (("--updates-per-epoch", self.updates_per_epoch), ("--samples-per-prompt", self.samples_per_prompt)):
            if self.images_per_epoch % value:
                raise UserError(f"--images-per-epoch must be a multiple of {flag}, {value}")
        if not self.lora_rank and (self.kl_coef or self.kl_stop or self.init_lora):
            raise UserError("--kl-coef, --kl-stop and --init-lora need a LoRA; with --lora-rank 0 there is none")


def make_settings(flags, config=None):
    """The defaults, overridden by the file `config` or else by the model folder's `ddpo.json`, and these by `flags`."""
    file = Path(config) if config else model_path(flags.get("model", Settings.model)) / "ddpo.json"
    with explained(f"{file} must be a json object of settings"):
        values = dict(json.loads(file.read_text())) if config or file.is_file() else {}
    values.pop("made_with", None)
    if unknown := values.keys() - {f.name for f in fields(Settings)}:
        raise UserError(f"{file}: there is no setting named {', '.join(sorted(unknown))}")
    values.update(flags)
    if values.get("objective") == "reinforce":
        values["updates_per_epoch"] = flags.get("updates_per_epoch", 1)
    if values.get("lora_rank") == 0 and ("lora_rank" in flags or "lr" not in values):
        values["lr"] = flags.get("lr", 1e-5)  # the paper's, for the whole UNet
    if flags.get("init_lora"):
        rank = read_lora(flags["init_lora"])[1]
        if flags.get("lora_rank", rank) not in (0, rank):
            raise UserError(f"--lora-rank {flags['lora_rank']}: the LoRA of --init-lora has rank {rank}")
        values["lora_rank"] = flags.get("lora_rank", rank)
    return Settings(**values)


def model_path(model):
    """The folder of the bundled model for its name; anything else (a folder or a hub id) unchanged."""
    return EXAMPLES / model if model == Settings.model else Path(model)


def load_prompts(name, flag="--prompts"):
    """The prompts of a set (a file in examples/prompts) or of a text file: one a line, blank lines and # comments left out."""
    sets = {path.stem: path for path in sorted(EXAMPLES.glob("prompts/*.txt"))}
    with explained(f"{flag} {name}: neither one of {', '.join(sets)} nor a readable text file"):
        lines = sets.get(name, Path(name)).read_text(encoding="utf-8-sig").splitlines()
    prompts = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if not prompts:
        raise UserError(f"{flag} {name}: the file holds no prompt; write one on each line")
    if repeated := [prompt for prompt, times in Counter(prompts).items() if times > 1]:
        print(f"note     {flag} {name} repeats {len(repeated)} prompts, such as {repeated[0]!r}; they are drawn more often")
    return prompts


def pick_device(name, flag="--device"):
    """The torch.device of that name, or the best one of this machine for "auto"."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    usable = [kind for kind in there if there[kind]]
    if name not in ("auto", *usable):
        raise UserError(f"{flag} {name}: not on this machine; it has {', '.join(usable)}")
    return torch.device(usable[0] if name == "auto" else name)


# ---------------------------------------------------------------- LoRA


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained low-rank one: y = W x + B A x, with A (rank, in) and B (out, rank) in float32.
    B starts at zero, so the layer starts as the pretrained one."""

    on = True  # of all layers at once: see without_lora

    def __init__(self, base, rank):
        super().__init__()
        self.base = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=base.weight.device)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=base.weight.device)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        y = self.base(x)
        if self.on:  # in place, because passes over y are what a LoRA costs
            a, b = (layer.weight.to(y.dtype) for layer in (self.lora_A, self.lora_B))
            y.view(-1, y.shape[-1]).addmm_(nn.functional.linear(x, a).flatten(0, -2), b.T)
        return y


@contextmanager
def without_lora():
    """Inside, every LoRA layer is the pretrained one."""
    LoRALinear.on = False
    try:
        yield
    finally:
        LoRALinear.on = True


def add_lora(unet, rank):
    """Freeze the UNet, put a LoRA on the query, key, value and output projections of its attentions, return the LoRA weights."""
    unet.requires_grad_(False)
    for name in [n for n, _ in unet.named_modules() if n.endswith(("to_q", "to_k", "to_v", "to_out.0"))]:
        parent, _, child = name.rpartition(".")
        setattr(unet.get_submodule(parent), child, LoRALinear(unet.get_submodule(name), rank))
    return [p for p in unet.parameters() if p.requires_grad]


def save_lora(unet, path):
    """Write the LoRA in diffusers' layout; alpha is not in the file, which means that it equals the rank."""
    weights = {f"unet.{k}": v.cpu() for k, v in unet.state_dict().items() if ".lora_" in k}
    with whole_file(path) as tmp:
        save_file(weights, tmp, metadata={"format": "pt"})


def read_lora(path):
    """The UNet's LoRA from a file in diffusers' layout, as a state dict, and its rank."""
    with explained(f"--init-lora {path}: not a file with a LoRA of one rank in diffusers' layout"):
        with safe_open(path, "pt") as file:
            weights = {k.removeprefix("unet."): file.get_tensor(k) for k in file.keys()}
            about = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))  # peft's configuration
        if about.get("unet.use_rslora") or about.get("unet.alpha_pattern"):
            raise ValueError("it scales its layers by rank-stabilised or several alphas")
        (rank,) = {len(weight) for k, weight in weights.items() if k.endswith("lora_A.weight")}
    scale = about.get("unet.lora_alpha", rank) / rank  # in our layers it is 1
    return {k: weight * scale if k.endswith("lora_B.weight") else weight for k, weight in weights.items()}, rank


def init_lora(unet, path):
    """Load the LoRA of a file into the UNet's LoRA layers, which must be the same ones."""
    with explained(f"--init-lora {path}: does not fit this UNet"):
        missing, unexpected = unet.load_state_dict(read_lora(path)[0], strict=False)
    if wrong := unexpected or [k for k in missing if ".lora_" in k]:
        raise UserError(f"--init-lora {path}: trains other layers than the UNet's attention projections, such as {wrong[0]}")


# ---------------------------------------------------------------- the pipeline as a policy


class Policy:
    """What DDPO needs of a diffusers pipeline: encode prompts, predict noise (with guidance), decode latents.

    An unconditional model of pixels has no prompts, no guidance and no VAE: all its prompts are one, its latents the image."""

    def __init__(self, settings, device):
        self.dtype = DTYPES[settings.precision] or {"cuda": torch.float16, "cpu": torch.bfloat16}.get(device.type, torch.float32)
        pipe = load_pipeline(settings.model)
        self.pipe, self.unet, self.device = pipe, pipe.unet, device
        self.conditional, self.xl = hasattr(pipe, "vae"), isinstance(pipe, StableDiffusionXLPipeline)
        self.guidance_scale = settings.guidance_scale if self.conditional else 1.0
        self.prepare(settings)
        if settings.lora_rank:
            self.weights = add_lora(self.unet, settings.lora_rank)
        else:
            self.weights = list(self.unet.requires_grad_(True).parameters())
        if not self.weights:
            raise UserError(f"--model {settings.model} has no attention for a LoRA; train the whole of it with --lora-rank 0")
        if settings.init_lora:
            init_lora(self.unet, settings.init_lora)

        # DDIM's own default is to clip x_0 to the range of pixels; latents must not be, unless the model's config says so.
        self.scheduler = DDIMScheduler.from_config({"clip_sample": not self.conditional, **pipe.scheduler.config})
        if settings.steps > self.scheduler.config.num_train_timesteps:
            raise UserError(f"--steps {settings.steps}: the model knows {self.scheduler.config.num_train_timesteps} timesteps")
        self.scheduler.set_timesteps(settings.steps, device=device)
        for name in ("alphas_cumprod", "final_alpha_cumprod"):  # no copy to the GPU, which would hold it up, in any step
            setattr(self.scheduler, name, getattr(self.scheduler, name).to(device))
        # A deterministic step has no log-probability, so there is nothing to learn from it. Nearly deterministic ones are
        # worth leaving out too: their noise does not show in the image, but their gradient, in 1 / std, drowns the others'.
        t, zero = self.scheduler.timesteps, torch.zeros(settings.steps, 1, 1, 1, device=device)
        std = ddim_mean_std(self.scheduler, zero, t, zero, settings.eta)[1].flatten()  # (T,); it depends on t alone
        self.trained_steps = (std > settings.min_std).nonzero().flatten()
        if not len(self.trained_steps):
            raise UserError(f"no step has an std above --min-std {settings.min_std}: nothing to learn from; use more --steps")
        self.steps_learned = max(1, round(settings.train_steps_fraction * len(self.trained_steps)))  # of an image in an epoch
        size = self.unet.config.sample_size
        if not size:
            raise UserError(f"--model {settings.model}: its UNet's config has no sample_size; write the height of latents there")
        self.latent_shape = (self.unet.config.in_channels, *([size, size] if isinstance(size, int) else size))  # (C, H, W)
        self.clip_range = settings.clip_range or 1.6384 / math.prod(self.latent_shape)
        if self.xl:  # original size, crop and target size
            height, width = (side * pipe.vae_scale_factor for side in self.latent_shape[1:])
            self.time_ids = torch.tensor([[height, width, 0, 0, height, width]], device=device)
        self.rows, self.table = {}, []  # of each encoded prompt the row in the tables of embeddings
        self.compiled = settings.compile
        self.micro_batch = settings.micro_batch or self.fitting_pairs(settings.sample_batch)
        if self.compiled:
            self.unet.compile(dynamic=False)  # a graph for each shape: one for all would not round like the first one

    def prepare(self, settings):
        """Precision, memory layout and attention, as the device likes them."""
        # Frozen weights in half precision save memory, which is what a GPU is short of; elsewhere autocast casts them as it
        # goes. Trained ones stay in float32. So does a VAE if bf16, too coarse for 256 levels of grey, or fp16 would spoil it.
        frozen = self.dtype if self.device.type == "cuda" else torch.float32
        for name, part in self.pipe.components.items():
            if isinstance(part, nn.Module):
                delicate = name == "vae" and (frozen == torch.bfloat16 or self.xl and part.config.force_upcast)
                exact = delicate or name == "unet" and not settings.lora_rank
                part.requires_grad_(False).to(self.device, torch.float32 if exact else frozen)
        self.unet.eval()  # dropout would make the ratio differ from 1
        if self.device.type == "cpu":
            for part in self.unet.modules():
                if isinstance(part, Attention):
                    part.set_processor(AttnProcessor())  # the fused one's backward pass is several times slower there
        if self.device.type == "cuda":
            self.unet.to(memory_format=torch.channels_last)  # what a GPU's convolutions want, and a CPU's do not
            torch.set_float32_matmul_precision("high")  # TF32 where float32 remains
            if self.conditional:
                self.pipe.vae.enable_slicing()  # decodes image by image: gigabytes less, hardly slower
        if settings.grad_checkpointing:
            self.unet.enable_gradient_checkpointing()

    @torch.no_grad()
    def encode(self, prompts):
        """Prompts -> cond (B,), their rows in the tables of embeddings. Each is encoded once; row 0 is for no prompt."""
        for prompt in [p for p in dict.fromkeys(prompts) if p not in self.rows]:
            self.rows[prompt] = len(self.rows) + 1
            if self.conditional:
                flags = {"device": self.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
                encoded = self.pipe.encode_prompt(prompt=prompt, **flags)  # with and without prompt; in XL then both pooled
                rows, empty = encoded[::2], encoded[1::2]
                self.table = [torch.cat(part).to(self.unet.dtype) for part in zip(self.table or empty, rows)]
        return torch.tensor([self.rows[p] for p in prompts], device=self.device)

    def predict(self, x_t, t, cond):
        """The network's output eps(x_t, t, c) for x_t (B, C, H, W), t (B,), cond (B,), in float32, with classifier-free
        guidance: eps_uncond + scale * (eps_cond - eps_uncond)."""
        guided, context = self.guidance_scale > 1, {}
        if guided:
            x_t, t, cond = torch.cat([x_t, x_t]), t.repeat(2), torch.cat([torch.zeros_like(cond), cond])
        if self.conditional:
            context["encoder_hidden_states"] = self.table[0][cond]
        if self.xl:
            context["added_cond_kwargs"] = {"text_embeds": self.table[1][cond], "time_ids": self.time_ids.expand(len(cond), -1)}
        learning = torch.is_grad_enabled()
        # A network compiled for gradients rounds in other places than one that is not, so when compiled it samples as it learns.
        with (
            torch.set_grad_enabled(learning or self.compiled),
            torch.autocast(self.device.type, self.dtype, enabled=self.unet.dtype != self.dtype),
        ):
            eps = self.unet(x_t.to(self.unet.dtype), t, **context).sample.float()
        eps = eps if learning else eps.detach()
        if guided:
            uncond, conditional = eps.chunk(2)
            eps = uncond + self.guidance_scale * (conditional - uncond)
        return eps

    def fitting_pairs(self, most):
        """How many (image, step) pairs may go through the network at once: `most`, the number of images that are sampled at
        once, so that half precision rounds both alike and the ratio is 1. Fewer, a power of 2, if they would take more than
        80 % of a GPU's free memory, going by what the second of two pairs takes."""
        if self.device.type != "cuda":
            return most
        free, peaks, t = torch.cuda.mem_get_info(self.device)[0], [], self.scheduler.timesteps
        free -= 12 * sum(p.numel() for p in self.weights)  # their gradients and AdamW's moments are still to come
        for pairs in (1, 2):
            torch.cuda.reset_peak_memory_stats(self.device)
            x_t = self.scheduler.alphas_cumprod.new_zeros(pairs, *self.latent_shape)
            torch.autograd.grad(self.predict(x_t, t[:1].expand(pairs), self.encode([""] * pairs)).sum(), self.weights)
            peaks.append(torch.cuda.max_memory_allocated(self.device))
        fit = 0.8 * free / max(1, peaks[1] - peaks[0])
        return most if fit >= most else 2 ** int(math.log2(max(1, fit)))

    @torch.no_grad()
    def decode(self, x_0):
        """Latents (B, C, H, W) -> images (B, 3, height, width), float32 in [0, 1]."""
        if self.conditional:
            vae = self.pipe.vae
            x_0 = vae.decode(x_0.to(vae.dtype) / vae.config.scaling_factor).sample
        return (x_0.float() / 2 + 0.5).clamp(0, 1).expand(-1, 3, -1, -1)  # a model of pixels may be grey


def load_pipeline(model):
    """Open a pipeline of a kind that can be trained here, from a hub id or a folder, without a safety checker."""
    path = model_path(model).as_posix()
    kinds = {"StableDiffusionPipeline": {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
             "StableDiffusionXLPipeline": {"add_watermarker": False}, "DDPMPipeline": {}, "DDIMPipeline": {}}  # fmt: skip
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    found = "the folder holds no complete pipeline" if os.path.isdir(path) else "no such folder, and the hub gives none"
    with explained(f"--model {model}: {found}; name a folder with a model_index.json, or a hub id"):
        kind = DiffusionPipeline.load_config(path).get("_class_name")
        if kind not in kinds:
            raise UserError(f"--model {model} is a {kind}; what works: {', '.join(kinds)}")
        return getattr(diffusers, kind).from_pretrained(path, **kinds[kind])


# ---------------------------------------------------------------- one DDIM step with its log-probability


def ddim_mean_std(scheduler, model_output, t, x_t, eta=1.0):
    """Mean (B, C, H, W) and std (B, 1, 1, 1) of p(x_{t-1} | x_t), Song et al. 2021 (DDIM), equations 12 and 16, in float32.
    Timesteps t (B,) may differ within the batch; `scheduler.set_timesteps` must have been called."""
    config, x_t, model_output = scheduler.config, x_t.float(), model_output.float()
    abar = scheduler.alphas_cumprod.to(x_t.device)
    t_prev = t - config.num_train_timesteps // scheduler.num_inference_steps
    abar_t = abar[t].view(-1, 1, 1, 1)
    abar_prev = torch.where(t_prev >= 0, abar[t_prev.clamp(min=0)], scheduler.final_alpha_cumprod.to(abar)).view(-1, 1, 1, 1)

    signal, sigma = abar_t.sqrt(), (1 - abar_t).sqrt()  # x_t = signal * x_0 + sigma * eps
    if config.prediction_type == "epsilon":
        eps, x_0 = model_output, (x_t - sigma * model_output) / signal
    elif config.prediction_type == "v_prediction":
        eps, x_0 = signal * model_output + sigma * x_t, signal * x_t - sigma * model_output
    else:  # "sample"
        eps, x_0 = (x_t - signal * model_output) / sigma, model_output
    if config.thresholding:
        x_0 = scheduler._threshold_sample(x_0)
    elif config.clip_sample:
        x_0 = x_0.clamp(-config.clip_sample_range, config.clip_sample_range)

    std = eta * ((1 - abar_prev) / (1 - abar_t) * (1 - abar_t / abar_prev)).sqrt()
    mean = abar_prev.sqrt() * x_0 + (1 - abar_prev - std**2).clamp(min=0).sqrt() * eps
    return mean, std


def ddim_step(scheduler, model_output, t, x_t, eta=1.0, x_prev=None, generator=None):
    """One denoising step and its log-probability: draws x_{t-1} ~ N(mean, std^2), or scores `x_prev` if it is given.

    Returns x_prev (B, C, H, W) in x_t's dtype and logp (B,) float32, the *mean* over the C * H * W dimensions of
    log N(x_prev; mean, std^2), as in the paper's code. Where std is 0 the step is deterministic: logp is 0, without gradient."""
    mean, std = ddim_mean_std(scheduler, model_output, t, x_t, eta)
    if x_prev is None:
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        x_prev = (mean + std * noise).detach().to(x_t.dtype)
    random = std > 0
    std = torch.where(random, std, 1)
    z = (x_prev.float() - mean) / std  # of x_prev as it is stored, be it rounded to half precision
    logp = torch.where(random, -(z**2) / 2 - std.log() - math.log(2 * math.pi) / 2, 0)  # (B, C, H, W)
    return x_prev, logp.mean((1, 2, 3))


# ---------------------------------------------------------------- rollout


@torch.no_grad()
def rollout(policy, prompts, eta, generator):
    """Sample one image for each of B prompts. Returns the trajectory x (B, T+1, C, H, W), noise first, and logp (B, T)."""
    cond = policy.encode(prompts)
    x = [torch.randn(len(prompts), *policy.latent_shape, generator=generator, device=policy.device)]
    logps = []
    for t in policy.scheduler.timesteps:
        t = t.expand(len(prompts))
        x_prev, logp = ddim_step(policy.scheduler, policy.predict(x[-1], t, cond), t, x[-1], eta, generator=generator)
        x.append(x_prev)
        logps.append(logp)
    return torch.stack(x, 1), torch.stack(logps, 1)


@torch.no_grad()
def score(terms, images, prompts):
    """r(x_0, c), the weighted sum of the K rewards in `terms`, and each of them: (B, 1 + K) float32."""
    total, columns, n = 0, [], len(prompts)
    for label, weight, reward_fn in terms:
        try:
            reward = torch.as_tensor(reward_fn(images, prompts)).detach().float().cpu()
        except (UserError, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            where = [frame for frame in frames if "-packages" not in frame.filename][-1]  # the user's line, not torch's
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"reward {label} failed at {prompts[0]!r}: {what} ({where.filename}, line {where.lineno})") from error
        if reward.shape != (n,):
            raise UserError(f"reward {label} returned shape {tuple(reward.shape)} for {n} images; it must be ({n},)")
        if not reward.isfinite().all():
            bad = int((~reward.isfinite()).nonzero()[0])
            raise UserError(f"reward {label} returned {reward[bad]} for the prompt {prompts[bad]!r}; it must be finite")
        columns.append(reward)
        total += weight * reward
    return torch.stack([total, *columns], 1)


def sample(policy, terms, prompts, settings, generator, tick=lambda: None):
    """Roll out and score any number of prompts in batches. Returns x (N, T+1, C, H, W), logp (N, T), scores (N, 1 + K)."""
    parts, scores = [], []
    with ThreadPoolExecutor(1) as scorer:  # scores a batch while the next one is sampled; one thread, so always in order
        for i in range(0, len(prompts), settings.sample_batch):
            batch = prompts[i : i + settings.sample_batch]
            if len(scores) > 1:
                scores[-2].result()  # no more than one batch is scored behind: what fails or is stopped there ends here
            parts.append(rollout(policy, batch, settings.eta, generator))
            scores.append(scorer.submit(score, terms, policy.decode(parts[-1][0][:, -1]), batch))
            tick()
    x, logp = (torch.cat(part) for part in zip(*parts))
    return x, logp, torch.cat([future.result() for future in scores])


# ---------------------------------------------------------------- advantages


class PromptStats:
    """Running rewards of each prompt. They play the part of the value function: an advantage compares a reward with what the
    same prompt usually gets. A prompt with fewer than `min_count` rewards falls back on the whole batch's."""

    def __init__(self, buffer_size=32, min_count=16):
        self.buffer_size, self.min_count, self.buffers = buffer_size, min_count, {}

    def advantages(self, prompts, rewards):
        """Remember the rewards (B,) of the B prompts; return (rewards - mean) / std, (B,) float32."""
        rewards = np.asarray(rewards, dtype=np.float64)  # integers would cut the advantages off
        if rewards.shape != (len(prompts),):
            raise ValueError(f"{len(prompts)} prompts need rewards of shape ({len(prompts)},), not {rewards.shape}")
        for prompt, reward in zip(prompts, rewards.tolist()):
            self.buffers.setdefault(prompt, []).append(reward)
        for prompt, count in Counter(prompts).items():  # remember at least those of this batch: there may be only one prompt
            self.buffers[prompt] = self.buffers[prompt][-max(self.buffer_size, count) :]
        own = [self.buffers[p] if len(self.buffers[p]) >= self.min_count else rewards for p in prompts]
        adv = [(r - np.mean(past)) / (np.std(past) + 1e-6) for r, past in zip(rewards, own)]
        return torch.tensor(adv, dtype=torch.float32)


# ---------------------------------------------------------------- objectives, and how far they have led


def clipped_loss(logp, logp_old, adv, clip_range):
    """DDPO-IS (section 4.3): importance sampling with PPO's clip, for each pair, (B,). Allows several updates on the same
    samples: beyond the clip range a pair that the update already favours stops pulling."""
    ratio = torch.exp(logp - logp_old)
    return torch.maximum(-adv * ratio, -adv * ratio.clamp(1 - clip_range, 1 + clip_range))


def reinforce_loss(logp, adv):
    """DDPO-SF (section 4.3): the score function estimator, for each pair, (B,). Right only for samples of the present policy."""
    return -adv * logp


def kl_to_pretrained(policy, eps, x_t, t, cond, eta):
    """KL(p_theta || p_pretrained) of denoising steps in nats, (B,). The two Gaussians share their std, so it is exact:
    ||mean - mean_pretrained||^2 / (2 std^2). Summed over a trajectory it bounds the KL between the two models' images."""
    with without_lora(), torch.no_grad():
        eps_pretrained = policy.predict(x_t, t, cond)
    mean, std = ddim_mean_std(policy.scheduler, eps, t, x_t, eta)
    mean_pretrained, _ = ddim_mean_std(policy.scheduler, eps_pretrained, t, x_t, eta)
    return ((mean - mean_pretrained) ** 2).sum((1, 2, 3)) / (2 * std.flatten() ** 2)


@torch.no_grad()
def measure_kl(policy, x, cond, settings, generator):
    """Nats per trajectory between the policy that sampled x (N, T+1, C, H, W) and the pretrained model: an unbiased estimate,
    from the trained steps of a sixteenth of the images: a thirtieth of an epoch's cost. With min_std 0 it is the bound."""
    images = torch.randperm(len(x), generator=generator)[: math.ceil(len(x) / 16)].to(x.device)
    total, t = 0.0, policy.scheduler.timesteps
    for i, j in (micro.unbind(1) for micro in torch.cartesian_prod(images, policy.trained_steps).split(policy.micro_batch)):
        eps = policy.predict(x[i, j], t[j], cond[i])
        total += kl_to_pretrained(policy, eps, x[i, j], t[j], cond[i], settings.eta).sum()
    return float(total) / len(images)


def spread(x_0, prompts):
    """Mean distance between the final latents (N, C, H, W) of the same prompt; None if no prompt has two."""
    groups = [[i for i, p in enumerate(prompts) if p == prompt] for prompt in dict.fromkeys(prompts)]
    # On the CPU, because not every device has this function.
    distances = torch.cat([torch.pdist(x_0[group].flatten(1).cpu()) for group in groups])
    return distances.mean().item() if len(distances) else None


# ---------------------------------------------------------------- update


def update(run, samples, generator, tick=lambda: None):
    """One epoch of learning: deal the N images into `updates_per_epoch` minibatches, take one optimizer step on each.

    samples: x (N, T+1, C, H, W), logp_old (N, T), cond (N,), adv (N,). A minibatch's gradient is the mean over its (image,
    step) pairs, summed up in micro-batches. One that is not finite is skipped. Returns the epoch's metrics."""
    (x, logp_old, cond, adv), settings, policy = samples, run.settings, run.policy
    totals, ratio_errors, grad_norms = torch.zeros(3, device=x.device), [], []
    images = torch.randperm(len(x), generator=generator).to(x.device)
    images = images[adv[images].abs() >= adv.abs().max().clamp(max=settings.adv_min)]  # all of them if that is 0; one at least
    for minibatch in images.chunk(settings.updates_per_epoch):
        # Each image has its own random steps, so the gradient is that of all steps in expectation.
        order = torch.rand(len(minibatch), len(policy.trained_steps), generator=generator).to(x.device)
        steps = policy.trained_steps[order.topk(policy.steps_learned).indices.sort().values]  # (images, steps)
        pairs = torch.stack([minibatch.repeat_interleave(steps.shape[1]), steps.flatten()], 1)  # (images * steps, 2)
        for i, j in (micro.unbind(1) for micro in pairs.split(policy.micro_batch)):
            x_t, x_prev, t, c = x[i, j], x[i, j + 1], policy.scheduler.timesteps[j], cond[i]
            eps = policy.predict(x_t, t, c)
            _, logp = ddim_step(policy.scheduler, eps, t, x_t, settings.eta, x_prev=x_prev)
            if settings.objective == "clipped":
                loss = clipped_loss(logp, logp_old[i, j], adv[i], policy.clip_range)
            else:
                loss = reinforce_loss(logp, adv[i])
            if settings.kl_coef:  # logp is a mean over dimensions, so the KL is too: a nat costs kl_coef in advantage
                kl = kl_to_pretrained(policy, eps, x_t, t, c, settings.eta)
                loss = loss + settings.kl_coef * kl / x_t[0].numel()
            run.scaler.scale(loss.sum() / len(pairs)).backward()
            with torch.no_grad():
                log_ratio = logp - logp_old[i, j]
                off = (log_ratio.exp() - 1).abs()
                if not grad_norms:  # nothing has been updated yet, so these should be 0
                    ratio_errors.append(off.max())
                totals += torch.stack([loss.sum(), (off > policy.clip_range).sum(), (log_ratio**2).sum() / 2])
        run.scaler.unscale_(run.optimizer)
        grad_norms.append(nn.utils.clip_grad_norm_(policy.weights, settings.grad_clip).item())
        if math.isfinite(grad_norms[-1]):  # a loss or log-probability that is not finite shows here too
            run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad()
        tick()
    loss, clip_fraction, approx_kl = (totals / (len(images) * policy.steps_learned)).tolist()
    ratio_error, skipped = torch.stack(ratio_errors).max().item(), sum(not math.isfinite(norm) for norm in grad_norms)
    return {"loss": loss, "ratio_error": ratio_error, "clip_fraction": clip_fraction, "approx_kl": approx_kl,
            "grad_norm": float(np.mean(grad_norms)), "skipped": skipped}  # fmt: skip


# ---------------------------------------------------------------- the run folder: state, settings, metrics, pictures


@contextmanager
def whole_file(path):
    """A temporary name to write to, which becomes `path` once all is on the disk: a kill leaves the old file or the new one."""
    tmp = path.with_name(path.name + ".tmp")
    with explained(f"cannot write {path}; what was saved before is whole"):
        try:
            yield tmp
            with open(tmp, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(tmp, path)
        finally:
            tmp.unlink(missing_ok=True)  # what Ctrl-C or a full disk left half


def random_numbers(settings, epoch, device):
    """Generators for the images and for prompts and batches. They depend on the seed and the epoch's number alone, so a resumed
    run draws what it would have drawn; evaluations are epoch 0. Also seeds the global ones, for rewards that use them."""
    seed = (1_000_000 * settings.seed + epoch) % 2**32
    transformers.set_seed(seed)
    return torch.Generator(device).manual_seed(seed), torch.Generator().manual_seed(seed)


STATES = "state_" + 5 * "[0-9]" + ".pt"  # not the copies that somebody keeps under other names


class Run:
    """All that the next epoch depends on besides the settings: what --resume needs."""

    def __init__(self, settings, policy):
        self.settings, self.policy = settings, policy
        fused, decay = policy.device.type == "cuda", settings.weight_decay
        self.optimizer = torch.optim.AdamW(policy.weights, settings.lr, (0.9, 0.999), 1e-8, decay, fused=fused)
        self.scaler = torch.amp.GradScaler(policy.device.type, enabled=policy.dtype == torch.float16)
        group = settings.samples_per_prompt  # it can be compared with itself, so it need not wait for stats_min_count rewards
        enough = min(settings.stats_min_count, group) if group > 1 else settings.stats_min_count
        self.stats = PromptStats(settings.stats_buffer, enough)
        self.log, self.first_spread = [], None  # the rows of metrics.csv, one an epoch; the first epoch's `spread`

    def too_far(self, row):
        """Whether the KL of an epoch is past --kl-stop."""
        return 0 < self.settings.kl_stop < (row.get("kl") or 0)

    def save(self, folder):
        """Write the state after the newest epoch; the one before it is kept too."""
        state = {"weights": self.policy.weights, "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                 "stats": self.stats.buffers, "log": self.log, "first_spread": self.first_spread}  # fmt: skip
        path = folder / f"state_{self.log[-1]['epoch']:05d}.pt"
        with whole_file(path) as tmp, open(tmp, "wb") as file:
            torch.save(state, file)
        states = sorted(folder.glob(STATES))
        now = states.index(path)
        for old in states[: max(now - 1, 0)] + states[now + 1 :]:  # later ones are of a branch that was left by resuming before
            old.unlink()

    def load(self, path):
        """Take over a saved state; UserError if the file is damaged or of another kind of run."""
        earlier = [f"--resume {p}" for p in sorted(path.parent.glob(STATES)) if p < path]
        with explained(f"{path} is damaged or of another kind of run; before it: {earlier[-1] if earlier else 'none'}"):
            if broken := ZipFile(path).testzip():
                raise ValueError(f"the checksum of {broken} is wrong")  # torch does not look at it
            state = torch.load(path, map_location="cpu", weights_only=True)  # a stranger's file must not run code
            for weight, saved in zip(self.policy.weights, state["weights"], strict=True):
                weight.data.copy_(saved)
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.stats.buffers, self.log, self.first_spread = state["stats"], state["log"], state["first_spread"]
        for group in self.optimizer.param_groups:
            group.update(lr=self.settings.lr, weight_decay=self.settings.weight_decay)


CHANGEABLE = """epochs lr weight_decay grad_clip kl_stop save_every eval_every micro_batch grad_checkpointing compile
                reward_batch_size reward_device""".split()


def reopen(name, flags):
    """Settings, folder and state file (None before the first) of the run to go on with: `name` is its folder or one of its
    state files, or empty for the newest run in runs/. Only settings that do not make it another experiment may change."""
    runs = sorted(Path("runs").glob("*/config.json"), key=lambda p: p.parent.stat().st_mtime)
    if not name and not runs:
        raise UserError("--resume: there is no run in runs/; name its folder")
    path = Path(name) if name else runs[-1].parent
    folder = path.parent if path.is_file() else path
    if not (folder / "config.json").is_file():
        raise UserError(f"--resume {path}: no run there; name a folder with a config.json, or a state file in one")
    old = make_settings({}, folder / "config.json")
    changes = {f: f"--{f.replace('_', '-')} {getattr(old, f)} -> {flags[f]}" for f in flags if flags[f] != getattr(old, f)}
    if refused := [text for f, text in changes.items() if f not in CHANGEABLE]:
        raise UserError(f"--resume {folder}: {', '.join(refused)} would make it another experiment; start a new run")
    new = replace(old, **flags)
    newest = max(folder.glob(STATES), default=None)
    state = path if path.is_file() else newest
    back = ["later epochs will be written over"] if state != newest else []
    print("resumes  " + ", ".join([str(state or folder), *changes.values(), *back]))
    return new, folder, state


def make_run_folder(settings):
    """A new folder for this run; one that holds anything is never written to."""
    base = "runs/" + re.sub(r"[^\w.-]+", "_", settings.reward).strip("_")
    names = (base + (f"-{n}" if n > 1 else "") for n in itertools.count(1))
    with explained(f"--out {settings.out or base}: cannot make that folder"):
        folder = Path(settings.out or next(name for name in names if not os.path.exists(name)))
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"--out {folder} is not empty; name another folder, or leave --out away (or --resume {folder})")
        (folder / "samples").mkdir(parents=True)
    return folder


def write_config(settings, folder, device):
    """config.json: the settings, for --config and --resume, and what the run is made with."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    failed, commit = subprocess.getstatusoutput(f"git -C {shlex.quote(str(EXAMPLES))} describe --always --dirty --abbrev=40")
    made_with = {library.__name__: library.__version__ for library in (torch, diffusers, transformers)}
    made_with |= {"device": name, "git": None if failed else commit}
    with whole_file(folder / "config.json") as tmp:
        tmp.write_text(json.dumps({**asdict(settings), "made_with": made_with}, indent=2) + "\n")


COLUMNS = """epoch queries seconds reward_mean reward_std eval_reward kl diversity
             loss ratio_error clip_fraction approx_kl grad_norm skipped""".split()


def write_metrics(log, folder):
    """metrics.csv, from the rows of all epochs: COLUMNS, and the rewards' own if there are several."""
    with whole_file(folder / "metrics.csv") as tmp, open(tmp, "w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys([*COLUMNS, *log[-1]]))
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in log)


def evaluate(policy, terms, prompts, settings, folder, epoch):
    """Sample the same prompts from the same noise every time, save them below those of epoch 0, return the mean reward."""
    prompts = [prompts[i % len(prompts)] for i in range(settings.eval_images)]
    terms = [term for term in terms if term[1]] or terms  # not the monitors
    x, _, scores = sample(policy, terms, prompts, settings, random_numbers(settings, 0, policy.device)[0])
    reward, tiles = scores[:, 0], []
    for x_0, prompt, r in zip(x[:, -1].split(1), prompts, reward.tolist()):
        image = rewards.to_pil(policy.decode(x_0))[0].resize((140, 140), Image.BICUBIC)
        tiles.append(ImageOps.expand(image, (2, 2, 2, 18), "white"))
        ImageDraw.Draw(tiles[-1]).text((2, 144), f"{prompt[:16]}  {r:.2f}", fill="black")
    first, path = (folder / "samples" / f"epoch_{n:04d}.png" for n in (0, epoch))
    rows = [*([Image.open(first)] if epoch and first.is_file() else []), make_image_grid(tiles, 1, len(tiles))]
    with whole_file(path) as tmp:
        make_image_grid(rows, len(rows), 1).save(tmp, "PNG")
    return reward.mean().item()


# ---------------------------------------------------------------- train, main


def train(run, terms, prompts, eval_prompts, folder):
    """The epochs of DDPO: draw prompts, sample and score, compare, update, evaluate, log, save."""
    settings, policy, log, group = run.settings, run.policy, run.log, run.settings.samples_per_prompt
    ticks, start = math.ceil(settings.images_per_epoch / settings.sample_batch) + settings.updates_per_epoch, time.time()
    if log:
        start -= log[-1]["seconds"]
    else:
        before = evaluate(policy, terms, eval_prompts, settings, folder, 0)
        log.append({"epoch": 0, "queries": 0, "eval_reward": before, "seconds": time.time() - start})
    bar = tqdm(total=settings.epochs * ticks, initial=log[-1]["epoch"] * ticks, unit="batch")
    while log[-1]["epoch"] < settings.epochs and not run.too_far(log[-1]):
        epoch = log[-1]["epoch"] + 1
        noise, choice = random_numbers(settings, epoch, policy.device)
        chosen = torch.randint(len(prompts), (settings.images_per_epoch // group,), generator=choice)
        drawn = [prompts[i] for i in chosen for _ in range(group)]
        x, logp_old, scores = sample(policy, terms, drawn, settings, noise, bar.update)
        reward, cond = scores[:, 0], policy.encode(drawn)
        adv = run.stats.advantages(drawn, reward).clamp(-settings.adv_clip, settings.adv_clip).to(policy.device)

        row = {"epoch": epoch, "queries": epoch * len(drawn), **describe(run, terms, drawn, x, cond, scores, choice)}
        if not run.too_far(row):
            row |= update(run, (x, logp_old, cond, adv), choice, bar.update)
        last = epoch == settings.epochs or run.too_far(row)
        if last or epoch % settings.eval_every == 0:
            row["eval_reward"] = evaluate(policy, terms, eval_prompts, settings, folder, epoch)
        row["seconds"] = time.time() - start
        log.append(row)
        write_metrics(log, folder)
        if last or epoch % settings.save_every == 0:
            if settings.lora_rank:
                save_lora(policy.unet, folder / "pytorch_lora_weights.safetensors")
            run.save(folder)
        report(run, row, bar)
        if all(past.get("skipped") == settings.updates_per_epoch for past in log[-3:]):
            raise UserError(f"no update of 3 epochs was finite; {folder} has the weights before them: try a lower --lr or fp32")
    bar.close()
    if run.too_far(log[-1]):
        print(f"stopped at {log[-1]['kl']:.1f} nats from the pretrained model, past --kl-stop {settings.kl_stop}")


def describe(run, terms, prompts, x, cond, scores, generator):
    """What the samples of an epoch tell, for metrics.csv: their rewards, KL and diversity."""
    reward, means, distance = scores[:, 0], scores.mean(0)[1:].tolist(), spread(x[:, -1], prompts)
    run.first_spread = run.first_spread or distance
    row = {"reward_mean": reward.mean().item(), "reward_std": reward.std().item()}
    row |= {label: mean for (label, _, _), mean in zip(terms, means) if len(terms) > 1}
    row["kl"] = measure_kl(run.policy, x, cond, run.settings, generator) if run.settings.lora_rank else None
    row["diversity"] = distance and distance / run.first_spread
    return row


def report(run, row, bar):
    """Print an epoch's results, and what is wrong with them."""
    bar.write("epoch {epoch:3d}  reward {reward_mean:.3f} +- {reward_std:.3f}  {seconds:.0f} s".format(**row))
    bar.set_postfix({column: row[column] for column in ("reward_mean", "kl") if row[column] is not None})
    if row["epoch"] == 1 and row.get("ratio_error", 0) > run.policy.clip_range / 10:
        off = f"note     before any update the ratio is off 1 by {row['ratio_error']:.1g}, too much beside the clip range"
        bar.write(f"{off}: give --micro-batch the value of --sample-batch, or use --precision fp32")
    if row.get("skipped"):
        bar.write(f"epoch {row['epoch']:3d}  {row['skipped']} of {run.settings.updates_per_epoch} updates skipped: not finite")


def launch(settings, folder=None, state=None):
    """Set up a run, or the one in `folder` again from its file `state`, train, and say what came of it. Returns the folder."""
    prompts = load_prompts(settings.prompts)
    eval_prompts = load_prompts(settings.eval_prompts, "--eval-prompts") if settings.eval_prompts else prompts
    device = pick_device(settings.device)
    reward_device = pick_device(settings.reward_device, "--reward-device") if settings.reward_device else device
    terms = rewards.load_rewards(settings.reward, settings.monitor, reward_device, settings.reward_batch_size)
    if taken := [label for label, _, _ in terms if label in COLUMNS]:
        raise UserError(f"the reward {taken[0]} has the name of a column of metrics.csv: rename the function")
    random_numbers(settings, 0, device)  # seeds the LoRA
    torch.set_flush_denormal(True)  # denormal numbers make a CPU crawl
    policy = Policy(replace(settings, init_lora="") if state else settings, device)
    if not policy.conditional:
        prompts = eval_prompts = [""]
    run = Run(settings, policy)
    if state:
        run.load(state)
    folder = folder or make_run_folder(settings)
    write_config(settings, folder, device)
    introduce(settings, policy, prompts, folder)
    try:
        train(run, terms, prompts, eval_prompts, folder)
        if not settings.lora_rank:
            with explained(f"cannot write {folder / 'pipeline'}; what was saved before is whole"):
                policy.pipe.to(torch.float32).save_pretrained(folder / "pipeline")
    except KeyboardInterrupt:
        raise UserError(f"stopped; go on with: python ddpo.py --resume {shlex.quote(str(folder))}") from None
    conclude(run, folder)
    return folder


def introduce(settings, policy, prompts, folder):
    """Say what is about to run, and what it will cost."""
    s, pairs = settings, settings.images_per_epoch * policy.steps_learned
    bundled = " (the bundled one; for Stable Diffusion: --model stable-diffusion-v1-5/stable-diffusion-v1-5)"
    print(f"model    {s.model}{bundled if s.model == Settings.model else ''}")
    print(f"reward   {s.reward}, " + (f"{len(prompts)} prompts" if policy.conditional else "no prompts"))
    print(f"trains   {sum(p.numel() for p in policy.weights):,} weights on {policy.device} in {str(policy.dtype)[6:]}")
    print(f"epoch    {s.images_per_epoch} images of {s.steps} steps; {pairs} (image, step) pairs, {s.updates_per_epoch} updates; "
          f"{s.sample_batch} images and {policy.micro_batch} pairs at once")  # fmt: skip
    print(f"run      {s.epochs} epochs = {s.epochs * s.images_per_epoch} reward queries; results go to {folder}", flush=True)


def conclude(run, folder):
    """Say what came of a run, and how to use it."""
    evaluated = [row for row in run.log if "eval_reward" in row]
    before, after = evaluated[0]["eval_reward"], evaluated[-1]["eval_reward"]
    picture = folder / "samples" / f"epoch_{evaluated[-1]['epoch']:04d}.png"
    print(f"\nReward on the same prompts and noise: {before:.3f} before, {after:.3f} after; see {picture}")
    if not run.settings.lora_rank:
        result = str(folder / "pipeline")
        print(f"The pipeline is in {result}; in diffusers: DiffusionPipeline.from_pretrained({result!r})")
    elif run.policy.conditional:
        print(f"The LoRA is in {folder}; in diffusers (with peft installed): pipe.load_lora_weights({str(folder)!r})")
    else:  # diffusers cannot load a LoRA there
        print(f"The LoRA is in {folder}; go on from it with --init-lora {folder / 'pytorch_lora_weights.safetensors'}")


def parse(argv=None):
    """The command line, in which every field of Settings is a flag, as the arguments of `launch`."""
    about = "Fine-tune a diffusion model on a reward with DDPO. A model folder's ddpo.json overrides the defaults shown here."
    parser = argparse.ArgumentParser("ddpo.py", description=about, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for f in fields(Settings):
        text = f"{f.metadata['help']} (default: {f.default!r})".replace("%", "%%")
        how = {"type": f.type, "metavar": f.type.__name__.upper()}
        how = {"action": argparse.BooleanOptionalAction} if f.type is bool else how
        parser.add_argument("--" + f.name.replace("_", "-"), **how, help=text)
    parser.add_argument("--config", metavar="FILE", help="settings from a run's config.json, but for --out; flags override them")
    parser.add_argument("--resume", nargs="?", const="", metavar="RUN",
                        help="go on with a run: its folder or a state file in it; by default the newest in runs/")  # fmt: skip
    parser.error = lambda message: parser.exit(2, f"ddpo.py: error: {message}; see --help\n")  # one line, not the usage of all
    flags = vars(parser.parse_args(argv))
    config, resume = flags.pop("config", None), flags.pop("resume", None)
    if config and resume is not None:
        raise UserError("--config starts a new run, --resume goes on with an old one: use one of them")
    if resume is not None:
        return reopen(resume, flags)
    return make_settings({"out": "", **flags} if config else flags, config), None, None  # not into the old run's folder


def main(argv=None):
    """Run from the command line; a mistake ends in one line and a non-zero status."""
    try:
        settings, folder, state = parse(argv)
        launch(settings, folder, state)
    except UserError as error:
        sys.exit(f"ddpo.py: error: {error}")
    except torch.cuda.OutOfMemoryError:
        micro_batch = settings.micro_batch or f"0 (up to {settings.sample_batch})"
        knobs = f"--micro-batch {micro_batch}, --sample-batch {settings.sample_batch}, --precision {settings.precision}"
        more = "" if settings.grad_checkpointing else "; --grad-checkpointing needs less"
        sys.exit(f"ddpo.py: error: out of GPU memory; present values: {knobs}{more}; what was saved can be resumed")
    except KeyboardInterrupt:
        sys.exit("\nddpo.py: stopped; nothing had begun")


if __name__ == "__main__":
    main()
