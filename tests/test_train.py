"""Proves that a run leaves what it promises, that its seed decides it, that it never writes over
another run, and that it learns, from the command line or from Python: both objectives move a
reward that can be moved, up or down as asked."""

import dataclasses
import gc
import io
import json
import sys

import pytest
import torch
from conftest import flags, make_policy, read_metrics, save_tiny_pipeline, small_run
from PIL import Image
from safetensors.torch import load_file

import ddpo


def train(model, out, reward=None, update=ddpo.update, **settings):
    """A small run from Python; its folder."""
    settings = ddpo.make_settings(**small_run(model, out=str(out), **settings))
    return ddpo.launch(settings, reward=reward, update=update)


def test_a_run_leaves_its_files(tiniest_model, tmp_path, capsys):
    argv = flags(tiniest_model, out=tmp_path / "run", eval_every=2, epochs=3)
    ddpo.main(argv)
    run = tmp_path / "run"
    assert {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()} == {
        "config.json",
        "metrics.csv",
        "pytorch_lora_weights.safetensors",
        "samples/epoch_0000.png",
        "samples/epoch_0002.png",
        "samples/epoch_0003.png",
        "state.pt",
    }
    config = json.loads((run / "config.json").read_text())
    made_with = config.pop("made_with")
    assert config == dataclasses.asdict(ddpo.parse(argv)[0])
    assert made_with["torch"] == torch.__version__
    assert made_with.keys() == {"torch", "diffusers", "transformers"}

    rows = read_metrics(run)
    assert list(rows[0]) == ddpo.COLUMNS
    assert [row["epoch"] for row in rows] == ["0", "1", "2", "3"]
    assert [row["queries"] for row in rows] == ["0", "8", "16", "24"]
    evaluated = [row["eval_reward"] != "" for row in rows]
    assert evaluated == [True, False, True, True]  # every 2 epochs, first and last
    for row in rows[1:]:
        row.pop("eval_reward")
        row.pop("diversity")  # of two images of the same prompt, which there need not be
        assert torch.tensor([float(value) for value in row.values()]).isfinite().all()
        assert float(row["ratio_error"]) <= 1e-6
        assert -1 < float(row["reward_mean"]) < 0  # a JPEG of 16 x 16 pixels has some 700 bytes

    lora = load_file(run / "pytorch_lora_weights.safetensors")
    assert len(lora) == 16 and all(weights.abs().max() > 0 for weights in lora.values())
    first = Image.open(run / "samples/epoch_0000.png")
    for epoch in (2, 3):  # below the first look, which it repeats
        picture = Image.open(run / f"samples/epoch_{epoch:04d}.png")
        assert picture.size == (first.width, 2 * first.height)
        assert picture.crop((0, 0, *first.size)).tobytes() == first.tobytes()

    said = capsys.readouterr()
    weights = sum(weights.numel() for weights in lora.values())
    assert f"trains {weights:,} weights of {tiniest_model} on cpu in torch.float32" in said.out
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
    train(tiniest_model, tmp_path / "run", epochs=1, images_per_epoch=2, eval_images=1)
    assert "sample: " in terminal.getvalue() and "update: " in terminal.getvalue()


def test_the_seed_decides_the_run(tiniest_model, tmp_path):
    small = {"epochs": 1, "images_per_epoch": 4, "eval_images": 2}
    runs = []
    pictures = []
    for name, seed in [("first", 3), ("again", 3), ("other", 4)]:
        torch.rand(5)  # what was drawn before the run must not matter
        run = train(tiniest_model, tmp_path / name, seed=seed, **small)
        (_, row) = read_metrics(run)
        row.pop("seconds")
        runs.append(row)
        pictures.append((run / "samples/epoch_0001.png").read_bytes())
    first, again, other = runs
    assert first == again
    assert first["reward_mean"] != other["reward_mean"] and first["loss"] != other["loss"]
    assert pictures[0] == pictures[1] != pictures[2]


def test_a_second_run_gets_its_own_folder(tiniest_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = {"epochs": 1, "images_per_epoch": 2, "eval_images": 1}
    argv = flags(tiniest_model, reward="0.5*incompressibility", **small)
    for seed in (0, 1, 2):
        ddpo.main([*argv, "--seed", str(seed)])
        if seed == 0:
            first = tmp_path / "runs/0.5_incompressibility"
            before = {p: p.read_bytes() for p in first.rglob("*") if p.is_file()}
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == [f"0.5_incompressibility{number}" for number in ("", "-2", "-3")]
    assert len(before) == 6 and all(p.read_bytes() == content for p, content in before.items())
    config = tmp_path / "runs/0.5_incompressibility-3/config.json"
    assert json.loads(config.read_text())["seed"] == 2


def test_before_and_after_show_the_same_prompts_and_noise(tiniest_model, tmp_path):
    """Without learning to speak of, before and after are the same images, however many were
    sampled in between."""
    pictures = []
    asked = []

    def watch(images, prompts):
        pictures.append(images)
        asked.append(prompts)
        return images.mean((1, 2, 3))

    train(tiniest_model, tmp_path / "run", watch, lr=1e-12, eval_every=1, eval_images=7)
    assert len(pictures) == 15  # 7 or 8 images come in 3 batches
    whole = [torch.cat(pictures[i : i + 3]) for i in range(0, 15, 3)]
    before, epoch_1, after_1, epoch_2, after_2 = whole
    torch.testing.assert_close(after_1, before, rtol=0, atol=1e-6)
    torch.testing.assert_close(after_2, before, rtol=0, atol=1e-6)
    assert asked[:3] == asked[6:9] == asked[12:] and len(set(sum(asked[:3], []))) == 7
    assert (epoch_1 - epoch_2).abs().max() > 0.01
    assert (before[0] - before[1]).abs().max() > 0.01


def test_memory_does_not_grow_with_the_epochs(tiniest_model, tmp_path, monkeypatch):
    """Once the optimizer has its moments, every epoch ends with as many numbers in tensors as the
    one before."""
    held = []
    write_metrics = ddpo.write_metrics

    def counted(log, folder):
        gc.collect()
        tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
        held.append(sum(tensor.numel() for tensor in tensors))
        write_metrics(log, folder)

    monkeypatch.setattr(ddpo, "write_metrics", counted)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("cat\nbee\n")  # each is encoded when it is first drawn
    gc.freeze()  # what is there already is not looked at
    try:
        train(tiniest_model, tmp_path / "run", prompts=str(prompts), epochs=4, eval_every=2)
    finally:
        gc.unfreeze()
    assert len(held) == 5 and held[1] == held[2] == held[3] == held[4] > 10_000


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
    run = train(tiniest_model, tmp_path / "run", length, prompts=str(prompts))
    assert seen == {"a cat", "bee"}
    assert all(3 <= float(row["reward_mean"]) <= 5 for row in read_metrics(run)[1:])
    assert json.loads((run / "config.json").read_text())["reward"] == "length"


def test_another_update_in_the_place_of_ours(tiniest_model, tmp_path, monkeypatch):
    """It gets what ours gets, and its metrics are in the log."""
    monkeypatch.setattr(ddpo, "clipped_loss", lambda *args: pytest.fail("ours was called"))
    given = []

    def lazy(run, samples, generator):
        given.append([tuple(part.shape) for part in samples])
        assert isinstance(run, ddpo.Run) and isinstance(generator, torch.Generator)
        return {"loss": 7.0, "mine": len(given)}

    run = train(tiniest_model, tmp_path / "run", update=lazy)
    assert given == 2 * [[(8, 3, 4, 8, 8), (8, 2), (8,), (8,)]]
    rows = read_metrics(run)[1:]
    assert [(row["loss"], row["mine"]) for row in rows] == [("7", "1"), ("7", "2")]
    lora = load_file(run / "pytorch_lora_weights.safetensors")
    assert all((lora[name] == 0).all() for name in lora if "lora_B" in name)


def test_many_new_prompts_are_encoded_in_one_go(tiniest_model, monkeypatch):
    """If each of N prompts copied the table of all, that would be N * N / 2 rows."""
    policy, _ = make_policy(tiniest_model)
    (table,) = policy.table
    shape = table[:1].shape
    copied = []
    cat = torch.cat

    def counted(tensors, *args, **kwargs):
        whole = cat(tensors, *args, **kwargs)
        copied.append(whole.numel())
        return whole

    def encode_prompt(prompt, **how):
        return torch.full(shape, float(prompt)), torch.zeros(shape)

    monkeypatch.setattr(torch, "cat", counted)
    monkeypatch.setattr(policy.pipe, "encode_prompt", encode_prompt)
    cond = policy.encode([str(i % 4000) for i in range(5000)])
    (longer,) = policy.table
    assert len(longer) == len(table) + 4000 and sum(copied) <= 2 * longer.numel()
    assert longer[cond].mean((1, 2)).tolist() == [i % 4000 for i in range(5000)]


@pytest.mark.parametrize("objective, sign, lr, updates", [
    ("clipped", 1, 0.03, 2),
    ("reinforce", -1, 0.1, 1),
])  # fmt: skip
def test_it_learns(objective, sign, lr, updates, tmp_path):
    """Brightness of a model that predicts x_0 with a coarse noise schedule, so that the noise of a
    step shows in the image. Over seeds 0 to 3 the mean reward rose by 3.1 to 6.3 and 3.7 to 4.8
    standard deviations of the first rewards; by chance alone it would change by 0.2."""

    def brightness(images, prompts):
        return sign * images.mean((1, 2, 3))

    schedule = {"num_train_timesteps": 20, "beta_start": 0.2, "beta_end": 0.5}
    model = save_tiny_pipeline(tmp_path / "model", prediction_type="sample", **schedule)
    batches = {"images_per_epoch": 64, "sample_batch": 64, "micro_batch": 128}
    learning = {"lr": lr, "clip_range": 0.02, "guidance_scale": 3.0, "epochs": 6, "save_every": 9}
    how = {"objective": objective, "updates_per_epoch": updates, **learning, **batches}
    run = train(model, tmp_path / "run", brightness, **how)
    _, first, *_, last = read_metrics(run)
    assert float(first["ratio_error"]) <= 1e-6
    gain = float(last["reward_mean"]) - float(first["reward_mean"])
    assert gain > 2.5 * float(first["reward_std"])
