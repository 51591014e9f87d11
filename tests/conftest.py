"""Tiny models that the tests build themselves and save in the hub's layout, so that the real
loading code runs on them; and small runs of ddpo.py, with what they leave."""

import csv
import functools
import inspect
import json
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))

import ddpo  # noqa: E402

torch.set_num_threads(1)
inspect.getsource = functools.cache(inspect.getsource)  # slow, and in every command line


# ---------------------------------------------------- models


TINY = {"layers_per_block": 1, "norm_num_groups": 4}
# With attention in one block alone it takes a third of the time.
TINIEST = {"block_out_channels": (8,), "down_block_types": ("CrossAttnDownBlock2D",),
           "mid_block_type": None, "up_block_types": ("UpBlock2D",)}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TOKENS = [*LETTERS, *(c + "</w>" for c in LETTERS), "<|startoftext|>", "<|endoftext|>"]
TEXT = {  # the sizes of a text encoder that knows them
    "vocab_size": len(TOKENS),
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
    "bos_token_id": 52,
    "eos_token_id": 53,
    "pad_token_id": 53,
}


def tiny_unet(seed=0, **config):
    torch.manual_seed(seed)
    defaults = {**TINY, "sample_size": 8, "block_out_channels": (8, 16), "cross_attention_dim": 16,
                "attention_head_dim": 2,
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    return diffusers.UNet2DConditionModel(**{**defaults, **config})


def save_tiny_pixels(folder, kind=diffusers.DDPMPipeline, scheduler=None, **config):
    """An unconditional model of 16 x 16 pixels."""
    torch.manual_seed(0)
    defaults = {**TINY, "sample_size": 16, "block_out_channels": (8,), "attention_head_dim": 4,
                "down_block_types": ("AttnDownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = diffusers.UNet2DModel(**{**defaults, **config})
    kind(unet, scheduler or diffusers.DDPMScheduler()).save_pretrained(folder)
    return folder


def letters_tokenizer(folder, **options):
    """A tokenizer that knows the letters a to z."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = folder / "vocab.json"
    vocab.write_text(json.dumps({token: i for i, token in enumerate(TOKENS)}))
    merges = folder / "merges.txt"
    merges.write_text("#version: 0.2\n")
    return CLIPTokenizer(str(vocab), str(merges), **options)


def save_tiny_pipeline(folder, unet=None, **scheduler):
    """A random Stable Diffusion for 16 x 16 pixels (latents 4 x 8 x 8)."""
    tokenizer = letters_tokenizer(folder, model_max_length=12)
    config = CLIPTextConfig(hidden_size=16, projection_dim=16, num_hidden_layers=1, **TEXT)
    text_encoder = CLIPTextModel(config)
    torch.manual_seed(2)  # anew, for how transformers draws weights depends on its version
    for weights in text_encoder.parameters():
        torch.nn.init.normal_(weights, std=0.3)
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8),
                                  down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
                                  up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16)
    last_step_is_random = {"set_alpha_to_one": False, "steps_offset": 1}
    defaults = {"clip_sample": False, **BETAS, **last_step_is_random}
    scheduler = diffusers.DDIMScheduler(**{**defaults, **scheduler})
    parts = (vae, text_encoder, tokenizer, unet or tiny_unet(), scheduler, None, None)
    pipe = diffusers.StableDiffusionPipeline(*parts, requires_safety_checker=False)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Path of a tiny random Stable Diffusion's folder."""
    return str(save_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "model"))


@pytest.fixture(scope="session")
def tiniest_model(tmp_path_factory):
    """Another, for tests in which the network does not matter."""
    folder = tmp_path_factory.mktemp("tiniest") / "model"
    return str(save_tiny_pipeline(folder, tiny_unet(**TINIEST)))


@pytest.fixture(autouse=True)
def forget_own_modules(monkeypatch, tmp_path_factory):
    """A reward's file is imported by its name; the next test's file may have the same."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if file.startswith(str(tmp_path_factory.getbasetemp())):
            del sys.modules[name]


# ---------------------------------------------------- settings


# What every test begins with, whatever the defaults are: the plain method, of whose choices each
# test names those that it is about. Flags are named here and where a test is about one.
PLAIN = {"device": "cpu", "precision": "fp32", "samples_per_prompt": 1, "lr": 0.01,
         "clip_range": 0.0, "min_std": 0.0, "adv_clip": 5.0, "lora_rank": 4, "kl_stop": 0.0}


def small_run(model, **settings):
    """Settings of a run that takes half a second."""
    size = {"epochs": 2, "steps": 2, "images_per_epoch": 8, "batch_size": 4, "updates_per_epoch": 2,
            "eval_images": 3}
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}
    return {"model": str(model), **PLAIN, **size, **settings}


def make_settings(model, **settings):
    """The same as ddpo.Settings."""
    return ddpo.Settings(**small_run(model, **settings))


def as_flags(settings):
    """Settings as a command line."""
    argv = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            argv += [f"--{flag}", str(value)]
    return argv


def flags(model, **settings):
    """The command line of a small run."""
    return as_flags(small_run(model, **settings))


# ---------------------------------------------------- policies


def brightness(images, prompts):
    return images.mean((1, 2, 3))


BRIGHTNESS = [("brightness", 1.0, brightness)]  # as rewards.load_rewards gives it
PROMPTS = ["cat", "dog", "bee", "cat", "horse", "ant"]


def make_policy(model, lora_scale=0.1, device="cpu", policy_class=ddpo.Policy, **settings):
    """Policy and settings of a small run. Its LoRA does something: B is random, not zero."""
    size = {"steps": 4, "images_per_epoch": 6, "updates_per_epoch": 1, "batch_size": 5}
    settings = make_settings(model, device=device, **{**size, **settings})
    torch.manual_seed(5)
    policy = policy_class(settings, torch.device(device))
    for layer in policy.lora.values():
        torch.nn.init.normal_(layer.split()[1], std=lora_scale)
    return policy, settings


def draw(policy, prompts, generator):
    """A rollout from noise that is drawn first, as diffusers does."""
    shape = (len(prompts), *policy.latent_shape)
    x_T = torch.randn(shape, generator=generator, device=policy.device)
    return ddpo.rollout(policy, prompts, x_T, generator)


def sampled(policy, adv=0.0, prompts=PROMPTS):
    """What `update` learns from: Samples of these prompts, one batch after another as in a run,
    with advantages as given."""
    if not policy.conditional:
        prompts = [""] * len(prompts)
    generator = torch.Generator(policy.device).manual_seed(0)
    samples = ddpo.sample(policy, BRIGHTNESS, prompts, generator)
    samples.adv = torch.as_tensor(adv, device=policy.device).expand(len(prompts))
    return samples


def flat(weights):
    return torch.cat([p.detach().flatten() for p in weights])


def update_by_sgd(policy, settings, samples, lr=1.0, grad_clip=1e9):
    """One `update` by plain gradient descent, as a rule without clipping the gradient: its metrics,
    and by how much the weights moved, which at rate 1 is the gradient."""
    before = flat(policy.weights)
    run = ddpo.Run(settings, policy)
    run.optimizer = torch.optim.SGD(policy.weights, lr)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ddpo, "GRAD_CLIP", grad_clip)
        metrics = ddpo.update(run, samples, torch.Generator().manual_seed(0))
    return metrics, before - flat(policy.weights)


# ---------------------------------------------------- runs


def launch(model, out, reward=None, update=ddpo.update, parts=None, **settings):
    """Train a small run in the folder `out`; the rows of its metrics.csv, without the seconds.
    `parts` are launch's own arguments, such as run_class."""
    ddpo.launch(make_settings(model, out=out, **settings), None, reward, update, **parts or {})
    rows = read_metrics(out)
    for row in rows:
        del row["seconds"]
    return rows


def remember(seen):
    """An `update` that keeps its (run, samples) in the list `seen`."""

    def update(run, samples, generator):
        seen.append((run, samples))
        return ddpo.update(run, samples, generator)

    return update


def read_metrics(run):
    return list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))


LORA = "pytorch_lora_weights.safetensors"


def lora_bytes(run):
    return (run / LORA).read_bytes()


def failure(capsys, *argv):
    """The message with which `main` ends: all that it says to stderr, in one line, and a status
    that is not 0."""
    with pytest.raises(SystemExit) as end:
        ddpo.main([str(part) for part in argv])
    said = capsys.readouterr().err
    assert end.value.code not in (0, None)
    (line,) = said.splitlines()
    assert line.startswith("ddpo.py: ")
    return line


def must_not_sample(monkeypatch):
    """From here on a test fails if an image is sampled."""
    monkeypatch.setattr(ddpo, "rollout", lambda *args: pytest.fail("sampled"))
