"""Proves that one denoising step is diffusers' DDIM step, at every timestep of every kind of
schedule, and that its log-probability is that of the Gaussian it drew from: for what is stored, and
without NaN where there is no noise."""

import itertools

import pytest
import torch
from diffusers import DDIMScheduler
from torch.distributions import Normal

from ddpo import ddim_mean_std, ddim_step

STEPS = 7  # does not divide 1000, so the three spacings differ
SHAPE = (4, 3, 5)
LAST_STEP_IS_RANDOM = {"steps_offset": 1, "set_alpha_to_one": False}
ZERO_SNR = {
    "rescale_betas_zero_snr": True,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_scheduler(steps=STEPS, **config):
    defaults = {"beta_schedule": "scaled_linear", "beta_end": 0.012, "clip_sample": False}
    scheduler = DDIMScheduler(**{**defaults, **config})
    scheduler.set_timesteps(steps)
    return scheduler


def make_inputs(scheduler, dtype=torch.float32):
    """A latent and a network output for each timestep of the schedule, as one batch."""
    t = scheduler.timesteps
    x_t = torch.randn(len(t), *SHAPE, generator=seeded(1))
    output = torch.randn(len(t), *SHAPE, generator=seeded(2))
    return t, x_t.to(dtype), output


def reference(scheduler, output, t, x_t, eta, noise):
    """diffusers' own step, one timestep at a time."""
    x_prev = []
    for k in range(len(t)):
        row = slice(k, k + 1)
        step = scheduler.step(output[row], int(t[k]), x_t[row], eta, variance_noise=noise[row])
        x_prev.append(step.prev_sample)
    return torch.cat(x_prev)


CLIPPING = [
    {},
    {"clip_sample": True, "clip_sample_range": 0.8},
    {"thresholding": True, "sample_max_value": 2.0, "dynamic_thresholding_ratio": 0.9},
]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_mean_std_and_sample_are_those_of_diffusers(prediction_type, spacing):
    cases = itertools.product(CLIPPING, (True, False), (0, 1), (0.0, 0.5, 1.0))
    for clipping, to_one, offset, eta in cases:
        config = {"set_alpha_to_one": to_one, "steps_offset": offset, **clipping}
        config |= {"prediction_type": prediction_type, "timestep_spacing": spacing}
        scheduler = make_scheduler(**config)
        t, x_t, output = make_inputs(scheduler)
        noise = torch.randn(x_t.shape, generator=seeded(3))

        mean, std = ddim_mean_std(scheduler, output, t, x_t, eta)
        x_prev, _ = ddim_step(scheduler, output, t, x_t, eta, generator=seeded(3))

        ones = torch.ones_like(noise)
        for ours, z in ((mean, 0 * ones), (mean + std, ones), (x_prev, noise)):
            theirs = reference(scheduler, output, t, x_t, eta, z)
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("eta", [0.0, 0.5, 0.999])
def test_zero_terminal_snr_is_that_of_diffusers(eta):
    """At eta 1, 1 - abar_prev - std^2 is 0 for the first step, and on some machines rounding makes
    diffusers' root NaN."""
    scheduler = make_scheduler(**ZERO_SNR)
    t, x_t, output = make_inputs(scheduler)
    assert scheduler.alphas_cumprod[t[0]] == 0  # x_T has no signal that could be divided by
    x_prev, logp = ddim_step(scheduler, output, t, x_t, eta, generator=seeded(3))
    noise = torch.randn(x_t.shape, generator=seeded(3))
    theirs = reference(scheduler, output, t, x_t, eta, noise)
    torch.testing.assert_close(x_prev, theirs, rtol=1e-5, atol=2e-5)
    assert logp.isfinite().all()


def test_zero_terminal_snr_is_finite_where_rounding_makes_a_square_negative():
    """From pure noise at eta 1, 1 - abar_prev - std^2 is 0; with 20 steps it comes out as 1e-7 or
    so, above 0 or below."""
    scheduler = make_scheduler(20, beta_start=0.00085, **ZERO_SNR)
    t, x_t, output = make_inputs(scheduler)
    mean, _ = ddim_mean_std(scheduler, output, t, x_t)
    assert mean.isfinite().all()
    abar = scheduler.alphas_cumprod[t[1]].clone()
    expected = abar.sqrt() * -output[0]  # the output is v = -x_0 there
    torch.testing.assert_close(mean[0], expected, rtol=0, atol=3e-3)
    for factor in torch.linspace(0.9, 1.1, 9):  # rounded another way each time
        scheduler.alphas_cumprod[t[1]] = factor * abar
        assert ddim_mean_std(scheduler, output, t, x_t)[0].isfinite().all()


@pytest.mark.parametrize("to_one, random_steps", [(False, STEPS), (True, STEPS - 1)])
def test_last_step_uses_the_final_alpha(to_one, random_steps):
    """With set_alpha_to_one the last step leaves no noise; without, that of timestep 0."""
    scheduler = make_scheduler(set_alpha_to_one=to_one, steps_offset=1)
    t, x_t, output = make_inputs(scheduler)
    _, std = ddim_mean_std(scheduler, output, t, x_t)
    abar = scheduler.alphas_cumprod[t[-1]]
    final = 1.0 if to_one else scheduler.alphas_cumprod[0]
    expected = ((1 - final) / (1 - abar) * (1 - abar / final)) ** 0.5
    torch.testing.assert_close(std[-1].squeeze(), expected)
    assert (std > 0).sum() == random_steps


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_logp_and_its_gradient_are_those_of_a_normal_distribution(eta):
    scheduler = make_scheduler(**LAST_STEP_IS_RANDOM)
    t, x_t, output = make_inputs(scheduler)
    ours = output.clone().requires_grad_()
    theirs = output.clone().requires_grad_()
    x_prev, logp = ddim_step(scheduler, ours, t, x_t, eta, generator=seeded(3))

    mean = reference(scheduler, theirs, t, x_t, eta, torch.zeros_like(x_t))
    variance = torch.stack([scheduler._get_variance(k, k - 1000 // STEPS) for k in t.tolist()])
    std = eta * variance.view(-1, 1, 1, 1) ** 0.5
    expected = Normal(mean, std).log_prob(x_prev).mean((1, 2, 3))
    logp.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(logp, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("eta, deterministic", [(1.0, 1), (0.0, STEPS)])
def test_deterministic_steps_have_logp_zero_and_no_gradient(eta, deterministic):
    scheduler = make_scheduler(set_alpha_to_one=True)
    t, x_t, output = make_inputs(scheduler)
    output.requires_grad_()
    not_drawn = x_t.flip(0)  # another x_{t-1} than the step would have drawn
    _, logp = ddim_step(scheduler, output, t, x_t, eta, x_prev=not_drawn)
    logp.sum().backward()
    moving = output.grad.flatten(1).abs().amax(1)
    assert logp.isfinite().all() and moving.isfinite().all()
    assert (logp[-deterministic:] == 0).all() and (moving[-deterministic:] == 0).all()
    assert (logp[:-deterministic] != 0).all() and (moving[:-deterministic] > 0).all()


def test_timesteps_mixed_in_a_batch_are_scored_as_one_at_a_time():
    scheduler = make_scheduler(thresholding=True, sample_max_value=2.0)
    order = torch.randperm(STEPS, generator=seeded(4))
    t, x_t, output = (part[order] for part in make_inputs(scheduler))
    x_prev, logp = ddim_step(scheduler, output, t, x_t, generator=seeded(3))
    for k in range(STEPS):
        row = slice(k, k + 1)
        _, alone = ddim_step(scheduler, output[row], t[row], x_t[row], x_prev=x_prev[row])
        torch.testing.assert_close(alone, logp[row], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_stored_is_what_was_scored(dtype):
    scheduler = make_scheduler(**LAST_STEP_IS_RANDOM)
    t, x_t, output = make_inputs(scheduler, dtype)
    x_prev, logp = ddim_step(scheduler, output, t, x_t, generator=seeded(3))
    assert x_prev.dtype == dtype and logp.dtype == torch.float32
    assert torch.equal(ddim_step(scheduler, output, t, x_t, x_prev=x_prev)[1], logp)

    # To score the value before it was rounded is a tempting mistake: it is off by much more than
    # the clip range of 1e-4.
    _, unrounded = ddim_step(scheduler, output, t, x_t.float(), generator=seeded(3))
    if dtype == torch.float32:
        assert torch.equal(unrounded, logp)
    else:
        assert (unrounded - logp).abs().max() > 2e-4
