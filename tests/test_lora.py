"""Proves that the LoRA starts without effect, that nothing else is trained, and that a file of ours
gives the same network in diffusers + peft as here, whatever is around the UNet."""

import pytest
import torch
from conftest import LORA, make_policy, tiny_unet
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import Attention
from safetensors.torch import load_file

import ddpo


def run_unet(unet):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 8, 8, generator=generator)
    cond = torch.randn(3, 12, 16, generator=generator)
    return unet(x, torch.tensor([1, 500, 999]), cond).sample


# ---------------------------------------------------- the layer


def test_it_is_around_every_attention_projection_and_begins_without_effect():
    unet = tiny_unet()
    before = run_unet(unet)
    attentions = [m for m in unet.modules() if isinstance(m, Attention)]
    pretrained = list(unet.requires_grad_(False).parameters())
    lora = ddpo.add_lora(unet, rank=4)
    assert torch.equal(run_unet(unet), before)
    layers = [m for m in unet.modules() if isinstance(m, ddpo.LoRALinear)]
    assert len(attentions) == 8
    assert len(layers) == 4 * len(attentions)
    assert all(unet.get_submodule(name) is layer for name, layer in lora.items())
    assert set(map(id, lora.values())) == set(map(id, layers))

    run_unet(unet).square().sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in pretrained)
    for layer in layers:
        A, B_T = layer.lora.grad.split([layer.base.in_features, layer.base.out_features], 1)
        assert A.abs().max() == 0 < B_T.abs().max(), "B is 0 yet"
    trained = {id(p) for p in unet.parameters() if p.requires_grad}
    assert trained == {id(layer.lora) for layer in layers}


def test_layer_is_a_low_rank_update_of_the_weights():
    base = torch.nn.Linear(10, 7)
    x = torch.randn(5, 10, generator=torch.Generator().manual_seed(0))
    layer = ddpo.LoRALinear(base, rank=2)
    torch.nn.init.normal_(layer.lora, generator=torch.Generator().manual_seed(1))
    update = layer.lora[:, 10:].T @ layer.lora[:, :10]
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
    torch.nn.init.normal_(layer.lora)
    x = torch.randn(6, 64, 320).to(dtype)
    if transposed:
        x = x.mT.contiguous().mT
    with torch.autocast("cpu", dtype):
        learning = layer(x)
        with torch.no_grad():
            sampling = layer(x)
    assert learning.requires_grad and not sampling.requires_grad
    assert torch.equal(learning, sampling)


# ---------------------------------------------------- the file


class Wrapped(torch.nn.Module):
    """Anything around a UNet, as torch.compile puts there."""

    def __init__(self, unet):
        super().__init__()
        self.inside = unet


@torch.no_grad()
def test_a_saved_lora_is_the_same_network_in_diffusers(tiny_model, tmp_path):
    """That it paints the same there: test_pipelines.py."""
    pytest.importorskip("peft")
    policy, _ = make_policy(tiny_model, lora_scale=0.5, lora_rank=7)
    ddpo.save_lora(policy, tmp_path / LORA)
    assert [p.name for p in tmp_path.iterdir()] == [LORA], "a temporary file was left"
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model)
    untrained = run_unet(pipe.unet)
    pipe.load_lora_weights(str(tmp_path))
    ours = run_unet(policy.unet)
    torch.testing.assert_close(run_unet(pipe.unet), ours, rtol=1e-4, atol=1e-5)
    assert (ours - untrained).abs().max() > 0.1, "the LoRA does nothing, so this shows nothing"


def test_names_in_the_file_are_those_of_the_layers_whatever_is_around(tiniest_model, tmp_path):
    policy, _ = make_policy(tiniest_model)
    names = {f"unet.{name}.{part}.weight" for name in policy.lora for part in ("lora_A", "lora_B")}
    ddpo.save_lora(policy, tmp_path / "before")
    policy.unet = Wrapped(policy.unet)
    ddpo.save_lora(policy, tmp_path / "after")
    assert load_file(tmp_path / "before").keys() == names
    assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes()
    policy.prefix = "transformer."
    ddpo.save_lora(policy, tmp_path / "other")
    renamed = {name.replace("unet.", "transformer.", 1) for name in names}
    assert load_file(tmp_path / "other").keys() == renamed
