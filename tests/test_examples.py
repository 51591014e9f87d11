"""Proves that the scripts which the README tells people to copy do what they say: pictures before
and after, and curves; and that those which prove something look at what they should."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw, flags, make_policy, save_tiny_pixels
from PIL import Image

import ddpo
import rewards

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
LORA = "pytorch_lora_weights.safetensors"


def run_script(name, monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


# ---------------------------------------------------- generate.py


def write_config(run, model, **settings):
    config = {"model": str(model), "steps": 2, "guidance_scale": 2.0, "eta": 0.5, **settings}
    (run / "config.json").write_text(json.dumps(config))
    return config


def sampled_in_training(policy, prompts, seed):
    x, _ = draw(policy, prompts, torch.Generator().manual_seed(seed))
    return np.hstack([np.asarray(p) for p in rewards.to_pil(policy.decode(x[:, -1]))])


@pytest.mark.parametrize("rank", [4, 0])
def test_generate_draws_as_training_does_before_and_after(
    rank, tiniest_model, tmp_path, monkeypatch
):
    pytest.importorskip("peft")
    config = write_config(tmp_path, tiniest_model)
    policy, _ = make_policy(lora_scale=0.5, lora_rank=rank, **config)
    prompts = ["cat", "bee", "ant"]
    if rank:
        ddpo.save_lora(policy.unet, tmp_path / LORA)
        with ddpo.without_lora():
            before = sampled_in_training(policy, prompts, 4)
    else:
        before = sampled_in_training(policy, prompts, 4)
        torch.manual_seed(0)
        for weight in policy.weights:
            weight.data += 0.02 * torch.randn_like(weight)
        policy.pipe.save_pretrained(tmp_path / "pipeline")
    after = sampled_in_training(policy, prompts, 4)
    run_script("generate.py", monkeypatch, tmp_path, "--seed", 4, "--prompts", *prompts)
    picture = np.asarray(Image.open(tmp_path / "generated.png"))
    drawn = np.split(picture.astype(int), 2)
    assert [abs(ours - row).max() <= 1 for ours, row in zip((before, after), drawn)] == [True] * 2
    assert (before != after).mean() > 0.1


@pytest.mark.parametrize("what", ["no run", "no LoRA", "no model", "no prompts"])
def test_generate_says_in_a_line_what_it_cannot_draw(what, tiniest_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if what == "no LoRA":
        pytest.importorskip("peft")  # diffusers asks for it before it looks for the file
        write_config(tmp_path, tiniest_model)
    if what == "no model":
        write_config(tmp_path, "gone/model")
    if what == "no prompts":
        write_config(tmp_path, "pixels")
        save_tiny_pixels("pixels")
    with pytest.raises(SystemExit) as end:
        run_script("generate.py", monkeypatch, tmp_path)
    names = {"no run": "config.json", "no LoRA": LORA, "no model": "gone/model",
             "no prompts": "pixels draws without prompts"}  # fmt: skip
    assert end.value.code.startswith("generate.py: error: ") and names[what] in end.value.code
    assert "\n" not in end.value.code and not Path("generated.png").exists()


# ---------------------------------------------------- plot.py


def write_run(run, reward, **config):
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"out": str(run), "lr": 0.1, **config}))
    rows = ["epoch,queries,reward_mean,kl,diversity", "0,0,,,"]
    rows += [f"1,64,{reward},0,1", f"2,128,{2 * reward},5,0.9"]
    (run / "metrics.csv").write_text("\n".join(rows) + "\n")
    return run


@pytest.fixture
def plotted(tmp_path, monkeypatch):
    """A function that runs plot.py; returns its first panel, and its curves by their labels."""
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot as plt

    def plotted(*argv):
        out = tmp_path / "curves.png"
        run_script("plot.py", monkeypatch, *argv, "--out", out)
        assert out.stat().st_size > 5_000
        axis = plt.gcf().axes[0]
        lines = {line.get_label(): line.get_xydata().tolist() for line in axis.get_lines()}
        return axis, lines

    yield plotted
    plt.close("all")


def test_plot_shows_the_mean_and_range_of_seeds(plotted, tmp_path, capsys):
    a = write_run(tmp_path / "a", 1.0, objective="clipped", seed=0)
    b = write_run(tmp_path / "b", 3.0, objective="clipped", seed=1)
    c = write_run(tmp_path / "c", 9.0, objective="reinforce", seed=0)
    axis, lines = plotted(a, b, c)
    assert lines == {
        "objective clipped (2 seeds)": [[64, 2], [128, 4]],
        "objective reinforce": [[64, 9], [128, 18]],
    }
    band = axis.collections[0].get_paths()[0].vertices.tolist()
    assert {tuple(point) for point in band} == {(64, 1), (64, 3), (128, 2), (128, 6)}
    assert f"saved {tmp_path / 'curves.png'}" in capsys.readouterr().out
    axis, lines = plotted(a, "--columns", "diversity")
    assert axis.get_ylabel() == "diversity" and lines == {"a": [[64, 1], [128, 0.9]]}


def test_plot_does_not_call_runs_of_one_seed_several(plotted, tmp_path):
    runs = [write_run(tmp_path / name, 1.0, seed=0) for name in "ab"]
    _, lines = plotted(*runs)
    assert lines == {str(run): [[64, 1], [128, 2]] for run in runs}


# ---------------------------------------------------- kill_resume.py, overoptimisation.py


def test_kill_resume_sees_every_difference_but_the_seconds(tiniest_model, tmp_path):
    import kill_resume

    run = tmp_path / "run"
    ddpo.main(flags(tiniest_model, out=run, epochs=1))
    expected = kill_resume.contents(run)
    assert set(expected) == {
        "config.json", "metrics.csv", "state.pt", LORA,
        "samples/epoch_0000.png", "samples/epoch_0001.png",
    }  # fmt: skip
    other = tmp_path / "other"
    shutil.copytree(run, other)
    state = torch.load(other / "state.pt", weights_only=True)
    state["log"][-1]["seconds"] += 1
    torch.save(state, other / "state.pt")
    assert kill_resume.contents(other) == expected
    moments = state["optimizer"]["state"][0]
    moments["exp_avg"].view(-1)[0] += 1e-6
    torch.save(state, other / "state.pt")
    found = kill_resume.contents(other)
    assert [name for name in expected if found[name] != expected[name]] == ["state.pt"]
    for name, change in {"config.json": ("0.01", "0.02"), "metrics.csv": ("0,", "1,")}.items():
        text = (run / name).read_text()
        (run / name).write_text(text.replace(*change, 1))
        assert kill_resume.contents(run)[name] != expected[name] and text.count(change[0])


def test_overoptimisation_goes_on_without_the_limit(tmp_path, monkeypatch):
    """The command lines that it runs, here without running them."""
    pytest.importorskip("matplotlib")
    import overoptimisation

    parsed = []

    def run(command, **options):
        settings, resumed = ddpo.parse(command[2:])
        parsed.append((settings, resumed))
        folder = Path(resumed or settings.out)
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(vars(settings)))
        (folder / "metrics.csv").write_text("epoch,kl\n0,\n1,1\n2,501\n")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.chdir(EXAMPLES.parent)
    (tmp_path / "copy").mkdir()
    overoptimisation.train(tmp_path, 1, 80)
    (held, new), (free, resumed) = parsed
    assert new is None and resumed == str(tmp_path / "free-1")
    assert (held.reward, held.kl_stop, held.seed, held.epochs) == ("incompressibility", 500, 1, 80)
    assert vars(free) == {**vars(held), "kl_stop": 0.0}


def test_a_gif_shows_the_evaluations_in_their_order(tmp_path, monkeypatch):
    """Each picture after the first repeats it above its own row, which is what is shown."""
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    rows = ["epoch,eval_reward", "0,-2.0", "1,", "2,-1.5", "4,-1.0"]
    (run / "metrics.csv").write_text("\n".join(rows) + "\n")
    for epoch, colour in [(0, (1, 0, 0)), (2, (0, 1, 0)), (4, (0, 0, 1))]:
        images = torch.tensor(colour).view(1, 3, 1, 1).expand(3, 3, 64, 64)
        ddpo.save_pictures(images, ["cat"] * 3, run / f"samples/epoch_{epoch:04d}.png")
    run_script("plot.py", monkeypatch, "--gif", run)
    with Image.open(run / "run.gif") as gif:
        assert gif.n_frames == 3 and gif.info["loop"] == 0
        seen = []
        for frame in range(3):
            gif.seek(frame)
            pixels = [gif.convert("RGB").getpixel(at) for at in ((70, 21), (70, 23), (70, 200))]
            seen.append((*pixels, gif.info["duration"]))
        assert gif.size == (2 * 144, 20 + 2 * 160)
    white, red, green, blue = (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255)
    assert seen == [(white, red, red, 600), (white, green, green, 600), (white, blue, blue, 2000)]


def test_a_run_without_pictures_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "metrics.csv").write_text("epoch,eval_reward\n0,-2.0\n")
    with pytest.raises(SystemExit, match="no pictures of evaluations"):
        run_script("plot.py", monkeypatch, "--gif", tmp_path)
    with pytest.raises(SystemExit, match="no metrics.csv"):
        run_script("plot.py", monkeypatch, "--gif", tmp_path / "gone")
