"""DDPO: Denoising Diffusion Policy Optimization, for Stable Diffusion (1.x, 2.x, XL) and DDPMs.
Black et al., "Training Diffusion Models with Reinforcement Learning", ICLR 2024, arXiv 2305.13301

    python ddpo.py --reward compressibility     # a small bundled model, any machine, in minutes
    python ddpo.py @examples/stable-diffusion.flags --reward aesthetic      # one CUDA GPU

Denoising is a Markov decision process: the state is (c, t, x_t), the action is x_{t-1}, the policy
is the Gaussian that one step draws it from, and a reward r(x_0, c) comes at the end. So:

    for every epoch:
        draw prompts c; sample x_T ... x_0; keep every latent and its log-probability     (rollout)
        reward = r(x_0, c)                                                                  (score)
        adv = (reward - mean) / std, of the prompt's recent rewards, or of a group     (advantages)
        for every (image, step) pair:
            ratio = p_theta(x_{t-1} | x_t, c) / p_theta_old(x_{t-1} | x_t, c)           (ddim_step)
            loss = max(-adv * ratio, -adv * clip(ratio, 1 - range, 1 + range))       (clipped_loss)
        average the gradient over the pairs, step the optimizer                            (update)

Rooms 1 to 5 are the method, in the paper's order; rooms 6 to 8 are what it stands on.
Names: x_t and x_prev (x_{t-1}); cond (c, as a row in the table of encoded prompts); output (of the
network, with guidance); mean, std, logp (of the policy), logp_old (of the policy that sampled).
Shapes: B or N images, T denoising steps, K rewards, latents of C x H x W.
"""

import argparse
import csv
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import sys
import time
import warnings
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import get_type_hints

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageOps
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

import rewards
from rewards import UserError, explained

EXAMPLES = Path(__file__).resolve().parent / "examples"
DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WEIGHT_DECAY = 1e-4  # AdamW's, as in the paper
GRAD_CLIP = 1.0  # the gradient's norm is clipped to this, as in the paper


def flag(default, help, least=0):
    """A setting: its default, what --help says of it, and the least value of a number."""
    return field(default=default, metadata={"help": help, "least": least})


@dataclass(frozen=True)
class Settings:
    """Each is a flag. The defaults are for the bundled model; examples/stable-diffusion.flags has
    those for Stable Diffusion on a GPU of 24 GB."""

    reward: str = flag("compressibility", "a name, FILE.py:FUNCTION, or a mix: 'A + 0.1*B'")
    model: str = flag("emoji-diffusion", "hub id or folder: Stable Diffusion 1, 2, XL; DDPM")
    prompts: str = flag("", "animals (if empty), activities, imagenet, or a text file")
    out: str = flag("", "run folder; empty: runs/REWARD, or runs/REWARD-2, ...")
    seed: int = flag(0, "of every random number")
    device: str = flag("auto", "cuda, mps or cpu; auto: the first that is there")
    precision: str = flag("auto", "fp32, bf16, fp16; auto: fp16 on cuda, else fp32")
    # sampling
    epochs: int = flag(12, "rounds of sampling and training", 1)
    images_per_epoch: int = flag(64, "images sampled in an epoch (the paper: 256)", 2)
    steps: int = flag(7, "denoising steps of an image (the paper: 50)", 1)
    guidance_scale: float = flag(3.0, "classifier-free guidance; none at 1 or below")
    samples_per_prompt: int = flag(4, "above 1: groups from one noise are compared", 1)
    batch_size: int = flag(16, "images in a call of the network; at most a minibatch", 1)
    reward_device: str = flag("", "where the rewards' networks run; empty: --device")
    # learning
    objective: str = flag("clipped", "clipped (DDPO-IS) or reinforce (DDPO-SF)")
    updates_per_epoch: int = flag(2, "optimizer steps, each on a minibatch of its own", 1)
    save_memory: bool = flag(False, "gradient checkpointing, pictures in tiles: slower")
    lr: float = flag(0.003, "AdamW's; 0: 3e-4 for a LoRA, 1e-5 for the whole UNet")
    clip_range: float = flag(0.002, "ratios are clipped to 1 +- this; 0: 1.64 nats")
    min_std: float = flag(0.7, "steps of less noise are not learned (the paper: all)")
    adv_clip: float = flag(1.0, "advantages are clipped to +- this (its code: 5)", 1e-6)
    lora_rank: int = flag(2, "rank of the LoRA; 0 trains the whole UNet")
    stats_buffer: int = flag(32, "rewards remembered of each prompt, without groups", 2)
    # against over-optimisation
    kl_coef: float = flag(0.0, "what a nat from the pretrained model costs in advantage")
    kl_stop: float = flag(20.0, "nats from the pretrained model that end the run")
    monitor: str = flag("", "rewards to log but not to optimise: NAME[,NAME]")
    # evaluating
    eval_every: int = flag(5, "epochs between two evaluations, from the same noise", 1)
    eval_prompts: str = flag("", "as --prompts, for evaluations; empty: the same")
    eval_images: int = flag(12, "images of an evaluation", 1)

    def __post_init__(self):
        types = get_type_hints(type(self))
        for f in fields(self):
            value = getattr(self, f.name)
            kind = types[f.name]
            least = f.metadata.get("least", 0)
            if not isinstance(value, (int, float) if kind is float else kind):
                raise UserError(f"{f.name} must be {kind.__name__}, not {value!r}")
            if kind is not str and not least <= value < math.inf:  # NaN fails this, too
                raise UserError(f"{f.name} must be finite and at least {least}, not {value}")
        for name, choices in (("precision", DTYPES), ("objective", OBJECTIVES)):
            if getattr(self, name) not in choices:
                raise UserError(f"{name} {getattr(self, name)}: there are {', '.join(choices)}")
        whole = self.updates_per_epoch * self.samples_per_prompt
        if self.images_per_epoch % whole:
            raise UserError(f"images_per_epoch must be a multiple of {whole}: updates_per_epoch"
                            " times samples_per_prompt")
        if self.objective == "reinforce" and self.updates_per_epoch > 1:
            raise UserError("objective reinforce needs fresh samples: add --updates-per-epoch 1")
        if not self.lora_rank and (self.kl_coef or self.kl_stop or self.lr == Settings.lr):
            raise UserError("lora_rank 0 has no pretrained model to measure a KL to, and a LoRA's"
                            " rate is too high for it: add --kl-coef 0 --kl-stop 0 --lr 0")


# ---------------------------------------------------- 1. one DDIM step and its log-probability
def ddim_levels(scheduler):
    """signal = sqrt(abar) and sigma = sqrt(1 - abar) at each timestep t, and both at the one that a
    step leads to: (4, t)."""
    abar = scheduler.alphas_cumprod
    t_prev = torch.arange(len(abar)) - len(abar) // scheduler.num_inference_steps
    # The last step's is negative: its abar is the final one, mostly without noise.
    abar_prev = torch.where(t_prev < 0, scheduler.final_alpha_cumprod, abar[t_prev])
    return torch.stack([abar, 1 - abar, abar_prev, 1 - abar_prev]).sqrt()


def x_0_and_eps(prediction_type, output, x_t, signal, sigma):
    """What the network says that x_t = signal * x_0 + sigma * eps is made of, (B, C, H, W) each."""
    if prediction_type == "epsilon":
        return (x_t - sigma * output) / signal, output
    if prediction_type == "v_prediction":
        return signal * x_t - sigma * output, signal * output + sigma * x_t
    return output, (x_t - signal * output) / sigma  # "sample"


def ddim_mean_std(x_0, eps, signal, sigma, signal_prev, sigma_prev, eta=1.0):
    """Mean (B, C, H, W) and std (B, 1, 1, 1) of p(x_{t-1} | x_t, c). Song et al. 2021 (DDIM),
    equations 12 and 16; eta = 1 is a DDPM. Euler ancestral and the first-order SDE of
    DPM-Solver++ are this step; with (signal, sigma) = (1 - t, t) it is one of flow models."""
    kept = signal * sigma_prev / (signal_prev * sigma)
    std = eta * sigma_prev * (1 - kept**2).clamp(min=0).sqrt()
    direction = (sigma_prev**2 - std**2).clamp(min=0).sqrt()  # fused products may be negative
    return signal_prev * x_0 + direction * eps, std


def ddim_step(policy, output, t, x_t, x_prev=None, generator=None):
    """Draw x_{t-1} ~ N(mean, std^2) in x_t's dtype, or take `x_prev` as drawn. Returns it and
    logp (B,), the *mean* over the C * H * W dimensions of log N(x_prev; mean, std^2), as in the
    paper's code. A deterministic step (std 0) has logp 0, without gradient."""
    mean, std = policy.mean_std(output, t, x_t)
    if x_prev is None:
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        x_prev = (mean + std * noise).detach().to(x_t.dtype)
    noisy = std > 0
    std = torch.where(noisy, std, 1)  # else the logp of a last step without noise is NaN
    z = (x_prev.float() - mean) / std  # of x_prev as it is stored, which may be in half precision
    logp = -(z**2) / 2 - std.log() - math.log(2 * math.pi) / 2
    return x_prev, torch.where(noisy, logp, 0).mean((1, 2, 3))


# ---------------------------------------------------- 2. sample and score
@dataclass
class Samples:
    """N images with all that the method keeps of them."""

    prompts: list
    cond: torch.Tensor  # (N,)
    x: torch.Tensor  # (N, T+1, C, H, W), from noise to x_0
    logp: torch.Tensor  # (N, T), under the policy that sampled
    scores: torch.Tensor  # (N, 1 + K): the reward, and each of those that it is mixed of
    adv: torch.Tensor = None  # (N,)
    alike: int = 1  # so many images in a row begin with the same call of the network


def predict_once(policy, x_t, t, cond, alike):
    """policy.predict, by one call for every `alike` rows that are the same."""
    return policy.predict(x_t[::alike], t[::alike], cond[::alike]).repeat_interleave(alike, 0)


@torch.no_grad()
def rollout(policy, prompts, x_T, generator, alike=1):
    """Denoise x_T (B, C, H, W) for B prompts: all latents x (B, T+1, C, H, W) and logp (B, T)."""
    cond = policy.encode(prompts)
    x = [x_T]
    logps = []
    for t in policy.scheduler.timesteps:
        t = t.expand(len(prompts))
        output = predict_once(policy, x[-1], t, cond, 1 if logps else alike)
        x_prev, logp = ddim_step(policy, output, t, x[-1], generator=generator)
        x.append(x_prev)
        logps.append(logp)
    return torch.stack(x, 1), torch.stack(logps, 1)


@torch.no_grad()
def score(terms, images, prompts):
    """r(x_0, c), the weighted sum of the K rewards in `terms`, then each of them: (B, 1 + K)."""
    total = torch.zeros(len(prompts))
    columns = []
    for label, weight, reward_fn in terms:
        reward = reward_fn(images.clone(), prompts)  # it may write into its images
        reward = reward[0] if isinstance(reward, tuple) else reward  # (rewards, more), as in TRL
        with explained(f"reward {label} must return numbers"):
            reward = torch.as_tensor(reward).float().cpu()  # integers would truncate advantages
        if reward.shape != total.shape:
            raise UserError(f"reward {label} returned shape {tuple(reward.shape)};"
                            f" it must be {tuple(total.shape)}, a number for each image")
        total += weight * reward
        columns.append(reward)
        worst = total.isfinite().int().argmin()
        if not total[worst].isfinite():
            raise UserError(f"{weight} * reward {label} is not finite for {prompts[worst]!r}")
    return torch.stack([total, *columns], 1)


def sample(policy, terms, prompts, generator, group=1, batch_size=None):
    """Roll out and score N prompts. Each `group` of them starts from the same noise: what differs
    then is due to the policy's steps, and the first one is one call, if no batch parts a group."""
    batch_size = batch_size or policy.batch_size
    alike = 1 if batch_size % group else group
    shape = (len(prompts) // group, *policy.latent_shape)
    x_T = torch.randn(shape, generator=generator, device=policy.device)
    x_T = x_T.repeat_interleave(group, 0)
    parts = []
    for i in tqdm(range(0, len(prompts), batch_size), "sample", leave=False, disable=None):
        batch = prompts[i : i + batch_size]
        x, logp = rollout(policy, batch, x_T[i : i + batch_size], generator, alike)
        images = policy.decode(x[:, -1])
        if not (x.isfinite().all() and images.isfinite().all()):
            raise UserError("samples are not finite: damaged weights, or try --precision fp32")
        parts.append((x, logp, score(terms, images, batch)))
    x, logp, scores = map(torch.cat, zip(*parts))
    return Samples(prompts, policy.encode(prompts), x, logp, scores, alike=alike)


# ---------------------------------------------------- 3. advantages
def prompt_advantages(memory, prompts, rewards, buffer_size=32, min_count=16):
    """(reward - mean) / std of B images, (B,) float32, over the recent rewards of their prompt, in
    the place of a value function. `memory` holds these by prompt; the B are added to it first. A
    prompt with fewer than `min_count` is compared with the whole batch."""
    rewards = [float(reward) for reward in rewards]
    for prompt, reward in zip(prompts, rewards, strict=True):
        memory.setdefault(prompt, []).append(reward)
    adv = []
    for prompt, reward in zip(prompts, rewards):
        keep = max(buffer_size, prompts.count(prompt))  # forget nothing of this batch
        past = memory[prompt] = memory[prompt][-keep:]
        if len(past) < min(min_count, buffer_size):  # more are never remembered
            past = rewards
        adv.append((reward - np.mean(past)) / (np.std(past) + 1e-6))
    return torch.tensor(adv, dtype=torch.float32)


def group_advantages(rewards, group):
    """Groups of images from the same noise need no memory: their baseline is the group's mean, as
    in GRPO. (A leave-one-out mean, as in RLOO, only rescales it.) The std is of all B deviations
    from these: a small group has hardly one of its own."""
    groups = np.asarray(rewards, dtype=np.float64).reshape(-1, group)
    adv = groups - groups.mean(1, keepdims=True)
    return torch.tensor(adv.flatten() / (adv.std() + 1e-6), dtype=torch.float32)


# ---------------------------------------------------- 4. objectives and KL
def clipped_loss(logp, logp_old, adv, clip_range):
    """DDPO-IS (section 4.3): importance sampling with PPO's clip, for each pair, (B,). So samples
    serve several updates: beyond the clip range a pair that is favoured already stops pulling.
    As logp is a mean over D dimensions, this ratio is the D-th root of the paper's."""
    ratio = torch.exp(logp - logp_old)
    return torch.maximum(-adv * ratio, -adv * ratio.clamp(1 - clip_range, 1 + clip_range))


def reinforce_loss(logp, logp_old, adv, clip_range):
    """DDPO-SF (section 4.3): the score function estimator, (B,), for samples of this policy."""
    return -adv * logp


OBJECTIVES = {"clipped": clipped_loss, "reinforce": reinforce_loss}  # --objective


def kl_to_pretrained(policy, output, x_t, t, cond, alike=1):
    """KL(p_theta || p_pretrained) of denoising steps in nats, (B,): of Gaussians with one std it is
    ||mean - mean_pretrained||^2 / (2 std^2). A trajectory's sum bounds the KL of the images."""
    with torch.no_grad(), without_lora():
        pretrained = predict_once(policy, x_t, t, cond, alike)
    mean, std = policy.mean_std(output, t, x_t)
    mean_pretrained, _ = policy.mean_std(pretrained, t, x_t)
    return ((mean - mean_pretrained) ** 2).sum((1, 2, 3)) / (2 * std.flatten() ** 2)


def nats(row):
    """An epoch's KL as a text."""
    return f"{row['kl']:z.1f} +- {row['kl_error']:.1f} nats"


@torch.no_grad()
def measure_kl(policy, samples):
    """KL(p_theta || p_pretrained) of the policy that sampled, over the steps learned from, and its
    standard error: the mean of log p - log p_pretrained of what was drawn, by every fourth image,
    or one of each group, as each costs a call of the network a step. Steps of hardly any noise
    would be most of the sum over all steps, and do not show."""
    stride = min(max(4, samples.alike), len(samples.x) // 2)
    images = torch.arange(0, len(samples.x), stride, device=policy.device)
    kl = torch.zeros(len(images), device=policy.device)
    for step in policy.trained_steps:
        micros = images.split(policy.batch_size)
        with without_lora():
            logp = torch.cat([step_logp(policy, samples, micro, step)[1] for micro in micros])
        kl += (samples.logp[images, step] - logp) * samples.x[0, 0].numel()
    return kl.mean(), kl.std() / math.sqrt(len(kl))


# ---------------------------------------------------- 5. update and train
def step_logp(policy, samples, images, step, alike=1):
    """The network's output for one step of B images, and the logp (B,) of what was drawn there."""
    x_t = samples.x[images, step]
    t = policy.scheduler.timesteps[step].expand(len(images))
    output = predict_once(policy, x_t, t, samples.cond[images], alike)
    _, logp = ddim_step(policy, output, t, x_t, x_prev=samples.x[images, step + 1])
    return output, logp


def step_loss(policy, settings, samples, images, step):
    """The objective of one step of B images, (B,), and its log(ratio), (B,) without gradient."""
    alike = 1 if step else samples.alike
    output, logp = step_logp(policy, samples, images, step, alike)
    logp_old = samples.logp[images, step]
    objective = OBJECTIVES[settings.objective]
    loss = objective(logp, logp_old, samples.adv[images], policy.clip_range)
    if settings.kl_coef:  # logp is a mean over the dimensions, so the KL is one too
        x_t = samples.x[images, step]
        t = policy.scheduler.timesteps[step].expand(len(images))
        kl = kl_to_pretrained(policy, output, x_t, t, samples.cond[images], alike)
        loss = loss + settings.kl_coef * kl / x_t[0].numel()
    return loss, logp.detach() - logp_old


def update(run, samples, generator):
    """Deal N images into minibatches and take an optimizer step on each, with the mean gradient of
    its (image, step) pairs, added up in micro-batches. Returns the epoch's metrics."""
    policy = run.policy
    steps = policy.trained_steps
    images = torch.arange(len(samples.x)).view(-1, samples.alike)  # who begins alike stays together
    images = images[torch.randperm(len(images), generator=generator)].flatten()
    minibatches = images.to(policy.device).chunk(run.settings.updates_per_epoch)
    seen = []
    norms = []
    for minibatch in tqdm(minibatches, "update", leave=False, disable=None):
        for step, micro in product(steps, minibatch.split(policy.batch_size)):
            loss, log_ratio = step_loss(policy, run.settings, samples, micro, step)
            run.scaler.scale(loss.sum() / (len(minibatch) * len(steps))).backward()
            seen.append(torch.stack([loss.detach(), log_ratio]))
        norms.append(run.step())
    loss, log_ratio = torch.cat(seen, 1)  # of all pairs
    off = (log_ratio.exp() - 1).abs()
    first = len(minibatches[0]) * len(steps)
    return {
        "loss": loss.mean(),
        "ratio_error": off[:first].max(),  # before the first step the two policies are one
        "clip_fraction": (off > policy.clip_range).float().mean(),
        "approx_kl": (log_ratio**2).mean() / 2,
        "grad_norm": np.mean(norms),
        "skipped": sum(not math.isfinite(norm) for norm in norms),
    }


def train(run, terms, prompts, eval_prompts, update=update):
    """Draw prompts, sample and score, compare, update, evaluate, save; epoch after epoch."""
    settings = run.settings
    policy = run.policy
    log = run.log  # the rows of metrics.csv; row 0 is the evaluation before training
    if not log:
        reward = run.evaluate(terms, eval_prompts, 0)
        run.finish({"epoch": 0, "queries": 0, "seconds": 0.0, "eval_reward": reward})
    if len(log) > settings.epochs:
        print(f"all of {settings.epochs} epochs are done; more by --epochs")
    while len(log) <= settings.epochs and not run.too_far(log[-1]):
        start = time.time()
        epoch = len(log)
        noise, choice = random_numbers(settings, epoch, policy.device)
        group = settings.samples_per_prompt
        count = settings.images_per_epoch // group
        deals = range(0, count, len(prompts))  # none comes twice before all had a turn
        order = torch.cat([torch.randperm(len(prompts), generator=choice) for _ in deals])
        drawn = [prompts[i] for i in order[:count].repeat_interleave(group)]
        samples = sample(policy, terms, drawn, noise, group)
        samples.adv = run.advantages(drawn, samples.scores[:, 0]).to(policy.device)

        row = {"epoch": epoch, **run.describe(terms, samples)}
        too_far = run.too_far(row)
        if too_far:
            run.go_back()
        else:
            run.keep()
            row |= update(run, samples, choice)
        if too_far or epoch == settings.epochs or epoch % settings.eval_every == 0:
            row["eval_reward"] = run.evaluate(terms, eval_prompts, epoch)
        row["seconds"] = log[-1]["seconds"] + time.time() - start
        run.finish(row)
    if 0 < settings.kl_stop < log[-1].get("kl", 0):
        result = "; its result is the last policy within" if run.kept else ""
        print(f"stopped after epoch {len(log) - 1} of {settings.epochs}: {nats(log[-1])} from the"
              f" pretrained model, more than --kl-stop {settings.kl_stop:g}{result}")


# ==================================================== from here on: what the method stands on
# ---------------------------------------------------- 6. the network: pipeline and LoRA
class Policy:
    """What DDPO needs of a diffusers pipeline: encode prompts, predict noise, decode latents.
    A DDPM has no guidance and no VAE, and its prompts are for the reward alone: its latents are
    images."""

    prefix = "unet."  # of the names in the LoRA file, by which diffusers knows where it belongs

    def __init__(self, settings, device):
        self.device = device
        auto = torch.float16 if device.type == "cuda" else torch.float32
        self.dtype = DTYPES[settings.precision] or auto
        # As many to learn from as are sampled at a time, and no more than there are in a minibatch:
        # if it divides them, half precision rounds both alike, and the ratio is 1.
        minibatch = settings.images_per_epoch // settings.updates_per_epoch
        self.batch_size = min(settings.batch_size, minibatch)
        # Frozen, so half precision will do; elsewhere autocast casts it.
        half = device.type == "cuda" and settings.lora_rank
        self.pipe = self.load(settings, self.dtype if half else torch.float32)
        self.unet = getattr(self.pipe, self.prefix.rstrip("."))
        self.conditional = hasattr(self.pipe, "vae")
        self.guidance_scale = settings.guidance_scale if self.conditional else 1.0
        if not self.conditional and settings.guidance_scale != Settings.guidance_scale:
            raise UserError(f"--model {settings.model} has no guidance: leave out --guidance-scale")
        self.prepare(settings)
        self.unet.requires_grad_(not settings.lora_rank)
        self.lora = add_lora(self.unet, settings.lora_rank)
        self.weights = [weight for weight in self.unet.parameters() if weight.requires_grad]
        if not self.weights:
            raise UserError(f"--model {settings.model} has no attention for a LoRA: --lora-rank 0")
        self.set_steps(settings)
        height, width = np.broadcast_to(self.unet.config.sample_size, 2).tolist()
        self.latent_shape = (self.unet.config.in_channels, height, width)
        # logp is a mean over dimensions: the paper's 1e-4 is 1.6384 nats of its 4 x 64 x 64.
        self.clip_range = settings.clip_range or 1.6384 / math.prod(self.latent_shape)
        self.xl = hasattr(self.pipe, "text_encoder_2")
        if self.xl:  # original size, crop, target size
            sides = [side * self.pipe.vae_scale_factor for side in (height, width)]
            self.time_ids = torch.tensor([[*sides, 0, 0, *sides]], device=device)
        self.embeddings = {}  # of each prompt: with those of no prompt, (1, 2, ...)
        self.try_out()

    def load(self, settings, dtype):
        """The pipeline; what is trained of it is in dtype."""
        return load_pipeline(settings.model, dtype)

    def prepare(self, settings):
        """Device, memory and attention. Text encoders stay on the host: they read a prompt once."""
        self.unet.to(self.device)
        if self.conditional:  # in float32: XL's overflows in fp16, bf16 is too coarse for pixels
            vae = self.pipe.vae.to(self.device)
        if self.device.type == "cuda":
            self.unet.to(memory_format=torch.channels_last)  # as its convolutions want it
            if self.conditional:
                vae.enable_slicing()  # image by image: gigabytes less, hardly slower
        for part in self.unet.modules():
            fused = isinstance(getattr(part, "processor", None), AttnProcessor2_0)
            if fused and self.device.type == "cpu":  # it learns slowly there
                part.set_processor(AttnProcessor())
        if settings.save_memory:
            self.unet.enable_gradient_checkpointing()
        if settings.save_memory and self.conditional:
            vae.enable_tiling()  # of XL's pictures
            vae.tile_latent_min_size = 64
            vae.tile_sample_min_size = 64 * self.pipe.vae_scale_factor

    @torch.enable_grad()
    def try_out(self):
        """A gradient and a picture, before there is a run: what cannot be trained is told now."""
        cond = self.encode(["a", "b"])
        if self.conditional and torch.equal(*self.tables[0][:, 1]):
            raise ValueError("its tokenizer or text encoder cannot tell a from b")
        x_t = torch.randn(1, *self.latent_shape, device=self.device)
        if self.decode(x_t).shape[1] != 3:
            raise ValueError("its pictures are not RGB")
        output = self.predict(x_t, self.scheduler.timesteps[:1], cond[:1])
        if output.shape != x_t.shape:
            raise ValueError("its UNet predicts more than noise")
        output.sum().backward()
        learns = [layer.lora for name, layer in self.lora.items() if "to_v" in name]
        for weight in learns or self.weights:  # quantised layers may pass no gradient on
            if weight.grad is None or self.lora and not weight.grad.any():
                raise ValueError(f"no gradient comes to its {type(weight).__name__} of shape"
                                 f" {tuple(weight.shape)}; is it quantised?")
        for weight in self.weights:
            weight.grad = None

    def set_steps(self, settings):
        """The denoising steps, and those of them that there is something to learn from."""
        # DDIM's own default is to clip x_0 to the range of pixels, which latents do not have.
        config = {"clip_sample": not self.conditional, **self.pipe.scheduler.config}
        self.scheduler = scheduler = DDIMScheduler.from_config(config)
        with explained(f"--steps {settings.steps}: more than this model's scheduler has"):
            scheduler.set_timesteps(settings.steps, device=self.device)
            self.levels = ddim_levels(scheduler).to(self.device)
            levels = self.levels[:, scheduler.timesteps]  # (4, T)
        end = self.levels.shape[1]
        start = int(scheduler.timesteps[0])
        if start + end // settings.steps < 0.9 * end:
            print(f"--steps {settings.steps} begins at t = {start} of {end}, but from pure noise")
        # A deterministic step has nothing to learn from. Nearly deterministic ones are not worth
        # it: their noise does not show, but their gradient, in 1 / std, drowns the rest.
        _, std = ddim_mean_std(0.0, 0.0, *levels)  # (T,)
        self.trained_steps = [step for step in range(len(std)) if std[step] > settings.min_std]
        if not self.trained_steps:
            raise UserError("no step adds noise to learn from: use more --steps, less --min-std")

    def mean_std(self, output, t, x_t):
        """Mean and std of p(x_{t-1} | x_t, c), float32, from the network's output at timesteps t
        (B,). What knows the sampler is this, and `set_steps`."""
        config = self.scheduler.config
        levels = self.levels[:, t].view(4, -1, 1, 1, 1)
        x_0, eps = x_0_and_eps(config.prediction_type, output, x_t, *levels[:2])
        if config.clip_sample:
            x_0 = x_0.clamp(-config.clip_sample_range, config.clip_sample_range)
        return ddim_mean_std(x_0, eps, *levels)

    @torch.no_grad()
    def embed(self, prompt):
        """What the network reads of no prompt and of this one: (1, 2, L, D); XL: (1, 2, D), too."""
        parts = self.pipe.encode_prompt(prompt, device="cpu", num_images_per_prompt=1,
                                        do_classifier_free_guidance=True)
        pairs = zip(parts[1::2], parts[::2])
        return [torch.stack(pair, 1).to(self.device, self.unet.dtype) for pair in pairs]

    def encode(self, prompts):
        """Prompts -> cond (B,), their rows in the tables of embeddings."""
        for prompt in prompts:
            if prompt not in self.embeddings:
                self.embeddings[prompt] = self.embed(prompt) if self.conditional else []
        self.tables = [torch.cat(part) for part in zip(*self.embeddings.values())]
        rows = list(self.embeddings)
        return torch.tensor([rows.index(prompt) for prompt in prompts], device=self.device)

    def predict(self, x_t, t, cond):
        """The network's output for x_t (B, C, H, W), t (B,), cond (B,), float32, with guidance.
        That is part of the policy: who samples with it and learns without has a ratio off 1."""
        passes = 2 if self.guidance_scale > 1 else 1  # without the prompt first
        x_t = x_t.repeat(passes, 1, 1, 1).to(self.unet.dtype)
        t = t.repeat(passes)
        tables = [table[cond, -passes:].transpose(0, 1).flatten(0, 1) for table in self.tables]
        context = {"encoder_hidden_states": tables[0]} if self.conditional else {}
        if self.xl:
            ids = self.time_ids.expand(len(t), -1)
            context["added_cond_kwargs"] = {"text_embeds": tables[1], "time_ids": ids}
        with torch.autocast(self.device.type, self.dtype, enabled=self.unet.dtype != self.dtype):
            output = self.unet(x_t, t, **context).sample.float()
        if passes == 1:
            return output
        uncond, conditional = output.chunk(2)
        return uncond + self.guidance_scale * (conditional - uncond)

    @torch.no_grad()
    def decode(self, x_0):
        """Latents (B, C, H, W) -> images (B, 3, height, width), float32 in [0, 1]."""
        if self.conditional:
            vae = self.pipe.vae
            x_0 = vae.decode(x_0 / vae.config.scaling_factor).sample
        return (x_0 / 2 + 0.5).clamp(0, 1).expand(-1, 3, -1, -1)  # pixels may be grey


KINDS = "StableDiffusionPipeline StableDiffusionXLPipeline DDPMPipeline DDIMPipeline".split()
KNOWN = {  # of what a model's files can ask of its pipeline, the values that are honoured here
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_type": ("discrete",),
    "use_flow_sigmas": (False,),
    "thresholding": (False,),
    "time_cond_proj_dim": (None,),
    "latents_mean": (None,),
}


def load_pipeline(model, dtype=torch.float32):
    """A pipeline of a kind that can be trained here, from a hub id or a folder, its UNet in dtype.
    """
    diffusers.utils.logging.set_verbosity(100)  # what fails is said here
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
    diffusers.utils.logging.disable_progress_bar()
    if model.endswith((".safetensors", ".ckpt")):
        raise UserError(f"--model {model}: one file is not a pipeline; make it a folder by"
                        " diffusers' StableDiffusionPipeline.from_single_file and save_pretrained")
    path = EXAMPLES / "models" / model if model == Settings.model else Path(model)
    index = DiffusionPipeline.load_config(path.as_posix())
    if index.get("_class_name") not in KINDS:
        raise UserError(f"--model {model} is a {index.get('_class_name')}; what works:"
                        f" {', '.join(KINDS)}")
    try:
        pipe = read_pipeline(path, index, dtype)
    except OSError:
        pipe = None
    if not pipe:  # many an XL has its weights in half precision alone
        pipe = read_pipeline(path, index, dtype, variant="fp16")
    if "beta_start" not in pipe.scheduler.config:  # of a flow or of EDM, with other noise levels
        raise ValueError(f"its scheduler is a {type(pipe.scheduler).__name__}, not of DDPM's kind")
    for part in {"unet", "scheduler", "vae"} & set(pipe.components):
        for name, value in getattr(pipe, part).config.items():
            if value not in KNOWN.get(name, (value,)):
                raise ValueError(f"its {part} has {name} {value}, which is not known here")
    return pipe


def read_pipeline(path, index, dtype, **variant):
    """The pipeline in a folder, or on the hub, with no weight of it made up."""
    if not path.is_dir():
        path = DiffusionPipeline.download(path.as_posix(), safety_checker=None, **variant)
    parts = {}
    for name in {"unet", "vae", "text_encoder", "text_encoder_2"} & index.keys():
        library, kind = index[name]
        kind = getattr(diffusers if library == "diffusers" else transformers, kind)
        how = {"subfolder": name, "output_loading_info": True,
               "torch_dtype": dtype if name == "unet" else torch.float32}
        try:
            parts[name], report = kind.from_pretrained(path, **how, **variant)
        except OSError:  # not all parts have that variant
            parts[name], report = kind.from_pretrained(path, **how)
        if report["missing_keys"]:
            raise ValueError(f"its {name} lacks {min(report['missing_keys'])}")
    return DiffusionPipeline.from_pretrained(path, **parts, safety_checker=None)


class LoRALinear(nn.Module):
    """y = W x + B A x, with a frozen W. A (rank, in) and B^T (rank, out) are trained side by side,
    as one float32 parameter, which half precision casts at once. B starts at zero, so the layer
    starts as the pretrained one."""

    on = True  # of all layers at once: see without_lora

    def __init__(self, base, rank):
        super().__init__()
        self.base = base
        A = torch.randn(rank, base.in_features) / rank  # as in diffusers
        B_T = torch.zeros(rank, base.out_features)
        self.lora = nn.Parameter(torch.cat([A, B_T], 1).to(base.weight.device))

    def split(self, dtype=torch.float32):
        """A and B^T."""
        return self.lora.to(dtype).split([self.base.in_features, self.base.out_features], 1)

    def forward(self, x):
        x = x.contiguous()  # else half precision rounds otherwise with gradients than without
        y = self.base(x)
        if self.on:
            A, B_T = self.split(y.dtype)
            y = torch.addmm(y.flatten(0, -2), x.flatten(0, -2) @ A.T, B_T).view_as(y)
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
    """Put a LoRA around the UNet's attention projections, at rank 0 around none: {name: layer}."""
    layers = {}
    for name, layer in list(unet.named_modules()):
        if rank and name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            parent, _, child = name.rpartition(".")
            layers[name] = LoRALinear(layer, rank)
            setattr(unet.get_submodule(parent), child, layers[name])
    return layers


def save_lora(policy, path):
    """Write the LoRA in diffusers' layout; no alpha in the file means that it equals the rank."""
    lora = {}
    for name, layer in policy.lora.items():  # the layers' own names, whatever is around the UNet
        A, B_T = layer.split()
        lora[f"{policy.prefix}{name}.lora_A.weight"] = A.contiguous().cpu().clone()
        lora[f"{policy.prefix}{name}.lora_B.weight"] = B_T.T.contiguous().cpu().clone()
    with whole_file(path) as tmp:
        save_file(lora, tmp, {"format": "pt"})


# ---------------------------------------------------- 7. the run folder: state, metrics, pictures
MAY_CHANGE = """epochs images_per_epoch updates_per_epoch batch_size save_memory device precision
    reward_device lr clip_range adv_clip kl_coef kl_stop monitor eval_every made_with""".split()
COLUMNS = """epoch queries seconds reward_mean reward_std eval_reward kl kl_error
             loss ratio_error clip_fraction approx_kl grad_norm skipped changed""".split()


class Run:
    """All that the next epoch depends on, and the folder that it is kept in."""

    config = {}  # for config.json: the settings, and the code that they are used with
    changed = {}  # of it on resuming, for the next row of metrics.csv

    def __init__(self, settings, policy, folder=None):
        self.settings = settings
        self.policy = policy
        self.folder = folder
        lr = settings.lr or (3e-4 if settings.lora_rank else 1e-5)
        self.optimizer = torch.optim.AdamW(policy.weights, lr=lr, weight_decay=WEIGHT_DECAY)
        fp16 = policy.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(policy.device.type, enabled=fp16)
        self.memory = {}  # the recent rewards of each prompt
        self.kept = []  # weights of the last policy within --kl-stop
        self.log = []

    def advantages(self, prompts, rewards):
        """Of an epoch's images (N,): among their group, or else among their prompt's images."""
        s = self.settings
        if s.samples_per_prompt > 1:
            adv = group_advantages(rewards, s.samples_per_prompt)
        else:
            adv = prompt_advantages(self.memory, prompts, rewards, s.stats_buffer)
        return adv.clamp(-s.adv_clip, s.adv_clip)

    def step(self):
        """An optimizer step, but none if the gradient is not finite. Returns its norm."""
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.policy.weights, GRAD_CLIP).item()
        if math.isfinite(norm):  # a loss or log-probability that is not finite shows here, too
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return norm

    def describe(self, terms, samples):
        """What the samples of an epoch tell, for metrics.csv: their rewards and KL."""
        reward = samples.scores[:, 0]
        row = {"queries": self.log[-1]["queries"] + len(reward),
               "reward_mean": reward.mean(), "reward_std": reward.std()}
        if len(terms) > 1:
            labels = [label for label, _, _ in terms]
            row |= zip(labels, samples.scores.mean(0)[1:])
        if self.settings.lora_rank:  # else there is no pretrained model left
            row["kl"], row["kl_error"] = measure_kl(self.policy, samples)
        return row

    def evaluate(self, terms, prompts, epoch):
        """The mean reward of the same prompts from the same noise every time, with pictures."""
        prompts = [prompts[i % len(prompts)] for i in range(self.settings.eval_images)]
        terms = [term for term in terms if term[1]]  # monitors, of weight 0, are for the epochs
        noise, _ = random_numbers(self.settings, 0, self.policy.device)
        samples = sample(self.policy, terms, prompts, noise, batch_size=self.settings.batch_size)
        reward = samples.scores[:, 0]
        captions = [f"{prompt[:16]}  {r:.2f}" for prompt, r in zip(prompts, reward.tolist())]
        path = self.folder / "samples" / f"epoch_{epoch:04d}.png"
        save_pictures(self.policy.decode(samples.x[:, -1]), captions, path)
        return reward.mean()

    def too_far(self, row):
        """Whether the policy that sampled an epoch is past --kl-stop."""
        return 0 < self.settings.kl_stop < row.get("kl", 0)

    def keep(self):
        """Remember the weights: they are within --kl-stop."""
        if self.settings.kl_stop:
            self.kept = [weight.detach().clone() for weight in self.policy.weights]

    @torch.no_grad()
    def go_back(self):
        """Take the weights that were kept: one epoch can go far."""
        for weight, kept in zip(self.policy.weights, self.kept):
            weight.copy_(kept)

    def finish(self, row):
        """End an epoch: its row becomes plain numbers, which a state can hold; record and save."""
        row = {k: v if type(v) in (int, str) else float(f"{v:.6g}") for k, v in row.items()}
        self.log.append({**row, "changed": str(self.changed or "")})
        self.changed = {}
        self.record(self.log[-1])
        self.save()

    def record(self, row):
        """Once for each finished epoch: write metrics.csv, print a line."""
        columns = dict.fromkeys([*COLUMNS, *(name for row in self.log for name in row)])
        with whole_file(self.folder / "metrics.csv") as tmp, open(tmp, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.log)
        line = f"epoch {row['epoch']}/{self.settings.epochs}"
        if "reward_mean" in row:
            line += f"  reward {row['reward_mean']:.3f} +- {row['reward_std']:.3f}"
        if "kl" in row:
            line += f"  {nats(row)} in the {len(self.policy.trained_steps)} steps learned from"
        print(f"{line}  {row['seconds']:.0f} s", flush=True)
        if row.get("ratio_error", 0) > self.policy.clip_range:
            print(f"ratio_error {row['ratio_error']:.2g}: sampling and learning are two policies")
        vain = [r for r in self.log if r.get("reward_std") == 0 or r.get("grad_norm") == 0]
        if vain == [row]:  # say it once
            print("nothing was learned: all images, or all of each group, got the same reward")

    def state(self):
        """All that `load` takes over, as tensors and plain Python objects."""
        return {"weights": nn.ParameterList(self.policy.weights).state_dict(), "log": self.log,
                "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                "stats": self.memory, "kept": self.kept,
                "settings": {k: self.config.get(k) for k in MAY_CHANGE}}

    def load(self, state):
        """Take over a saved state; the learning rate may be another now."""
        nn.ParameterList(self.policy.weights).load_state_dict(state["weights"])
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, rate in zip(self.optimizer.param_groups, rates):
            group["lr"] = rate
        self.scaler.load_state_dict(self.scaler.state_dict() | state["scaler"])  # fp32 has none
        self.memory = state["stats"]
        self.kept = state["kept"]
        self.log = state["log"]
        self.changed = changes(state["settings"], self.config)

    def save(self):
        """Write the state with the settings behind it, and the LoRA alone for others to use."""
        with whole_file(self.folder / "config.json") as tmp:
            tmp.write_text(json.dumps(self.config, indent=2) + "\n")
        if self.policy.lora:
            save_lora(self.policy, self.folder / "pytorch_lora_weights.safetensors")
        with whole_file(self.folder / "state.pt") as tmp, open(tmp, "wb") as file:
            torch.save(self.state(), file)

    def end(self):
        """Write the whole pipeline, if all of its UNet was trained."""
        if not self.settings.lora_rank:
            path = self.folder / "pipeline"
            with explained(f"cannot write {path}; what was saved before is whole"):
                self.policy.pipe.save_pretrained(path)


@contextmanager
def whole_file(path):
    """A name to write to that becomes `path` once all is on the disk: a kill leaves old or new."""
    tmp = path.with_name(path.name + ".tmp")
    with explained(f"cannot write {path}; what was saved before is whole"):
        path.parent.mkdir(exist_ok=True)
        yield tmp
        with open(tmp, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(tmp, path)


def random_numbers(settings, epoch, device):
    """Generators for noise and for choices, of the seed and the epoch alone, so that a resumed run
    draws what it would have drawn. Evaluations are epoch 0. Seeds the global ones, too."""
    seed = (1_000_000 * settings.seed + epoch) % 2**32
    transformers.set_seed(seed)
    return torch.Generator(device).manual_seed(seed), torch.Generator().manual_seed(seed)


@contextmanager
def run_folder(settings, resume=None, reward=""):
    """The folder of the run to resume, or a new one: none that is there is ever used. What ends the
    run too early, a mistake, Ctrl-C or a reward's own code, says how to go on; before anything was
    saved it leaves no folder."""
    base = "runs/" + re.sub(r"[^\w.-]+", "_", settings.reward).strip("_")
    folder = Path(resume or settings.out or base)
    number = 1
    while folder.exists() and not (resume or settings.out):
        number += 1
        folder = Path(f"{base}-{number}")
    with explained(f"--out {folder}: cannot make that; name a new folder, or --resume {folder}"):
        folder.mkdir(parents=True, exist_ok=bool(resume))
    try:
        yield folder
    except BaseException as error:
        if isinstance(error, SystemExit):  # else it would look like a success
            error = UserError(f"a reward's code left Python with exit({error})")
        if (folder / "state.pt").is_file():
            again = ["--resume", str(folder), "--reward", settings.reward]
            again += ["--monitor", settings.monitor] if settings.monitor else []
            how = f"python {shlex.join([sys.argv[0], *again])}"
            if callable(reward):
                how = f"ddpo.launch(settings, {str(folder)!r}, reward), with this reward"
            error.add_note(f"go on with: {how}")
        elif not resume:
            shutil.rmtree(folder)
            if not settings.out:
                with suppress(OSError):  # there are other runs
                    folder.parent.rmdir()
        raise error


def save_pictures(images, captions, path):
    """A row of images with captions, below that of epoch 0 if there is one in the same folder."""
    tiles = []
    for image, caption in zip(rewards.to_pil(images), captions):
        tile = ImageOps.expand(ImageOps.pad(image, (140, 140)), (2, 2, 2, 18), "white")
        ImageDraw.Draw(tile).text((2, 144), caption, fill="black")
        tiles.append(tile)
    rows = [make_image_grid(tiles, 1, len(tiles))]
    first = path.with_name("epoch_0000.png")
    if first != path and first.is_file():
        rows.insert(0, Image.open(first))
    with whole_file(path) as tmp:
        make_image_grid(rows, len(rows), 1).save(tmp, "PNG")


# ---------------------------------------------------- 8. the command line
def load_prompts(name):
    """The prompts of a set in examples/prompts or of a text file: one a line, but # comments."""
    path = EXAMPLES / "prompts" / f"{name or 'animals'}.txt"
    with explained(f"prompts {name}: not animals, activities, imagenet, nor a text file"):
        text = (path if path.is_file() else Path(name)).read_text("utf-8-sig")
    lines = [line.strip() for line in text.split("\n")]
    prompts = [line for line in lines if line and not line.startswith("#")]
    other = r'(?i)[\[{][\[{\s]*(["\']|$)|PK\x03|"?prompt"?[,;\t]\S'  # JSON, a zip, CSV
    suffix = Path(name).suffix.lower()
    if not prompts or re.match(other, prompts[0]) or suffix in (".csv", ".tsv", ".json", ".jsonl"):
        raise UserError(f"prompts {name}: it must be plain text, and hold a prompt on each line")
    return prompts


def check_prompts(policy, settings, prompts):
    """Say what of the prompts the network will not read."""
    if policy.conditional:
        tokenizer = policy.pipe.tokenizer
        cut = [p for p in prompts if len(tokenizer(p).input_ids) > tokenizer.model_max_length]
        if cut:
            print(f"{len(cut)} prompts are too long and lose their end, the first: {cut[0]!r}")
        animals = load_prompts("animals")
        if settings.model == Settings.model and not any(a in p for a in animals for p in prompts):
            print("the bundled model knows the words of examples/prompts/animals.txt alone")


def pick_device(name):
    """The torch.device of that name, or for "auto" the best one of this machine."""
    best = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    with explained(f"device {name}: not on this machine, which has {best}"):
        return torch.empty(0, device=best if name == "auto" else name).device


ABOUT = "Fine-tune a diffusion model on a reward. The defaults are for the bundled model."


def parse(argv=None, kind=Settings, name="ddpo.py", about=ABOUT):
    """The command line, in which every setting is a flag and @FILE the flags that a file holds:
    settings, and the run to resume, whose own settings count where none is given."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(name, description=about, formatter_class=style,
                                     allow_abbrev=False, fromfile_prefix_chars="@",
                                     argument_default=argparse.SUPPRESS)
    types = get_type_hints(kind)
    for f in fields(kind):
        how = {"type": types[f.name]}
        if types[f.name] is bool:
            how = {"action": argparse.BooleanOptionalAction}
        text = f"{f.metadata.get('help', '')} (default: {f.default!r})"
        parser.add_argument("--" + f.name.replace("_", "-"), help=text, **how)
    parser.add_argument("--resume", metavar="RUN", help="go on with the run in this folder")
    parser.error = lambda message: parser.exit(2, f"{name}: error: {message}; see --help\n")
    flags = vars(parser.parse_args(argv))
    folder = flags.pop("resume", None)
    saved = {}
    if folder:
        with explained(f"--resume {folder}: that is not the folder of a run"):
            folder = Path(folder).resolve(strict=True)
            saved = json.loads((folder / "config.json").read_text())
            place = Path(saved.pop("made_with")["place"])
            code = {k: saved[k] for k in ("reward", "monitor") if ":" in saved[k]}
        for k in code.keys() - flags.keys():  # the folder may be somebody else's
            raise UserError(f"--resume {folder} runs code: if you trust it, add --{k}"
                            f" {shlex.quote(code[k])}")
        if place.is_dir() and not code:
            os.chdir(place)  # where the run's paths are found
    given = saved | flags
    if given.get("model", kind.model) != kind.model and not {"steps", "lr"} & given.keys():
        raise UserError(f"model {given['model']}: the defaults are for the bundled one; begin with"
                        " @examples/stable-diffusion.flags, or choose --steps and --lr")
    with explained(f"--resume {folder}: of another script" if folder else "settings"):
        return kind(**given), folder


def run_config(settings, **code):
    """For config.json: the settings, the code that they are used with, and where they are said."""
    made_with = {name: rewards.name_of(part) for name, part in code.items()}
    made_with["ddpo.py"] = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    return {**asdict(settings), "made_with": {**made_with, "place": os.getcwd()}}


def changes(old, new):
    """What differs in a part of a config and in another one: {name: (old, new)}."""
    return {k: (old[k], new.get(k)) for k in old if old[k] != new.get(k)}


def check_resume(config, folder):
    """A run that is resumed stays what it is."""
    saved = json.loads(Path(folder, "config.json").read_text())
    for k, (old, new) in changes(dict.fromkeys(config) | saved, config).items():
        if k not in (*MAY_CHANGE, "out"):
            raise UserError(f"--resume {folder}: its {k} is {old!r}; begin a new run for {new!r}")


def launch(settings, resume=None, reward=None, update=update, run_class=Run, policy_class=Policy):
    """Train a new run, or go on with the one in the folder `resume`; returns the folder. `reward`
    is a Python function in the place of settings.reward; `update`, `run_class` and `policy_class`
    take the place of ours."""
    if reward is None:
        reward = settings.reward
    settings = replace(settings, reward=rewards.name_of(reward))
    config = run_config(settings, update=update, run_class=run_class, policy_class=policy_class)
    if resume:
        check_resume(config, resume)
    prompts = load_prompts(settings.prompts)
    eval_prompts = load_prompts(settings.eval_prompts or settings.prompts)
    device = pick_device(settings.device)
    reward_device = pick_device(settings.reward_device or settings.device)
    terms = rewards.load_rewards(reward, settings.monitor, reward_device, COLUMNS)
    random_numbers(settings, 0, device)  # seeds the LoRA
    torch.set_flush_denormal(True)  # denormal numbers make a CPU crawl
    with explained(f"--model {settings.model}: no such pipeline, or one that cannot be trained"):
        policy = policy_class(settings, device)
    if not policy.conditional and not settings.prompts:
        prompts = [""]  # those that are given are for the reward
        eval_prompts = eval_prompts if settings.eval_prompts else prompts
    check_prompts(policy, settings, list(dict.fromkeys(prompts + eval_prompts)))
    with run_folder(settings, resume, reward) as folder:
        run = run_class(settings, policy, folder)
        run.config = config
        if resume:
            with explained(f"{folder / 'state.pt'} is damaged or of another kind of run"):
                run.load(torch.load(folder / "state.pt", "cpu", weights_only=True))  # no code
        size = sum(weight.numel() for weight in policy.weights)
        group = settings.samples_per_prompt
        among = f"in groups of {group}" if group > 1 else "with the recent ones of their prompt"
        print(f"trains {size:,} weights of {settings.model} on {device} in {policy.dtype};"
              f" an epoch is {settings.images_per_epoch} images of {settings.steps} steps,"
              f" {len(policy.trained_steps)} of them learned from; rewards are compared {among};"
              f" results go to {folder}", flush=True)
        train(run, terms, prompts, eval_prompts, update)
        run.end()
    evaluated = [row for row in run.log if "eval_reward" in row]
    first, last = evaluated[0], evaluated[-1]
    print(f"reward on the same prompts and noise: {first['eval_reward']:.3f} before,"
          f" {last['eval_reward']:.3f} after; see {folder}/samples/epoch_{last['epoch']:04d}.png")
    return folder


def main(argv=None, launch=launch, kind=Settings, name="ddpo.py", about=ABOUT):
    """Run from the command line; a mistake ends in one line and a non-zero status."""
    try:
        launch(*parse(argv, kind, name, about))
    except (UserError, KeyboardInterrupt, torch.OutOfMemoryError) as error:
        why = str(error).partition("\n")[0] or "stopped"
        if isinstance(error, torch.OutOfMemoryError):
            why += "; lower --batch-size, or add --save-memory"
        line = "; ".join([why, *getattr(error, "__notes__", [])])
        print(f"{name}: error: {line}", file=sys.stderr)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 1)


if __name__ == "__main__":
    main()
