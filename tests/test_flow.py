"""Proves that examples/flow.py is what it says: DDIM's step of a noise-predicting model is a flow's
in other coordinates; all steps are their papers', and without noise diffusers' Euler step; they end
where Gaussians in closed form do. And that Stable Diffusion 3 samples, learns and paints with them
as plain diffusers does, with and without its T5, and that a run composes with all of ddpo.py."""

import json
import math
import runpy
import shutil
import sys

import diffusers
import pytest
import torch
import transformers
from conftest import (
    BRIGHTNESS,
    LORA,
    PROMPTS,
    TEXT,
    as_flags,
    letters_tokenizer,
    lora_bytes,
    read_metrics,
    sampled,
    save_tiny_pixels,
    small_run,
    update_by_sgd,
)
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch.distributions import Normal, kl_divergence

import ddpo

sys.path.insert(0, str(ddpo.EXAMPLES))
import flow

NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}
A = {"ddim": 1.0, "grpo": 0.7, "cps": 0.7}  # their own noise levels


# ---------------------------------------------------- models


def tiny_t5():
    letters = [(letter, -1.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    vocab = models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters], unk_id=2)
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(vocab), **names)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return transformers.T5EncoderModel(transformers.T5Config(vocab_size=29, **sizes)), tokenizer


def save_sd3(folder, t5):
    """A random Stable Diffusion 3 for 16 x 16 pixels (latents 4 x 8 x 8)."""
    tokenizer = letters_tokenizer(folder, model_max_length=12)
    text = {**TEXT, "num_hidden_layers": 2, "hidden_size": 16, "projection_dim": 16}
    config = transformers.CLIPTextConfig(**text)
    clips = [transformers.CLIPTextModelWithProjection(config) for _ in range(2)]
    encoder, tokenizer_3 = tiny_t5() if t5 else (None, None)
    blocks = {"block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2,
              "up_block_types": ("UpDecoderBlock2D",) * 2, "norm_num_groups": 4}
    vae = diffusers.AutoencoderKL(**blocks, latent_channels=4, scaling_factor=1.5, shift_factor=0.3)
    sizes = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4,
             "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
             "joint_attention_dim": 32, "caption_projection_dim": 16,
             "pooled_projection_dim": 32, "pos_embed_max_size": 8}  # fmt: skip
    transformer = diffusers.SD3Transformer2DModel(**sizes)
    torch.manual_seed(3)  # as they are drawn they hardly read their prompts
    for part in (*clips, transformer, *([encoder] if t5 else [])):
        for weights in part.parameters():
            torch.nn.init.normal_(weights, std=0.2)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = (transformer, scheduler, vae, clips[0], tokenizer, clips[1], tokenizer, encoder)
    diffusers.StableDiffusion3Pipeline(*parts, tokenizer_3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    """The folders of a Stable Diffusion 3, with its T5 and without: {t5: folder}."""
    folder = tmp_path_factory.mktemp("sd3")
    return {t5: save_sd3(folder / str(t5), t5) for t5 in (True, False)}


def plain_sd3(folder, t5):
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, **({} if t5 else NO_T5))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_policy(model, policy_class=flow.policy_of, t5=False, lora_scale=0.3, **settings):
    """Policy and settings of a small run. Its LoRA does something: B is random, not zero."""
    size = {"steps": 4, "images_per_epoch": 6, "updates_per_epoch": 1, "batch_size": 6}
    settings = flow.FlowSettings(**small_run(model, **{**size, **settings}), t5=t5)
    torch.manual_seed(5)
    policy = policy_class(settings, torch.device("cpu"))
    for layer in policy.lora.values():
        torch.nn.init.normal_(layer.split()[1], std=lora_scale)
    return policy, settings


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=tolerance, atol=tolerance)


# ---------------------------------------------------- a noise-predicting model as a flow


def test_the_bundled_model_as_a_flow_is_trained_as_by_ddpo(tmp_path):
    """By its own latents, log-probabilities and update. Another model has pixels, which are clipped
    and whose last step is deterministic."""
    pixels = save_tiny_pixels(tmp_path / "model")
    for model, steps, trained in ((ddpo.Settings.model, 5, 5), (pixels, 4, 3)):
        size = {"images_per_epoch": 2, "batch_size": 2, "steps": steps, "lora_scale": 0.05}
        found = []
        for policy_class in (flow.policy_of, ddpo.Policy):
            policy, settings = make_policy(model, policy_class, **size)
            samples = sampled(policy, torch.tensor([1.0, -0.7]), PROMPTS[:2])
            metrics, moved = update_by_sgd(policy, settings, samples)
            assert metrics["ratio_error"] == 0 and policy.trained_steps == list(range(trained))
            found.append((samples.x, samples.logp, moved / moved.norm(), moved.norm()))
        for ours, theirs in zip(*found, strict=True):
            close(ours, theirs)


def textbook(step, v, x_t, t, u, a):
    """Mean and std of a step in a flow's coordinates, as its paper writes it."""
    if step == "grpo":  # equation 9
        sigma = a * (t / (1 - torch.where(t == 1, u, t))).sqrt()
        drift = v + sigma**2 / (2 * t) * (x_t + (1 - t) * v)
        return x_t + drift * (u - t), torch.where(u > 0, sigma * (t - u).sqrt(), 0)
    x_0 = x_t - v * t
    x_1 = x_t + v * (1 - t)
    if step == "cps":
        share = torch.tensor(a * math.pi / 2)
        return (1 - u) * x_0 + u * share.cos() * x_1, u * share.sin()
    # Song et al. 2021, equation 16, of a model whose abar has this ratio of noise to signal
    abar, abar_prev = ((1 - s) ** 2 / ((1 - s) ** 2 + s**2) for s in (t, u))
    std = a * ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)).sqrt()
    mean = abar_prev.sqrt() * x_0 + (1 - abar_prev - std**2).clamp(min=0).sqrt() * x_1
    length = ((1 - u) ** 2 + u**2).sqrt()
    return mean * length, std * length


@pytest.mark.parametrize("step, given", [(step, given) for step in A for given in (0.0, 0.4)])
def test_latents_over_signal_plus_sigma_are_a_flow_of_v(step, given, tiniest_model):
    """Its level is sigma / (signal + sigma), and its step that of the paper, or of Euler."""
    policy, _ = make_policy(tiniest_model, step=step, steps=6, noise_level=given)
    timesteps = policy.scheduler.timesteps
    eps, x_t = torch.randn(2, 6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    abar = policy.pipe.scheduler.alphas_cumprod.double()
    before = abar[(timesteps - 1000 // 6).clamp(min=0)]  # the last one's is the final one
    (signal, sigma), (signal_u, sigma_u) = (
        torch.stack([a, 1 - a]).sqrt().view(2, -1, 1, 1, 1) for a in (abar[timesteps], before))
    t, u = sigma / (signal + sigma), sigma_u / (signal_u + sigma_u)
    y_t = x_t / (signal + sigma)
    v = eps - (x_t - sigma * eps) / signal
    mean, std = textbook(step, v, y_t, t, u, given or A[step])
    found = policy.mean_std(eps, timesteps, x_t)
    close(found[0] / (signal_u + sigma_u), mean)
    close(found[1] / (signal_u + sigma_u), std)

    policy.noise = 0.0
    euler = FlowMatchEulerDiscreteScheduler()
    euler.set_timesteps(sigmas=[*t.flatten().tolist(), u[-1].item()])
    mean, std = policy.mean_std(eps, timesteps, x_t)
    assert not std.any()
    for i in range(6):
        expected = euler.step(v[i].float(), euler.timesteps[i], y_t[i].float()).prev_sample
        close(mean[i] / (signal_u + sigma_u)[i].float(), expected, 1e-6)


# ---------------------------------------------------- Gaussians


def levels(own, n):
    """Stable Diffusion 3's own list of n noise levels, or that of 1, ..., 1/n, shifted."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    how = {"num_inference_steps": n} if own else {"sigmas": torch.linspace(1, 1 / n, n).tolist()}
    scheduler.set_timesteps(**how)
    return scheduler.sigmas.double()


def end(step, a, sigmas, mean_0, std_0):
    """Mean and std of what a flow of N(mean_0, std_0^2) draws with the exact v: all is affine."""
    mean, std = torch.zeros(()).double(), torch.ones(()).double()
    for t, u in zip(sigmas[:-1], sigmas[1:]):
        x_t = torch.stack([mean, mean + 1]).double()
        x_0 = mean_0 + (1 - t) * std_0**2 / ((1 - t) ** 2 * std_0**2 + t**2) * (
            x_t - (1 - t) * mean_0)
        eps = (x_t - (1 - t) * x_0) / t
        (mean, other), added = flow.step_mean_std(step, x_0, eps, t, u, a)
        std = (((other - mean) * std) ** 2 + added**2).sqrt()
    return mean.item(), std.item()


@pytest.mark.parametrize("step, a, own, one", [  # std of N(0.5, 0.3^2), of N(0, 0.05^2)
    ("ddim", 0.0, (0.179, 0.015), (0.185, 0.007)),
    ("grpo", 0.0, (0.179, 0.015), (0.185, 0.007)),
    ("cps", 0.0, (0.179, 0.015), (0.185, 0.007)),
    ("ddim", 1.0, (0.162, 0.011), (0.172, 0.007)),
    ("grpo", 0.7, (0.264, 0.239), (0.221, 0.009)),
    ("cps", 0.5, (0.171, 0.014), (0.178, 0.007)),
])  # fmt: skip
def test_gaussians_end_as_known_and_grain_stays_on_the_schedulers_own_list(step, a, own, one):
    """In 10 steps. The mean stays; details of std 0.05 lose much, but by Flow-GRPO on a list that
    ends in a large step and a tiny one they get 0.24."""
    for stds, sigmas in ((own, levels(True, 10)), (one, levels(False, 10))):
        for (mean_0, std_0), expected in zip(((0.5, 0.3), (0.0, 0.05)), stds):
            mean, std = end(step, a, sigmas, mean_0, std_0)
            assert mean == pytest.approx(mean_0, abs=1e-6)
            assert std == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("step, a, std", [
    ("ddim", 0.0, 0.299), ("ddim", 1.0, 0.296), ("grpo", 0.7, 0.299), ("cps", 0.5, 0.274),
])  # fmt: skip
def test_with_many_steps_all_but_cps_come_to_the_right_std(step, a, std):
    """0.3; the noise that Flow-CPS adds does not shrink with the step."""
    sigmas = levels(False, 1000)
    assert end(step, a, sigmas, 0.5, 0.3)[1] == pytest.approx(std, abs=6e-4)


# ---------------------------------------------------- Stable Diffusion 3


def test_its_levels_are_shifted_once_and_its_own_list_is_not_used(sd3):
    policy, _ = make_policy(sd3[False], steps=10)
    even = 1 - torch.arange(11) / 10
    sigmas = 3 * even / (1 + 2 * even)
    close(policy.levels[1], sigmas[:-1], 1e-6)
    close(policy.levels[3], sigmas[1:], 1e-6)
    close(policy.times, 1000 * sigmas[:-1], 1e-6)
    assert policy.trained_steps == list(range(9)), "the last one is deterministic"
    policy, _ = make_policy(sd3[False], steps=10, min_std=0.4)
    sigma, sigma_u = sigmas[:-1], sigmas[1:]
    std = sigma_u * (1 - ((1 - sigma) * sigma_u / ((1 - sigma_u) * sigma)) ** 2).sqrt()
    assert policy.trained_steps == (std > 0.4).nonzero().flatten().tolist()
    assert policy.trained_steps == list(range(7))


@torch.no_grad()
def plain_v(pipe, x_t, sigma, prompts, guidance):
    """What the plain pipeline's transformer says, with guidance."""
    words, no_words, pooled, not_pooled = pipe.encode_prompt(prompts, None, None, device="cpu")
    time = (1000 * sigma).expand(len(x_t))
    uncond = pipe.transformer(x_t, no_words, not_pooled, time).sample
    return uncond + guidance * (pipe.transformer(x_t, words, pooled, time).sample - uncond)


@pytest.mark.parametrize("step, t5", [("ddim", True), ("grpo", False), ("cps", True)])
def test_log_probabilities_are_those_of_torch_distributions(step, t5, sd3):
    policy, _ = make_policy(sd3[t5], step=step, t5=t5)
    pipe = plain_sd3(sd3[t5], t5)
    with ddpo.without_lora():
        samples = sampled(policy)
    sigmas = torch.cat([policy.levels[1], torch.zeros(1)])
    for j in range(3):
        t, u = sigmas[j], sigmas[j + 1]
        v = plain_v(pipe, samples.x[:, j], t, PROMPTS, 3.0)
        mean, std = textbook(step, v, samples.x[:, j], t, u, A[step])
        logp = Normal(mean, std).log_prob(samples.x[:, j + 1]).mean((1, 2, 3))
        close(samples.logp[:, j], logp)
        z = (samples.x[:, j + 1] - mean) / std
        assert abs(z.mean()) < 0.1 and abs(z.std() - 1) < 0.1
    assert not samples.logp[:, 3].any()
    v = plain_v(pipe, samples.x[:, 3], sigmas[3], PROMPTS, 3.0)
    close(samples.x[:, 4], samples.x[:, 3] - sigmas[3] * v)
    assert (samples.x[0, 4] - samples.x[3, 4]).abs().max() > 0.1, "two cats are two pictures"


def paint(policy, x_T):
    """The pictures of the ODE."""
    policy.noise = 0.0
    x, _ = ddpo.rollout(policy, ["cat", "bee"], x_T, None)
    return policy.decode(x[:, -1])


def paint_in_diffusers(pipe, x_T):
    how = {"sigmas": torch.linspace(1, 0.25, 4).tolist(), "guidance_scale": 3.0}
    prompts = ["cat", "bee"]
    return pipe(prompts, num_inference_steps=4, latents=x_T, output_type="pt", **how).images


@pytest.mark.parametrize("t5", [True, False])
def test_it_trains_and_its_lora_paints_in_plain_diffusers_what_it_painted_here(
    t5, sd3, tmp_path
):
    seen = []

    def update(run, samples, generator):
        seen.append(run)
        return ddpo.update(run, samples, generator)

    settings = flow.FlowSettings(**small_run(sd3[t5], steps=4, epochs=1, lr=0.1,
                                             out=tmp_path / "run"), t5=t5)  # fmt: skip
    ddpo.launch(settings, None, brightness, update, flow.FlowRun, flow.policy_of)
    start, row = read_metrics(tmp_path / "run")
    assert float(row["ratio_error"]) == 0 and float(row["grad_norm"]) > 0 and row["skipped"] == "0"
    run = seen[0]
    assert run.policy.noise == 1.0
    x_T = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = paint(run.policy, x_T[:2])
    pipe = plain_sd3(sd3[t5], t5)
    before = paint_in_diffusers(pipe, x_T[:2])
    pytest.importorskip("peft")
    pipe.load_lora_weights(str(tmp_path / "run"))
    after = paint_in_diffusers(pipe, x_T[:2])
    close(after, ours, 1e-4)
    assert (after - before).abs().max() > 0.01, "nothing was learned, so this shows nothing"

    names = {name.rpartition(".lora_")[0] for name in load_file(tmp_path / "run" / LORA)}
    blocks = [f"transformer.transformer_blocks.{i}.attn." for i in (0, 1)]
    parts = ("to_q", "to_k", "to_v", "to_out.0")
    assert names == {block + part for block in blocks for part in parts}
    assert (run.policy.pipe.text_encoder_3 is not None) == t5
    # Both evaluations are of the same prompts and noise; that of the ODE has no other.
    for column, noise in (("eval_ode", 0.0), ("eval_reward", 1.0)):
        run.policy.noise = noise
        generator, _ = ddpo.random_numbers(settings, 0, torch.device("cpu"))
        prompts = ddpo.load_prompts("")[:3]
        reward = ddpo.sample(run.policy, BRIGHTNESS, prompts, generator).scores[:, 0].mean()
        assert float(row[column]) == pytest.approx(reward.item(), rel=1e-5)
    assert start["eval_ode"] != start["eval_reward"]


def brightness(images, prompts):
    return images.mean((1, 2, 3))


@pytest.mark.parametrize("model, save_memory", [("SD3", False), ("SD3", True), ("SD", False)])
def test_the_ratio_is_exactly_one_before_an_update(model, save_memory, sd3, tiniest_model):
    size = {"steps": 3, "images_per_epoch": 2, "batch_size": 2}
    given = {"t5": True, "step": "grpo", "save_memory": save_memory, **size}
    policy, settings = make_policy(sd3[True] if model == "SD3" else tiniest_model, **given)
    for policy.dtype in (torch.float32, torch.bfloat16, torch.float16):
        samples = sampled(policy, 1.0, PROMPTS[1:3])
        metrics, moved = update_by_sgd(policy, settings, samples, lr=0.01)
        assert metrics["ratio_error"] == 0 and metrics["clip_fraction"] == 0
        assert moved.abs().max() > 0 or policy.dtype == torch.float16  # its scale overflows


def test_the_kl_is_in_nats(sd3):
    """Of Gaussians whose means differ by that of v, times what the step makes of it."""
    policy, _ = make_policy(sd3[False])
    x_t = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    cond = policy.encode(PROMPTS[:3])
    t = torch.tensor([0, 1, 2])
    sigma, sigma_u = policy.levels[[1, 3]][:, t]
    with torch.no_grad():
        v = policy.predict(x_t, t, cond)
        with ddpo.without_lora():
            pretrained = policy.predict(x_t, t, cond)
        found = ddpo.kl_to_pretrained(policy, v, x_t, t, cond)
    std = sigma_u * (1 - ((1 - sigma) * sigma_u / ((1 - sigma_u) * sigma)) ** 2).sqrt()
    factor = (sigma_u**2 - std**2).sqrt() * (1 - sigma) - (1 - sigma_u) * sigma
    expected = factor**2 * ((v - pretrained) ** 2).sum((1, 2, 3)) / (2 * std**2)
    close(found, expected, 1e-4)
    one, other = (Normal(policy.mean_std(out, t, x_t)[0], std.view(3, 1, 1, 1))
                  for out in (v, pretrained))  # fmt: skip
    close(found, kl_divergence(one, other).sum((1, 2, 3)), 1e-4)
    assert found.min() > 0.01


# ---------------------------------------------------- runs


def command(monkeypatch, *argv, file=flow.__file__):
    monkeypatch.setattr(sys, "argv", ["flow.py", *map(str, argv)])
    runpy.run_path(str(file), run_name="__main__")


def argv_of(model, out, **settings):
    size = {"steps": 3, "images_per_epoch": 4, "eval_images": 1}
    return [*as_flags(small_run(model, out=out, **{**size, **settings})), "--no-t5"]


def test_a_run_in_groups_with_a_monitor_is_resumed_bit_for_bit(sd3, tmp_path, monkeypatch):
    own = {"samples_per_prompt": 2, "monitor": "incompressibility", "kl_coef": 0.1, "step": "cps",
           "eval_every": 1}  # fmt: skip
    command(monkeypatch, *argv_of(sd3[False], tmp_path / "whole", **own))
    command(monkeypatch, *argv_of(sd3[False], tmp_path / "run", **own | {"epochs": 1}))
    begun = lora_bytes(tmp_path / "run")
    command(monkeypatch, "--resume", tmp_path / "run", "--epochs", 2)
    assert lora_bytes(tmp_path / "run") == lora_bytes(tmp_path / "whole") != begun
    rows = [read_metrics(tmp_path / name) for name in ("run", "whole")]
    for row in sum(rows, []):
        del row["seconds"], row["changed"]
    assert rows[0] == rows[1] and float(rows[0][2]["kl"]) != 0
    assert all(row["eval_ode"] for row in rows[0])
    reward, monitored = (float(rows[0][1][name]) for name in ("reward_mean", "incompressibility"))
    assert reward == pytest.approx(-monitored)
    config = json.loads((tmp_path / "run/config.json").read_text())
    own |= {"noise_level": 0.0, "t5": False, "model": str(sd3[False])}
    assert config | own == config and config["made_with"]["run_class"] == "FlowRun"


def test_kl_stop_ends_a_run(tiniest_model, tmp_path, monkeypatch, capsys):
    own = {"epochs": 5, "kl_stop": 0.5, "lr": 0.3, "step": "grpo"}
    command(monkeypatch, *argv_of(tiniest_model, tmp_path / "run", **own))
    rows = read_metrics(tmp_path / "run")
    assert len(rows) == 3 and float(rows[2]["kl"]) > 0.5 and rows[2]["eval_ode"] != ""
    assert "--kl-stop 0.5; its result is the last policy within" in capsys.readouterr().out


def test_several_gpus_take_it_by_the_edits_that_are_named(sd3, tmp_path, monkeypatch):
    source = (ddpo.EXAMPLES / "multi_gpu.py").read_text()
    for old, new in (
        ("import ddpo\n", "import ddpo\nimport flow\n"),
        ("SharedRun(ddpo.Run)", "SharedRun(flow.FlowRun)"),
        ("update, SharedRun)", "update, SharedRun, flow.policy_of)"),
        ("main(launch=launch, ", "main(launch=launch, kind=flow.FlowSettings, "),
    ):
        assert source.count(old) == 1
        source = source.replace(old, new)
    (tmp_path / "multi_flow.py").write_text(source)
    argv = argv_of(sd3[False], tmp_path / "run", epochs=1, step="cps")
    command(monkeypatch, *argv, file=tmp_path / "multi_flow.py")
    _, row = read_metrics(tmp_path / "run")
    assert float(row["eval_ode"]) != float(row["eval_reward"]) and float(row["ratio_error"]) == 0


# ---------------------------------------------------- bad input


def spoil(folder, part, name=None):
    """Take a weight out of the file of a part, or the part itself out of the index."""
    if name:
        file = folder / part / "diffusion_pytorch_model.safetensors"
        weights = load_file(file)
        del weights[name]
        save_file(weights, file, {"format": "pt"})
        return
    index = json.loads((folder / "model_index.json").read_text())
    index[part] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("argv, message", [
    ("--step sde", "step: ddim, grpo or cps"),
    ("--step cps --noise-level 1.5", "noise_level: at most 1"),
    ("--noise-level -1", "noise_level must be finite and at least 0"),
    ("--step grpo --noise-level nan", "noise_level must be finite"),
    ("--steps 1", "no step adds noise to learn from"),
    ("--min-std 9", "no step adds noise to learn from"),
    ("--t5", "lacks parts; without a T5, add --no-t5"),
    ("--model SPOILT", "lacks parts"),
    ("--model MADE_UP", "lacks proj_out.bias"),
    ("--model FLUX", "is a FluxPipeline"),
    ("--model /no/such/folder", "no such pipeline"),
    ("--eta 0", "unrecognized arguments: --eta 0"),
])  # fmt: skip
def test_a_mistake_is_one_line(argv, message, sd3, tmp_path, monkeypatch, capsys):
    model = sd3[False]
    if "SPOILT" in argv or "MADE_UP" in argv or "FLUX" in argv:
        model = shutil.copytree(model, tmp_path / argv.split()[1])
    if "SPOILT" in argv:
        spoil(model, "text_encoder_2")
    elif "MADE_UP" in argv:
        spoil(model, "transformer", "proj_out.bias")
    elif "FLUX" in argv:
        (model / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, *argv_of(model, tmp_path / "run"), *argv.split())
    lines = [line for line in capsys.readouterr().err.splitlines() if "[transformers]" not in line]
    assert end.value.code in (1, 2) and len(lines) == 1 and message in lines[0]
    assert lines[0].startswith("flow.py: error: ") and not (tmp_path / "run").exists()
