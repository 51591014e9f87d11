"""Proves that a run from the command line leaves what it promises, that its seed decides it, that it never writes over
another run, and that it learns: both objectives move a reward that can be moved, up or down as asked."""

import csv
import dataclasses
import gc
import json
import threading

import pytest
import torch
from conftest import make_policy, save_tiny_pipeline
from PIL import Image
from safetensors.torch import load_file

import ddpo
import rewards


def flags(model, **settings):
    defaults = {"epochs": 2, "steps": 3, "images_per_epoch": 8, "sample_batch": 3, "updates_per_epoch": 2, "eval_images": 7,
                "micro_batch": 4, "lr": 0.01, "device": "cpu", "precision": "fp32"}  # fmt: skip
    given = {"model": model, **defaults, **settings}
    return as_flags(given)


def as_flags(settings):
    """Settings as a command line; those that are true or false have no value there."""
    pairs = [("--" + name.replace("_", "-"), value) for name, value in settings.items()]
    return [part for flag, value in pairs for part in ([flag] if value is True else [flag, str(value)])]


def read_metrics(run):
    return list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))


@pytest.mark.parametrize("objective, updates", [("clipped", 2), ("reinforce", 1)])
def test_a_run_leaves_its_files(objective, updates, tiny_model, tmp_path, capsys):
    argv = flags(tiny_model, out=tmp_path / "run", objective=objective, updates_per_epoch=updates, eval_every=2, epochs=3)
    ddpo.main(argv)
    run, rows = tmp_path / "run", read_metrics(tmp_path / "run")
    assert {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()} == {
        "config.json", "metrics.csv", "pytorch_lora_weights.safetensors", "state_00002.pt", "state_00003.pt",
        "samples/epoch_0000.png", "samples/epoch_0002.png", "samples/epoch_0003.png",
    }  # fmt: skip
    config = json.loads((run / "config.json").read_text())
    made_with = config.pop("made_with")
    assert config == dataclasses.asdict(ddpo.parse(argv)[0])
    assert made_with["torch"] == torch.__version__ and made_with["device"] == "cpu"
    assert {"diffusers", "transformers", "git"} < made_with.keys()

    assert list(rows[0]) == ddpo.COLUMNS
    assert [(row["epoch"], row["queries"]) for row in rows] == [("0", "0"), ("1", "8"), ("2", "16"), ("3", "24")]
    assert [row["eval_reward"] != "" for row in rows] == [True, False, True, True]  # every 2 epochs, first and last
    values = torch.tensor([[float(v) for k, v in row.items() if k not in ("eval_reward", "diversity")] for row in rows[1:]])
    assert values.isfinite().all() and all(float(row["ratio_error"]) <= 1e-6 for row in rows[1:])
    assert all(-1 < float(row["reward_mean"]) < 0 for row in rows[1:])  # a JPEG of 16 x 16 pixels has some 700 bytes

    lora = load_file(run / "pytorch_lora_weights.safetensors")
    assert len(lora) == 64 and all(v.abs().max() > 0 for v in lora.values())
    first, *later = (Image.open(run / f"samples/epoch_{n:04d}.png") for n in (0, 2, 3))
    for picture in later:  # below the first look, which it repeats
        assert picture.size == (first.width, 2 * first.height)
        assert picture.crop((0, 0, *first.size)).tobytes() == first.tobytes()

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
    assert all(a["reward_mean"] != b["reward_mean"] and a["loss"] != b["loss"] for a, b in zip(runs[0][1:], runs[2][1:]))
    pictures = [(tmp_path / name / "samples/epoch_0002.png").read_bytes() for name in ("first", "again", "other")]
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
    ddpo.main(flags(tiny_model, reward="watch", out=tmp_path / "run", lr=1e-12, eval_every=1))
    whole = [torch.cat(pictures[i : i + 3]) for i in range(0, 15, 3)]  # 7 or 8 images come in batches of 3
    before, epoch_1, after_1, epoch_2, after_2 = whole
    torch.testing.assert_close(after_1, before, rtol=0, atol=1e-6)
    torch.testing.assert_close(after_2, before, rtol=0, atol=1e-6)
    assert asked[:3] == asked[6:9] == asked[12:] and len({p for batch in asked[:3] for p in batch}) == 7
    assert (epoch_1 - epoch_2).abs().max() > 0.01 and (before[0] - before[1]).abs().max() > 0.01


def test_an_interrupted_run_keeps_what_it_has(tiny_model, tmp_path, monkeypatch):
    calls = []

    def impatient(images, prompts):
        calls.append(len(prompts))
        if len(calls) == 8:  # 3 batches of the first look, 3 of epoch 1, 2 of epoch 2
            raise KeyboardInterrupt
        return images.mean((1, 2, 3))

    monkeypatch.setitem(rewards.REWARDS, "impatient", impatient)
    with pytest.raises(SystemExit, match=f"stopped; go on with: python ddpo.py --resume {tmp_path / 'run'}"):
        ddpo.main(flags(tiny_model, reward="impatient", out=tmp_path / "run"))
    assert [row["epoch"] for row in read_metrics(tmp_path / "run")] == ["0", "1"] and not list(tmp_path.rglob("*.tmp"))
    assert len(load_file(tmp_path / "run/pytorch_lora_weights.safetensors")) == 64


def test_a_batch_is_scored_while_the_next_one_is_sampled(tiny_model, monkeypatch):
    """The first batch's reward waits for the second batch's sampling to begin, which it would do for ever otherwise."""
    begun, calls, rollout = threading.Event(), [], ddpo.rollout

    def watched(*args):
        calls.append(len(args[1]))
        if len(calls) == 2:
            begun.set()
        return rollout(*args)

    monkeypatch.setattr(ddpo, "rollout", watched)
    policy, settings = make_policy(tiny_model, sample_batch=2)
    terms = [("patient", 1.0, lambda images, prompts: torch.full((len(images),), float(begun.wait(30))))]
    *_, scores = ddpo.sample(policy, terms, ["cat"] * 6, settings, torch.Generator().manual_seed(0))
    assert calls == [2, 2, 2] and scores[:, 0].tolist() == [1.0] * 6


@pytest.mark.parametrize("wrong", [False, True])
def test_a_ratio_that_is_off_from_the_start_is_said(wrong, tiny_model, tmp_path, monkeypatch, capsys):
    """Sampled with guidance and learned without: the note comes once, and only where something is wrong."""
    predict = ddpo.Policy.predict

    def forgetful(policy, *args):
        policy.guidance_scale = 1.0 if torch.is_grad_enabled() and wrong else 5.0
        return predict(policy, *args)

    monkeypatch.setattr(ddpo.Policy, "predict", forgetful)
    ddpo.main(flags(tiny_model, out=tmp_path / "run"))
    assert capsys.readouterr().out.count("before any update the ratio is off 1 by") == wrong


def test_memory_does_not_grow_with_the_epochs(tiny_model, tmp_path, monkeypatch):
    """Once the optimizer has its moments, every epoch ends with as many numbers in tensors as the one before."""
    held, write_metrics = [], ddpo.write_metrics

    def counted(log, folder):
        gc.collect()
        held.append(sum(o.numel() for o in gc.get_objects() if issubclass(type(o), torch.Tensor)))
        write_metrics(log, folder)

    monkeypatch.setattr(ddpo, "write_metrics", counted)
    (tmp_path / "prompts.txt").write_text("cat\nbee\n")  # each is encoded when it is first drawn
    ddpo.main(flags(tiny_model, prompts=tmp_path / "prompts.txt", out=tmp_path / "run", epochs=4, eval_every=2))
    assert len(held) == 4 and len(set(held[1:])) == 1


def test_a_reward_sees_its_own_prompts_and_any_type_will_do(tiny_model, tmp_path, monkeypatch):
    """Whole numbers in float64, that depend on the prompt alone; and no prompt from outside the file."""
    seen = set()

    def length(images, prompts):
        assert images.shape == (len(prompts), 3, 16, 16) and images.dtype == torch.float32
        assert images.min() >= 0 and images.max() <= 1
        seen.update(prompts)
        return torch.tensor([len(p) for p in prompts], dtype=torch.float64)

    monkeypatch.setitem(rewards.REWARDS, "length", length)
    (tmp_path / "prompts.txt").write_text("a cat\n\n  # not this\n  bee \n")
    ddpo.main(flags(tiny_model, reward="length", prompts=tmp_path / "prompts.txt", out=tmp_path / "run"))
    assert seen == {"a cat", "bee"} and all(3 <= float(row["reward_mean"]) <= 5 for row in read_metrics(tmp_path / "run")[1:])


@pytest.mark.parametrize("objective, sign, margin", [("clipped", 1, 2.5), ("reinforce", 1, 2.5), ("clipped", -1, 2.0)])
def test_it_learns(objective, sign, margin, tmp_path, monkeypatch):
    """Brightness of a model that predicts x_0 with a coarse noise schedule, so that the noise of a step shows in the image.
    Over seeds 0 to 3 the mean reward rose by 4.6 to 7.2, 4.7 to 5.2 and 3.6 to 4.0 standard deviations of the first rewards;
    by chance alone it would change by 0.2."""
    monkeypatch.setitem(rewards.REWARDS, "brightness", lambda images, prompts: sign * images.mean((1, 2, 3)))
    schedule = {"num_train_timesteps": 20, "beta_start": 0.2, "beta_end": 0.5, "prediction_type": "sample"}
    model = save_tiny_pipeline(tmp_path / "model", **schedule)
    updates = 2 if objective == "clipped" else 1
    batches = {"images_per_epoch": 64, "sample_batch": 64, "micro_batch": 96, "updates_per_epoch": updates}
    learning = {"objective": objective, "epochs": 8, "lr": 0.03, "clip_range": 0.02, "guidance_scale": 3}
    ddpo.main(flags(model, out=tmp_path / "run", reward="brightness", **batches, **learning))
    _, first, *_, last = read_metrics(tmp_path / "run")
    assert float(last["reward_mean"]) - float(first["reward_mean"]) > margin * float(first["reward_std"])
