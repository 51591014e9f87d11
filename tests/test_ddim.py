"""Proves that one denoising step is diffusers' DDIM step, at every timestep of every kind of schedule, and that its
log-probability is that of the Gaussian it drew from: for what is stored, and without NaN where there is no noise."""

import itertools

import pytest
import torch
from diffusers import DDIMScheduler
from torch.distributions import Normal

from ddpo import ddim_mean_std, ddim_step

STEPS, SHAPE = 7, (4, 3, 5)  # 7 does not divide 1000, so the three spacings differ


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_scheduler(steps=STEPS, **config):
    scheduler = DDIMScheduler(**{"beta_schedule": "scaled_linear", "beta_end": 0.012, "clip_sample": False, **config})
    scheduler.set_timesteps(steps)
    return scheduler


def make_inputs(scheduler, dtype=torch.float32):
    """A latent and a network output for each timestep of the schedule, as one batch."""
    t = scheduler.timesteps
    x_t, output = (torch.randn(len(t), *SHAPE, generator=seeded(k)) for k in (1, 2))
    return t, x_t.to(dtype), output


def reference(scheduler, output, t, x_t, eta, noise):
    """diffusers' own step, one timestep at a time."""
    rows = zip(output.split(1), t.tolist(), x_t.split(1), noise.split(1))
    return torch.cat([scheduler.step(out, at, x, eta, variance_noise=z)[0] for out, at, x, z in rows])


CLIPPING = [
    {},
    {"clip_sample": True, "clip_sample_range": 0.8},
    {"thresholding": True, "sample_max_value": 2.0, "dynamic_thresholding_ratio": 0.9},
]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_mean_std_and_sample_are_those_of_diffusers(prediction_type, spacing):
    for clipping, to_one, offset, eta in itertools.product(CLIPPING, (True, False), (0, 1), (0.0, 0.5, 1.0)):
        scheduler = make_scheduler(
            prediction_type=prediction_type, timestep_spacing=spacing, set_alpha_to_one=to_one, steps_offset=offset, **clipping
        )
        t, x_t, output = make_inputs(scheduler)
        noise = torch.randn(x_t.shape, generator=seeded(3))

        mean, std = ddim_mean_std(scheduler, output, t, x_t, eta)
        x_prev, _ = ddim_step(scheduler, output, t, x_t, eta, generator=seeded(3))

        for ours, z in ((mean, torch.zeros_like(noise)), (mean + std, torch.ones_like(noise)), (x_prev, noise)):
            torch.testing.assert_close(ours, reference(scheduler, output, t, x_t, eta, z), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("eta", [0.0, 0.5, 0.999])
def test_zero_terminal_snr_is_that_of_diffusers(eta):
    """At eta 1, 1 - abar_prev - std^2 is 0 for the first step, and on some machines rounding makes diffusers' root NaN."""
    scheduler = make_scheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing")
    t, x_t, output = make_inputs(scheduler)
    assert scheduler.alphas_cumprod[t[0]] == 0  # the first latent is pure noise: dividing by its signal would give infinity
    x_prev, logp = ddim_step(scheduler, output, t, x_t, eta, generator=seeded(3))
    noise = torch.randn(x_t.shape, generator=seeded(3))
    torch.testing.assert_close(x_prev, reference(scheduler, output, t, x_t, eta, noise), rtol=1e-5, atol=2e-5)
    assert logp.isfinite().all()


def test_zero_terminal_snr_is_finite_where_rounding_makes_a_square_negative():
    """From pure noise at eta 1, 1 - abar_prev - std^2 is 0; with 20 steps it comes out as 1e-7 or so, above 0 or below."""
    zero_snr = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    scheduler = make_scheduler(20, beta_start=0.00085, **zero_snr)
    t, x_t, output = make_inputs(scheduler)
    mean, _ = ddim_mean_std(scheduler, output, t, x_t)
    assert mean.isfinite().all()
    expected = scheduler.alphas_cumprod[t[1]].sqrt() * -output[0]  # the output is v = -x_0 there
    torch.testing.assert_close(mean[0], expected, rtol=0, atol=3e-3)
    for abar in scheduler.alphas_cumprod[t[1]] * torch.linspace(0.9, 1.1, 9):  # rounded another way each time
        scheduler.alphas_cumprod[t[1]] = abar
        assert ddim_mean_std(scheduler, output, t, x_t)[0].isfinite().all()


@pytest.mark.parametrize("to_one, random_steps", [(False, STEPS), (True, STEPS - 1)])
def test_last_step_uses_the_final_alpha(to_one, random_steps):
    """With set_alpha_to_one the last step leaves no noise; without, it leaves that of timestep 0."""
    scheduler = make_scheduler(set_alpha_to_one=to_one, steps_offset=1)
    t, x_t, output = make_inputs(scheduler)
    _, std = ddim_mean_std(scheduler, output, t, x_t)
    abar, final = scheduler.alphas_cumprod[t[-1]], 1.0 if to_one else scheduler.alphas_cumprod[0]
    torch.testing.assert_close(std[-1].squeeze(), ((1 - final) / (1 - abar) * (1 - abar / final)) ** 0.5)
    assert (std > 0).sum() == random_steps


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_logp_and_its_gradient_are_those_of_a_normal_distribution(eta):
    scheduler = make_scheduler(steps_offset=1, set_alpha_to_one=False)
    t, x_t, output = make_inputs(scheduler)
    ours, theirs = (output.clone().requires_grad_() for _ in range(2))
    x_prev, logp = ddim_step(scheduler, ours, t, x_t, eta, generator=seeded(3))

    mean = reference(scheduler, theirs, t, x_t, eta, torch.zeros_like(x_t))
    std = torch.stack([eta * scheduler._get_variance(k, k - 1000 // STEPS) ** 0.5 for k in t.tolist()]).view(-1, 1, 1, 1)
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
    _, logp = ddim_step(scheduler, output, t, x_t, eta, x_prev=x_t.flip(0))  # not what the step would have drawn
    logp.sum().backward()
    moving = output.grad.flatten(1).abs().amax(1)
    assert logp.isfinite().all() and moving.isfinite().all()
    assert (logp[-deterministic:] == 0).all() and (moving[-deterministic:] == 0).all()
    assert (logp[:-deterministic] != 0).all() and (moving[:-deterministic] > 0).all()


def test_timesteps_mixed_in_a_batch_are_scored_as_one_at_a_time():
    scheduler = make_scheduler(thresholding=True, sample_max_value=2.0)
    t, x_t, output = (v[torch.randperm(STEPS, generator=seeded(4))] for v in make_inputs(scheduler))
    x_prev, logp = ddim_step(scheduler, output, t, x_t, generator=seeded(3))
    for k in range(STEPS):
        alone = ddim_step(scheduler, output[k : k + 1], t[k : k + 1], x_t[k : k + 1], x_prev=x_prev[k : k + 1])[1]
        torch.testing.assert_close(alone, logp[k : k + 1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_stored_is_what_was_scored(dtype):
    scheduler = make_scheduler(steps_offset=1, set_alpha_to_one=False)
    t, x_t, output = make_inputs(scheduler, dtype)
    x_prev, logp = ddim_step(scheduler, output, t, x_t, generator=seeded(3))
    assert x_prev.dtype == dtype and logp.dtype == torch.float32
    assert torch.equal(ddim_step(scheduler, output, t, x_t, x_prev=x_prev)[1], logp)

    # Scoring the value before it was rounded, a tempting mistake, is off by much more than the clip range of 1e-4.
    unrounded = ddim_step(scheduler, output, t, x_t.float(), generator=seeded(3))[1]
    assert torch.equal(unrounded, logp) if dtype == torch.float32 else (unrounded - logp).abs().max() > 2e-4
