"""Proves that examples/experiments/variance.py finds how much of a reward each noise decides: of a
chain that is linear in its noise the shares are known."""

import sys

import pytest
import torch
from test_objectives import OneNumberPolicy

import ddpo

sys.path.insert(0, str(ddpo.EXAMPLES / "experiments"))
import variance


def test_shares_are_those_of_a_linear_chain():
    policy = OneNumberPolicy()
    policy.decode = lambda x: x
    scheduler = policy.scheduler

    def end(x_T, noises):
        """x_0 by diffusers' own steps, for a network that always predicts 0."""
        x = torch.tensor([float(x_T)])
        for t, noise in zip(scheduler.timesteps.tolist(), noises):
            how = {"eta": 1.0, "variance_noise": torch.tensor([float(noise)])}
            x = scheduler.step(torch.zeros(1), t, x, **how).prev_sample
        return x.item()

    effects = [end(1, [0, 0, 0])]
    for step in range(3):
        effects.append(end(0, [float(n == step) for n in range(3)]))
    total = 1.0 + sum(effect**2 for effect in effects)
    expected = [1 / total, *(effect**2 / total for effect in effects)]

    names = ["1", "-1"] * 20_000  # the prompt adds 1 or -1: a variance of 1

    def reward(images, prompts):
        return images.flatten() + torch.tensor([float(prompt) for prompt in prompts])

    generator = torch.Generator().manual_seed(0)
    terms = [("reward", 1.0, reward)]
    found = list(variance.shares(policy, terms, names, len(names), generator))
    assert [what for what, _ in found] == ["prompt", "x_T", "step 1", "step 2", "step 3"]
    assert [share for _, share in found] == pytest.approx(expected, abs=0.02)
    assert max(expected) - min(expected) > 0.1, "a wrong order would not be noticed"
