"""Proves that a run leaves what it promises, that its seed decides it, that it never writes over
another run, and that it learns, from the command line or from Python: both objectives move a
reward that can be moved, up or down as asked."""

import dataclasses
import functools
import gc
import io
import json
import sys

import numpy as np
import pytest
import torch
from conftest import (
    LORA,
    flags,
    launch,
    make_policy,
    make_settings,
    remember,
    save_tiny_pipeline,
)
from PIL import Image
from safetensors.torch import load_file

import ddpo

SMALLEST = {"epochs": 1, "images_per_epoch": 2, "eval_images": 1}


def config_of(run):
    return json.loads((run / "config.json").read_text())


def test_a_run_leaves_its_files(tiniest_model, tmp_path, capsys):
    settings = make_settings(tiniest_model, out=tmp_path / "run", eval_every=2, epochs=3)
    rows = launch(tiniest_model, tmp_path / "run", eval_every=2, epochs=3)
    run = tmp_path / "run"
    names = ["config.json", "metrics.csv", LORA, "state.pt"]
    names += [f"samples/epoch_{epoch:04d}.png" for epoch in (0, 2, 3)]
    files = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    assert files == set(names)
    config = config_of(run)
    made_with = config.pop("made_with")
    assert config == dataclasses.asdict(settings)
    code = {"update": "update", "run_class": "Run", "policy_class": "Policy"}
    assert code.items() < made_with.items() and len(made_with["ddpo.py"]) == 12

    assert ["seconds", *rows[0]] == sorted(ddpo.COLUMNS, key=lambda name: name != "seconds")
    assert [row["epoch"] for row in rows] == ["0", "1", "2", "3"]
    assert [row["queries"] for row in rows] == ["0", "8", "16", "24"]
    evaluated = [row["eval_reward"] != "" for row in rows]
    assert evaluated == [True, False, True, True]  # every 2 epochs, first and last
    for row in rows[1:]:
        row.pop("eval_reward")
        assert row.pop("changed") == ""
        assert torch.tensor([float(value) for value in row.values()]).isfinite().all()
        assert float(row["ratio_error"]) <= 1e-6
        assert -1 < float(row["reward_mean"]) < 0  # a JPEG of 16 x 16 pixels has some 700 bytes

    lora = load_file(run / LORA)
    assert len(lora) == 16 and all(weights.abs().max() > 0 for weights in lora.values())
    first = Image.open(run / "samples/epoch_0000.png")
    for epoch in (2, 3):  # below the first look, which it repeats
        picture = Image.open(run / f"samples/epoch_{epoch:04d}.png")
        assert picture.size == (first.width, 2 * first.height)
        assert picture.crop((0, 0, *first.size)).tobytes() == first.tobytes()

    said = capsys.readouterr()
    weights = sum(weights.numel() for weights in lora.values())
    assert f"trains {weights:,} weights of {tiniest_model} on cpu in torch.float32" in said.out
    assert "rewards are compared with the recent ones of their prompt" in said.out
    log = torch.load(run / "state.pt", weights_only=True)["log"]
    before, after = log[0]["eval_reward"], log[-1]["eval_reward"]
    assert f"noise: {before:.3f} before, {after:.3f} after" in said.out
    assert said.err == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_sees_progress(tiniest_model, tmp_path, monkeypatch):
    """And nothing else does: the test above has found no word on stderr."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    launch(tiniest_model, tmp_path / "run", **SMALLEST)
    assert "sample: " in terminal.getvalue() and "update: " in terminal.getvalue()


def test_the_seed_decides_the_run(tiniest_model, tmp_path):
    runs = []
    for name, seed in [("first", 3), ("again", 3), ("other", 4)]:
        torch.rand(5)  # what was drawn before the run must not matter
        _, row = launch(tiniest_model, tmp_path / name, seed=seed, **SMALLEST)
        runs.append((row, (tmp_path / name / "samples/epoch_0001.png").read_bytes()))
    (first, picture), again, (other, another) = runs
    assert (first, picture) == again and picture != another
    assert first["reward_mean"] != other["reward_mean"] and first["loss"] != other["loss"]


def test_a_second_run_gets_its_own_folder(tiniest_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/0.5_incompressibility-2").mkdir(parents=True)  # some other run
    argv = flags(tiniest_model, reward="0.5*incompressibility", **SMALLEST)
    ddpo.main(argv)
    first = tmp_path / "runs/0.5_incompressibility"
    before = {p: p.read_bytes() for p in first.rglob("*") if p.is_file()}
    ddpo.main([*argv, "--seed", "2"])
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == [f"0.5_incompressibility{number}" for number in ("", "-2", "-3")]
    assert len(before) == 6 and all(p.read_bytes() == content for p, content in before.items())
    assert config_of(tmp_path / "runs/0.5_incompressibility-3")["seed"] == 2


def test_before_and_after_show_the_same_prompts_and_noise(tiniest_model, tmp_path):
    """Without learning to speak of, before and after are the same images, however many were
    sampled in between."""
    pictures = []
    asked = []

    def watch(images, prompts):
        pictures.append(images)
        asked.append(prompts)
        return images.mean((1, 2, 3))

    launch(tiniest_model, tmp_path / "run", watch, lr=1e-12, eval_every=1, eval_images=7)
    assert len(pictures) == 10  # 7 or 8 images come in 2 batches
    whole = [torch.cat(pictures[i : i + 2]) for i in range(0, 10, 2)]
    before, epoch_1, after_1, epoch_2, after_2 = whole
    torch.testing.assert_close(after_1, before, rtol=0, atol=1e-6)
    torch.testing.assert_close(after_2, before, rtol=0, atol=1e-6)
    assert asked[:2] == asked[4:6] == asked[8:] and len(set(sum(asked[:2], []))) == 7
    assert (epoch_1 - epoch_2).abs().max() > 0.01
    assert (before[0] - before[1]).abs().max() > 0.01


def test_memory_does_not_grow_with_the_epochs(tiniest_model, tmp_path, monkeypatch):
    """Once the optimizer has its moments, every epoch ends with as many numbers in tensors as the
    last such one, with or without an evaluation."""
    held = []
    record = ddpo.Run.record

    def counted(run, row):
        gc.collect()
        tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
        held.append(sum(tensor.numel() for tensor in tensors))
        record(run, row)

    monkeypatch.setattr(ddpo.Run, "record", counted)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("cat\nbee\n")  # each is encoded when it is first drawn
    gc.freeze()  # what is there already is not looked at
    try:
        launch(tiniest_model, tmp_path / "run", prompts=prompts, epochs=4, eval_every=2)
    finally:
        gc.unfreeze()
    assert len(held) == 5 and held[1] == held[3] > 10_000 and held[2] == held[4]


def test_a_reward_sees_its_own_prompts_and_any_type_will_do(tiniest_model, tmp_path):
    """Whole numbers in float64, that depend on the prompt alone; no prompt is from elsewhere."""
    seen = set()

    def length(images, prompts):
        assert images.shape == (len(prompts), 3, 16, 16) and images.dtype == torch.float32
        assert images.min() >= 0 and images.max() <= 1
        seen.update(prompts)
        return torch.tensor([len(prompt) for prompt in prompts], dtype=torch.float64)

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\n  # not this\n  bee \n")
    rows = launch(tiniest_model, tmp_path / "run", length, prompts=prompts)
    assert seen == {"a cat", "bee"}
    assert all(3 <= float(row["reward_mean"]) <= 5 for row in rows[1:])


def mean(images, prompts, power=1):
    return images.mean((1, 2, 3)) ** power


class Module(torch.nn.Module):
    def forward(self, images, prompts):
        return mean(images, prompts)


@pytest.mark.parametrize("reward, name", [
    (mean, "mean"),
    (functools.partial(mean, power=2), "mean"),
    (Module(), "Module"),
    (lambda images, prompts: mean(images, prompts), "lambda"),
    ("incompressibility", "incompressibility"),
])  # fmt: skip
def test_whatever_can_be_called_is_a_reward_or_named(reward, name, tiniest_model, tmp_path):
    """In the place of --reward, which here is below 0."""
    _, row = launch(tiniest_model, tmp_path / "run", reward, **SMALLEST)
    assert config_of(tmp_path / "run")["reward"] == name and float(row["reward_mean"]) > 0


def test_another_update_in_the_place_of_ours(tiniest_model, tmp_path, monkeypatch):
    """It gets what ours gets, and its metrics are in the log."""
    monkeypatch.setattr(ddpo, "clipped_loss", lambda *args: pytest.fail("ours was called"))
    given = []

    def lazy(run, samples, generator):
        parts = (samples.x, samples.logp, samples.scores, samples.adv)
        given.append([tuple(part.shape) for part in parts])
        assert isinstance(run, ddpo.Run) and isinstance(generator, torch.Generator)
        return {"loss": torch.tensor(7.0), "mine": np.int64(len(given))}

    rows = launch(tiniest_model, tmp_path / "run", update=lazy)
    assert given == 2 * [[(8, 3, 4, 8, 8), (8, 2), (8, 2), (8,)]]
    assert [(row["loss"], row["mine"]) for row in rows[1:]] == [("7.0", "1.0"), ("7.0", "2.0")]
    lora = load_file(tmp_path / "run" / LORA)
    assert all((lora[name] == 0).all() for name in lora if "lora_B" in name)
    assert config_of(tmp_path / "run")["made_with"]["update"] == "lazy"


def test_many_new_prompts_are_encoded_in_one_go(tiniest_model, monkeypatch):
    """If each of N prompts copied the table of all, that would be N * N / 2 rows."""
    policy, _ = make_policy(tiniest_model)
    (table,) = policy.tables
    copied = []
    cat = torch.cat

    def counted(tensors, *args, **kwargs):
        whole = cat(tensors, *args, **kwargs)
        copied.append(whole.numel())
        return whole

    monkeypatch.setattr(torch, "cat", counted)
    monkeypatch.setattr(policy, "embed", lambda p: [torch.full(table[:1].shape, float(p))])
    cond = policy.encode([str(i % 2000) for i in range(2500)])
    (longer,) = policy.tables
    assert len(longer) == len(table) + 2000 and sum(copied) <= 2 * longer.numel()
    assert longer[cond].mean((1, 2, 3)).tolist() == [i % 2000 for i in range(2500)]


@pytest.mark.parametrize("objective, sign, lr, updates", [
    ("clipped", 1, 0.03, 2),
    ("reinforce", -1, 0.1, 1),
])  # fmt: skip
def test_it_learns(objective, sign, lr, updates, tmp_path):
    """Brightness of a model that predicts x_0 with a coarse noise schedule, so that the noise of a
    step shows in the image. Over seeds 0 to 3 the mean reward rose by 2.7 to 4.2 and 2.2 to 4.0
    standard deviations of the first rewards; by chance alone it would change by 0.2."""

    def brightness(images, prompts):
        return sign * images.mean((1, 2, 3))

    schedule = {"num_train_timesteps": 20, "beta_start": 0.2, "beta_end": 0.5}
    model = save_tiny_pipeline(tmp_path / "model", prediction_type="sample", **schedule)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("cat\nbee\n")
    size = {"images_per_epoch": 48, "batch_size": 96, "epochs": 6, "updates_per_epoch": updates}
    how = {"objective": objective, "lr": lr, "clip_range": 0.02, "guidance_scale": 1.0}
    size["prompts"] = prompts
    _, first, *_, last = launch(model, tmp_path / "run", brightness, **how, **size)
    assert float(first["ratio_error"]) <= 1e-6
    gain = float(last["reward_mean"]) - float(first["reward_mean"])
    assert gain > 1.5 * float(first["reward_std"])


def test_no_prompt_is_drawn_twice_before_all_had_a_turn(tiniest_model, tmp_path):
    """In an epoch; the next one deals anew."""
    prompts = list("abcde")
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    given = {"images_per_epoch": 14, "samples_per_prompt": 2, "updates_per_epoch": 1, "epochs": 3}
    seen = []
    run = tmp_path / "run"
    launch(tiniest_model, run, None, remember(seen), prompts=tmp_path / "prompts.txt", **given)
    dealt = [samples.prompts[::2] for _, samples in seen]
    for (_, samples), deck in zip(seen, dealt):
        assert samples.prompts[1::2] == deck and sorted(deck[:5]) == prompts
        assert len(set(deck[5:])) == 2  # shuffled anew, else every fourth would be the same
    assert len({tuple(deck[:2]) for deck in dealt}) > 1
    assert any(deck[5:] != deck[:2] for deck in dealt)


def test_evaluations_draw_the_same_noise_however_the_run_learns(tiniest_model, tmp_path):
    """So that they can be compared when a run is resumed with other minibatches."""
    rewards = []
    for updates in (1, 2, 4):
        policy, settings = make_policy(tiniest_model, updates_per_epoch=updates, images_per_epoch=8,
                                       samples_per_prompt=1, eval_images=5)  # fmt: skip
        run = ddpo.Run(settings, policy, tmp_path)
        terms = [("brightness", 1.0, lambda images, prompts: images.mean((1, 2, 3)))]
        rewards.append(run.evaluate(terms, ["cat", "bee"], updates).item())
    assert len(set(rewards)) == 1
