"""Proves that the scripts which the README tells people to copy do what they say: pictures before and after, and curves."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import make_policy
from PIL import Image

import ddpo

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))


def run_script(name, monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_generate_draws_the_same_noise_without_and_with_the_lora(tiny_model, tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    policy, _ = make_policy(tiny_model, lora_scale=0.5)
    ddpo.save_lora(policy.unet, tmp_path / "pytorch_lora_weights.safetensors")
    config = {"model": str(tiny_model), "steps": 2, "guidance_scale": 2.0, "eta": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    prompts = ["cat", "bee", "ant"]
    made = run_script("generate.py", monkeypatch, tmp_path, "--seed", 4, "--prompts", *prompts)
    assert made["pipe"].scheduler.num_inference_steps == 2 and made["pipe"].guidance_scale == 2.0
    picture = np.asarray(Image.open(tmp_path / "generated.png"))
    before, after = np.split(picture, 2)
    assert before.shape == (16, 3 * 16, 3) and f"saved {tmp_path / 'generated.png'}" in capsys.readouterr().out
    assert np.array_equal(np.hstack([np.asarray(image) for image in made["draw"]()]), after)  # its pipeline has the LoRA now
    made["pipe"].disable_lora()
    assert np.array_equal(np.hstack([np.asarray(image) for image in made["draw"]()]), before) and (before != after).mean() > 0.1


def test_plot_shows_the_mean_and_range_of_seeds(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    for name, objective, seed, reward in (("a", "clipped", 0, 1.0), ("b", "clipped", 1, 3.0), ("c", "reinforce", 0, 9.0)):
        run = tmp_path / name
        run.mkdir()
        (run / "config.json").write_text(json.dumps({"objective": objective, "seed": seed, "out": str(run), "lr": 0.1}))
        rows = ["epoch,queries,reward_mean,kl,diversity", "0,0,,,", f"1,64,{reward},0,1", f"2,128,{2 * reward},5,0.9"]
        (run / "metrics.csv").write_text("\n".join(rows) + "\n")
    out = tmp_path / "curves.png"
    from matplotlib import pyplot as plt

    run_script("plot.py", monkeypatch, *sorted(tmp_path.iterdir()), "--out", out)
    axis = plt.gcf().axes[0]
    lines = {line.get_label(): line.get_xydata().tolist() for line in axis.get_lines()}
    assert lines == {"objective clipped (2 seeds)": [[64, 2], [128, 4]], "objective reinforce": [[64, 9], [128, 18]]}
    band = axis.collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in band.tolist()} == {(64, 1), (64, 3), (128, 2), (128, 6)}
    assert out.stat().st_size > 10_000 and f"saved {out}" in capsys.readouterr().out
    run_script("plot.py", monkeypatch, tmp_path / "a", "--columns", "diversity", "--out", out)
    (axis,) = plt.gcf().axes
    assert axis.get_ylabel() == "diversity" and axis.get_lines()[0].get_xydata().tolist() == [[64, 1], [128, 0.9]]
    plt.close("all")
