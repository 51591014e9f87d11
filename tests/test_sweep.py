"""Proves that examples/sweep.py runs what a variant's name says, for the same work each, and judges
it as its docstring says."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ddpo
import rewards

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import sweep

ROOT = Path(__file__).parent.parent


@pytest.fixture
def commands(monkeypatch):
    """The command lines of ddpo.py that are run, which here do nothing."""
    lines = []

    def run(command, **options):
        assert command[:2] == [sys.executable, "ddpo.py"]
        assert options["env"]["OMP_NUM_THREADS"] == "1" and options["check"]
        lines.append(command[2:])

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.chdir(ROOT)
    return lines


def write_metrics(run, rows):
    """Rows of (reward_mean, named, kl), after that of the evaluation before training."""
    run.mkdir(exist_ok=True)
    with open(run / "metrics.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "reward_mean", "named", "kl"])
        writer.writerow([0, "", "", ""])
        writer.writerows([epoch, *row] for epoch, row in enumerate(rows, 1))


@pytest.mark.parametrize("variant", ["base", *sweep.VARIANTS, "lr 0.005, steps 15"])
def test_a_variant_differs_in_what_its_name_says_and_does_the_same_work(
    variant, commands, tmp_path
):
    sweep.train("base", 3, 0.5, tmp_path)
    sweep.train(variant, 3, 0.5, tmp_path)
    base, varied = (vars(ddpo.parse(command)[0]) for command in commands)
    names = [k for k in base if varied[k] != base[k] and k not in ("out", "epochs")]
    parts = [part.split() for part in variant.split(", ") if part != "base"]
    assert {k: varied[k] for k in names} == {k: float(value) for k, value in parts}
    work = [s["epochs"] * s["images_per_epoch"] * s["steps"] for s in (base, varied)]
    assert work[0] == 20 * 64 * 10 and work[1] == pytest.approx(work[0], rel=0.03)
    assert base["monitor"] == "examples/sweep.py:named" and base["seed"] == 3
    assert base["reward"] == "compressibility"


def test_a_run_goes_on_with_more_of_the_time_and_is_not_repeated(commands, tmp_path):
    run = tmp_path / "lr 0.02 seed 1"
    write_metrics(run, [(-2, 1, 0)] * 20)
    sweep.train("lr 0.02", 1, 0.5, tmp_path)
    assert not commands
    saved = {"seed": 1, "lr": 0.02, "epochs": 20, "monitor": "examples/sweep.py:named"}
    (run / "config.json").write_text(json.dumps(saved))
    sweep.train("lr 0.02", 1, 1.0, tmp_path)
    (command,) = commands
    settings, resumed = ddpo.parse(command)
    assert resumed == str(run)
    assert vars(settings) == {**vars(ddpo.Settings()), **saved, "epochs": 40}


def test_an_unknown_setting_is_named():
    with pytest.raises(SystemExit, match="no setting named lrr; there are images_per_epoch"):
        sweep.settings("lrr 1")


@pytest.mark.parametrize("named, best", [
    ([1, 1, 1, 1, 1, 1], (6, 1.25)),  # the last three
    ([1, 1, 1, 0.8, 0.9, 1], (6, 1.25)),  # named by 0.9 on average
    ([1, 1, 1, 0.8, 0.8, 0.9], (4, 1.75)),  # 1, 1, 0.8 is still enough
    ([1, 1, 0.9, 0.5, 0.5, 0.5], (3, 2.0)),
    ([1, 1, 0.5, 0.5, 0.5, 0.5], None),
])  # fmt: skip
def test_the_best_three_epochs_are_the_smallest_that_can_be_named(named, best, tmp_path):
    sizes = [2.25, 2.0, 1.75, 1.5, 1.25, 1.0]
    rows = [(-sizes[i], named[i], 10 * i) for i in range(6)]
    run = tmp_path / "lr 0.005, steps 15 seed 2"
    write_metrics(run, rows)
    sweep.report(tmp_path)
    table = (tmp_path / "sweep.md").read_text().splitlines()[2:]
    if best is None:
        assert table == []
        return
    epoch, size = best
    share = sum(named[epoch - 3 : epoch]) / 3
    minutes = 5 * epoch * 15 / (40 * 10)
    found = f"6 | {epoch} | {minutes:.1f} | {size:.2f} | {share:.2f} | {10 * (epoch - 2)}"
    assert table == [f"| lr 0.005, steps 15 | 2 | {found} |"]


def test_what_the_bundled_model_draws_is_named_and_noise_is_not(monkeypatch):
    """One picture of each of nine animals, under its own name and under its neighbour's."""
    monkeypatch.chdir(ROOT)
    policy = ddpo.Policy(ddpo.make_settings(steps=6), torch.device("cpu"))
    animals = "cat horse zebra bird cow lion tiger fox ant".split()
    x, _ = ddpo.rollout(policy, animals, torch.Generator().manual_seed(0))
    ((_, _, named),) = rewards.load_rewards("examples/sweep.py:named")
    images = policy.decode(x[:, -1])
    assert sum(named(images, animals)) >= 8
    assert sum(named(images, animals[1:] + animals[:1])) <= 1
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    assert sum(named(noise, animals)) <= 2
