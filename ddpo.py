"""DDPO: Denoising Diffusion Policy Optimization (Black et al., "Training Diffusion Models with Reinforcement Learning",
ICLR 2024, arXiv 2305.13301), for Stable Diffusion with LoRA, in one file.

    python ddpo.py --reward compressibility            # a small bundled model, on any machine, in minutes
    python ddpo.py --reward compressibility --model stable-diffusion-v1-5/stable-diffusion-v1-5      # needs a GPU

Denoising is a Markov decision process: the state is (c, t, x_t), the action is x_{t-1}, the policy is the Gaussian that
one denoising step draws it from, and a reward r(x_0, c) comes only at the end. So the policy gradient applies:

    for every epoch:
        draw prompts c and sample images x_T, ..., x_0, keeping every latent and its log-probability     (rollout)
        reward = r(x_0, c)                                                                               (score)
        adv = (reward - mean) / std, with the mean and std of earlier rewards of the same prompt         (PromptStats)
        for every (image, step) pair: ratio = p_theta(x_{t-1} | x_t, c) / p_theta_old(x_{t-1} | x_t, c)  (ddim_step)
            loss = max(-adv * ratio, -adv * clip(ratio, 1 - clip_range, 1 + clip_range))                 (clipped_loss)
        average the gradient over the pairs, step the optimizer                                          (update)

Names: x_t, x_prev (x_{t-1}); cond (the encoded c); eps (predicted noise, after guidance); mean, std, logp (of the
policy); logp_old (of the policy that sampled); B images, T denoising steps, latents of C x H x W.
Left out of the textbook algorithm: a value network (the statistics of each prompt take its place), a KL penalty (the clip
range bounds each update), discounting (the paper has none).
"""

import argparse
import csv
import dataclasses
import itertools
import json
import math
import os
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it remarks on packages that nothing here needs

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

import rewards
from rewards import UserError

# ---------------------------------------------------------------- settings


def option(default, help, least=None, above=None, choices=None):
    """A field of Settings: its default, one line of help, and the values that are allowed."""
    return field(default=default, metadata={"help": help, "least": least, "above": above, "choices": choices})


BUNDLED = Path(__file__).resolve().parent / "examples" / "emoji-diffusion"
ANIMALS = """cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard beetle
ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey fly llama camel
bat gorilla hedgehog kangaroo""".split()  # the paper's 45


@dataclass(frozen=True)
class Settings:
    """All settings of a run. The defaults are for Stable Diffusion on one GPU of 24 GB: the values of the authors' LoRA runs,
    with fewer images and steps in an epoch so that an epoch takes minutes. A model folder may bring its own in `ddpo.json`;
    the command line overrides both."""

    reward: str = option("compressibility", "what to maximise: a name from rewards.py")
    model: str = option("emoji-diffusion", "hub id or folder of a StableDiffusionPipeline; emoji-diffusion is the bundled one")
    prompts: str = option("animals", "animals (the paper's 45), or a text file with one prompt a line")
    out: str = option("", "run folder; empty means runs/REWARD, or runs/REWARD-2 and so on if that exists")
    seed: int = option(0, "seed of every random number", least=0)
    device: str = option("auto", "cuda, mps or cpu; auto takes the first of these that is there")
    precision: str = option("auto", "fp32, bf16 or fp16 in the network; auto: fp16 on cuda, bf16 on the cpu, else fp32",
                            choices=("auto", "fp32", "bf16", "fp16"))  # fmt: skip
    # sampling
    epochs: int = option(50, "rounds of sampling and training", least=1)
    images_per_epoch: int = option(64, "images sampled in an epoch (the paper: 256)", least=2)
    steps: int = option(20, "denoising steps of an image (the paper: 50)", least=1)
    guidance_scale: float = option(5.0, "classifier-free guidance, in sampling and training; none at 1 or below", least=0)
    eta: float = option(1.0, "noise in a DDIM step: 1 is DDPM's; at 0 there would be nothing to learn from", above=0)
    sample_batch: int = option(8, "images sampled at once: speed and memory (and which noise an image gets)", least=1)
    # learning
    objective: str = option("clipped", "clipped (DDPO-IS) or reinforce (DDPO-SF)", choices=("clipped", "reinforce"))
    updates_per_epoch: int = option(4, "optimizer steps in an epoch, each on its own share of the images", least=1)
    micro_batch: int = option(4, "(image, step) pairs in one network call; changes speed and memory only", least=1)
    lr: float = option(3e-4, "AdamW's learning rate", above=0)
    # The log-probability is a mean over the latent's dimensions, so 1e-4 on 4 x 64 x 64 of them clips the joint log-ratio
    # at 1.6 nats. A latent with 16 times fewer dimensions needs a range 16 times larger for the same trust in nats.
    clip_range: float = option(1e-4, "the ratio is clipped to 1 - this ... 1 + this", above=0)
    min_std: float = option(0.0, "only steps that add noise of more than this std are learned from (the paper: all)", least=0)
    adv_clip: float = option(5.0, "advantages are clipped to - this ... + this", above=0)
    lora_rank: int = option(4, "rank of the LoRA matrices", least=1)
    weight_decay: float = option(1e-4, "AdamW's weight decay", least=0)
    grad_clip: float = option(1.0, "the gradient's norm is clipped to this", above=0)
    stats_buffer: int = option(32, "rewards remembered of each prompt", least=1)
    stats_min_count: int = option(16, "with fewer rewards than this, a prompt is compared with the whole batch", least=1)
    # looking
    sample_every: int = option(5, "epochs between two pictures of the same prompts and noise", least=1)
    grid_images: int = option(12, "images in such a picture", least=1)

    def __post_init__(self):
        for f in dataclasses.fields(self):
            flag, value = "--" + f.name.replace("_", "-"), getattr(self, f.name)
            if f.type is float and type(value) is int:
                object.__setattr__(self, f.name, value := float(value))
            if type(value) is not f.type or (f.type is float and not math.isfinite(value)):
                raise UserError(f"{flag} must be a finite {f.type.__name__}, not {value!r}")
            least, above, choices = (f.metadata[k] for k in ("least", "above", "choices"))
            if least is not None and value < least:
                raise UserError(f"{flag} must be at least {least}, not {value}")
            if above is not None and value <= above:
                raise UserError(f"{flag} must be more than {above}, not {value}")
            if choices and value not in choices:
                raise UserError(f"{flag} must be one of {', '.join(choices)}, not {value!r}")
        if self.objective == "reinforce" and self.updates_per_epoch != 1:
            raise UserError("--objective reinforce needs fresh samples for every update: use --updates-per-epoch 1")
        if self.eta > 1:
            raise UserError(f"--eta must be at most 1, not {self.eta}")
        if self.stats_min_count > self.stats_buffer:
            raise UserError(f"--stats-min-count {self.stats_min_count} is never reached: --stats-buffer is {self.stats_buffer}")
        if self.images_per_epoch % self.updates_per_epoch:
            raise UserError(f"--images-per-epoch must be a multiple of --updates-per-epoch, {self.updates_per_epoch}")


def make_settings(flags):
    """Settings from the dataclass, the model folder's own `ddpo.json` and `flags`, the later ones overriding the earlier."""
    own = model_path(flags.get("model", Settings.model)) / "ddpo.json"
    try:
        values = {**dict(json.loads(own.read_text()) if own.is_file() else {}), **flags}
    except (ValueError, TypeError) as error:
        raise UserError(f"{own} must be a json object of settings: {error}") from None
    if unknown := values.keys() - {f.name for f in dataclasses.fields(Settings)}:
        raise UserError(f"{own}: there is no setting named {', '.join(sorted(unknown))}")
    if values.get("objective") == "reinforce":
        values["updates_per_epoch"] = flags.get("updates_per_epoch", 1)
    return Settings(**values)


def model_path(model):
    """The folder of the bundled model for its name; anything else (a folder or a hub id) unchanged."""
    return BUNDLED if model == Settings.model else Path(model)


def load_prompts(name):
    """The prompts of a set, or of a text file with one on each line that is not blank."""
    if name == "animals":
        return ANIMALS
    try:
        prompts = [line.strip() for line in Path(name).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {name}: neither 'animals' nor a readable text file ({error})") from None
    if not prompts:
        raise UserError(f"--prompts {name}: the file holds no prompt; write one on each line")
    return prompts


def pick_device(name):
    """The torch.device of that name, or the best one of this machine for "auto"."""
    present = [("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()), ("cpu", True)]
    usable = [kind for kind, there in present if there]
    if name not in ("auto", *usable):
        raise UserError(f"--device {name}: not on this machine; it has {', '.join(usable)}")
    return torch.device(usable[0] if name == "auto" else name)


# ---------------------------------------------------------------- LoRA


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained low-rank one: y = W x + B A x, with A (rank, in) and B (out, rank) in float32.
    B starts at zero, so the layer starts as the pretrained one."""

    def __init__(self, base, rank):
        super().__init__()
        self.base = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=base.weight.device)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=base.weight.device)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        return self.base(x) + self.lora_B(self.lora_A(x.to(self.lora_A.weight.dtype))).to(x.dtype)


def add_lora(unet, rank):
    """Freeze the UNet, put a LoRA on the query, key, value and output projections of its attentions, return the LoRA weights."""
    unet.requires_grad_(False)
    for name in [n for n, _ in unet.named_modules() if n.endswith(("to_q", "to_k", "to_v", "to_out.0"))]:
        parent, _, child = name.rpartition(".")
        setattr(unet.get_submodule(parent), child, LoRALinear(unet.get_submodule(name), rank))
    return [p for p in unet.parameters() if p.requires_grad]


def save_lora(unet, path):
    """Write the LoRA in diffusers' layout, all or nothing; alpha is not in the file, which means that it equals the rank."""
    weights = {f"unet.{k}": v.detach().cpu().contiguous() for k, v in unet.state_dict().items() if ".lora_" in k}
    save_file(weights, path.with_suffix(".tmp"), metadata={"format": "pt"})
    os.replace(path.with_suffix(".tmp"), path)


# ---------------------------------------------------------------- the pipeline as a policy


class Policy:
    """What DDPO needs of a diffusers pipeline: encode prompts, predict noise (with guidance), decode latents."""

    def __init__(self, settings, device):
        auto = {"cuda": "fp16", "cpu": "bf16"}.get(device.type, "fp32")
        precision = auto if settings.precision == "auto" else settings.precision
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.device, self.guidance_scale = device, settings.guidance_scale
        # Half-precision weights save memory, which is what a GPU is short of; elsewhere autocast casts them as it goes.
        weights = self.dtype if device.type == "cuda" else torch.float32
        pipe = load_pipeline(settings.model).to(device)
        pipe.unet.to(weights)
        pipe.text_encoder.to(weights)
        pipe.vae.to(torch.float32 if weights == torch.bfloat16 else weights)  # bf16 is too coarse for 256 levels of grey
        pipe.vae.requires_grad_(False)
        pipe.text_encoder.requires_grad_(False)
        pipe.unet.eval()  # dropout would make the ratio differ from 1
        if device.type == "cpu":
            pipe.unet.set_attn_processor(AttnProcessor())  # the fused one's backward pass is several times slower there
        self.pipe, self.unet = pipe, pipe.unet
        self.lora = add_lora(self.unet, settings.lora_rank)
        # DDIM's own default is to clip x_0 to pixels' range; latents must not be, unless the model's config says so.
        self.scheduler = DDIMScheduler.from_config({"clip_sample": False, **pipe.scheduler.config})
        if settings.steps > self.scheduler.config.num_train_timesteps:
            raise UserError(f"--steps {settings.steps}: the model knows {self.scheduler.config.num_train_timesteps} timesteps")
        self.scheduler.set_timesteps(settings.steps, device=device)
        self.scheduler.alphas_cumprod = self.scheduler.alphas_cumprod.to(device)
        # A deterministic step has no log-probability, so there is nothing to learn from it. Nearly deterministic ones are
        # worth leaving out too: their noise does not show in the image, but their gradient, in 1 / std, drowns the others'.
        t, zero = self.scheduler.timesteps, torch.zeros(settings.steps, 1, 1, 1, device=device)
        std = ddim_mean_std(self.scheduler, zero, t, zero, settings.eta)[1]  # (T, 1, 1, 1); it depends on t alone
        self.trained_steps = (std.flatten() > settings.min_std).nonzero().flatten()
        if not len(self.trained_steps):
            raise UserError(f"no step has an std above --min-std {settings.min_std}: nothing to learn from; use more --steps")
        size, channels = self.unet.config.sample_size, self.unet.config.in_channels
        self.latent_shape = (channels, size, size)  # (C, H, W)
        self.cond = {}  # encoded prompts

    @torch.no_grad()
    def encode(self, prompts):
        """Prompts -> cond (B, 2, L, D), the embeddings of the empty prompt and of the prompt; each is computed once."""
        for prompt in {"", *prompts} - self.cond.keys():
            self.cond[prompt] = self.pipe.encode_prompt(prompt, self.device, 1, False)[0][0]  # (L, D)
        return torch.stack([torch.stack([self.cond[""], self.cond[p]]) for p in prompts])

    def predict(self, x_t, t, cond):
        """The network's output eps(x_t, t, c) for x_t (B, C, H, W), t (B,), cond (B, 2, L, D), in float32, with
        classifier-free guidance: eps_uncond + scale * (eps_cond - eps_uncond)."""
        guided = self.guidance_scale > 1
        inputs = torch.cat([x_t, x_t] if guided else [x_t]).to(self.unet.dtype)
        cond = torch.cat([cond[:, 0], cond[:, 1]]) if guided else cond[:, 1]
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            eps = self.unet(inputs, t.repeat(2) if guided else t, cond).sample.float()
        if guided:
            uncond, conditional = eps.chunk(2)
            eps = uncond + self.guidance_scale * (conditional - uncond)
        return eps

    @torch.no_grad()
    def decode(self, x_0):
        """Latents (B, C, H, W) -> images (B, 3, height, width), float32 in [0, 1]."""
        vae = self.pipe.vae
        image = vae.decode(x_0.to(vae.dtype) / vae.config.scaling_factor).sample
        return (image.float() / 2 + 0.5).clamp(0, 1)


def load_pipeline(model):
    """Open a StableDiffusionPipeline from a hub id or a folder, without its safety checker."""
    path = str(model_path(model))
    without = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        kind = DiffusionPipeline.load_config(path).get("_class_name")
        if kind == "StableDiffusionPipeline":
            return StableDiffusionPipeline.from_pretrained(path, **without)
    except Exception as error:  # whatever is wrong with the files, diffusers' first line says it
        found = "the folder holds no complete pipeline" if os.path.isdir(path) else "no such folder, and the hub gives none"
        hint = "name a folder with a model_index.json, or a hub id"
        raise UserError(f"--model {model}: {found}; {hint} ({str(error).strip().splitlines()[0]})") from None
    raise UserError(f"--model {model} is a {kind}; what works is a StableDiffusionPipeline (Stable Diffusion 1.x and 2.x)")


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
        noise = randn_tensor(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
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
    x = [randn_tensor((len(prompts), *policy.latent_shape), generator=generator, device=policy.device)]
    logps = []
    for t in policy.scheduler.timesteps:
        t = t.expand(len(prompts))
        x_prev, logp = ddim_step(policy.scheduler, policy.predict(x[-1], t, cond), t, x[-1], eta, generator=generator)
        x.append(x_prev)
        logps.append(logp)
    return torch.stack(x, 1), torch.stack(logps, 1)


def sample(policy, prompts, settings, generator, tick=lambda: None):
    """Roll out any number of prompts in batches. Returns x (N, T+1, C, H, W), logp (N, T), images (N, 3, height, width)."""
    parts = []
    for i in range(0, len(prompts), settings.sample_batch):
        x, logp = rollout(policy, prompts[i : i + settings.sample_batch], settings.eta, generator)
        parts.append((x, logp, policy.decode(x[:, -1])))
        tick()
    return [torch.cat(part) for part in zip(*parts)]


def score(name, reward_fn, images, prompts):
    """r(x_0, c) as (N,) float32; a reward of the wrong shape or one that is not finite stops the run."""
    reward, n = torch.as_tensor(reward_fn(images, prompts)).detach().float().cpu(), len(prompts)
    if reward.shape != (n,):
        raise UserError(f"reward {name} returned shape {tuple(reward.shape)} for {n} images; it must be ({n},)")
    if not reward.isfinite().all():
        bad = int((~reward.isfinite()).nonzero()[0])
        raise UserError(f"reward {name} returned {reward[bad]} for the prompt {prompts[bad]!r}; it must be finite")
    return reward


# ---------------------------------------------------------------- advantages


class PromptStats:
    """Running rewards of each prompt. They play the part of the value function: an advantage compares a reward with what the
    same prompt usually gets (section 4.2). A prompt with fewer than `min_count` rewards falls back on the whole batch's."""

    def __init__(self, buffer_size=32, min_count=16):
        self.buffer_size, self.min_count, self.buffers = buffer_size, min_count, {}

    def advantages(self, prompts, rewards):
        """Remember the rewards (B,) of the B prompts; return (rewards - mean) / std, (B,) float32."""
        rewards = np.asarray(rewards, dtype=np.float64)  # integers would cut the advantages off
        if rewards.shape != (len(prompts),):
            raise ValueError(f"{len(prompts)} prompts need rewards of shape ({len(prompts)},), not {rewards.shape}")
        for prompt, reward in zip(prompts, rewards):
            self.buffers.setdefault(prompt, deque(maxlen=self.buffer_size)).append(float(reward))
        own = [self.buffers[p] if len(self.buffers[p]) >= self.min_count else rewards for p in prompts]
        adv = [(r - np.mean(past)) / (np.std(past) + 1e-6) for r, past in zip(rewards, own)]
        return torch.tensor(adv, dtype=torch.float32)

    def state_dict(self):
        return {prompt: list(buffer) for prompt, buffer in self.buffers.items()}

    def load_state_dict(self, state):
        self.buffers = {prompt: deque(past, maxlen=self.buffer_size) for prompt, past in state.items()}


# ---------------------------------------------------------------- objectives


def clipped_loss(logp, logp_old, adv, clip_range):
    """DDPO-IS (section 4.3): importance sampling with PPO's clip, for each pair, (B,). Allows several updates on the same
    samples: beyond the clip range a pair that the update already favours stops pulling."""
    ratio = torch.exp(logp - logp_old)
    return torch.maximum(-adv * ratio, -adv * ratio.clamp(1 - clip_range, 1 + clip_range))


def reinforce_loss(logp, adv):
    """DDPO-SF (section 4.3): the score function estimator, for each pair, (B,). Right only for samples of the present policy."""
    return -adv * logp


# ---------------------------------------------------------------- update


def update(policy, optimizer, scaler, samples, settings, generator, tick=lambda: None):
    """One epoch of learning: shuffle the N images, deal them into `updates_per_epoch` shares, take one optimizer step on each.

    samples: x (N, T+1, C, H, W), logp_old (N, T), cond (N, 2, L, D), adv (N,). A share's gradient is the mean over its
    (image, step) pairs, summed up in micro-batches. Returns the epoch's metrics."""
    x, logp_old, cond, adv = samples
    t = policy.scheduler.timesteps
    pairs_seen, totals, ratio_error, grad_norms = 0, torch.zeros(3, device=x.device), None, []
    for share in torch.randperm(len(x), generator=generator).to(x.device).chunk(settings.updates_per_epoch):
        pairs = torch.cartesian_prod(share, policy.trained_steps)  # (images * steps, 2)
        worst = []
        for i, j in (micro.unbind(1) for micro in pairs.split(settings.micro_batch)):
            eps = policy.predict(x[i, j], t[j], cond[i])
            _, logp = ddim_step(policy.scheduler, eps, t[j], x[i, j], settings.eta, x_prev=x[i, j + 1])
            if settings.objective == "clipped":
                loss = clipped_loss(logp, logp_old[i, j], adv[i], settings.clip_range)
            else:
                loss = reinforce_loss(logp, adv[i])
            scaler.scale(loss.sum() / len(pairs)).backward()
            with torch.no_grad():
                log_ratio = logp - logp_old[i, j]
                off = (log_ratio.exp() - 1).abs()
                worst.append(off.max())
                totals += torch.stack([loss.sum(), (off > settings.clip_range).sum(), (log_ratio**2).sum() / 2])
        if ratio_error is None:
            ratio_error = torch.stack(worst).max().item()  # nothing has been updated yet, so this should be 0
        scaler.unscale_(optimizer)
        grad_norms.append(nn.utils.clip_grad_norm_(policy.lora, settings.grad_clip).item())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        pairs_seen += len(pairs)
        tick()
    loss, clip_fraction, approx_kl = (totals / pairs_seen).tolist()
    return {"loss": loss, "ratio_error": ratio_error, "clip_fraction": clip_fraction, "approx_kl": approx_kl,
            "grad_norm": float(np.mean(grad_norms))}  # fmt: skip


# ---------------------------------------------------------------- pictures, metrics, the run folder


def picture(images, captions, path, per_row, tile=144):
    """Save images (n, 3, H, W) as a grid, each with its caption below."""
    rows = math.ceil(len(images) / per_row)
    canvas = Image.new("RGB", (per_row * tile, rows * (tile + 16)), "white")
    for k, (image, caption) in enumerate(zip(rewards.to_pil(images), captions)):
        x, y = k % per_row * tile, k // per_row * (tile + 16)
        canvas.paste(image.resize((tile - 4, tile - 4), Image.BICUBIC), (x + 2, y + 2))
        ImageDraw.Draw(canvas).text((x + 4, y + tile), caption, fill="black")
    canvas.save(path)


def look(policy, reward_fn, prompts, settings, path):
    """Sample the same prompts from the same noise every time and save the picture. Returns images, captions, mean reward."""
    prompts = [prompts[i % len(prompts)] for i in range(settings.grid_images)]
    generator = torch.Generator(policy.device).manual_seed(settings.seed + 1)
    images = sample(policy, prompts, settings, generator)[2]
    reward = score(settings.reward, reward_fn, images, prompts)
    captions = [f"{prompt[:16]}  {r:.2f}" for prompt, r in zip(prompts, reward)]
    picture(images, captions, path, per_row=math.ceil(len(prompts) / 2))
    return images.cpu(), captions, reward.mean().item()


def make_run_folder(settings):
    """A new folder for this run; one that holds anything is never written to."""
    names = (f"runs/{settings.reward}" + (f"-{n}" if n > 1 else "") for n in itertools.count(1))
    try:
        out = Path(settings.out or next(name for name in names if not os.path.exists(name)))
        if out.is_dir() and any(out.iterdir()):
            raise UserError(f"--out {out} is not empty; name another folder, or leave --out away")
        (out / "samples").mkdir(parents=True)
        (out / "config.json").write_text(json.dumps(dataclasses.asdict(settings), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--out {settings.out}: cannot make that folder ({error})") from None
    return out


def log_metrics(path, row):
    """Append a row to the csv file, the header first; what is written stays written if the run is killed."""
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


# ---------------------------------------------------------------- train


def train(settings):
    """Run DDPO. Returns the run folder."""
    prompts = load_prompts(settings.prompts)
    device = pick_device(settings.device)
    reward_fn = rewards.load_reward(settings.reward)
    torch.manual_seed(settings.seed)
    torch.set_flush_denormal(True)  # denormal numbers make a CPU crawl
    policy = Policy(settings, device)
    optimizer = torch.optim.AdamW(policy.lora, settings.lr, (0.9, 0.999), 1e-8, settings.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=policy.dtype == torch.float16)
    stats = PromptStats(settings.stats_buffer, settings.stats_min_count)
    noise = torch.Generator(device).manual_seed(settings.seed)
    choice = torch.Generator().manual_seed(settings.seed)
    out = make_run_folder(settings)
    introduce(settings, policy, prompts, out)

    batches = math.ceil(settings.images_per_epoch / settings.sample_batch)
    bar = tqdm(total=settings.epochs * (batches + settings.updates_per_epoch), unit="batch")
    start = time.time()
    before = after = look(policy, reward_fn, prompts, settings, out / "samples" / "epoch_0000.png")
    for epoch in range(1, settings.epochs + 1):
        drawn = [prompts[i] for i in torch.randint(len(prompts), (settings.images_per_epoch,), generator=choice)]
        x, logp_old, images = sample(policy, drawn, settings, noise, bar.update)
        reward = score(settings.reward, reward_fn, images, drawn)
        adv = stats.advantages(drawn, reward).clamp(-settings.adv_clip, settings.adv_clip).to(device)
        metrics = update(policy, optimizer, scaler, (x, logp_old, policy.encode(drawn), adv), settings, choice, bar.update)

        save_lora(policy.unet, out / "pytorch_lora_weights.safetensors")
        seconds, mean, std = time.time() - start, reward.mean().item(), reward.std().item()
        row = {"epoch": epoch, "queries": epoch * len(drawn), "seconds": seconds, "reward_mean": mean, "reward_std": std}
        log_metrics(out / "metrics.csv", {**row, **metrics})
        bar.set_postfix(reward=f"{mean:.3f}")
        bar.write(f"epoch {epoch:3d}  reward {mean:.3f} +- {std:.3f}  clipped {metrics['clip_fraction']:.0%}  {seconds:.0f} s")
        if epoch % settings.sample_every == 0 or epoch == settings.epochs:
            after = look(policy, reward_fn, prompts, settings, out / "samples" / f"epoch_{epoch:04d}.png")
    bar.close()
    picture(torch.cat([before[0], after[0]]), before[1] + after[1], out / "before_after.png", per_row=len(before[0]))
    print(f"\nReward on the same prompts and noise: {before[2]:.3f} before, {after[2]:.3f} after; see {out / 'before_after.png'}")
    print(f"The LoRA is in {out}; in diffusers (with peft installed): pipe.load_lora_weights({str(out)!r})")
    return out


def introduce(settings, policy, prompts, out):
    """Say what is about to run, and what it will cost."""
    s, images, trained = settings, settings.images_per_epoch, len(policy.trained_steps)
    bundled = "the bundled one; for Stable Diffusion: --model stable-diffusion-v1-5/stable-diffusion-v1-5"
    print(f"model    {s.model}" + (f" ({bundled})" if s.model == Settings.model else ""))
    print(f"reward   {s.reward}, {len(prompts)} prompts")
    print(f"trains   {sum(p.numel() for p in policy.lora):,} LoRA weights on {policy.device} in {str(policy.dtype)[6:]}")
    print(f"epoch    {images} images of {s.steps} steps; {images * trained} (image, step) pairs, {s.updates_per_epoch} updates")
    print(f"run      {s.epochs} epochs = {s.epochs * images} reward queries; results go to {out}", flush=True)


# ---------------------------------------------------------------- main


def parse(argv=None):
    """Settings from the command line; every field of Settings is a flag."""
    about = "Fine-tune a diffusion model on a reward with DDPO. A model folder's ddpo.json overrides the defaults shown here."
    parser = argparse.ArgumentParser("ddpo.py", description=about, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for f in dataclasses.fields(Settings):
        text = f"{f.metadata['help']} (default: {f.default!r})".replace("%", "%%")
        parser.add_argument("--" + f.name.replace("_", "-"), type=f.type, metavar=f.type.__name__.upper(), help=text)
    flags = vars(parser.parse_args(argv))
    try:
        return make_settings(flags)
    except UserError as error:
        parser.exit(2, f"ddpo.py: error: {error}\n")


def main(argv=None):
    """Run from the command line; a mistake ends in one line and a non-zero status."""
    settings = parse(argv)
    try:
        train(settings)
    except UserError as error:
        sys.exit(f"ddpo.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nStopped. The weights of the last finished epoch are in the run folder.")


if __name__ == "__main__":
    main()
