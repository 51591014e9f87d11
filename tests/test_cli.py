"""Proves that the command line takes every setting, that what it prints is true, and that a mistake
costs nothing: each ends with one line that names the thing, a status that is not 0, and neither a
picture sampled nor a file written."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import failure, flags, launch, must_not_sample, read_metrics
from diffusers import UNet2DConditionModel
from diffusers.models import modeling_utils
from diffusers.pipelines import pipeline_utils
from safetensors.torch import load_file, save_file

import ddpo

FAILS_AT_LAST = """calls = []
def fails(images, prompts):
    calls.append(prompts)
    assert len(calls) < 3, "my mistake"
    return images.mean((1, 2, 3))
"""
SCRIPT = str(Path(ddpo.__file__).resolve())


@pytest.fixture(scope="module", autouse=True)
def script(tiniest_model, tmp_path_factory):
    """ddpo.py as a script, on a reward that fails in the last evaluation. It takes long to start,
    so it does beside the other tests; its folder, and its end to wait for."""
    folder = tmp_path_factory.mktemp("script")
    (folder / "mine.py").write_text(FAILS_AT_LAST)
    size = {"epochs": 1, "images_per_epoch": 2, "eval_images": 1}
    argv = flags(tiniest_model, reward="mine.py:fails", **size)
    how = {"cwd": folder, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "text": True}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, SCRIPT, *argv], **how, **pipes) as process:
        yield folder, process
        process.kill()


@pytest.fixture
def nothing_happens(tmp_path, monkeypatch):
    """An empty folder to stand in, which must stay empty, and a sampler that must not be called."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    must_not_sample(monkeypatch)
    yield tmp_path
    assert list(here.iterdir()) == []


# ---------------------------------------------------- flags


MISTAKES = [
    ("--no-such-flag 1", "--no-such-flag"),
    ("--epoch 3", "--epoch"),  # no abbreviations: a typing error must not set something else
    ("@gone.flags", "gone.flags"),
    ("--resume", "--resume: expected one argument"),
    ("--resume nowhere", "--resume nowhere: that is not the folder of a run"),
    ("--lr fast", "--lr.*'fast'"),
    ("--lr -1", "lr must be finite and at least 0, not -1.0"),
    ("--lr nan", "lr must be .*finite.*, not nan"),
    ("--lr inf", "lr must be .*finite.*, not inf"),
    ("--min-std 9", "no step adds noise to learn from"),
    ("--epochs 0", "epochs must be finite and at least 1, not 0"),
    ("--epochs 1.5", "--epochs.*'1.5'"),
    ("--images-per-epoch 1", "images_per_epoch must be .*at least 2"),
    ("--stats-buffer 1", "stats_buffer must be .*at least 2"),
    ("--adv-clip 0", "adv_clip must be .*at least 1e-06"),
    ("--precision x", "precision x: there are auto, fp32, bf16, fp16$"),
    ("--objective grpo", "objective grpo: there are clipped, reinforce$"),
    ("--objective reinforce", "objective reinforce .*: add --updates-per-epoch 1$"),
    ("--lora-rank 0", "lora_rank 0 .*: add --kl-coef 0 --kl-stop 0 --lr 0$"),
    ("--lora-rank 0 --lr 0", "lora_rank 0 .*: add --kl-coef 0 --kl-stop 0 --lr 0$"),
    ("--images-per-epoch 10 --updates-per-epoch 4", "images_per_epoch must be a multiple of"),
    ("--images-per-epoch 8 --samples-per-prompt 3", "images_per_epoch must be a multiple of"),
    ("--reward beauty", "--reward beauty.*compressibility, incompressibility"),
    ("--monitor beauty", "--monitor beauty.*compressibility, incompressibility"),
    ("--reward gone.py:bright", "--reward gone.py:bright: there is no file gone.py"),
    ("--device tpu", "device tpu: not on this machine, which has (cpu|cuda|mps)"),
    ("--reward-device tpu", "device tpu: not on this machine, which has (cpu|cuda|mps)"),
    ("--steps 1001", "1001 cannot be larger than .* 1000"),
    ("--prompts gone.txt", "prompts gone.txt: not animals, activities, imagenet, nor a text file"),
    ("--eval-prompts gone.txt", "prompts gone.txt: not animals.*nor a text file"),
    ("--prompts .", "prompts .: not animals, activities, imagenet, nor a text file"),
]


def on(model):
    """The command line of a run on another model, with the bundled one's defaults otherwise."""
    return ["--model", model, "--steps", 9, "--min-std", 0]


@pytest.mark.parametrize("argv, message", MISTAKES, ids=[argv for argv, _ in MISTAKES])
def test_a_mistake_costs_nothing(argv, message, tiniest_model, capsys, nothing_happens):
    line = failure(capsys, *on(tiniest_model), *argv.split())
    assert re.search(message, line.removesuffix("; see --help"))


MINE = """
@dataclasses.dataclass(frozen=True)
class Mine(ddpo.Settings):
    beta: float = ddpo.flag(0.1, "of my method", 0.01)
    plain: int = 3
"""


def test_help_has_every_setting_with_its_comment_and_default(capsys, monkeypatch):
    """Those of one's own, too: without source to read, or a word on what one means."""
    scope = {"dataclasses": dataclasses, "ddpo": ddpo}
    exec(MINE, scope)
    kind = scope["Mine"]
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit) as end:
        ddpo.main(["--help"], kind=kind)
    assert end.value.code == 0
    text = capsys.readouterr().out
    for f in dataclasses.fields(kind):
        name = f.name.replace("_", "-")
        argument = f"--no-{name}" if f.type is bool else f.name.upper()
        said = re.search(rf"^  --{name},? {argument}\s+(.*)$", text, re.MULTILINE)[1]
        comment = f.metadata.get("help", "")
        assert len(comment) <= 60, "long ones wrap in a terminal"
        assert said == f"{comment} (default: {f.default!r})".strip()
    settings, _ = ddpo.parse(["--beta", "0.5", "--plain", "0"], kind)
    assert settings == kind(beta=0.5, plain=0)
    with pytest.raises(ddpo.UserError, match="plain must be finite and at least 0"):
        kind(plain=-1)


def test_every_flag_arrives():
    given = {"objective": "clipped", "precision": "bf16", "seed": 3}
    for f in dataclasses.fields(ddpo.Settings):
        others = {str: f"some-{f.name}", bool: True}
        given.setdefault(f.name, others.get(f.type) or f.default * 2 or 1)
    argv = []
    for name, value in given.items():
        flag = "--" + name.replace("_", "-")
        argv.append(flag if value is True else f"{flag}={value}")
    assert dataclasses.asdict(ddpo.parse(argv)[0]) == given


def test_settings_from_python_are_those_of_the_command_line():
    assert ddpo.parse([]) == (ddpo.Settings(), None)
    argv = "--objective reinforce --updates-per-epoch 1 --lr 1 --no-save-memory"
    asked = ddpo.Settings(objective="reinforce", updates_per_epoch=1, lr=1)
    settings, _ = ddpo.parse(argv.split())
    assert settings == asked and type(settings.lr) is float  # whole numbers are floats too
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.lr = 2.0
    with pytest.raises(ddpo.UserError, match="epochs must be int, not '3'"):
        ddpo.Settings(epochs="3")


def test_a_file_of_flags(monkeypatch):
    """Settings for Stable Diffusion are as the file says; what comes after it counts more."""
    monkeypatch.chdir(ddpo.EXAMPLES.parent)
    lines = (ddpo.EXAMPLES / "stable-diffusion.flags").read_text().splitlines()
    said = dict(line.removeprefix("--").split("=") for line in lines)
    assert len(said) > 5 and {"model", "steps", "lr", "lora-rank"} < said.keys()
    kinds = {f.name: f.type for f in dataclasses.fields(ddpo.Settings)}
    names = [name.replace("-", "_") for name in said]
    values = {name: kinds[name](value) for name, value in zip(names, said.values())}
    settings, _ = ddpo.parse(["@examples/stable-diffusion.flags"])
    assert dataclasses.asdict(settings) == {**dataclasses.asdict(ddpo.Settings()), **values}
    after, _ = ddpo.parse(["@examples/stable-diffusion.flags", "--lora-rank", "8"])
    assert after == dataclasses.replace(settings, lora_rank=8)


def test_the_bundled_models_defaults_are_for_it_alone(tiniest_model, capsys, nothing_happens):
    line = failure(capsys, "--model", tiniest_model)
    assert line == (f"ddpo.py: error: model {tiniest_model}: the defaults are for the bundled one;"
                    " begin with @examples/stable-diffusion.flags, or choose --steps and --lr")
    for flag in ("--steps=9", "--lr=0"):
        assert ddpo.parse(["--model", tiniest_model, flag])[0].model == tiniest_model


# ---------------------------------------------------- prompts


@pytest.mark.parametrize("content", [
    b"\n  \n\n# nothing else\n",
    b"\xff\xfe\x00cat",
    b'["cat", "dog"]',
    b'\xef\xbb\xbf[\n  {"prompt": "cat"}\n]',
    b'{"prompt": "cat"}\n{"prompt": "dog"}\n',
    b"PK\x03\x04\x0a\x00\x00\x00cat",
], ids=["blank", "no utf-8", "list", "indented", "jsonl", "zip"])  # fmt: skip
def test_a_prompt_file_of_no_use(content, tiniest_model, capsys, nothing_happens):
    path = nothing_happens / "prompts.txt"
    path.write_bytes(content)
    line = failure(capsys, *on(tiniest_model), "--prompts", path)
    assert f"prompts {path}: " in line and "text" in line


def test_prompts_are_lines_and_nothing_else(tmp_path):
    """What an editor puts before them is no part, and other ends of lines do not split them."""
    path = tmp_path / "prompts.txt"
    text = "# a comment\r\n cat\u2028on a mat \n\n[a]\x0b{b}\n"
    path.write_text(text, encoding="utf-8-sig", newline="")
    assert ddpo.load_prompts(path) == ["cat\u2028on a mat", "[a]\x0b{b}"]
    assert [len(ddpo.load_prompts(name)) for name in ("animals", "imagenet")] == [45, 398]


# ---------------------------------------------------- models


def without_sample_size(folder):
    config = folder / "unet/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sample_size": None}))


def with_a_learned_variance(folder):
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    UNet2DConditionModel.from_config(unet.config, out_channels=8).save_pretrained(folder / "unet")


def without_a_tensor(folder):
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["conv_norm_out.weight"]
    save_file(weights, path, {"format": "pt"})


FLUX = '{"_class_name": "FluxPipeline"}'
HALF = '{"_class_name": "StableDiffusionPipeline", "unet": [1, 2]}'
DAMAGES = {
    "no folder": shutil.rmtree,
    "no index": lambda folder: (folder / "model_index.json").unlink(),
    "not json": lambda folder: (folder / "model_index.json").write_text("not json"),
    "another kind": lambda folder: (folder / "model_index.json").write_text(FLUX),
    "half an index": lambda folder: (folder / "model_index.json").write_text(HALF),
    "no tokenizer": lambda folder: shutil.rmtree(folder / "tokenizer"),
    "no vocabulary": lambda folder: (folder / "tokenizer/tokenizer.json").unlink(),
    "no sample size": without_sample_size,
    "no norm": without_a_tensor,
    "a learned variance": with_a_learned_variance,
}


@pytest.mark.parametrize("damage, accelerate", [*((d, True) for d in DAMAGES), ("no norm", False)])
def test_a_model_that_cannot_be_trained(
    damage, accelerate, tiniest_model, capsys, nothing_happens, monkeypatch
):
    """Without accelerate diffusers builds a model first and then loads its weights, so that what
    is missing could stay random."""
    for module in (modeling_utils, pipeline_utils):
        if not accelerate:
            monkeypatch.setattr(module, "_LOW_CPU_MEM_USAGE_DEFAULT", False)
    folder = shutil.copytree(tiniest_model, nothing_happens / "model")
    DAMAGES[damage](folder)
    line = failure(capsys, *on(folder))
    another = damage == "another kind"
    message = " is a FluxPipeline; what works: Stable" if another else ": no such pipeline, or one"
    assert f"--model {folder}{message}" in line


def test_a_hub_that_does_not_answer(capsys, nothing_happens, monkeypatch):
    def load_config(*args, **kwargs):
        raise OSError("We couldn't connect to the hub.\nMore advice on a second line.")

    monkeypatch.setattr(ddpo.DiffusionPipeline, "load_config", load_config)
    line = failure(capsys, *on("someone/something"))
    assert "--model someone/something" in line and "couldn't connect" in line


# ---------------------------------------------------- folders


def test_a_run_is_never_written_over(tiniest_model, capsys, nothing_happens):
    run = nothing_happens / "run"
    run.mkdir()
    file = run / "config.json"
    file.write_text("mine")
    for out in (run, file):
        line = failure(capsys, *on(tiniest_model), "--out", out)
        assert f"--out {out}: cannot make that" in line and f"--resume {out}" in line
    assert list(run.iterdir()) == [file] and file.read_text() == "mine"


def stop(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("owner, name", [
    (ddpo, "pick_device"),
    (ddpo, "ddim_step"),  # in the evaluation before training
    (torch, "save"),  # of its state
])  # fmt: skip
def test_stopped_before_anything_was_saved(
    owner, name, tiniest_model, tmp_path, capsys, monkeypatch
):
    """Ctrl-C leaves nothing, as nothing could go on."""
    monkeypatch.setattr(owner, name, stop)
    with pytest.raises(SystemExit) as end:
        ddpo.main(flags(tiniest_model, out=tmp_path / "run"))
    assert end.value.code == 130
    assert capsys.readouterr().err == "ddpo.py: error: stopped\n"
    assert not (tmp_path / "run").exists()


def test_another_model_needs_settings_of_its_own(tmp_path, capsys):
    """Which may be those of the bundled one: a model that was fused from it is such."""
    line = failure(capsys, "--model", "x", "--epochs", 3)
    assert "begin with @examples/stable-diffusion.flags, or choose --steps and --lr" in line
    settings, _ = ddpo.parse(["--model", "x", "--steps", "7", "--lr", "0.003"])
    assert (settings.steps, settings.lr) == (ddpo.Settings.steps, ddpo.Settings.lr)


def test_a_run_of_another_script_is_not_gone_on_with(tiniest_model, tmp_path, capsys):
    out = tmp_path / "run"
    launch(tiniest_model, out, epochs=1)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "method": "nft"}))
    line = failure(capsys, "--resume", out)
    assert f"--resume {out.resolve()}: of another script (" in line and "'method'" in line


# ---------------------------------------------------- rewards, and numbers that are none


OF_MINE = """import torch

def nan_for_bees(images, prompts):
    return [float("nan") if prompt == "bee" else 0.0 for prompt in prompts]

def one_number(images, prompts):
    return images.mean()

def wrong(images, prompts):
    return torch.ones(2, 3) @ torch.ones(2, 3)

def changed(images, prompts):
    return images.mean((1, 2, 3))

def nothing(images, prompts):
    images.mean((1, 2, 3))

def images_alone(images):
    return images.mean((1, 2, 3))

class Class:
    def __call__(self, images, prompts):
        return images.mean((1, 2, 3))
"""


@pytest.fixture
def mine(tiniest_model, tmp_path):
    """A file of rewards of one's own, and the command line of a run on two prompts."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("cat\nbee\n")
    path = tmp_path / "mine.py"
    path.write_text(OF_MINE)
    return path, flags(tiniest_model, prompts=prompts, out=tmp_path / "run")


@pytest.mark.parametrize("reward, message", [
    ("MINE:nan_for_bees", "reward nan_for_bees is not finite for 'bee'$"),
    ("MINE:one_number", r"reward one_number returned shape \(\); it must be \(3,\), "),
    ("1e39*compressibility", r"1e\+39 \* reward compressibility is not finite for 'cat'$"),
    ("MINE:nope", ".*mine.py has no function nope$"),
    ("MINE:images_alone", r"reward images_alone must take images and prompts \(too many .*\)$"),
    ("MINE:Class", r"reward Class must take images and prompts \(too many .*\)$"),
    ("MINE:nothing", r"reward nothing must return numbers \(.*NoneType\)$"),
    ("MINE:changed", "--reward changed: .*column of metrics.csv"),  # one would be written over
])  # fmt: skip
def test_a_reward_of_no_use(reward, message, mine, tmp_path, capsys):
    """What fails before anything was saved leaves nothing and no advice to go on."""
    path, argv = mine
    assert re.search(message, failure(capsys, *argv, "--reward", reward.replace("MINE", str(path))))
    assert not (tmp_path / "run").exists()


def test_a_reward_that_fails_shows_where(mine, tmp_path):
    """With the traceback of its own code, not in a line."""
    path, argv = mine
    with pytest.raises(RuntimeError, match="cannot be multiplied") as error:
        ddpo.main([*argv, "--reward", f"{path}:wrong"])
    assert error.traceback[-1].path == path and error.traceback[-1].name == "wrong"
    assert not (tmp_path / "run").exists() and not hasattr(error.value, "__notes__")


@pytest.mark.parametrize("other", [False, True])
def test_a_failing_reward_leaves_no_folder_for_runs(other, mine, tmp_path, monkeypatch):
    """But not if there is another run in it."""
    path, argv = mine
    monkeypatch.chdir(tmp_path)
    if other:
        (tmp_path / "runs/other").mkdir(parents=True)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        ddpo.main([*argv, "--out", "", "--reward", f"{path}:wrong"])
    assert [p.name for p in tmp_path.glob("runs*/*")] == ["other"] * other
    assert (tmp_path / "runs").exists() == other


# ---------------------------------------------------- as a script


def test_as_a_script(script):
    """It trains, until the reward fails: on stderr is Python's own traceback, then how to go on."""
    folder, process = script
    said, complained = process.communicate(timeout=120)
    assert process.returncode == 1, complained
    first, epoch = said.splitlines()
    assert first.startswith("trains ") and epoch.startswith("epoch 0/1 ")
    first, *trace, error, advice = complained.splitlines()
    assert first.startswith("Traceback") and error == "AssertionError: my mistake"
    assert any('mine.py", line 4, in fails' in entry for entry in trace)
    go_on = f"go on with: python {SCRIPT} --resume runs/mine.py_fails --reward mine.py:fails"
    assert shlex.split(advice) == shlex.split(go_on)
    run = folder / "runs/mine.py_fails"
    assert len(read_metrics(run)) == 1 and (run / "state.pt").is_file()
