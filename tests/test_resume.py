"""Proves that a run cannot be lost and can be repeated: resumed after any end it becomes, bit for
bit, the run that was never stopped; damage, a full disk, NaN and a mistake each end in one line,
with what was saved before whole; what defines a run stays, and what changes is on record; and
another's run folder cannot run code. examples/experiments/kill_resume.py proves the first with
real kills."""

import copy
import functools
import itertools
import json
import math
import os
import pickle
import re
import shlex
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import LORA, as_flags, brightness, failure, flags, must_not_sample, read_metrics
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

import ddpo
from examples.experiments.kill_resume import contents, plain

read_pipeline = functools.cache(ddpo.load_pipeline)


@pytest.fixture(autouse=True)
def read_once(monkeypatch):
    """Other tests read models from files, in these a copy is as good."""
    monkeypatch.setattr(ddpo, "load_pipeline", lambda *args: copy.deepcopy(read_pipeline(*args)))


SMALLEST = {"images_per_epoch": 2, "eval_images": 1}


@pytest.fixture(scope="module")
def start(tiniest_model, tmp_path_factory):
    """The command line of a run in which all that is saved matters soon: two updates, and three
    prompts with statistics."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("cat\nbee\ncow\n")
    size = {"images_per_epoch": 6, "batch_size": 6, "eval_every": 2, "eval_images": 2}
    common = {"prompts": prompts, "stats_buffer": 4, **size}
    return lambda out, **settings: flags(tiniest_model, out=out, **{**common, **settings})


@pytest.fixture(scope="module")
def runs(start, tmp_path_factory):
    """Runs of 2 and of 4 epochs that nothing has stopped; only for reading."""
    folder = tmp_path_factory.mktemp("runs")
    for epochs in (2, 4):
        ddpo.main(start(folder / str(epochs), epochs=epochs))
    return {2: folder / "2", 4: folder / "4"}


@pytest.fixture
def run(runs, tmp_path):
    """A copy of the run of 2 epochs, in a folder whose name has a space."""
    return shutil.copytree(runs[2], tmp_path / "a run")


def differences(run, other):
    """Names of the files that differ in more than the seconds that things took and the word on what
    was changed, or that only one of the folders holds."""
    a, b = contents(run), contents(other)
    for found in (a, b):
        for row in [*found["metrics.csv"], *found["state.pt"]["log"]]:
            del row["changed"]
    names = sorted(a.keys() | b.keys())
    return [name for name in names if a.get(name) != b.get(name)]


def files(folder):
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


def epochs_of(run):
    return [int(row["epoch"]) for row in read_metrics(run)]


def changed(run):
    """What metrics.csv says to have changed, by the epoch."""
    return {int(row["epoch"]): row["changed"] for row in read_metrics(run) if row["changed"]}


def state_of(run):
    return torch.load(run / "state.pt", weights_only=True)


def config_of(run):
    return json.loads((run / "config.json").read_text())


def change_config(run, **values):
    (run / "config.json").write_text(json.dumps({**config_of(run), **values}))


def resume(run, *argv, **parts):
    """From Python."""
    return ddpo.launch(*ddpo.parse(["--resume", str(run), *argv]), **parts)


def how_to_go_on(text):
    """The command line that an error message offers."""
    return shlex.split(re.search(r"go on with: python (.*)", text)[1])[1:]


def raises_at(call, error, function):
    """The function, but the call with that number raises the error."""
    calls = itertools.count(1)

    def wrapped(*args, **kwargs):
        if next(calls) == call:
            raise error
        return function(*args, **kwargs)

    return wrapped


# ---------------------------------------------------- resumed and never stopped


def test_two_and_two_epochs_are_four(run, runs):
    torch.rand(3)  # what was drawn before must not matter
    ddpo.main(["--resume", str(run), "--epochs", "4"])
    assert differences(run, runs[4]) == [] and epochs_of(run) == [0, 1, 2, 3, 4]
    assert {LORA, "metrics.csv", "state.pt"} < set(differences(runs[2], runs[4]))
    assert changed(runs[4]) == {} and changed(run) == {3: "{'epochs': (2, 4)}"}
    state = state_of(run)
    assert set(state["stats"]) == {"cat", "bee", "cow"}
    assert min(map(len, state["stats"].values())) >= 4  # enough to be compared with
    assert {type(value) for row in state["log"] for value in row.values()} == {int, float, str}
    lora = load_file(run / LORA)
    kept = [torch.cat([w.flatten() for w in part.values()]) for part in (lora, state["weights"])]
    assert torch.equal(kept[0].sort().values, kept[1].sort().values) and len(lora) == 16


class Killed(BaseException):
    """Stands for SIGKILL."""


def test_killed_wherever_a_file_is_about_to_get_its_name(start, tmp_path, capsys, monkeypatch):
    """A run that dies at every place, each time before a finished file takes the place of the old
    one. All of it must be on the disk by then, or a machine that goes down leaves an empty file.
    Until there is a state, nothing can go on, and the run is begun again in another folder."""
    small = {**SMALLEST, "epochs": 1}
    whole = tmp_path / "whole"
    ddpo.main(start(whole, **small))
    run = tmp_path / "run"
    died = []
    synced = {}
    fsync = os.fsync
    rename = os.replace

    def watched(file):
        fsync(file)
        about = os.stat(file if isinstance(file, int) else file.fileno())
        synced[about.st_ino] = about.st_size

    def deadly(tmp, path):
        assert synced.get(os.stat(tmp).st_ino) == os.stat(tmp).st_size
        state = run / "state.pt"
        place = (path.name, len(state_of(run)["log"]) - 1 if state.exists() else None)
        if place not in died:
            died.append(place)
            raise Killed
        rename(tmp, path)

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(os, "replace", deadly)
    monkeypatch.setattr(shutil, "rmtree", lambda folder: None)  # who is killed cleans up nothing
    argv = start(run, **small)
    ended = False
    while not ended:
        try:
            ddpo.main(argv)
            ended = True
        except Killed:
            argv = ["--resume", str(run)]
            if not (run / "state.pt").exists():
                assert str(run) in failure(capsys, *argv)
                run = tmp_path / f"run after {len(died)}"
                argv = start(run, **small)
    names = ["metrics.csv", "config.json", LORA, "state.pt"]
    first = [(name, None) for name in ["epoch_0000.png", *names]]
    assert died == first + [(name, 0) for name in ["epoch_0001.png", *names]]
    assert differences(run, whole) == [] and epochs_of(run) == [0, 1]


@pytest.mark.parametrize("owner, name, call", [(ddpo.Run, "step", 3), (torch, "save", 2)])
def test_interrupted_and_resumed(owner, name, call, start, runs, tmp_path, capsys, monkeypatch):
    """Ctrl-C in the second epoch, of which there are two updates; and while the state of the first
    is written."""
    run = tmp_path / "a run"
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, raises_at(call, KeyboardInterrupt, getattr(owner, name)))
        with pytest.raises(SystemExit) as end:
            ddpo.main(start(run))
    assert end.value.code == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ddpo.py: error: stopped; go on with: python ")
    assert epochs_of(run) == [0, 1] and len(load_file(run / LORA)) == 16
    ddpo.main(how_to_go_on(line))
    assert differences(run, runs[2]) == [] and changed(run) == {}


@pytest.mark.parametrize("more", ["", "--epochs 1 --lr 0.5 --monitor incompressibility"])
def test_nothing_left_to_do(more, run, monkeypatch):
    """Then nothing is written, not even what would have been done otherwise."""
    before = files(run)
    must_not_sample(monkeypatch)
    ddpo.main(["--resume", str(run), *more.split()])
    assert files(run) == before


def test_a_reward_from_python_is_given_again(start, tmp_path, capsys):
    """Ctrl-C comes through to Python as it is, with a note. Without the reward there is no going
    on, nor with another one."""
    run = tmp_path / "run"
    whole = tmp_path / "whole"
    settings, _ = ddpo.parse(start(run, **SMALLEST))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ddpo.Run, "step", raises_at(3, KeyboardInterrupt, ddpo.Run.step))
        with pytest.raises(KeyboardInterrupt) as error:
            ddpo.launch(settings, reward=brightness)
    (note,) = error.value.__notes__
    assert note == f"go on with: ddpo.launch(settings, {str(run)!r}, reward), with this reward"
    before = files(run)
    assert "--reward brightness: unknown" in failure(capsys, "--resume", run)
    with pytest.raises(ddpo.UserError, match="its reward is 'brightness'; begin a new run for 'la"):
        resume(run, reward=lambda images, prompts: images.mean((1, 2, 3)))
    assert files(run) == before
    assert ddpo.launch(settings, str(run), brightness) == run
    assert "epochs are done" not in capsys.readouterr().out
    ddpo.launch(settings, run, brightness)
    assert "all of 2 epochs are done; more by --epochs\n" in capsys.readouterr().out
    ddpo.launch(replace(settings, out=str(whole)), reward=brightness)
    assert differences(run, whole) == [] and changed(run) == {}


MINE = """import itertools
open(__file__ + ".ran", "w").close()
calls = itertools.count(1)
def flaky(images, prompts):
    assert next(calls) != 4, "my mistake"
    return images.mean((1, 2, 3))
def steady(images, prompts):
    return images.mean((1, 2, 3))
"""


def test_after_a_failing_reward_the_advice_works(start, tmp_path):
    """It names all code again, as the folder may be somebody else's. The error is the reward's."""
    mine = tmp_path / "mine.py"
    mine.write_text(MINE)
    run = tmp_path / "a run"
    whole = tmp_path / "whole"
    argv = start(run, reward=f"0.5*{mine}:flaky", monitor=f"{mine}:steady", **SMALLEST)
    with pytest.raises(AssertionError, match="my mistake") as error:
        ddpo.main(argv)
    assert error.traceback[-1].path == mine
    (note,) = error.value.__notes__
    assert epochs_of(run) == [0, 1]
    ddpo.main(how_to_go_on(note))
    ddpo.main([*argv, "--out", str(whole)])
    assert differences(run, whole) == [] and changed(run) == {}


def test_a_run_may_go_on_in_half_precision_and_without_its_pictures(run):
    """One that was begun on a CPU does so on a GPU."""
    shutil.rmtree(run / "samples")
    ddpo.main(["--resume", str(run), "--epochs", "3", "--precision", "fp16"])
    assert epochs_of(run) == [0, 1, 2, 3] and state_of(run)["scaler"]["scale"] > 0
    assert [path.name for path in run.glob("samples/*")] == ["epoch_0003.png"]


# ---------------------------------------------------- damage


def damaged(run, capsys):
    """Resuming says that the state is of no use; all that is there must stay as it is."""
    before = files(run)
    line = failure(capsys, "--resume", run)
    assert line.startswith(f"ddpo.py: error: {run / 'state.pt'} is damaged or of another kind")
    assert files(run) == before


def test_a_damaged_state(run, capsys):
    """Cut short, gone, not one of ours, or with weights that do not fit: those of rank 1 could be
    spread over all of rank 4 without a word."""
    path = run / "state.pt"
    whole = path.read_bytes()
    state = state_of(run)
    for tenth in (0, 3, 9):
        path.write_bytes(whole[: len(whole) * tenth // 10])
        damaged(run, capsys)
    path.unlink()
    damaged(run, capsys)
    spread = {k: w[:1] if len(w) == 4 else w[:, :1] for k, w in state["weights"].items()}
    for other in ({"weights": []}, [], {**state, "weights": spread}):
        torch.save(other, path)
        damaged(run, capsys)


@pytest.mark.parametrize("save, load", [
    (torch.save, functools.partial(torch.load, weights_only=False)),
    (functools.partial(pickle.dump, protocol=2), pickle.load),  # as torch.save
])  # fmt: skip
def test_a_strangers_state_cannot_run_code(save, load, run, tmp_path, capsys):
    hit = tmp_path / "hit"
    evil = type("Evil", (), {"__reduce__": lambda self: (os.mkdir, (str(hit),))})
    state = {**state_of(run), "stats": evil()}
    with open(run / "state.pt", "wb+") as file:
        save(state, file)
        file.seek(0)
        load(file)
    hit.rmdir()  # so it would have worked
    damaged(run, capsys)
    assert not hit.exists()


def test_a_full_disk(run, runs, capsys, monkeypatch):
    """A limit on the size of files stands for it: like a full disk it lets the first bytes through.
    Each file is once the one that does not fit; in the end the run is as if all had."""
    resource = pytest.importorskip("resource")
    whole_file = ddpo.whole_file
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    @contextmanager
    def without_space(path):
        with whole_file(path) as tmp:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100 if path == full else soft, hard))
            try:
                yield tmp
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with monkeypatch.context() as patch:
        patch.setattr(ddpo, "whole_file", without_space)
        for name in ("config.json", "metrics.csv", LORA, "state.pt", "samples/epoch_0004.png"):
            full = run / name
            before = contents(run).get(name)
            line = failure(capsys, "--resume", run, "--epochs", 4)
            assert line.startswith(f"ddpo.py: error: cannot write {full}; what was saved before")
            assert "File too large" in line
            assert contents(run).get(name) == before  # not half of the new file
    ddpo.main(how_to_go_on(line))
    assert differences(run, runs[4]) == []


def test_a_pipeline_that_could_not_be_saved(start, tmp_path, capsys, monkeypatch):
    """It is saved on resuming."""
    run = tmp_path / "run"
    argv = start(run, lora_rank=0, epochs=1, **SMALLEST)
    for trouble in (OSError("No space left"), KeyboardInterrupt()):
        with monkeypatch.context() as patch:
            save = raises_at(1, trouble, None)
            patch.setattr(StableDiffusionPipeline, "save_pretrained", save)
            line = failure(capsys, *argv)
        argv = how_to_go_on(line)
        if isinstance(trouble, OSError):
            assert f"cannot write {run / 'pipeline'}; what was saved before is whole (No " in line
    ddpo.main(argv)
    assert (run / "pipeline/model_index.json").is_file() and epochs_of(run) == [0, 1]


# ---------------------------------------------------- settings


def test_what_changes_is_taken_and_on_record(run):
    """In config.json, and in metrics.csv at the first epoch after."""
    before = config_of(run)
    weights = state_of(run)["weights"]
    change = {"epochs": 4, "batch_size": 5, "save_memory": True, "lr": 1e-9, "kl_stop": 99.0,
              "eval_every": 1}  # fmt: skip
    ddpo.main(["--resume", str(run), *as_flags(change), "--seed", "0"])
    assert config_of(run) == {**before, **change}
    said = {name: (before[name], value) for name, value in change.items()}
    (at,) = changed(run).items()
    assert at[0] == 3 and eval(at[1]) == said
    pictures = sorted(path.name for path in run.glob("samples/*"))
    assert pictures == [f"epoch_{epoch:04d}.png" for epoch in (0, 2, 3, 4)]
    state = state_of(run)
    assert state["optimizer"]["param_groups"][0]["lr"] == 1e-9
    moved = max((state["weights"][k] - weights[k]).abs().max().item() for k in weights)
    assert 0 < moved < 1e-7  # in four steps; at the old learning rate, 0.01 and more


def test_monitors_and_code_may_change(run):
    """A column stays once it was there. Which code made what is on record, too."""

    def mine(*args):
        return ddpo.update(*args)

    assert '"update"' in json.dumps(config_of(run))
    ddpo.main(["--resume", str(run), "--epochs", "3", "--monitor", "incompressibility"])
    resume(run, "--epochs", "4", "--monitor", "", update=mine)
    logged = [row["incompressibility"] for row in read_metrics(run)]
    assert logged[3] and logged[:3] + logged[4:] == [""] * 4
    first, second = (changed(run)[epoch] for epoch in (3, 4))
    assert len(changed(run)) == 2 and "'monitor': ('', 'incompressibility')" in first
    assert "'update'" not in first and "'update'" in second and "'mine'" in second
    assert '"mine"' in json.dumps(config_of(run))


def test_a_kill_while_files_are_written_loses_no_word_on_a_change(run, monkeypatch):
    """config.json has its new name already, the state not yet."""
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", raises_at(1, Killed, torch.save))
        with pytest.raises(Killed):
            ddpo.main(["--resume", str(run), "--epochs", "3", "--lr", "0.5"])
    ddpo.main(["--resume", str(run)])
    assert config_of(run)["lr"] == 0.5 and changed(run).keys() == {3}
    assert eval(changed(run)[3]) == {"epochs": (2, 3), "lr": (0.01, 0.5)}


def test_paths_are_those_of_the_place_where_the_run_began(start, tmp_path, monkeypatch):
    for name in ("began", "later"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "began")
    Path("few.txt").write_text("cat\n")
    ddpo.main(start("run", prompts="few.txt", epochs=1, **SMALLEST))
    monkeypatch.chdir(tmp_path / "later")
    ddpo.main(["--resume", "../began/run", "--epochs", "2"])
    assert epochs_of(tmp_path / "began/run") == [0, 1, 2]


@pytest.mark.parametrize("argv, name", [
    ("--lora-rank 8", "lora_rank"),
    ("--steps 9", "steps"),
    ("--objective reinforce --updates-per-epoch 1", "objective"),
    ("--objective reinforce", "objective"),  # which does not go with the run's two updates
    ("--seed 1", "seed"),
    ("--reward incompressibility", "reward"),
    ("--samples-per-prompt 2 --updates-per-epoch 1", "samples_per_prompt"),
])  # fmt: skip
def test_what_a_run_is_cannot_change(argv, name, run, capsys, monkeypatch):
    must_not_sample(monkeypatch)
    before = files(run)
    line = failure(capsys, "--resume", run, "--epochs", 9, *argv.split())
    assert name in line and ("begin a new run" in line or "add --updates-per-epoch 1" in line)
    assert files(run) == before


def test_the_same_flags_again_change_nothing(start, run):
    argv = start(config_of(run)["out"])
    settings, folder = ddpo.parse([*argv, "--resume", str(run)])
    assert os.path.samefile(folder, run)
    assert settings == ddpo.parse(argv)[0] == ddpo.parse(["--resume", str(run)])[0]


def test_a_folder_without_a_run(tmp_path, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text("[]")
    before = sorted(tmp_path.rglob("*"))
    for folder in (tmp_path, tmp_path / "gone", tmp_path / "other", tmp_path / "other/config.json"):
        line = failure(capsys, "--resume", folder)
        assert f"--resume {folder}: that is not the folder of a run" in line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("values, word", [
    ({"step": 3}, "step"),
    ({"steps": None}, "steps"),
    ({"steps": [3]}, "steps"),
    ({"reward": 3}, "folder of a run"),
    ({"made_with": 3}, "folder of a run"),
    ({"made_with": {"place": 3}}, "run"),
])  # fmt: skip
def test_a_config_of_no_use(values, word, run, capsys):
    change_config(run, **values)
    assert word in failure(capsys, "--resume", run)


@pytest.mark.parametrize("name", ["reward", "monitor"])
def test_code_that_a_run_folder_names(name, run, tmp_path, capsys, monkeypatch):
    """The folder may be somebody else's. So it runs only once it is named again."""
    theirs = tmp_path / "theirs.py"
    theirs.write_text(MINE)
    code = f"{theirs}:steady"
    change_config(run, **{name: code})
    before = files(run)
    line = failure(capsys, "--resume", run, "--epochs", 3)
    assert line.endswith(f"runs code: if you trust it, add --{name} {code}")
    assert files(run) == before and not Path(f"{theirs}.ran").exists()
    monkeypatch.chdir(tmp_path)  # no file in a place of theirs takes the name of this one
    made_with = {**config_of(run)["made_with"], "place": str(tmp_path / "samples")}
    change_config(run, **{name: "theirs.py:steady"}, made_with=made_with)
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/theirs.py").write_text("raise AssertionError")
    ddpo.main(["--resume", str(run), "--epochs", "3", f"--{name}", "theirs.py:steady"])
    assert Path(f"{theirs}.ran").exists() and epochs_of(run) == [0, 1, 2, 3]


# ---------------------------------------------------- not finite, out of memory


def not_finite(in_updates, function):
    """`function`, which gives a tensor of an update, but NaN in these calls, counted from 1."""
    calls = itertools.count(1)
    return lambda *args: function(*args) * (math.nan if next(calls) in in_updates else 1)


def test_an_update_that_is_not_finite_is_skipped(run, monkeypatch):
    """Be it the gradient of one of the weights, here in the first update, or the loss: what is
    saved then is no less a state."""
    step = ddpo.Run.step
    spoil = not_finite([1], lambda gradient: gradient)

    def spoiled(run):
        run.policy.weights[0].grad = spoil(run.policy.weights[0].grad)
        return step(run)

    states = [state_of(run)]
    with monkeypatch.context() as patch:
        patch.setattr(ddpo.Run, "step", spoiled)
        resume(run, "--epochs", "3")
    states.append(state_of(run))
    monkeypatch.setitem(ddpo.OBJECTIVES, "clipped", not_finite(range(99), ddpo.clipped_loss))
    resume(run, "--epochs", "4")
    states.append(state_of(run))
    rows = read_metrics(run)
    assert [row["skipped"] for row in rows] == ["", "0", "0", "1", "2"] and rows[4]["loss"] == "nan"
    assert [state["optimizer"]["state"][0]["step"] for state in states] == [4, 5, 5]
    before, after, same = (state["weights"] for state in states)
    assert all(after[k].isfinite().all() and (after[k] != before[k]).any() for k in after)
    assert plain(same) == plain(after)
    assert plain(states[2]["optimizer"]) == plain(states[1]["optimizer"])
    moments = states[2]["optimizer"]["state"].values()
    assert all(part.isfinite().all() for moment in moments for part in moment.values())


def test_out_of_gpu_memory(start, tmp_path, capsys, monkeypatch):
    def greedy(*args):
        advice = "More advice on a second line."
        raise torch.cuda.OutOfMemoryError(f"CUDA out of memory. Tried 20.00 GiB.\n{advice}")

    monkeypatch.setattr(ddpo.Run, "step", greedy)
    line = failure(capsys, *start(tmp_path / "run"))
    advice = "lower --batch-size, or add --save-memory"
    assert f"CUDA out of memory. Tried 20.00 GiB.; {advice}; go on with: python " in line
