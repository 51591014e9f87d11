"""Proves that the KL to the pretrained model is torch.distributions', 0 before the first update and
estimated without bias, with its error; that the penalty is its gradient; that the limit ends a
run."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from conftest import (
    BRIGHTNESS,
    PROMPTS,
    TINIEST,
    failure,
    flags,
    flat,
    launch,
    lora_bytes,
    make_policy,
    must_not_sample,
    read_metrics,
    sampled,
    save_tiny_pipeline,
    tiny_unet,
    update_by_sgd,
)
from torch.distributions import Independent, Normal, kl_divergence

import ddpo


@pytest.fixture(scope="module")
def pretrained(tiniest_model):
    """A second copy of the model, whose LoRA is 0: the reference, without the switch."""
    return make_policy(tiniest_model, lora_scale=0.0)[0]


def exact_kl(policy, pretrained, samples):
    """The KL of all steps that are random, (N, steps), by torch.distributions."""
    x = samples.x
    kl = []
    for j, t in enumerate(policy.scheduler.timesteps):
        t = t.expand(len(x))
        gaussians = []
        for network in (policy, pretrained):
            output = network.predict(x[:, j], t, network.encode(samples.prompts))
            mean, std = policy.mean_std(output, t, x[:, j])
            gaussians.append((mean, std.expand_as(mean)))
        if std.min() > 0:
            ours, theirs = (Independent(Normal(*gaussian), 3) for gaussian in gaussians)
            kl.append(kl_divergence(ours, theirs))
    return torch.stack(kl, 1)


# ---------------------------------------------------- the closed form, the estimate


@torch.no_grad()
@pytest.mark.parametrize("config", [{}, {"prediction_type": "v_prediction"}, {"clip_sample": True}])
def test_kl_of_a_step_is_that_of_torch_distributions(tiniest_model, pretrained, config):
    policy, _ = make_policy(tiniest_model, lora_scale=2.0)
    policy.scheduler.register_to_config(**config)
    samples = sampled(policy)
    i, j = torch.cartesian_prod(torch.arange(6), torch.arange(4)).unbind(1)
    x_t, t, cond = samples.x[i, j], policy.scheduler.timesteps[j], samples.cond[i]
    ours = ddpo.kl_to_pretrained(policy, policy.predict(x_t, t, cond), x_t, t, cond).view(6, 4)
    exact = exact_kl(policy, pretrained, samples)
    torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-5)
    assert ours.min() > 0.01


def test_the_lora_is_on_again_afterwards(tiniest_model):
    policy, _ = make_policy(tiniest_model, steps=2)
    samples = sampled(policy)
    x_t = samples.x[:, 0]
    t = policy.scheduler.timesteps[:1].expand(6)
    before = policy.predict(x_t, t, samples.cond)
    ddpo.measure_kl(policy, samples)
    assert torch.equal(policy.predict(x_t, t, samples.cond), before)
    ddpo.kl_to_pretrained(policy, before, x_t, t, samples.cond).sum().backward()
    assert torch.equal(policy.predict(x_t, t, samples.cond), before)
    assert all(p.grad.abs().max() > 0 for p in policy.weights)


@torch.no_grad()
def test_the_estimate_is_unbiased_and_counts_the_trained_steps(pretrained, tmp_path):
    """It takes every fourth image, one of each group, and its steps that are learned from: 2 of 4,
    of which the last is deterministic. A step's log-ratio has twice its KL as its variance."""
    unet = tiny_unet(**TINIEST)
    model = save_tiny_pipeline(tmp_path / "model", unet, set_alpha_to_one=True)
    given = {"min_std": 0.3, "images_per_epoch": 80, "batch_size": 80}
    policy, _ = make_policy(model, lora_scale=2.0, **given)
    prompts = PROMPTS[:2] * 40
    generator = torch.Generator().manual_seed(0)

    def fresh():
        return ddpo.sample(policy, BRIGHTNESS, prompts, generator, 4)

    kl = exact_kl(policy, pretrained, fresh())
    assert policy.trained_steps == [0, 1]
    assert kl.shape == (80, 3) and kl.min() > 1e-2
    exact = kl[:, :2].sum(1)
    assert kl.sum(1).mean() > 2 * exact.mean(), "all steps would give another sum"
    expected_error = ((2 * exact.mean() + exact.var()) / 20).sqrt().item()
    estimates = []
    errors = []
    for _ in range(4):
        samples = fresh()
        with mock.patch.object(ddpo, "step_logp", side_effect=ddpo.step_logp) as step_logp:
            estimate, error = ddpo.measure_kl(policy, samples)
        asked = [call.args[2].tolist() for call in step_logp.call_args_list]
        assert asked == [list(range(0, 80, 4))] * 2
        assert abs(estimate - exact.mean()) < 4 * error < exact.mean()
        estimates.append(estimate.item())
        errors.append(error.item())
    with mock.patch.object(ddpo, "step_logp", side_effect=ddpo.step_logp) as step_logp:
        ddpo.measure_kl(policy, replace(samples, alike=10))  # one of each, of larger groups too
    asked = [call.args[2].tolist() for call in step_logp.call_args_list]
    assert asked == [list(range(0, 80, 10))] * 2
    assert sum(errors) / 4 == pytest.approx(expected_error, rel=0.4)
    mean = sum(estimates) / 4  # with the error of a single sample of all 80
    assert abs(mean - exact.mean()) < 4 * expected_error / 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kl_is_exactly_0_before_the_first_update(precision, tiniest_model, tmp_path):
    rows = launch(tiniest_model, tmp_path / "run", precision=precision, images_per_epoch=4)
    assert float(rows[1]["kl"]) == float(rows[1]["kl_error"]) == 0
    assert 0 < abs(float(rows[2]["kl"])) < float("inf")


def test_without_a_lora_there_is_no_kl(tiniest_model, tmp_path, capsys):
    for option in ("kl_coef", "kl_stop"):
        argv = flags(tiniest_model, out=tmp_path / "run", lora_rank=0, **{option: 0.1})
        message = failure(capsys, *argv)
        assert "lora_rank 0" in message and "--" + option.replace("_", "-") in message
        assert not (tmp_path / "run").exists()
    rows = launch(tiniest_model, tmp_path / "run", epochs=1, lora_rank=0)
    assert rows[1]["kl"] == ""


# ---------------------------------------------------- the penalty


@pytest.mark.parametrize("objective", ["clipped", "reinforce"])
def test_the_penalty_has_the_gradient_of_the_kl(objective, tiniest_model, pretrained):
    """Where no image is better than another, the whole update is that of the penalty, on the steps
    that are trained on."""
    given = {"steps": 5, "min_std": 0.3, "objective": objective, "kl_coef": 0.3}
    policy, settings = make_policy(tiniest_model, **given)
    samples = sampled(policy, 0.0)
    kl = exact_kl(policy, pretrained, samples)[:, policy.trained_steps]
    assert kl.shape == (6, 3)
    penalty = 0.3 * kl.mean() / (4 * 8 * 8)
    expected = flat(torch.autograd.grad(penalty, policy.weights))
    # At a high rate, so that nothing is rounded away.
    metrics, moved = update_by_sgd(policy, settings, samples, lr=1000.0)
    assert (moved / 1000 - expected).norm() < 1e-3 * expected.norm()
    assert metrics["loss"] == pytest.approx(penalty.item(), rel=1e-3)


# ---------------------------------------------------- the limit


def test_the_limit_ends_a_run_that_stays_ended(tiniest_model, tmp_path, monkeypatch, capsys):
    """Against the same run without a limit, and one with a limit that is not reached: all is the
    same up to the epoch that is too far, which learns nothing more. The result is the last policy
    that was measured within the limit: that of epoch 2, which epoch 1 made."""
    given = {"eval_every": 9, "eval_images": 1}
    free = launch(tiniest_model, tmp_path / "free", epochs=3, **given)
    one = launch(tiniest_model, tmp_path / "one", epochs=1, kl_stop=1e6, **given)
    assert one[0] == free[0] and one[1] == {**free[1], "eval_reward": one[1]["eval_reward"]}
    kl = [float(row["kl"]) for row in free[1:]]
    assert kl[2] > 1.2 * kl[1] > 0
    out = tmp_path / "stopped"
    stopped = launch(tiniest_model, out, epochs=4, kl_stop=(kl[1] + kl[2]) / 2, **given)
    assert f"stopped after epoch 3 of 4: {kl[2]:.1f} +- " in capsys.readouterr().out
    assert len(stopped) == 4
    assert stopped[:3] == free[:3]
    for column in ("queries", "reward_mean", "reward_std", "kl", "kl_error"):
        assert stopped[3][column] == free[3][column]
    assert stopped[3]["loss"] == stopped[3]["grad_norm"] == "" and free[3]["loss"] != ""
    assert lora_bytes(out) == lora_bytes(tmp_path / "one") != lora_bytes(tmp_path / "free")
    last = (out / "samples/epoch_0003.png").read_bytes()
    assert last == (tmp_path / "one/samples/epoch_0001.png").read_bytes()

    with monkeypatch.context() as patch:
        must_not_sample(patch)
        ddpo.main(["--resume", str(out)])
    assert len(read_metrics(out)) == 4
    ddpo.main(["--resume", str(out), "--kl-stop", "0"])
    assert [row["epoch"] for row in read_metrics(out)] == list("01234")
    assert lora_bytes(out) != lora_bytes(tmp_path / "one")
