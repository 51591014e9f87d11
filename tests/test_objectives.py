"""Proves that both objectives follow the gradient of the expected reward, by comparing them with
closed forms, and that the clip stops a pair only once its ratio has left the range in the direction
that its advantage favours."""

import math

import pytest
import torch
from conftest import draw
from diffusers import DDIMScheduler
from torch.distributions import Normal

import ddpo
from ddpo import clipped_loss, reinforce_loss


def test_at_the_old_parameters_both_objectives_have_the_same_gradient():
    generator = torch.Generator().manual_seed(0)
    logp, adv = torch.randn(2, 50, generator=generator)
    logp.requires_grad_()
    clipped = clipped_loss(logp, logp.detach(), adv, 1e-4).sum()
    reinforce = reinforce_loss(logp, adv).sum()
    assert torch.equal(torch.autograd.grad(clipped, logp)[0], -adv)
    assert torch.equal(torch.autograd.grad(reinforce, logp)[0], -adv)


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
    if objective == "clipped":
        loss = clipped_loss(logp, logp_old, reward, clip_range=1e6)
    else:
        loss = reinforce_loss(logp, reward)
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

    def __init__(self, steps_learned):
        config = {"clip_sample": False, "prediction_type": "sample"}
        last_step_is_random = {"set_alpha_to_one": False, "steps_offset": 1}
        self.scheduler = DDIMScheduler(6, 0.2, 0.5, **config, **last_step_is_random)
        self.scheduler.set_timesteps(3)
        self.eta = 1.0
        self.trained_steps = torch.arange(3)
        self.steps_learned = steps_learned
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self.latent_shape = (1, 1, 1)
        self.clip_range = 0.1
        self.micro_batch = 9999
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
            x = self.scheduler.step(output, t, x, self.eta, variance_noise=none).prev_sample
        return x.item()


@pytest.mark.parametrize(
    "objective, steps_learned", [("clipped", 3), ("reinforce", 3), ("clipped", 2)]
)
def test_rollout_and_update_follow_the_gradient_of_the_expected_reward(objective, steps_learned):
    """The whole chain, sampled by `rollout` and learned from by `update`, against the closed form:
    the mean of x_0 is linear in theta and its variance does not depend on it. `update` averages
    over the steps, so it gives a T-th of the gradient, also if it learns from some of them only."""
    settings = ddpo.Settings(objective=objective, updates_per_epoch=1, grad_clip=1e9)
    generator = torch.Generator().manual_seed(0)
    prompts = [""] * 4000
    grads = []
    for _ in range(50):
        policy = OneNumberPolicy(steps_learned)
        x, logp = draw(policy, prompts, generator)
        reward = -((x[:, -1].flatten() - GOAL) ** 2)
        run = ddpo.Run(settings, policy)
        run.optimizer = torch.optim.SGD(policy.weights, lr=1.0)
        ddpo.update(run, (x, logp, policy.encode(prompts), reward), generator)
        grads.append(policy.weights[0].item() - THETA)  # what gradient ascent at rate 1 added
    at = policy.expected_x_0(THETA)
    slope = policy.expected_x_0(1.0) - policy.expected_x_0(0.0)
    expected = -2 * (at - GOAL) * slope / len(policy.scheduler.timesteps)
    grads = torch.tensor(grads)
    error = grads.std().item() / len(grads) ** 0.5
    assert error < abs(expected) / 15, "the test would not notice a wrong gradient"
    assert abs(grads.mean().item() - expected) < 4 * error
