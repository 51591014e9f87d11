"""Proves that both objectives follow the gradient of the expected reward, by comparing them with
closed forms, that the clip stops a pair only once its ratio has left the range in the direction
that its advantage favours, and that another objective is a function and its name in a table."""

import math

import pytest
import torch
from conftest import draw, make_settings, update_by_sgd
from diffusers import DDIMScheduler
from torch.distributions import Normal

import ddpo
from ddpo import clipped_loss, reinforce_loss


@pytest.mark.parametrize(
    "adv, ratio, loss, pulls",
    [
        (+2.0, 0.8, -1.6, True),  # good, but less likely than before: pull it back up
        (+2.0, 1.05, -2.1, True),  # good, within the range
        (+2.0, 1.3, -2.2, False),  # good, already favoured enough
        (-2.0, 1.3, +2.6, True),  # bad, but more likely than before: push it down
        (-2.0, 0.95, +1.9, True),  # bad, within the range
        (-2.0, 0.7, +1.8, False),  # bad, already suppressed enough
        (0.0, 1.3, 0.0, False),
    ],
)
def test_clip_cuts_only_what_the_advantage_already_favours(adv, ratio, loss, pulls):
    logp = torch.tensor([-1.0 + math.log(ratio)], requires_grad=True)
    logp_old = torch.tensor([-1.0])
    value = clipped_loss(logp, logp_old, torch.tensor([adv]), clip_range=0.1)
    value.sum().backward()
    assert value.item() == pytest.approx(loss, abs=1e-6)
    assert logp.grad.item() == pytest.approx(-adv * ratio if pulls else 0, abs=1e-6)


# A policy N(theta, STD^2) with the reward -(x - GOAL)^2 expects -(theta - GOAL)^2 - STD^2, whose
# gradient is -2 (theta - GOAL).
THETA = 0.3
STD = 0.7
GOAL = 1.0


def gaussian_gradient(objective, theta_old, n=200_000):
    """Mean and standard error of the gradient that samples from theta_old give at THETA."""
    x = theta_old + STD * torch.randn(n, generator=torch.Generator().manual_seed(0))
    theta = torch.full((n,), THETA, requires_grad=True)  # one each, to see each sample's gradient
    logp = Normal(theta, STD).log_prob(x)
    logp_old = Normal(theta_old, STD).log_prob(x)
    reward = -((x - GOAL) ** 2)
    loss = ddpo.OBJECTIVES[objective](logp, logp_old, reward, 1e6)
    (grad,) = torch.autograd.grad(-loss.sum(), theta)
    return grad.mean().item(), grad.std().item() / n**0.5


@pytest.mark.parametrize(
    "objective, theta_old", [("clipped", THETA), ("clipped", THETA - 0.4), ("reinforce", THETA)]
)
def test_gradient_is_unbiased(objective, theta_old):
    mean, error = gaussian_gradient(objective, theta_old)
    assert abs(mean - -2 * (THETA - GOAL)) < 4 * error < 0.1


def test_reinforce_is_biased_on_stale_samples():
    """Why it takes one update an epoch, and why the clipped objective has a ratio."""
    mean, error = gaussian_gradient("reinforce", THETA - 0.4)
    assert abs(mean - -2 * (THETA - GOAL)) > 20 * error


class OneNumberPolicy:
    """Denoises a single pixel, and always believes that the clean one is theta."""

    mean_std = ddpo.Policy.mean_std

    def __init__(self):
        config = {"clip_sample": False, "prediction_type": "sample"}
        last_step_is_random = {"set_alpha_to_one": False, "steps_offset": 1}
        self.scheduler = DDIMScheduler(6, 0.2, 0.5, **config, **last_step_is_random)
        self.scheduler.set_timesteps(3)
        self.levels = ddpo.ddim_levels(self.scheduler)
        self.trained_steps = [0, 1, 2]
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self.latent_shape = (1, 1, 1)
        self.clip_range = 0.1
        self.batch_size = 9999
        self.weights = [torch.tensor([THETA], requires_grad=True)]

    def encode(self, prompts):
        return torch.zeros(len(prompts), dtype=torch.long)

    def predict(self, x_t, t, cond):
        return self.weights[0].expand_as(x_t)

    def expected_x_0(self, theta):
        """x_0 is linear in the noise, so its mean is the path without noise: diffusers' steps from
        0."""
        x = torch.zeros(1)
        none = torch.zeros(1)
        for t in self.scheduler.timesteps.tolist():
            output = torch.tensor([theta])
            x = self.scheduler.step(output, t, x, 1.0, variance_noise=none).prev_sample
        return x.item()


def gradient_step(settings, generator, images):
    """What gradient ascent at rate 1 adds to theta, on images sampled for it."""
    policy = OneNumberPolicy()
    prompts = [""] * images
    x, logp = draw(policy, prompts, generator)
    reward = -((x[:, -1].flatten() - GOAL) ** 2)
    samples = ddpo.Samples(prompts, policy.encode(prompts), x, logp, reward[:, None], reward)
    return -update_by_sgd(policy, settings, samples)[1].item()


@pytest.mark.parametrize("objective", ["clipped", "reinforce"])
def test_rollout_and_update_follow_the_gradient_of_the_expected_reward(objective):
    """The whole chain, sampled by `rollout` and learned from by `update`, against the closed form:
    the mean of x_0 is linear in theta and its variance does not depend on it. `update` averages
    over the T steps, so it gives a T-th of the gradient."""
    settings = make_settings("", objective=objective, updates_per_epoch=1)
    generator = torch.Generator().manual_seed(0)
    grads = torch.tensor([gradient_step(settings, generator, 8000) for _ in range(25)])
    policy = OneNumberPolicy()
    at = policy.expected_x_0(THETA)
    slope = policy.expected_x_0(1.0) - policy.expected_x_0(0.0)
    expected = -2 * (at - GOAL) * slope / len(policy.scheduler.timesteps)
    error = grads.std().item() / len(grads) ** 0.5
    assert error < abs(expected) / 15, "the test would not notice a wrong gradient"
    assert abs(grads.mean().item() - expected) < 4 * error


def test_another_objective_is_a_function_and_an_entry(monkeypatch):
    def doubled(logp, logp_old, adv, clip_range):
        return 2 * reinforce_loss(logp, logp_old, adv, clip_range)

    with pytest.raises(ddpo.UserError, match="objective doubled: there are clipped, reinforce"):
        make_settings("", objective="doubled")
    monkeypatch.setitem(ddpo.OBJECTIVES, "doubled", doubled)
    steps = []
    for objective in ("reinforce", "doubled"):
        settings = make_settings("", objective=objective, updates_per_epoch=1)
        steps.append(gradient_step(settings, torch.Generator().manual_seed(0), 8))
    assert steps[1] == pytest.approx(2 * steps[0], rel=1e-4) and abs(steps[0]) > 1e-3
