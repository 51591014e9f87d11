"""Proves that examples/experiments/race.py counts what a method cost and not less, sees when a
reward was reached with the pictures intact, runs what a variant's name says, and goes on where it
stopped, counting on."""

import itertools
import pickle
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import BRIGHTNESS, draw, make_policy, read_metrics, sampled, small_run

import ddpo
import rewards

EXPERIMENTS = ddpo.EXAMPLES / "experiments"
sys.path[:0] = [str(ddpo.EXAMPLES), str(EXPERIMENTS)]
import forward  # noqa: E402
import race  # noqa: E402


def epochs(reward, named):
    """The rows of a run, of which each epoch cost 64 queries and 1000 calls."""
    rows = [{"epoch": 0, "queries": 0}]
    for n, (r, share) in enumerate(zip(reward, named, strict=True), 1):
        row = {"epoch": n, "queries": 64 * n, "calls": 1000 * n}
        rows.append({**row, "reward_mean": r, "named": share})
    return rows


@pytest.mark.parametrize("target, named, epoch, share", [
    (-2.0, [1, 1, 1, 1, 1, 1], 3, 1),  # not 2, though its own reward is above
    (-1.7, [1, 1, 1, 1, 1, 1], 4, 1),
    (-2.0, [1, 1, 0.8, 1, 1, 1], 6, 1),  # with a third epoch like that the share is 0.93
    (-2.0, [1, 1, 0.9, 1, 1, 1], 3, 2.9 / 3),  # which is enough
    (-1.7, [1, 1, 1, 0.8, 0.8, 0.8], None, None),
    (-0.5, [1, 1, 1, 1, 1, 1], None, None),
])  # fmt: skip
def test_the_cost_is_of_three_epochs_at_the_target_whose_pictures_are_named(
    target, named, epoch, share
):
    rows = epochs([-2.4, -1.8, -1.8, -1.5, -1.2, -1.0], named)
    assert race.cost(rows, target) == (epoch and (64 * epoch, 1000 * epoch, pytest.approx(share)))


@pytest.mark.parametrize("why, ends, reward, rewards, named", [
    ("reached", True, "some", [3, 3, 3], [1, 1, 1]),
    ("one target is not reached", False, "some", [1, 2, 3], [1, 1, 1]),
    ("reached, but not named", False, "some", [3, 3, 3], [0.9, 0.9, 0.9]),
    ("reached before it was spoilt", True, "some", [3, 3, 3, 3], [1, 1, 1, 0.7]),
    ("spoilt", True, "some", [0, 0, 0, 0], [1, 0.9, 0.8, 0.6]),
    ("not spoilt yet", False, "some", [0, 0, 0], [0.9, 0.8, 0.7]),
    ("two epochs are too few to tell", False, "some", [3, 0], [0, 0]),
    ("not begun", False, "some", [], []),
    ("what clipscore rewards", False, "clipscore", [0, 0, 0], [0.1, 0.1, 0.1]),
    ("spent", True, "clipscore", [0] * 8, [0.1] * 8),
])  # fmt: skip
def test_a_run_ends_once_its_targets_are_reached_its_calls_spent_or_its_pictures_spoilt(
    why, ends, reward, rewards, named, monkeypatch
):
    monkeypatch.setattr(race, "TARGETS", {"some": (2, 3), "clipscore": (2,)})
    monkeypatch.setattr(race, "CALLS", {"some": 8000, "clipscore": 8000})
    assert race.ended(epochs(rewards, named), reward) == ends, why


def test_a_cell_is_the_mean_and_spread_of_the_runs_that_reached_it():
    """And the best reward is that while the pictures were named."""
    fast = epochs([3, 3, 3], [1, 1, 1])
    slow = epochs([0, 3, 3, 3, 3], [1, 1, 1, 1, 1])
    never = epochs([0, 0, 0], [1, 1, 1])
    assert race.cell([fast], 3) == "3.0 k (192; 100%)"
    assert race.cell([fast, slow], 3) == "3.5 ± 0.7 k (224; 100%)"
    assert race.cell([fast, never, slow], 3) == "3.5 ± 0.7 k (224; 100%), 2 of 3"
    assert race.cell([never, never], 3) == "0 of 2"
    assert race.cell([], 3) == race.best([]) == ""
    spoilt = epochs([0, 3, 6, 9, 9], [1, 1, 1, 1, 0.5])
    slow = epochs([1, 1, 1], [1, 1, 1])
    never = epochs([3, 3, 3], [0.9, 0.9, 0.9])
    assert race.best([spoilt]) == race.best([spoilt, never]) == "6.00"
    assert race.best([spoilt, slow]) == "3.50 ± 3.54"
    assert race.best([never]) == ""


def test_what_the_bundled_model_draws_is_named_and_noise_is_not(monkeypatch):
    """One picture of each of five animals, under its own name and under its neighbour's; by the
    monitor as ddpo.py loads it."""
    monkeypatch.chdir(ddpo.EXAMPLES.parent)
    policy = ddpo.Policy(ddpo.Settings(steps=4, precision="fp32"), torch.device("cpu"))
    animals = "cat zebra bird lion fox".split()
    x, _ = draw(policy, animals, torch.Generator().manual_seed(0))
    monitor = race.make_settings("compressibility", "DDPO-IS", 0, "runs").monitor
    _, (label, weight, named) = rewards.load_rewards("compressibility", monitor)
    assert label == "named" and weight == 0
    images = policy.decode(x[:, -1])
    assert sum(named(images, animals)) >= 4
    assert sum(named(images, animals[1:] + animals[:1])) <= 1
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    assert sum(named(noise, animals)) <= 1


N, T, K = 4, 2, 3


def calls_counted(update, policy, settings):
    """The calls that an update says were made, sampling included. They are added to those before,
    and what the update itself returns stays."""
    run = ddpo.Run(settings, policy)
    samples = sampled(policy, torch.linspace(-1, 2, N), ["cat", "bee"] * 2)
    found = []
    for before in ({}, {"calls": 1000}):
        run.log = [before]
        metrics = race.counted(update)(run, samples, torch.Generator().manual_seed(0))
        assert metrics["grad_norm"] > 0 and metrics["skipped"] == 0
        found.append(metrics["calls"])
    assert found[1] == found[0] + 1000
    assert policy.predict == ddpo.Policy.predict.__get__(policy), "evaluations would be counted"
    return found[0]


@pytest.mark.parametrize("settings, calls", [
    ({}, N * T + N * T * 3),
    ({"updates_per_epoch": 2, "batch_size": 1}, N * T + N * T * 3),
    ({"min_std": 0.03}, N * T + N * 1 * 3),  # of which one of the two steps is learned from
    ({"kl_coef": 0.1}, N * T + N * T * (3 + 1)),
    ({"guidance_scale": 1.0}, (N * T + N * T * 3) / 2),
])  # fmt: skip
def test_ddpo_costs_a_call_for_a_step_and_three_to_learn_from_it(settings, calls, tiniest_model):
    """A backward is two calls."""
    policy, settings = make_policy(tiniest_model, steps=T, images_per_epoch=N, **settings)
    assert calls_counted(ddpo.update, policy, settings) == calls


def test_a_group_begins_with_one_call(tiniest_model):
    given = {"images_per_epoch": 8, "samples_per_prompt": 4, "batch_size": 4}
    policy, settings = make_policy(tiniest_model, steps=T, **given)
    samples = ddpo.sample(policy, BRIGHTNESS, ["cat"] * 8, torch.Generator().manual_seed(0), 4)
    samples.adv = torch.linspace(-1, 2, 8)
    run = ddpo.Run(settings, policy)
    run.log = [{}]
    metrics = race.counted(ddpo.update)(run, samples, torch.Generator().manual_seed(0))
    assert metrics["calls"] == (2 + 8 * (T - 1)) * (1 + 3)


def test_methods_of_finished_images_cost_calls_for_noise_levels(tiniest_model):
    """Three for each, and one more to know what the network was that sampled: RWR does not ask.
    Without guidance a call is half of one."""
    policy, settings = make_policy(tiniest_model, steps=T, images_per_epoch=N)

    def calls(**own):
        given = {**vars(settings), "noise_levels": K, **own}
        return calls_counted(forward.forward_update, policy, forward.ForwardSettings(**given))

    for method, each in (("nft", 4), ("awm", 4), ("pepg", 4), ("rwr", 3)):
        assert calls(method=method) == N * T + N * K * each
    policy.guidance_scale = 1.0
    assert calls(method="nft") == (N * T + N * K * 4) / 2
    assert calls(method="rwr", keep=0.5) == (N * T + N / 2 * K * 3) / 2


def test_a_variant_is_a_method_with_the_changes_it_says():
    base = vars(race.make_settings("compressibility", "DDPO-IS", 3, "runs"))
    text = 'DDPO-IS lr=0.07 min_std=0.17 save_memory=true precision="bf16"'
    settings = race.make_settings("compressibility", text, 3, "runs")
    changed = {name: value for name, value in vars(settings).items() if value != base[name]}
    assert changed.pop("out") == f"runs/compressibility/{text}/3"
    changes = {"lr": 0.07, "min_std": 0.17, "save_memory": True, "precision": "bf16"}
    assert changed == changes and settings.seed == 3
    nft = race.make_settings("incompressibility", "NFT noise_levels=3 steps=5", 0, "runs")
    assert isinstance(nft, forward.ForwardSettings) and nft.reward == "incompressibility"
    assert (nft.method, nft.noise_levels, nft.steps) == ("nft", 3, 5)


@pytest.mark.parametrize("reward", race.SETTINGS)
def test_methods_differ_in_nothing_but_their_own_settings(reward):
    """So each is sampled and scored alike, into a folder of its own; and each can be handed to
    another process."""
    runs = [race.make_settings(reward, method, 1, "runs") for method in race.METHODS]
    assert [run.out for run in runs] == [f"runs/{reward}/{method}/1" for method in race.METHODS]
    assert pickle.loads(pickle.dumps(runs)) == runs
    assert {race.reward_of(settings) for settings in runs} == {reward}
    for method, run in zip(race.METHODS, runs, strict=True):
        own = {**race.METHODS[method], **race.TUNED.get((method, reward), {})}
        assert {**vars(run), **own} == vars(run)
    own = {"out", *forward.ForwardSettings.__annotations__}
    own = own.union(*race.METHODS.values(), *race.TUNED.values())
    shared = [{name: value for name, value in vars(run).items() if name not in own} for run in runs]
    assert all(one == shared[0] for one in shared)


@pytest.mark.parametrize("variant, said", [
    ("PPO lr=1", "PPO lr=1: no method named PPO; there are DDPO-IS, "),
    ("DDPO-IS lrr=1", "DDPO-IS lrr=1 .*lrr"),
    ("DDPO-IS lr", "lr: write it as lr=0.02"),
    ("DDPO-IS lr=-1", "lr must be finite and at least 0"),
    ("DDPO-IS beta=2", ".*beta"),  # not without a word another method
    ("NFT beta=0", "beta must be finite and at least 1e-06"),
])  # fmt: skip
def test_a_mistake_in_a_variant_is_one_line_before_anything_is_run(
    variant, said, tmp_path, monkeypatch
):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(race, "run_all", lambda *args: pytest.fail("it began"))
    with pytest.raises(SystemExit, match=f"^race.py: error: {said}") as end:
        race.main(["--methods", "DDPO-IS", variant, "--runs", str(tmp_path / "runs")])
    assert "\n" not in end.value.code  # a text, which Python prints, to exit with 1
    assert not (tmp_path / "runs").exists()


class Thread(ThreadPoolExecutor):
    """In the place of a process, which would not see what a test has changed."""

    def __init__(self, jobs, context):
        assert context.get_start_method() == "spawn"
        super().__init__(jobs)


@pytest.fixture
def tiny_race(tiniest_model, tmp_path, monkeypatch):
    """A function that runs race.py, with 8 images of 2 steps an epoch, in the folder "runs"."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(race, "MONITOR", f"{race.__file__}:named")
    monkeypatch.setattr(race, "named", lambda images, prompts: [1.0] * len(prompts))
    settings = small_run(tiniest_model, reward="compressibility", eval_images=1, batch_size=8)
    monkeypatch.setattr(race, "SETTINGS", {"compressibility": settings})
    monkeypatch.setattr(race, "TARGETS", {"compressibility": (-9, 0)})  # at once, and never
    monkeypatch.setattr(race, "CALLS", {"compressibility": 190})
    monkeypatch.setattr(race, "METHODS", {"DDPO-IS": {}, "NFT": {"method": "nft"}})
    monkeypatch.setattr(race, "TUNED", {})
    monkeypatch.setattr(race, "ProcessPoolExecutor", Thread)

    def run(*more, methods=("DDPO-IS", "NFT noise_levels=2")):
        argv = ["--rewards", "compressibility", "--seeds", "0", "--methods", *methods]
        race.main([*argv, "--runs", "runs", *more])

    return run


def must_not_train(monkeypatch):
    monkeypatch.setattr(ddpo, "launch", lambda *args, **how: pytest.fail("it trained"))


def test_a_race_goes_on_where_it_was_stopped_and_repeats_nothing(tiny_race, monkeypatch, capsys):
    """Stopped in the second epoch of NFT, it ends like one that was not, calls included."""
    record = ddpo.Run.record

    def stopping(run, row):
        if "NFT" in str(run.folder) and row["epoch"] == 2:
            raise KeyboardInterrupt
        record(run, row)

    with monkeypatch.context() as patch:
        patch.setattr(ddpo.Run, "record", stopping)
        with pytest.raises(SystemExit, match="^race.py: stopped; the same command goes on$"):
            tiny_race()
    assert not Path("runs/race.md").exists()
    capsys.readouterr()
    tiny_race()
    said = capsys.readouterr().out
    assert said.startswith("runs to go: 1\n")

    runs = Path("runs/compressibility")
    rows = [read_metrics(runs / name / "0") for name in ("DDPO-IS", "NFT noise_levels=2")]
    sampling = 8 * 2
    for run, epoch in zip(rows, (sampling + 3 * 8 * 2, sampling + 4 * 8 * 2), strict=True):
        calls = [float(row["calls"]) for row in run[1:]]
        assert calls == [epoch, 2 * epoch, 3 * epoch]  # more than 190: it ends
    mean = [sum(float(row["reward_mean"]) for row in run[1:]) / 3 for run in rows]
    head = " | compressibility ".join(["| ", "-9", "0", "best |"])
    table = [head, "| --- | --- | --- | --- |",
             f"| DDPO-IS, groups of 4 | 0.2 k (24; 100%) | 0 of 1 | {mean[0]:.2f} |",
             f"| NFT noise_levels=2 | 0.2 k (24; 100%) | 0 of 1 | {mean[1]:.2f} |"]  # fmt: skip
    text = Path("runs/race.md").read_text()
    assert text.splitlines() == table and text in said
    assert Path("runs/race.png").stat().st_size > 5_000
    assert "epoch 3/1000" in (runs / "DDPO-IS/0.log").read_text()
    with pytest.raises(ddpo.UserError, match="method"):  # ddpo.py would learn in another way
        ddpo.parse(["--resume", str(runs / "NFT noise_levels=2/0"), "--monitor", ""])

    whole = race.make_settings("compressibility", "NFT noise_levels=2", 0, "whole")
    race.run_one(whole)
    one, other = [[{**row, "seconds": ""} for row in run]
                  for run in (rows[1], read_metrics(Path(whole.out)))]  # fmt: skip
    assert one == other

    monkeypatch.setattr(race, "draw", lambda *args: None)
    must_not_train(monkeypatch)
    tiny_race()
    assert capsys.readouterr().out.startswith(f"runs to go: 0\n{text}")
    race.SETTINGS["compressibility"]["lr"] = 0.02
    with pytest.raises(SystemExit, match="^race.py: error: runs.*0 was run with another lr: "):
        tiny_race()


def test_known_runs_are_not_run_even_if_their_settings_are_gone(tiny_race, monkeypatch, capsys):
    rows = [f"compressibility/NFT gone=2/0,{n},{8 * n},{100 * n},-1,1\n" for n in (1, 2, 3)]
    known = Path("known.csv")
    known.write_text(",".join(race.ROW) + "\n" + "".join(rows))
    must_not_train(monkeypatch)
    monkeypatch.setattr(race, "draw", lambda *args: None)
    tiny_race("--known", "known.csv", methods=["NFT gone=2"])
    said = capsys.readouterr().out
    assert said.startswith("runs to go: 0\n") and "| NFT gone=2 | 0.3 k (24; 100%) |" in said
    assert Path("runs/race.csv").read_text() == known.read_text()
    with pytest.raises(SystemExit, match="^race.py: error: DDPO-IS gone=2 .*gone"):
        tiny_race("--known", "known.csv", methods=["NFT gone=2", "DDPO-IS gone=2"])


def test_the_table_in_the_repository_is_of_the_rows_in_it(tmp_path):
    race.unpack(EXPERIMENTS / "race.csv", tmp_path)
    todo = []
    for reward, method, seed in itertools.product(race.SETTINGS, race.METHODS, range(5)):
        todo.append((reward, method, tmp_path / reward / method / str(seed)))
    text = race.tabulate(race.by_variant(todo), list(race.SETTINGS))
    assert text == (EXPERIMENTS / "race.md").read_text(encoding="utf-8")


def test_after_a_mistake_in_one_run_no_others_are_begun(monkeypatch):
    begun = []

    def run_one(settings):
        begun.append(settings)
        time.sleep(0.05)
        raise ddpo.UserError("it failed")

    monkeypatch.setattr(race, "ProcessPoolExecutor", Thread)
    monkeypatch.setattr(race, "run_one", run_one)
    todo = [race.make_settings("compressibility", "DDPO-IS", seed, "gone") for seed in range(9)]
    with pytest.raises(ddpo.UserError, match="it failed"):
        race.run_all(todo, 1)
    assert len(begun) < 9  # the next one may have been quicker than the word of the first
