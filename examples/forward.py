"""DDPO's loop with updates that learn from finished images with noise added to them.

    python examples/forward.py --reward compressibility --method nft

For K pairs of noise eps and time t of each image x_0, x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps and
l(theta) = mean (eps_theta - eps)^2; A is the image's advantage, old the network that sampled it:

    rwr   softmax(b A) l                                  good images are imitated
    awm   -A/5 exp(logp - logp_old), logp = -4 t l^0.25   a policy gradient; logp is for log p(x_0)
    pepg  exp(d) (A - d) l, d = l_old - l                 another, with a KL to old
    nft   r L(old + step) + (1 - r) L(old - step)         r = 1/2 + A/10, step = beta (theta - old)

At theta = old the last three have the gradient A grad l, up to a positive factor. Further on theta
is held near old by PEPG's KL, by NFT's other half (to 1 / beta errors), in AWM by --ref-coef alone.
RWR, the baseline, learns nothing from bad images. A pair costs 4 calls of the network, a backward
being 2, and a denoising step 1, not 4 as in DDPO: use these where steps are many, or their noise is
too little for DDPO. Simpler than the papers: old stays for an epoch, the sampler is DDPO's, guided,
models are of eps, v or x_0 and no flows, and A lacks the epoch's mean, as a memory may lag.
"""

import functools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ddpo


@dataclass(frozen=True)
class ForwardSettings(ddpo.Settings):
    method: str = ddpo.flag("nft", "rwr, awm, nft or pepg")
    noise_levels: int = ddpo.flag(4, "pairs of noise and time for each image (K)", 1)
    beta: float = ddpo.flag(1.0, "nft: the smaller, the further from old it can go", 1e-6)
    inverse_temperature: float = ddpo.flag(1.0, "rwr: an image counts as softmax(this * adv)")
    keep: float = ddpo.flag(1.0, "rwr: this share of the images counts, the best ones")
    ref_coef: float = ddpo.flag(0.0, "of mean (eps - the pretrained model's)^2 in the loss")

    def __post_init__(self):
        super().__post_init__()
        if self.method not in ("rwr", "awm", "nft", "pepg") or self.keep > 1:
            raise ddpo.UserError("method: rwr, awm, nft, pepg; keep: at most 1")
        if self.kl_coef or (self.ref_coef and not self.lora_rank):
            raise ddpo.UserError("kl_coef does nothing here; ref_coef does, and needs a LoRA")


def error(pred, target):  # (P, C, H, W) -> (P,)
    return ((pred - target) ** 2).mean((1, 2, 3))


def rwr_weights(adv, inverse_temperature, keep):
    """Reward-weighted regression (Lee et al. 2023; Black et al. 2024, 4.2): softmax(b A) of the
    best share `keep` of N advantages and of those equal to the last of them; else 0; times N."""
    kept = adv >= adv.quantile(1 - keep)
    return (inverse_temperature * adv).masked_fill(~kept, -torch.inf).softmax(0) * len(adv)


def awm_loss(pred, old, target, adv, time):
    """Advantage-weighted matching, arXiv 2509.25050. The time is in [0, 1)."""
    logp = -4 * time * (error(pred, target) + 1e-10) ** 0.25
    logp_old = -4 * time * (error(old, target) + 1e-10) ** 0.25
    return -adv / 5 * torch.exp(logp - logp_old)


def nft_loss(pred, old, target, adv, sigma, beta):
    """DiffusionNFT, arXiv 2509.16117, sigma = sqrt(1 - abar). For models of v, as theirs, L is the
    error of x_0 over its mean size; of eps it lacks 1 / sqrt(abar), which explodes at the end."""
    def L(mixed):
        size = (mixed - target).detach().abs().mean((1, 2, 3)).clamp(min=1e-5)
        return sigma * error(mixed, target) / size
    r = adv.clamp(-5, 5) / 10 + 0.5
    step = beta * (pred - old)
    return 5 / beta * (r * L(old + step) + (1 - r) * L(old - step))


def pepg_loss(pred, old, target, adv):
    """PEPG, arXiv 2602.04663. Its A is 0.1 (reward - mean), not divided by a std as adv is."""
    E = -error(pred, target)
    d = E.detach() + error(old, target)
    return -torch.exp(d) * (0.1 * adv - d) * E


def pair_loss(policy, settings, x_t, t, cond, target, adv, old=None):  # (P,)
    pred = policy.predict(x_t, t, cond)
    if settings.method == "rwr":
        loss = adv * error(pred, target)
    elif settings.method == "awm":
        loss = awm_loss(pred, old, target, adv, t / policy.scheduler.config.num_train_timesteps)
    elif settings.method == "nft":
        sigma = (1 - policy.scheduler.alphas_cumprod.to(t.device)[t]).sqrt()
        loss = nft_loss(pred, old, target, adv, sigma, settings.beta)
    else:
        loss = pepg_loss(pred, old, target, adv)
    if settings.ref_coef:
        with torch.no_grad(), ddpo.without_lora():
            ref = policy.predict(x_t, t, cond)
        loss = loss + settings.ref_coef * error(pred, ref)
    return loss


def draw_times(images, K, end, generator):
    """Of K times (images, K), whole numbers in [0, end), each is in a stratum of its own."""
    return (torch.arange(K) * end + torch.randint(end, (images, K), generator=generator)) // K


def forward_update(run, samples, generator):
    """In the place of ddpo.update: a step on each minibatch of images, with all of their pairs."""
    settings = run.settings
    policy = run.policy
    x = samples.x
    adv = samples.adv - samples.adv.mean()
    order = torch.randperm(len(x), generator=generator)
    if settings.method == "rwr":
        adv = rwr_weights(adv, settings.inverse_temperature, settings.keep)
        order = order[adv.cpu()[order] > 0]  # the others would be work for nothing
    # The images of a group share times and noise: only images differ.
    abar = policy.scheduler.alphas_cumprod.to(x.device).view(-1, 1, 1, 1)
    K = settings.noise_levels
    group = settings.samples_per_prompt
    t = draw_times(len(x) // group, K, len(abar), generator)
    noise = torch.randn(*t.shape, *x.shape[2:], generator=generator)
    t, noise = [v.repeat_interleave(group, 0)[order].flatten(0, 1).to(x.device) for v in (t, noise)]
    x_0, cond, adv = [v[order].repeat_interleave(K, 0) for v in (x[:, -1], samples.cond, adv)]
    signal = abar[t].sqrt()
    sigma = (1 - abar[t]).sqrt()
    x_t = signal * x_0 + sigma * noise
    targets = {"epsilon": noise, "v_prediction": signal * noise - sigma * x_0, "sample": x_0}
    pairs = [x_t, t, cond, targets[policy.scheduler.config.prediction_type], adv]
    rows = torch.arange(len(t), device=x.device)
    if settings.method != "rwr":  # now, for after the first step the weights that sampled are gone
        with torch.no_grad():
            old = [policy.predict(x_t[i], t[i], cond[i]) for i in rows.split(policy.batch_size)]
        pairs.append(torch.cat(old))
    losses = []
    norms = []
    for minibatch in rows.chunk(settings.updates_per_epoch):
        for micro in minibatch.split(policy.batch_size):
            loss = pair_loss(policy, settings, *[v[micro] for v in pairs]).sum() / (len(x) * K)
            run.scaler.scale(loss * settings.updates_per_epoch).backward()
            losses.append(loss.detach())
        norms.append(run.step())
    skipped = sum(not math.isfinite(norm) for norm in norms)
    return {"loss": sum(losses), "grad_norm": sum(norms) / len(norms), "skipped": skipped}


if __name__ == "__main__":
    launch = functools.partial(ddpo.launch, update=forward_update)
    ddpo.main(launch=launch, kind=ForwardSettings, name="forward.py", about=__doc__)
