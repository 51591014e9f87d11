"""Models by their hub id, from a stand-in hub: in every layout that repositories have, the weights
that a plain download has; from the cache when there is no hub; and what the hub refuses, in one
line. Folders, which other tests are about, are found by other code of diffusers."""

import json
import shutil

import hub
import pytest
import torch
from conftest import (
    TINIEST,
    failure,
    flags,
    launch,
    lora_bytes,
    save_tiny_pipeline,
    save_tiny_pixels,
    tiny_unet,
)
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

import ddpo

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
NAMES = {"model": "pytorch_model"}  # of a text encoder's .bin


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Stable Diffusion with safetensors, in folders."""
    return save_tiny_pipeline(tmp_path_factory.mktemp("plain") / "model", tiny_unet(**TINIEST))


# ---------------------------------------------------- layouts of a repository


def weight_files(folder, part="*"):
    return list(folder.glob(f"{part}/*.safetensors"))


def in_folders(folder):
    pass


def as_bin(folder):
    """Pickles, as they were before safetensors."""
    for path in weight_files(folder):
        torch.save(load_file(path), path.with_name(f"{NAMES.get(path.stem, path.stem)}.bin"))
        path.unlink()


def in_half(folder, part="*", plain=False):
    """The variant fp16: instead of the plain weights, or beside them."""
    for path in weight_files(folder, part):
        half = {name: weights.half() for name, weights in load_file(path).items()}
        save_file(half, path.with_suffix(".fp16.safetensors"), {"format": "pt"})
        if not plain:
            path.unlink()


def unet_in_half(folder):
    in_half(folder, "unet")


def text_encoder_in_half(folder):
    in_half(folder, "text_encoder")


def plain_and_half(folder):
    in_half(folder, plain=True)


def sharded(folder, **variant):
    pipe = DiffusionPipeline.from_pretrained(folder)
    for path in weight_files(folder):
        path.unlink()
    pipe.save_pretrained(folder, max_shard_size="20KB", **variant)
    assert len(weight_files(folder, "unet")) > 1 and not (folder / WEIGHTS).exists()


def sharded_in_half(folder):
    sharded(folder, variant="fp16")


LAYOUTS = [
    in_folders,
    as_bin,
    in_half,
    unet_in_half,
    text_encoder_in_half,
    plain_and_half,
    sharded,
    sharded_in_half,
]


def weights_of(pipe):
    modules = {k: m for k, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    return {f"{k}.{name}": w for k, m in modules.items() for name, w in m.state_dict().items()}


def halved(layout, name):
    part = {unet_in_half: "unet.", text_encoder_in_half: "text_encoder."}.get(layout)
    return layout is in_half or part and name.startswith(part)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_a_model_on_the_hub(layout, folder, tmp_path, capfd):
    """Quietly, with all of its weights, which are plain ones if there are such; and again when
    there is no hub."""
    expected = weights_of(DiffusionPipeline.from_pretrained(folder, safety_checker=None))
    repository = shutil.copytree(folder, tmp_path / "repository")
    layout(repository)
    capfd.readouterr()
    with hub.serve({"someone/model": repository}, tmp_path / "cache") as server:
        online = weights_of(ddpo.load_pipeline("someone/model"))
    assert "rror" not in "".join(capfd.readouterr())
    fetched = " ".join(server.asked)
    assert ".fp16." not in fetched or layout is not plain_and_half
    with hub.environment(HF_HOME=tmp_path / "cache", HF_HUB_OFFLINE="1"):
        offline = weights_of(ddpo.load_pipeline("someone/model"))
    assert online.keys() == offline.keys() == expected.keys()
    for name, weights in expected.items():
        weights = weights.half().float() if halved(layout, name) else weights
        assert torch.equal(online[name], weights) and torch.equal(offline[name], weights), name
        assert online[name].dtype == weights.dtype


def at_the_root(folder):
    """As google/ddpm-celebahq-256: UNet and scheduler without folders of their own."""
    for path in [*(folder / "unet").iterdir(), *(folder / "scheduler").iterdir()]:
        path.rename(folder / path.name)
    (folder / "unet").rmdir()
    (folder / "scheduler").rmdir()


@pytest.mark.parametrize("layout", [in_folders, at_the_root], ids=lambda layout: layout.__name__)
def test_a_run_on_a_ddpm_of_the_hub(layout, tmp_path):
    plain = save_tiny_pixels(tmp_path / "plain")
    repository = shutil.copytree(plain, tmp_path / "repository")
    layout(repository)
    small = {"epochs": 1, "guidance_scale": 3.0}
    rows = launch(plain, tmp_path / "of the folder", **small)
    with hub.serve({"google/ddpm-tiny": repository}, tmp_path / "cache"):
        assert launch("google/ddpm-tiny", tmp_path / "of the hub", **small) == rows
    assert lora_bytes(tmp_path / "of the hub") == lora_bytes(tmp_path / "of the folder")


# ---------------------------------------------------- what is refused


def refused(model, tmp_path, capsys):
    line = failure(capsys, *flags(model, out=tmp_path / "run"))
    assert f"--model {model}: " in line and not (tmp_path / "run").exists()
    return line


def test_a_gated_model(folder, tmp_path, capsys):
    with hub.serve({"gated/model": folder}, tmp_path / "cache"):
        line = refused("gated/model", tmp_path, capsys)
    assert "log in" in line or "is restricted" in line


def test_an_unknown_model(tmp_path, capsys):
    with hub.serve({}, tmp_path / "cache"):
        assert "not a valid model identifier" in refused("someone/gone", tmp_path, capsys)


def test_what_is_not_in_the_cache_without_a_hub(tmp_path, capsys):
    with hub.environment(HF_HOME=tmp_path / "cache", HF_HUB_OFFLINE="1"):
        assert "connection" in refused("someone/model", tmp_path, capsys)


def test_a_repository_of_another_kind(tmp_path, capsys):
    """One without a pipeline, such as a LoRA's, and one with a pipeline that is not trained."""
    for name, index in (("lora", None), ("flux", {"_class_name": "FluxPipeline"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text("# A model")
        if index:
            (tmp_path / name / "model_index.json").write_text(json.dumps(index))
    repositories = {"someone/lora": tmp_path / "lora", "someone/flux": tmp_path / "flux"}
    with hub.serve(repositories, tmp_path / "cache") as server:
        assert "model_index.json" in refused("someone/lora", tmp_path, capsys)
        line = failure(capsys, *flags("someone/flux", out=tmp_path / "run"))
    assert "--model someone/flux is a FluxPipeline; what works: Stable" in line
    assert not any("README" in request for request in server.asked), "nothing was downloaded"


@pytest.mark.parametrize("layout", [in_folders, in_half], ids=lambda layout: layout.__name__)
def test_a_weight_that_is_not_in_the_file(layout, folder, tmp_path):
    repository = shutil.copytree(folder, tmp_path / "repository")
    weights = load_file(repository / WEIGHTS)
    del weights["conv_norm_out.weight"]
    save_file(weights, repository / WEIGHTS, {"format": "pt"})
    layout(repository)
    with hub.serve({"someone/model": repository}, tmp_path / "cache"):
        with pytest.raises(ddpo.UserError, match="(unet lacks|are missing:) conv_norm_out.weight"):
            launch("someone/model", tmp_path / "run")
    assert not (tmp_path / "run").exists()
