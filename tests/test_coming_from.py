"""Proves that the page for those who come from elsewhere is short, names only settings, functions
and sections that are there, counts nats as ddpo.py does, and that its code runs as it stands: on a
reward function of TRL's kind, and on a LoRA file of ddpo-pytorch's."""

import dataclasses
import re
import shlex

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention

import ddpo
import rewards

PAGE = (ddpo.EXAMPLES / "coming_from.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
WRAPPER, LORA = BLOCKS


def test_it_is_short_and_the_wrapper_too():
    assert len(PAGE.split()) <= 700
    assert len(WRAPPER.strip().splitlines()) <= 10


def test_every_setting_in_it_is_there_and_takes_the_value():
    known = {"--" + f.name.replace("_", "-") for f in dataclasses.fields(ddpo.Settings)}
    named = set(re.findall(r"--[a-z][a-z-]*[a-z]", PAGE))
    assert len(named) > 15 and named - known - {"--resume"} == set()
    values = re.findall(r"`((?:--[a-z-]+ [\w.-]+ ?)+)`", PAGE.replace("--resume RUN", ""))
    values = [argv for argv in values if "FILE.py" not in argv]
    assert len(values) > 10
    for argv in values:
        ddpo.parse(["@examples/stable-diffusion.flags", *argv.split()])
    names = [*re.findall(r"ddpo\.([a-z_]+)\b(?!py)", PAGE.replace("ddpo.py", ""))]
    assert names and [name for name in names if not hasattr(ddpo, name)] == []
    assert hasattr(ddpo.Run, "record") and hasattr(ddpo.Run, "advantages")


def test_what_it_says_of_the_file_of_flags_is_so():
    settings, _ = ddpo.parse(["@examples/stable-diffusion.flags"])
    own = {"guidance_scale": 5, "adv_clip": 5, "min_std": 0, "samples_per_prompt": 1,
           "lora_rank": 4, "lr": 0, "clip_range": 0, "kl_stop": 0, "steps": 20}
    assert {name: getattr(settings, name) for name in own} == own


def test_the_example_is_the_run_that_it_translates():
    command = re.search(r"python ddpo\.py (.*?)\n\n", PAGE, re.DOTALL)[1].replace("\\\n", " ")
    settings, _ = ddpo.parse(shlex.split(command))
    theirs = re.search(r"8 GPUs,(.*?)So", PAGE, re.DOTALL)[1]
    sampled, batches, trained, accumulated = map(int, re.findall(r"` (\d)", theirs))
    gpus = 8
    assert settings.images_per_epoch == gpus * sampled * batches == 256
    assert settings.updates_per_epoch == 256 / (trained * gpus * accumulated) == 4
    assert settings.batch_size == trained


def test_nats_are_those_of_the_clip_range(tmp_path):
    rows = re.findall(r"^\| (\d+) x (\d+) x (\d+) \| ([\d,]+) \| ([\d.]+) nats \| (\S+) \|$", PAGE,
                      re.MULTILINE)
    assert len(rows) == 4
    for *shape, size, nats, same in rows:
        D = int(np.prod([int(side) for side in shape]))
        assert D == int(size.replace(",", ""))
        assert nats == f"{1e-4 * D:.2f}"
        assert float(same) == float(f"{1.6384 / D:.1e}")
    # In one step all dimensions of a latent move by the same: the mean moves by a D-th of the sum.
    mean, std, x = torch.randn(3, 2, 4, 16, 16).double()
    policy = type("Policy", (), {"mean_std": lambda self, output, t, x_t: (output, std.abs())})()
    logp = [ddpo.ddim_step(policy, m, None, None, x_prev=x)[1] for m in (mean, mean + 0.01)]
    joint = [torch.distributions.Normal(m.float(), std.abs().float()).log_prob(x).sum((1, 2, 3))
             for m in (mean, mean + 0.01)]
    assert torch.allclose((logp[1] - logp[0]) * 1024, joint[1] - joint[0], rtol=1e-3)


def trl_reward(images, prompts, metadata):
    """As TRL's documentation has them: the rewards, and a dict."""
    assert images.dtype == torch.float32 and images.shape[1] == 3
    assert isinstance(prompts, tuple) and isinstance(metadata, tuple)
    assert len(prompts) == len(metadata) == len(images)
    return images.mean((1, 2, 3)) + torch.tensor([float(m.get("bonus", 0)) for m in metadata]), {}


def numpy_reward(images, prompts, metadata):
    """As ddpo-pytorch has them: numpy, and integers."""
    levels = (images * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
    return np.array([int(level.max()) for level in levels]), {}


def test_the_wrapper_takes_a_reward_function_of_theirs_as_it_is():
    space = {}
    exec(WRAPPER, space)
    images, prompts = torch.rand(3, 3, 8, 8), ["a", "b", "c"]
    for theirs in (trl_reward, numpy_reward):
        terms = rewards.load_rewards(space["from_trl"](theirs))
        expected = torch.as_tensor(theirs(images, tuple(prompts), ({},) * 3)[0]).float()
        assert torch.equal(ddpo.score(terms, images, prompts)[:, 0], expected)
    with_bonus = space["from_trl"](trl_reward, lambda prompt: {"bonus": prompt == "b"})
    terms = rewards.load_rewards(with_bonus)
    more = ddpo.score(terms, images, prompts)[:, 0] - images.mean((1, 2, 3))
    assert torch.allclose(more, torch.tensor([0.0, 1.0, 0.0]), atol=1e-6)


def test_the_wrapper_works_from_the_command_line(tmp_path):
    theirs = "def theirs(images, prompts, metadata):\n    return images.mean((1, 2, 3)), {}\n"
    (tmp_path / "trl_rewards.py").write_text(f"{theirs}\n{WRAPPER}\nmine = from_trl(theirs)\n")
    terms = rewards.load_rewards(f"{tmp_path}/trl_rewards.py:mine")
    images = torch.rand(3, 3, 8, 8)
    assert torch.equal(ddpo.score(terms, images, ["a"] * 3)[:, 0], images.mean((1, 2, 3)))


def test_one_name_for_all_prompts_is_the_whole_batch():
    class WholeBatch(ddpo.Run):
        def advantages(self, prompts, rewards):
            return super().advantages([""] * len(prompts), rewards)

    settings = ddpo.Settings(samples_per_prompt=1, adv_clip=5.0)
    run = WholeBatch.__new__(WholeBatch)
    run.settings, run.memory = settings, {}
    for _ in range(2):  # nothing of the last epoch is left
        reward = torch.randn(64)
        adv = run.advantages(["a", "b"] * 32, reward)
        expected = (reward - reward.mean()) / reward.std(correction=0)
        assert torch.allclose(adv, expected, atol=1e-4)


def test_a_lora_file_of_ddpo_pytorch_loads(tmp_path, monkeypatch):
    """Its layers have the names that diffusers gave them in 2023, without the UNet's."""
    pytest.importorskip("peft")
    pipe = ddpo.load_pipeline(ddpo.Settings.model)
    layers, expected = {}, {}
    for name, layer in pipe.unet.named_modules():
        if isinstance(layer, Attention):
            projections = {"to_q": layer.to_q, "to_k": layer.to_k, "to_v": layer.to_v,
                           "to_out": layer.to_out[0]}
            for part, linear in projections.items():
                down, up = torch.randn(4, linear.in_features), torch.randn(linear.out_features, 4)
                layers[f"{name}.processor.{part}_lora.down.weight"] = down
                layers[f"{name}.processor.{part}_lora.up.weight"] = up
                expected[name, part] = linear.weight.detach() + up @ down
    torch.save(layers, tmp_path / "pytorch_lora_weights.bin")
    monkeypatch.chdir(tmp_path)
    exec(LORA, {"torch": torch, "pipe": pipe})
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    for (name, part), weight in expected.items():
        layer = pipe.unet.get_submodule(name)
        fused = layer.to_out[0] if part == "to_out" else getattr(layer, part)
        assert torch.allclose(fused.weight, weight, atol=1e-4)


def test_its_links_are_there():
    text = (ddpo.EXAMPLES / "README.md").read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(README\.md#([^)]+)\)", PAGE)
    assert len(links) == 2 and set(links) <= anchors
