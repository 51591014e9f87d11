"""Proves that the pipeline samples and learns as one policy: the same guidance on both sides, a
ratio of 1 before an update, a gradient that the micro-batch does not change, each (image, step)
pair learned from once, deterministic steps never."""

import pytest
import torch
from conftest import BRIGHTNESS, make_policy, save_tiny_pipeline, tiny_unet
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)

import ddpo

PROMPTS = ["cat", "dog", "bee", "cat", "horse", "ant"]
ADV = torch.tensor([1.0, -0.5, 0.3, -2.0, 0.7, 0.0])


def sampled(policy, settings):
    """What `update` learns from."""
    generator = torch.Generator(policy.device).manual_seed(0)
    x, logp_old, _ = ddpo.sample(policy, BRIGHTNESS, PROMPTS, settings.sample_batch, generator)
    return x, logp_old, policy.encode(PROMPTS), ADV.to(policy.device)


def flat(weights):
    return torch.cat([p.detach().flatten() for p in weights])


def run_update(policy, settings, samples, lr=0.01):
    """One `update` by plain gradient descent; its metrics and by how much the weights moved."""
    before = flat(policy.weights)
    run = ddpo.Run(settings, policy)
    run.optimizer = torch.optim.SGD(policy.weights, lr)
    metrics = ddpo.update(run, samples, torch.Generator().manual_seed(0))
    return metrics, before - flat(policy.weights)


# ---------------------------------------------------- the ratio


no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
A_TENTH = 1.6384 / 256 / 10  # of the default clip range


@pytest.mark.parametrize(
    "device, precision, guidance, allowed",
    [
        ("cpu", "fp32", 1.0, 1e-6),
        ("cpu", "fp32", 5.0, 1e-6),
        ("cpu", "bf16", 5.0, 2e-4),
        ("cpu", "fp16", 5.0, A_TENTH),
        pytest.param("cuda", "fp32", 5.0, A_TENTH, marks=no_gpu),
        pytest.param("cuda", "bf16", 5.0, A_TENTH, marks=no_gpu),
        pytest.param("cuda", "fp16", 5.0, A_TENTH, marks=no_gpu),
    ],
)
def test_ratio_is_one_before_an_update(tiniest_model, device, precision, guidance, allowed):
    """Sampled in batches of 4 and 2 images, learned in batches of 5 pairs: only rounding may
    differ. (In batches of one size it is 1 exactly, for every kind of model: test_kinds.py.)"""
    given = {"guidance_scale": guidance, "precision": precision, "clip_range": allowed}
    policy, settings = make_policy(tiniest_model, 0.5, device, sample_batch=4, **given)
    assert {p.dtype for p in policy.weights} == {torch.float32}
    samples = sampled(policy, settings)
    before, _ = run_update(policy, settings, samples, lr=5.0)
    after, _ = run_update(policy, settings, samples)
    assert before["ratio_error"] <= allowed and before["clip_fraction"] == 0
    assert after["ratio_error"] > 3 * allowed, "the update moved nothing"
    assert after["clip_fraction"] > 0


def test_weights_in_half_precision_as_on_a_gpu(tiniest_model):
    """There the frozen weights are stored in half precision and nothing is left to autocast; the
    gradient is the same."""
    given = {"steps": 3, "clip_range": 10}
    policy, settings = make_policy(tiniest_model, **given)
    samples = sampled(policy, settings)
    _, exact = run_update(policy, settings, samples, lr=1.0)

    policy, settings = make_policy(tiniest_model, precision="fp16", **given)
    for p in policy.unet.parameters():
        if not p.requires_grad:
            p.data = p.data.half()
    assert {p.dtype for p in policy.weights} == {torch.float32}
    before, _ = run_update(policy, settings, sampled(policy, settings), lr=0.0)
    assert before["ratio_error"] <= 2e-4 and before["skipped"] == 0
    _, rounded = run_update(policy, settings, samples, lr=1.0)
    assert torch.cosine_similarity(exact, rounded, dim=0) > 0.99


def test_dropout_is_off(tmp_path):
    unet = tiny_unet(dropout=0.5).train()
    policy, settings = make_policy(save_tiny_pipeline(tmp_path / "model", unet))
    metrics, _ = run_update(policy, settings, sampled(policy, settings))
    assert metrics["ratio_error"] <= 1e-6


# ---------------------------------------------------- predict, decode


def some_latents(policy):
    generator = torch.Generator().manual_seed(2)
    x_t = torch.randn(6, *policy.latent_shape, generator=generator)
    return x_t, torch.tensor([1, 251, 501, 751, 1, 999])


def one_pass(policy, x_t, t, prompts):
    """The network alone, on embeddings that diffusers made."""
    embeddings, _ = policy.pipe.encode_prompt(prompts, "cpu", 1, False)
    return policy.unet(x_t, t, embeddings).sample


@torch.no_grad()
def test_guidance_combines_two_passes(tiniest_model):
    policy, _ = make_policy(tiniest_model, guidance_scale=7.5)
    x_t, t = some_latents(policy)
    uncond = one_pass(policy, x_t, t, [""] * 6)
    conditional = one_pass(policy, x_t, t, PROMPTS)
    assert (uncond - conditional).abs().max() > 1e-3
    ours = policy.predict(x_t, t, policy.encode(PROMPTS))
    torch.testing.assert_close(ours, 7.5 * conditional - 6.5 * uncond, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_without_guidance_there_is_one_conditional_pass(tiniest_model, guidance):
    policy, _ = make_policy(tiniest_model, guidance_scale=guidance)
    x_t, t = some_latents(policy)
    expected = one_pass(policy, x_t, t, PROMPTS)
    rows = []
    policy.unet.register_forward_pre_hook(lambda unet, args: rows.append(len(args[0])))
    ours = policy.predict(x_t, t, policy.encode(PROMPTS))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
    assert rows == [6]


@torch.no_grad()
def test_decode_is_diffusers_and_stays_in_range(tiniest_model):
    policy, _ = make_policy(tiniest_model)
    pipe = policy.pipe
    x_0 = 10 * torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    images = policy.decode(x_0)
    decoded = pipe.vae.decode(x_0 / pipe.vae.config.scaling_factor).sample
    expected = pipe.image_processor.postprocess(decoded, output_type="pt")
    torch.testing.assert_close(images, expected)
    assert images.shape == (3, 3, 16, 16) and images.dtype == torch.float32
    assert images.min() == 0 and images.max() == 1, "nothing was out of range: not tested"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_does_not_cost_a_level_of_grey(tiniest_model, precision):
    """bf16 has 8 bits, so a network in it cannot tell 256 levels apart, and a reward like the
    JPEG's size would see the steps: pictures are decoded in float32."""
    x_0 = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    exact = make_policy(tiniest_model)[0].decode(x_0)
    images = make_policy(tiniest_model, precision=precision)[0].decode(x_0)
    assert torch.equal(images, exact)


# ---------------------------------------------------- the scheduler


@pytest.mark.parametrize(
    "other", [EulerDiscreteScheduler, DPMSolverMultistepScheduler, PNDMScheduler]
)
def test_a_scheduler_that_knows_no_clipping_is_not_clipped(tiniest_model, tmp_path, other):
    """DDIMScheduler clips by default, which is right for pixels and ruins latents, whose values go
    beyond 1."""
    pipe = StableDiffusionPipeline.from_pretrained(tiniest_model)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    pipe.scheduler = other(steps_offset=1, **betas)
    pipe.save_pretrained(tmp_path)
    policy, _ = make_policy(tmp_path)
    unclipped = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    unclipped.set_timesteps(4)
    t = unclipped.timesteps[:1]
    x_t = torch.full((1, 4, 8, 8), 3.0)
    eps = torch.zeros_like(x_t)
    expected = unclipped.step(eps, int(t), x_t, eta=0.0).prev_sample
    mean, _ = ddpo.ddim_mean_std(policy.scheduler, eps, t, x_t, eta=0.0)
    torch.testing.assert_close(mean, expected)
    assert expected.min() > 3, "clipping would not have shown"


def test_nothing_to_learn_from_is_said(tmp_path):
    model = save_tiny_pipeline(tmp_path / "model", set_alpha_to_one=True)
    with pytest.raises(ddpo.UserError, match="more --steps"):
        make_policy(model, steps=1)


def test_min_std_leaves_out_the_steps_that_add_little_noise(tiniest_model):
    """Of the 10 steps of Stable Diffusion's schedule, the last two add noise of 0.04 and 0.02."""
    for min_std, trained in [(0.0, 10), (0.03, 9), (0.1, 8)]:
        policy, _ = make_policy(tiniest_model, steps=10, min_std=min_std)
        assert policy.trained_steps.tolist() == list(range(trained))


# ---------------------------------------------------- which pairs


def test_every_pair_is_learned_from_once_and_an_image_in_one_minibatch(tiniest_model, monkeypatch):
    policy, settings = make_policy(tiniest_model, updates_per_epoch=3)
    samples = sampled(policy, settings)
    x = samples[0]
    predict = policy.predict
    timesteps = policy.scheduler.timesteps.tolist()
    run = ddpo.Run(settings, policy)
    step = run.step
    steps_taken = []
    seen = []  # (minibatch, image, step)

    def watch(x_t, t, cond):
        for latent, at in zip(x_t, t.tolist()):
            j = timesteps.index(at)
            image = [torch.equal(latent, row) for row in x[:, j]].index(True)
            seen.append((len(steps_taken), image, j))
        return predict(x_t, t, cond)

    def watched_step():
        steps_taken.append(step())
        return steps_taken[-1]

    monkeypatch.setattr(policy, "predict", watch)
    monkeypatch.setattr(run, "step", watched_step)
    metrics = ddpo.update(run, samples, torch.Generator().manual_seed(0))
    pairs = sorted((image, j) for _, image, j in seen)
    assert pairs == [(image, j) for image in range(6) for j in range(4)]
    minibatches = [{image for n, image, _ in seen if n == k} for k in range(3)]
    assert [len(images) for images in minibatches] == [2, 2, 2]
    assert set.union(*minibatches) == set(range(6))
    assert minibatches != [{0, 1}, {2, 3}, {4, 5}], "the images were not shuffled"
    assert metrics["grad_norm"] == pytest.approx(sum(steps_taken) / 3)


def test_a_fraction_of_the_steps_is_any_of_them_for_each_image(tiniest_model):
    """Half of 4 steps: two different ones of each image, and all six pairs of steps equally often.
    (That the gradient then is that of all steps, in expectation: test_objectives.py.)"""
    policy, _ = make_policy(tiniest_model, train_steps_fraction=0.5)
    assert policy.steps_learned == 2
    images = torch.arange(3000).flip(0)
    pairs = ddpo.choose_pairs(policy, images, torch.Generator().manual_seed(0))
    assert torch.equal(pairs[:, 0], images.repeat_interleave(2))
    first, second = pairs[:, 1].view(3000, 2).unbind(1)
    assert (first < second).all() and first.min() == 0 and second.max() == 3
    counts = torch.bincount(4 * first + second)
    counts = counts[counts > 0]
    assert len(counts) == 6
    chi2 = ((counts - 500.0) ** 2 / 500).sum()
    assert chi2 < 20.5  # of 5 degrees of freedom: one seed in 1000 has more


def test_deterministic_steps_are_never_trained_on(tmp_path):
    model = save_tiny_pipeline(tmp_path / "model", set_alpha_to_one=True)
    results = []
    for corrupt in (False, True):
        policy, settings = make_policy(model)
        x, logp_old, cond, adv = sampled(policy, settings)
        assert (logp_old[:, -1] == 0).all() and (logp_old[:, :-1] != 0).all()
        if corrupt:
            logp_old[:, -1] = -100.0
            x[:, -1] = float("nan")
        results.append(run_update(policy, settings, (x, logp_old, cond, adv), lr=1.0))
    (metrics, moved), (metrics_corrupt, moved_corrupt) = results
    assert metrics == metrics_corrupt
    assert torch.equal(moved, moved_corrupt) and moved.abs().max() > 0


# ---------------------------------------------------- the gradient


def test_update_descends_the_mean_loss_whatever_the_micro_batch(tiniest_model):
    """The reference is autograd on all pairs at once, with the objective written out."""
    policy, settings = make_policy(tiniest_model, clip_range=0.01)
    x, logp_old, cond, adv = sampled(policy, settings)
    generator = torch.Generator().manual_seed(1)
    logp_old += 0.02 * torch.randn(logp_old.shape, generator=generator)  # in the range and out

    logps = []
    for j, t in enumerate(policy.scheduler.timesteps):
        t = t.expand(len(x))
        eps = policy.predict(x[:, j], t, cond)
        _, logp = ddpo.ddim_step(policy.scheduler, eps, t, x[:, j], x_prev=x[:, j + 1])
        logps.append(logp)
    ratio = (torch.stack(logps, 1) - logp_old).exp()
    clipped = (ratio - 1).abs() > 0.01
    advantage = adv[:, None]
    objective = torch.minimum(advantage * ratio, advantage * ratio.clip(0.99, 1.01)).mean()
    gradient = torch.autograd.grad(-objective, policy.weights)
    expected = torch.cat([g.flatten() for g in gradient])
    start = [p.detach().clone() for p in policy.weights]
    assert expected.abs().max() > 1e-4 and 0.2 < clipped.float().mean() < 0.9

    for micro_batch in (1, 7, 24):
        for p, s in zip(policy.weights, start):
            p.data.copy_(s)
        policy.micro_batch = micro_batch
        metrics, moved = run_update(policy, settings, (x, logp_old, cond, adv), lr=1.0)
        torch.testing.assert_close(moved, expected, rtol=0, atol=1e-6)
        assert metrics["loss"] == pytest.approx(-objective.item(), abs=1e-6)
        assert metrics["clip_fraction"] == pytest.approx(clipped.float().mean().item())
        nats = (ratio.log() ** 2 / 2).mean().item()
        assert metrics["approx_kl"] == pytest.approx(nats, rel=1e-3)
        assert metrics["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-3)


def test_checkpointing_computes_activations_twice_and_changes_no_gradient(tiniest_model):
    moved = {}
    calls = {}
    for on in (False, True):
        policy, settings = make_policy(tiniest_model, grad_checkpointing=on, steps=3)
        samples = sampled(policy, settings)
        seen = []
        resnet = policy.unet.up_blocks[-1].resnets[0]
        resnet.register_forward_pre_hook(lambda *_: seen.append(1))
        metrics, moved[on] = run_update(policy, settings, samples)
        calls[on] = len(seen)
        assert metrics["ratio_error"] <= 1e-6
    assert calls[True] == 2 * calls[False] > 0
    torch.testing.assert_close(moved[True], moved[False], rtol=0, atol=1e-7)


def test_the_gradient_is_clipped_and_reported_unclipped(tiniest_model):
    policy, settings = make_policy(tiniest_model, grad_clip=1e-3)
    metrics, moved = run_update(policy, settings, sampled(policy, settings), lr=1.0)
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-2)
    assert metrics["grad_norm"] > 3e-3


# ---------------------------------------------------- sample, score


def test_a_trajectory_is_a_chain_of_scored_steps(tiniest_model):
    policy, _ = make_policy(tiniest_model)
    length = ("length", 0.5, lambda images, prompts: [len(p) for p in prompts])
    generator = torch.Generator().manual_seed(0)
    x, logp, scores = ddpo.sample(policy, [*BRIGHTNESS, length], PROMPTS, 4, generator)
    assert x.shape == (6, 5, 4, 8, 8) and logp.shape == (6, 4) and scores.shape == (6, 3)
    assert scores.dtype == torch.float32
    brightness = policy.decode(x[:, -1]).mean((1, 2, 3))
    torch.testing.assert_close(scores[:, 1], brightness, rtol=0, atol=1e-5)
    assert scores[:, 2].tolist() == [len(p) for p in PROMPTS]
    torch.testing.assert_close(scores[:, 0], scores[:, 1] + 0.5 * scores[:, 2])
    cond = policy.encode(PROMPTS)
    for image in range(6):  # prompts, latents and log-probabilities fit across the batches
        row = slice(image, image + 1)
        for j, t in enumerate(policy.scheduler.timesteps):
            x_t = x[row, j]
            eps = policy.predict(x_t, t[None], cond[row])
            _, again = ddpo.ddim_step(policy.scheduler, eps, t[None], x_t, x_prev=x[row, j + 1])
            torch.testing.assert_close(again, logp[row, j], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", ["LoRA", "VAE"])
def test_samples_that_are_not_finite_are_not_scored(part, tiniest_model):
    policy, _ = make_policy(tiniest_model)
    damaged = policy.weights[0] if part == "LoRA" else policy.pipe.vae.decoder.conv_out.weight
    damaged.data[0] = float("nan")
    terms = [("mine", 1.0, lambda images, prompts: pytest.fail("scored"))]
    with pytest.raises(ddpo.UserError, match="samples are not finite"):
        ddpo.sample(policy, terms, ["cat"], 1, torch.Generator().manual_seed(0))
