"""Proves that every kind of pipeline works from end to end, with a LoRA and in whole: prompts are
encoded as by diffusers, the ratio is 1 before an update, only what should be trained is, and what a
run saves paints in plain diffusers, and as the model of another run, what it painted here."""

import functools
import json
import re
import shutil
from types import SimpleNamespace

import diffusers
import pytest
import torch
from conftest import (
    BETAS,
    LORA,
    TEXT,
    TINIEST,
    brightness,
    draw,
    failure,
    flags,
    launch,
    make_policy,
    make_settings,
    remember,
    sampled,
    save_tiny_pipeline,
    save_tiny_pixels,
    tiny_unet,
    update_by_sgd,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import ddpo

# ---------------------------------------------------- the kinds


def save_sd2(folder, **scheduler):
    """Like Stable Diffusion 2.1: v-prediction, linear projections, another number of heads in every
    block."""
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "mid_block_type": None,
              "up_block_types": ("UpBlock2D",) * 2}
    unet = tiny_unet(attention_head_dim=(2, 4), use_linear_projection=True, **blocks)
    save_tiny_pipeline(folder, unet, prediction_type="v_prediction", **scheduler)


def save_sdxl(folder):
    """Like Stable Diffusion XL, with two text encoders of different width, but wider than high: 24
    x 16 pixels."""
    sd = diffusers.StableDiffusionPipeline.from_pretrained(save_tiny_pipeline(folder))
    text = {**TEXT, "num_hidden_layers": 2}
    torch.manual_seed(2)
    one = CLIPTextModel(CLIPTextConfig(hidden_size=16, projection_dim=16, **text))
    two = CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=24, projection_dim=20, **text))
    unet = tiny_unet(**TINIEST, sample_size=(8, 12), cross_attention_dim=16 + 24,
                     addition_embed_type="text_time", addition_time_embed_dim=8,
                     projection_class_embeddings_input_dim=6 * 8 + 20)
    euler = diffusers.EulerDiscreteScheduler(steps_offset=1, **BETAS)
    parts = (sd.vae, one, two, sd.tokenizer, sd.tokenizer, unet, euler)
    pipe = diffusers.StableDiffusionXLPipeline(*parts, add_watermarker=False)
    pipe.save_pretrained(folder)


def save_google(folder):
    """As google/ddpm-celebahq-256 is on the hub: all files in one folder, and the attention's
    weights under their old names."""
    save_tiny_pixels(folder)
    for part in (folder / "unet", folder / "scheduler"):
        for path in list(part.iterdir()):
            path.rename(folder / path.name)
        part.rmdir()
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, old in old_names.items():
        weights = {name.replace(f".{new}.", f".{old}."): w for name, w in weights.items()}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})


ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
DDIM = {"kind": diffusers.DDIMPipeline, "scheduler": diffusers.DDIMScheduler()}
KINDS = {  # how to save one, and how many of 3 steps are random
    "SD": (lambda folder: save_tiny_pipeline(folder, tiny_unet(**TINIEST)), 3),
    "SD 2.1": (save_sd2, 3),
    "SD 2.1, zero SNR": (functools.partial(save_sd2, **ZERO_SNR), 3),
    "SDXL": (save_sdxl, 2),
    "DDPM": (save_google, 2),
    "DDIM": (functools.partial(save_tiny_pixels, **DDIM), 2),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folders of tiny random pipelines of every kind."""
    folders = {}
    for kind, (save, _) in KINDS.items():
        folders[kind] = tmp_path_factory.mktemp("kinds") / kind
        save(folders[kind])
    folder = shutil.copytree(folders["SDXL"], tmp_path_factory.mktemp("kinds") / "read")
    folders["SDXL, empty prompt"] = folder  # whose embeddings are read, not zeros
    index = json.loads((folder / "model_index.json").read_text())
    index["force_zeros_for_empty_prompt"] = False
    (folder / "model_index.json").write_text(json.dumps(index))
    return folders


# ---------------------------------------------------- prompts


@pytest.mark.parametrize("kind", ["SD", "SDXL", "SDXL, empty prompt"])
def test_a_prompt_is_encoded_as_by_diffusers_whatever_its_company(kind, models):
    policy, _ = make_policy(models[kind])
    first = policy.encode(["cat", "horse"])
    both = policy.encode(["bee", "horse", "cat", "a bee", "horse", "bee"])
    assert first.tolist() == [both[2], both[1]] and both[1] == both[4] and both[0] == both[5]
    assert len(set(both.tolist())) == 4
    assert policy.encode(["horse"]).tolist() == [both[1]]

    pipe = diffusers.DiffusionPipeline.from_pretrained(models[kind])
    tables = policy.tables
    assert len(tables) == (1 if kind == "SD" else 2), "XL has pooled embeddings, too"
    for prompt, row in zip(["bee", "horse", "cat", "a bee"], both):
        encoded = pipe.encode_prompt(prompt, device="cpu", num_images_per_prompt=1,
                                     do_classifier_free_guidance=True)  # fmt: skip
        for table, conditional, empty in zip(tables, encoded[::2], encoded[1::2]):
            assert torch.equal(table[row], torch.cat([empty, conditional]))
    for table in tables:  # they are not all the same
        assert len({str(row[1].tolist()) for row in table[both]}) == 4
        assert table[0, 0].any() == (kind != "SDXL"), "zeros stand for the empty prompt there"


# ---------------------------------------------------- the ratio


@pytest.mark.parametrize("rank", [4, 0])
@pytest.mark.parametrize("kind", ["SD", "SDXL", "DDPM"])
def test_the_ratio_is_exactly_one_before_an_update(kind, rank, models):
    """As many pairs are learned from at a time as images are sampled."""
    given = {"lora_scale": 0.5, "lora_rank": rank, "steps": 2, "batch_size": 2}
    policy, settings = make_policy(models[kind], **given)
    for policy.dtype in (torch.float32, torch.bfloat16, torch.float16):
        samples = sampled(policy, 1.0, ["cat", "horse"])
        metrics, moved = update_by_sgd(policy, settings, samples, lr=0.01)
        assert metrics["ratio_error"] == 0 and metrics["clip_fraction"] == 0
        assert moved.abs().max() > 0 or policy.dtype == torch.float16  # its first scales overflow


# ---------------------------------------------------- a run of every kind, with a LoRA and in whole


RUNS = [("SD", 4), ("SD 2.1", 4), ("SD 2.1, zero SNR", 4), ("SDXL", 4), ("DDPM", 4), ("DDIM", 4),
        ("SD", 0), ("SDXL", 0), ("DDPM", 0)]  # fmt: skip


@pytest.fixture(scope="module", params=RUNS, ids="{0[0]}, rank {0[1]}".format)
def run(request, models, tmp_path_factory):
    """An epoch of two updates, with what it left: the policy in memory, the rows, the folder."""
    kind, rank = request.param
    folder = tmp_path_factory.mktemp("run") / "run"
    seen = []
    given = {"epochs": 1, "images_per_epoch": 4, "eval_images": 1, "steps": 3, "lora_rank": rank}
    rows = launch(models[kind], folder, update=remember(seen), lr=0.05, **given)
    pretrained = diffusers.DiffusionPipeline.from_pretrained(models[kind])
    return SimpleNamespace(kind=kind, rank=rank, folder=folder, pretrained=pretrained, rows=rows,
                           policy=seen[0][0].policy)  # fmt: skip


ETA = 0.999  # at 1 and with zero SNR, rounding may leave diffusers the root of a negative number


def paint(policy):
    """The pictures of a policy."""
    prompts = ["cat", "horse", "bee"] if policy.conditional else [""] * 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ddpo, "ddim_mean_std", functools.partial(ddpo.ddim_mean_std, eta=ETA))
        x, _ = draw(policy, prompts, torch.Generator().manual_seed(3))
    return policy.decode(x[:, -1])


def paint_in_diffusers(pipe, size):
    """The pictures of a plain pipeline with DDIM, which draws the same noise from the generator in
    the same order."""
    generator = torch.Generator().manual_seed(3)
    call = {"num_inference_steps": 3, "eta": ETA, "output_type": "np", "generator": generator}
    if hasattr(pipe, "vae"):
        pipe.scheduler = diffusers.DDIMScheduler.from_config(
            pipe.scheduler.config, clip_sample=False
        )
        call |= {"prompt": ["cat", "horse", "bee"], "guidance_scale": 3.0}
        call |= {"height": size[0], "width": size[1]}
    else:
        pipe = diffusers.DDIMPipeline(pipe.unet, pipe.scheduler)
        call["batch_size"] = 3
    pipe.set_progress_bar_config(disable=True)
    return torch.from_numpy(pipe(**call).images).permute(0, 3, 1, 2)


def load_in_diffusers(run):
    """The result of a run as a plain pipeline. For an unconditional UNet diffusers has no LoRA:
    there it is merged by hand."""
    if not run.rank:
        return diffusers.DiffusionPipeline.from_pretrained(run.folder / "pipeline")
    pipe = run.pretrained
    if run.policy.conditional:
        pytest.importorskip("peft")
        pipe.load_lora_weights(str(run.folder))
        return pipe
    lora = load_file(run.folder / LORA)
    for key in lora:
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            layer = pipe.unet.get_submodule(name.removeprefix("unet."))
            layer.weight.data += lora[f"{name}.lora_B.weight"] @ lora[key]
    return pipe


def test_it_learns_from_the_steps_that_are_random_all_that_should_be_trained(run):
    """All of the UNet or only its LoRA, never the text encoders or the VAE; the file holds all that
    was trained."""
    assert run.policy.trained_steps == list(range(KINDS[run.kind][1]))
    _, row = run.rows
    assert float(row["ratio_error"]) <= 1e-6
    assert row["skipped"] == "0" and float(row["grad_norm"]) > 0

    before = run.pretrained.components
    trained = {id(p) for p in run.policy.weights}
    named = run.policy.unet.named_parameters()
    assert trained == {id(p) for name, p in named if name.endswith(".lora") or not run.rank}
    if run.rank:
        lora = load_file(run.folder / LORA)
        assert len(lora) == 2 * len(run.policy.weights) > 0
        for name, weights in lora.items():
            assert weights.abs().max() > 0
            assert weights.shape[1 if name.endswith("lora_B.weight") else 0] == run.rank
        after = run.policy.pipe.components
    else:
        after = diffusers.DiffusionPipeline.from_pretrained(run.folder / "pipeline").components
        assert type(before["scheduler"]) is type(after["scheduler"])
    for name, part in after.items():
        if isinstance(part, torch.nn.Module):
            weights = part.state_dict()
            weights = {k: w for k, w in weights.items() if not k.endswith(".lora")}
            weights = {k.replace(".base.", "."): w for k, w in weights.items()}
            pretrained = before[name].state_dict()
            assert weights.keys() == pretrained.keys()
            changed = {key for key in weights if not torch.equal(weights[key], pretrained[key])}
            assert changed == (weights.keys() if name == "unet" and not run.rank else set()), name


def test_the_result_paints_the_same_pictures_in_diffusers_and_as_a_model(run):
    ours = paint(run.policy)
    size = ours.shape[2:]
    before = paint_in_diffusers(run.pretrained, size)
    theirs = paint_in_diffusers(load_in_diffusers(run), size)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert (theirs - before).abs().max() > 0.01, "nothing was learned, so this shows nothing"
    if not run.rank:
        again, _ = make_policy(run.folder / "pipeline", steps=3)
        with ddpo.without_lora():
            torch.testing.assert_close(paint(again), ours, rtol=0, atol=1e-5)


# ---------------------------------------------------- without prompts


def test_without_prompts_there_is_no_guidance_no_vae_and_any_prompts_are_the_rewards(
    models, tmp_path, capsys
):
    pictures = []
    seen = []
    rows = []

    def watch(images, prompts):
        pictures.append((images, prompts))
        return images.mean((1, 2, 3))

    class Watched(ddpo.Policy):
        def prepare(self, settings):
            super().prepare(settings)
            self.unet.register_forward_pre_hook(lambda unet, args: rows.append(len(args[0])))

    (tmp_path / "prompts.txt").write_text("cat\nbee\n")
    given = {"steps": 3, "epochs": 1, "eval_images": 1, "prompts": tmp_path / "prompts.txt"}
    how = {"update": remember(seen), "parts": {"policy_class": Watched}}
    launch(models["DDPM"], tmp_path / "run", watch, **how, **given)
    _, samples = seen[0]
    images = torch.cat([part for part, _ in pictures[1:3]])
    prompts = pictures[1][1] + pictures[2][1]
    assert prompts == samples.prompts and set(prompts) == {"cat", "bee"}
    torch.testing.assert_close(images, (samples.x[:, -1] / 2 + 0.5).clamp(0, 1))
    assert images.shape == (8, 3, 16, 16) and images.min() < 0.1 and images.max() > 0.9
    assert max(rows) == 4
    argv = flags(models["DDPM"], out=tmp_path / "none", guidance_scale=7)
    assert "has no guidance" in failure(capsys, *argv)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("rank, lr", [(4, 0.02), (0, 0.004)])
def test_it_learns_without_prompts(rank, lr, tmp_path):
    """Brightness, of 8 x 8 pixels, so that the noise shows in it, and with attention in every block
    for the LoRA to train. Over seeds 0 to 5 the mean reward rose by 0.81 to 2.26 (LoRA) and 0.43 to
    1.80 standard deviations of the first rewards; by chance alone it would change by 0.13. One
    prompt, of which more images are drawn than a buffer holds, has one mean."""
    noisy = diffusers.DDPMScheduler(num_train_timesteps=20, beta_start=0.2, beta_end=0.5)
    blocks = {"up_block_types": ("AttnUpBlock2D",), "attention_head_dim": 8}
    model = save_tiny_pixels(tmp_path / "model", scheduler=noisy, sample_size=8, **blocks)
    seen = []
    batches = {"images_per_epoch": 128, "batch_size": 128, "eval_images": 1}
    learning = {"epochs": 4, "updates_per_epoch": 4, "lr": lr, "clip_range": 0.02}
    given = {"steps": 3, "lora_rank": rank, **batches, **learning}
    _, first, *_, last = launch(model, tmp_path / "run", brightness, remember(seen), **given)
    gain = float(last["reward_mean"]) - float(first["reward_mean"])
    assert gain > 0.4 * float(first["reward_std"])
    _, samples = seen[0]
    reward = samples.scores[:, 0]
    expected = (reward - reward.mean()) / reward.std(correction=0)
    torch.testing.assert_close(samples.adv, expected, rtol=1e-3, atol=1e-3)
    assert samples.prompts == [""] * 128


# ---------------------------------------------------- the learning rate, the clip range


@pytest.mark.parametrize("rank, given, used", [(4, 0, 3e-4), (0, 0, 1e-5), (0, 2, 2), (8, 2, 2)])
def test_the_default_learning_rate(rank, given, used):
    settings = make_settings("", lora_rank=rank, lr=given)
    weights = [torch.zeros(1, requires_grad=True)]
    policy = SimpleNamespace(weights=weights, dtype=torch.float32, device=torch.device("cpu"))
    assert ddpo.Run(settings, policy).optimizer.param_groups[0]["lr"] == used


@pytest.mark.parametrize(
    "kind, given, used",
    [("SD", 0.0, 1.6384 / 256), ("SDXL", 0.0, 1.6384 / 384), ("SDXL", 0.02, 0.02)],
)
def test_the_clip_range_is_the_same_in_nats_for_every_size(kind, given, used, models):
    """So 4 x 64 x 64 latents have the paper's 1e-4."""
    policy, _ = make_policy(models[kind], clip_range=given)
    assert policy.clip_range == pytest.approx(used, rel=1e-9)


def test_the_automatic_clip_range_clips(models):
    """With a ratio beyond the range, a positive advantage is clipped: there is no gradient."""
    policy, settings = make_policy(models["DDPM"])
    assert policy.clip_range == pytest.approx(1.6384 / (3 * 16 * 16), rel=1e-9)
    samples = sampled(policy, 1.0)
    logp = samples.logp
    for beyond, fraction in [(0.9, 0), (1.1, 1)]:
        samples.logp = logp - beyond * policy.clip_range
        metrics, _ = update_by_sgd(policy, settings, samples, lr=0.0)
        assert metrics["clip_fraction"] == fraction
        assert (metrics["grad_norm"] == 0) == fraction


def test_a_model_without_attention_has_nothing_for_a_lora(tmp_path, capsys):
    blocks = {"down_block_types": ("DownBlock2D",), "add_attention": False}
    save_tiny_pixels(tmp_path / "model", **blocks)
    line = failure(capsys, *flags(tmp_path / "model", out=tmp_path / "run"))
    assert re.search("no attention for a LoRA.*--lora-rank 0", line)
    assert not (tmp_path / "run").exists()
    assert make_policy(tmp_path / "model", lora_rank=0)[0].weights
