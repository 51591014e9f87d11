"""Proves that every kind of pipeline works from end to end, with a LoRA and in whole: its ratio is 1 before an update, only what
should be trained is, and what a run saves paints in plain diffusers, and in a run that starts from it, what it painted here."""

import contextlib
import inspect
import io
import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import BRIGHTNESS, make_policy, save_tiny_pipeline, tiny_unet
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DModel,
)
from safetensors.torch import load_file, save_file
from test_cli import failure
from test_train import flags, read_metrics
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import ddpo
import rewards

PROMPTS = ["cat", "horse", "bee"]
LORA = "pytorch_lora_weights.safetensors"

# ---------------------------------------------------------------- the kinds


def save_sd2(folder, **scheduler):
    """Like Stable Diffusion 2.1: v-prediction, linear projections, another number of heads in every block."""
    unet = tiny_unet(attention_head_dim=(2, 4), use_linear_projection=True)
    return save_tiny_pipeline(folder, unet, prediction_type="v_prediction", **scheduler)


def save_sdxl(folder, **config):
    """Like Stable Diffusion XL, with two text encoders of different width, but wider than high: 24 x 16 pixels."""
    sd = StableDiffusionPipeline.from_pretrained(save_tiny_pipeline(folder))
    text = {"vocab_size": 54, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "bos_token_id": 52,
            "max_position_embeddings": 12, "eos_token_id": 53, "pad_token_id": 53}  # fmt: skip
    torch.manual_seed(2)
    one = CLIPTextModel(CLIPTextConfig(hidden_size=16, projection_dim=16, **text))
    two = CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=24, projection_dim=20, **text))
    unet = tiny_unet(sample_size=(8, 12), cross_attention_dim=16 + 24, addition_embed_type="text_time", addition_time_embed_dim=8,
                     projection_class_embeddings_input_dim=6 * 8 + 20)  # fmt: skip
    euler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    parts = (sd.vae, one, two, sd.tokenizer, sd.tokenizer, unet, euler)
    StableDiffusionXLPipeline(*parts, add_watermarker=False, **config).save_pretrained(folder)


def save_pixels(folder, kind=DDPMPipeline, scheduler=None, **config):
    """An unconditional model of 32 x 32 pixels."""
    torch.manual_seed(0)
    defaults = {"sample_size": 32, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
                "attention_head_dim": 4, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}  # fmt: skip
    kind(UNet2DModel(**{**defaults, **config}), scheduler or DDPMScheduler()).save_pretrained(folder)


def save_google(folder):
    """As google/ddpm-celebahq-256 is on the hub: all files in one folder, and the attention's weights under their old names."""
    save_pixels(folder)
    for part in (folder / "unet", folder / "scheduler"):
        for path in list(part.iterdir()):
            path.rename(folder / path.name)
        part.rmdir()
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    for old, new in [("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")]:
        weights = {name.replace(f".{new}.", f".{old}."): weight for name, weight in weights.items()}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
KINDS = {  # how to save one, and how many of 3 steps are random
    "SD": (save_tiny_pipeline, 3),
    "SD 2.1": (save_sd2, 3),
    "SD 2.1, zero SNR": (lambda folder: save_sd2(folder, **ZERO_SNR), 3),
    "SDXL": (save_sdxl, 2),
    "SDXL, empty prompt": (lambda folder: save_sdxl(folder, force_zeros_for_empty_prompt=False), 2),
    "DDPM": (save_google, 2),
    "DDIM": (lambda folder: save_pixels(folder, DDIMPipeline, DDIMScheduler()), 2),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folders of tiny random pipelines of every kind."""
    folders = {kind: tmp_path_factory.mktemp("kinds") / kind for kind in KINDS}
    for kind, folder in folders.items():
        KINDS[kind][0](folder)
    return folders


RUNS = [(kind, rank) for kind in KINDS for rank in (4, 0) if not rank or "," not in kind]


@pytest.fixture(scope="module", params=RUNS, ids="{0[0]}, rank {0[1]}".format)
def run(request, models, tmp_path_factory):
    """Two epochs from the command line, with what they left: the policy in memory, the folder, what was printed."""
    (kind, rank), folder, made, train = request.param, tmp_path_factory.mktemp("run") / "run", [], ddpo.train
    argv = flags(models[kind], out=folder, lora_rank=rank, images_per_epoch=4, sample_batch=4, micro_batch=6, eval_images=4,
                 guidance_scale=3)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(ddpo, "train", lambda run, *rest: (made.append(run.policy), train(run, *rest)))
        ddpo.main(argv)
    return SimpleNamespace(kind=kind, rank=rank, folder=folder, model=models[kind], policy=made[0], said=said.getvalue())


# ---------------------------------------------------------------- pictures

ETA = 0.999  # at 1 and with zero SNR, rounding may leave diffusers the root of a negative number


def paint(policy):
    """The pictures of a policy."""
    x, _ = ddpo.rollout(policy, PROMPTS if policy.conditional else [""] * 3, ETA, torch.Generator().manual_seed(3))
    return policy.decode(x[:, -1])


def paint_in_diffusers(pipe, size):
    """The pictures of a plain pipeline with DDIM, which draws the same noise from the generator in the same order."""
    call = {"num_inference_steps": 3, "eta": ETA, "output_type": "np", "generator": torch.Generator().manual_seed(3)}
    if hasattr(pipe, "vae"):
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
        call |= {"prompt": PROMPTS, "guidance_scale": 3.0, "height": size[0], "width": size[1]}
    else:
        pipe, call["batch_size"] = DDIMPipeline(pipe.unet, pipe.scheduler), 3
    pipe.set_progress_bar_config(disable=True)
    return torch.from_numpy(pipe(**call).images).permute(0, 3, 1, 2)


def load_in_diffusers(run):
    """The result of a run as a plain pipeline. For an unconditional UNet diffusers has no LoRA: there it is merged by hand."""
    if not run.rank:
        return DiffusionPipeline.from_pretrained(run.folder / "pipeline")
    pipe = DiffusionPipeline.from_pretrained(run.model)
    if run.policy.conditional:
        pytest.importorskip("peft")
        pipe.load_lora_weights(str(run.folder))
        return pipe
    lora = load_file(run.folder / LORA)
    for name in [k.removesuffix(".lora_A.weight") for k in lora if k.endswith(".lora_A.weight")]:
        update = lora[f"{name}.lora_B.weight"] @ lora[f"{name}.lora_A.weight"]
        pipe.unet.get_submodule(name.removeprefix("unet.")).weight.data += update
    return pipe


# ---------------------------------------------------------------- every kind, with a LoRA and in whole


def test_the_ratio_is_one_before_an_update(run):
    steps = KINDS[run.kind][1]
    assert run.policy.trained_steps.tolist() == list(range(steps)) and f"{4 * steps} (image, step) pairs" in run.said
    for row in read_metrics(run.folder)[1:]:
        assert float(row["ratio_error"]) <= 1e-6 and row["skipped"] == "0" and float(row["grad_norm"]) > 0


@pytest.mark.parametrize("kind, rank", [("SDXL", 4), ("SDXL", 0), ("DDPM", 4), ("DDPM", 0)])
def test_the_ratio_is_one_in_half_precision(kind, rank, models):
    """Sampled in batches of 4 and 2 images, learned in batches of 5 pairs: only rounding may differ, far within the range."""
    policy, settings = make_policy(models[kind], lora_scale=0.5, lora_rank=rank, precision="bf16", sample_batch=4)
    prompts = [*PROMPTS, *PROMPTS] if policy.conditional else [""] * 6
    x, logp_old, _ = ddpo.sample(policy, BRIGHTNESS, prompts, settings, torch.Generator().manual_seed(0))
    samples = x, logp_old, policy.encode(prompts), torch.ones(6)
    metrics = ddpo.update(ddpo.Run(settings, policy), samples, torch.Generator().manual_seed(0))
    assert metrics["ratio_error"] <= policy.clip_range / 5 and metrics["clip_fraction"] == 0


def test_what_should_be_trained_is_and_nothing_else(run):
    """All of the UNet or only its LoRA, never the text encoders or the VAE; the file holds all that was trained."""
    before, given = DiffusionPipeline.from_pretrained(run.model).components, {id(p) for p in run.policy.weights}
    assert given == {id(p) for name, p in run.policy.unet.named_parameters() if ".lora_" in name or not run.rank}
    if run.rank:
        saved = load_file(run.folder / LORA)
        assert {tuple(w.shape)[k.endswith("lora_B.weight")] for k, w in saved.items()} == {run.rank}
        assert len(saved) == len(run.policy.weights) and all(w.abs().max() > 0 for w in saved.values())
        trained = {k: v for k, v in run.policy.unet.state_dict().items() if ".lora_" not in k}
        parts = {"unet": {k.replace(".base.", "."): v for k, v in trained.items()}}
    else:
        after = DiffusionPipeline.from_pretrained(run.folder / "pipeline").components
        parts = {name: part.state_dict() for name, part in after.items() if isinstance(part, torch.nn.Module)}
        assert type(before["scheduler"]) is type(after["scheduler"])
    for name, part in parts.items():
        pretrained = before[name].state_dict()
        assert part.keys() == pretrained.keys()
        changed = {k for k in part if not torch.equal(part[k], pretrained[k])}
        assert changed == (part.keys() if name == "unet" and not run.rank else set()), name


def test_the_result_paints_the_same_pictures_in_diffusers(run):
    ours = paint(run.policy)
    theirs = paint_in_diffusers(load_in_diffusers(run), ours.shape[2:])
    before = paint_in_diffusers(DiffusionPipeline.from_pretrained(run.model), ours.shape[2:])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert (theirs - before).abs().max() > 0.01, "nothing was learned, so the comparison shows nothing"


def test_a_run_starts_from_the_result_of_another(run):
    start = {"init_lora": run.folder / LORA} if run.rank else {"model": run.folder / "pipeline", "lora_rank": 0}
    settings, _, _ = ddpo.parse(flags(**{"model": run.model, "guidance_scale": 3, **start}))
    assert settings.lora_rank == run.rank
    torch.testing.assert_close(paint(ddpo.Policy(settings, torch.device("cpu"))), paint(run.policy), rtol=0, atol=1e-5)


def test_the_last_line_tells_how_to_open_the_result(run):
    how = f"from_pretrained('{run.folder / 'pipeline'}')" if not run.rank else f"load_lora_weights('{run.folder}')"
    if run.rank and not run.policy.conditional:
        how = f"--init-lora {run.folder / LORA}"
    assert how in run.said.splitlines()[-1]


# ---------------------------------------------------------------- without prompts


def test_without_prompts_there_is_no_guidance_no_vae_and_one_mean(models, tmp_path, monkeypatch):
    """Whatever --prompts and --guidance-scale say: one pass through the network for an image, the same prompt for all."""
    seen, rewarded, learned, rows, update = [], [], [], [], ddpo.update

    def watch(images, prompts):
        seen.append(images)
        rewarded.append(images.mean((1, 2, 3)))
        assert prompts == [""] * len(images)
        return rewarded[-1]

    def watched_update(run, samples, *rest):
        learned.append(samples)
        run.policy.unet.register_forward_pre_hook(lambda unet, args: rows.append(len(args[0])))
        return update(run, samples, *rest)

    monkeypatch.setitem(rewards.REWARDS, "watch", watch)
    monkeypatch.setattr(ddpo, "update", watched_update)
    ddpo.main(flags(models["DDPM"], out=tmp_path / "run", reward="watch", epochs=1, guidance_scale=7, micro_batch=4))
    (x, _, _, adv), images, reward = *learned, torch.cat(seen[3:6]), torch.cat(rewarded[3:6])  # after 3 batches of the first look
    torch.testing.assert_close(images, (x[:, -1] / 2 + 0.5).clamp(0, 1))
    assert images.shape == (8, 3, 32, 32) and images.min() < 0.1 and images.max() > 0.9
    torch.testing.assert_close(adv, (reward - reward.mean()) / reward.std(correction=0), rtol=1e-3, atol=1e-3)
    assert rows[:4] == [4] * 4 and json.loads((tmp_path / "run/config.json").read_text())["guidance_scale"] == 7


@pytest.mark.parametrize("rank, lr, margin", [(4, 0.02, 0.3), (0, 0.003, 1.0)])
def test_it_learns_without_prompts(rank, lr, margin, tmp_path, monkeypatch):
    """Brightness, of 8 x 8 pixels, so that the noise shows in it, and with attention in every block for the LoRA to train. Over
    seeds 0 to 5 the mean reward rose by 0.57 to 1.23 (LoRA) and 2.97 to 4.06 standard deviations of the first rewards; by chance
    alone it would change by 0.1."""
    monkeypatch.setitem(rewards.REWARDS, "brightness", lambda images, prompts: images.mean((1, 2, 3)))
    noisy = DDPMScheduler(num_train_timesteps=20, beta_start=0.2, beta_end=0.5)
    attention = {"down_block_types": ("AttnDownBlock2D",) * 2, "up_block_types": ("AttnUpBlock2D",) * 2, "attention_head_dim": 8}
    save_pixels(tmp_path / "model", scheduler=noisy, sample_size=8, **attention)
    batches = {"images_per_epoch": 256, "sample_batch": 256, "micro_batch": 256, "updates_per_epoch": 4, "eval_images": 2}
    learning = {"epochs": 6, "lr": lr, "clip_range": 0.02, "lora_rank": rank, "reward": "brightness"}
    ddpo.main(flags(tmp_path / "model", out=tmp_path / "run", **batches, **learning))
    _, first, *_, last = read_metrics(tmp_path / "run")
    assert float(last["reward_mean"]) - float(first["reward_mean"]) > margin * float(first["reward_std"])


# ---------------------------------------------------------------- the learning rate, the clip range


@pytest.mark.parametrize("argv, lr", [("", 3e-4), ("--lora-rank 8", 3e-4), ("--lora-rank 0", 1e-5), ("--lora-rank 0 --lr 2", 2)])
def test_the_default_learning_rate(argv, lr, tiny_model):
    assert ddpo.parse(["--model", tiny_model, *argv.split()])[0].lr == lr


def test_the_default_learning_rate_if_a_file_sets_the_rank(tmp_path):
    (tmp_path / "ddpo.json").write_text('{"lora_rank": 0}')
    assert ddpo.parse(["--model", str(tmp_path)])[0].lr == 1e-5
    assert ddpo.parse(["--model", str(tmp_path), "--lora-rank", "4"])[0].lr == 3e-4
    (tmp_path / "ddpo.json").write_text('{"lora_rank": 0, "lr": 0.5}')
    assert ddpo.parse(["--model", str(tmp_path)])[0].lr == 0.5


@pytest.mark.parametrize(
    "size, given, used", [(64, 0.0, 1e-4), (8, 0.0, 0.0064), ((8, 12), 0.0, 1.6384 / 384), (8, 0.02, 0.02), (64, 2e-4, 2e-4)]
)
def test_the_clip_range_is_the_same_in_nats_for_every_size(size, given, used, tmp_path):
    policy, _ = make_policy(save_tiny_pipeline(tmp_path / "model", tiny_unet(sample_size=size)), clip_range=given)
    assert policy.clip_range == pytest.approx(used, rel=1e-9)


@pytest.mark.parametrize("beyond, fraction", [(0.9, 0), (1.1, 1)])
def test_the_automatic_clip_range_clips(beyond, fraction, models):
    """With a ratio beyond the range, a positive advantage is clipped: there is no gradient."""
    policy, settings = make_policy(models["DDPM"])
    assert policy.clip_range == pytest.approx(1.6384 / (3 * 32 * 32), rel=1e-9)
    x, logp_old, _ = ddpo.sample(policy, BRIGHTNESS, [""] * 6, settings, torch.Generator().manual_seed(0))
    samples = x, logp_old - beyond * policy.clip_range, policy.encode([""] * 6), torch.ones(6)
    metrics = ddpo.update(ddpo.Run(settings, policy), samples, torch.Generator().manual_seed(0))
    assert metrics["clip_fraction"] == fraction and (metrics["grad_norm"] == 0) == fraction


# ---------------------------------------------------------------- --init-lora


def test_a_lora_that_diffusers_saved_is_the_same_here(tiny_model, tmp_path):
    """Its alpha is twice its rank: diffusers notes that in the file, and older versions of it lose it, for both alike."""
    peft = pytest.importorskip("peft")
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model)
    pipe.unet.add_adapter(peft.LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    torch.manual_seed(4)
    for name, weights in pipe.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.3)
    note = {"unet_lora_adapter_metadata": pipe.unet.peft_config["default"].to_dict()}
    note = note if note.keys() <= inspect.signature(pipe.save_lora_weights).parameters.keys() else {}
    pipe.save_lora_weights(tmp_path, peft.get_peft_model_state_dict(pipe.unet), **note)

    pipe, plain = (StableDiffusionPipeline.from_pretrained(tiny_model) for _ in range(2))
    pipe.load_lora_weights(str(tmp_path))
    settings, _, _ = ddpo.parse(flags(tiny_model, init_lora=tmp_path / LORA, guidance_scale=3))
    ours, theirs = paint(ddpo.Policy(settings, torch.device("cpu"))), paint_in_diffusers(pipe, (16, 16))
    assert settings.lora_rank == 3
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert (theirs - paint_in_diffusers(plain, (16, 16))).abs().max() > 0.01, "the LoRA does nothing"


def some_lora(path, only="", rank=4, **config):
    """A LoRA of ours for a UNet, or those of its layers whose name contains `only`."""
    unet = tiny_unet(**config)
    ddpo.add_lora(unet, rank)
    ddpo.save_lora(unet, path)
    save_file({k: v for k, v in load_file(path).items() if only in k}, path)


def two_ranks(path):
    some_lora(path)
    cut = {"to_q.lora_A.weight": (slice(3),), "to_q.lora_B.weight": (slice(None), slice(3))}
    parts = {k: v[cut.get(".".join(k.split(".")[-3:]), ())].contiguous() for k, v in load_file(path).items()}
    save_file(parts, path)


def one_more_layer(path):
    some_lora(path)
    save_file({**load_file(path), "unet.conv_in.lora_A.weight": torch.ones(4, 4)}, path)


@pytest.mark.parametrize(
    "make, more, message",
    [
        (lambda path: None, "", "not a file with a LoRA"),
        (lambda path: path.write_text("not safetensors"), "", "not a file with a LoRA"),
        (lambda path: save_file({"weight": torch.ones(2, 2)}, path), "", "not a file with a LoRA"),
        (two_ranks, "", "one rank"),
        (one_more_layer, "", "other layers .*conv_in"),
        (lambda path: some_lora(path, only="to_q"), "", "other layers .*to_"),
        (lambda path: some_lora(path, block_out_channels=(4, 8)), "", "does not fit this UNet"),
        (some_lora, "--lora-rank 5", "rank.* 4.* 5|rank.* 5.* 4"),
        (some_lora, "--lora-rank 0", "need a LoRA"),
    ],
    ids="missing|no safetensors|no LoRA|two ranks|one more layer|only queries|smaller UNet|another rank|whole".split("|"),
)
def test_a_lora_of_no_use(make, more, message, tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ddpo, "rollout", lambda *a, **k: pytest.fail("sampled before the mistake was found"))
    make(tmp_path / "lora.safetensors")
    run = flags(tiny_model, init_lora=tmp_path / "lora.safetensors", out=tmp_path / "run")
    line = failure(capsys, *run, *more.split())
    assert "--init-lora" in line and re.search(message, line) and "\n" not in line and not (tmp_path / "run").exists()


def test_a_model_without_attention_has_nothing_for_a_lora(tmp_path, capsys):
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "add_attention": False}
    save_pixels(tmp_path / "model", **blocks)
    assert re.search("no attention for a LoRA.*--lora-rank 0", failure(capsys, *flags(tmp_path / "model")))
    assert make_policy(tmp_path / "model", lora_rank=0)[0].weights
