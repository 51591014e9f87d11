"""Proves that examples/sweep.py runs what a variant's name says, for the same work each, and judges it as its docstring says."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ddpo
import rewards

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import sweep


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """The command lines of ddpo.py that are run, which here do nothing but leave what the sweep looks for."""
    lines = []

    def run(command, **options):
        assert command[:2] == [sys.executable, "ddpo.py"] and options["env"]["OMP_NUM_THREADS"] == "1" and options["check"]
        lines.append(command[2:])

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.chdir(Path(__file__).parent.parent)
    return lines


@pytest.mark.parametrize("variant", ["base", *sweep.VARIANTS, "lr 0.005, steps 15"])
def test_a_variant_differs_in_what_its_name_says_and_does_the_same_work(variant, commands, tmp_path):
    sweep.train("base", 3, 0.5, tmp_path)
    sweep.train(variant, 3, 0.5, tmp_path)
    base, varied = (vars(ddpo.parse(command)[0]) for command in commands)
    changed = {k: v for k, v in varied.items() if v != base[k] and k not in ("out", "epochs")}
    assert changed == {k: float(v) for k, v in (part.split() for part in variant.split(", ") if part != "base")}
    work = [s["epochs"] * s["images_per_epoch"] * s["steps"] for s in (base, varied)]
    assert work[0] == 20 * 64 * 10 and work[1] == pytest.approx(work[0], rel=0.03)
    assert base["monitor"] == "examples/sweep.py:named" and base["seed"] == 3 and base["reward"] == "compressibility"


def test_a_run_goes_on_with_more_of_the_time_and_is_not_repeated(commands, tmp_path):
    run = tmp_path / "lr 0.02 seed 1"
    run.mkdir()
    (run / "config.json").touch()
    (run / "state_00020.pt").touch()
    sweep.train("lr 0.02", 1, 0.5, tmp_path)
    assert not commands
    sweep.train("lr 0.02", 1, 1.0, tmp_path)
    assert commands == [[f"--resume={run}", "--epochs=40"]]


def test_an_unknown_setting_is_named():
    with pytest.raises(SystemExit, match="no setting named lrr; there are images_per_epoch"):
        sweep.settings("lrr 1")


@pytest.mark.parametrize("named, best", [
    ([1, 1, 1, 1, 1, 1], (6, 1.25)),  # the last three
    ([1, 1, 1, 0.8, 0.9, 1], (6, 1.25)),  # named by 0.9 on average
    ([1, 1, 1, 0.8, 0.8, 0.9], (4, 1.75)),  # 1, 1, 0.8 is still enough
    ([1, 1, 0.9, 0.5, 0.5, 0.5], (3, 2.0)),
])  # fmt: skip
def test_the_best_three_epochs_are_the_smallest_that_can_be_named(named, best, tmp_path):
    sizes = [2.25, 2.0, 1.75, 1.5, 1.25, 1.0]
    with open(tmp_path / "metrics.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["epoch", "reward_mean", "named", "kl"])
        rows.writerow([0, "", "", ""])
        rows.writerows([epoch, -size, share, 10 * epoch] for epoch, (size, share) in enumerate(zip(sizes, named), 1))
    epoch, ran, size, share, nats = sweep.result(tmp_path)
    assert (epoch, size) == best and ran == 6 and nats == 10 * (epoch - 1)
    assert share == pytest.approx(sum(named[epoch - 3 : epoch]) / 3)


def test_what_the_bundled_model_draws_is_named_and_noise_is_not(monkeypatch):
    """One picture of each of nine animals, under its own name and under its neighbour's."""
    monkeypatch.chdir(Path(__file__).parent.parent)
    policy = ddpo.Policy(ddpo.parse(["--device", "cpu"])[0], torch.device("cpu"))
    animals = "cat horse zebra bird cow lion tiger fox ant".split()
    x, _ = ddpo.rollout(policy, animals, 1.0, torch.Generator().manual_seed(0))
    ((_, _, named),) = rewards.load_rewards("examples/sweep.py:named")
    images = policy.decode(x[:, -1])
    assert sum(named(images, animals)) >= 8 and sum(named(images, animals[1:] + animals[:1])) <= 1
    assert sum(named(torch.rand(images.shape, generator=torch.Generator().manual_seed(0)), animals)) <= 2
