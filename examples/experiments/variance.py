"""Which noise decides the reward? The share of a reward's variance that is due to the prompt, to
the first noise x_T, and to the noise of each denoising step.

    python examples/experiments/variance.py --reward compressibility   # some minutes on one core

It takes the flags of ddpo.py, for any model and reward. DDPO learns from the noise of the steps.
The prompt's share is taken out by the prompt's statistics, that of x_T where the images of a group
start from the same one (--samples-per-prompt). A step whose noise does not matter costs as much to
learn from as any other and adds noise to the gradient: --min-std leaves it out.

Two images that have all noise down to x_t in common, and none after it, have rewards whose
covariance is the variance of E[r | x_t]. What it grows by in a step is due to the step's noise.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import ddpo
import rewards

IMAGES = 256  # the standard error of a share is about a sixteenth


def finish(policy, terms, prompts, x, step, batch_size, generator):
    """Denoise x (N, C, H, W) from this step on: all latents and the rewards (N,)."""
    scheduler = policy.scheduler
    timesteps = scheduler.timesteps
    scheduler.timesteps = timesteps[step:]
    latents = []
    totals = []
    for i in range(0, len(x), batch_size):
        batch = prompts[i : i + batch_size]
        xs, _ = ddpo.rollout(policy, batch, x[i : i + batch_size], generator)
        latents.append(xs)
        totals.append(ddpo.score(terms, policy.decode(xs[:, -1]), batch)[:, 0])
    scheduler.timesteps = timesteps
    return torch.cat(latents), torch.cat(totals)


def shares(policy, terms, prompts, batch_size, generator):
    """(What has the noise, its share of the variance), from the prompt to the last step."""

    def noise():
        shape = (len(prompts), *policy.latent_shape)
        return torch.randn(shape, generator=generator, device=policy.device)

    def again(x, step):
        return finish(policy, terms, prompts, x, step, batch_size, generator)

    latents, first = again(noise(), 0)
    steps = range(len(policy.scheduler.timesteps))
    known = [("prompt", noise(), 0), ("x_T", latents[:, 0], 0)]
    known += [(f"step {n}", latents[:, n], n) for n in steps[1:]]
    before = 0.0
    for what, x, step in known:
        _, second = again(x, step)
        explained = torch.cov(torch.stack([first, second]))[0, 1] / first.var()
        yield what, float(explained - before)
        before = explained
    yield f"step {len(steps)}", float(1 - before)


def launch(settings, resume):
    settings = replace(settings, min_std=0.0)
    device = ddpo.pick_device(settings.device)
    terms = rewards.load_rewards(settings.reward, device=device)
    policy = ddpo.Policy(settings, device)
    generator, choice = ddpo.random_numbers(settings, 1, device)
    prompts = ddpo.load_prompts(settings.prompts) if policy.conditional else [""]
    drawn = [prompts[i] for i in torch.randint(len(prompts), (IMAGES,), generator=choice)]
    levels = policy.levels[:, policy.scheduler.timesteps]
    _, std = ddpo.ddim_mean_std(0.0, 0.0, *levels)  # (T,)
    stds = ["", "", *(f", std {s:.2f}" for s in std.tolist())]
    parts = shares(policy, terms, drawn, settings.batch_size, generator)
    for (what, share), std in zip(parts, stds):
        print(f"{what}{std}: {share:.2f}", flush=True)


if __name__ == "__main__":
    ddpo.main(launch=launch, name="variance.py", about=__doc__)
