"""Proves that examples/compare.py compares DDPO with a true reward-weighted regression: its weights are those of the paper, its
loss is diffusers' own, and it learns; and that the comparison goes on where it stopped and repeats nothing."""

import argparse
import csv
import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_policy, save_tiny_pipeline
from diffusers import DDPMScheduler
from test_train import flags

import ddpo
import rewards

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import compare


def read_rows(run):
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


# ---------------------------------------------------------------- weights


def test_rwr_weights_are_the_softmax_with_mean_1():
    reward = torch.tensor([-3.0, 0.5, 2.0, 0.5])
    exps = [math.exp(0.2 * r) for r in reward.tolist()]
    expected = torch.tensor([4 * e / sum(exps) for e in exps])
    torch.testing.assert_close(compare.rwr_weights(reward, 0.2), expected)
    torch.testing.assert_close(compare.rwr_weights(reward - 1e4, 0.2), expected, rtol=1e-3, atol=0)  # no overflow
    assert compare.rwr_weights(reward, 0.0).tolist() == [1, 1, 1, 1]


def test_sparse_weights_keep_the_best_tenth_and_what_equals_it():
    reward = torch.randperm(40, generator=torch.Generator().manual_seed(0)).float()
    weights = compare.sparse_weights(reward, 0.1)
    assert reward[weights > 0].sort().values.tolist() == [36, 37, 38, 39]
    torch.testing.assert_close(weights[weights > 0], torch.full((4,), 10.0))
    tied = torch.tensor([0.0, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    torch.testing.assert_close(compare.sparse_weights(tied, 0.1), tied * 10 / 3)
    assert compare.sparse_weights(torch.full((7,), 0.3), 0.1).tolist() == [1] * 7


def test_the_best_recognisable_reward_is_that_of_three_epochs():
    rows = [{"queries": 0, "eval_reward": 0.5}]
    scores = [0.9, 0.9, 0.8, 0.7, 0.6, 0.5]
    rows += [{"queries": 64 * n, "reward_mean": n, compare.CLIP: score} for n, score in enumerate(scores, 1)]
    assert compare.best_recognisable(rows) == (3, 256)  # epochs 2 to 4, with 0.8 on average
    assert np.isnan(compare.best_recognisable(rows[:3])).all()  # two epochs
    assert np.isnan(compare.best_recognisable([rows[0], *rows[4:]])).all()  # none is recognisable
    seeds = [[{**row, "eval_reward": e} for row in rows] for e in (1, 2)]
    assert compare.cells(seeds, -1, -1) == ["1.500 ± 0.707", "0.500 ± 0.000", "3.000 ± 0.000", "256 ± 0"]
    assert compare.cells([rows[:3]], 0, -1) == ["0.500", "0.900", "-", "-"]


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_denoising_loss_is_that_of_plain_diffusers(prediction, guidance, tmp_path):
    model = save_tiny_pipeline(tmp_path / "model", prediction_type=prediction)
    policy, _ = make_policy(model, guidance_scale=guidance)
    torch.manual_seed(0)
    prompts, t = ["cat", "a bee", "cat", "dog"], torch.tensor([0, 300, 700, 999])
    x_0, noise = torch.randn(2, 4, *policy.latent_shape)
    loss = compare.denoising_loss(policy, x_0, noise, t, policy.encode(prompts))

    scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")  # another class than the policy's
    x_t = scheduler.add_noise(x_0, noise, t)
    target = {"epsilon": noise, "v_prediction": scheduler.get_velocity(x_0, noise, t), "sample": x_0}[prediction]
    abar = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    torch.testing.assert_close(x_t, abar.sqrt() * x_0 + (1 - abar).sqrt() * noise)

    def output(texts):
        tokens = policy.pipe.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
        return policy.unet(x_t, t, encoder_hidden_states=policy.pipe.text_encoder(tokens)[0]).sample

    out = output(prompts)
    if guidance > 1:
        without = output([""] * 4)
        out = without + guidance * (out - without)
    torch.testing.assert_close(loss, (out - target).square().flatten(1).mean(1), rtol=1e-4, atol=1e-5)
    assert loss.requires_grad and loss.std() > 1e-3  # one for each image, not their mean


def make_run(model, objective, **settings):
    """A Run of RWR and samples as ddpo.train hands them to an update: 30 images with advantages that differ."""
    policy, base = make_policy(model, images_per_epoch=30, **settings)
    settings = compare.RWRSettings(**{**dataclasses.asdict(base), "objective": objective}, inverse_temperature=1.0)
    torch.manual_seed(1)
    x, adv = torch.randn(30, 3, *policy.latent_shape), torch.randn(30)
    return ddpo.Run(settings, policy), (x, None, policy.encode(["cat", "dog", "bee"] * 10), adv)


@pytest.mark.parametrize("objective", ["rwr", "rwr-sparse"])
def test_the_expected_loss_is_the_weighted_mean_over_all_images(objective, tiny_model, monkeypatch):
    """Each image's denoising loss is replaced by a number that comes from its latent and its prompt. 20,000 draws leave an
    error of about 1 %."""
    run, (x, _, cond, adv) = make_run(tiny_model, objective, micro_batch=20_000)
    x[:, -1] = (torch.rand(30) + cond).view(-1, 1, 1, 1)
    trained = run.policy.weights[0]
    monkeypatch.setattr(compare, "denoising_loss", lambda policy, x_0, noise, t, cond: x_0[:, 0, 0, 0] * cond + 0 * trained.sum())
    out = compare.rwr_update(run, (x, None, cond, adv), torch.Generator().manual_seed(0))
    weights = compare.rwr_weights(adv, 1.0) if objective == "rwr" else (adv >= adv.sort().values[-3]) * 10.0
    losses = x[:, -1, 0, 0, 0] * cond
    assert out["loss"] == pytest.approx((weights * losses).mean().item(), rel=0.03)
    assert abs(out["loss"] / losses.mean().item() - 1) > 0.06  # the unweighted mean would not have passed


def test_images_without_weight_have_no_influence(tiny_model):
    """Nor have the earlier latents of those with weight: the loss is on the final ones."""
    results = []
    for spoilt in (False, True):
        run, (x, _, cond, adv) = make_run(tiny_model, "rwr-sparse", updates_per_epoch=3, lr=0.01)
        before = [w.clone() for w in run.policy.weights]
        if spoilt:
            x[adv < adv.sort().values[-3]] = x[:, :-1] = math.nan
        out = compare.rwr_update(run, (x, None, cond, adv), torch.Generator().manual_seed(0))
        assert out["skipped"] == 0 and not any(torch.equal(w, b) for w, b in zip(run.policy.weights, before))
        results.append(run.policy.weights)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_updates_that_are_not_finite_are_skipped(tiny_model):
    run, (x, _, cond, adv) = make_run(tiny_model, "rwr", updates_per_epoch=2)
    before = [w.clone() for w in run.policy.weights]
    out = compare.rwr_update(run, (x * math.nan, None, cond, adv), torch.Generator().manual_seed(0))
    assert out["skipped"] == 2 and all(torch.equal(w, b) for w, b in zip(run.policy.weights, before))


# ---------------------------------------------------------------- rewards and runs


def train_on_brightness(model, out, **settings):
    """The rows of a run that rewards brightness, as numbers."""
    batches = {"epochs": 4, "images_per_epoch": 64, "sample_batch": 64, "micro_batch": 64, "updates_per_epoch": 4}
    given = flags(model, out=out, reward="brightness", **batches, lr=0.03, guidance_scale=1, eval_images=30, eval_every=9)
    compare.run_one(compare.RWRSettings(**{**dataclasses.asdict(ddpo.parse(given)[0]), "objective": "rwr", **settings}))
    return compare.read(ddpo.Settings(out=str(out)))


def test_rwr_learns(tmp_path, monkeypatch):
    """On the model of test_train.test_it_learns, which is random: at first it is fitted to its own images, all with the same
    weight, until that hardly changes it. After that, on the same prompts and noise, the mean reward rose over seeds 0 to 3 by
    0.7 to 0.9 (rwr) and 0.7 to 1.3 (rwr-sparse) standard deviations of the first rewards; by 0.2 to 0.3 with equal weights."""
    monkeypatch.setitem(rewards.REWARDS, "brightness", lambda images, prompts: images.mean((1, 2, 3)))
    schedule = {"num_train_timesteps": 20, "beta_start": 0.2, "beta_end": 0.5, "prediction_type": "sample"}
    model = save_tiny_pipeline(tmp_path / "model", **schedule)
    train_on_brightness(model, tmp_path / "start", inverse_temperature=0.0)
    lora = str(tmp_path / "start/pytorch_lora_weights.safetensors")
    for objective in ("rwr", "rwr-sparse"):
        own = {"objective": objective, "inverse_temperature": 2.0, "init_lora": lora}
        before, first, *_, last = train_on_brightness(model, tmp_path / objective, **own)
        assert last["eval_reward"] - before["eval_reward"] > 0.5 * first["reward_std"], objective


@pytest.fixture
def command(tiny_model, tmp_path, monkeypatch):
    """A function that runs compare.py on a tiny budget; its argument is the folder of the runs."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(compare, "REWARDS", {"compressibility": {"reward": "compressibility", "eval_images": 4}})
    tiny = {"images_per_epoch": 16, "micro_batch": 16, "sample_batch": 16}

    def command(name, *more):
        compare.main(["--seeds", "0", "--runs", str(tmp_path / name), *flags(tiny_model, **tiny), *more])

    return command


def test_the_methods_differ_in_nothing_else():
    """Equal reward queries and sampling for every method; and every run has its own folder."""
    args = argparse.Namespace(seeds=[0, 1], rewards=list(compare.REWARDS), runs="runs/compare", quick=False)
    todo = compare.plan(args, ["--epochs", "7"])
    assert len({settings.out for *_, settings in todo}) == len(todo) == 2 * (len(compare.REWARDS) * 4 + 1)
    assert all(settings.seed == seed for _, _, seed, settings in todo) and {seed for _, _, seed, _ in todo} == {0, 1}
    for name in compare.REWARDS:
        of_reward = [dataclasses.asdict(settings) for reward, *_, settings in todo if reward == name]
        varied = {k for k in of_reward[0] if len({str(settings[k]) for settings in of_reward}) > 1}
        own = {"out", "seed", "objective", "updates_per_epoch", "lr", "inverse_temperature"}
        assert varied <= own | {"keep"} and of_reward[0]["epochs"] == 7
        parsed = [rewards.find_reward(n, a) for _, n, a in rewards.parse_mix(of_reward[0]["reward"])]
        assert len(parsed) == 1
    assert (ddpo.EXAMPLES.parent / compare.CLIP[len("clipscore(") : -1] / "config.json").is_file()


def test_one_command_compares_all(command, tmp_path, capsys, monkeypatch):
    command("runs")
    runs = {method: tmp_path / "runs/compressibility" / f"{method}-0" for method in compare.METHODS}
    rows = {method: read_rows(run) for method, run in runs.items()}
    assert all([row["queries"] for row in r] == ["0", "16", "32"] for r in rows.values())
    assert len({r[0]["eval_reward"] for r in rows.values()}) == 1  # all start from the same model, prompts and noise
    assert len({r[1]["reward_mean"] for r in rows.values()}) == 1 and len({r[1]["loss"] for r in rows.values()}) == 5
    configs = [json.loads((run / "config.json").read_text()) for run in runs.values()]
    assert [config["objective"] for config in configs] == ["clipped", "reinforce", "rwr", "rwr-sparse", "rwr"]

    table = (tmp_path / "runs/compare.md").read_text()
    assert (tmp_path / "runs/compare.png").stat().st_size > 10_000 and table in capsys.readouterr().out
    ends = {"pretrained": rows["RWR"][0], **{method: r[-1] for method, r in rows.items()}}
    lines = [f"| compressibility | {m} | {float(row['eval_reward']):.3f} | - | - | - |" for m, row in ends.items()]
    assert table.splitlines()[2:] == lines

    import plot

    assert len(plot.groups(list(runs.values()))) == 5 and "reward_mean" in plot.read(runs["RWR"])[1]

    monkeypatch.setattr(ddpo, "launch", None)  # would fail if anything was run again
    command("runs")
    assert "0 of 5 runs to go" in capsys.readouterr().out and (tmp_path / "runs/compare.md").read_text() == table
    with pytest.raises(SystemExit, match="DDPO-IS-0 was run with another lr"):
        command("runs", "--lr", "0.02")

    (runs["RWR"] / "state_00002.pt").unlink()
    monkeypatch.setattr(compare, "run_one", lambda settings: None)
    command("runs")
    line = (tmp_path / "runs/compare.md").read_text().splitlines()[5]
    assert line == "| compressibility | RWR | - | - | - | - |"  # for only finished runs count


def test_a_stopped_comparison_goes_on(command, tmp_path, monkeypatch):
    """Stopped in the second epoch of RWR: it ends like one that was not, and what had ended is not run again."""
    monkeypatch.setattr(compare, "report", lambda todo, folder: None)
    monkeypatch.setattr(compare, "METHODS", {name: compare.METHODS[name] for name in ("DDPO-SF", "RWR")})
    command("whole")
    launch, calls = ddpo.launch, []

    def watched(settings, folder, state):
        calls.append((folder.name, state and state.name))
        with monkeypatch.context() as context:
            if len(calls) == 2:
                context.setattr(ddpo, "write_metrics", stop_at_epoch_2)
            launch(settings, folder, state)

    def stop_at_epoch_2(log, folder, write=ddpo.write_metrics):
        if log[-1]["epoch"] == 2:
            raise KeyboardInterrupt
        write(log, folder)

    monkeypatch.setattr(ddpo, "launch", watched)
    with pytest.raises(SystemExit, match="^compare.py: stopped; the same command goes on$"):
        command("runs")
    command("runs")
    assert calls == [("DDPO-SF-0", None), ("RWR-0", None), ("RWR-0", "state_00001.pt")]
    for method in ("DDPO-SF", "RWR"):
        one, other = (read_rows(tmp_path / name / "compressibility" / f"{method}-0") for name in ("runs", "whole"))
        assert one == other
