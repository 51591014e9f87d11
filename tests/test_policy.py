"""Proves that the pipeline samples and learns as one policy: the same guidance on both sides, a ratio of exactly 1 before an
update, a gradient that the micro-batch does not change, each (image, step) pair learned from once, deterministic steps never."""

from types import SimpleNamespace

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


def sampled(policy, settings, seed=0):
    """What `update` learns from."""
    x, logp_old, _ = ddpo.sample(policy, BRIGHTNESS, PROMPTS, settings, torch.Generator(policy.device).manual_seed(seed))
    return x, logp_old, policy.encode(PROMPTS), ADV.to(policy.device)


def run_update(policy, settings, samples, lr=0.01, seed=0):
    """One `update` with plain gradient descent; returns its metrics and by how much the weights moved."""
    before = [p.detach().clone() for p in policy.weights]
    run = ddpo.Run(settings, policy)
    run.optimizer = torch.optim.SGD(policy.weights, lr)
    metrics = ddpo.update(run, samples, torch.Generator().manual_seed(seed))
    return metrics, torch.cat([(b - p.detach()).flatten() for b, p in zip(before, policy.weights)])


# ---------------------------------------------------------------- the ratio


no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
A_TENTH = 1.6384 / 256 / 10  # of the default clip range


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("device, precision, allowed", [
    ("cpu", "fp32", 1e-6), ("cpu", "bf16", 2e-4), ("cpu", "fp16", A_TENTH),
    *(pytest.param("cuda", precision, A_TENTH, marks=no_gpu) for precision in ("fp32", "bf16", "fp16")),
])  # fmt: skip
def test_ratio_is_one_before_an_update(tiny_model, guidance, device, precision, allowed):
    """Sampled in batches of 4 and 2 images, learned in batches of 5 pairs: only rounding may differ."""
    same = {"guidance_scale": guidance, "precision": precision, "sample_batch": 4, "clip_range": allowed}
    policy, settings = make_policy(tiny_model, lora_scale=0.5, device=device, **same)
    assert {p.dtype for p in policy.weights} == {torch.float32}
    samples = sampled(policy, settings)
    before, _ = run_update(policy, settings, samples, lr=5.0)
    after, _ = run_update(policy, settings, samples)
    assert before["ratio_error"] <= allowed and before["clip_fraction"] == 0
    assert after["ratio_error"] > 3 * allowed and after["clip_fraction"] > 0, "the update moved nothing"


def test_weights_in_half_precision_as_on_a_gpu(tiny_model):
    """There the frozen weights are stored in half precision and nothing is left to autocast; the gradient is the same."""
    moved = {}
    for precision in ("fp32", "bf16"):
        policy, settings = make_policy(tiny_model, precision=precision, clip_range=10)
        if precision == "fp32":
            samples = sampled(policy, settings)
        for p in policy.unet.parameters():
            p.data = p.data if p.requires_grad else p.data.to(policy.dtype)
        own = sampled(policy, settings)
        before, _ = run_update(policy, settings, own, lr=0.0)
        assert before["ratio_error"] <= 2e-4 and before["skipped"] == 0
        assert {p.dtype for p in policy.weights} == {torch.float32}
        _, moved[precision] = run_update(policy, settings, samples, lr=1.0)
    assert torch.cosine_similarity(moved["fp32"], moved["bf16"], dim=0) > 0.95


def test_dropout_is_off(tmp_path):
    unet = tiny_unet(dropout=0.5).train()
    policy, settings = make_policy(save_tiny_pipeline(tmp_path / "model", unet))
    assert run_update(policy, settings, sampled(policy, settings))[0]["ratio_error"] <= 1e-6


# ---------------------------------------------------------------- encode, predict, decode


def some_latents(policy):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(6, *policy.latent_shape, generator=generator), torch.tensor([1, 251, 501, 751, 1, 999])


def one_pass(policy, x_t, t, prompts):
    """The network alone, on embeddings that diffusers made."""
    return policy.unet(x_t, t, policy.pipe.encode_prompt(prompts, "cpu", 1, False)[0]).sample


@torch.no_grad()
def test_guidance_combines_two_passes(tiny_model):
    policy, _ = make_policy(tiny_model, guidance_scale=7.5)
    x_t, t = some_latents(policy)
    uncond, conditional = one_pass(policy, x_t, t, [""] * 6), one_pass(policy, x_t, t, PROMPTS)
    assert (uncond - conditional).abs().max() > 1e-3
    expected = 7.5 * conditional - 6.5 * uncond
    torch.testing.assert_close(policy.predict(x_t, t, policy.encode(PROMPTS)), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_without_guidance_there_is_one_conditional_pass(tiny_model, guidance):
    policy, _ = make_policy(tiny_model, guidance_scale=guidance)
    x_t, t = some_latents(policy)
    expected, rows = one_pass(policy, x_t, t, PROMPTS), []
    policy.unet.register_forward_pre_hook(lambda unet, args: rows.append(len(args[0])))
    torch.testing.assert_close(policy.predict(x_t, t, policy.encode(PROMPTS)), expected, rtol=1e-4, atol=1e-6)
    assert rows == [6]


@torch.no_grad()
def test_decode_is_diffusers_and_stays_in_range(tiny_model):
    policy, _ = make_policy(tiny_model)
    x_0 = 10 * torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    images, pipe = policy.decode(x_0), policy.pipe
    expected = pipe.image_processor.postprocess(pipe.vae.decode(x_0 / pipe.vae.config.scaling_factor)[0], output_type="pt")
    torch.testing.assert_close(images, expected)
    assert images.shape == (3, 3, 16, 16) and images.dtype == torch.float32
    assert images.min() == 0 and images.max() == 1, "nothing was out of range, so the clamp was not tested"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_does_not_cost_a_level_of_grey(tiny_model, precision):
    """bf16 has 8 bits, so a network in it cannot tell 256 levels apart; a reward like the JPEG's size would see the steps."""
    x_0 = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    exact, rounded = (make_policy(tiny_model, precision=p)[0].decode(x_0) for p in ("fp32", precision))
    assert rounded.dtype == torch.float32 and (rounded - exact).abs().max() < 1 / 255


# ---------------------------------------------------------------- the scheduler


@pytest.mark.parametrize("other", [EulerDiscreteScheduler, DPMSolverMultistepScheduler, PNDMScheduler])
def test_a_scheduler_that_knows_no_clipping_is_not_clipped(tiny_model, tmp_path, other):
    """DDIMScheduler clips by default, which is right for pixels and ruins latents, whose values go beyond 1."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model)
    pipe.scheduler = other(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    pipe.save_pretrained(tmp_path)
    policy, _ = make_policy(tmp_path)
    unclipped = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    unclipped.set_timesteps(4)
    t, x_t = unclipped.timesteps[:1], torch.full((1, 4, 8, 8), 3.0)
    expected = unclipped.step(torch.zeros_like(x_t), int(t), x_t, eta=0.0)[0]
    torch.testing.assert_close(ddpo.ddim_mean_std(policy.scheduler, torch.zeros_like(x_t), t, x_t, 0.0)[0], expected)
    assert expected.min() > 3, "clipping would not have shown"


# ---------------------------------------------------------------- update


def test_update_descends_the_mean_loss_whatever_the_micro_batch(tiny_model):
    """The reference is autograd on all pairs at once, with the objective written out."""
    policy, settings = make_policy(tiny_model, objective="clipped", clip_range=0.01)
    x, logp_old, cond, adv = sampled(policy, settings)
    logp_old += 0.02 * torch.randn(logp_old.shape, generator=torch.Generator().manual_seed(1))  # ratios in and out of the range

    logps = []
    for j, t in enumerate(policy.scheduler.timesteps):
        t = t.expand(len(x))
        logps.append(ddpo.ddim_step(policy.scheduler, policy.predict(x[:, j], t, cond), t, x[:, j], x_prev=x[:, j + 1])[1])
    ratio = (torch.stack(logps, 1) - logp_old).exp()
    objective = torch.minimum(adv[:, None] * ratio, adv[:, None] * ratio.clip(0.99, 1.01)).mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(-objective, policy.weights)])
    start = [p.detach().clone() for p in policy.weights]

    for micro_batch in (1, 3, 7, 24):
        for p, s in zip(policy.weights, start):
            p.data.copy_(s)
        policy.micro_batch = micro_batch
        metrics, moved = run_update(policy, settings, (x, logp_old, cond, adv), lr=1.0)
        torch.testing.assert_close(moved, expected, rtol=0, atol=1e-6)
        assert metrics["loss"] == pytest.approx(-objective.item(), abs=1e-6)
        assert metrics["clip_fraction"] == pytest.approx(((ratio - 1).abs() > 0.01).float().mean().item())
        assert metrics["approx_kl"] == pytest.approx((ratio.log() ** 2 / 2).mean().item(), rel=1e-3)
        assert metrics["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-3)
    assert expected.abs().max() > 1e-4 and 0.2 < ((ratio - 1).abs() > 0.01).float().mean() < 0.9


def test_checkpointing_computes_activations_twice_and_changes_no_gradient(tiny_model):
    moved, calls = {}, {}
    for on in (False, True):
        policy, settings = make_policy(tiny_model, grad_checkpointing=on)
        samples, seen = sampled(policy, settings), []
        policy.unet.up_blocks[-1].resnets[0].register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
        metrics, moved[on] = run_update(policy, settings, samples)
        calls[on] = len(seen)
        assert metrics["ratio_error"] <= 1e-6
    assert calls[True] == 2 * calls[False] > 0
    torch.testing.assert_close(moved[True], moved[False], rtol=0, atol=1e-7)


def test_compiling_changes_no_ratio(tiny_model, monkeypatch):
    """Captured and differentiated by torch.compile; its last stage, which writes code for the device, is left out for time. That
    code rounds differently with and without gradients, so it must be called in one way only."""
    compiled, learning, plain_compile = [], [], torch.compile

    def without_codegen(function, **options):
        compiled.append(function)
        captured = plain_compile(function, backend="aot_eager", **options)
        return lambda *args, **kwargs: learning.append(torch.is_grad_enabled()) or captured(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", without_codegen)
    results = {}
    for on in (False, True):
        policy, settings = make_policy(tiny_model, compile=on, micro_batch=6)  # as many as are sampled at once
        samples = sampled(policy, settings)
        assert not any(part.requires_grad for part in samples)
        before, moved = run_update(policy, settings, samples, lr=1.0)
        results[on] = samples[0], moved, run_update(policy, settings, samples)[0]["ratio_error"]
        assert before["ratio_error"] <= 1e-5 and bool(compiled) == on
    assert len(learning) > 8 and all(learning)
    torch.testing.assert_close(results[True], results[False], rtol=1e-4, atol=1e-5)
    assert results[True][2] > 1e-4, "the update moved nothing"
    assert not [name for name in policy.unet.state_dict() if "_orig_mod" in name], "a LoRA would be saved under other names"


@pytest.mark.parametrize("free, pairs", [(1e9, 1), (5e9, 1), (5e9 + 1e6, 2), (12e9, 4), (21e9, 8), (90e9, 24), (500e9, 24)])
def test_a_gpu_is_filled(free, pairs, tiny_model, monkeypatch):
    """One pair takes 3 GB, another 2 GB more; a fifth is left of what is free and not wanted for what AdamW keeps."""
    policy, _ = make_policy(tiny_model)
    peaks, seen = {1: 3e9, 2: 5e9}, []
    predict = policy.predict
    policy.device = SimpleNamespace(type="cuda")
    monkeypatch.setattr(policy, "encode", lambda prompts: torch.zeros(len(prompts), dtype=torch.long))
    policy.table = [torch.randn(1, *policy.pipe.encode_prompt("cat", "cpu", 1, True)[0].shape[1:])]
    monkeypatch.setattr(policy, "predict", lambda x_t, t, cond: seen.append(len(x_t)) or predict(x_t, t, cond))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 500e9))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peaks[seen[-1]])
    assert policy.fitting_pairs(24) == pairs and seen == [1, 2]
    assert all(p.grad is None for p in policy.weights)


def test_the_gradient_is_clipped_and_reported_unclipped(tiny_model):
    policy, settings = make_policy(tiny_model, grad_clip=1e-3)
    metrics, moved = run_update(policy, settings, sampled(policy, settings), lr=1.0)
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-2) and metrics["grad_norm"] > 3e-3


def test_every_pair_is_learned_from_once_and_an_image_in_one_share(tiny_model, monkeypatch):
    policy, settings = make_policy(tiny_model, updates_per_epoch=3)
    samples = sampled(policy, settings)
    x, seen, share = samples[0], [], 0
    predict, timesteps = policy.predict, policy.scheduler.timesteps.tolist()

    def watch(x_t, t, cond):
        for latent, at in zip(x_t, t.tolist()):
            j = timesteps.index(at)
            seen.append((share, [torch.equal(latent, row) for row in x[:, j]].index(True), j))
        return predict(x_t, t, cond)

    def next_share():
        nonlocal share
        share += 1

    monkeypatch.setattr(policy, "predict", watch)
    ddpo.update(ddpo.Run(settings, policy), samples, torch.Generator().manual_seed(0), next_share)
    assert sorted((i, j) for _, i, j in seen) == [(i, j) for i in range(6) for j in range(4)]
    shares = [{i for s, i, _ in seen if s == k} for k in range(3)]
    assert share == 3 and [len(s) for s in shares] == [2, 2, 2] and set.union(*shares) == set(range(6))
    assert shares != [{0, 1}, {2, 3}, {4, 5}], "the images were not shuffled"


def test_a_fraction_of_the_steps_has_the_gradient_of_all_in_expectation(tiny_model, monkeypatch):
    """Half of 4 steps: two different ones of each image, other ones for other images. The mean over 60 draws comes near."""
    policy, settings = make_policy(tiny_model, train_steps_fraction=0.5)
    assert policy.steps_learned == 2
    samples, policy.steps_learned = sampled(policy, settings), 4
    _, whole = run_update(policy, settings, samples, lr=1e-3)  # small enough not to change the policy
    policy.steps_learned, seen, predict = 2, [], policy.predict
    monkeypatch.setattr(policy, "predict", lambda x_t, t, cond: seen.extend(t.tolist()) or predict(x_t, t, cond))
    moved = [run_update(policy, settings, samples, lr=1e-3, seed=seed)[1] for seed in range(60)]
    drawn = torch.tensor(seen).view(60, 6, 2)  # (draws, images, steps)
    assert (drawn[..., 0] > drawn[..., 1]).all() and len(drawn.unique()) == 4 and len({str(row) for row in drawn[0].tolist()}) > 1
    error = [(mean - whole).norm() / whole.norm() for mean in (moved[0], torch.stack(moved).mean(0))]
    assert error[0] > 0.4 and error[1] < error[0] / 5  # of unbiased draws it is a root of 60 smaller


@pytest.mark.parametrize("adv_min, learned", [(0.0, 6), (0.5, 4), (1.5, 1), (99.0, 1)])
def test_images_near_the_baseline_can_be_left_out(adv_min, learned, tiny_model, monkeypatch):
    """ADV is 1, -0.5, 0.3, -2, 0.7 and 0. The reference is a batch without the others; the last one is never left out."""
    policy, settings = make_policy(tiny_model, adv_min=adv_min)
    samples = sampled(policy, settings)
    kept = ADV.abs() >= min(adv_min, 2)
    calls, predict = [], policy.predict
    monkeypatch.setattr(policy, "predict", lambda x_t, t, cond: calls.append(len(x_t)) or predict(x_t, t, cond))
    metrics, moved = run_update(policy, settings, samples)
    assert sum(calls) == 4 * learned == 4 * kept.sum()
    policy, settings = make_policy(tiny_model)
    policy.encode(PROMPTS)
    expected, moved_expected = run_update(policy, settings, [part[kept] for part in samples])
    torch.testing.assert_close(moved, moved_expected, rtol=1e-3, atol=1e-7)
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-3, abs=1e-6)


def test_deterministic_steps_are_never_trained_on(tmp_path):
    model = save_tiny_pipeline(tmp_path / "model", set_alpha_to_one=True)
    results = []
    for corrupt in (False, True):
        policy, settings = make_policy(model)
        x, logp_old, cond, adv = sampled(policy, settings)
        assert (logp_old[:, -1] == 0).all() and (logp_old[:, :-1] != 0).all()
        if corrupt:
            logp_old[:, -1], x[:, -1] = -100.0, float("nan")
        results.append(run_update(policy, settings, (x, logp_old, cond, adv), lr=1.0))
    (metrics, moved), (metrics_corrupt, moved_corrupt) = results
    assert metrics == metrics_corrupt and torch.equal(moved, moved_corrupt) and moved.abs().max() > 0


def test_nothing_to_learn_from_is_said(tmp_path):
    with pytest.raises(ddpo.UserError, match="more --steps"):
        make_policy(save_tiny_pipeline(tmp_path / "model", set_alpha_to_one=True), steps=1)


def test_min_std_leaves_out_the_steps_that_add_little_noise(tiny_model):
    """Of the 10 steps of Stable Diffusion's schedule, the last two add noise of 0.04 and 0.02."""
    for min_std, trained in [(0.0, 10), (0.03, 9), (0.1, 8)]:
        policy, _ = make_policy(tiny_model, steps=10, min_std=min_std)
        assert policy.trained_steps.tolist() == list(range(trained))


# ---------------------------------------------------------------- sample, score


def test_a_trajectory_is_a_chain_of_scored_steps(tiny_model):
    policy, settings = make_policy(tiny_model, sample_batch=4)
    terms = [*BRIGHTNESS, ("length", 0.5, lambda images, prompts: [len(p) for p in prompts])]
    x, logp, scores = ddpo.sample(policy, terms, PROMPTS, settings, torch.Generator().manual_seed(0))
    assert x.shape == (6, 5, 4, 8, 8) and logp.shape == (6, 4) and scores.shape == (6, 3) and scores.dtype == torch.float32
    torch.testing.assert_close(scores[:, 1], policy.decode(x[:, -1]).mean((1, 2, 3)), rtol=0, atol=1e-5)
    assert scores[:, 2].tolist() == [len(p) for p in PROMPTS]
    torch.testing.assert_close(scores[:, 0], scores[:, 1] + 0.5 * scores[:, 2])
    cond = policy.encode(PROMPTS)
    for image in range(6):  # prompts, latents and log-probabilities belong together across batches
        for step, t in enumerate(policy.scheduler.timesteps):
            x_t, x_prev, c = x[image : image + 1, step], x[image : image + 1, step + 1], cond[image : image + 1]
            again = ddpo.ddim_step(policy.scheduler, policy.predict(x_t, t[None], c), t[None], x_t, x_prev=x_prev)[1]
            torch.testing.assert_close(again, logp[image, step][None], rtol=1e-5, atol=1e-5)
