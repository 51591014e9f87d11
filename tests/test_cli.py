"""Proves that the command line takes every setting, that what it prints is true, and that a mistake costs nothing: each ends
with one line that names the thing, a status that is not 0, and neither a picture sampled nor a file written."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ddpo
import rewards


def failure(capsys, *argv):
    """The message with which `main` ends."""
    with pytest.raises(SystemExit) as end:
        ddpo.main([str(a) for a in argv])
    err = capsys.readouterr().err + (end.value.code if isinstance(end.value.code, str) else "")
    assert end.value.code not in (0, None)
    assert err.count("error:") == 1 and "Traceback" not in err
    return err[err.index("ddpo.py: error:") :].removesuffix("\n")


@pytest.fixture
def nothing_happens(tmp_path, monkeypatch):
    """An empty folder to stand in, which must stay empty, and a sampler that must not be called."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(ddpo, "rollout", lambda *a, **k: pytest.fail("sampled before the mistake was found"))
    yield tmp_path
    assert list((tmp_path / "here").iterdir()) == []


def test_what_argparse_finds_is_one_line_too(capsys):
    assert "\n" not in failure(capsys, "--no-such-flag", 1)
    with pytest.raises(SystemExit, match="2"):
        ddpo.main(["--epochs", "many"])
    assert capsys.readouterr().err == "ddpo.py: error: argument --epochs: invalid int value: 'many'; see --help\n"


MISTAKES = [
    ("--no-such-flag 1", "--no-such-flag"),
    ("--epoch 3", "--epoch"),  # no abbreviations: a typing error must not set something else
    ("--lr fast", "--lr.*'fast'"),
    ("--lr -1", "--lr must be more than 0"),
    ("--lr nan", "--lr must be a finite number"),
    ("--lr inf", "--lr must be a finite number"),
    ("--eta 0", "--eta must be more than 0"),
    ("--eta 1.5", "--eta must be at most 1, not 1.5"),
    ("--train-steps-fraction 1.5", "--train-steps-fraction must be at most 1, not 1.5"),
    ("--epochs 0", "--epochs must be at least 1"),
    ("--epochs -2", "--epochs must be at least 1"),
    ("--epochs 1.5", "--epochs.*'1.5'"),
    ("--guidance-scale -1", "--guidance-scale must be at least 0"),
    ("--precision fp8", "--precision must be one of auto, fp32, bf16, fp16"),
    ("--objective ppo", "--objective must be one of clipped, reinforce"),
    ("--objective reinforce --updates-per-epoch 4", "--updates-per-epoch 1"),
    ("--images-per-epoch 10 --updates-per-epoch 4", "--images-per-epoch.* multiple of --updates-per-epoch"),
    ("--reward beauty", "--reward beauty.*compressibility, incompressibility"),
    ("--device tpu", "--device tpu: not on this machine; it has.*cpu"),
    ("--reward-device tpu", "--reward-device tpu: not on this machine; it has.*cpu"),
    ("--monitor beauty", "--monitor beauty: unknown; choose from compressibility, incompressibility"),
    ("--steps 1001", "--steps 1001: the model knows 1000 timesteps"),
    ("--prompts gone.txt", "--prompts gone.txt"),
    ("--prompts .", "--prompts .: neither one of activities, animals, imagenet nor a readable text file"),
]


@pytest.mark.parametrize("flags, message", MISTAKES, ids=[flags for flags, _ in MISTAKES])
def test_a_mistake_costs_nothing(flags, message, tiny_model, capsys, nothing_happens):
    line = failure(capsys, "--model", tiny_model, *flags.split())
    assert re.search(message, line) and "\n" not in line


@pytest.mark.parametrize("content, message", [(b"\n  \n\n", "holds no prompt"), (b"\xff\xfe\x00cat", "readable text file")])
def test_a_prompt_file_of_no_use(content, message, tiny_model, capsys, nothing_happens):
    path = nothing_happens / "prompts.txt"
    path.write_bytes(content)
    line = failure(capsys, "--model", tiny_model, "--prompts", path)
    assert f"--prompts {path}" in line and message in line and "\n" not in line


@pytest.mark.parametrize(
    "index, message",
    [
        (None, "no such folder"),
        ({}, "no complete pipeline"),
        ({"model_index.json": "not json"}, "no complete pipeline"),
        ({"model_index.json": '{"_class_name": "FluxPipeline"}'}, "is a FluxPipeline; what works: StableDiffusionPipeline, "),
        ({"model_index.json": '{"_class_name": "StableDiffusionPipeline", "unet": [1, 2]}'}, "no complete pipeline"),
    ],
    ids=["no folder", "empty folder", "not json", "another pipeline", "half a pipeline"],
)
def test_a_model_folder_of_no_use(index, message, capsys, nothing_happens):
    folder = nothing_happens / "model"
    if index is not None:
        folder.mkdir()
        for name, text in index.items():
            (folder / name).write_text(text)
    line = failure(capsys, "--model", folder)
    assert f"--model {folder}" in line and message in line and "\n" not in line


def test_a_hub_that_does_not_answer(capsys, nothing_happens, monkeypatch):
    def load_config(*args, **kwargs):
        raise OSError("We couldn't connect to the hub.\nMore advice on a second line.")

    monkeypatch.setattr(ddpo.DiffusionPipeline, "load_config", load_config)
    line = failure(capsys, "--model", "someone/something")
    assert "--model someone/something" in line and "couldn't connect" in line and "\n" not in line


@pytest.mark.parametrize("text", ["{not json", '{"step": 7}', '{"steps": "many"}', "[1]"])
def test_a_broken_ddpo_json(text, capsys, nothing_happens):
    folder = nothing_happens / "model"
    folder.mkdir()
    (folder / "ddpo.json").write_text(text)
    line = failure(capsys, "--model", folder)
    assert re.search("ddpo.json|steps", line) and "\n" not in line


def test_a_run_is_never_written_over(tiny_model, capsys, nothing_happens):
    run = nothing_happens / "run"
    run.mkdir()
    (run / "config.json").write_text("mine")
    line = failure(capsys, "--model", tiny_model, "--out", run)
    assert f"--out {run}" in line and "\n" not in line
    assert [p.name for p in run.iterdir()] == ["config.json"] and (run / "config.json").read_text() == "mine"


def test_a_folder_that_cannot_be_written(tiny_model, capsys, nothing_happens):
    (nothing_happens / "file").write_text("")
    line = failure(capsys, "--model", tiny_model, "--out", nothing_happens / "file")
    assert f"--out {nothing_happens / 'file'}" in line and "\n" not in line


BAD_REWARDS = {
    "nan": (lambda images, prompts: [float("nan") if p == "bee" else 0.0 for p in prompts], "nan for the prompt 'bee'"),
    "one number": (lambda images, prompts: images.mean(), r"shape \(\) for \d+ images"),
    "a column": (lambda images, prompts: images.mean((1, 2, 3))[:, None], r"shape \(\d+, 1\) for \d+ images"),
}


@pytest.mark.parametrize("name", BAD_REWARDS)
def test_a_reward_that_breaks_its_contract(name, tiny_model, tmp_path, capsys, monkeypatch):
    function, message = BAD_REWARDS[name]
    monkeypatch.setitem(rewards.REWARDS, "mine", function)
    (tmp_path / "prompts.txt").write_text("cat\nbee\n")
    flags = f"--reward mine --prompts {tmp_path / 'prompts.txt'} --out {tmp_path / 'run'} --steps 2 --device cpu"
    line = failure(capsys, "--model", tiny_model, *flags.split())
    assert re.search(f"reward mine returned {message}", line) and "\n" not in line


def test_the_scorer_is_not_far_behind(tiny_model, tmp_path, capsys, monkeypatch):
    """What fails, or is stopped, in the first batch ends before a fourth one is sampled."""
    sampled, rollout = [], ddpo.rollout
    monkeypatch.setattr(ddpo, "rollout", lambda *args: sampled.append(len(args[1])) or rollout(*args))
    monkeypatch.setitem(rewards.REWARDS, "wrong", lambda images, prompts: torch.ones(2, 3) @ torch.ones(2, 3))
    flags = f"--reward wrong --out {tmp_path / 'run'} --steps 2 --device cpu --sample-batch 2 --eval-images 20"
    line = failure(capsys, "--model", tiny_model, *flags.split())
    assert 1 <= len(sampled) <= 3 and set(sampled) == {2}
    assert "reward wrong failed at 'cat': RuntimeError" in line and "test_cli.py, line" in line  # ours, not one of torch's


@pytest.mark.parametrize("column", ["epoch", "reward_mean", "diversity"])
def test_a_reward_with_the_name_of_a_column(column, tiny_model, capsys, nothing_happens):
    """It would be written over, or write over it."""
    path = nothing_happens / "mine.py"
    path.write_text(f"def {column}(images, prompts):\n    return images.mean((1, 2, 3))\n")
    line = failure(capsys, "--model", tiny_model, "--monitor", f"{path}:{column}")
    assert f"the reward {column} has the name of a column of metrics.csv" in line and "\n" not in line


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    (tmp_path / "prompts.txt").write_text("# from an editor that writes one\ncat\n", encoding="utf-8-sig")
    assert ddpo.load_prompts(tmp_path / "prompts.txt") == ["cat"]


def test_a_model_without_a_sample_size(tiny_model, capsys, nothing_happens):
    folder = shutil.copytree(tiny_model, nothing_happens / "model")
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps({**config, "sample_size": None}))
    line = failure(capsys, "--model", folder)
    assert "its UNet's config has no sample_size" in line and "\n" not in line


def test_every_setting_is_a_flag_and_help_tells_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit) as end:
        ddpo.parse(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for f in dataclasses.fields(ddpo.Settings):
        flag = f.name.replace("_", "-")
        flag = f"--{flag}, --no-{flag}" if f.type is bool else f"--{flag} {f.type.__name__.upper()}"
        shown = re.search(rf"^  {flag}\s+(.*)$", text, re.MULTILINE)
        assert shown and shown[1] == f"{f.metadata['help']} (default: {f.default!r})", f.name


def test_every_flag_arrives():
    given = {"objective": "clipped", "precision": "bf16", "seed": 3, "eta": 0.5, "init_lora": "", "train_steps_fraction": 0.5}
    for f in dataclasses.fields(ddpo.Settings):
        given.setdefault(f.name, {str: f"some-{f.name}", bool: True}.get(f.type) or f.default * 2 or 1)
    argv = ["--" + name.replace("_", "-") + (f"={value}" if value is not True else "") for name, value in given.items()]
    assert dataclasses.asdict(ddpo.parse(argv)[0]) == given


def test_a_whole_number_is_a_float_too():
    settings = ddpo.parse(["--lr", "1", "--eta", "1"])[0]
    assert (settings.lr, settings.eta) == (1.0, 1.0) and type(settings.lr) is float
    assert type(ddpo.Settings(lr=1).lr) is float


def test_settings_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ddpo.parse([])[0].lr = 1.0


def test_the_model_brings_its_own_defaults_and_flags_override_them(tmp_path):
    (tmp_path / "ddpo.json").write_text(json.dumps({"steps": 7, "lr": 1, "updates_per_epoch": 2}))
    settings = ddpo.parse(["--model", str(tmp_path), "--steps", "9"])[0]
    assert (settings.steps, settings.lr, settings.updates_per_epoch) == (9, 1.0, 2)
    assert settings.eta == ddpo.Settings.eta
    assert ddpo.parse(["--model", str(tmp_path), "--objective", "reinforce"])[0].updates_per_epoch == 1  # its 2 is for clipped


def run_script(*argv, cwd):
    command, env = [sys.executable, Path(ddpo.__file__).resolve(), *argv], {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_as_a_script_a_mistake_is_one_line_and_a_status(tiny_model, tmp_path):
    done = run_script("--model", tiny_model, "--reward", "beauty", cwd=tmp_path)
    assert done.returncode not in (0, None) and done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert errors == [done.stderr.splitlines()[-1]] and "beauty" in errors[0] and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_as_a_script_it_trains(tiny_model, tmp_path):
    flags = "--epochs 1 --steps 2 --images-per-epoch 4 --eval-images 2 --device cpu"
    done = run_script("--model", tiny_model, *flags.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/compressibility/pytorch_lora_weights.safetensors").exists()
    assert "8 (image, step) pairs, 4 updates" in done.stdout and "same prompts and noise" in done.stdout
