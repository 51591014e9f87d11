"""Proves that what a user's own code may replace is used wherever the original would be: the
policy's step in sampling, learning and KL; what a Run keeps, records and steps with."""

import json
import shutil

import pytest
import torch
from conftest import (
    PROMPTS,
    flat,
    lora_bytes,
    make_policy,
    read_metrics,
    sampled,
    small_run,
    update_by_sgd,
)
from torch.distributions import Normal, kl_divergence

import ddpo


def launch(model, out, resume=None, run_class=ddpo.Run, **settings):
    """Train a small run, or go on with it."""
    settings = ddpo.Settings(**small_run(model, out=out, eval_images=1, **settings))
    return ddpo.launch(settings, resume, run_class=run_class)


# ---------------------------------------------------- the policy's step


class Halving(ddpo.Policy):
    """Not DDIM at all."""

    def mean_std(self, output, t, x_t):
        return x_t / 2 + output / 10, torch.full((len(t), 1, 1, 1), 0.5)


def test_another_step_is_sampled_learned_and_measured(tiniest_model):
    given = {"kl_coef": 0.1, "policy_class": Halving}
    policy, settings = make_policy(tiniest_model, 0.5, **given)
    samples = sampled(policy, 1.0)
    logps = []
    log_ratios = []
    nats = []
    for j, t in enumerate(policy.scheduler.timesteps.expand(6, 4).T):
        x_t, x_prev = samples.x[:, j], samples.x[:, j + 1]
        output = policy.predict(x_t, t, samples.cond)
        with ddpo.without_lora():
            pretrained = policy.predict(x_t, t, samples.cond).detach()
        ours, theirs = (Normal(x_t / 2 + out / 10, 0.5) for out in (output, pretrained))
        logps.append(ours.log_prob(x_prev).mean((1, 2, 3)))
        log_ratios.append((ours.log_prob(x_prev) - theirs.log_prob(x_prev)).sum((1, 2, 3)))
        nats.append(kl_divergence(ours, theirs).mean((1, 2, 3)))
    logp = torch.stack(logps, 1)
    torch.testing.assert_close(samples.logp, logp, rtol=1e-5, atol=1e-5)

    two = ddpo.Samples(PROMPTS[:2], samples.cond[:2], samples.x[:2], samples.logp[:2], None)
    kl, _ = ddpo.measure_kl(policy, two)
    assert kl.item() == pytest.approx(sum(log_ratios)[:2].mean().item(), rel=1e-3)
    loss = 0.1 * torch.stack(nats).mean() - logp.exp().div(logp.exp().detach()).mean()
    expected = flat(torch.autograd.grad(loss, policy.weights))
    metrics, moved = update_by_sgd(policy, settings, samples)
    assert metrics["ratio_error"] <= 1e-6
    torch.testing.assert_close(moved, expected, atol=1e-6, rtol=0)
    assert moved.abs().max() > 1e-4


# ---------------------------------------------------- a run


class Counting(ddpo.Run):
    """Counts its epochs in the state, and keeps the rows that it records."""

    def __init__(self, *args):
        super().__init__(*args)
        self.count = 0
        self.rows = []

    def record(self, row):
        super().record(row)
        self.rows.append(dict(row))
        self.count += 1
        Counting.last = self

    def state(self):
        return {**super().state(), "count": self.count}

    def load(self, state):
        super().load(state)
        self.count = state["count"]


def test_a_run_keeps_what_is_added_to_its_state_and_records_each_epoch_once(
    tiniest_model, tmp_path
):
    run = tmp_path / "run"
    launch(tiniest_model, run, run_class=Counting)
    rows = Counting.last.rows
    assert [row["epoch"] for row in rows] == [0, 1, 2] and Counting.last.count == 3
    saved = read_metrics(run)
    for row, text in zip(rows, saved, strict=True):
        assert text == {name: str(row.get(name, "")) for name in text}
        assert row.keys() <= text.keys()
        assert {type(value) for value in row.values()} <= {int, float, str}
    launch(tiniest_model, run, run, Counting, epochs=3)
    assert [row["epoch"] for row in Counting.last.rows] == [3] and Counting.last.count == 4
    assert json.loads((run / "config.json").read_text())["made_with"]["run_class"] == "Counting"


class Momentum(torch.optim.Optimizer):
    """Keeps what it remembers in its groups, as 8-bit optimizers and schedule-free ones do."""

    def __init__(self, weights, lr):
        super().__init__(weights, {"lr": lr, "steps": 0, "speed": None})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["steps"] += 1
            grads = [p.grad for p in group["params"]]
            old = group["speed"] or grads
            group["speed"] = [0.9 * v + g for v, g in zip(old, grads)]
            for p, v in zip(group["params"], group["speed"]):
                p -= group["lr"] * v / group["steps"]


class MomentumRun(ddpo.Run):
    def __init__(self, settings, policy, folder=None):
        super().__init__(settings, policy, folder)
        self.optimizer = Momentum(policy.weights, settings.lr)


def test_another_optimizer_is_resumed_bit_for_bit_and_at_another_rate(tiniest_model, tmp_path):
    own = {"run_class": MomentumRun, "lr": 1.0, "images_per_epoch": 4}
    launch(tiniest_model, tmp_path / "whole", **own)
    run = tmp_path / "run"
    launch(tiniest_model, run, epochs=1, **own)
    begun = torch.load(run / "state.pt", weights_only=True)
    assert begun["optimizer"]["param_groups"][0]["steps"] == 2
    slower = shutil.copytree(run, tmp_path / "slower")
    launch(tiniest_model, run, run, **own)
    assert lora_bytes(run) == lora_bytes(tmp_path / "whole")
    launch(tiniest_model, run, slower, **{**own, "lr": 0.5})
    group = torch.load(slower / "state.pt", weights_only=True)["optimizer"]["param_groups"][0]
    assert group["lr"] == 0.5 and group["steps"] == 4
    assert lora_bytes(slower) != lora_bytes(run)
