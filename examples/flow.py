"""DDPO for flow models: Stable Diffusion 3, and each model of ddpo.py seen as a flow.

    python examples/flow.py --reward compressibility          # the bundled model, in minutes
    python examples/flow.py @examples/stable-diffusion.flags --steps 10 --model FOLDER --no-t5

A flow has x_t = (1 - t) x_0 + t eps and predicts v = eps - x_0. A noise-predicting model is one in
other coordinates: divide its x_t = signal x_0 + sigma eps by signal + sigma, and let
t = sigma / (signal + sigma). So DDPO's own step, DDIM's, said of (signal, sigma) = (1 - t, t), is
the flow's policy. From t to u, it and others draw x_u = (1 - u) x_0 + kept eps + std noise. There
the network expects kept^2 + std^2 = u^2; Flow-GRPO's is more, and before a large last step stays in
the picture, as grain. Without noise all are the ODE, by which flows draw: eval_ode in metrics.csv.
--min-std is of ddim's std for every step. The LoRA of Stable Diffusion 3 is on the layers of the
picture, not on those of the text (add_q_proj ...). For several GPUs, in multi_gpu.py:
SharedRun(flow.FlowRun), launch(..., SharedRun, flow.policy_of), main(..., kind=flow.FlowSettings).
"""

import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ddpo

NOISE = {"ddim": 1.0, "grpo": 0.7, "cps": 0.7}  # the steps, and how much of it each adds


@dataclass(frozen=True)
class FlowSettings(ddpo.Settings):
    step: str = ddpo.flag("ddim", "ddim, grpo or cps")
    noise_level: float = ddpo.flag(0.0, "ddim's eta, grpo's or cps's a; 0: 1, 0.7, 0.7")
    t5: bool = ddpo.flag(True, "Stable Diffusion 3: read prompts by its T5 (19 GB), too")

    def __post_init__(self):
        super().__post_init__()
        if self.step not in NOISE or (self.step != "grpo" and self.noise_level > 1):
            raise ddpo.UserError("step: ddim, grpo or cps; noise_level: at most 1, but for grpo")


def step_mean_std(step, x_0, eps, t, u, noise):
    """Mean (B, C, H, W) and std (B, 1, 1, 1) of p(x_u | x_t, c)."""
    if step == "ddim":  # DDPO's own, finite at t = 1
        return ddpo.ddim_mean_std(x_0, eps, 1 - t, t, 1 - u, u, noise)
    if step == "cps":  # Flow-CPS, arXiv 2509.05952: as much new noise however small the step is
        std = u * math.sin(noise * math.pi / 2)
        kept = u * math.cos(noise * math.pi / 2)
    else:  # Flow-GRPO, arXiv 2505.05470, equation 9: Euler-Maruyama's step of an SDE
        rate = t / (1 - torch.where(t == 1, u, t))  # of the noise; else it is infinite at 1
        std = noise * (rate * (t - u)).sqrt() * (u > 0)  # none into the picture
        kept = u - std**2 / (2 * t)
    return (1 - u) * x_0 + kept * eps, std


class FlowPolicy(ddpo.Policy):
    def prepare(self, settings):
        super().prepare(settings)
        self.step, self.noise = settings.step, settings.noise_level or NOISE[settings.step]

    def x_0_and_eps(self, output, x_t, signal, sigma):
        config = self.scheduler.config
        x_0, eps = ddpo.x_0_and_eps(config.prediction_type, output, x_t, signal, sigma)
        limit = config.clip_sample_range if config.clip_sample else math.inf
        return x_0.clamp(-limit, limit), eps

    def mean_std(self, output, t, x_t):
        signal, sigma, signal_prev, sigma_prev = self.levels[:, t].view(4, -1, 1, 1, 1)
        x_0, eps = self.x_0_and_eps(output, x_t, signal, sigma)
        t = sigma / (signal + sigma)
        scale = signal_prev + sigma_prev  # of the model's latents, which stay as they are; or 1
        mean, std = step_mean_std(self.step, x_0, eps, t, sigma_prev / scale, self.noise)
        return scale * mean, scale * std  # ratios and KLs are the same in all coordinates


class StableDiffusion3(FlowPolicy):
    prefix = "transformer."

    def load(self, settings, dtype):
        how = {"subfolder": "transformer", "output_loading_info": True, "torch_dtype": dtype}
        transformer, report = SD3Transformer2DModel.from_pretrained(settings.model, **how)
        if report["missing_keys"]:  # made up now
            raise ddpo.UserError(f"--model {settings.model} lacks {min(report['missing_keys'])}")
        absent = [] if settings.t5 else ["text_encoder_3", "tokenizer_3"]
        parts = {"transformer": transformer, "torch_dtype": torch.float32, **dict.fromkeys(absent)}
        with ddpo.explained(f"--model {settings.model} lacks parts; without a T5, add --no-t5"):
            pipe = DiffusionPipeline.from_pretrained(settings.model, **parts)
        pipe.encode_prompt = partial(pipe.encode_prompt, prompt_2=None, prompt_3=None)
        return pipe

    def set_steps(self, settings):
        n = settings.steps
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.pipe.scheduler.config)
        # Its own list, shifted twice, ends in a large step and a tiny one.
        self.scheduler.set_timesteps(sigmas=[1 - i / n for i in range(n)], device=self.device)
        t, u = self.scheduler.sigmas[:-1], self.scheduler.sigmas[1:]
        self.levels = torch.stack([1 - t, t, 1 - u, u])
        self.times = self.scheduler.timesteps  # 1000 t, for the transformer
        self.scheduler.timesteps = torch.arange(n, device=self.device)  # by which levels are found
        _, std = ddpo.ddim_mean_std(0.0, 0.0, *self.levels)
        self.trained_steps = [step for step in range(n) if std[step] > settings.min_std]
        if not self.trained_steps:
            raise ddpo.UserError("no step adds noise to learn from: more --steps, less --min-std")

    def x_0_and_eps(self, v, x_t, signal, sigma):
        return x_t - sigma * v, x_t + signal * v

    def predict(self, x_t, t, cond):
        passes = 2 if self.guidance_scale > 1 else 1  # without the prompt first
        x_t = x_t.repeat(passes, 1, 1, 1).to(self.unet.dtype)
        tables = [table[cond, -passes:].transpose(0, 1).flatten(0, 1) for table in self.tables]
        with torch.autocast(self.device.type, self.dtype, enabled=self.unet.dtype != self.dtype):
            v = self.unet(x_t, *tables, self.times[t].repeat(passes)).sample.float().chunk(passes)
        return v[0] + self.guidance_scale * (v[-1] - v[0])

    def decode(self, x_0):
        config = self.pipe.vae.config
        return super().decode(x_0 + (config.shift_factor or 0) * config.scaling_factor)


class FlowRun(ddpo.Run):
    eval_ode = 0.0  # where another process evaluates

    def evaluate(self, terms, prompts, epoch):
        noise, self.policy.noise = self.policy.noise, 0.0
        self.eval_ode = super().evaluate(terms, prompts, epoch)
        self.policy.noise = noise
        return super().evaluate(terms, prompts, epoch)  # whose pictures stay

    def finish(self, row):
        super().finish({**row, "eval_ode": self.eval_ode} if "eval_reward" in row else row)


def policy_of(settings, device):
    own = settings.model == ddpo.Settings.model
    kind = "" if own else DiffusionPipeline.load_config(settings.model)["_class_name"]
    policy_class = StableDiffusion3 if kind == "StableDiffusion3Pipeline" else FlowPolicy
    return policy_class(settings, device)


if __name__ == "__main__":
    launch = partial(ddpo.launch, run_class=FlowRun, policy_class=policy_of)
    ddpo.main(launch=launch, kind=FlowSettings, name="flow.py", about=__doc__)
