"""Proves that examples/forward.py holds the methods that it names: at the weights that sampled,
their gradients are the advantage times that of diffusers' own denoising loss; away from them each
is its paper's. And that one update learns from the pairs that it should, and learns."""

import itertools
import json
import math
import runpy
import sys
from dataclasses import replace
from unittest import mock

import pytest
import torch
from conftest import flags, flat, make_policy, read_metrics, save_tiny_pipeline, small_run
from diffusers import DDPMScheduler

import ddpo

sys.path.insert(0, str(ddpo.EXAMPLES))
import forward

AT_OLD = ["awm", "nft", "pepg"]  # the methods that look back at the network that sampled


@pytest.mark.parametrize("adv, inverse_temperature, keep, weights", [
    ([-3.0, 0.5, 2.0, 0.5], 0.0, 1.0, [1.0, 1.0, 1.0, 1.0]),
    ([0.0, 1.0, -1e4, 1.0], math.log(2), 1.0, [0.8, 1.6, 0.0, 1.6]),  # no overflow
    ([5.0, *range(-18, 0), 9.0], 0.0, 0.1, [10.0, *[0.0] * 18, 10.0]),  # the best two of 20
    ([0.0, 1, 1, 1, 0, 0, 0, 0, 0, 0], 0.0, 0.1, [0, *[10 / 3] * 3, 0, 0, 0, 0, 0, 0]),  # as good
])  # fmt: skip
def test_rwr_weights_are_the_softmax_of_the_best_with_mean_1(
    adv, inverse_temperature, keep, weights
):
    found = forward.rwr_weights(torch.tensor(adv), inverse_temperature, keep)
    torch.testing.assert_close(found, torch.tensor(weights))


def vectors(count):
    return torch.randn(count, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0))


def gradient(loss, pred, *args):
    pred = pred.clone().requires_grad_()
    return torch.autograd.grad(loss(pred, *args).sum(), pred)[0]


def test_nft_at_no_advantage_is_a_spring_to_old():
    """5 beta mean (theta - old)^2, over the mean size of the error. These vectors are such that
    both halves of the loss have errors of the same size, which makes that exact."""
    off, step, target = vectors(3)
    off = torch.cat([off, off], 1)
    step = torch.cat([step, -step], 1)
    old = off + torch.cat([target, target], 1)
    how = (old, old - off, torch.zeros(1), torch.tensor([0.7]), 0.4)  # sigma, beta
    assert not gradient(forward.nft_loss, old, *how).any()
    grad = gradient(forward.nft_loss, old + step, *how)
    spring = gradient(lambda pred: 5 * 0.4 * ((pred - old) ** 2).mean(), old + step)
    torch.testing.assert_close(grad, spring * 0.7 / (off + 0.4 * step).abs().mean())


def test_nft_goes_along_the_error_as_far_as_1_over_beta():
    """There is no spring, for an error divided by its own size does not change. Theta is stopped at
    the target, or where its opposite is there, if the image is bad."""
    old, target = vectors(2)

    def slope(along, adv):
        pred = old + along * (old - target)
        how = (old, target, torch.tensor([adv]), torch.ones(1), 0.5)
        return (gradient(forward.nft_loss, pred, *how) * (old - target)).sum().item()

    assert slope(0.9, 0.0) == pytest.approx(0, abs=1e-5)
    start = slope(0.0, 2.0)
    for along in (-1.9, 1.9):
        assert slope(along, 2.0) == pytest.approx(start, rel=1e-4)
        assert slope(along, -2.0) == pytest.approx(-start, rel=1e-4)
    assert slope(-2.1, 2.0) < 0 < start and slope(2.1, -2.0) > 0


def test_pepg_has_a_kl_to_old():
    """With d as the log-ratio, the mean of exp(d) (A - d) over old's images is the reward less
    KL(theta || old); that of the other exp(d) is 1, whatever theta is."""
    old, pred, target = vectors(3)

    def objective(pred):
        d = ((old - target) ** 2).mean() - ((pred - target) ** 2).mean()
        return -(d.exp() * (0.2 - d) + d.exp())

    grad = gradient(forward.pepg_loss, pred, old, target, torch.tensor([2.0]))
    torch.testing.assert_close(grad, gradient(objective, pred))


def test_awm_has_the_ratio_of_its_own_likelihood():
    old, pred, target = vectors(3)
    time = torch.tensor([0.3])

    def logp(pred):
        error = ((pred - target) ** 2).mean()
        return -time * ((error + 1e-10) ** 0.25 - 1e-10**0.25) / 0.25

    loss = forward.awm_loss(pred, old, target, torch.tensor([-2.0]), time)
    torch.testing.assert_close(loss, 2 / 5 * (logp(pred) - logp(old)).exp())


KINDS = ["epsilon", "v_prediction", "sample"]
NAMES = ["cat", "bee", "dog", "ant", "cow", "fox"]
ADV = torch.tensor([2.0, -1.0, 0.5, 0.5, -3.0, 1.0])


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A policy for each kind of prediction, with guidance."""
    policies = {}
    for kind in KINDS:
        model = save_tiny_pipeline(tmp_path_factory.mktemp(kind), prediction_type=kind)
        policies[kind], _ = make_policy(model, guidance_scale=3.0)
        policies[kind].encode(NAMES)  # so that their rows follow each other
    return policies


@pytest.fixture(params=["epsilon"])  # of most; others ask for all of KINDS
def policy(request, loaded, monkeypatch):
    monkeypatch.setattr(ddpo, "GRAD_CLIP", 1e9)
    return loaded[request.param]


def make_run(policy, method, **own):
    """A Run whose steps are plain gradient descent, with a rate of 1."""
    own = {"images_per_epoch": 6, "updates_per_epoch": 1, "samples_per_prompt": 1, **own}
    run = ddpo.Run(forward.ForwardSettings(method=method, **own), policy)
    run.optimizer = torch.optim.SGD(policy.weights, lr=1.0)
    return run


def make_samples(policy, adv=ADV, prompts=NAMES):
    """As ddpo.train hands them to an update; of the trajectories only the ends are to be read."""
    x = torch.full((len(adv), 3, *policy.latent_shape), math.nan)
    x[:, -1] = torch.randn(x[:, -1].shape, generator=torch.Generator().manual_seed(1))
    return ddpo.Samples(prompts, policy.encode(prompts), x, None, None, adv)


def update(run, samples):
    """The step that an update takes from the weights, and its metrics; the weights are put back."""
    before = flat(run.policy.weights)
    out = forward.forward_update(run, samples, torch.Generator().manual_seed(0))
    step = before - flat(run.policy.weights)
    torch.nn.utils.vector_to_parameters(before, run.policy.weights)
    return step, out


def gradient_of(loss, policy):
    return flat(torch.autograd.grad(loss, policy.weights, retain_graph=True))


def close(step, expected):
    return (step - expected).norm() < 1e-3 * expected.norm()


def plain_diffusers(policy, x_0, noise, t, prompts):
    """x_t, the prediction with guidance and its target, without a line of ours."""
    scheduler = DDPMScheduler.from_config(policy.pipe.scheduler.config)  # not the policy's
    x_t = scheduler.add_noise(x_0, noise, t)
    velocity = scheduler.get_velocity(x_0, noise, t)
    targets = {"epsilon": noise, "v_prediction": velocity, "sample": x_0}

    def output(texts):
        tokens = policy.pipe.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
        context = policy.pipe.text_encoder(tokens)[0]
        return policy.unet(x_t, t, encoder_hidden_states=context).sample

    without = output([""] * len(t))
    pred = without + 3.0 * (output(prompts) - without)
    return x_t, pred, targets[scheduler.config.prediction_type]


@pytest.mark.parametrize("policy", KINDS, indirect=True)
def test_at_the_old_weights_gradients_are_the_advantage_times_that_of_the_error(policy):
    """For one pair, whatever the model predicts; the factors are those of the papers' formulas."""
    x_0, noise = torch.randn(2, 1, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([600])
    x_t, pred, target = plain_diffusers(policy, x_0, noise, t, ["bee"])
    error = ((pred - target) ** 2).mean()
    plain = gradient_of(error, policy)
    sigma = (1 - policy.pipe.scheduler.alphas_cumprod[600]).sqrt()
    factors = {"awm": 0.6 * error.detach() ** -0.75 / 5, "pepg": 0.1,
               "nft": sigma / (pred - target).detach().abs().mean()}  # fmt: skip
    for (method, factor), adv in itertools.product(factors.items(), (2.0, -3.0)):
        settings = forward.ForwardSettings(method=method, beta=0.3)
        pair = (x_t, t, policy.encode(["bee"]), target, torch.tensor([adv]), pred.detach())
        grad = gradient_of(forward.pair_loss(policy, settings, *pair).sum(), policy)
        assert close(grad, adv * factor * plain), (method, adv)


@pytest.fixture
def network():
    """A spy on what any policy's network is given."""
    predict = ddpo.Policy.predict
    with mock.patch.object(ddpo.Policy, "predict", autospec=True, side_effect=predict) as network:
        yield network


def seen(network):
    """All x_t, t and cond."""
    return map(torch.cat, zip(*(call.args[1:] for call in network.call_args_list)))


def noise_in(x_t, x_0, t, policy):
    abar = policy.pipe.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    return (x_t - abar.sqrt() * x_0) / (1 - abar).sqrt()


@pytest.mark.parametrize("policy", KINDS, indirect=True)
def test_it_learns_from_the_denoising_error_of_the_finished_images(policy, network):
    """Of RWR with equal weights, the loss is its mean over K pairs of each image."""
    samples = make_samples(policy)
    run = make_run(policy, "rwr", noise_levels=2, inverse_temperature=0.0)
    step, out = update(run, samples)
    x_t, t, cond = seen(network)
    image = cond - samples.cond[0]  # their prompts are encoded one after another
    assert image.sort().values.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    noise = noise_in(x_t, samples.x[image, -1], t, policy)
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    prompts = [NAMES[i] for i in image]
    same, pred, target = plain_diffusers(policy, samples.x[image, -1], noise, t, prompts)
    torch.testing.assert_close(same, x_t)
    error = ((pred - target) ** 2).mean()
    assert float(out["loss"]) == pytest.approx(error.item(), rel=1e-4)
    assert close(step, gradient_of(error, policy))


def test_times_are_stratified_and_cover_the_range_of_training():
    times = forward.draw_times(18_000, 3, 900, torch.Generator().manual_seed(0))
    assert (times // 300 == torch.tensor([0, 1, 2])).all()
    counts = times.flatten().bincount()
    assert len(counts) == 900 and (counts - 60).abs().max() < 5 * 60**0.5


@pytest.mark.parametrize("group", [1, 2])
def test_the_images_of_a_group_share_noise_and_times(group, policy, network):
    """With x_0 = 0 what the network sees is the noise, as large as its time says."""
    samples = make_samples(policy, prompts=["cat"] * 4 + ["bee"] * 2)
    samples.x = torch.zeros_like(samples.x)
    own = {"noise_levels": 3, "inverse_temperature": 0.0, "samples_per_prompt": group}
    update(make_run(policy, "rwr", **own), samples)
    x_t, t, cond = seen(network)
    assert len(t) == 18
    assert len(x_t.flatten(1).unique(dim=0)) == len(t.unique()) == 18 // group
    two_groups = cond == samples.cond[0]  # of one prompt: they do not share
    assert len(t[two_groups].unique()) == 12 // group


@pytest.mark.parametrize("method", ["rwr", *AT_OLD])
def test_the_gradient_is_the_mean_over_all_pairs(method, policy, network, monkeypatch):
    """However it is added up; with advantages less their mean, or RWR's weights; and with a penalty
    on what the LoRA changes."""
    samples = make_samples(policy)
    own = {"noise_levels": 3, "beta": 0.5, "ref_coef": 0.5 if method == "awm" else 0.0}
    run = make_run(policy, method, **own)
    step, out = update(run, samples)
    x_t, t, cond = [column[:18] for column in seen(network)]
    image = cond - samples.cond[0]
    adv = 6 * samples.adv.softmax(0) if method == "rwr" else samples.adv - samples.adv.mean()
    target = noise_in(x_t, samples.x[image, -1], t, policy)
    with torch.no_grad():
        old = policy.predict(x_t, t, cond)
        with ddpo.without_lora():
            ref = policy.predict(x_t, t, cond)
    settings = replace(run.settings, ref_coef=0.0)
    loss = forward.pair_loss(policy, settings, x_t, t, cond, target, adv[image], old).mean()
    loss = loss + own["ref_coef"] * ((policy.predict(x_t, t, cond) - ref) ** 2).mean()
    expected = gradient_of(loss, policy)
    assert close(step, expected) and out["skipped"] == 0
    assert float(out["loss"]) == pytest.approx(loss.item(), rel=1e-4, abs=1e-5)
    assert out["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-3)
    if method in ("nft", "pepg"):  # if all are alike, though an old memory calls them good
        nothing, _ = update(run, make_samples(policy, torch.full((6,), 1.5)))
        assert nothing.norm() < 1e-4 * step.norm()

    # Two minibatches, none of which takes a step: each has its own mean, and they add up.
    monkeypatch.setattr(policy, "batch_size", 18)
    run = make_run(policy, method, **own, updates_per_epoch=2)
    monkeypatch.setattr(run, "step", lambda: 0.0)
    update(run, samples)
    assert close(torch.cat([w.grad.flatten() for w in policy.weights]) / 2, expected)
    run.optimizer.zero_grad()


@pytest.mark.parametrize("method", AT_OLD)
def test_old_is_what_sampled_in_all_updates_of_an_epoch(method, policy):
    run = make_run(policy, method, updates_per_epoch=3)
    run.optimizer = torch.optim.Adam(policy.weights, lr=0.1)
    samples = make_samples(policy)
    with mock.patch.object(forward, "pair_loss", side_effect=forward.pair_loss) as pair_loss:
        step, _ = update(run, samples)
    conds = [call.args[4] for call in pair_loss.call_args_list]
    assert set(conds[0].tolist()) != set(samples.cond[:2].tolist())  # they are shuffled
    assert torch.cat(conds).bincount()[samples.cond].tolist() == [4] * 6 and step.norm() > 1
    for call in pair_loss.call_args_list:
        _, _, x_t, t, cond, _, _, old = call.args
        with torch.no_grad():
            torch.testing.assert_close(old, policy.predict(x_t, t, cond), rtol=1e-4, atol=1e-4)


def test_images_without_weight_have_no_influence_and_no_cost(policy, network):
    """And updates that are not finite are left out, and counted."""
    samples = make_samples(policy)
    run = make_run(policy, "rwr", keep=0.3, updates_per_epoch=2)
    step, out = update(run, samples)
    _, t, _ = seen(network)
    assert len(t) == 2 * run.settings.noise_levels and step.any() and out["skipped"] == 0
    samples.x[[1, 2, 3, 4]] = math.nan  # all but the two best
    assert torch.equal(step, update(run, samples)[0])
    samples.x *= math.nan
    step, out = update(run, samples)
    assert out["skipped"] == 2 and not step.any()


def brightness(images, prompts):
    return images.mean((1, 2, 3))


@pytest.mark.parametrize("method", AT_OLD)
def test_it_learns(method, tmp_path, monkeypatch):
    """The model of test_train.test_it_learns. By chance alone the mean reward would change by 0.2
    of its standard deviation."""
    monkeypatch.setattr(ddpo, "save_pictures", lambda *args: None)
    schedule = {"num_train_timesteps": 20, "beta_start": 0.2, "beta_end": 0.5}
    model = save_tiny_pipeline(tmp_path / "model", prediction_type="sample", **schedule)
    how = {"epochs": 4, "guidance_scale": 1.0, "lr": 0.06, "out": tmp_path / "run"}
    own = {"method": method, "beta": 0.03, "noise_levels": 2}
    how = small_run(model, images_per_epoch=32, batch_size=64, eval_images=1, **how)
    settings = forward.ForwardSettings(**how, **own)
    run = ddpo.launch(settings, None, brightness, forward.forward_update)
    _, first, *_, last = read_metrics(run)
    gain = float(last["reward_mean"]) - float(first["reward_mean"])
    assert gain > float(first["reward_std"])


def command(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["forward.py", *argv])
    runpy.run_path(forward.__file__, run_name="__main__")


def test_the_command_line_takes_its_flags_and_those_of_ddpo(tiniest_model, tmp_path, monkeypatch):
    argv = flags(tiniest_model, out=tmp_path / "run", epochs=1)
    command(monkeypatch, *argv, "--method", "pepg", "--noise-levels", "2")
    config = json.loads((tmp_path / "run/config.json").read_text())
    own = {"method": "pepg", "noise_levels": 2, "beta": 1.0, "ref_coef": 0.0, "lr": 0.01}
    assert config | own == config and config["made_with"]["update"] == "forward_update"
    _, row = read_metrics(tmp_path / "run")
    assert float(row["grad_norm"]) > 0 and row["ratio_error"] == ""


@pytest.mark.parametrize("argv, message", [
    ("--method ppo", "method: rwr, awm, nft, pepg"),
    ("--beta 0", "beta must be finite and at least 1e-06"),
    ("--keep 1.5", "keep: at most 1"),
    ("--kl-coef 0.1", "kl_coef does nothing here"),
    ("--ref-coef 0.1 --lora-rank 0", "ref_coef does, and needs a LoRA"),
    ("--meth rwr", "unrecognized arguments: --meth rwr"),
])  # fmt: skip
def test_a_mistake_is_one_line(argv, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, *argv.split(), "--kl-stop", "0", "--lr", "0")
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code in (1, 2) and message in line
