"""Proves that a run cannot be lost and can be repeated: resumed after any end it becomes, bit for
bit, the run that was never stopped; damage, a full disk, NaN and a mistake each end in one line,
with what was saved before whole; and that another's run folder cannot run code.
examples/kill_resume.py proves the first with real kills."""

import itertools
import json
import math
import os
import pickle
import re
import shlex
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import as_flags, brightness, failure, flags, read_metrics, save_tiny_pipeline
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

import ddpo
from examples.kill_resume import contents, plain

LORA = "pytorch_lora_weights.safetensors"


class Killed(BaseException):
    """Stands for SIGKILL: nothing in ddpo.py catches it."""


@pytest.fixture(scope="module")
def start(tiniest_model, tmp_path_factory):
    """The command line of a run in which all that is saved matters soon: two updates, and three
    prompts with statistics."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("cat\nbee\ncow\n")
    common = {
        "prompts": prompts,
        "images_per_epoch": 6,
        "micro_batch": 6,
        "eval_every": 2,
        "eval_images": 2,
        "stats_min_count": 2,
    }
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


def differences(run, other, leave_out=()):
    """Names of the files that differ in more than the seconds that things took, or that only one
    of the folders holds."""
    a = contents(run)
    b = contents(other)
    names = sorted(a.keys() | b.keys())
    return [name for name in names if a.get(name) != b.get(name) and name not in leave_out]


def files(folder):
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


def epochs_of(run):
    return [int(row["epoch"]) for row in read_metrics(run)]


def state_of(run):
    return torch.load(run / "state.pt", weights_only=True)


def change_config(run, **values):
    config = run / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **values}))


def how_to_go_on(line):
    """The command line that an error message offers."""
    return shlex.split(re.search("; go on with: python ddpo.py (.*)", line)[1])


def raises_at(call, error, function):
    """The function, but the call with that number raises the error."""
    calls = itertools.count(1)

    def wrapped(*args, **kwargs):
        if next(calls) == call:
            raise error
        return function(*args, **kwargs)

    return wrapped


# ---------------------------------------------------- resumed and never stopped


def test_two_and_two_epochs_are_four(run, runs, capsys):
    torch.rand(3)  # what was drawn before must not matter
    ddpo.main(["--resume", str(run), "--epochs", "4"])
    assert f"resumes {run} {{'epochs': 4}}\n" in capsys.readouterr().out
    assert differences(run, runs[4]) == [] and epochs_of(run) == [0, 1, 2, 3, 4]
    assert {LORA, "metrics.csv", "state.pt"} < set(differences(runs[2], runs[4]))
    state = state_of(run)
    stats = state["stats"]
    assert set(stats) == {"cat", "bee", "cow"} and sum(map(len, stats.values())) == 24
    lora = [plain(weights) for weights in load_file(run / LORA).values()]
    saved = [plain(weights) for weights in state["weights"].values()]
    assert sorted(lora) == sorted(saved) and len(lora) == 16


def test_epochs_after_the_saved_one_are_done_again(start, runs, tmp_path):
    run = tmp_path / "run"
    settings, _ = ddpo.parse(start(run, epochs=4, save_every=2))
    with pytest.raises(Killed):
        ddpo.launch(settings, update=raises_at(4, Killed, ddpo.update))
    assert len(state_of(run)["log"]) == 3 and epochs_of(run) == [0, 1, 2, 3]
    ddpo.main(["--resume", str(run)])
    assert epochs_of(run) == [0, 1, 2, 3, 4]
    assert differences(run, runs[4], ["config.json"]) == []


def test_killed_wherever_a_file_is_about_to_get_its_name(start, tmp_path, monkeypatch):
    """One run that dies at every place, each time before a finished file takes the place of the
    old one. All of it must be on the disk by then, or a machine that goes down leaves an empty
    file. Its last evaluation comes after its last epoch is saved."""
    small = {"eval_every": 3, "images_per_epoch": 4, "sample_batch": 4, "eval_images": 1}
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
        if place not in died and (run / "config.json").exists():
            died.append(place)
            raise Killed
        rename(tmp, path)

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(os, "replace", deadly)
    argv = start(run, **small)
    ended = False
    while not ended:
        try:
            ddpo.main(argv)
            ended = True
        except Killed:
            argv = ["--resume", str(run)]
    assert died == [
        *[("epoch_0000.png", None), ("config.json", None), ("metrics.csv", None)],
        *[(LORA, None), ("state.pt", None)],
        *[("metrics.csv", 1), ("config.json", 1), (LORA, 1), ("state.pt", 1)],
        *[("epoch_0002.png", 2), ("config.json", 2), ("metrics.csv", 2)],
        *[(LORA, 2), ("state.pt", 2)],
    ]
    assert differences(run, whole) == [] and epochs_of(run) == [0, 1, 2]


@pytest.mark.parametrize("where, call", [("update", 3), ("fsync", 5)])
def test_interrupted_and_resumed(where, call, start, runs, tmp_path, capsys, monkeypatch):
    """Ctrl-C in the second epoch, of which there are two updates; and while the first state is
    written."""
    run = tmp_path / "a run"
    with monkeypatch.context() as patch:
        owner, name = {"update": (ddpo.Run, "step"), "fsync": (os, "fsync")}[where]
        patch.setattr(owner, name, raises_at(call, KeyboardInterrupt, getattr(owner, name)))
        line = failure(capsys, *start(run))
    assert line.startswith("ddpo.py: error: stopped; go on with: python ddpo.py --resume ")
    assert epochs_of(run) == [0, 1]
    assert len(load_file(run / LORA)) == 16
    ddpo.main(how_to_go_on(line))
    assert differences(run, runs[2]) == []


@pytest.mark.parametrize("more", [[], ["--epochs", "1"]], ids=["finished", "fewer epochs"])
def test_nothing_left_to_do(more, run, monkeypatch):
    before = contents(run)
    monkeypatch.setattr(ddpo, "rollout", lambda *a, **k: pytest.fail("sampled"))
    ddpo.main(["--resume", str(run), *more])
    after = contents(run)
    assert {**after, "config.json": 0} == {**before, "config.json": 0}


def test_what_came_of_a_stopped_run_can_be_asked(start, tmp_path, capsys):
    """Stopped in epoch 2 and resumed with --epochs 1, it ends with an evaluation of epoch 1. From
    Python, with a reward that the command line does not know."""
    run = tmp_path / "run"
    settings, _ = ddpo.parse(start(run))
    update = raises_at(2, KeyboardInterrupt, ddpo.update)
    with pytest.raises(ddpo.UserError, match="stopped; go on with: python ddpo.py --resume"):
        ddpo.launch(settings, reward=brightness, update=update)
    assert [row["eval_reward"] != "" for row in read_metrics(run)] == [True, False]
    settings = ddpo.make_settings(resume=str(run), epochs=1)
    assert settings.reward == "brightness"
    assert ddpo.launch(settings, run, reward=brightness) == run
    before, after = (row["eval_reward"] for row in state_of(run)["log"])
    assert before != after
    assert f"{before:.3f} before, {after:.3f} after; see" in capsys.readouterr().out
    assert (run / "samples/epoch_0001.png").is_file()


def test_columns_stay_if_what_was_logged_is_logged_no_more(run, runs):
    ddpo.main(["--resume", str(run), "--epochs", "3", "--monitor", "incompressibility"])
    ddpo.main(["--resume", str(run), "--epochs", "4", "--monitor", ""])
    logged = [row["incompressibility"] for row in read_metrics(run)]
    assert logged[3] and logged[:3] + logged[4:] == [""] * 4


def test_a_rate_of_the_whole_unet_stays_if_the_command_is_repeated(start, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"lora_rank": 0, "lr": 0.5}))
    assert ddpo.parse(["--resume", str(run), "--lora-rank", "0"])[0].lr == 0.5
    (run / "config.json").write_text(json.dumps({"lora_rank": 4, "lr": 0.5}))
    assert ddpo.parse(["--resume", str(run), "--lora-rank", "0"])[0].lr == 1e-5


def test_a_run_may_go_on_in_half_precision(run):
    """One that was begun on a CPU does so on a GPU."""
    ddpo.main(["--resume", str(run), "--epochs", "3", "--precision", "fp16"])
    assert epochs_of(run) == [0, 1, 2, 3] and state_of(run)["scaler"]["scale"] > 0


def test_the_pictures_may_be_gone(run):
    shutil.rmtree(run / "samples")
    ddpo.main(["--resume", str(run), "--epochs", "3"])
    assert epochs_of(run) == [0, 1, 2, 3]
    assert [path.name for path in run.glob("samples/*")] == ["epoch_0003.png"]


# ---------------------------------------------------- damage


def damaged(run, capsys, *more):
    """Resuming says that the state is of no use; all that is there must stay as it is."""
    before = files(run)
    line = failure(capsys, "--resume", run, *more)
    assert line.startswith(f"ddpo.py: error: {run / 'state.pt'} is damaged or of another kind")
    assert files(run) == before


@pytest.mark.parametrize("tenth", [0, 3, 9])
def test_a_state_cut_short(tenth, run, capsys):
    state = run / "state.pt"
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) * tenth // 10])
    damaged(run, capsys)


def test_a_file_that_is_no_state_of_ours(run, capsys):
    torch.save({"weights": []}, run / "state.pt")
    damaged(run, capsys)


@pytest.mark.parametrize("rank, other", [(4, 8), (1, 4), (4, 0)])
def test_weights_that_do_not_fit(rank, other, run, start, tmp_path, capsys):
    """Those of rank 1 could be spread over all of rank 4 without a word."""
    if rank == 1:
        run = tmp_path / "rank 1"
        ddpo.main(start(run, lora_rank=1, epochs=1))
    damaged(run, capsys, "--lora-rank", other)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def dump(state, file):
    pickle.dump(state, file, protocol=2)  # as torch.save


@pytest.mark.parametrize("save", [torch.save, dump])
def test_a_strangers_state_cannot_run_code(save, run, tmp_path, capsys):
    hit = tmp_path / "hit"
    state = {**state_of(run), "stats": Evil(hit)}
    with open(run / "state.pt", "wb") as file:
        save(state, file)
    with open(run / "state.pt", "rb") as file:
        if save is torch.save:
            torch.load(file, weights_only=False)
        else:
            pickle.load(file)
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
    ddpo.main(["--resume", str(run)])
    assert differences(run, runs[4]) == []


@pytest.mark.parametrize("trouble, message", [
    (OSError("No space left"), "cannot write .*pipeline; what was saved before is whole .No space"),
    (KeyboardInterrupt(), "stopped; go on with: python ddpo.py --resume"),
])  # fmt: skip
def test_a_pipeline_that_could_not_be_saved(trouble, message, start, tmp_path, capsys, monkeypatch):
    """It is saved on resuming."""

    def trouble_in_saving(*args, **kwargs):
        raise trouble

    small = {"lora_rank": 0, "epochs": 1, "images_per_epoch": 2, "eval_images": 1}
    with monkeypatch.context() as patch:
        patch.setattr(StableDiffusionPipeline, "save_pretrained", trouble_in_saving)
        assert re.search(message, failure(capsys, *start(tmp_path / "run", **small)))
    ddpo.main(["--resume", str(tmp_path / "run")])
    assert (tmp_path / "run/pipeline/model_index.json").is_file()


# ---------------------------------------------------- settings


def test_what_changes_is_taken_and_said(run, capsys):
    before = json.loads((run / "config.json").read_text())
    weights = state_of(run)["weights"]
    change = {"epochs": 4, "lr": 1e-9, "weight_decay": 0.5, "save_every": 4, "eval_every": 1,
              "micro_batch": 5, "grad_checkpointing": True}  # fmt: skip
    ddpo.main(["--resume", str(run), *as_flags(change), "--seed", "0"])
    assert f"resumes {run} {change}\n" in capsys.readouterr().out  # a seed of 0 is none
    assert json.loads((run / "config.json").read_text()) == {**before, **change}
    pictures = sorted(path.name for path in run.glob("samples/*"))
    assert pictures == [f"epoch_{epoch:04d}.png" for epoch in (0, 2, 3, 4)]
    state = state_of(run)
    group = state["optimizer"]["param_groups"][0]
    assert (group["lr"], group["weight_decay"]) == (1e-9, 0.5)
    moved = max((state["weights"][k] - weights[k]).abs().max().item() for k in weights)
    assert 0 < moved < 1e-7  # in four steps; at the old learning rate, 0.01 and more


def test_the_same_flags_again_change_nothing(start, run, capsys):
    argv = start(json.loads((run / "config.json").read_text())["out"])
    settings, folder = ddpo.parse([*argv, "--resume", str(run)])
    assert capsys.readouterr().out == f"resumes {run} \n" and folder == str(run)
    assert settings == ddpo.parse(argv)[0] == ddpo.make_settings(resume=str(run))


@pytest.mark.parametrize("name", ["gone", "empty", "other", "other/metrics.csv"])
def test_a_folder_without_a_run(name, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/metrics.csv").write_text("epoch\n")
    before = sorted(tmp_path.rglob("*"))
    line = failure(capsys, "--resume", tmp_path / name)
    assert str(tmp_path / name / "config.json") in line
    assert sorted(tmp_path.rglob("*")) == before


def test_the_lora_that_a_run_began_from_is_not_needed_again(start, runs, tmp_path):
    lora = shutil.copy(runs[2] / LORA, tmp_path / "lora.safetensors")
    for folder, epochs in (("whole", 2), ("parted", 1)):
        small = {"images_per_epoch": 2, "eval_images": 1, "eval_every": 1}
        ddpo.main(start(tmp_path / folder, init_lora=lora, epochs=epochs, **small))
    Path(lora).unlink()
    ddpo.main(["--resume", str(tmp_path / "parted"), "--epochs", "2"])
    assert differences(tmp_path / "parted", tmp_path / "whole") == []


def test_its_config_counts_more_than_the_models_defaults(run, tmp_path):
    model = save_tiny_pipeline(tmp_path / "model")
    (model / "ddpo.json").write_text(json.dumps({"steps": 9, "seed": 9}))
    change_config(run, model=str(model))
    settings = ddpo.make_settings(resume=str(run))
    assert (settings.steps, settings.seed, settings.model) == (2, 0, str(model))


@pytest.mark.parametrize("values", [{"step": 3}, {"steps": None}, {"steps": [3]}])
def test_a_config_of_no_use(values, run, capsys):
    change_config(run, **values)
    assert next(iter(values)) in failure(capsys, "--resume", run)


THEIRS = """import os
os.mkdir({hit!r})
def bright(images, prompts):
    return images.mean((1, 2, 3))
"""


@pytest.mark.parametrize("name", ["reward", "monitor"])
def test_code_that_a_run_folder_names(name, run, tmp_path, capsys):
    """The folder may be somebody else's. So it runs only once it is named again."""
    hit = tmp_path / "hit"
    file = tmp_path / "theirs.py"
    file.write_text(THEIRS.format(hit=str(hit)))
    code = f"{file}:bright"
    change_config(run, **{name: code})
    before = files(run)
    line = failure(capsys, "--resume", run, "--epochs", 3)
    assert f"config.json cannot decide the {name}; if you trust it, add --{name} {code}" in line
    assert files(run) == before and not hit.exists()
    ddpo.main(["--resume", str(run), "--epochs", "3", f"--{name}", code])
    assert hit.exists() and epochs_of(run) == [0, 1, 2, 3]


# ---------------------------------------------------- not finite, out of memory


def not_finite(in_updates, function):
    """`function`, which gives a tensor of an update, but with NaN in these updates, counted from 1
    over the whole run; an update has one micro-batch."""
    calls = itertools.count(1)

    def spoiled(*args):
        value = function(*args)
        return value * math.nan if next(calls) in in_updates else value

    return spoiled


def numbers(state):
    """Every number of the weights and of the optimizer."""
    found = list(state["weights"].values())
    for moments in state["optimizer"]["state"].values():
        found += moments.values()
    return torch.cat([part.flatten() for part in found])


def test_an_update_that_is_not_finite_is_skipped(start, tmp_path, monkeypatch):
    """Here its gradient of one of the weights, in the test below its loss."""
    add_lora = ddpo.add_lora
    hook = not_finite([2], lambda gradient: gradient)

    def add(*args):
        weights = add_lora(*args)
        weights[0].register_hook(hook)
        return weights

    monkeypatch.setattr(ddpo, "add_lora", add)
    run = tmp_path / "run"
    ddpo.main(start(run, epochs=1))
    first = state_of(run)
    ddpo.main(["--resume", str(run), "--epochs", "2"])
    second = state_of(run)
    assert [row["skipped"] for row in read_metrics(run)] == ["", "1", "0"]
    assert [state["optimizer"]["state"][0]["step"] for state in (first, second)] == [1, 3]
    assert numbers(first).isfinite().all() and numbers(second).isfinite().all()
    for name, weights in first["weights"].items():  # it has gone on learning
        assert (weights != second["weights"][name]).any()


def test_nan_for_ever_stops_the_run(start, runs, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    loss = not_finite(range(5, 1000), ddpo.clipped_loss)  # the first two epochs are good
    monkeypatch.setattr(ddpo, "clipped_loss", loss)
    line = failure(capsys, *start(run, epochs=9))
    assert "no update of 3 epochs was finite" in line and "--lr" in line
    assert how_to_go_on(line) == ["--resume", str(run)]
    assert [row["skipped"] for row in read_metrics(run)] == ["", "0", "0", "2", "2", "2"]
    for part in ("weights", "optimizer"):
        assert plain(state_of(run)[part]) == plain(state_of(runs[2])[part])
    assert contents(run)[LORA] == contents(runs[2])[LORA]


def test_out_of_gpu_memory(start, tmp_path, capsys, monkeypatch):
    def greedy(*args):
        advice = "More advice on a second line."
        raise torch.cuda.OutOfMemoryError(f"CUDA out of memory. Tried 20.00 GiB.\n{advice}")

    monkeypatch.setattr(ddpo.Policy, "predict", greedy)
    line = failure(capsys, *start(tmp_path / "run"))
    assert "CUDA out of memory. Tried 20.00 GiB.; lower --sample-batch and --micro-batch" in line
    assert "go on with: python ddpo.py --resume " in line and "\n" not in line
