"""Proves that the command line takes every setting, that what it prints is true, and that a mistake
costs nothing: each ends with one line that names the thing, a status that is not 0, and neither a
picture sampled nor a file written."""

import dataclasses
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import failure, flags, read_metrics, save_tiny_pipeline
from diffusers import UNet2DConditionModel
from diffusers.models import modeling_utils
from diffusers.pipelines import pipeline_utils
from safetensors.torch import load_file, save_file

import ddpo


@pytest.fixture
def nothing_happens(tmp_path, monkeypatch):
    """An empty folder to stand in, which must stay empty, and a sampler that must not be called."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    message = "sampled before the mistake was found"
    monkeypatch.setattr(ddpo, "rollout", lambda *args: pytest.fail(message))
    yield tmp_path
    assert list(here.iterdir()) == []


# ---------------------------------------------------- flags


MISTAKES = [
    ("--no-such-flag 1", "--no-such-flag"),
    ("--epoch 3", "--epoch"),  # no abbreviations: a typing error must not set something else
    ("--resume", "--resume: expected one argument"),
    ("--lr fast", "--lr.*'fast'"),
    ("--lr -1", "lr must be at least 0"),
    ("--lr nan", "lr must be .*finite, not nan"),
    ("--lr inf", "lr must be .*finite, not inf"),
    ("--eta 0", "no step adds noise to learn from"),
    ("--eta 1.5", "eta .*must be at most 1"),
    ("--train-steps-fraction 1.5", "train_steps_fraction must be at most 1"),
    ("--epochs 0", "epochs must be at least 1"),
    ("--epochs -2", "epochs must be at least 1"),
    ("--epochs 1.5", "--epochs.*'1.5'"),
    ("--images-per-epoch 1", "images_per_epoch must be at least 2"),
    ("--stats-buffer 1", "stats_buffer must be at least 2"),
    ("--grad-clip 0", "grad_clip must be at least 1e-06"),  # no gradient at all, not "no limit"
    ("--adv-clip 0", "adv_clip must be at least 1e-06"),
    ("--guidance-scale -1", "guidance_scale must be at least 0"),
    ("--precision fp8", "precision: auto, fp32, bf16, fp16"),
    ("--objective ppo", "objective: clipped or reinforce"),
    ("--objective reinforce --updates-per-epoch 4", "--updates-per-epoch 1"),
    ("--images-per-epoch 10 --updates-per-epoch 4", "images_per_epoch must be a multiple of 4"),
    ("--images-per-epoch 8 --samples-per-prompt 3", "images_per_epoch must be a multiple of 3"),
    ("--reward beauty", "--reward beauty.*compressibility, incompressibility"),
    ("--monitor beauty", "--monitor beauty.*compressibility, incompressibility"),
    ("--device tpu", "device tpu: not on this machine, which has (cpu|cuda|mps)"),
    ("--reward-device tpu", "device tpu: not on this machine, which has (cpu|cuda|mps)"),
    ("--steps 1001", "1001 cannot be larger than .* 1000"),
    ("--prompts gone.txt", "prompts gone.txt: not animals.*nor a text file"),
    ("--eval-prompts gone.txt", "prompts gone.txt: not animals.*nor a text file"),
    ("--prompts .", "prompts .: not animals, activities, imagenet, nor a text file"),
]


@pytest.mark.parametrize("argv, message", MISTAKES, ids=[argv for argv, _ in MISTAKES])
def test_a_mistake_costs_nothing(argv, message, tiniest_model, capsys, nothing_happens):
    assert re.search(message, failure(capsys, "--model", tiniest_model, *argv.split()))


def test_help_has_every_setting_with_its_comment_and_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit) as end:
        ddpo.parse(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    lines = inspect.getsource(ddpo.Settings).splitlines()
    for f in dataclasses.fields(ddpo.Settings):
        (line,) = [line for line in lines if line.startswith(f"    {f.name}: ")]
        _, comment = line.split("  # ")
        assert 0 < len(comment) <= 55, "long ones wrap in a terminal of 80 columns"
        name = f.name.replace("_", "-")
        flag = f"--{name}, --no-{name}" if f.type is bool else f"--{name} {f.name.upper()}"
        shown = re.search(rf"^  {flag}\s+(.*)$", text, re.MULTILINE)
        assert shown and shown[1] == f"{comment} (default: {f.default!r})", f.name


def test_every_flag_arrives():
    given = {
        "objective": "clipped",
        "precision": "bf16",
        "seed": 3,
        "eta": 0.5,
        "init_lora": "",
        "train_steps_fraction": 0.5,
    }
    for f in dataclasses.fields(ddpo.Settings):
        others = {str: f"some-{f.name}", bool: True}
        given.setdefault(f.name, others.get(f.type) or f.default * 2 or 1)
    argv = []
    for name, value in given.items():
        flag = "--" + name.replace("_", "-")
        argv.append(flag if value is True else f"{flag}={value}")
    assert dataclasses.asdict(ddpo.parse(argv)[0]) == given


def test_whole_numbers_are_floats_too_and_settings_stay_as_they_are():
    settings, folder = ddpo.parse(["--lr", "1", "--eta", "1"])
    assert (settings.lr, settings.eta) == (1.0, 1.0) and type(settings.lr) is float
    assert folder is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.lr = 2.0


def test_settings_from_python_are_those_of_the_command_line():
    """The bundled model's own defaults are among them."""
    settings = ddpo.make_settings()
    assert settings == ddpo.parse([])[0]
    own = json.loads((ddpo.EXAMPLES / "emoji-diffusion/ddpo.json").read_text())
    assert dataclasses.asdict(settings) == {**dataclasses.asdict(ddpo.Settings()), **own}
    argv = ["--objective", "reinforce", "--lora-rank", "0", "--steps", "7"]
    asked = ddpo.make_settings(objective="reinforce", lora_rank=0, steps=7)
    assert asked == ddpo.parse(argv)[0]
    assert (asked.updates_per_epoch, asked.lr, asked.steps) == (1, 1e-5, 7)


# ---------------------------------------------------- prompts


@pytest.mark.parametrize("content, message", [
    (b"\n  \n\n", "holds no prompt"),
    (b"\xff\xfe\x00cat", "nor a text file"),
])  # fmt: skip
def test_a_prompt_file_of_no_use(content, message, tiniest_model, capsys, nothing_happens):
    path = nothing_happens / "prompts.txt"
    path.write_bytes(content)
    line = failure(capsys, "--model", tiniest_model, "--prompts", path)
    assert f"prompts {path}" in line and message in line


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# from an editor that writes one\ncat\n", encoding="utf-8-sig")
    assert ddpo.load_prompts(path) == ["cat"]


# ---------------------------------------------------- models


HALF = '{"_class_name": "StableDiffusionPipeline", "unet": [1, 2]}'
FLUX = '{"_class_name": "FluxPipeline"}'


@pytest.mark.parametrize("index, message", [
    pytest.param(None, "no such pipeline", id="no folder"),
    pytest.param("", "no such pipeline", id="empty folder"),
    pytest.param("not json", "no such pipeline", id="not json"),
    pytest.param(HALF, "no such pipeline", id="half a pipeline"),
    pytest.param(FLUX, "is a FluxPipeline; what works: StableDiffusionPipeline, ", id="another"),
])  # fmt: skip
def test_a_model_folder_of_no_use(index, message, capsys, nothing_happens):
    folder = nothing_happens / "model"
    if index is not None:
        folder.mkdir()
    if index:
        (folder / "model_index.json").write_text(index)
    line = failure(capsys, "--model", folder)
    assert f"--model {folder}" in line and message in line


def without_tokenizer(folder):
    shutil.rmtree(folder / "tokenizer")


def without_vocabulary(folder):
    (folder / "tokenizer/tokenizer.json").unlink()


def without_sample_size(folder):
    config = folder / "unet/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sample_size": None}))


def without_a_tensor(folder):
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["conv_norm_out.weight"]
    save_file(weights, path, {"format": "pt"})


def with_a_learned_variance(folder):
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    UNet2DConditionModel.from_config(unet.config, out_channels=8).save_pretrained(folder / "unet")


@pytest.mark.parametrize("damage, accelerate", [
    (without_tokenizer, True),
    (without_vocabulary, True),
    (without_sample_size, True),
    (without_a_tensor, True),
    (without_a_tensor, False),
    (with_a_learned_variance, True),
])  # fmt: skip
def test_a_model_that_cannot_be_trained(
    damage, accelerate, tiniest_model, capsys, nothing_happens, monkeypatch
):
    """Without accelerate diffusers builds a model first and then loads its weights, so that what
    is missing could stay random."""
    for module in (modeling_utils, pipeline_utils):
        if not accelerate:
            monkeypatch.setattr(module, "_LOW_CPU_MEM_USAGE_DEFAULT", False)
    folder = shutil.copytree(tiniest_model, nothing_happens / "model")
    damage(folder)
    assert f"--model {folder}: " in failure(capsys, "--model", folder)


def test_a_hub_that_does_not_answer(capsys, nothing_happens, monkeypatch):
    def load_config(*args, **kwargs):
        raise OSError("We couldn't connect to the hub.\nMore advice on a second line.")

    monkeypatch.setattr(ddpo.DiffusionPipeline, "load_config", load_config)
    line = failure(capsys, "--model", "someone/something")
    assert "--model someone/something" in line and "couldn't connect" in line


def test_the_model_brings_its_own_defaults_and_flags_override_them(tmp_path):
    own = {"steps": 7, "lr": 1, "updates_per_epoch": 2}
    (tmp_path / "ddpo.json").write_text(json.dumps(own))
    settings = ddpo.make_settings(model=str(tmp_path), steps=9)
    assert (settings.steps, settings.lr, settings.updates_per_epoch) == (9, 1.0, 2)
    assert settings.eta == ddpo.Settings.eta
    settings = ddpo.make_settings(model=str(tmp_path), objective="reinforce")
    assert settings.updates_per_epoch == 1  # its 2 is for clipped


@pytest.mark.parametrize("text", ["{not json", '{"step": 7}', '{"steps": "many"}', "[1]"])
def test_a_broken_ddpo_json(text, capsys, nothing_happens):
    folder = nothing_happens / "model"
    folder.mkdir()
    (folder / "ddpo.json").write_text(text)
    line = failure(capsys, "--model", folder)
    assert str(folder / "ddpo.json") in line and ("step" in text) <= ("step" in line)


THEIRS = """import os
os.mkdir({hit!r})
def bright(images, prompts):
    return images.mean((1, 2, 3))
"""


@pytest.mark.parametrize("name", ["reward", "monitor", "out", "eval_prompts"])
def test_a_ddpo_json_names_no_code_and_no_folder(name, tmp_path, capsys, nothing_happens):
    """A model may be somebody else's. What it names counts once it is named as a flag."""
    hit = tmp_path / "hit"
    file = tmp_path / "theirs.py"
    file.write_text(THEIRS.format(hit=str(hit)))
    value = str(tmp_path / "run") if name == "out" else f"{file}:bright"
    model = save_tiny_pipeline(tmp_path / "model")
    (model / "ddpo.json").write_text(json.dumps({name: value, "steps": 3}))
    line = failure(capsys, "--model", model)
    again = f"--{name.replace('_', '-')} {value}"
    assert f"{model / 'ddpo.json'} cannot decide the {name}; if you trust it, add {again}" in line
    assert not hit.exists() and not (tmp_path / "run").exists()
    settings, _ = ddpo.parse(["--model", str(model), *again.split()])
    assert getattr(settings, name) == value and settings.steps == 3


# ---------------------------------------------------- folders


def test_a_run_is_never_written_over(tiniest_model, capsys, nothing_happens):
    run = nothing_happens / "run"
    run.mkdir()
    (run / "config.json").write_text("mine")
    line = failure(capsys, "--model", tiniest_model, "--out", run)
    assert f"--out {run}" in line and f"--resume {run}" in line
    assert [path.name for path in run.iterdir()] == ["config.json"]
    assert (run / "config.json").read_text() == "mine"


def test_a_folder_that_cannot_be_written(tiniest_model, capsys, nothing_happens):
    path = nothing_happens / "file"
    path.write_text("")
    assert f"--out {path}" in failure(capsys, "--model", tiniest_model, "--out", path)


def test_stopped_before_anything_began(tiniest_model, capsys, nothing_happens, monkeypatch):
    def stop(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(ddpo, "pick_device", stop)
    assert failure(capsys, "--model", tiniest_model) == "ddpo.py: stopped; nothing had begun"


# ---------------------------------------------------- rewards, and numbers that are none


MINE = """import sys
import torch

def nan_for_bees(images, prompts):
    return [float("nan") if prompt == "bee" else 0.0 for prompt in prompts]

def one_number(images, prompts):
    return images.mean()

def column(images, prompts):
    return images.mean((1, 2, 3))[:, None]

def wrong(images, prompts):
    return torch.ones(2, 3) @ torch.ones(2, 3)

def leaves(images, prompts):
    sys.exit(0)

def {name}(images, prompts):
    return images.mean((1, 2, 3))
"""


@pytest.fixture
def mine(tmp_path):
    """A file of rewards of one's own."""
    path = tmp_path / "mine.py"
    path.write_text(MINE.format(name="bright"))
    return path


@pytest.fixture
def bees(tiniest_model, tmp_path):
    """The command line of a run on two prompts."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("cat\nbee\n")
    return flags(tiniest_model, prompts=prompts, out=tmp_path / "run")


@pytest.mark.parametrize("reward, message", [
    ("{mine}:nan_for_bees", "reward nan_for_bees is not finite for 'bee'"),
    ("{mine}:one_number", r"reward one_number returned shape \(\); it must be \(3,\)"),
    ("{mine}:column", r"reward column returned shape \(3, 1\); it must be \(3,\)"),
    ("1e39*compressibility", r"1e\+39 \* reward compressibility is not finite for 'cat'"),
])  # fmt: skip
def test_a_reward_without_a_number_for_each(reward, message, mine, bees, tmp_path, capsys):
    """The line says how to go on, too."""
    line = failure(capsys, *bees, "--reward", reward.format(mine=mine))
    assert re.search(message, line)
    assert line.endswith(f"; go on with: python ddpo.py --resume {tmp_path / 'run'}")


@pytest.mark.parametrize("name, last", [("wrong", "RuntimeError:"), ("leaves", "SystemExit: 0")])
def test_a_reward_that_fails_shows_where(name, last, mine, bees, tmp_path, capsys):
    """One line as ever, then the traceback of its own code; and leaving is failing."""
    with pytest.raises(SystemExit) as end:
        ddpo.main([*bees, "--reward", f"{mine}:{name}"])
    assert end.value.code == 1
    line, *trace = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ddpo.py: error: reward {name} failed at the prompt 'cat'; go on with:")
    assert trace[0].startswith("Traceback") and trace[-1].startswith(last)
    assert any(f'File "{mine}", line' in entry for entry in trace)
    assert "During handling" not in "".join(trace)


@pytest.mark.parametrize("column", ["epoch", "reward_mean", "diversity"])
def test_a_reward_with_the_name_of_a_column(column, mine, tiniest_model, capsys, nothing_happens):
    """It would be written over, or write over it."""
    mine.write_text(MINE.format(name=column))
    line = failure(capsys, "--model", tiniest_model, "--monitor", f"{mine}:{column}")
    assert f"reward {column}: metrics.csv has a column of this name; rename it" in line


def test_weights_that_are_not_numbers(tiniest_model, tmp_path, capsys):
    """Their pictures would be black, which is a small JPEG."""
    folder = shutil.copytree(tiniest_model, tmp_path / "model")
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_in.weight"][0, 0, 0, 0] = torch.nan
    save_file(weights, path, {"format": "pt"})
    line = failure(capsys, *flags(folder, out=tmp_path / "run"))
    assert "samples are not finite: damaged weights" in line
    assert not list(tmp_path.rglob("*.png"))


# ---------------------------------------------------- as a script


def test_as_a_script(tiniest_model, tmp_path):
    """It trains, until the reward leaves in the evaluation at the end; nothing but that is on
    stderr, and the status is not the reward's."""
    mine = tmp_path / "mine.py"
    mine.write_text("""import sys
calls = []
def leaves(images, prompts):
    calls.append(prompts)
    if len(calls) == 3:
        sys.exit(0)
    return images.mean((1, 2, 3))
""")
    argv = flags(tiniest_model, reward=f"{mine}:leaves", epochs=1, images_per_epoch=2)
    command = [sys.executable, Path(ddpo.__file__).resolve(), *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    how = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(command, timeout=120, check=False, **how)
    assert done.returncode == 1, done.stderr
    said, epoch = done.stdout.splitlines()
    assert said.startswith("trains ") and epoch.startswith("epoch 1/1  reward 0.")
    (run,) = (tmp_path / "runs").iterdir()
    line, *trace = done.stderr.splitlines()
    assert line.endswith(f"go on with: python ddpo.py --resume {run.relative_to(tmp_path)}")
    assert line.startswith("ddpo.py: error: reward leaves failed at the prompt 'cat'; ")
    assert trace[0].startswith("Traceback") and trace[-1] == "SystemExit: 0"
    assert len(read_metrics(run)) == 2 and (run / "state.pt").is_file()
