"""Proves that examples/forward.py holds the methods that it names: at the weights that sampled,
their gradients are the advantage times that of diffusers' own denoising loss; away from them each
is its paper's. And that one update learns from the pairs that it should, and learns."""

import json
import math
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import flags, make_policy, read_metrics, save_tiny_pipeline, small_run
from diffusers import DDPMScheduler

import ddpo

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import forward

PREDICTIONS = ["epsilon", "v_prediction", "sample"]


# ---------------------------------------------------- each method's formula


def test_rwr_weights_are_the_softmax_with_mean_1():
    adv = torch.tensor([-3.0, 0.5, 2.0, 0.5])
    exps = [math.exp(0.2 * a) for a in adv.tolist()]
    expected = torch.tensor([4 * e / sum(exps) for e in exps])
    torch.testing.assert_close(forward.rwr_weights(adv, 0.2, 1.0), expected)
    far = forward.rwr_weights(adv - 1e4, 0.2, 1.0)
    torch.testing.assert_close(far, expected, rtol=1e-3, atol=0)  # no overflow
    assert forward.rwr_weights(adv, 0.0, 1.0).tolist() == [1, 1, 1, 1]


def test_sparse_weights_keep_the_best_tenth_and_what_equals_it():
    adv = torch.randperm(40, generator=torch.Generator().manual_seed(0)).float()
    weights = forward.rwr_weights(adv, 0.0, 0.1)
    assert adv[weights > 0].sort().values.tolist() == [36, 37, 38, 39]
    torch.testing.assert_close(weights[weights > 0], torch.full((4,), 10.0))
    tied = torch.tensor([0.0, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    torch.testing.assert_close(forward.rwr_weights(tied, 0.0, 0.1), tied * 10 / 3)
    alike = forward.rwr_weights(torch.full((7,), 0.3), 0.0, 0.1)
    torch.testing.assert_close(alike, torch.ones(7))


def vectors(count):
    return torch.randn(count, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0))


def gradient(loss, pred, *args):
    pred = pred.clone().requires_grad_()
    return torch.autograd.grad(loss(pred, *args).sum(), pred)[0]


def test_nft_at_no_advantage_is_a_spring_to_old():
    """5 beta mean (theta - old)^2, over the mean size of the error. These vectors are such that
    both halves of the loss have errors of the same size, which makes that exact."""
    beta, sigma, none = 0.4, torch.tensor([0.7]), torch.zeros(1)
    off, step, target = vectors(3)
    off = torch.cat([off, off], 1)
    step = torch.cat([step, -step], 1)
    target = torch.cat([target, target], 1)
    old = target + off
    assert not gradient(forward.nft_loss, old, old, target, none, sigma, beta).any()
    size = (off + beta * step).abs().mean()
    grad = gradient(forward.nft_loss, old + step, old, target, none, sigma, beta)
    spring = gradient(lambda pred: 5 * beta * ((pred - old) ** 2).mean(), old + step)
    torch.testing.assert_close(grad, spring * sigma / size)


def test_nft_goes_along_the_error_as_far_as_1_over_beta():
    """In that direction there is no spring, for an error divided by its own size does not change.
    Instead theta is stopped at the target, or where its opposite is there, if the image is bad."""
    old, target = vectors(2)
    beta = 0.5

    def slope(along, adv):
        pred = old + along * (old - target)
        adv = torch.tensor([adv])
        grad = gradient(forward.nft_loss, pred, old, target, adv, torch.ones(1), beta)
        return (grad * (old - target)).sum().item()

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


# ---------------------------------------------------- against plain diffusers


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A policy for each kind of prediction, with guidance."""
    policies = {}
    for kind in PREDICTIONS:
        model = save_tiny_pipeline(tmp_path_factory.mktemp(kind), prediction_type=kind)
        policies[kind], _ = make_policy(model, guidance_scale=3.0)
        policies[kind].encode(["cat", "bee", "dog", "ant", "cow", "fox"])
    return policies


@pytest.fixture(params=PREDICTIONS)
def any_policy(request, loaded):
    return loaded[request.param]


@pytest.fixture
def policy(loaded):
    return loaded["epsilon"]


def make_run(policy, method, **own):
    """A Run whose steps are plain gradient descent, with a rate of 1."""
    base = {"images_per_epoch": 6, "updates_per_epoch": 1, "grad_clip": 1e9, "weight_decay": 0.0}
    run = ddpo.Run(forward.ForwardSettings(**{**base, **own}, method=method), policy)
    run.optimizer = torch.optim.SGD(policy.weights, lr=1.0)
    return run


ADV = [2.0, -1.0, 0.5, 0.5, -3.0, 1.0]


def make_samples(policy, adv=ADV, cond=range(3, 9)):
    """As ddpo.train hands them to an update, of another prompt each; of the trajectories only the
    ends are to be read."""
    x = torch.full((len(adv), 3, *policy.latent_shape), math.nan)
    x[:, -1] = torch.randn(x[:, -1].shape, generator=torch.Generator().manual_seed(1))
    return x, None, torch.tensor(cond), torch.tensor(adv)


def update(run, samples):
    """The step that an update takes from the weights, and its metrics; the weights are put back."""
    weights = run.policy.weights
    before = [w.detach().clone() for w in weights]
    out = forward.forward_update(run, samples, torch.Generator().manual_seed(0))
    step = torch.cat([(b - w).detach().flatten() for b, w in zip(before, weights)])
    for weight, old in zip(weights, before):
        weight.data.copy_(old)
    return step, out


def gradient_of(loss, policy):
    grads = torch.autograd.grad(loss, policy.weights, retain_graph=True)
    return torch.cat([g.flatten() for g in grads])


def plain_diffusers(policy, x_0, noise, t, cond):
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
    with_prompt = output([policy.prompts[i] for i in cond])
    pred = without + 3.0 * (with_prompt - without)
    return x_t, pred, targets[scheduler.config.prediction_type]


def test_at_the_old_weights_gradients_are_the_advantage_times_that_of_the_error(any_policy):
    """For one pair, whatever the model predicts; the factors are those of the papers' formulas."""
    policy = any_policy
    x_0, noise = torch.randn(2, 1, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    t, cond = torch.tensor([600]), torch.tensor([3])
    x_t, pred, target = plain_diffusers(policy, x_0, noise, t, cond)
    error = ((pred - target) ** 2).mean()
    plain = gradient_of(error, policy)
    sigma = (1 - policy.pipe.scheduler.alphas_cumprod[600]).sqrt().item()
    factors = {
        "awm": 0.6 * error.item() ** -0.75 / 5,
        "nft": sigma / (pred - target).abs().mean().item(),
        "pepg": 0.1,
    }
    for method, factor in factors.items():
        for adv in (2.0, -3.0):
            settings = forward.ForwardSettings(method=method, beta=0.3)
            pair = (x_t, t, cond, target, torch.tensor([adv]), pred.detach())
            grad = gradient_of(forward.pair_loss(policy, settings, *pair).sum(), policy)
            cosine = torch.cosine_similarity(grad, plain, 0).item()
            assert cosine == pytest.approx(math.copysign(1, adv), abs=1e-5), method
            assert (grad.norm() / plain.norm()).item() == pytest.approx(abs(adv) * factor, rel=1e-3)


def spy(policy, monkeypatch):
    """A growing list of what the network is given: (x_t, t, cond)."""
    seen = []
    predict = policy.predict

    def spied(*given):
        seen.append(given)
        return predict(*given)

    monkeypatch.setattr(policy, "predict", spied)
    return seen


def noise_in(x_t, x_0, t, policy):
    abar = policy.pipe.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    return (x_t - abar.sqrt() * x_0) / (1 - abar).sqrt()


def test_it_learns_from_the_denoising_error_of_the_finished_images(any_policy, monkeypatch):
    """Of RWR with equal weights, the loss is its mean over K pairs of each image."""
    policy = any_policy
    samples = make_samples(policy)
    seen = spy(policy, monkeypatch)
    run = make_run(policy, "rwr", noise_levels=2, inverse_temperature=0.0)
    step, out = update(run, samples)
    x_t, t, cond = map(torch.cat, zip(*seen))
    assert cond.sort().values.tolist() == [3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8]
    x_0 = samples[0][cond - 3, -1]
    noise = noise_in(x_t, x_0, t, policy)
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    same, pred, target = plain_diffusers(policy, x_0, noise, t, cond)
    torch.testing.assert_close(same, x_t)
    error = ((pred - target) ** 2).mean()
    assert out["loss"] == pytest.approx(error.item(), rel=1e-4)
    expected = gradient_of(error, policy)
    assert (step - expected).norm() < 1e-3 * expected.norm()


# ---------------------------------------------------- one update


def test_the_images_of_a_group_share_noise_and_stratified_times(policy, monkeypatch):
    """With x_0 = 0 what the network sees is the noise, as large as its time says."""
    x, _, _, adv = make_samples(policy)
    samples = (0 * x.nan_to_num(), None, torch.tensor([3, 3, 3, 3, 4, 4]), adv)
    seen = spy(policy, monkeypatch)
    for group in (1, 2):
        seen.clear()
        own = {"noise_levels": 3, "inverse_temperature": 0.0, "samples_per_prompt": group}
        update(make_run(policy, "rwr", **own), samples)
        x_t, t, cond = map(torch.cat, zip(*seen))
        assert (t * 3 // 1000).sort().values.tolist() == [0] * 6 + [1] * 6 + [2] * 6
        assert len(x_t.flatten(1).unique(dim=0)) == len(t.unique()) == 18 // group
        assert len(t[cond == 3].unique()) == 12 // group  # two groups of one prompt do not share


def test_times_cover_the_range_of_training(policy, monkeypatch):
    count = 20_000
    samples = (torch.zeros(count, 1, 1, 1, 1), None, torch.ones(count), torch.zeros(count))
    times = []

    def predict(x_t, t, cond):
        times.append(t)
        return x_t * policy.weights[0].sum()

    monkeypatch.setattr(policy, "predict", predict)
    monkeypatch.setattr(policy, "micro_batch", 100_000)
    update(make_run(policy, "rwr", noise_levels=3, inverse_temperature=0.0), samples)
    found = torch.cat(times).bincount()
    assert len(found) == 1000 and found.sum() == 3 * count
    assert (found - 60).abs().max() < 5 * 60**0.5


@pytest.mark.parametrize("method", ["rwr", "awm", "nft", "pepg"])
def test_the_gradient_is_the_mean_over_all_pairs(method, policy, monkeypatch):
    """However it is added up; with advantages less their mean, or RWR's weights; and with a penalty
    on what the LoRA changes."""
    ref_coef = 0.5 if method == "nft" else 0.0
    samples = make_samples(policy)
    seen = spy(policy, monkeypatch)
    own = {"noise_levels": 3, "beta": 0.5, "ref_coef": ref_coef}
    run = make_run(policy, method, **own)
    step, out = update(run, samples)
    x_t, t, cond = [column[:18] for column in map(torch.cat, zip(*seen))]
    adv = samples[3] - samples[3].mean()
    if method == "rwr":
        adv = 6 * adv.softmax(0)
    target = noise_in(x_t, samples[0][cond - 3, -1], t, policy)
    pairs = (x_t, t, cond, target, adv[cond - 3])
    with torch.no_grad():
        old = policy.predict(*pairs[:3])
        with ddpo.without_lora():
            ref = policy.predict(*pairs[:3])
    settings = replace(run.settings, ref_coef=0.0)
    loss = forward.pair_loss(policy, settings, *pairs, old).mean()
    loss = loss + ref_coef * ((policy.predict(*pairs[:3]) - ref) ** 2).mean()
    expected = gradient_of(loss, policy)
    assert (step - expected).norm() < 1e-3 * expected.norm()
    assert out["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-5)
    assert out["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-3)
    assert out["skipped"] == 0

    # Two minibatches, none of which takes a step: each has its own mean.
    def no_step():
        steps.append(torch.cat([w.grad.flatten() for w in policy.weights]))
        run.optimizer.zero_grad()
        return 0.0

    monkeypatch.setattr(policy, "micro_batch", 18)
    steps = []
    run = make_run(policy, method, **own, updates_per_epoch=2)
    monkeypatch.setattr(run, "step", no_step)
    update(run, samples)
    assert (sum(steps) / 2 - expected).norm() < 1e-3 * expected.norm() and len(steps) == 2


@pytest.mark.parametrize("method", ["awm", "nft", "pepg"])
def test_old_is_what_sampled_in_all_updates_of_an_epoch(method, policy, monkeypatch):
    """Each image is in one of the minibatches, with all its pairs."""
    monkeypatch.setattr(policy, "micro_batch", 8)
    pair_loss = forward.pair_loss
    seen = []

    def spied(policy, settings, *pairs):
        with torch.no_grad():
            now = policy.predict(*pairs[:3])
        seen.append((*pairs, now))
        return pair_loss(policy, settings, *pairs)

    monkeypatch.setattr(forward, "pair_loss", spied)
    run = make_run(policy, method, updates_per_epoch=3)
    run.optimizer = torch.optim.Adam(policy.weights, lr=0.1)
    update(run, make_samples(policy))
    counts = torch.stack([cond.bincount(minlength=9)[3:] for _, _, cond, *_ in seen])
    assert counts.sort(0).values.tolist() == [[0] * 6, [0] * 6, [4] * 6]
    assert counts[0, :2].tolist() != [4, 4]  # they are shuffled
    for n, (x_t, t, cond, _, _, old, now) in enumerate(seen):
        with torch.no_grad():
            sampled = policy.predict(x_t, t, cond)
        torch.testing.assert_close(old, sampled, rtol=1e-4, atol=1e-4)
        assert torch.allclose(old, now, rtol=1e-4, atol=1e-4) == (n == 0)


@pytest.mark.parametrize("method", ["awm", "nft", "pepg"])
def test_rewards_that_are_all_alike_teach_nothing(method, policy):
    """Even if the prompts' memory, whose mean may lag behind, calls them all good."""
    run = make_run(policy, method, updates_per_epoch=2)
    step, _ = update(run, make_samples(policy))
    nothing, _ = update(run, make_samples(policy, [1.5] * 6))
    assert nothing.norm() < 1e-4 * step.norm()


def test_images_without_weight_have_no_influence_and_no_cost(policy, monkeypatch):
    samples = make_samples(policy)
    run = make_run(policy, "rwr", keep=0.3, updates_per_epoch=2)
    seen = spy(policy, monkeypatch)
    step, _ = update(run, samples)
    assert sum(len(t) for _, t, _ in seen) == 2 * run.settings.noise_levels
    samples[0][[1, 2, 3, 4]] = math.nan  # all but the two best
    again, _ = update(run, samples)
    assert torch.equal(step, again) and step.any()


def test_updates_that_are_not_finite_are_skipped(policy):
    for method in ("rwr", "nft"):
        x, *rest = make_samples(policy)
        step, out = update(make_run(policy, method, updates_per_epoch=2), (x * math.nan, *rest))
        assert out["skipped"] == 2 and not step.any()


# ---------------------------------------------------- runs


@pytest.mark.parametrize("method", ["awm", "nft", "pepg"])
def test_it_learns(method, tmp_path, monkeypatch):
    """The model of test_train.test_it_learns. Over seeds 0 to 3 the mean reward rose by 2.3 to 6.2
    (AWM), 1.3 to 4.4 (NFT) and 2.4 to 4.0 (PEPG) standard deviations of the first rewards; by
    chance alone it would change by 0.2."""

    def brightness(images, prompts):
        return images.mean((1, 2, 3))

    monkeypatch.setattr(ddpo, "save_pictures", lambda *args: None)
    schedule = {"num_train_timesteps": 20, "beta_start": 0.2, "beta_end": 0.5}
    model = save_tiny_pipeline(tmp_path / "model", prediction_type="sample", **schedule)
    batches = {"images_per_epoch": 64, "sample_batch": 64, "micro_batch": 128, "noise_levels": 2}
    how = {"epochs": 4, "guidance_scale": 1.0, "lr": 0.06, "out": str(tmp_path / "run")}
    own = {"method": method, "beta": 0.03}
    settings = forward.ForwardSettings(**small_run(model, **batches, **how, **own))
    run = ddpo.launch(settings, reward=brightness, update=forward.forward_update)
    _, first, *_, last = read_metrics(run)
    gain = float(last["reward_mean"]) - float(first["reward_mean"])
    assert gain > float(first["reward_std"])


def command(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["forward.py", *map(str, argv)])
    runpy.run_path(forward.__file__, run_name="__main__")


def test_the_command_line_takes_its_flags_and_those_of_ddpo(tiny_model, tmp_path, monkeypatch):
    argv = flags(tiny_model, out=tmp_path / "run", epochs=1)
    command(monkeypatch, *argv, "--method", "pepg", "--noise-levels", "2")
    config = json.loads((tmp_path / "run/config.json").read_text())
    own = {name: config[name] for name in forward.ForwardSettings.__annotations__}
    assert own == {"method": "pepg", "noise_levels": 2, "beta": 1.0, "inverse_temperature": 1.0,
                   "keep": 1.0, "ref_coef": 0.0}  # fmt: skip
    assert config["images_per_epoch"] == 8
    _, row = read_metrics(tmp_path / "run")
    assert float(row["grad_norm"]) > 0 and row["ratio_error"] == ""


@pytest.mark.parametrize("argv, message", [
    ("--method ppo", "method: rwr, awm, nft, pepg"),
    ("--beta 0", "beta: more than 0"),
    ("--keep 1.5", "keep: at most 1"),
    ("--noise-levels 0", "noise_levels must be at least 1"),
    ("--kl-coef 0.1", "kl_coef does nothing here"),
    ("--ref-coef 0.1 --lora-rank 0", "ref_coef does, and needs a LoRA"),
    ("--beta wide", "--beta: invalid float value: 'wide'"),
    ("--meth rwr", "unrecognized arguments: --meth rwr"),
])  # fmt: skip
def test_a_mistake_is_one_line(argv, message, tiny_model, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, "--model", tiny_model, *argv.split())
    said = capsys.readouterr().err
    if isinstance(end.value.code, str):
        said += end.value.code
    (line,) = said.splitlines()
    assert end.value.code and message in line
