"""Proves that the LoRA starts without effect, that nothing else is trained, that a file of ours
gives the same network and pictures in diffusers + peft as here, and a file of theirs the same
pictures here as there; and that a file that would not is refused in one line."""

import inspect
import re

import pytest
import torch
from conftest import draw, failure, flags, make_policy, tiny_unet
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import Attention
from safetensors.torch import load_file, save_file

import ddpo

LORA = "pytorch_lora_weights.safetensors"
PROMPTS = ["cat", "horse", "bee"]


def run_unet(unet):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 8, 8, generator=generator)
    cond = torch.randn(3, 12, 16, generator=generator)
    return unet(x, torch.tensor([1, 500, 999]), cond).sample


# ---------------------------------------------------- the layer


def test_no_effect_at_the_start():
    unet = tiny_unet()
    before = run_unet(unet)
    ddpo.add_lora(unet, rank=4)
    assert torch.equal(run_unet(unet), before)


def test_every_attention_projection_and_nothing_else_is_trained():
    unet = tiny_unet()
    attentions = [m for m in unet.modules() if isinstance(m, Attention)]
    pretrained = list(unet.parameters())
    trained = ddpo.add_lora(unet, rank=4)
    layers = [m for m in unet.modules() if isinstance(m, ddpo.LoRALinear)]
    assert len(attentions) == 8
    assert len(layers) == 4 * len(attentions)

    run_unet(unet).square().sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in pretrained)
    assert all(layer.lora_B.weight.grad.abs().max() > 0 for layer in layers)
    own = [weights for layer in layers for weights in (layer.lora_A.weight, layer.lora_B.weight)]
    assert len(trained) == len(own)
    assert {id(p) for p in trained} == {id(p) for p in own}


def test_layer_is_a_low_rank_update_of_the_weights():
    base = torch.nn.Linear(10, 7)
    x = torch.randn(5, 10, generator=torch.Generator().manual_seed(0))
    layer = ddpo.LoRALinear(base, rank=2)
    torch.nn.init.normal_(layer.lora_B.weight, generator=torch.Generator().manual_seed(1))
    update = layer.lora_B.weight @ layer.lora_A.weight
    expected = torch.nn.functional.linear(x, base.weight + update, base.bias)
    torch.testing.assert_close(layer(x), expected)
    assert torch.linalg.matrix_rank(update) == 2
    with ddpo.without_lora():
        assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_layer_rounds_the_same_with_and_without_gradient(dtype, transposed):
    """Images are sampled without and learned from with it, and the ratio must be 1. The attention
    of a DDPM gives its layers transposed inputs."""
    torch.manual_seed(0)
    layer = ddpo.LoRALinear(torch.nn.Linear(320, 320).requires_grad_(False), rank=4)
    torch.nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(6, 64, 320).to(dtype)
    if transposed:
        x = x.mT.contiguous().mT
    with torch.autocast("cpu", dtype):
        learning = layer(x)
        with torch.no_grad():
            sampling = layer(x)
    assert learning.requires_grad and not sampling.requires_grad
    assert torch.equal(learning, sampling)


# ---------------------------------------------------- pictures, here and in diffusers


def paint(policy):
    x, _ = draw(policy, PROMPTS, torch.Generator().manual_seed(3))
    return policy.decode(x[:, -1])


def paint_in_diffusers(pipe):
    """diffusers draws the first latents and then the noise of each step from the generator, as
    `rollout` does."""
    call = {"num_inference_steps": 4, "eta": 1.0, "guidance_scale": 3.0, "output_type": "pt"}
    return pipe(PROMPTS, generator=torch.Generator().manual_seed(3), **call).images


def plain_pipeline(model):
    pipe = StableDiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def test_a_saved_lora_is_the_same_network_and_paints_the_same_in_diffusers(tiny_model, tmp_path):
    pytest.importorskip("peft")
    policy, _ = make_policy(tiny_model, lora_scale=0.5, lora_rank=7, guidance_scale=3.0)
    ddpo.save_lora(policy.unet, tmp_path / LORA)
    assert [p.name for p in tmp_path.iterdir()] == [LORA], "a temporary file was left"
    pipe = plain_pipeline(tiny_model)
    untrained = run_unet(pipe.unet)
    pictures = paint_in_diffusers(pipe)

    pipe.load_lora_weights(str(tmp_path))
    ours = run_unet(policy.unet)
    torch.testing.assert_close(run_unet(pipe.unet), ours, rtol=1e-4, atol=1e-5)
    assert (ours - untrained).abs().max() > 0.1, "the LoRA does nothing, so this shows nothing"
    ours = paint(policy)
    torch.testing.assert_close(ours, paint_in_diffusers(pipe), rtol=0, atol=1e-4)
    assert (ours - pictures).abs().max() > 0.01, "the LoRA does nothing, so this shows nothing"


def save_in_diffusers(model, folder, **config):
    """A LoRA of rank 3 made by peft and saved by diffusers, which notes in the file how peft scales
    it. Returns the pipeline."""
    peft = pytest.importorskip("peft")
    known = inspect.signature(StableDiffusionPipeline.save_lora_weights).parameters
    if "unet_lora_adapter_metadata" not in known:
        pytest.skip("this version of diffusers loses the scale, here and for itself")
    pipe = plain_pipeline(model)
    layers = ["to_q", "to_k", "to_v", "to_out.0"]
    pipe.unet.add_adapter(peft.LoraConfig(**{"r": 3, "target_modules": layers, **config}))
    torch.manual_seed(4)
    for name, weights in pipe.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.3)
    lora = peft.get_peft_model_state_dict(pipe.unet)
    about = pipe.unet.peft_config["default"].to_dict()
    pipe.save_lora_weights(folder, lora, unet_lora_adapter_metadata=about)
    return pipe


def test_a_lora_of_diffusers_paints_the_same_here(tiny_model, tmp_path):
    """A run that starts from it samples with it; this one's update learns nothing."""
    saved = save_in_diffusers(tiny_model, tmp_path / "lora", lora_alpha=3)
    seen = []

    def no_update(run, samples, generator):
        seen.append(run.policy)
        return {}

    start = {"init_lora": tmp_path / "lora" / LORA, "lora_rank": 3, "steps": 4, "epochs": 1}
    how = {"guidance_scale": 3, "images_per_epoch": 2, "eval_images": 1}
    settings, _ = ddpo.parse(flags(tiny_model, out=tmp_path / "run", **start, **how))
    ddpo.launch(settings, update=no_update)

    reloaded = plain_pipeline(tiny_model)
    without = paint_in_diffusers(reloaded)
    reloaded.load_lora_weights(str(tmp_path / "lora"))
    ours = paint(seen[0])
    torch.testing.assert_close(ours, paint_in_diffusers(saved), rtol=0, atol=1e-4)
    torch.testing.assert_close(ours, paint_in_diffusers(reloaded), rtol=0, atol=1e-4)
    assert (ours - without).abs().max() > 0.01, "the LoRA does nothing, so this shows nothing"


# ---------------------------------------------------- a file of no use


def refused(capsys, model, folder, *more):
    """The line with which a run ends that would start from the file in this folder."""
    argv = flags(model, init_lora=folder / LORA, out=folder / "run")
    line = failure(capsys, *argv, *more)
    assert "\n" not in line
    assert not (folder / "run").exists()
    return line


@pytest.fixture
def nothing_sampled(monkeypatch):
    def fail(*args):
        pytest.fail("sampled before the mistake was found")

    monkeypatch.setattr(ddpo, "rollout", fail)


OTHER_SCALES = {
    "twice the rank": {"lora_alpha": 6},
    "the square root of the rank": {"lora_alpha": 3, "use_rslora": True},
    "one layer": {"lora_alpha": 3, "alpha_pattern": {"to_q": 6}},
}


@pytest.mark.parametrize("config", OTHER_SCALES.values(), ids=OTHER_SCALES)
def test_a_lora_of_another_scale(config, tiny_model, tmp_path, capsys, nothing_sampled):
    """Loaded as if its alpha were its rank, it would be another model."""
    save_in_diffusers(tiny_model, tmp_path, **config)
    line = refused(capsys, tiny_model, tmp_path, "--lora-rank=3")
    assert f"--init-lora {tmp_path / LORA}: no LoRA of this model" in line
    assert "whose rank and alpha are 3" in line
    assert "scales" in line


def some_lora(path, only="", rank=4, **config):
    """A LoRA of ours for a UNet, or those of its layers whose name contains `only`."""
    unet = tiny_unet(**config)
    ddpo.add_lora(unet, rank)
    ddpo.save_lora(unet, path)
    save_file({k: v for k, v in load_file(path).items() if only in k}, path)


def two_ranks(path):
    some_lora(path)
    lora = load_file(path)
    for name, weights in lora.items():
        if name.endswith("to_q.lora_A.weight"):
            lora[name] = weights[:3].contiguous()
        elif name.endswith("to_q.lora_B.weight"):
            lora[name] = weights[:, :3].contiguous()
    save_file(lora, path)


def one_more_layer(path):
    some_lora(path)
    save_file({**load_file(path), "unet.conv_in.lora_A.weight": torch.ones(4, 4)}, path)


def alpha_beside_each_layer(path):
    """The layout of other trainers."""
    some_lora(path)
    lora = load_file(path)
    for name in list(lora):
        if name.endswith("lora_A.weight"):
            lora[name.replace("lora_A.weight", "alpha")] = torch.tensor(8.0)
    save_file(lora, path)


USELESS = {
    "missing": (lambda path: None, "", "no LoRA of this model"),
    "no safetensors": (lambda path: path.write_text("text"), "", "no LoRA of this model"),
    "no LoRA": (lambda path: save_file({"w": torch.ones(2)}, path), "", "no LoRA of this model"),
    "two ranks": (two_ranks, "", "no LoRA of this model"),
    "one more layer": (one_more_layer, "", "other layers, see .*conv_in"),
    "an alpha for each layer": (alpha_beside_each_layer, "", "other layers, see .*alpha"),
    "only queries": (lambda path: some_lora(path, only="to_q"), "", "other layers, see .*to_"),
    "a smaller UNet": (lambda path: some_lora(path, block_out_channels=(4, 8)), "", "no LoRA of"),
    "another rank": (some_lora, "--lora-rank 5", "rank and alpha are 5"),
    "no LoRA wanted": (some_lora, "--lora-rank 0", "init_lora need a LoRA"),
}


@pytest.mark.parametrize("make, more, message", USELESS.values(), ids=USELESS)
def test_a_lora_of_no_use(make, more, message, tiny_model, tmp_path, capsys, nothing_sampled):
    make(tmp_path / LORA)
    line = refused(capsys, tiny_model, tmp_path, *more.split())
    assert "init_lora" in line or f"--init-lora {tmp_path / LORA}" in line
    assert re.search(message, line)
