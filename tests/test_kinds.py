"""Proves that every kind of pipeline works from end to end, with a LoRA and in whole: prompts are
encoded as by diffusers, the ratio is 1 before an update, only what should be trained is, and what a
run saves paints in plain diffusers, and in a run that starts from it, what it painted here."""

import functools
import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    BRIGHTNESS,
    TINIEST,
    brightness,
    draw,
    failure,
    flags,
    make_policy,
    read_metrics,
    save_tiny_pipeline,
    save_tiny_pixels,
    tiny_unet,
)
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import ddpo

PROMPTS = ["cat", "horse", "bee"]
LORA = "pytorch_lora_weights.safetensors"

# ---------------------------------------------------- the kinds


def save_sd(folder):
    save_tiny_pipeline(folder, tiny_unet(**TINIEST))


def save_sd2(folder, **scheduler):
    """Like Stable Diffusion 2.1: v-prediction, linear projections, another number of heads in every
    block."""
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "mid_block_type": None,
        "up_block_types": ("UpBlock2D",) * 2,
    }
    unet = tiny_unet(attention_head_dim=(2, 4), use_linear_projection=True, **blocks)
    save_tiny_pipeline(folder, unet, prediction_type="v_prediction", **scheduler)


def save_sd2_zero_snr(folder):
    save_sd2(folder, rescale_betas_zero_snr=True, timestep_spacing="trailing")


def save_sdxl(folder, **config):
    """Like Stable Diffusion XL, with two text encoders of different width, but wider than high:
    24 x 16 pixels."""
    sd = StableDiffusionPipeline.from_pretrained(save_tiny_pipeline(folder))
    text = {
        "vocab_size": 54,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 12,
        "bos_token_id": 52,
        "eos_token_id": 53,
        "pad_token_id": 53,
    }
    torch.manual_seed(2)
    one = CLIPTextModel(CLIPTextConfig(hidden_size=16, projection_dim=16, **text))
    two = CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=24, projection_dim=20, **text))
    unet = tiny_unet(
        **TINIEST,
        sample_size=(8, 12),
        cross_attention_dim=16 + 24,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 20,
    )
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    euler = EulerDiscreteScheduler(steps_offset=1, **betas)
    parts = (sd.vae, one, two, sd.tokenizer, sd.tokenizer, unet, euler)
    pipe = StableDiffusionXLPipeline(*parts, add_watermarker=False, **config)
    pipe.save_pretrained(folder)


def save_sdxl_with_empty_prompt(folder):
    """The empty prompt's embeddings are those of a text encoder, not zeros."""
    save_sdxl(folder, force_zeros_for_empty_prompt=False)


def save_ddim(folder):
    save_tiny_pixels(folder, DDIMPipeline, DDIMScheduler())


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


KINDS = {  # how to save one, and how many of 3 steps are random
    "SD": (save_sd, 3),
    "SD 2.1": (save_sd2, 3),
    "SD 2.1, zero SNR": (save_sd2_zero_snr, 3),
    "SDXL": (save_sdxl, 2),
    "SDXL, empty prompt": (save_sdxl_with_empty_prompt, 2),
    "DDPM": (save_google, 2),
    "DDIM": (save_ddim, 2),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folders of tiny random pipelines of every kind."""
    folders = {}
    for kind, (save, _) in KINDS.items():
        folders[kind] = tmp_path_factory.mktemp("kinds") / kind
        save(folders[kind])
    return folders


# ---------------------------------------------------- prompts


@pytest.mark.parametrize("kind", ["SD", "SDXL", "SDXL, empty prompt"])
def test_a_prompt_is_encoded_as_by_diffusers_whatever_its_company(kind, models):
    policy, _ = make_policy(models[kind])
    first = policy.encode(["cat", "horse"])
    both = policy.encode(["bee", "horse", "cat", "a bee", "horse", "bee"])
    assert first.tolist() == [both[2], both[1]] and both[1] == both[4] and both[0] == both[5]
    assert len(set(both.tolist())) == 4 and 0 not in both
    assert policy.encode(["horse"]).tolist() == [both[1]]

    pipe = DiffusionPipeline.from_pretrained(models[kind])
    tables = policy.table
    assert len(tables) == (1 if kind == "SD" else 2), "XL has pooled embeddings, too"
    for prompt, row in zip(["bee", "horse", "cat", "a bee"], both):
        encoded = pipe.encode_prompt(prompt, device="cpu", num_images_per_prompt=1,
                                     do_classifier_free_guidance=True)  # fmt: skip
        for table, conditional, empty in zip(tables, encoded[::2], encoded[1::2]):
            assert torch.equal(table[row], conditional[0])
            assert torch.equal(table[0], empty[0])
    for table in tables:  # they are not all the same
        assert len({str(row.tolist()) for row in table[both]}) == 4
        assert table[0].any() == (kind != "SDXL"), "zeros stand for the empty prompt there"


# ---------------------------------------------------- the ratio


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("rank", [4, 0])
@pytest.mark.parametrize("kind", ["SD", "SDXL", "DDPM"])
def test_the_ratio_is_exactly_one_before_an_update(kind, rank, precision, models):
    """As many pairs are learned from at a time as images are sampled, which is the default."""
    small = {"steps": 2, "images_per_epoch": 4, "sample_batch": 4, "micro_batch": 0, "eta": 0.5}
    given = {"lora_rank": rank, "precision": precision, **small}
    policy, settings = make_policy(models[kind], lora_scale=0.5, **given)
    prompts = ["cat", "horse", "bee", "cat"] if policy.conditional else [""] * 4
    generator = torch.Generator().manual_seed(0)
    x, logp_old, _ = ddpo.sample(policy, BRIGHTNESS, prompts, 4, generator)
    samples = (x, logp_old, policy.encode(prompts), torch.ones(4))
    metrics = ddpo.update(ddpo.Run(settings, policy), samples, torch.Generator().manual_seed(0))
    assert metrics["ratio_error"] == 0 and metrics["clip_fraction"] == 0


# ---------------------------------------------------- a run of every kind, with a LoRA and in whole


RUNS = [(kind, rank) for kind in KINDS for rank in (4, 0) if not rank or "," not in kind]


@pytest.fixture(scope="module", params=RUNS, ids="{0[0]}, rank {0[1]}".format)
def run(request, models, tmp_path_factory):
    """Two epochs from the command line, with what they left: the policy in memory, the folder."""
    kind, rank = request.param
    folder = tmp_path_factory.mktemp("run") / "run"
    policies = []

    def update(run, samples, generator):
        policies.append(run.policy)
        return ddpo.update(run, samples, generator)

    batches = {"images_per_epoch": 4, "sample_batch": 4, "micro_batch": 6, "eval_images": 1}
    more = {"steps": 3, "guidance_scale": 3, "lora_rank": rank, "lr": 0.05, "save_every": 9}
    settings, _ = ddpo.parse(flags(models[kind], out=folder, **batches, **more))
    ddpo.launch(settings, update=update)
    return SimpleNamespace(
        kind=kind, rank=rank, folder=folder, model=models[kind], policy=policies[0]
    )


ETA = 0.999  # at 1 and with zero SNR, rounding may leave diffusers the root of a negative number


def paint(policy):
    """The pictures of a policy."""
    policy.eta = ETA
    prompts = PROMPTS if policy.conditional else [""] * 3
    x, _ = draw(policy, prompts, torch.Generator().manual_seed(3))
    return policy.decode(x[:, -1])


def paint_in_diffusers(pipe, size):
    """The pictures of a plain pipeline with DDIM, which draws the same noise from the generator in
    the same order."""
    generator = torch.Generator().manual_seed(3)
    call = {"num_inference_steps": 3, "eta": ETA, "output_type": "np", "generator": generator}
    if hasattr(pipe, "vae"):
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
        call |= {"prompt": PROMPTS, "guidance_scale": 3.0, "height": size[0], "width": size[1]}
    else:
        pipe = DDIMPipeline(pipe.unet, pipe.scheduler)
        call["batch_size"] = 3
    pipe.set_progress_bar_config(disable=True)
    return torch.from_numpy(pipe(**call).images).permute(0, 3, 1, 2)


@functools.cache
def pretrained_pictures(model, size):
    return paint_in_diffusers(DiffusionPipeline.from_pretrained(model), size)


def load_in_diffusers(run):
    """The result of a run as a plain pipeline. For an unconditional UNet diffusers has no LoRA:
    there it is merged by hand."""
    if not run.rank:
        return DiffusionPipeline.from_pretrained(run.folder / "pipeline")
    pipe = DiffusionPipeline.from_pretrained(run.model)
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


def test_it_learns_from_the_steps_that_are_random(run):
    steps = KINDS[run.kind][1]
    assert run.policy.trained_steps.tolist() == list(range(steps))
    for row in read_metrics(run.folder)[1:]:
        assert float(row["ratio_error"]) <= 1e-6
        assert row["skipped"] == "0" and float(row["grad_norm"]) > 0


def test_what_should_be_trained_is_and_nothing_else(run):
    """All of the UNet or only its LoRA, never the text encoders or the VAE; the file holds all that
    was trained."""
    before = DiffusionPipeline.from_pretrained(run.model).components
    trained = {id(p) for p in run.policy.weights}
    named = run.policy.unet.named_parameters()
    assert trained == {id(p) for name, p in named if ".lora_" in name or not run.rank}
    if run.rank:
        lora = load_file(run.folder / LORA)
        assert len(lora) == len(run.policy.weights)
        for name, weights in lora.items():
            assert weights.abs().max() > 0
            assert weights.shape[1 if name.endswith("lora_B.weight") else 0] == run.rank
        unet = {}
        for name, weights in run.policy.unet.state_dict().items():
            if ".lora_" not in name:
                unet[name.replace(".base.", ".")] = weights
        parts = {"unet": unet}
    else:
        after = DiffusionPipeline.from_pretrained(run.folder / "pipeline").components
        assert type(before["scheduler"]) is type(after["scheduler"])
        parts = {}
        for name, part in after.items():
            if isinstance(part, torch.nn.Module):
                parts[name] = part.state_dict()
    for name, part in parts.items():
        pretrained = before[name].state_dict()
        assert part.keys() == pretrained.keys()
        changed = {key for key in part if not torch.equal(part[key], pretrained[key])}
        expected = part.keys() if name == "unet" and not run.rank else set()
        assert changed == expected, name


def test_the_result_paints_the_same_pictures_in_diffusers(run):
    ours = paint(run.policy)
    size = ours.shape[2:]
    theirs = paint_in_diffusers(load_in_diffusers(run), size)
    before = pretrained_pictures(run.model, size)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert (theirs - before).abs().max() > 0.01, "nothing was learned, so this shows nothing"


def test_a_run_starts_from_the_result_of_another(run):
    """From its LoRA, or from its pipeline as the model."""
    given = {"model": run.model, "steps": 3, "guidance_scale": 3, "lora_rank": run.rank}
    if run.rank:
        given["init_lora"] = run.folder / LORA
    else:
        given["model"] = run.folder / "pipeline"
    settings, _ = ddpo.parse(flags(**given))
    policy = ddpo.Policy(settings, torch.device("cpu"))
    if run.rank:
        ddpo.load_lora(policy.unet, settings.lora_rank, settings.init_lora)
    torch.testing.assert_close(paint(policy), paint(run.policy), rtol=0, atol=1e-5)


# ---------------------------------------------------- without prompts


def test_without_prompts_there_is_no_guidance_no_vae_and_one_mean(models, tmp_path):
    """Whatever --prompts and --guidance-scale say: one pass through the network for an image, the
    same prompt for all."""
    pictures = []
    scores = []
    learned = []
    rows = []

    def watch(images, prompts):
        assert prompts == [""] * len(images)
        pictures.append(images)
        scores.append(images.mean((1, 2, 3)))
        return scores[-1]

    def update(run, samples, generator):
        learned.append(samples)
        run.policy.unet.register_forward_pre_hook(lambda unet, args: rows.append(len(args[0])))
        return ddpo.update(run, samples, generator)

    small = {"images_per_epoch": 8, "sample_batch": 4, "micro_batch": 4, "eval_images": 1}
    more = {"steps": 3, "epochs": 1, "guidance_scale": 7, "prompts": "animals"}
    settings, _ = ddpo.parse(flags(models["DDPM"], out=tmp_path / "run", **small, **more))
    ddpo.launch(settings, reward=watch, update=update)
    (x, _, _, adv), images, reward = learned[0], torch.cat(pictures[1:3]), torch.cat(scores[1:3])
    torch.testing.assert_close(images, (x[:, -1] / 2 + 0.5).clamp(0, 1))
    assert images.shape == (8, 3, 16, 16) and images.min() < 0.1 and images.max() > 0.9
    expected = (reward - reward.mean()) / reward.std(correction=0)
    torch.testing.assert_close(adv, expected, rtol=1e-3, atol=1e-3)
    assert set(rows[:4]) == {4}
    assert json.loads((tmp_path / "run/config.json").read_text())["guidance_scale"] == 7


@pytest.mark.parametrize("rank, lr, margin", [(4, 0.02, 0.3), (0, 0.003, 1.0)])
def test_it_learns_without_prompts(rank, lr, margin, tmp_path):
    """Brightness, of 8 x 8 pixels, so that the noise shows in it, and with attention in every block
    for the LoRA to train. Over seeds 0 to 5 the mean reward rose by 0.69 to 3.58 (LoRA) and 1.49 to
    3.30 standard deviations of the first rewards; by chance alone it would change by 0.2."""
    noisy = DDPMScheduler(num_train_timesteps=20, beta_start=0.2, beta_end=0.5)
    blocks = {"up_block_types": ("AttnUpBlock2D",), "attention_head_dim": 8}
    model = tmp_path / "model"
    save_tiny_pixels(model, scheduler=noisy, sample_size=8, **blocks)
    batches = {"images_per_epoch": 128, "sample_batch": 128, "micro_batch": 128, "eval_images": 1}
    learning = {"epochs": 6, "updates_per_epoch": 4, "lr": lr, "clip_range": 0.02, "save_every": 9}
    given = {"steps": 3, "lora_rank": rank, **batches, **learning}
    settings, _ = ddpo.parse(flags(model, out=tmp_path / "run", **given))
    ddpo.launch(settings, reward=brightness)
    _, first, *_, last = read_metrics(tmp_path / "run")
    gain = float(last["reward_mean"]) - float(first["reward_mean"])
    assert gain > margin * float(first["reward_std"])


# ---------------------------------------------------- the learning rate, the clip range


@pytest.mark.parametrize(
    "argv, lr",
    [
        ("", 3e-4),
        ("--lora-rank 8", 3e-4),
        ("--lora-rank 0", 1e-5),
        ("--lora-rank 0 --lr 2", 2),
    ],
)
def test_the_default_learning_rate(argv, lr, tiniest_model):
    assert ddpo.parse(["--model", tiniest_model, *argv.split()])[0].lr == lr


@pytest.mark.parametrize(
    "text, argv, lr",
    [
        ('{"lora_rank": 0}', "", 1e-5),
        ('{"lora_rank": 0}', "--lora-rank 4", 3e-4),
        ('{"lora_rank": 0, "lr": 0.5}', "", 0.5),
        ('{"lora_rank": 4, "lr": 0.5}', "", 0.5),
        ('{"lora_rank": 4, "lr": 0.5}', "--lora-rank 0", 1e-5),  # it was meant for a LoRA
    ],
)
def test_the_default_learning_rate_if_the_model_brings_settings(text, argv, lr, tmp_path):
    (tmp_path / "ddpo.json").write_text(text)
    assert ddpo.parse(["--model", str(tmp_path), *argv.split()])[0].lr == lr


def test_a_limit_of_kl_that_the_model_brings_is_for_a_lora(tmp_path):
    (tmp_path / "ddpo.json").write_text('{"kl_stop": 7}')
    assert ddpo.make_settings(model=str(tmp_path)).kl_stop == 7
    assert ddpo.make_settings(model=str(tmp_path), lora_rank=0).kl_stop == 0


@pytest.mark.parametrize(
    "size, given, used",
    [
        (64, 0.0, 1e-4),  # the paper's
        ((8, 12), 0.0, 1.6384 / 384),
        (8, 0.02, 0.02),
    ],
)
def test_the_clip_range_is_the_same_in_nats_for_every_size(size, given, used, tmp_path):
    model = save_tiny_pipeline(tmp_path / "model", tiny_unet(**TINIEST, sample_size=size))
    policy, _ = make_policy(model, clip_range=given)
    assert policy.clip_range == pytest.approx(used, rel=1e-9)


@pytest.mark.parametrize("beyond, fraction", [(0.9, 0), (1.1, 1)])
def test_the_automatic_clip_range_clips(beyond, fraction, models):
    """With a ratio beyond the range, a positive advantage is clipped: there is no gradient."""
    policy, settings = make_policy(models["DDPM"], micro_batch=24)
    assert policy.clip_range == pytest.approx(1.6384 / (3 * 16 * 16), rel=1e-9)
    generator = torch.Generator().manual_seed(0)
    x, logp, _ = ddpo.sample(policy, BRIGHTNESS, [""] * 6, 6, generator)
    logp_old = logp - beyond * policy.clip_range
    samples = (x, logp_old, policy.encode([""] * 6), torch.ones(6))
    metrics = ddpo.update(ddpo.Run(settings, policy), samples, torch.Generator().manual_seed(0))
    assert metrics["clip_fraction"] == fraction
    assert (metrics["grad_norm"] == 0) == fraction


def test_a_model_without_attention_has_nothing_for_a_lora(tmp_path, capsys):
    blocks = {"down_block_types": ("DownBlock2D",), "add_attention": False}
    save_tiny_pixels(tmp_path / "model", **blocks)
    line = failure(capsys, *flags(tmp_path / "model", out=tmp_path / "run"))
    assert re.search("no attention for a LoRA.*--lora-rank 0", line)
    assert not (tmp_path / "run").exists()
    assert make_policy(tmp_path / "model", lora_rank=0)[0].weights
