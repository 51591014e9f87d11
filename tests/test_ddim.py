"""Proves that one denoising step is diffusers' DDIM step, at every timestep of every kind of
schedule, and, said of a flow's levels, its Euler step; and that its log-probability is that of the
Gaussian it drew from: for what is stored, and without NaN where there is no noise."""

import copy
import itertools

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch.distributions import Normal

from ddpo import Policy, ddim_levels, ddim_mean_std, ddim_step, x_0_and_eps

STEPS = 7  # does not divide 1000, so the three spacings differ
SHAPE = (4, 3, 5)
KINDS = ("epsilon", "v_prediction", "sample")
LAST_STEP_IS_RANDOM = {"steps_offset": 1, "set_alpha_to_one": False}
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction",
            "timestep_spacing": "trailing"}


class Sampler:
    """A step's part of a Policy; with an eta other than 1 it is put together here."""

    def __init__(self, steps=STEPS, eta=1.0, **config):
        defaults = {"beta_schedule": "scaled_linear", "beta_end": 0.012, "clip_sample": False}
        self.scheduler = DDIMScheduler(**{**defaults, **config})
        self.scheduler.set_timesteps(steps)
        self.levels = ddim_levels(self.scheduler)
        self.eta = eta

    def mean_std(self, output, t, x_t):
        if self.eta == 1.0:
            return Policy.mean_std(self, output, t, x_t)
        levels = self.levels[:, t].view(4, -1, 1, 1, 1)
        x_0, eps = x_0_and_eps(self.scheduler.config.prediction_type, output, x_t, *levels[:2])
        return ddim_mean_std(x_0, eps, *levels, self.eta)

    def inputs(self, dtype=torch.float32):
        """A latent and a network output for each timestep of the schedule, as one batch."""
        t = self.scheduler.timesteps
        x_t = torch.randn(len(t), *SHAPE, generator=seeded(1))
        output = torch.randn(len(t), *SHAPE, generator=seeded(2))
        return output, t, x_t.to(dtype)

    def reference(self, output, t, x_t, noise):
        """diffusers' own step, one timestep at a time; in float64, as in float32 it is off by 1e-4
        where there is little noise."""
        exact = copy.deepcopy(self.scheduler)
        exact.alphas_cumprod = exact.alphas_cumprod.double()
        exact.final_alpha_cumprod = exact.final_alpha_cumprod.double()
        x_prev = []
        for row in torch.arange(len(t)).split(1):
            given = {"eta": self.eta, "variance_noise": noise[row].double()}
            step = exact.step(output[row].double(), int(t[row]), x_t[row].double(), **given)
            x_prev.append(step.prev_sample.float())
        return torch.cat(x_prev)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("prediction_type", KINDS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_mean_std_and_sample_are_those_of_diffusers(prediction_type, spacing):
    clipped = {"clip_sample": True, "clip_sample_range": 0.8}
    for to_one, offset, (eta, clipping) in itertools.product(
        (True, False), (0, 1), ((0.0, {}), (0.5, {}), (1.0, {}), (1.0, clipped))
    ):
        config = {"set_alpha_to_one": to_one, "steps_offset": offset, **clipping}
        config |= {"prediction_type": prediction_type, "timestep_spacing": spacing}
        sampler = Sampler(eta=eta, **config)
        inputs = sampler.inputs()
        noise = torch.randn(inputs[2].shape, generator=seeded(3))
        mean, std = sampler.mean_std(*inputs)
        x_prev, _ = ddim_step(sampler, *inputs, generator=seeded(3))
        for ours, z in ((mean, 0 * noise), (mean + std, 0 * noise + 1), (x_prev, noise)):
            close(ours, sampler.reference(*inputs, z))


@pytest.mark.parametrize("eta", [0.0, 0.5, 0.999])
def test_zero_terminal_snr_is_that_of_diffusers(eta):
    """At eta 1, 1 - abar_prev - std^2 is 0 for the first step, and on some machines rounding makes
    diffusers' root NaN."""
    sampler = Sampler(eta=eta, **ZERO_SNR)
    inputs = sampler.inputs()
    assert sampler.levels[0, inputs[1][0]] == 0  # x_T has no signal that could be divided by
    x_prev, logp = ddim_step(sampler, *inputs, generator=seeded(3))
    noise = torch.randn(x_prev.shape, generator=seeded(3))
    close(x_prev, sampler.reference(*inputs, noise))
    assert logp.isfinite().all()


def test_zero_terminal_snr_is_finite_at_eta_1():
    sampler = Sampler(20, beta_start=0.00085, **ZERO_SNR)
    output, t, x_t = sampler.inputs()
    mean, std = sampler.mean_std(output, t, x_t)
    signal_prev, sigma_prev = sampler.levels[2:, t[0]]
    close(mean[0], signal_prev * -output[0])  # the output is v = -x_0 there
    close(std[0].squeeze(), sigma_prev)
    for factor in torch.linspace(0.9, 1.1, 9):  # rounded another way each time
        sampler.levels[2:] *= factor
        assert sampler.mean_std(output, t, x_t)[0].isfinite().all()
        sampler.levels[2:] /= factor


# ---------------------------------------------------- in a flow's levels


def test_deterministic_it_is_the_euler_step_of_a_flow():
    """x_t = (1 - t) x_0 + t eps, of which the network says the velocity eps - x_0."""
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    euler.set_timesteps(STEPS)
    x_t, velocity = torch.randn(2, *SHAPE, generator=seeded(1))
    for t, t_prev in zip(euler.sigmas, euler.sigmas[1:]):
        x_0, eps = x_t - t * velocity, x_t + (1 - t) * velocity
        mean, std = ddim_mean_std(x_0, eps, 1 - t, t, 1 - t_prev, t_prev, eta=0.0)
        at = euler.timesteps[euler.step_index or 0]
        close(mean, euler.step(velocity, at, x_t).prev_sample)
        assert std == 0


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_flow_takes_the_same_step_in_other_coordinates(eta):
    """Divide all by signal + sigma: then x_t = (1 - t) x_0 + t eps with t = sigma / (...)."""
    sampler = Sampler(**LAST_STEP_IS_RANDOM)
    x_0, t, x_t = sampler.inputs()
    signal, sigma, signal_prev, sigma_prev = levels = sampler.levels[:, t].view(4, -1, 1, 1, 1)
    eps = (x_t - signal * x_0) / sigma
    mean, std = ddim_mean_std(x_0, eps, *levels, eta)
    now, then = sigma / (signal + sigma), sigma_prev / (signal_prev + sigma_prev)
    torch.testing.assert_close((1 - now) * x_0 + now * eps, x_t / (signal + sigma))
    flow_mean, flow_std = ddim_mean_std(x_0, eps, 1 - now, now, 1 - then, then, eta)
    scale = signal_prev + sigma_prev
    torch.testing.assert_close(flow_mean, mean / scale, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(flow_std, std / scale, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------- log-probability


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_logp_and_its_gradient_are_those_of_a_normal_distribution(eta):
    sampler = Sampler(eta=eta, **LAST_STEP_IS_RANDOM)
    output, t, x_t = sampler.inputs()
    ours = output.clone().requires_grad_()
    theirs = output.clone().requires_grad_()
    x_prev, logp = ddim_step(sampler, ours, t, x_t, generator=seeded(3))

    mean = sampler.reference(theirs, t, x_t, torch.zeros_like(x_t))
    variance = [sampler.scheduler._get_variance(k, k - 1000 // STEPS) for k in t.tolist()]
    std = eta * torch.stack(variance).view(-1, 1, 1, 1) ** 0.5
    expected = Normal(mean, std).log_prob(x_prev).mean((1, 2, 3))
    logp.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(logp, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("eta, deterministic", [(1.0, 1), (0.0, STEPS)])
def test_deterministic_steps_have_logp_zero_and_no_gradient(eta, deterministic):
    """With set_alpha_to_one the last step leaves no noise."""
    sampler = Sampler(eta=eta, set_alpha_to_one=True)
    output, t, x_t = sampler.inputs()
    output.requires_grad_()
    not_drawn = x_t.flip(0)  # another x_{t-1} than the step would have drawn
    _, logp = ddim_step(sampler, output, t, x_t, x_prev=not_drawn)
    logp.sum().backward()
    moving = output.grad.flatten(1).abs().amax(1)
    assert logp.isfinite().all() and moving.isfinite().all()
    assert (logp[-deterministic:] == 0).all() and (moving[-deterministic:] == 0).all()
    assert (logp[:-deterministic] != 0).all() and (moving[:-deterministic] > 0).all()


def test_timesteps_mixed_in_a_batch_are_scored_as_one_at_a_time():
    sampler = Sampler(clip_sample=True)
    order = torch.randperm(STEPS, generator=seeded(4))
    output, t, x_t = (part[order] for part in sampler.inputs())
    x_prev, logp = ddim_step(sampler, output, t, x_t, generator=seeded(3))
    for k in range(STEPS):
        row = slice(k, k + 1)
        _, alone = ddim_step(sampler, output[row], t[row], x_t[row], x_prev=x_prev[row])
        torch.testing.assert_close(alone, logp[row], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_stored_is_what_was_scored(dtype):
    sampler = Sampler(**LAST_STEP_IS_RANDOM)
    output, t, x_t = sampler.inputs(dtype)
    x_prev, logp = ddim_step(sampler, output, t, x_t, generator=seeded(3))
    assert x_prev.dtype == dtype and logp.dtype == torch.float32
    assert torch.equal(ddim_step(sampler, output, t, x_t, x_prev=x_prev)[1], logp)

    # To score the value before it was rounded is a tempting mistake: it is off by much more than
    # the clip range of 1e-4.
    _, unrounded = ddim_step(sampler, output, t, x_t.float(), generator=seeded(3))
    off = (unrounded - logp).abs().max()
    assert off == 0 if dtype == torch.float32 else off > 2e-4
