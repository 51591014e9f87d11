"""Proves that the pipeline samples and learns as one policy: the same guidance on both sides, a
ratio of 1 before an update, a gradient that the batch size does not change, each (image, step)
pair learned from once, deterministic steps never."""

import shutil
from dataclasses import replace
from unittest import mock

import diffusers
import pytest
import torch
from conftest import (
    BETAS,
    BRIGHTNESS,
    PROMPTS,
    TINIEST,
    flat,
    make_policy,
    make_settings,
    sampled,
    save_tiny_pipeline,
    tiny_unet,
    update_by_sgd,
)
from torch.utils._python_dispatch import TorchDispatchMode

import ddpo

ADV = [1.0, -0.5, 0.3, -2.0, 0.7, 0.0]


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
    """Sampled in batches of 4 and 2 images, learned in batches of 4 pairs: only rounding may
    differ. (In batches of one size it is 1 exactly, for every kind of model: test_pipelines.py.)"""
    given = {"guidance_scale": guidance, "precision": precision, "clip_range": allowed}
    policy, settings = make_policy(tiniest_model, 0.5, device, steps=2, batch_size=4, **given)
    assert {p.dtype for p in policy.weights} == {torch.float32}
    samples = sampled(policy, ADV)
    before, _ = update_by_sgd(policy, settings, samples, lr=5.0)
    after, _ = update_by_sgd(policy, settings, samples)
    assert before["ratio_error"] <= allowed and before["clip_fraction"] == 0
    assert after["ratio_error"] > 3 * allowed, "the update moved nothing"
    assert after["clip_fraction"] > 0


class HalfWeights(ddpo.Policy):
    """As on a GPU: the frozen weights are stored in half precision, nothing is left to autocast."""

    def prepare(self, settings):
        super().prepare(settings)
        self.unet.to(self.dtype)


def test_weights_in_half_precision_give_the_same_gradient(tiniest_model):
    given = {"steps": 2, "clip_range": 10}
    policy, settings = make_policy(tiniest_model, **given)
    samples = sampled(policy, ADV)
    _, exact = update_by_sgd(policy, settings, samples)

    given |= {"precision": "fp16", "policy_class": HalfWeights}
    policy, settings = make_policy(tiniest_model, **given)
    assert policy.unet.dtype == torch.float16
    assert {p.dtype for p in policy.weights} == {torch.float32}
    before, _ = update_by_sgd(policy, settings, sampled(policy, ADV), lr=0.0)
    assert before["ratio_error"] <= 2e-4 and before["skipped"] == 0
    _, rounded = update_by_sgd(policy, settings, samples)
    assert torch.cosine_similarity(exact, rounded, dim=0) > 0.985  # 0.990, of fp16 activations


def test_dropout_is_off(tmp_path):
    unet = tiny_unet(dropout=0.5, **TINIEST).train()
    policy, settings = make_policy(save_tiny_pipeline(tmp_path / "model", unet), steps=2)
    metrics, _ = update_by_sgd(policy, settings, sampled(policy, ADV))
    assert metrics["ratio_error"] <= 1e-6


# ---------------------------------------------------- predict, decode


@torch.no_grad()
@pytest.mark.parametrize("guidance", [0.0, 1.0, 7.5])
def test_guidance_combines_two_passes_and_without_it_there_is_one(tiniest_model, guidance):
    policy, _ = make_policy(tiniest_model, guidance_scale=guidance)
    x_t = torch.randn(6, *policy.latent_shape, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([1, 251, 501, 751, 1, 999])
    outputs = []
    for prompts in (PROMPTS, [""] * 6):  # the network alone, on embeddings that diffusers made
        embeddings, _ = policy.pipe.encode_prompt(prompts, "cpu", 1, False)
        outputs.append(policy.unet(x_t, t, embeddings).sample)
    conditional, uncond = outputs
    assert (uncond - conditional).abs().max() > 1e-3
    rows = []
    policy.unet.register_forward_pre_hook(lambda unet, args: rows.append(len(args[0])))
    ours = policy.predict(x_t, t, policy.encode(PROMPTS))
    g = max(guidance, 1.0)
    torch.testing.assert_close(ours, g * conditional - (g - 1) * uncond, rtol=1e-4, atol=1e-5)
    assert rows == [12 if guidance > 1 else 6]


@torch.no_grad()
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_decode_is_diffusers_in_float32_and_stays_in_range(tiniest_model, precision):
    """bf16 has 8 bits, so a network in it cannot tell 256 levels apart, and a reward like the
    JPEG's size would see the steps."""
    policy, _ = make_policy(tiniest_model, precision=precision)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiniest_model)
    x_0 = 10 * torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    images = policy.decode(x_0)
    decoded = pipe.vae.decode(x_0 / pipe.vae.config.scaling_factor).sample
    expected = pipe.image_processor.postprocess(decoded, output_type="pt")
    torch.testing.assert_close(images, expected)
    assert images.shape == (3, 3, 16, 16) and images.dtype == torch.float32
    assert images.min() == 0 and images.max() == 1, "nothing was out of range: not tested"


# ---------------------------------------------------- the scheduler


@pytest.mark.parametrize("other", ["EulerDiscrete", "DPMSolverMultistep", "PNDM"])
def test_a_scheduler_that_knows_no_clipping_is_not_clipped(tiniest_model, tmp_path, other):
    """DDIMScheduler clips by default, which is right for pixels and ruins latents, whose values go
    beyond 1."""
    shutil.copytree(tiniest_model, tmp_path / "model")
    scheduler = getattr(diffusers, f"{other}Scheduler")(steps_offset=1, **BETAS)
    scheduler.save_pretrained(tmp_path / "model" / "scheduler")
    index = tmp_path / "model" / "model_index.json"
    index.write_text(index.read_text().replace("DDIMScheduler", type(scheduler).__name__))
    policy, _ = make_policy(tmp_path / "model")
    unclipped = diffusers.DDIMScheduler.from_config(scheduler.config, clip_sample=False)
    unclipped.set_timesteps(4)
    t = unclipped.timesteps[:1]
    x_t = torch.full((1, 4, 8, 8), 3.0)
    none = torch.zeros_like(x_t)
    expected = unclipped.step(none, int(t), x_t, 1.0, variance_noise=none).prev_sample
    torch.testing.assert_close(policy.mean_std(none, t, x_t)[0], expected)
    assert expected.min() > 3, "clipping would not have shown"
    assert isinstance(policy.pipe.scheduler, type(scheduler))


def test_nothing_to_learn_from_is_said(tmp_path):
    model = save_tiny_pipeline(tmp_path / "model", tiny_unet(**TINIEST), set_alpha_to_one=True)
    with pytest.raises(ddpo.UserError, match="more --steps"):
        make_policy(model, steps=1)


def test_min_std_leaves_out_the_steps_that_add_little_noise(tiniest_model):
    """Of the 10 steps of Stable Diffusion's schedule, the last two add noise of 0.04 and 0.02."""
    policy, _ = make_policy(tiniest_model)
    for min_std, trained in [(0.0, 10), (0.03, 9), (0.1, 8)]:
        policy.set_steps(make_settings(tiniest_model, steps=10, min_std=min_std))
        assert policy.trained_steps == list(range(trained))


# ---------------------------------------------------- which pairs


def test_every_pair_is_learned_from_once_and_an_image_in_one_minibatch(tiniest_model, monkeypatch):
    policy, settings = make_policy(tiniest_model, updates_per_epoch=3)
    samples = sampled(policy, ADV)
    predict = policy.predict
    timesteps = policy.scheduler.timesteps.tolist()
    run = ddpo.Run(settings, policy)
    step = run.step
    steps_taken = []
    seen = []  # (minibatch, image, step)

    def watch(x_t, t, cond):
        for latent, at in zip(x_t, t.tolist()):
            j = timesteps.index(at)
            image = [torch.equal(latent, row) for row in samples.x[:, j]].index(True)
            seen.append((len(steps_taken), image, j))
        return predict(x_t, t, cond)

    monkeypatch.setattr(policy, "predict", watch)
    monkeypatch.setattr(run, "step", lambda: steps_taken.append(step()) or steps_taken[-1])
    metrics = ddpo.update(run, samples, torch.Generator().manual_seed(0))
    pairs = sorted((image, j) for _, image, j in seen)
    assert pairs == [(image, j) for image in range(6) for j in range(4)]
    minibatches = [{image for n, image, _ in seen if n == k} for k in range(3)]
    assert [len(images) for images in minibatches] == [2, 2, 2]
    assert set.union(*minibatches) == set(range(6))
    assert minibatches != [{0, 1}, {2, 3}, {4, 5}], "the images were not shuffled"
    assert metrics["grad_norm"] == pytest.approx(sum(steps_taken) / 3)


def test_deterministic_steps_are_never_trained_on(tmp_path):
    unet = tiny_unet(**TINIEST)
    model = save_tiny_pipeline(tmp_path / "model", unet, set_alpha_to_one=True)
    policy, settings = make_policy(model, steps=3)
    samples = sampled(policy, ADV)
    assert (samples.logp[:, -1] == 0).all() and (samples.logp[:, :-1] != 0).all()
    start = flat(policy.weights)
    metrics, moved = update_by_sgd(policy, settings, samples)
    samples.logp[:, -1] = -100.0
    samples.x[:, -1] = float("nan")
    torch.nn.utils.vector_to_parameters(start.clone(), policy.weights)
    assert update_by_sgd(policy, settings, samples)[0] == metrics
    assert torch.equal(start - flat(policy.weights), moved) and moved.abs().max() > 0


# ---------------------------------------------------- the gradient


def test_update_descends_the_mean_loss_whatever_the_batch_size(tiniest_model):
    """The reference is autograd on all pairs at once, with the objective written out."""
    policy, settings = make_policy(tiniest_model, clip_range=0.01, steps=3)
    samples = sampled(policy, ADV)
    x = samples.x
    generator = torch.Generator().manual_seed(1)
    samples.logp += 0.02 * torch.randn(6, 3, generator=generator)  # in the range and out

    logps = []
    for j, t in enumerate(policy.scheduler.timesteps):
        t = t.expand(len(x))
        output = policy.predict(x[:, j], t, samples.cond)
        logps.append(ddpo.ddim_step(policy, output, t, x[:, j], x_prev=x[:, j + 1])[1])
    ratio = (torch.stack(logps, 1) - samples.logp).exp()
    clipped = (ratio - 1).abs() > 0.01
    advantage = samples.adv[:, None]
    objective = torch.minimum(advantage * ratio, advantage * ratio.clip(0.99, 1.01)).mean()
    expected = flat(torch.autograd.grad(-objective, policy.weights))
    start = flat(policy.weights)
    assert expected.abs().max() > 1e-4 and 0.2 < clipped.float().mean() < 0.9

    for policy.batch_size in (2, 7, 18):
        torch.nn.utils.vector_to_parameters(start.clone(), policy.weights)
        metrics, moved = update_by_sgd(policy, settings, samples)
        torch.testing.assert_close(moved, expected, rtol=0, atol=1e-6)
        assert metrics["loss"] == pytest.approx(-objective.item(), abs=1e-6)
        assert metrics["clip_fraction"] == pytest.approx(clipped.float().mean().item())
        nats = (ratio.log() ** 2 / 2).mean().item()
        assert metrics["approx_kl"] == pytest.approx(nats, rel=1e-3)
        assert metrics["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-3)


def test_saving_memory_computes_activations_twice_and_learns_the_same(tiniest_model):
    """And decodes in tiles what is wider than Stable Diffusion's 64 latents."""
    moved = {}
    calls = {}
    for on in (False, True):
        policy, settings = make_policy(tiniest_model, save_memory=on, steps=2)
        samples = sampled(policy, ADV)
        seen = []
        for part in (policy.unet.up_blocks[-1].resnets[0], policy.pipe.vae.decoder):
            part.register_forward_pre_hook(lambda module, _: seen.append(type(module).__name__))
        metrics, moved[on] = update_by_sgd(policy, settings, samples, lr=0.01)
        assert metrics["ratio_error"] <= 1e-6
        for width in (64, 96):
            policy.decode(torch.zeros(1, 4, 8, width))
        calls[on] = [seen.count(name) for name in ("ResnetBlock2D", "Decoder")]
    assert calls[True][0] == 2 * calls[False][0] > 0
    assert calls[False][1] == 2 and calls[True][1] == 1 + 2, "two tiles of the wider one"
    torch.testing.assert_close(moved[True], moved[False], rtol=0, atol=1e-7)


def test_the_gradient_is_clipped_and_reported_unclipped(tiniest_model):
    policy, settings = make_policy(tiniest_model, steps=2)
    metrics, moved = update_by_sgd(policy, settings, sampled(policy, ADV), grad_clip=1e-3)
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-2)
    assert metrics["grad_norm"] > 3e-3
    assert ddpo.GRAD_CLIP == 1.0


# ---------------------------------------------------- sample, score


def test_a_trajectory_is_a_chain_of_scored_steps(tiniest_model):
    policy, _ = make_policy(tiniest_model, steps=2)
    length = ("length", 0.5, lambda images, prompts: [len(p) for p in prompts])
    generator = torch.Generator().manual_seed(0)
    samples = ddpo.sample(policy, [*BRIGHTNESS, length], PROMPTS, generator)
    x, scores = samples.x, samples.scores
    assert x.shape == (6, 3, 4, 8, 8) and samples.logp.shape == (6, 2) and scores.shape == (6, 3)
    assert scores.dtype == torch.float32 and samples.prompts == PROMPTS
    torch.testing.assert_close(scores[:, 1], policy.decode(x[:, -1]).mean((1, 2, 3)))
    assert scores[:, 2].tolist() == [len(p) for p in PROMPTS]
    torch.testing.assert_close(scores[:, 0], scores[:, 1] + 0.5 * scores[:, 2])
    assert torch.equal(samples.cond, policy.encode(PROMPTS))
    for image in range(6):  # prompts, latents and log-probabilities fit across the batches
        row = slice(image, image + 1)
        for j, t in enumerate(policy.scheduler.timesteps):
            output = policy.predict(x[row, j], t[None], samples.cond[row])
            _, again = ddpo.ddim_step(policy, output, t[None], x[row, j], x_prev=x[row, j + 1])
            torch.testing.assert_close(again, samples.logp[row, j], rtol=1e-5, atol=1e-5)


def test_a_group_begins_with_one_call_of_the_network(tiniest_model, monkeypatch):
    """And samples and learns as if each image had a call of its own; but each has one where a batch
    would part a group."""
    given = {"images_per_epoch": 8, "samples_per_prompt": 4, "batch_size": 8}
    policy, settings = make_policy(tiniest_model, **given)
    calls = []
    predict = policy.predict
    monkeypatch.setattr(policy, "predict", lambda x, t, c: calls.append(len(x)) or predict(x, t, c))
    prompts = [prompt for prompt in PROMPTS[:2] for _ in range(4)]

    def sample():
        samples = ddpo.sample(policy, BRIGHTNESS, prompts, torch.Generator().manual_seed(0), 4)
        samples.adv = torch.linspace(-1, 1, 8)
        return samples

    once = sample()
    assert once.alike == 4 and calls == [2, 8, 8, 8]
    with monkeypatch.context() as patch:
        patch.setattr(ddpo, "predict_once", lambda _, x_t, t, cond, alike: predict(x_t, t, cond))
        each = sample()
    torch.testing.assert_close((once.x, once.logp), (each.x, each.logp))
    assert torch.equal(once.x[:4, 0], once.x[:1, 0].expand(4, -1, -1, -1))
    assert not torch.equal(once.x[0, 1], once.x[1, 1])

    calls.clear()
    metrics, moved = update_by_sgd(policy, settings, once)
    assert calls == [2, 8, 8, 8] and metrics["ratio_error"] == 0
    calls.clear()
    each, settings = make_policy(tiniest_model, **given)
    each.encode(prompts)
    _, expected = update_by_sgd(each, settings, replace(once, alike=1))
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-6)
    assert expected.norm() > 1e-3

    policy.batch_size = 6
    calls.clear()
    assert sample().alike == 1 and calls == [6] * 4 + [2] * 4


@pytest.mark.parametrize("updates, size", [(1, 5), (2, 3), (6, 1)])
def test_no_more_are_sampled_in_a_call_than_are_learned_from(updates, size, tiniest_model):
    """Half precision rounds by the size of a call; a minibatch may be smaller than --batch-size."""
    policy, settings = make_policy(tiniest_model, updates_per_epoch=updates)
    calls = []
    predict = policy.predict
    policy.predict = lambda x_t, t, cond: calls.append(len(x_t)) or predict(x_t, t, cond)
    samples = sampled(policy, ADV)
    sizes = set(calls)
    calls.clear()
    ddpo.update(ddpo.Run(settings, policy), samples, torch.Generator())
    assert sizes == set(calls) == {size, 6 % size or size}


def test_whole_groups_are_dealt_into_minibatches(tiniest_model):
    given = {"images_per_epoch": 12, "samples_per_prompt": 2, "updates_per_epoch": 3}
    policy, settings = make_policy(tiniest_model, batch_size=2, **given)
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    samples = ddpo.sample(policy, BRIGHTNESS, prompts, torch.Generator().manual_seed(0), 2)
    samples.adv = torch.zeros(12)
    with mock.patch.object(ddpo, "step_loss", side_effect=ddpo.step_loss) as step_loss:
        ddpo.update(ddpo.Run(settings, policy), samples, torch.Generator().manual_seed(0))
    dealt = [(call.args[4], *call.args[3].tolist()) for call in step_loss.call_args_list]
    assert sorted(dealt) == [(step, i, i + 1) for step in range(4) for i in range(0, 12, 2)]
    first = [pair for step, *pair in dealt if step == 0]
    assert first != sorted(first)


@pytest.mark.parametrize("part", ["LoRA", "VAE"])
def test_samples_that_are_not_finite_are_not_scored(part, tiniest_model):
    policy, _ = make_policy(tiniest_model)
    damaged = policy.weights[0] if part == "LoRA" else policy.pipe.vae.decoder.conv_out.weight
    damaged.data[0] = float("nan")
    terms = [("mine", 1.0, lambda images, prompts: pytest.fail("scored"))]
    with pytest.raises(ddpo.UserError, match="samples are not finite"):
        ddpo.sample(policy, terms, ["cat"], torch.Generator().manual_seed(0))


# ---------------------------------------------------- the host


class FromTheHost(TorchDispatchMode):
    """Notes what a GPU would have to wait for: values of the host, and values for it."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if func.overloadpacket in (aten.lift_fresh, aten._local_scalar_dense, aten.nonzero):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_step_and_a_micro_batch_need_nothing_of_the_host(tiniest_model):
    policy, settings = make_policy(tiniest_model)
    samples = sampled(policy)
    images = torch.tensor([0, 2])
    t = policy.scheduler.timesteps[:1].expand(2)
    x_t = samples.x[:2, 0]
    with FromTheHost() as watch:
        output = policy.predict(x_t, t, samples.cond[:2])
        ddpo.ddim_step(policy, output, t, x_t, generator=torch.Generator())
        loss, _ = ddpo.step_loss(policy, settings, samples, images, 1)
        loss.sum().backward()
        assert watch.seen == []
        policy.encode(["cat"])  # once for each batch
    assert watch.seen == ["aten.lift_fresh.default"]
