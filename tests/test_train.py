"""Proves that a run from the command line leaves what it promises, that its seed decides it, that it never writes over
another run, and that it learns: both objectives move a reward that can be moved, up or down as asked."""

import csv
import dataclasses
import json

import pytest
import torch
from conftest import save_tiny_pipeline
from PIL import Image
from safetensors.torch import load_file

import ddpo
import rewards

COLUMNS = "epoch queries seconds reward_mean reward_std loss ratio_error clip_fraction approx_kl grad_norm"


def flags(model, **settings):
    defaults = {"epochs": 2, "steps": 3, "images_per_epoch": 8, "sample_batch": 3, "updates_per_epoch": 2, "grid_images": 7,
                "lr": 0.01, "device": "cpu", "precision": "fp32"}  # fmt: skip
    given = {"model": model, **defaults, **settings}
    return [part for name, value in given.items() for part in ("--" + name.replace("_", "-"), str(value))]


def read_metrics(run):
    return list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))


@pytest.mark.parametrize("objective, updates", [("clipped", 2), ("reinforce", 1)])
def test_a_run_leaves_its_files(objective, updates, tiny_model, tmp_path, capsys):
    argv = flags(tiny_model, out=tmp_path / "run", objective=objective, updates_per_epoch=updates, sample_every=2, epochs=3)
    ddpo.main(argv)
    run, rows = tmp_path / "run", read_metrics(tmp_path / "run")
    assert {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()} == {
        "config.json", "metrics.csv", "before_after.png", "pytorch_lora_weights.safetensors",
        "samples/epoch_0000.png", "samples/epoch_0002.png", "samples/epoch_0003.png",
    }  # fmt: skip
    assert json.loads((run / "config.json").read_text()) == dataclasses.asdict(ddpo.parse(argv))

    assert " ".join(rows[0]) == COLUMNS
    assert [(row["epoch"], row["queries"]) for row in rows] == [("1", "8"), ("2", "16"), ("3", "24")]
    values = torch.tensor([[float(v) for v in row.values()] for row in rows])
    assert values.isfinite().all() and all(float(row["ratio_error"]) <= 1e-6 for row in rows)
    assert all(-1 < float(row["reward_mean"]) < 0 for row in rows)  # a JPEG of 16 x 16 pixels has some 700 bytes

    lora = load_file(run / "pytorch_lora_weights.safetensors")
    assert len(lora) == 64 and all(v.abs().max() > 0 for v in lora.values())
    sizes = [Image.open(run / f"samples/epoch_{n:04d}.png").size for n in (0, 2, 3)]
    assert sizes[0] == sizes[1] == sizes[2] and Image.open(run / "before_after.png").size >= sizes[0]

    said = capsys.readouterr().out
    assert f"24 (image, step) pairs, {updates} updates" in said and "24 reward queries" in said  # what the run will cost
    assert f"load_lora_weights('{run}')" in said


def test_the_seed_decides_the_run(tiny_model, tmp_path):
    runs = []
    for name, seed in [("first", 3), ("again", 3), ("other", 4)]:
        torch.rand(5)  # what was drawn before the run must not matter
        ddpo.main(flags(tiny_model, out=tmp_path / name, seed=seed))
        rows = read_metrics(tmp_path / name)
        runs.append([{k: v for k, v in row.items() if k != "seconds"} for row in rows])
    assert runs[0] == runs[1]
    assert all(a["reward_mean"] != b["reward_mean"] and a["loss"] != b["loss"] for a, b in zip(runs[0], runs[2]))
    pictures = [(tmp_path / name / "before_after.png").read_bytes() for name in ("first", "again", "other")]
    assert pictures[0] == pictures[1] != pictures[2]


def test_a_second_run_gets_its_own_folder(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = flags(tiny_model, epochs=1, reward="incompressibility")
    ddpo.main(argv)
    first = {p: p.read_bytes() for p in (tmp_path / "runs/incompressibility").rglob("*") if p.is_file()}
    ddpo.main([*argv, "--seed", "1"])
    ddpo.main([*argv, "--seed", "2"])
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [f"incompressibility{n}" for n in ("", "-2", "-3")]
    assert len(first) == 6 and all(p.read_bytes() == content for p, content in first.items())
    assert json.loads((tmp_path / "runs/incompressibility-3/config.json").read_text())["seed"] == 2


def test_before_and_after_show_the_same_prompts_and_noise(tiny_model, tmp_path, monkeypatch):
    """Without learning to speak of, before and after are the same images, however many were sampled in between."""
    pictures, asked = [], []

    def watch(images, prompts):
        pictures.append(images)
        asked.append(prompts)
        return images.mean((1, 2, 3))

    monkeypatch.setitem(rewards.REWARDS, "watch", watch)
    ddpo.main(flags(tiny_model, reward="watch", out=tmp_path / "run", lr=1e-12, sample_every=1))
    before, epoch_1, after_1, epoch_2, after_2 = pictures
    torch.testing.assert_close(after_1, before, rtol=0, atol=1e-6)
    torch.testing.assert_close(after_2, before, rtol=0, atol=1e-6)
    assert asked[0] == asked[2] == asked[4] and len(set(asked[0])) == 7
    assert (epoch_1 - epoch_2).abs().max() > 0.01 and (before[0] - before[1]).abs().max() > 0.01


def test_an_interrupted_run_keeps_what_it_has(tiny_model, tmp_path, monkeypatch):
    calls = []

    def impatient(images, prompts):
        calls.append(len(prompts))
        if len(calls) == 3:  # the first picture, epoch 1, epoch 2
            raise KeyboardInterrupt
        return images.mean((1, 2, 3))

    monkeypatch.setitem(rewards.REWARDS, "impatient", impatient)
    with pytest.raises(SystemExit, match="Stopped"):
        ddpo.main(flags(tiny_model, reward="impatient", out=tmp_path / "run"))
    assert calls == [7, 8, 8] and [row["epoch"] for row in read_metrics(tmp_path / "run")] == ["1"]
    assert len(load_file(tmp_path / "run/pytorch_lora_weights.safetensors")) == 64


def test_a_reward_sees_its_own_prompts_and_any_type_will_do(tiny_model, tmp_path, monkeypatch):
    """Whole numbers in float64, that depend on the prompt alone; and no prompt from outside the file."""
    seen = set()

    def length(images, prompts):
        assert images.shape == (len(prompts), 3, 16, 16) and images.dtype == torch.float32
        assert images.min() >= 0 and images.max() <= 1
        seen.update(prompts)
        return torch.tensor([len(p) for p in prompts], dtype=torch.float64)

    monkeypatch.setitem(rewards.REWARDS, "length", length)
    (tmp_path / "prompts.txt").write_text("a cat\n\n  bee \n")
    ddpo.main(flags(tiny_model, reward="length", prompts=tmp_path / "prompts.txt", out=tmp_path / "run"))
    assert seen == {"a cat", "bee"} and all(3 <= float(row["reward_mean"]) <= 5 for row in read_metrics(tmp_path / "run"))


@pytest.mark.parametrize("objective, sign, margin", [("clipped", 1, 2.5), ("reinforce", 1, 2.5), ("clipped", -1, 0.7)])
def test_it_learns(objective, sign, margin, tmp_path, monkeypatch):
    """Brightness of a model that predicts x_0 with a coarse noise schedule, so that the noise of a step shows in the image.
    Over seeds 0 to 5 the mean reward rose by 3.5 to 7.7, 5.6 to 8.7 and 1.2 to 2.8 standard deviations of the first rewards;
    by chance alone it would change by 0.2."""
    monkeypatch.setitem(rewards.REWARDS, "brightness", lambda images, prompts: sign * images.mean((1, 2, 3)))
    schedule = {"num_train_timesteps": 20, "beta_start": 0.2, "beta_end": 0.5, "prediction_type": "sample"}
    model = save_tiny_pipeline(tmp_path / "model", **schedule)
    updates = 2 if objective == "clipped" else 1
    batches = {"images_per_epoch": 64, "sample_batch": 64, "micro_batch": 96, "updates_per_epoch": updates}
    learning = {"objective": objective, "epochs": 8, "lr": 0.03, "clip_range": 0.02, "guidance_scale": 3}
    ddpo.main(flags(model, out=tmp_path / "run", reward="brightness", **batches, **learning))
    first, *_, last = read_metrics(tmp_path / "run")
    assert float(last["reward_mean"]) - float(first["reward_mean"]) > margin * float(first["reward_std"])
