"""Proves that what examples/benchmark.py prints follows from what it timed, that phase and floor
make the same calls of the network, as many as it says, and that its Stable Diffusions are the
published ones."""

import json
import math
import re
import sys
from pathlib import Path
from statistics import median

import pytest
import torch
from conftest import save_tiny_pixels
from diffusers import UNet2DConditionModel, UNet2DModel

import ddpo

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import benchmark

SMALL = """--device=cpu --precision=fp32 --steps=5 --sample-batch=3 --images-per-epoch=6
           --updates-per-epoch=2 --micro-batch=4""".split()


def bench(model, out, *argv):
    """The numbers of a benchmark of two steps, repeated once."""
    short = ["--measure-steps=2", "--repeats=1", f"--json={out}"]
    benchmark.main([*SMALL, *short, f"--model={model}", *argv])
    return json.loads(out.read_text())


def spy_on_network(monkeypatch):
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
    for kind in (UNet2DConditionModel, UNet2DModel):
        monkeypatch.setattr(kind, "forward", spied(kind.forward))
    return phases, floors


# ---------------------------------------------------- what is measured


def test_the_numbers_follow_from_the_times_and_the_calls_are_those_made(
    tiniest_model, tmp_path, monkeypatch, capsys
):
    phase, floor = spy_on_network(monkeypatch)
    result = bench(tiniest_model, tmp_path / "b.json", "--guidance-scale=3", "--repeats=2")
    phases = result["phases"]
    names = ("sampling", "update", "decode", "reward")
    sampling, update, decode, reward = (phases[name] for name in names)

    # 3 images of 2 of 5 steps are 6 pairs; 2 calls of 4 are wanted, so the images count twice.
    assert (sampling["calls"], update["calls"], update["pairs"]) == (2, 3, 12)
    sampled = [(6, False, True)] * 2  # twice the batch, because of guidance
    learned = [(8, True, True)] * 3
    assert phase == 4 * (sampled + learned)  # recorded, warm-up, two repetitions
    assert floor == 3 * ([(6, False, False)] * 2 + learned)
    assert update["optimizer_steps"] == 1  # of 3 images of 5 steps, the training's

    for row in (sampling, update):
        ms = 1e3 * median(row["seconds"]) / row["calls"]
        bare = 1e3 * median(row["floor_seconds"]) / row["calls"]
        assert row["ms_per_call"] == pytest.approx(ms)
        assert row["floor_ms_per_call"] == pytest.approx(bare)
        assert row["ratio"] == pytest.approx(ms / bare)
        pairs = zip(row["seconds"], row["floor_seconds"], strict=True)
        ratios = [ours / bare for ours, bare in pairs]
        assert [row["ratio_min"], row["ratio_max"]] == [min(ratios), max(ratios)]
        assert len(ratios) == 2
    made = {"sampling": 3 * 2 / 5, "update": 12, "decode": 3, "reward": 3}
    for name, row in phases.items():
        assert row["per_second"] == pytest.approx(made[name] / median(row["seconds"]))
        assert row["peak_gb"] is None
    times = {name: 1 / row["per_second"] for name, row in phases.items()}
    times["update"] *= 5  # pairs of an image
    shares = [row["share"] for row in phases.values()]
    assert shares == pytest.approx([t / sum(times.values()) for t in times.values()])
    assert (result["sample_batch"], result["micro_batch"]) == (3, 4)
    assert (result["lora_rank"], result["dtype"]) == (4, "float32")

    out = capsys.readouterr().out
    table = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in table] == ["| phase", *("| " + name for name in names)]
    ratio = "{ratio:.3f} ({ratio_min:.3f}..{ratio_max:.3f})".format(**update)
    ms = [f"{update['ms_per_call']:.2f}", f"{update['floor_ms_per_call']:.2f}"]
    assert table[2][1:6] == ["3", *ms, ratio, f"{update['per_second']:.4g}"]
    assert table[3][1:5] == ["-"] * 4 and all(row[-1] == "- |" for row in table[1:])


def test_the_last_call_may_be_smaller_and_optimizer_steps_are_as_in_training(
    tiniest_model, tmp_path, monkeypatch
):
    phase, floor = spy_on_network(monkeypatch)
    flags = ("--guidance-scale=1", "--sample-batch=6", "--measure-steps=5", "--micro-batch=7")
    result = bench(tiniest_model, tmp_path / "b.json", *flags)
    update = result["phases"]["update"]
    assert (update["pairs"], update["optimizer_steps"]) == (30, 2)  # an epoch's
    learned = [(n, True, True) for n in (7, 7, 1) * 2]
    assert [call for call in phase if call[1]] == 3 * learned  # recorded, warm-up, once
    assert [call for call in floor if call[1]] == 2 * learned


def same_calls(phase, floor):
    """Whether a floor's calls are a phase's, but for the LoRA: once to be recorded, to warm up, and
    to be timed."""
    once = [call[:2] for call in floor[: len(floor) // 2]]
    calls = [call[:2] for call in phase]
    return bool(once) and calls == once * 3


@pytest.mark.parametrize("flags", [
    ["--precision=bf16"],
    ["--lora-rank=0"],
    ["--kl-coef=0.1", "--objective=reinforce", "--updates-per-epoch=1"],
    ["--reward=incompressibility"],
])  # fmt: skip
def test_every_kind_of_training(flags, tiniest_model, tmp_path, monkeypatch):
    model = tiniest_model
    if "--reward=incompressibility" in flags:
        model = tmp_path / "model"
        save_tiny_pixels(model)
    phase, floor = spy_on_network(monkeypatch)
    result = bench(model, tmp_path / "b.json", "--measure-steps=1", *flags)
    assert all(math.isfinite(row["per_second"]) for row in result["phases"].values())
    assert same_calls(phase, floor)
    assert result["phases"]["update"]["skipped"] == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])  # without and with autocast
def test_the_gradient_of_the_floor_is_that_of_the_mean_square_of_the_prediction(
    precision, tiniest_model
):
    how = {"device": "cpu", "precision": precision, "guidance_scale": 3.0}
    torch.manual_seed(0)
    policy = ddpo.Policy(ddpo.Settings(model=tiniest_model, **how), torch.device("cpu"))
    x = torch.randn(2, *policy.latent_shape)
    inputs = (x, torch.tensor([10, 700]), policy.encode(["cat", "bee"]))
    eps, calls = benchmark.record(policy, policy.predict, *inputs)
    expected = torch.autograd.grad(eps.square().mean(), policy.weights)
    benchmark.floor(policy, calls)
    torch.testing.assert_close([w.grad for w in policy.weights], list(expected))
    assert ddpo.LoRALinear.on and [call[3] for call in calls] == [precision == "bf16"]


# ---------------------------------------------------- the published models


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
def test_a_random_model_goes_through_all_phases(arch, tmp_path, monkeypatch, capfd):
    """The same code with few channels."""
    text = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    unet = {**benchmark.UNETS[arch], "sample_size": 8, "attention_head_dim": 2}
    unet["layers_per_block"] = 1
    unet["block_out_channels"] = (32,) * len(unet["block_out_channels"])
    unet["cross_attention_dim"] = 32
    if arch == "sdxl":
        unet["cross_attention_dim"] = 64
        unet["transformer_layers_per_block"] = 1
        unet["projection_class_embeddings_input_dim"] = 6 * 256 + 32
    monkeypatch.setitem(benchmark.UNETS, arch, unet)
    vae = {"block_out_channels": (32,) * 4, "layers_per_block": 1}
    monkeypatch.setattr(benchmark, "VAE", {**benchmark.VAE, **vae})
    monkeypatch.setattr(benchmark, "CLIP_L", text)
    monkeypatch.setattr(benchmark, "CLIP_G", {**text, "projection_dim": 32})
    monkeypatch.chdir(tmp_path)
    phase, floor = spy_on_network(monkeypatch)
    short = ["--measure-steps=1", "--repeats=1", "--json=b.json"]
    short += ["--sample-batch=2", "--micro-batch=2"]
    benchmark.main([*SMALL, *short, f"--arch={arch}"])
    out, err = capfd.readouterr()
    what = "random weights, latents 4 x 8 x 8, guidance 5.0, LoRA of rank 4"
    assert f"model    {arch}, {what}" in out and not err
    assert same_calls(phase, floor)
    assert [path.name for path in tmp_path.iterdir()] == ["b.json"]


# ---------------------------------------------------- mistakes


@pytest.mark.parametrize("argv, said", [
    ("--repeats 0", "benchmark.py: error: --repeats and --measure-steps must be at least 1"),
    ("--measure-steps 0", "benchmark.py: error: --repeats and --measure-steps must be at least 1"),
    ("--arch sd3", "benchmark.py: error: argument --arch: invalid choice: 'sd3'"),
    ("--arch sd15 --model x", "benchmark.py: error: argument --model: not allowed with"),
    ("--model .", "benchmark.py: error: --model ."),
    ("--steps 1001", "benchmark.py: error: .*1001"),
    ("--reward beauty", "benchmark.py: error: --reward beauty"),
    ("--device tpu", "benchmark.py: error: device tpu: not on this machine"),
    ("--steps 0", "benchmark.py: error: .*steps must be at least 1"),
    ("--repeat 3", "ddpo.py: error: unrecognized arguments: --repeat 3"),
    ("--min-std 0.99", "benchmark.py: error: .*--min-std"),
    ("--json there.json", "benchmark.py: error: --json there.json: name a new file"),
    ("--json gone/b.json", "benchmark.py: error: --json gone/b.json: name a new file"),
    ("--resume run", "benchmark.py: error: --resume"),
])  # fmt: skip
def test_mistakes_end_in_one_line_before_anything_is_timed(
    argv, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("there.json").write_text("mine")
    Path("run").mkdir()
    Path("run/config.json").write_text("{}")
    too_late = "sampled before the mistake was found"
    monkeypatch.setattr(ddpo, "rollout", lambda *args: pytest.fail(too_late))
    with pytest.raises(SystemExit) as end:
        benchmark.main(argv.split())
    err = capsys.readouterr().err + (end.value.code if isinstance(end.value.code, str) else "")
    assert end.value.code not in (0, None)
    assert err.count("error:") == 1 and re.search(said, err) and "Traceback" not in err
    assert Path("there.json").read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("trouble, said", [
    (torch.cuda.OutOfMemoryError, "error: out of GPU memory with --micro-batch 4"),
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
