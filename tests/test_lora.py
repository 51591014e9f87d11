"""Proves that the LoRA starts without effect, that nothing else is trained, and that the saved file gives the same network
and the same pictures in diffusers + peft as here, so that a run's result is usable without this project."""

import pytest
import torch
from conftest import make_policy, tiny_unet
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import Attention

import ddpo


def run_unet(unet, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, cond = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 12, 16, generator=generator)
    return unet(x, torch.tensor([1, 500, 999]), cond).sample


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
    assert len(attentions) == 8 and len(layers) == 4 * len(attentions) and len(trained) == 2 * len(layers)

    run_unet(unet).square().sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in pretrained)
    assert all(layer.lora_B.weight.grad.abs().max() > 0 for layer in layers)
    assert {id(p) for p in trained} == {id(p) for layer in layers for p in (layer.lora_A.weight, layer.lora_B.weight)}


def test_layer_is_a_low_rank_update_of_the_weights():
    base, x = torch.nn.Linear(10, 7), torch.randn(5, 10, generator=torch.Generator().manual_seed(0))
    layer = ddpo.LoRALinear(base, rank=2)
    torch.nn.init.normal_(layer.lora_B.weight, generator=torch.Generator().manual_seed(1))
    update = layer.lora_B.weight @ layer.lora_A.weight
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, base.weight + update, base.bias))
    assert torch.linalg.matrix_rank(update) == 2


@pytest.fixture(scope="module", params=[4, 7])
def trained_and_reloaded(request, tiny_model, tmp_path_factory):
    """A policy whose LoRA does something, and a plain diffusers pipeline that loaded it from the run folder."""
    pytest.importorskip("peft")
    policy, _ = make_policy(tiny_model, lora_scale=0.5, lora_rank=request.param, guidance_scale=3.0)
    run = tmp_path_factory.mktemp("run")
    ddpo.save_lora(policy.unet, run / "pytorch_lora_weights.safetensors")
    assert [p.name for p in run.iterdir()] == ["pytorch_lora_weights.safetensors"], "a temporary file was left"
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model)
    pipe.set_progress_bar_config(disable=True)
    untrained = run_unet(pipe.unet)
    pipe.load_lora_weights(str(run))
    return policy, pipe, untrained


@torch.no_grad()
def test_saved_lora_is_the_same_network_in_diffusers(trained_and_reloaded):
    policy, pipe, untrained = trained_and_reloaded
    ours = run_unet(policy.unet)
    torch.testing.assert_close(run_unet(pipe.unet), ours, rtol=1e-4, atol=1e-5)
    assert (ours - untrained).abs().max() > 0.1, "the LoRA does nothing, so the comparison shows nothing"


def test_saved_lora_paints_the_same_pictures_in_diffusers(trained_and_reloaded):
    """diffusers draws the first latents and then the noise of each step from the generator, as `rollout` does."""
    policy, pipe, _ = trained_and_reloaded
    prompts = ["cat", "horse", "bee"]
    x, _ = ddpo.rollout(policy, prompts, 1.0, torch.Generator().manual_seed(3))
    call = {"num_inference_steps": 4, "eta": 1.0, "guidance_scale": 3.0, "output_type": "pt"}
    theirs = pipe(prompts, generator=torch.Generator().manual_seed(3), **call).images
    torch.testing.assert_close(policy.decode(x[:, -1]), theirs, rtol=0, atol=1e-4)
    pipe.disable_lora()
    without = pipe(prompts, generator=torch.Generator().manual_seed(3), **call).images
    pipe.enable_lora()
    assert (without - theirs).abs().max() > 0.01, "the LoRA does nothing, so the comparison shows nothing"
