"""DDPO: Denoising Diffusion Policy Optimization, for Stable Diffusion (1.x, 2.x, XL) and DDPMs.
Black et al., "Training Diffusion Models with Reinforcement Learning", ICLR 2024, arXiv 2305.13301

    python ddpo.py --reward compressibility     # a small bundled model, any machine, in minutes
    python ddpo.py --reward aesthetic --model stable-diffusion-v1-5/stable-diffusion-v1-5   # GPU

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
Shapes: B or N images, T denoising steps, P (image, step) pairs, K rewards, latents of C x H x W.
"""

import argparse
import csv
import inspect
import json
import math
import os
import re
import shlex
import sys
import time
import traceback
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

import rewards
from rewards import UserError, explained

EXAMPLES = Path(__file__).resolve().parent / "examples"
DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """Each is a flag, and its comment the help. The defaults are for Stable Diffusion on a GPU of
    24 GB; a model folder may bring its own in a ddpo.json, as the bundled one does."""

    reward: str = "compressibility"  # a name, FILE.py:FUNCTION, or a mix: 'A + 0.1*B'
    model: str = "emoji-diffusion"  # hub id or folder: Stable Diffusion 1, 2, XL; DDPM
    prompts: str = "animals"  # animals, activities, imagenet, or a file: one a line
    out: str = ""  # run folder; empty: runs/REWARD, or runs/REWARD-2, ...
    seed: int = 0  # of every random number
    device: str = "auto"  # cuda, mps or cpu; auto: the first that is there
    precision: str = "auto"  # fp32, bf16, fp16; auto: fp16 on cuda, else fp32
    # sampling
    epochs: int = 50  # rounds of sampling and training
    images_per_epoch: int = 64  # images sampled in an epoch (the paper: 256)
    steps: int = 20  # denoising steps of an image (the paper: 50)
    guidance_scale: float = 5.0  # classifier-free guidance; none at 1 or below
    samples_per_prompt: int = 1  # above 1: groups of images from one noise, compared
    eta: float = 1.0  # noise of a step: 1 is DDPM's; 0 leaves nothing to learn
    sample_batch: int = 8  # images sampled and scored at once
    reward_device: str = ""  # where the rewards' networks run; empty: --device
    # learning
    objective: str = "clipped"  # clipped (DDPO-IS) or reinforce (DDPO-SF)
    updates_per_epoch: int = 4  # optimizer steps, each on a minibatch of its own
    micro_batch: int = 0  # (image, step) pairs in a call; 0: --sample-batch
    train_steps_fraction: float = 1.0  # share of an image's steps to learn from
    grad_checkpointing: bool = False  # slower, in less memory
    lr: float = 3e-4  # AdamW's; with --lora-rank 0 the default is 1e-5
    clip_range: float = 0.0  # ratios are clipped to 1 +- this; 0: 1.64 nats
    min_std: float = 0.0  # steps of less noise are not learned (the paper: all)
    adv_clip: float = 5.0  # advantages are clipped to +- this
    lora_rank: int = 4  # rank of the LoRA; 0 trains the whole UNet
    init_lora: str = ""  # LoRA file to start from, of --lora-rank
    weight_decay: float = 1e-4  # AdamW's
    grad_clip: float = 1.0  # the gradient's norm is clipped to this
    stats_buffer: int = 32  # rewards remembered of each prompt, without groups
    stats_min_count: int = 16  # with fewer, a prompt is compared with the batch
    # against over-optimisation
    kl_coef: float = 0.0  # what a nat from the pretrained model costs in advantage
    kl_stop: float = 0.0  # nats from the pretrained model that end the run
    monitor: str = ""  # rewards to log but not to optimise: NAME[,NAME]
    # evaluating and saving
    eval_every: int = 5  # epochs between two evaluations, from the same noise
    eval_prompts: str = ""  # as --prompts, for evaluations; empty: the same
    eval_images: int = 12  # images of an evaluation
    save_every: int = 1  # epochs between two saved states, for --resume

    def __post_init__(self):
        least = {"images_per_epoch": 2, "stats_buffer": 2, "lora_rank": 0,
                 "grad_clip": 1e-6, "adv_clip": 1e-6}  # 0 would not lift the limit but stop all
        for f in fields(self):
            value = getattr(self, f.name)
            bound = least.get(f.name, int(f.type is int and f.default > 0))  # counts: 1
            if not isinstance(value, (int, float) if f.type is float else f.type):
                raise UserError(f"{f.name} must be a {f.type.__name__}, not {value!r}")
            if f.type is not str and not bound <= value < math.inf:  # NaN fails this, too
                raise UserError(f"{f.name} must be at least {bound} and finite, not {value}")
        if self.precision not in DTYPES or self.objective not in ("clipped", "reinforce"):
            raise UserError(f"precision: {', '.join(DTYPES)}; objective: clipped or reinforce")
        if self.eta > 1 or self.train_steps_fraction > 1:
            raise UserError("eta and train_steps_fraction must be at most 1")
        for n in (self.updates_per_epoch, self.samples_per_prompt):
            if self.images_per_epoch % n:
                raise UserError(f"images_per_epoch must be a multiple of {n}: updates, or groups")
        if self.objective == "reinforce" and self.updates_per_epoch > 1:
            raise UserError("objective reinforce needs fresh samples: --updates-per-epoch 1")
        if not self.lora_rank and (self.kl_coef or self.kl_stop or self.init_lora):
            raise UserError("kl_coef, kl_stop and init_lora need a LoRA: not --lora-rank 0")


# ---------------------------------------------------- 1. one DDIM step and its log-probability
def ddim_mean_std(scheduler, output, t, x_t, eta=1.0):
    """Mean (B, C, H, W) and std (B, 1, 1, 1) of p(x_{t-1} | x_t, c), float32, from the network's
    output at timesteps t (B,). Song et al. 2021 (DDIM), equations 12 and 16."""
    config = scheduler.config
    abar = scheduler.alphas_cumprod.to(t.device)
    abar_final = scheduler.final_alpha_cumprod.to(t.device)  # of the last step, whose t_prev is < 0
    t_prev = t - config.num_train_timesteps // scheduler.num_inference_steps
    abar_t = abar[t].view(-1, 1, 1, 1)
    abar_prev = torch.where(t_prev < 0, abar_final, abar[t_prev]).view(-1, 1, 1, 1)
    signal = abar_t.sqrt()  # x_t = signal * x_0 + sigma * eps
    sigma = (1 - abar_t).sqrt()  # not the papers' sigma_t: that is the std, below
    if config.prediction_type == "epsilon":
        eps = output
        x_0 = (x_t - sigma * eps) / signal
    elif config.prediction_type == "v_prediction":
        eps = signal * output + sigma * x_t
        x_0 = signal * x_t - sigma * output
    else:  # "sample"
        x_0 = output
        eps = (x_t - signal * x_0) / sigma
    if config.thresholding:
        x_0 = scheduler._threshold_sample(x_0)
    elif config.clip_sample:
        x_0 = x_0.clamp(-config.clip_sample_range, config.clip_sample_range)

    std = eta * ((1 - abar_prev) / (1 - abar_t) * (1 - abar_t / abar_prev)).sqrt()
    direction = (1 - abar_prev - std**2).clamp(min=0).sqrt()  # rounding may make it negative
    mean = abar_prev.sqrt() * x_0 + direction * eps
    return mean, std


def ddim_step(scheduler, output, t, x_t, eta=1.0, x_prev=None, generator=None):
    """Draw x_{t-1} ~ N(mean, std^2) in x_t's dtype, or take `x_prev` as drawn. Returns it and
    logp (B,), the *mean* over the C * H * W dimensions of log N(x_prev; mean, std^2), as in the
    paper's code. A deterministic step (std 0) has logp 0, without gradient."""
    mean, std = ddim_mean_std(scheduler, output, t, x_t, eta)
    if x_prev is None:
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        x_prev = (mean + std * noise).detach().to(x_t.dtype)
    noisy = std > 0
    std = torch.where(noisy, std, 1)
    z = (x_prev.float() - mean) / std  # of x_prev as it is stored, which may be in half precision
    logp = -(z**2) / 2 - std.log() - math.log(2 * math.pi) / 2
    return x_prev, torch.where(noisy, logp, 0).mean((1, 2, 3))


# ---------------------------------------------------- 2. sample and score
@torch.no_grad()
def rollout(policy, prompts, x_T, generator):
    """Denoise x_T (B, C, H, W) for B prompts: all latents x (B, T+1, C, H, W) and logp (B, T)."""
    cond = policy.encode(prompts)
    x = [x_T]
    logps = []
    for t in policy.scheduler.timesteps:
        t = t.expand(len(prompts))
        output = policy.predict(x[-1], t, cond)
        x_prev, logp = ddim_step(policy.scheduler, output, t, x[-1], policy.eta, None, generator)
        x.append(x_prev)
        logps.append(logp)
    return torch.stack(x, 1), torch.stack(logps, 1)


@torch.no_grad()
def score(terms, images, prompts):
    """r(x_0, c), the weighted sum of the K rewards in `terms`, then each of them: (B, 1 + K)."""
    total = torch.zeros(len(prompts))
    columns = []
    for label, weight, reward_fn in terms:
        try:
            reward = torch.as_tensor(reward_fn(images, prompts)).float().cpu()
        except (Exception, SystemExit) as error:  # `main` shows its traceback
            raise UserError(f"reward {label} failed at the prompt {prompts[0]!r}") from error
        if reward.shape != total.shape:
            raise UserError(f"reward {label} returned shape {tuple(reward.shape)};"
                            f" it must be {tuple(total.shape)}, a number for each image")
        total += weight * reward
        columns.append(reward)
        worst = total.isfinite().int().argmin()
        if not total[worst].isfinite():
            raise UserError(f"{weight} * reward {label} is not finite for {prompts[worst]!r}")
    return torch.stack([total, *columns], 1)


def sample(policy, terms, prompts, batch_size, generator, group=1):
    """Roll out and score N prompts: x (N, T+1, C, H, W), logp (N, T), scores (N, 1 + K). Each
    `group` of them starts from the same noise: what differs then is due to the policy's steps."""
    shape = (len(prompts) // group, *policy.latent_shape)
    x_T = torch.randn(shape, generator=generator, device=policy.device)
    x_T = x_T.repeat_interleave(group, 0)
    parts = []
    for i in tqdm(range(0, len(prompts), batch_size), "sample", leave=False, disable=None):
        batch = prompts[i : i + batch_size]
        x, logp = rollout(policy, batch, x_T[i : i + batch_size], generator)
        images = policy.decode(x[:, -1])
        if not (x.isfinite().all() and images.isfinite().all()):
            raise UserError("samples are not finite: damaged weights, or try --precision fp32")
        parts.append((x, logp, score(terms, images, batch)))
    return [torch.cat(part) for part in zip(*parts)]


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
    in GRPO. The std is of all B deviations from these: a small group has hardly one of its own."""
    groups = np.asarray(rewards, dtype=np.float64).reshape(-1, group)
    adv = groups - groups.mean(1, keepdims=True)
    return torch.tensor(adv.flatten() / (adv.std() + 1e-6), dtype=torch.float32)


# ---------------------------------------------------- 4. objectives, KL, diversity
def clipped_loss(logp, logp_old, adv, clip_range):
    """DDPO-IS (section 4.3): importance sampling with PPO's clip, for each pair, (P,). So samples
    serve several updates: beyond the clip range a pair that is favoured already stops pulling.
    As logp is a mean over D dimensions, this ratio is the D-th root of the paper's."""
    ratio = torch.exp(logp - logp_old)
    return torch.maximum(-adv * ratio, -adv * ratio.clamp(1 - clip_range, 1 + clip_range))


def reinforce_loss(logp, adv):
    """DDPO-SF (section 4.3): the score function estimator, (P,), for samples of this policy."""
    return -adv * logp


def kl_to_pretrained(policy, output, x_t, t, cond):
    """KL(p_theta || p_pretrained) of denoising steps in nats, (P,): of Gaussians with one std it is
    ||mean - mean_pretrained||^2 / (2 std^2). A trajectory's sum bounds the KL of the images."""
    with torch.no_grad(), without_lora():
        pretrained = policy.predict(x_t, t, cond)
    mean, std = ddim_mean_std(policy.scheduler, output, t, x_t, policy.eta)
    mean_pretrained, _ = ddim_mean_std(policy.scheduler, pretrained, t, x_t, policy.eta)
    return ((mean - mean_pretrained) ** 2).sum((1, 2, 3)) / (2 * std.flatten() ** 2)


@torch.no_grad()
def measure_kl(policy, x, cond, generator):
    """Nats of a trajectory between the policy that sampled x (N, T+1, C, H, W) and the pretrained
    model, over the steps learned from: an unbiased estimate, from a sixteenth of the images as it
    takes two calls of the network a step."""
    images = torch.randperm(len(x), generator=generator)[: math.ceil(len(x) / 16)].to(x.device)
    total = 0.0
    for pairs in torch.cartesian_prod(images, policy.trained_steps).split(policy.micro_batch):
        i, j = pairs.unbind(1)
        t = policy.scheduler.timesteps[j]
        output = policy.predict(x[i, j], t, cond[i])
        total += kl_to_pretrained(policy, output, x[i, j], t, cond[i]).sum()
    return float(total) / len(images)


def diversity(x_0, cond):
    """Mean distance of the final latents (N, C, H, W) of the same prompt; None if none has two."""
    x_0 = x_0.flatten(1)
    same = (cond[:, None] == cond).triu(1)
    distances = torch.cdist(x_0, x_0, compute_mode="donot_use_mm_for_euclid_dist")[same]
    return distances.mean().item() if len(distances) else None


# ---------------------------------------------------- 5. update and train
def choose_pairs(policy, images, generator):
    """The (image, step) pairs to learn from, (P, 2): random steps of each image, others for each,
    so that the gradient is in expectation that of all steps."""
    order = torch.rand(len(images), len(policy.trained_steps), generator=generator).argsort()
    order = order[:, : policy.steps_learned].sort().values
    steps = policy.trained_steps[order.to(images.device)]  # (images, steps learned)
    return torch.stack([images.repeat_interleave(policy.steps_learned), steps.flatten()], 1)


def pair_loss(policy, settings, samples, pairs):
    """The objective of each (image, step) pair, (P,), and its log(ratio), (P,) without gradient."""
    x, logp_old, cond, adv = samples
    i, j = pairs.unbind(1)
    x_t = x[i, j]
    t = policy.scheduler.timesteps[j]
    output = policy.predict(x_t, t, cond[i])
    _, logp = ddim_step(policy.scheduler, output, t, x_t, policy.eta, x_prev=x[i, j + 1])
    if settings.objective == "clipped":
        loss = clipped_loss(logp, logp_old[i, j], adv[i], policy.clip_range)
    else:
        loss = reinforce_loss(logp, adv[i])
    if settings.kl_coef:  # logp is a mean over the dimensions, so the KL is one too
        kl = kl_to_pretrained(policy, output, x_t, t, cond[i])
        loss = loss + settings.kl_coef * kl / x_t[0].numel()
    return loss, logp.detach() - logp_old[i, j]


def update(run, samples, generator):
    """Deal N images into minibatches and take an optimizer step on each, with the mean gradient of
    its (image, step) pairs, added up in micro-batches. Returns the epoch's metrics.
    samples: x (N, T+1, C, H, W), logp_old (N, T), cond (N,), adv (N,)."""
    policy = run.policy
    images = torch.randperm(len(samples[0]), generator=generator).to(policy.device)
    minibatches = images.chunk(run.settings.updates_per_epoch)
    seen = []
    norms = []
    for minibatch in tqdm(minibatches, "update", leave=False, disable=None):
        pairs = choose_pairs(policy, minibatch, generator)
        for micro in pairs.split(policy.micro_batch):
            loss, log_ratio = pair_loss(policy, run.settings, samples, micro)
            run.scaler.scale(loss.sum() / len(pairs)).backward()
            seen.append(torch.stack([loss.detach(), log_ratio]))
        norms.append(run.step())
    loss, log_ratio = torch.cat(seen, 1)  # of all pairs
    off = (log_ratio.exp() - 1).abs()
    first = len(minibatches[0]) * policy.steps_learned
    metrics = {
        "loss": loss.mean(),
        "ratio_error": off[:first].max(),  # before the first step the two policies are one
        "clip_fraction": (off > policy.clip_range).float().mean(),
        "approx_kl": (log_ratio**2).mean() / 2,
        "grad_norm": np.mean(norms),
        "skipped": sum(not math.isfinite(norm) for norm in norms),
    }
    return {name: float(value) for name, value in metrics.items()}


def train(run, terms, prompts, eval_prompts, folder, update=update):
    """Draw prompts, sample and score, compare, update, evaluate, save; epoch after epoch."""
    settings = run.settings
    policy = run.policy
    log = run.log  # the rows of metrics.csv; row 0 is the evaluation before training
    if not log:
        reward = run.evaluate(terms, eval_prompts, folder, 0)
        log.append({"epoch": 0, "queries": 0, "seconds": 0.0, "eval_reward": reward})
    for epoch in range(len(log), settings.epochs + 1):
        if run.too_far(log[-1]):
            print(f"--kl-stop: {log[-1].get('kl', 0):.1f} nats from the pretrained model")
            break
        start = time.time()
        noise, choice = random_numbers(settings, epoch, policy.device)
        group = settings.samples_per_prompt
        count = settings.images_per_epoch // group
        chosen = torch.randint(len(prompts), (count,), generator=choice)
        drawn = [prompts[i] for i in chosen.repeat_interleave(group)]
        x, logp_old, scores = sample(policy, terms, drawn, settings.sample_batch, noise, group)
        cond = policy.encode(drawn)
        adv = run.advantages(drawn, scores[:, 0])
        adv = adv.clamp(-settings.adv_clip, settings.adv_clip).to(policy.device)

        row = {"epoch": epoch, **run.describe(terms, drawn, x, cond, scores, choice)}
        if not run.too_far(row):
            row |= update(run, (x, logp_old, cond, adv), choice)
        if epoch % settings.eval_every == 0:
            row["eval_reward"] = run.evaluate(terms, eval_prompts, folder, epoch)
        row["seconds"] = log[-1]["seconds"] + time.time() - start
        log.append(row)
        print(f"epoch {epoch}/{settings.epochs}  reward {row['reward_mean']:.3f}"
              f" +- {row['reward_std']:.3f}  {row['seconds']:.0f} s", flush=True)
        write_metrics(log, folder)
        if epoch % settings.save_every == 0:
            run.save(folder)
        if all(past.get("skipped") == settings.updates_per_epoch for past in log[-3:]):
            raise UserError("no update of 3 epochs was finite: try a lower --lr, or fp32")
    if "eval_reward" not in log[-1]:
        log[-1]["eval_reward"] = run.evaluate(terms, eval_prompts, folder, log[-1]["epoch"])
    write_metrics(log, folder)
    run.save(folder)


# ==================================================== from here on: what the method stands on
# ---------------------------------------------------- 6. the network: pipeline and LoRA
class Policy:
    """What DDPO needs of a diffusers pipeline: encode prompts, predict noise, decode latents.
    A DDPM has no prompts, no guidance and no VAE: its latents are images."""

    def __init__(self, settings, device):
        self.device = device
        auto = torch.float16 if device.type == "cuda" else torch.float32
        self.dtype = DTYPES[settings.precision] or auto
        self.pipe = load_pipeline(settings.model)
        self.unet = self.pipe.unet
        self.conditional = hasattr(self.pipe, "vae")
        self.guidance_scale = settings.guidance_scale if self.conditional else 1.0
        self.prepare(settings)
        self.weights = add_lora(self.unet, settings.lora_rank)
        if not self.weights:
            raise UserError(f"--model {settings.model} has no attention for a LoRA: --lora-rank 0")
        self.set_steps(settings)
        height, width = np.broadcast_to(self.unet.config.sample_size, 2).tolist()
        self.latent_shape = (self.unet.config.in_channels, height, width)
        if self.unet.config.out_channels != self.unet.config.in_channels:
            raise ValueError("its UNet predicts more than noise, or sees more than a latent")
        # logp is a mean over dimensions: the paper's 1e-4 is 1.6384 nats of its 4 x 64 x 64.
        self.clip_range = settings.clip_range or 1.6384 / math.prod(self.latent_shape)
        # As many pairs at a time as images were sampled: half precision then rounds both alike.
        self.micro_batch = settings.micro_batch or settings.sample_batch
        self.xl = hasattr(self.pipe, "text_encoder_2")
        if self.xl:  # original size, crop, target size
            sides = [side * self.pipe.vae_scale_factor for side in (height, width)]
            self.time_ids = torch.tensor([[*sides, 0, 0, *sides]], device=device)
        self.prompts = [None]
        self.table = []  # embeddings: a row for each of `prompts`, the first for no prompt
        self.encode(["a", "b"])
        if self.conditional and torch.equal(self.table[0][1], self.table[0][2]):
            raise ValueError("its tokenizer or text encoder cannot tell a from b")

    def prepare(self, settings):
        """Precision, memory layout and attention, as the device likes them."""
        cuda = self.device.type == "cuda"
        if cuda and settings.lora_rank:  # frozen, so half will do; elsewhere autocast casts it
            self.unet.to(self.dtype)
        # The rest stays in float32: XL's VAE overflows in fp16, and bf16 is too coarse for pixels.
        self.pipe.to(self.device)
        if cuda:
            self.unet.to(memory_format=torch.channels_last)  # as its convolutions want it
        if cuda and self.conditional:
            self.pipe.vae.enable_slicing()  # image by image: gigabytes less, hardly slower
        for part in self.unet.modules():
            if isinstance(part, Attention) and self.device.type == "cpu":
                part.set_processor(AttnProcessor())  # the fused one learns slowly there
        if settings.grad_checkpointing:
            self.unet.enable_gradient_checkpointing()

    def set_steps(self, settings):
        """The denoising steps, and those of them that there is something to learn from."""
        # DDIM's own default is to clip x_0 to the range of pixels, which latents do not have.
        config = {"clip_sample": not self.conditional, **self.pipe.scheduler.config}
        self.scheduler = scheduler = DDIMScheduler.from_config(config)
        scheduler.set_timesteps(settings.steps, device=self.device)
        self.eta = settings.eta
        # A deterministic step has nothing to learn from. Nearly deterministic ones are not worth
        # it: their noise does not show, but their gradient, in 1 / std, drowns the rest.
        zero = torch.zeros(1, 1, 1, 1, device=self.device)
        _, std = ddim_mean_std(scheduler, zero, scheduler.timesteps, zero, self.eta)
        self.trained_steps = (std.flatten() > settings.min_std).nonzero().flatten()
        if not len(self.trained_steps):
            raise UserError("no step adds noise to learn from: use more --steps, less --min-std")
        share = settings.train_steps_fraction * len(self.trained_steps)
        self.steps_learned = max(1, round(share))  # of each image in an epoch

    @torch.no_grad()
    def encode(self, prompts):
        """Prompts -> cond (B,), their rows in the table of embeddings."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.prompts]
        self.prompts += new
        if new and self.conditional:  # the prompt's and the empty one's, for XL then both pooled
            encoded = [self.pipe.encode_prompt(p, device=self.device, num_images_per_prompt=1,
                                               do_classifier_free_guidance=True) for p in new]
            empty = encoded[0][1::2]
            rows = [self.table or empty, *(parts[::2] for parts in encoded)]
            self.table = [torch.cat(part).to(self.unet.dtype) for part in zip(*rows)]
        return torch.tensor([self.prompts.index(p) for p in prompts], device=self.device)

    def predict(self, x_t, t, cond):
        """The network's output for x_t (B, C, H, W), t (B,), cond (B,), float32, with guidance."""
        guided = self.guidance_scale > 1
        if guided:
            x_t = torch.cat([x_t, x_t])
            t = t.repeat(2)
            cond = torch.cat([0 * cond, cond])  # row 0 is no prompt
        context = {"encoder_hidden_states": self.table[0][cond]} if self.conditional else {}
        if self.xl:
            ids = self.time_ids.expand(len(cond), -1)
            context["added_cond_kwargs"] = {"text_embeds": self.table[1][cond], "time_ids": ids}
        with torch.autocast(self.device.type, self.dtype, enabled=self.unet.dtype != self.dtype):
            output = self.unet(x_t.to(self.unet.dtype), t, **context).sample.float()
        if guided:
            uncond, conditional = output.chunk(2)
            output = uncond + self.guidance_scale * (conditional - uncond)
        return output

    @torch.no_grad()
    def decode(self, x_0):
        """Latents (B, C, H, W) -> images (B, 3, height, width), float32 in [0, 1]."""
        if self.conditional:
            vae = self.pipe.vae
            x_0 = vae.decode(x_0 / vae.config.scaling_factor).sample
        return (x_0 / 2 + 0.5).clamp(0, 1).expand(-1, 3, -1, -1)  # pixels may be grey


def load_pipeline(model):
    """A pipeline of a kind that can be trained here, from a hub id or a folder."""
    kinds = "StableDiffusionPipeline StableDiffusionXLPipeline DDPMPipeline DDIMPipeline".split()
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    path = model_path(model).as_posix()
    index = DiffusionPipeline.load_config(path)
    kind = index.get("_class_name")
    if kind not in kinds:
        raise UserError(f"--model {model} is a {kind}; what works: {', '.join(kinds)}")
    unet = getattr(diffusers, index["unet"][1])
    unet, report = unet.from_pretrained(path, subfolder="unet", output_loading_info=True)
    if report["missing_keys"]:  # diffusers would make them up
        raise ValueError(f"its UNet lacks {report['missing_keys'][0]}")
    return DiffusionPipeline.from_pretrained(path, unet=unet, safety_checker=None)


def model_path(model):
    """The folder of the bundled model for its name; any other folder or hub id unchanged."""
    return EXAMPLES / model if model == Settings.model else Path(model)


class LoRALinear(nn.Module):
    """y = W x + B A x, with a frozen W and trained A (rank, in) and B (out, rank) in float32.
    B starts at zero, so the layer starts as the pretrained one."""

    on = True  # of all layers at once: see without_lora

    def __init__(self, base, rank):
        super().__init__()
        self.base = base
        device = base.weight.device
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=device)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=device)
        nn.init.normal_(self.lora_A.weight, std=1 / rank)  # as in diffusers
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        x = x.contiguous()  # else half precision rounds otherwise with gradients than without
        y = self.base(x)
        if self.on:
            low = nn.functional.linear(x, self.lora_A.weight.to(y.dtype))
            y = y + nn.functional.linear(low, self.lora_B.weight.to(y.dtype))
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
    """Freeze the UNet but for a LoRA around its attention projections, or at rank 0 nothing of it.
    Returns the weights to train."""
    unet.requires_grad_(not rank)
    for name, layer in list(unet.named_modules()):
        if rank and name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            parent, _, child = name.rpartition(".")
            setattr(unet.get_submodule(parent), child, LoRALinear(layer, rank))
    return [weight for weight in unet.parameters() if weight.requires_grad]


def save_lora(unet, path):
    """Write the LoRA in diffusers' layout; no alpha in the file means that it equals the rank."""
    lora = {f"unet.{k}": v.cpu() for k, v in unet.state_dict().items() if ".lora_" in k}
    with whole_file(path) as tmp:
        save_file(lora, tmp, {"format": "pt"})


def load_lora(unet, rank, path):
    """Load a file in diffusers' layout into the UNet's LoRA layers. It must be of the same ones."""
    with explained(f"--init-lora {path}: no LoRA of this model whose rank and alpha are {rank}"):
        with safe_open(path, "pt") as file:
            lora = {k.removeprefix("unet."): file.get_tensor(k) for k in file.keys()}
            about = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
        missing, unexpected = unet.load_state_dict(lora, strict=False)
        other = unexpected + [k for k in missing if ".lora_" in k]
        if other:
            raise ValueError(f"it is of other layers, see {other[0]}")
        scales = {str(about[k]) for k in about if "alpha" in k or "rslora" in k}  # peft's names
        if scales - {str(rank), "False", "{}"}:
            raise ValueError("it scales its layers")


# ---------------------------------------------------- 7. the run folder: state, metrics, pictures
class Run:
    """All that the next epoch depends on."""

    def __init__(self, settings, policy):
        self.settings = settings
        self.policy = policy
        self.optimizer = torch.optim.AdamW(policy.weights, lr=settings.lr,
                                           weight_decay=settings.weight_decay)
        fp16 = policy.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(policy.device.type, enabled=fp16)
        self.memory = {}  # the recent rewards of each prompt
        self.log = []

    def advantages(self, prompts, rewards):
        """Of an epoch's images (N,): among their group, or else among their prompt's images."""
        s = self.settings
        if s.samples_per_prompt > 1:
            return group_advantages(rewards, s.samples_per_prompt)
        return prompt_advantages(self.memory, prompts, rewards, s.stats_buffer, s.stats_min_count)

    def step(self):
        """An optimizer step, but none if the gradient is not finite. Returns its norm."""
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.policy.weights, self.settings.grad_clip).item()
        if math.isfinite(norm):  # a loss or log-probability that is not finite shows here, too
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return norm

    def describe(self, terms, prompts, x, cond, scores, generator):
        """What the samples of an epoch tell, for metrics.csv: their rewards, KL and diversity."""
        reward = scores[:, 0]
        row = {"queries": self.log[-1]["queries"] + len(prompts),
               "reward_mean": reward.mean().item(), "reward_std": reward.std().item()}
        if len(terms) > 1:
            labels = [label for label, _, _ in terms]
            row |= zip(labels, scores.mean(0)[1:].tolist())
        if self.settings.lora_rank:  # else there is no pretrained model left
            row["kl"] = measure_kl(self.policy, x, cond, generator)
        row["diversity"] = diversity(x[:, -1], cond)
        return row

    def evaluate(self, terms, prompts, folder, epoch):
        """The mean reward of the same prompts from the same noise every time, with pictures."""
        prompts = [prompts[i % len(prompts)] for i in range(self.settings.eval_images)]
        terms = [term for term in terms if term[1]]  # monitors, of weight 0, are for the epochs
        noise, _ = random_numbers(self.settings, 0, self.policy.device)
        x, _, scores = sample(self.policy, terms, prompts, self.settings.sample_batch, noise)
        reward = scores[:, 0]
        captions = [f"{prompt[:16]}  {r:.2f}" for prompt, r in zip(prompts, reward.tolist())]
        path = folder / "samples" / f"epoch_{epoch:04d}.png"
        save_pictures(self.policy.decode(x[:, -1]), captions, path)
        return reward.mean().item()

    def too_far(self, row):
        """Whether an epoch's KL is past --kl-stop."""
        return 0 < self.settings.kl_stop < row.get("kl", 0)

    def save(self, folder):
        """Write the state, and the LoRA alone for others to use."""
        if self.settings.lora_rank:
            save_lora(self.policy.unet, folder / "pytorch_lora_weights.safetensors")
        state = {"weights": nn.ParameterList(self.policy.weights).state_dict(), "log": self.log,
                 "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                 "stats": self.memory}
        with whole_file(folder / "state.pt") as tmp, open(tmp, "wb") as file:
            torch.save(state, file)

    def load(self, path):
        """Take over a saved state. It may be somebody else's, which must not run code."""
        with explained(f"{path} is damaged or of another kind of run"):
            state = torch.load(path, map_location="cpu", weights_only=True)
            nn.ParameterList(self.policy.weights).load_state_dict(state["weights"])
            ours = self.optimizer.state_dict()["param_groups"]  # the rate may be another now
            self.optimizer.load_state_dict(state["optimizer"] | {"param_groups": ours})
            self.scaler.load_state_dict(self.scaler.state_dict() | state["scaler"])  # fp32 has none
            self.memory = state["stats"]
            self.log = state["log"]


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


def make_run_folder(settings):
    """A new folder for this run; one that is there is never used."""
    base = "runs/" + re.sub(r"[^\w.-]+", "_", settings.reward).strip("_")
    folder = Path(settings.out or base)
    number = 1
    while folder.exists() and not settings.out:
        number += 1
        folder = Path(f"{base}-{number}")
    with explained(f"--out {folder}: cannot make that; name a new folder, or --resume {folder}"):
        folder.mkdir(parents=True)
    return folder


COLUMNS = """epoch queries seconds reward_mean reward_std eval_reward kl diversity
             loss ratio_error clip_fraction approx_kl grad_norm skipped""".split()


def write_metrics(log, folder):
    """metrics.csv: a row an epoch, with a column of its own for each of several rewards."""
    columns = dict.fromkeys([*COLUMNS, *(name for row in log for name in row)])
    with whole_file(folder / "metrics.csv") as tmp, open(tmp, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in log:
            writer.writerow({k: f"{v:.6g}" if type(v) is float else v for k, v in row.items()})


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
    path = EXAMPLES / "prompts" / f"{name}.txt"
    with explained(f"prompts {name}: not animals, activities, imagenet, nor a text file"):
        text = (path if path.is_file() else Path(name)).read_text("utf-8-sig")
    lines = [line.strip() for line in text.splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise UserError(f"prompts {name}: the file holds no prompt; write one on each line")
    return prompts


def pick_device(name):
    """The torch.device of that name, or for "auto" the best one of this machine."""
    best = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    with explained(f"device {name}: not on this machine, which has {best}"):
        return torch.empty(0, device=best if name == "auto" else name).device


def make_settings(resume="", kind=Settings, **flags):
    """Settings as the command line makes them: the defaults, over them the model folder's
    ddpo.json (on resuming, the run's config.json instead), over them `flags`."""
    model = model_path(flags.get("model", Settings.model))
    file = Path(resume, "config.json") if resume else model / "ddpo.json"
    values = {}
    with explained(f"{file} must be a json object of settings"):
        if resume or file.is_file():
            values = json.loads(file.read_text())
        values.pop("made_with", None)
        for k, v in values.items():  # a model sets numbers alone, and no run names code to load
            mistrusted = not resume or k in ("reward", "monitor") and ":" in v
            if type(v) is str and mistrusted and k not in flags:
                again = f"--{k.replace('_', '-')} {shlex.quote(v)}"
                raise UserError(f"{file} cannot decide the {k}; if you trust it, add {again}")
    if resume:
        print("resumes", resume, {k: v for k, v in flags.items() if values.get(k) != v} or "")
    if flags.get("objective") == "reinforce":
        values["updates_per_epoch"] = 1
    lr_is_its = "lr" in values and values.get("lora_rank") == flags.get("lora_rank", 0)
    if {**values, **flags}.get("lora_rank") == 0 and not lr_is_its:
        values |= {"lr": 1e-5, "kl_stop": 0.0}  # for the whole UNet, which has no KL
    with explained(f"settings of {file} and flags"):
        return kind(**{**values, **flags})


def parse(argv=None, kind=Settings):
    """The command line, in which every setting is a flag: settings, and the run to resume."""
    about = "Fine-tune a diffusion model on a reward. A model's ddpo.json overrides these defaults."
    parser = argparse.ArgumentParser("ddpo.py", description=about, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)  # only what is given
    source = "".join(inspect.getsource(base) for base in kind.__mro__[:-1])
    helps = dict(re.findall(r"^ +(\w+): .*  # (.*)", source, re.MULTILINE))
    for f in fields(kind):
        how = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        text = f"{helps[f.name]} (default: {f.default!r})"
        parser.add_argument("--" + f.name.replace("_", "-"), help=text, **how)
    parser.add_argument("--resume", metavar="RUN", help="go on with the run in this folder")
    parser.error = lambda message: parser.exit(2, f"ddpo.py: error: {message}; see --help\n")
    flags = vars(parser.parse_args(argv))
    return make_settings(kind=kind, **flags), flags.get("resume")


def launch(settings, folder=None, reward=None, update=update, run_class=Run):
    """Train a new run, or go on with the one in `folder`; returns the folder. `reward` is a Python
    function in the place of settings.reward; `update` and `run_class` take the place of ours."""
    if reward:
        settings = replace(settings, reward=reward.__name__)
    prompts = load_prompts(settings.prompts)
    eval_prompts = load_prompts(settings.eval_prompts or settings.prompts)
    device = pick_device(settings.device)
    reward_device = pick_device(settings.reward_device or settings.device)
    terms = rewards.load_rewards(reward or settings.reward, settings.monitor, reward_device)
    if taken := {label for label, _, _ in terms} & set(COLUMNS):
        raise UserError(f"reward {taken.pop()}: metrics.csv has a column of this name; rename it")
    random_numbers(settings, 0, device)  # seeds the LoRA
    torch.set_flush_denormal(True)  # denormal numbers make a CPU crawl
    with explained(f"--model {settings.model}: no such pipeline, or one that cannot be trained"):
        policy = Policy(settings, device)
    if not policy.conditional:
        prompts = eval_prompts = [""]
    run = run_class(settings, policy)
    if folder and Path(folder, "state.pt").is_file():
        run.load(Path(folder, "state.pt"))
    elif settings.init_lora:
        load_lora(policy.unet, settings.lora_rank, settings.init_lora)
    folder = Path(folder) if folder else make_run_folder(settings)
    versions = {lib.__name__: lib.__version__ for lib in (torch, diffusers, transformers)}
    with whole_file(folder / "config.json") as tmp:
        tmp.write_text(json.dumps({**asdict(settings), "made_with": versions}, indent=2) + "\n")
    size = sum(weight.numel() for weight in policy.weights)
    print(f"trains {size:,} weights of {settings.model} on {device} in {policy.dtype};"
          f" an epoch is {settings.images_per_epoch} images of {settings.steps} steps,"
          f" {policy.steps_learned} of them learned from; results go to {folder}", flush=True)
    try:
        train(run, terms, prompts, eval_prompts, folder, update)
        if not settings.lora_rank:
            with explained(f"cannot write {folder / 'pipeline'}; what was saved before is whole"):
                policy.pipe.save_pretrained(folder / "pipeline")
    except (UserError, KeyboardInterrupt, torch.OutOfMemoryError) as error:
        why = str(error).partition("\n")[0] or "stopped"
        if isinstance(error, torch.OutOfMemoryError):
            why += "; lower --sample-batch and --micro-batch, or add --grad-checkpointing"
        how = f"python ddpo.py --resume {shlex.quote(str(folder))}"
        raise UserError(f"{why}; go on with: {how}") from error.__cause__
    first, last = run.log[0], run.log[-1]
    print(f"reward on the same prompts and noise: {first['eval_reward']:.3f} before,"
          f" {last['eval_reward']:.3f} after; see {folder}/samples/epoch_{last['epoch']:04d}.png")
    return folder


def main(argv=None, launch=launch, kind=Settings):
    """Run from the command line; a mistake ends in one line and a non-zero status."""
    try:
        launch(*parse(argv, kind))
    except UserError as error:
        print(f"ddpo.py: error: {error}", file=sys.stderr)
        if error.__cause__:  # a reward's own code failed: its author wants to see where
            traceback.print_exception(error.__cause__)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit("ddpo.py: stopped; nothing had begun")


if __name__ == "__main__":
    main()
