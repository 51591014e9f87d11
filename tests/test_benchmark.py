"""Proves that what examples/benchmark.py prints follows from what it timed, that phase and floor make the same calls of the
network, as many as it says, and that its Stable Diffusions are the published ones."""

import json
import math
import re
import sys
from pathlib import Path
from statistics import median

import pytest
import torch
from conftest import save_tiny_pipeline
from test_kinds import save_pixels, save_sdxl

import ddpo

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import benchmark

SMALL = "--device=cpu --precision=fp32 --steps=5 --sample-batch=3 --images-per-epoch=6 --updates-per-epoch=2 --micro-batch=4"


def bench(model, out, *argv):
    """The numbers of a benchmark of two steps, repeated twice."""
    benchmark.main([*SMALL.split(), f"--model={model}", "--measure-steps=2", "--repeats=2", f"--json={out}", *argv])
    return json.loads(out.read_text())


def spy_on_network(monkeypatch):
    """Two growing lists: of every forward pass (batch, whether it was learned from, whether the LoRA was on), those of the
    phases and those of the floors."""
    seen, kind = {"phase": [], "floor": []}, ["phase"]
    real_floor, load = benchmark.floor, ddpo.load_pipeline

    def floor(*args):
        kind[0] = "floor"
        real_floor(*args)
        kind[0] = "phase"

    def load_and_wrap(model):
        pipe = load(model)
        forward = pipe.unet.forward

        def counted(x, *args, **kwargs):
            seen[kind[0]].append((len(x), torch.is_grad_enabled(), ddpo.LoRALinear.on))
            return forward(x, *args, **kwargs)

        pipe.unet.forward = counted
        return pipe

    monkeypatch.setattr(benchmark, "floor", floor)
    monkeypatch.setattr(ddpo, "load_pipeline", load_and_wrap)
    return seen["phase"], seen["floor"]


# ---------------------------------------------------------------- what is measured


def test_the_numbers_follow_from_the_times_and_the_calls_are_those_made(tiny_model, tmp_path, monkeypatch, capsys):
    phase, floor = spy_on_network(monkeypatch)
    result = bench(tiny_model, tmp_path / "b.json", "--guidance-scale=3")
    sampling, update, decode, reward = (result["phases"][name] for name in ("sampling", "update", "decode", "reward"))

    # 3 images of 2 of 5 steps, which are 6 pairs; 2 calls of 4 pairs are wanted, so the images count twice: 12 pairs
    assert (sampling["calls"], update["calls"], update["pairs"]) == (2, 3, 12)
    sampled, learned = [(6, False, True)] * 2, [(8, True, True)] * 3  # twice the batch, because of guidance
    assert phase == 4 * (sampled + learned)  # recorded, warm-up, two repetitions
    assert floor == 3 * ([(6, False, False)] * 2 + learned)
    assert update["optimizer_steps"] == 1  # of 3 images of 5 steps, the training's

    for row in (sampling, update):
        assert row["ratio"] == pytest.approx(row["ms_per_call"] / row["floor_ms_per_call"])
        assert row["ratio"] == pytest.approx(1e3 * median(row["seconds"]) / (row["calls"] * row["floor_ms_per_call"]))
        ratios = [ours / bare for ours, bare in zip(row["seconds"], row["floor_seconds"], strict=True)]
        assert [row["ratio_min"], row["ratio_max"]] == [min(ratios), max(ratios)] and len(ratios) == 2
        assert min(ratios) <= row["ratio"] <= max(ratios)
    made = {"sampling": 3 * 2 / 5, "update": 12, "decode": 3, "reward": 3}
    for name, row in result["phases"].items():
        assert row["per_second"] == pytest.approx(made[name] / median(row["seconds"]))
        assert row["peak_gb"] is None
    cost = [1 / sampling["per_second"], 5 / update["per_second"], 1 / decode["per_second"], 1 / reward["per_second"]]
    assert [row["share"] for row in result["phases"].values()] == pytest.approx([c / sum(cost) for c in cost])
    assert (result["sample_batch"], result["micro_batch"], result["lora_rank"], result["dtype"]) == (3, 4, 4, "float32")

    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in table] == ["| phase", "| sampling", "| update", "| decode", "| reward"]
    assert table[2][1:6] == ["3", f"{update['ms_per_call']:.2f}", f"{update['floor_ms_per_call']:.2f}",
                             "{ratio:.3f} ({ratio_min:.3f}..{ratio_max:.3f})".format(**update),
                             f"{update['per_second']:.4g}"]  # fmt: skip
    assert table[3][1:5] == ["-"] * 4 and all(row[-1] == "- |" for row in table[1:])


def test_the_last_call_may_be_smaller_and_optimizer_steps_are_as_in_training(tiny_model, tmp_path, monkeypatch):
    phase, floor = spy_on_network(monkeypatch)
    flags = ("--guidance-scale=1", "--sample-batch=6", "--measure-steps=5", "--micro-batch=7")
    update = bench(tiny_model, tmp_path / "b.json", *flags)["phases"]["update"]
    assert (update["pairs"], update["optimizer_steps"]) == (30, 2)  # an epoch's
    learned = [(n, True, True) for n in (7, 7, 1) * 2]
    assert [call for call in phase if call[1]] == 4 * learned and [call for call in floor if call[1]] == 3 * learned


@pytest.mark.parametrize("save, flags", [(save_sdxl, ["--precision=bf16"]), (save_pixels, ["--reward=incompressibility"]),
                                         (save_tiny_pipeline, ["--lora-rank=0"]),
                                         (save_tiny_pipeline, ["--kl-coef=0.1", "--objective=reinforce",
                                                               "--updates-per-epoch=1"])])  # fmt: skip
def test_every_kind_of_pipeline_and_of_training(save, flags, tmp_path, monkeypatch):
    save(tmp_path / "model")
    phase, floor = spy_on_network(monkeypatch)
    result = bench(tmp_path / "model", tmp_path / "b.json", *flags)
    assert all(math.isfinite(row["per_second"]) for row in result["phases"].values())
    assert [call[:2] for call in phase] == [call[:2] for call in floor[: len(floor) // 3]] * 4
    assert result["phases"]["update"]["skipped"] == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])  # without and with autocast
def test_the_gradient_of_the_floor_is_that_of_the_mean_square_of_the_prediction(precision, tiny_model):
    settings = ddpo.Settings(model=tiny_model, device="cpu", precision=precision, guidance_scale=3.0)
    torch.manual_seed(0)
    policy = ddpo.Policy(settings, torch.device("cpu"))
    x, t, cond = torch.randn(2, *policy.latent_shape), torch.tensor([10, 700]), policy.encode(["cat", "bee"])
    eps, calls = benchmark.record(policy, policy.predict, x, t, cond)
    expected = torch.autograd.grad(eps.square().mean(), policy.weights)
    benchmark.floor(policy, calls)
    torch.testing.assert_close([w.grad for w in policy.weights], list(expected))
    assert ddpo.LoRALinear.on and [call[3] for call in calls] == [precision == "bf16"]


# ---------------------------------------------------------------- the published models


@pytest.mark.parametrize("arch, unet, text", [("sd15", 859_520_964, [123_060_480]),
                                              ("sdxl", 2_567_463_684, [123_060_480, 694_659_840])])  # fmt: skip
def test_the_published_models_have_the_published_number_of_weights(arch, unet, text):
    pipe = benchmark.random_pipeline(arch, torch.device("meta"))
    assert pipe.unet.num_parameters() == unet and pipe.vae.num_parameters() == 83_653_863
    assert [part.num_parameters() for name, part in pipe.components.items() if "text_encoder" in name] == text
    assert pipe.tokenizer.model_max_length == 77 and pipe.vae_scale_factor == 8
    assert len(pipe.tokenizer) <= pipe.text_encoder.config.vocab_size == 49408
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("arch", ["sd15", "sdxl"])
def test_a_random_model_goes_through_all_phases(arch, tmp_path, monkeypatch, capfd):
    """The same code with few channels."""
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    small = {"sample_size": 8, "block_out_channels": (32,) * len(benchmark.UNETS[arch]["block_out_channels"]),
             "attention_head_dim": 2, "cross_attention_dim": {"sd15": 32, "sdxl": 64}[arch]}  # fmt: skip
    if arch == "sdxl":
        small |= {"transformer_layers_per_block": 1, "projection_class_embeddings_input_dim": 6 * 256 + 32}
    monkeypatch.setitem(benchmark.UNETS, arch, {**benchmark.UNETS[arch], **small})
    monkeypatch.setitem(benchmark.VAE, "block_out_channels", (32,) * 4)
    monkeypatch.setattr(benchmark, "CLIP_L", text)
    monkeypatch.setattr(benchmark, "CLIP_G", {**text, "projection_dim": 32})
    monkeypatch.chdir(tmp_path)
    benchmark.main([*SMALL.split(), f"--arch={arch}", "--measure-steps=1", "--repeats=1", "--json=b.json"])
    out, err = capfd.readouterr()
    assert f"model    {arch}, random weights, latents 4 x 8 x 8, guidance 5.0, LoRA of rank 4" in out and not err
    assert [path.name for path in tmp_path.iterdir()] == ["b.json"]


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize("argv, said", [
    ("--repeats 0", "benchmark.py: error: --repeats must be at least 1, not 0"),
    ("--measure-steps 0", "benchmark.py: error: --measure-steps must be at least 1, not 0"),
    ("--arch sd3", "benchmark.py: error: argument --arch: invalid choice: 'sd3'"),
    ("--arch sd15 --model x", "benchmark.py: error: argument --model: not allowed with argument --arch"),
    ("--model .", "benchmark.py: error: --model .: the folder holds no complete pipeline"),
    ("--steps 1001", "benchmark.py: error: --steps 1001: the model knows 1000 timesteps"),
    ("--reward beauty", "benchmark.py: error: --reward beauty: unknown"),
    ("--device tpu", "benchmark.py: error: --device tpu: not on this machine"),
    ("--steps 0", "benchmark.py: error: --steps must be at least 1, not 0"),
    ("--repeat 3", "ddpo.py: error: unrecognized arguments: --repeat 3"),
    ("--min-std 0.99", "benchmark.py: error: .*--min-std 0.99"),
    ("--json there.json", "benchmark.py: error: --json there.json: it exists; name a new file"),
    ("--json gone/b.json", "benchmark.py: error: --json gone/b.json: no such folder; name a new file"),
    ("--resume run", "benchmark.py: error: --resume"),
])  # fmt: skip
def test_mistakes_end_in_one_line_before_anything_is_timed(argv, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("there.json").write_text("mine")
    Path("run").mkdir()
    Path("run/config.json").write_text("{}")
    monkeypatch.setattr(ddpo, "rollout", lambda *a: pytest.fail("sampled before the mistake was found"))
    with pytest.raises(SystemExit) as end:
        benchmark.main(argv.split())
    err = capsys.readouterr().err + (end.value.code if isinstance(end.value.code, str) else "")
    assert end.value.code not in (0, None)
    assert err.count("error:") == 1 and re.search(said, err) and "Traceback" not in err
    assert Path("there.json").read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("trouble, said", [
    (torch.cuda.OutOfMemoryError, "error: out of GPU memory.* --micro-batch 4, --sample-batch 3, --precision fp32"),
    (KeyboardInterrupt, "stopped"),
])  # fmt: skip
def test_trouble_on_the_way_ends_in_one_line_and_leaves_no_file(trouble, said, tiny_model, tmp_path, monkeypatch):
    def fail(*args):
        raise trouble

    monkeypatch.setattr(ddpo, "update", fail)
    with pytest.raises(SystemExit, match=f"benchmark.py: {said}"):
        bench(tiny_model, tmp_path / "b.json")
    assert list(tmp_path.iterdir()) == []
