"""Proves that what examples/experiments/benchmark.py prints follows from what it timed, that phase
and floor make the same calls of the network, as many as it says, that its Stable Diffusions are the
published ones, and that memory.py adds up what is alive."""

import json
import re
import sys
from pathlib import Path
from statistics import median

import pytest
import torch
from conftest import PLAIN, as_flags, make_policy, must_not_sample, save_tiny_pixels
from diffusers import UNet2DConditionModel, UNet2DModel

import ddpo

sys.path.insert(0, str(ddpo.EXAMPLES / "experiments"))
import benchmark
import memory

SMALL = {"steps": 5, "images_per_epoch": 6, "updates_per_epoch": 2, "batch_size": 4}


def bench(model, out, *argv, **settings):
    """The numbers of a benchmark of two steps, repeated once."""
    short = ["--measure-steps=2", "--repeats=1", f"--json={out}", f"--model={model}"]
    benchmark.main([*as_flags({**PLAIN, **SMALL, **settings}), *short, *argv])
    return json.loads(out.read_text())


@pytest.fixture
def calls(monkeypatch):
    """Two growing lists: of every forward pass (batch, whether it was learned from, whether the
    LoRA was on), those of the phases and those of the floors."""
    phases = []
    floors = []
    seen = [phases]
    real_floor = benchmark.floor

    def floor(*args):
        seen[0] = floors
        real_floor(*args)
        seen[0] = phases

    def spied(forward):
        def counted(self, x, *args, **kwargs):
            seen[0].append((len(x), torch.is_grad_enabled(), ddpo.LoRALinear.on))
            return forward(self, x, *args, **kwargs)

        return counted

    monkeypatch.setattr(benchmark, "floor", floor)
    monkeypatch.setattr(ddpo.Policy, "try_out", lambda policy: None)  # calls the network, too
    for kind in (UNet2DConditionModel, UNet2DModel):
        monkeypatch.setattr(kind, "forward", spied(kind.forward))
    return phases, floors


def test_the_numbers_follow_from_the_times_and_the_calls_are_those_made(
    calls, tiniest_model, tmp_path, capsys
):
    how = {"guidance_scale": 3.0, "images_per_epoch": 8}
    result = bench(tiniest_model, tmp_path / "b.json", "--repeats=2", **how)
    phases = result["phases"]
    names = ("sampling", "update", "decode", "reward")
    sampling, update, _, _ = (phases[name] for name in names)

    # 4 images of 2 of 5 steps are 8 pairs: two calls of 4.
    assert (sampling["calls"], update["calls"], update["pairs"]) == (2, 2, 8)
    learned = [(8, True, True)] * 2  # twice the batch, because of guidance
    assert calls[0] == 4 * ([(8, False, True)] * 2 + learned)  # recorded, warm-up, two repetitions
    assert calls[1] == 3 * ([(8, False, False)] * 2 + learned)
    assert update["optimizer_steps"] == 1  # of 2 images of 5 steps, the training's

    for row in (sampling, update):
        ms = 1e3 * median(row["seconds"]) / row["calls"]
        bare = 1e3 * median(row["floor_seconds"]) / row["calls"]
        ratios = [a / b for a, b in zip(row["seconds"], row["floor_seconds"], strict=True)]
        expected = [ms, bare, ms / bare, min(ratios), max(ratios)]
        found = "ms_per_call floor_ms_per_call ratio ratio_min ratio_max".split()
        assert [row[name] for name in found] == pytest.approx(expected) and len(ratios) == 2
    made = {"sampling": 4 * 2 / 5, "update": 8, "decode": 4, "reward": 4}
    for name, row in phases.items():
        assert row["per_second"] == pytest.approx(made[name] / median(row["seconds"]))
        assert row["peak_gb"] is None
    times = {name: 1 / row["per_second"] for name, row in phases.items()}
    times["update"] *= 5  # pairs of an image
    shares = [row["share"] for row in phases.values()]
    assert shares == pytest.approx([t / sum(times.values()) for t in times.values()])
    said = (result["images"], result["batch_size"], result["lora_rank"], result["dtype"])
    assert said == (4, 4, 4, "float32")

    out = capsys.readouterr().out
    table = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in table] == ["| phase", *("| " + name for name in names)]
    ratio = "{ratio:.3f} ({ratio_min:.3f}..{ratio_max:.3f})".format(**update)
    ms = [f"{update['ms_per_call']:.2f}", f"{update['floor_ms_per_call']:.2f}"]
    assert table[2][1:6] == ["2", *ms, ratio, f"{update['per_second']:.4g}"]
    assert table[3][1:5] == ["-"] * 4 and all(row[-1] == "- |" for row in table[1:])


def test_images_count_twice_if_they_are_too_few_for_two_calls(calls, tiniest_model, tmp_path):
    """Two calls of 3 pairs are wanted, of 3 images with 1 of 5 steps: the images count twice. Then
    calls of 7, all steps, and as many optimizer steps as so many pairs have in an epoch."""
    how = {"guidance_scale": 1.0, "images_per_epoch": 3, "updates_per_epoch": 1}
    result = bench(tiniest_model, tmp_path / "b.json", "--measure-steps=1", **how)
    update = result["phases"]["update"]
    assert (result["images"], update["pairs"], update["optimizer_steps"]) == (3, 6, 1)
    how = {"guidance_scale": 1.0, "batch_size": 7, "images_per_epoch": 14}
    result = bench(tiniest_model, tmp_path / "c.json", "--measure-steps=5", **how)
    update = result["phases"]["update"]
    assert (result["images"], update["pairs"], update["optimizer_steps"]) == (7, 35, 1)
    expected = 3 * [(3, True, True)] * 2 + 3 * [(7, True, True)] * 5
    assert [call for call in calls[0] if call[1]] == expected  # recorded, warm-up, once
    assert len([call for call in calls[1] if call[1]]) == len(expected) / 3 * 2


def same_calls(phase, floor):
    """Whether a floor's calls are a phase's, but for the LoRA: once to be recorded, to warm up, and
    to be timed."""
    once = [call[:2] for call in floor[: len(floor) // 2]]
    return bool(once) and [call[:2] for call in phase] == once * 3


@pytest.mark.parametrize("settings", [
    {"precision": "bf16"},
    {"lora_rank": 0},
    {"kl_coef": 0.1, "objective": "reinforce", "updates_per_epoch": 1},
    {"guidance_scale": 3.0, "reward": "incompressibility"},  # of a model of pixels
])  # fmt: skip
def test_every_kind_of_training(settings, calls, tiniest_model, tmp_path):
    model = tiniest_model
    if "reward" in settings:
        model = save_tiny_pixels(tmp_path / "model")
    result = bench(model, tmp_path / "b.json", "--measure-steps=1", **settings)
    assert all(0 < row["per_second"] < 1e9 for row in result["phases"].values())
    assert same_calls(*calls) and result["phases"]["update"]["skipped"] == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])  # without and with autocast
def test_the_gradient_of_the_floor_is_that_of_the_mean_square_of_the_prediction(
    precision, tiniest_model
):
    policy, _ = make_policy(tiniest_model, precision=precision)
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    inputs = (x, torch.tensor([10, 700]), policy.encode(["cat", "bee"]))
    eps, calls = benchmark.record(policy, policy.predict, *inputs)
    expected = torch.autograd.grad(eps.square().mean(), policy.weights)
    benchmark.floor(policy, calls)
    torch.testing.assert_close([w.grad for w in policy.weights], list(expected))
    assert ddpo.LoRALinear.on and [call[3] for call in calls] == [precision == "bf16"]


@pytest.mark.parametrize("arch, unet, text", [
    ("sd15", 859_520_964, [123_060_480]),
    ("sdxl", 2_567_463_684, [123_060_480, 694_659_840]),
])  # fmt: skip
def test_the_published_models_have_the_published_number_of_weights(arch, unet, text):
    pipe = benchmark.random_pipeline(arch, torch.device("meta"))
    assert pipe.unet.num_parameters() == unet and pipe.vae.num_parameters() == 83_653_863
    encoders = [pipe.components.get(name) for name in ("text_encoder", "text_encoder_2")]
    assert [encoder.num_parameters() for encoder in encoders if encoder] == text
    assert pipe.tokenizer.model_max_length == 77 and pipe.vae_scale_factor == 8
    assert len(pipe.tokenizer) <= pipe.text_encoder.config.vocab_size == 49408
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("arch", ["sd15", "sdxl"])
def test_a_random_model_goes_through_all_phases(arch, calls, tmp_path, monkeypatch, capfd):
    """The same code with few channels, and the settings of the flags for such a model."""
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2}  # fmt: skip
    unet = {**benchmark.UNETS[arch], "sample_size": 8, "attention_head_dim": 2}
    unet |= {"layers_per_block": 1, "cross_attention_dim": 32}
    unet["block_out_channels"] = (32,) * len(unet["block_out_channels"])
    if arch == "sdxl":
        unet |= {"cross_attention_dim": 64, "transformer_layers_per_block": 1,
                 "projection_class_embeddings_input_dim": 6 * 256 + 32}  # fmt: skip
    monkeypatch.setitem(benchmark.UNETS, arch, unet)
    vae = {"block_out_channels": (32,) * 4, "layers_per_block": 1}
    monkeypatch.setattr(benchmark, "VAE", {**benchmark.VAE, **vae})
    monkeypatch.setattr(benchmark, "CLIP_L", text)
    monkeypatch.setattr(benchmark, "CLIP_G", {**text, "projection_dim": 32})
    monkeypatch.chdir(tmp_path)
    short = ["--measure-steps=1", "--repeats=1", "--images-per-epoch=8", "--batch-size=2"]
    benchmark.main([f"--arch={arch}", "--device=cpu", *short])
    out, err = capfd.readouterr()
    what = "random weights, latents 4 x 8 x 8, guidance 5.0, LoRA of rank 4"
    assert f"model    {arch}, {what}" in out and not err
    assert same_calls(*calls) and not list(tmp_path.iterdir())

    # The same model on paper: the UNet in half precision, the VAE in float32, and a LoRA.
    pipe = benchmark.random_pipeline(arch, torch.device("meta"))
    weights = 2 * pipe.unet.num_parameters() + 4 * pipe.vae.num_parameters()
    rest, sampling, _, update = memory.count(arch, "--batch-size=2")
    assert weights / 1e9 < rest < 1.2 * weights / 1e9 and rest < sampling < update
    linear = sum(layer.weight.numel() for layer in pipe.unet.modules()
                 if isinstance(layer, torch.nn.Linear))  # fmt: skip
    saved = rest - memory.count(arch, "--batch-size=2", "--int8")[0]
    assert saved == pytest.approx(linear / 1e9, rel=0.02)


def test_memory_is_that_of_what_is_alive():
    with memory.Alive() as alive:
        a = torch.empty(100, 256, device="meta")
        b = a.T + a.view(256, 100)
        c = a.mul_(2)[:1]
        assert alive.now == 2 * 102_400
        del a, b, c
    assert (alive.now, alive.peak) == (0, 2 * 102_400)


@pytest.mark.parametrize("argv, said", [
    (["sd3"], "memory.py: error: begin with one of sd15, sdxl"),
    (["sd15", "--steps=0"], "memory.py: error: steps must be finite and at least 1, not 0"),
])  # fmt: skip
def test_what_cannot_be_counted_is_said_in_one_line(argv, said):
    with pytest.raises(SystemExit, match=said):
        memory.main(argv)


@pytest.mark.parametrize("argv, said", [
    ("--repeats 0", "benchmark.py: error: --repeats and --measure-steps must be at least 1"),
    ("--arch sd3", "benchmark.py: error: argument --arch: invalid choice: 'sd3'"),
    ("--arch sd15 --model x", "benchmark.py: error: argument --model: not allowed with"),
    ("--model . --steps 5", "benchmark.py: error: --model ."),
    ("--steps 1001", "benchmark.py: error: .*1001"),
    ("--steps 0", "benchmark.py: error: steps must be finite"),
    ("--repeat 3", "ddpo.py: error: unrecognized arguments: --repeat 3"),
    ("--min-std 0.99", "benchmark.py: error: .*--min-std"),
    ("--json there.json", "benchmark.py: error: --json there.json: name a new file"),
    ("--resume RUN", "benchmark.py: error: --resume"),
])  # fmt: skip
def test_mistakes_end_in_one_line_before_anything_is_timed(
    argv, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("there.json").write_text("mine")
    must_not_sample(monkeypatch)
    with pytest.raises(SystemExit) as end:
        benchmark.main(argv.split())
    err = capsys.readouterr().err + (end.value.code if isinstance(end.value.code, str) else "")
    assert end.value.code not in (0, None)
    assert err.count("error:") == 1 and re.search(said, err) and "Traceback" not in err
    assert Path("there.json").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("trouble, said", [
    (torch.cuda.OutOfMemoryError, "error: out of GPU memory with --batch-size 4"),
    (KeyboardInterrupt, "stopped"),
])  # fmt: skip
def test_trouble_on_the_way_ends_in_one_line_and_leaves_no_file(
    trouble, said, tiniest_model, tmp_path, monkeypatch
):
    def fail(*args):
        raise trouble

    monkeypatch.setattr(ddpo, "update", fail)
    with pytest.raises(SystemExit, match=f"benchmark.py: {said}"):
        bench(tiniest_model, tmp_path / "b.json")
    assert list(tmp_path.iterdir()) == []
