"""Proves that a run cannot be lost and can be repeated: resumed after any end it becomes, bit for bit, the run that was never
stopped; damage, a full disk, NaN and a mistake each end in one line, with what was saved before whole; and that another's run
folder cannot run code. examples/kill_resume.py proves the first with real kills."""

import dataclasses
import itertools
import json
import math
import os
import pickle
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from conftest import save_tiny_pipeline
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from test_cli import failure
from test_train import as_flags, flags, read_metrics

import ddpo
import rewards
from examples.kill_resume import contents, plain

MAY_CHANGE = {"epochs": 4, "lr": 1e-9, "weight_decay": 0.5, "grad_clip": 0.25, "save_every": 4, "eval_every": 1,
              "micro_batch": 5, "reward_batch_size": 3, "reward_device": "cpu", "kl_stop": 1000.0, "grad_checkpointing": True,
              "compile": True}  # fmt: skip


class Killed(BaseException):
    """Stands for SIGKILL: nothing in ddpo.py catches it."""


@pytest.fixture(scope="module")
def start(tiny_model, tmp_path_factory):
    """The command line of a run in which all that is saved matters soon: two updates and three prompts with statistics."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("cat\nbee\ncow\n")
    common = {"prompts": prompts, "steps": 2, "images_per_epoch": 6, "micro_batch": 6, "eval_every": 2, "eval_images": 2,
              "stats_min_count": 2}  # fmt: skip
    return lambda out, **settings: flags(tiny_model, out=out, **{**common, **settings})


@pytest.fixture(scope="module")
def runs(start, tmp_path_factory):
    """Runs of 2 and of 4 epochs that nothing has stopped, by objective and epochs; only for reading."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for objective, updates in (("clipped", 2), ("reinforce", 1)):
        for epochs in (2, 4):
            found[objective, epochs] = folder / f"{objective}-{epochs}"
            ddpo.main(start(found[objective, epochs], objective=objective, updates_per_epoch=updates, epochs=epochs))
    return found


@pytest.fixture
def run(runs, tmp_path):
    """A copy of the clipped run of 2 epochs; it holds the states of both."""
    return shutil.copytree(runs["clipped", 2], tmp_path / "run")


def differences(run, other, leave_out=()):
    """Names of the files that differ in more than the seconds that things took, or that only one of the folders holds."""
    a, b = contents(run), contents(other)
    return [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name) and name not in leave_out]


def files(folder):
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def epochs_of(run):
    return [int(row["epoch"]) for row in read_metrics(run)]


def load(state):
    return torch.load(state, weights_only=True)


def raises_at(call, error, function):
    """The function, but the call with that number raises the error."""
    calls = itertools.count(1)

    def wrapped(*args, **kwargs):
        if next(calls) == call:
            raise error
        return function(*args, **kwargs)

    return wrapped


# ---------------------------------------------------------------- resumed and never stopped


@pytest.mark.parametrize("objective", ["clipped", "reinforce"])
def test_two_and_two_epochs_are_four(objective, runs, tmp_path, capsys):
    two, four = runs[objective, 2], runs[objective, 4]
    run = shutil.copytree(two, tmp_path / "run")
    torch.rand(3)  # what was drawn before must not matter
    ddpo.main(["--resume", str(run), "--epochs", "4"])
    assert f"resumes  {run / 'state_00002.pt'}, --epochs 2 -> 4\n" in capsys.readouterr().out
    assert differences(run, four) == [] and epochs_of(run) == [0, 1, 2, 3, 4]
    assert {"pytorch_lora_weights.safetensors", "metrics.csv", "state_00003.pt"} < set(differences(two, four))
    state, weights = load(run / "state_00004.pt"), load_file(run / "pytorch_lora_weights.safetensors")
    assert sorted(map(len, weights.values())) == sorted(map(len, state["weights"])) and len(weights) == 64
    assert sum(map(len, state["stats"].values())) == 24 and set(state["stats"]) == {"cat", "bee", "cow"}


def test_epochs_after_the_last_state_are_done_again(start, runs, tmp_path, monkeypatch):
    run, four = tmp_path / "run", runs["clipped", 4]
    with monkeypatch.context() as patch:
        patch.setattr(ddpo, "update", raises_at(4, Killed, ddpo.update))
        with pytest.raises(Killed):
            ddpo.main(start(run, epochs=4, save_every=2))
    assert [p.name for p in run.glob("*.pt")] == ["state_00002.pt"] and epochs_of(run) == [0, 1, 2, 3]
    ddpo.main(["--resume", str(run)])
    assert epochs_of(run) == [0, 1, 2, 3, 4]
    assert differences(run, four, ["config.json", "state_00002.pt", "state_00003.pt"]) == []


def test_killed_wherever_a_file_is_about_to_get_its_name(start, runs, tmp_path, monkeypatch):
    """One run that dies at ten places, each before a finished file takes the place of the old one. All of it must be on the
    disk by then, or a machine that goes down leaves an empty file."""
    run, died, synced, fsync, replace = tmp_path / "run", [], {}, os.fsync, os.replace

    def watched(file):
        fsync(file)
        synced[os.fstat(file if isinstance(file, int) else file.fileno()).st_ino] = os.fstat(file).st_size

    def deadly(tmp, path):
        assert synced.get(os.stat(tmp).st_ino) == os.stat(tmp).st_size
        place = (path.name, *[p.name for p in sorted(run.glob("state_*.pt"))[-1:]])
        if place not in died and (run / "config.json").exists():
            died.append(place)
            raise Killed
        replace(tmp, path)

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(os, "replace", deadly)
    argv, ended = start(run), False
    while not ended:
        try:
            ddpo.main(argv)
            ended = True
        except Killed:
            argv = ["--resume", str(run)]
    first, second = "state_00001.pt", "state_00002.pt"
    assert died == [("epoch_0000.png",), ("config.json",), ("metrics.csv",), ("pytorch_lora_weights.safetensors",), (first,),
                    ("epoch_0002.png", first), ("config.json", first), ("metrics.csv", first),
                    ("pytorch_lora_weights.safetensors", first), (second, first)]  # fmt: skip
    assert differences(run, runs["clipped", 2]) == [] and epochs_of(run) == [0, 1, 2]


@pytest.mark.parametrize("function, call", [("update", 2), ("fsync", 5), ("fsync", 9)])
def test_interrupted_and_resumed(function, call, start, runs, tmp_path, capsys, monkeypatch):
    """Ctrl-C in the second epoch, and while a file is written: the first state, the second weights."""
    with monkeypatch.context() as patch:
        owner = os if function == "fsync" else ddpo
        patch.setattr(owner, function, raises_at(call, KeyboardInterrupt, getattr(owner, function)))
        line = failure(capsys, *start(tmp_path / "run"))
    command = re.fullmatch("ddpo.py: error: stopped; go on with: python ddpo.py (.*)", line)[1]
    assert not list(tmp_path.rglob("*.tmp"))
    ddpo.main(command.split())
    assert differences(tmp_path / "run", runs["clipped", 2]) == []


@pytest.mark.parametrize("argv", [["run"], ["run/state_00001.pt", "--epochs", "1"]], ids=["finished", "fewer epochs"])
def test_nothing_left_to_do(argv, run, monkeypatch):
    before = contents(run)
    monkeypatch.chdir(run.parent)
    monkeypatch.setattr(ddpo, "rollout", lambda *a, **k: pytest.fail("sampled"))
    ddpo.main(["--resume", *argv])
    after = contents(run)
    assert {**after, "config.json": 0} == {**before, "config.json": 0}


# ---------------------------------------------------------------- damage


def damaged(run, capsys):
    """What the message about the run's second state offers instead; all that is there must stay as it is."""
    before = files(run)
    line = failure(capsys, "--resume", run)
    assert line.startswith(f"ddpo.py: error: {run / 'state_00002.pt'} is damaged") and "\n" not in line
    assert files(run) == before
    return re.search(r"before it: (--resume [^ ]+/state_00001.pt)\b", line)[1].split()


@pytest.mark.parametrize("tenth", range(10))
def test_a_state_cut_short(tenth, run, capsys):
    state = run / "state_00002.pt"
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) * tenth // 10])
    damaged(run, capsys)


@pytest.mark.parametrize("place", ["weights", "momentum", "log"])
def test_a_state_with_a_flipped_bit(place, run, capsys):
    state = run / "state_00002.pt"
    content, raw = load(state), bytearray(state.read_bytes())
    known = {"weights": content["weights"][5].detach().numpy().tobytes(),
             "momentum": content["optimizer"]["state"][3]["exp_avg"].numpy().tobytes(),
             "log": struct.pack(">d", content["log"][1]["reward_mean"])}[place]  # fmt: skip
    raw[raw.index(known) + 5] ^= 1
    state.write_bytes(raw)
    damaged(run, capsys)


def test_a_file_that_is_no_state_of_ours(run, capsys):
    torch.save({"weights": []}, run / "state_00002.pt")
    damaged(run, capsys)


def test_the_offered_state_works(run, runs, capsys):
    (run / "state_00002.pt").write_bytes(b"")
    ddpo.main(damaged(run, capsys))
    assert f"resumes  {run / 'state_00001.pt'}, later epochs will be written over\n" in capsys.readouterr().out
    assert differences(run, runs["clipped", 2]) == []


def test_no_state_before_it(run, capsys):
    (run / "state_00002.pt").unlink()
    (run / "state_00001.pt").write_bytes(b"PK")
    line = failure(capsys, "--resume", run)
    assert f"{run / 'state_00001.pt'} is damaged" in line and "before it: none" in line and "\n" not in line


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("save", [torch.save, pickle.dump])
def test_a_strangers_state_cannot_run_code(save, run, tmp_path, capsys):
    hit = tmp_path / "hit"
    with open(run / "state_00002.pt", "wb") as file:
        save({**load(run / "state_00001.pt"), "stats": Evil(hit)}, file)
    with open(run / "state_00002.pt", "rb") as file:
        (torch.load(file, weights_only=False) if save is torch.save else pickle.load(file))
    hit.rmdir()  # so it would have worked
    damaged(run, capsys)
    assert not hit.exists()


@pytest.mark.parametrize("name", ["write_config", "evaluate", "write_metrics", "save_lora", "save"])
def test_a_full_disk(name, run, capsys, monkeypatch):
    """A limit on the size of files stands for it: like a full disk it lets the first bytes through. Epoch 2 is done again."""
    resource = pytest.importorskip("resource")
    owner, (soft, hard) = (ddpo.Run if name == "save" else ddpo), resource.getrlimit(resource.RLIMIT_FSIZE)
    function = getattr(owner, name)

    def without_space(*args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            return function(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    before = contents(run)
    monkeypatch.setattr(owner, name, without_space)
    with pytest.raises(SystemExit) as end:
        ddpo.main(["--resume", str(run / "state_00001.pt")])
    line = end.value.code
    assert line.startswith(f"ddpo.py: error: cannot write {run}") and "File too large" in line and "\n" not in line
    assert contents(run) == before  # no half file, nor a temporary one that takes up what space there is


def test_copies_of_states_are_left_alone(run):
    """Somebody's own, under other names: neither taken for the newest state nor deleted with the old ones."""
    copies = [shutil.copy(run / "state_00001.pt", run / name) for name in ("state_00001-good.pt", "state_best.pt")]
    ddpo.main(["--resume", str(run), "--epochs", "4"])
    assert epochs_of(run) == [0, 1, 2, 3, 4] and all(Path(copy).is_file() for copy in copies)
    assert sorted(p.name for p in run.glob("state_0*[0-9].pt")) == ["state_00003.pt", "state_00004.pt"]


def test_the_picture_of_epoch_0_may_be_gone(run):
    (run / "samples/epoch_0000.png").unlink()
    ddpo.main(["--resume", str(run), "--epochs", "3"])
    assert epochs_of(run) == [0, 1, 2, 3] and (run / "samples/epoch_0003.png").is_file()


# ---------------------------------------------------------------- settings


def test_what_may_change_is_taken_and_said(run, capsys, monkeypatch):
    compiled = []  # test_policy.py does it for real
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append(self))
    before, weights = json.loads((run / "config.json").read_text()), load(run / "state_00002.pt")["weights"]
    ddpo.main(["--resume", str(run), *as_flags(MAY_CHANGE)])
    assert len(compiled) == 1
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("resumes"))
    for name, value in MAY_CHANGE.items():
        assert f"--{name.replace('_', '-')} {before[name]} -> {value}" in said
    assert json.loads((run / "config.json").read_text()) == {**before, **MAY_CHANGE}

    assert sorted(p.name for p in run.glob("*.pt")) == ["state_00002.pt", "state_00004.pt"]
    assert sorted(p.name for p in run.glob("samples/*")) == [f"epoch_{n:04d}.png" for n in (0, 2, 3, 4)]
    state = load(run / "state_00004.pt")
    group = state["optimizer"]["param_groups"][0]
    assert (group["lr"], group["weight_decay"]) == (1e-9, 0.5)
    moved = max((a - b).abs().max().item() for a, b in zip(state["weights"], weights))
    assert 0 < moved < 1e-7  # four steps; with the old learning rate of 0.01 it would be 0.01 and more


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(ddpo.Settings) if f.name not in MAY_CHANGE])
def test_what_makes_another_experiment_is_refused(name, run, capsys, monkeypatch):
    monkeypatch.setattr(ddpo, "launch", lambda *a: pytest.fail("accepted"))
    before = files(run)
    old = json.loads((run / "config.json").read_text())[name]
    others = {"objective": "reinforce", "precision": "bf16", "eta": 0.5}
    new = others.get(name, old + "x" if isinstance(old, str) else old * 2 or type(old)(1))
    line = failure(capsys, "--resume", run, "--epochs", 4, "--" + name.replace("_", "-"), new)
    assert f"--{name.replace('_', '-')} {old} -> {new} would make it another experiment" in line and "\n" not in line
    assert "--epochs" not in line and files(run) == before


def test_the_same_flags_again_change_nothing(start, run, capsys):
    argv = [*start(run.parent / "elsewhere"), "--resume", str(run)]
    del argv[argv.index("--out") : argv.index("--out") + 2]
    settings, folder, state = ddpo.parse(argv)
    assert capsys.readouterr().out == f"resumes  {run / 'state_00002.pt'}\n"
    assert (settings, folder, state) == (ddpo.parse(["--resume", str(run)])[0], run, run / "state_00002.pt")


@pytest.mark.parametrize("name", ["gone", "empty", "other", "other/metrics.csv"])
def test_a_folder_without_a_run(name, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/metrics.csv").write_text("epoch\n")
    before = sorted(tmp_path.rglob("*"))
    line = failure(capsys, "--resume", tmp_path / name)
    assert f"--resume {tmp_path / name}: no run there" in line and "\n" not in line and sorted(tmp_path.rglob("*")) == before


def test_a_file_that_is_no_state_in_a_run_without_one(run, capsys):
    for state in run.glob("state_*.pt"):
        state.unlink()
    line = failure(capsys, "--resume", run / "config.json")
    assert f"{run / 'config.json'} is damaged or of another kind of run; before it: none" in line and "\n" not in line


def test_the_lora_that_a_run_began_from_is_not_needed_again(start, run, tmp_path, capsys):
    lora = shutil.copy(run / "pytorch_lora_weights.safetensors", tmp_path / "lora.safetensors")
    for folder, epochs in (("whole", 2), ("parted", 1)):
        ddpo.main(start(tmp_path / folder, init_lora=lora, epochs=epochs, eval_every=1))
    Path(lora).unlink()
    ddpo.main(["--resume", str(tmp_path / "parted"), "--epochs", "2"])
    assert differences(tmp_path / "parted", tmp_path / "whole", ["state_00001.pt"]) == []


@pytest.mark.parametrize("trouble, message", [
    (OSError("No space left on device"), "cannot write .*pipeline; what was saved before is whole .No space left on device."),
    (KeyboardInterrupt(), "stopped; go on with: python ddpo.py --resume"),
])  # fmt: skip
def test_a_pipeline_that_could_not_be_saved_is_saved_on_resuming(trouble, message, start, tmp_path, capsys, monkeypatch):
    def trouble_in_saving(*args, **kwargs):
        raise trouble

    with monkeypatch.context() as context:
        context.setattr(StableDiffusionPipeline, "save_pretrained", trouble_in_saving)
        assert re.search(message, failure(capsys, *start(tmp_path / "run", lora_rank=0, epochs=1)))
    ddpo.main(["--resume", str(tmp_path / "run")])
    assert (tmp_path / "run/pipeline/model_index.json").is_file()


def test_without_a_name_it_is_the_newest_run(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--resume: there is no run in runs/" in failure(capsys, "--resume")
    for age, name in enumerate(["no-run", "b", "c", "a"]):
        if name == "no-run":
            (tmp_path / "runs" / name).mkdir(parents=True)
        else:
            shutil.copytree(runs["clipped", 2], tmp_path / "runs" / name)
        os.utime(tmp_path / "runs" / name, (1e9 - 1e6 * age, 1e9 - 1e6 * age))
    ddpo.main(["--resume"])
    assert "resumes  runs/b/state_00002.pt\n" in capsys.readouterr().out
    ddpo.main(["--epochs", "3", "--resume", "runs/c"])  # now that one was written last
    assert "resumes  runs/c/state_00002.pt, --epochs 2 -> 3\n" in capsys.readouterr().out
    assert str(ddpo.parse(["--resume"])[1]) == "runs/c" and epochs_of(tmp_path / "runs/c") == [0, 1, 2, 3]


def test_config_repeats_the_run(start, run, runs, tmp_path, capsys):
    config = run / "config.json"
    settings = ddpo.parse(["--config", str(config)])[0]
    asked = ddpo.parse(start(run))[0]
    assert dataclasses.replace(settings, out="") == dataclasses.replace(asked, out="")
    assert ddpo.parse(["--config", str(config), "--seed", "5"])[0] == dataclasses.replace(settings, seed=5)
    ddpo.main(["--config", str(config), "--out", str(tmp_path / "again")])
    assert differences(tmp_path / "again", runs["clipped", 2]) == []


def test_config_counts_more_than_the_models_defaults(run, tmp_path):
    model = save_tiny_pipeline(tmp_path / "model")
    (model / "ddpo.json").write_text(json.dumps({"steps": 9, "seed": 9}))
    config = run / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model": str(model)}))
    for argv in (["--config", str(config)], ["--resume", str(run)]):
        assert (lambda s: (s.steps, s.seed, s.model))(ddpo.parse(argv)[0]) == (2, 0, str(model))


@pytest.mark.parametrize("how", ["--config", "--resume"])
def test_a_config_with_an_unknown_setting(how, run, capsys):
    config = run / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "step": 3}))
    line = failure(capsys, how, config if how == "--config" else run)
    assert f"{config}: there is no setting named step" in line and "\n" not in line


@pytest.mark.parametrize("argv, message", [("--config gone.json", "gone.json"), ("--config config.json --resume .", "use one")])
def test_a_config_of_no_use(argv, message, run, capsys, monkeypatch):
    monkeypatch.chdir(run)
    line = failure(capsys, *argv.split())
    assert message in line and "--config" in line + argv and "\n" not in line


# ---------------------------------------------------------------- not finite, out of memory


def spoil(monkeypatch, where, updates):
    """NaN in these updates, counted from 1 over the whole run; an update has one micro-batch here."""
    calls, ddim_step, add_lora, loss = itertools.count(1), ddpo.ddim_step, ddpo.add_lora, ddpo.clipped_loss

    def spoiled(value):
        return value * math.nan if next(calls) in updates else value

    def step(*args, x_prev=None, **kwargs):
        x, logp = ddim_step(*args, x_prev=x_prev, **kwargs)
        return x, logp if x_prev is None else spoiled(logp)

    def add(*args):
        weights = add_lora(*args)
        weights[0].register_hook(spoiled)
        return weights

    name, function = {"loss": ("clipped_loss", lambda *args: spoiled(loss(*args))), "log-probability": ("ddim_step", step),
                      "gradient": ("add_lora", add)}[where]  # fmt: skip
    monkeypatch.setattr(ddpo, name, function)


def numbers(state):
    """Every number of the weights and of the optimizer."""
    moments = [v for of_one in state["optimizer"]["state"].values() for v in of_one.values()]
    return torch.cat([v.flatten() for v in [*state["weights"], *moments]])


@pytest.mark.parametrize("where", ["loss", "log-probability", "gradient"])
def test_an_update_that_is_not_finite_is_skipped(where, start, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    spoil(monkeypatch, where, [2])
    ddpo.main(start(run))
    assert [row["skipped"] for row in read_metrics(run)] == ["", "1", "0"]
    said = capsys.readouterr().out
    assert said.count("skipped") == 1 and re.search(r"epoch +1 .* 1 of 2 updates skipped: not finite\n", said)
    first, second = load(run / "state_00001.pt"), load(run / "state_00002.pt")
    assert [state["optimizer"]["state"][0]["step"] for state in (first, second)] == [1, 3]
    assert numbers(first).isfinite().all() and numbers(second).isfinite().all()
    assert all((a != b).any() for a, b in zip(first["weights"], second["weights"]))  # it has gone on learning


def test_nan_for_ever_stops_the_run(start, runs, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    spoil(monkeypatch, "loss", range(3, 1000))  # the first epoch is good
    line = failure(capsys, *start(run, epochs=9))
    assert "no update of 3 epochs was finite" in line and str(run) in line and "--lr" in line and "\n" not in line
    assert [row["skipped"] for row in read_metrics(run)] == ["", "0", "2", "2", "2"]
    good = load(runs["clipped", 2] / "state_00001.pt")
    for epoch in (3, 4):
        state = load(run / f"state_{epoch:05d}.pt")
        assert all(plain(state[part]) == plain(good[part]) for part in ("weights", "optimizer"))
    saved = load_file(run / "pytorch_lora_weights.safetensors").values()
    assert sorted(v.norm().item() for v in saved) == sorted(v.norm().item() for v in good["weights"])


@pytest.mark.parametrize("where", ["network", "update", "reward"])
def test_out_of_gpu_memory(where, start, tmp_path, capsys, monkeypatch):
    def greedy(*args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore advice on a second line.")

    if where == "reward":
        monkeypatch.setitem(rewards.REWARDS, "compressibility", greedy)
    else:
        monkeypatch.setattr(*{"network": (ddpo.Policy, "predict"), "update": (ddpo, "update")}[where], greedy)
    line = failure(capsys, *start(tmp_path / "run"))
    assert "out of GPU memory" in line and "\n" not in line
    assert all(knob in line for knob in ("--micro-batch 6", "--sample-batch 3", "--precision fp32"))
