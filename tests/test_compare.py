"""Proves that examples/compare.py compares DDPO with a true reward-weighted regression: its weights
are those of the paper, its loss is diffusers' own, and it learns; and that the comparison goes on
where it stopped and repeats nothing."""

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import flags, make_policy, read_metrics, save_tiny_pipeline, small_run
from diffusers import DDPMScheduler

import ddpo
import rewards

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import compare

# ---------------------------------------------------- weights


def test_rwr_weights_are_the_softmax_with_mean_1():
    adv = torch.tensor([-3.0, 0.5, 2.0, 0.5])
    exps = [math.exp(0.2 * a) for a in adv.tolist()]
    expected = torch.tensor([4 * e / sum(exps) for e in exps])
    torch.testing.assert_close(compare.rwr_weights(adv, 0.2, 1.0), expected)
    far = compare.rwr_weights(adv - 1e4, 0.2, 1.0)
    torch.testing.assert_close(far, expected, rtol=1e-3, atol=0)  # no overflow
    assert compare.rwr_weights(adv, 0.0, 1.0).tolist() == [1, 1, 1, 1]


def test_sparse_weights_keep_the_best_tenth_and_what_equals_it():
    adv = torch.randperm(40, generator=torch.Generator().manual_seed(0)).float()
    weights = compare.rwr_weights(adv, 0.0, 0.1)
    assert adv[weights > 0].sort().values.tolist() == [36, 37, 38, 39]
    torch.testing.assert_close(weights[weights > 0], torch.full((4,), 10.0))
    tied = torch.tensor([0.0, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    torch.testing.assert_close(compare.rwr_weights(tied, 0.0, 0.1), tied * 10 / 3)
    alike = compare.rwr_weights(torch.full((7,), 0.3), 0.0, 0.1)
    torch.testing.assert_close(alike, torch.ones(7))


def test_the_best_recognisable_reward_is_that_of_three_epochs():
    start = {"queries": 0, "eval_reward": 0.5}
    epochs = []
    for n, score in enumerate([0.9, 0.9, 0.8, 0.7, 0.6, 0.5], 1):
        epochs.append({"queries": 64 * n, "reward_mean": n, compare.CLIP: score})
    rows = [start, *epochs]
    assert compare.best_recognisable(rows) == (3, 256)  # epochs 2 to 4, with 0.8 on average
    assert np.isnan(compare.best_recognisable(rows[:3])).all()  # two epochs
    assert np.isnan(compare.best_recognisable([start, *epochs[3:]])).all()  # none recognisable
    seeds = [[{**row, "eval_reward": end} for row in rows] for end in (1, 2)]
    expected = ["1.500 ± 0.707", "0.500 ± 0.000", "3.000 ± 0.000", "256 ± 0"]
    assert compare.cells(seeds, -1, -1) == expected
    assert compare.cells([rows[:3]], 0, -1) == ["0.500", "0.900", "-", "-"]


# ---------------------------------------------------- the loss


@pytest.mark.parametrize("prediction, guidance", [
    ("epsilon", 1.0),
    ("epsilon", 3.0),
    ("v_prediction", 3.0),
    ("sample", 3.0),
])  # fmt: skip
def test_denoising_loss_is_that_of_plain_diffusers(prediction, guidance, tmp_path):
    model = save_tiny_pipeline(tmp_path / "model", prediction_type=prediction)
    policy, _ = make_policy(model, guidance_scale=guidance)
    torch.manual_seed(0)
    prompts = ["cat", "a bee", "cat", "dog"]
    t = torch.tensor([0, 300, 700, 999])
    x_0, noise = torch.randn(2, 4, *policy.latent_shape)
    loss = compare.denoising_loss(policy, x_0, noise, t, policy.encode(prompts))

    scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")  # not the policy's
    x_t = scheduler.add_noise(x_0, noise, t)
    velocity = scheduler.get_velocity(x_0, noise, t)
    target = {"epsilon": noise, "v_prediction": velocity, "sample": x_0}[prediction]
    abar = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    torch.testing.assert_close(x_t, abar.sqrt() * x_0 + (1 - abar).sqrt() * noise)

    def output(texts):
        tokens = policy.pipe.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
        context = policy.pipe.text_encoder(tokens)[0]
        return policy.unet(x_t, t, encoder_hidden_states=context).sample

    out = output(prompts)
    if guidance > 1:
        without = output([""] * 4)
        out = without + guidance * (out - without)
    expected = (out - target).square().flatten(1).mean(1)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert loss.requires_grad and loss.std() > 1e-3  # one for each image, not their mean


KINDS = {"rwr": {"inverse_temperature": 1.0}, "sparse": {"keep": 0.1}}


def make_run(model, kind, **settings):
    """A Run of RWR, and samples as ddpo.train hands them to an update: 30 images with advantages
    that differ."""
    policy, base = make_policy(model, images_per_epoch=30, **settings)
    settings = compare.RWRSettings(**dataclasses.asdict(base), **KINDS[kind])
    torch.manual_seed(1)
    x = torch.randn(30, 3, *policy.latent_shape)
    adv = torch.randn(30)
    cond = policy.encode(["cat", "dog", "bee"] * 10)
    return ddpo.Run(settings, policy), (x, None, cond, adv)


def best_tenth(adv):
    return adv >= adv.sort().values[-3]


@pytest.mark.parametrize("kind", KINDS)
def test_the_expected_loss_is_the_weighted_mean_over_all_images(kind, tiny_model, monkeypatch):
    """Each image's denoising loss is replaced by a number that comes from its latent and its
    prompt. 20,000 draws leave an error of about 1 %."""
    run, (x, _, cond, adv) = make_run(tiny_model, kind, micro_batch=20_000)
    x[:, -1] = (torch.rand(30) + cond).view(-1, 1, 1, 1)
    trained = run.policy.weights[0]

    def replaced(policy, x_0, noise, t, cond):
        return x_0[:, 0, 0, 0] * cond + 0 * trained.sum()

    monkeypatch.setattr(compare, "denoising_loss", replaced)
    out = compare.rwr_update(run, (x, None, cond, adv), torch.Generator().manual_seed(0))
    weights = 30 * adv.exp() / adv.exp().sum() if kind == "rwr" else 10.0 * best_tenth(adv)
    losses = x[:, -1, 0, 0, 0] * cond
    assert out["loss"] == pytest.approx((weights * losses).mean().item(), rel=0.03)
    assert abs(out["loss"] / losses.mean().item() - 1) > 0.06  # unweighted, it would not pass


def test_images_without_weight_have_no_influence(tiny_model):
    """Nor have the earlier latents of those with weight: the loss is on the final ones."""
    results = []
    for spoilt in (False, True):
        run, (x, _, cond, adv) = make_run(tiny_model, "sparse", updates_per_epoch=3, lr=0.01)
        before = [w.clone() for w in run.policy.weights]
        if spoilt:
            x[~best_tenth(adv)] = x[:, :-1] = math.nan
        out = compare.rwr_update(run, (x, None, cond, adv), torch.Generator().manual_seed(0))
        assert out["skipped"] == 0
        assert not any(torch.equal(w, b) for w, b in zip(run.policy.weights, before))
        results.append(run.policy.weights)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_updates_that_are_not_finite_are_skipped(tiny_model):
    run, (x, _, cond, adv) = make_run(tiny_model, "rwr", updates_per_epoch=2)
    before = [w.clone() for w in run.policy.weights]
    samples = (x * math.nan, None, cond, adv)
    out = compare.rwr_update(run, samples, torch.Generator().manual_seed(0))
    assert out["skipped"] == 2
    assert all(torch.equal(w, b) for w, b in zip(run.policy.weights, before))


# ---------------------------------------------------- rewards and runs


def train_on_brightness(model, out, epochs, **own):
    """The rows of a run that rewards brightness, as numbers."""
    batches = {"images_per_epoch": 64, "sample_batch": 64, "micro_batch": 32}
    how = {"epochs": epochs, "updates_per_epoch": 4, "lr": 0.03, "steps": 3, "guidance_scale": 1}
    how |= {"eval_images": 30, "eval_every": 9, "reward": "brightness", "out": str(out)}
    settings = compare.RWRSettings(**small_run(model, **batches, **how), **own)
    compare.run_one(settings)
    return compare.read(settings)


def test_rwr_learns(tmp_path, monkeypatch):
    """On a model like that of test_train.test_it_learns, which is random: at first it is fitted to
    its own images, all with the same weight, until that hardly changes it. After that, on the same
    prompts and noise, the mean reward rose over seeds 0 to 3 by 0.6 to 1.0 (RWR) and 0.7 to 1.9
    (RWR-sparse) standard deviations of the first rewards; by 0.1 to 0.3 with equal weights."""
    monkeypatch.setitem(rewards.REWARDS, "brightness", lambda images, _: images.mean((1, 2, 3)))
    monkeypatch.setattr(ddpo, "save_pictures", lambda *args: None)  # as slow as all the rest
    schedule = {"num_train_timesteps": 20, "beta_start": 0.2, "beta_end": 0.5}
    model = save_tiny_pipeline(tmp_path / "model", prediction_type="sample", **schedule)
    train_on_brightness(model, tmp_path / "start", 2)
    lora = str(tmp_path / "start/pytorch_lora_weights.safetensors")
    for name, own in {"rwr": {"inverse_temperature": 2.0}, "sparse": {"keep": 0.1}}.items():
        rows = train_on_brightness(model, tmp_path / name, 4, init_lora=lora, **own)
        gain = rows[-1]["eval_reward"] - rows[0]["eval_reward"]
        assert gain > 0.5 * rows[1]["reward_std"], name


@pytest.fixture
def command(tiny_model, tmp_path, monkeypatch):
    """A function that runs compare.py on a tiny budget; its argument is the folder of the runs."""
    pytest.importorskip("matplotlib")
    tiny = {"compressibility": {"reward": "compressibility", "eval_images": 4}}
    monkeypatch.setattr(compare, "REWARDS", tiny)
    monkeypatch.setattr(ddpo, "save_pictures", lambda *args: None)
    batches = {"images_per_epoch": 8, "micro_batch": 8, "sample_batch": 8, "steps": 2}

    def command(name, *more):
        given = ["--seeds", "0", "--runs", str(tmp_path / name)]
        compare.main([*given, *flags(tiny_model, **batches), *more])

    return command


def test_the_methods_differ_in_nothing_else():
    """Equal reward queries and sampling for every method; and every run has its own folder."""
    names = list(compare.REWARDS)
    args = argparse.Namespace(seeds=[0, 1], rewards=names, runs="runs/compare", quick=False)
    todo = compare.plan(args, ["--epochs", "7"])
    runs = 2 * (len(names) * 4 + 1)
    assert len(todo) == runs == len({settings.out for *_, settings in todo})
    assert all(settings.seed == seed for _, _, seed, settings in todo)
    assert {seed for _, _, seed, _ in todo} == {0, 1}
    own = {"out", "seed", "objective", "updates_per_epoch", "lr", "inverse_temperature", "keep"}
    for name in names:
        settings = [vars(settings) for reward, *_, settings in todo if reward == name]
        known = {k for s in settings for k in s}
        varied = {k for k in known if len({str(s.get(k)) for s in settings}) > 1}
        assert varied == own and settings[0]["epochs"] == 7


def test_its_rewards_are_there(monkeypatch):
    monkeypatch.chdir(ddpo.EXAMPLES.parent)
    for name, settings in compare.REWARDS.items():
        terms = rewards.load_rewards(settings["reward"], settings.get("monitor", ""))
        assert [label for label, _, _ in terms] in ([compare.CLIP], [name, compare.CLIP])


def test_one_command_compares_all(command, tmp_path, capsys, monkeypatch):
    command("runs", "--epochs", "1")
    runs = {m: tmp_path / "runs/compressibility" / f"{m}-0" for m in compare.METHODS}
    rows = {method: read_metrics(run) for method, run in runs.items()}
    assert all([row["queries"] for row in r] == ["0", "8"] for r in rows.values())
    # All start from the same model, prompts and noise, and learn in their own way.
    assert len({r[0]["eval_reward"] for r in rows.values()}) == 1
    assert len({r[1]["reward_mean"] for r in rows.values()}) == 1
    assert len({r[1]["loss"] for r in rows.values()}) == 5
    configs = [json.loads((run / "config.json").read_text()) for run in runs.values()]
    assert [config["objective"] for config in configs[:2]] == ["clipped", "reinforce"]
    own = [(config.get("inverse_temperature"), config.get("keep")) for config in configs]
    assert own == [(None, None)] * 2 + [(3.0, 1.0), (0.0, 0.1), (0.0, 1.0)]

    table = (tmp_path / "runs/compare.md").read_text()
    assert (tmp_path / "runs/compare.png").stat().st_size > 10_000
    assert table in capsys.readouterr().out
    ends = {"pretrained": rows["RWR"][0], **{method: r[-1] for method, r in rows.items()}}
    ends = {method: float(row["eval_reward"]) for method, row in ends.items()}
    lines = [f"| compressibility | {m} | {end:.3f} | - | - | - |" for m, end in ends.items()]
    assert table.splitlines()[2:] == lines

    import plot

    assert len(plot.groups(list(runs.values()))) == 5

    with pytest.raises(SystemExit, match="DDPO-IS-0 was run with another lr"):
        command("runs", "--epochs", "1", "--lr", "0.02")
    with monkeypatch.context() as context:
        context.setitem(compare.METHODS["RWR-sparse"], "keep", 0.2)
        with pytest.raises(SystemExit, match="RWR-sparse-0 was run with another keep"):
            command("runs", "--epochs", "1")

    # Of a run that lacks its last epoch, that run alone is repeated, and the table waits for it.
    metrics = runs["RWR"] / "metrics.csv"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    again = []
    monkeypatch.setattr(compare, "run_one", lambda settings: again.append(settings.out))
    command("runs", "--epochs", "1")
    assert again == [str(runs["RWR"])] and "1 of 5 runs to go" in capsys.readouterr().out
    lines[3] = "| compressibility | RWR | - | - | - | - |"
    assert (tmp_path / "runs/compare.md").read_text().splitlines()[2:] == lines


def test_a_stopped_comparison_goes_on(command, tmp_path, monkeypatch):
    """Stopped in the second epoch of RWR: it ends like one that was not, and what had ended is not
    run again. ddpo.py by itself does not go on with it, for it would learn in another way."""
    monkeypatch.setattr(compare, "report", lambda todo, folder: None)
    methods = {name: compare.METHODS[name] for name in ("DDPO-SF", "RWR")}
    monkeypatch.setattr(compare, "METHODS", {"RWR": methods["RWR"]})
    command("whole")
    monkeypatch.setattr(compare, "METHODS", methods)
    folder = tmp_path / "runs/compressibility/RWR-0"
    launch = ddpo.launch
    write = ddpo.write_metrics
    launched = []

    def watched(settings, folder, update):
        launched.append((folder.name, update.__name__, (folder / "state.pt").is_file()))
        launch(settings, folder, update=update)

    def stop_at_epoch_2(log, into):
        if into == folder and log[-1]["epoch"] == 2:
            raise KeyboardInterrupt
        write(log, into)

    monkeypatch.setattr(ddpo, "launch", watched)
    with monkeypatch.context() as context:
        context.setattr(ddpo, "write_metrics", stop_at_epoch_2)
        with pytest.raises(SystemExit, match="^compare.py: stopped; the same command goes on$"):
            command("runs")
    with pytest.raises(rewards.UserError, match="inverse_temperature"):
        ddpo.parse(["--resume", str(folder)])
    command("runs")
    sf, rwr = ("DDPO-SF-0", "update"), ("RWR-0", "rwr_update")
    assert launched == [(*sf, False), (*rwr, False), (*rwr, True)]
    ends = [read_metrics(tmp_path / name / "compressibility/RWR-0") for name in ("runs", "whole")]
    one, other = [[{**row, "seconds": ""} for row in rows] for rows in ends]
    assert one == other
