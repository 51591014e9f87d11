"""Proves that the scripts which the README tells people to copy do what they say: rewards, pictures
before and after, curves, files of flags; and that those which prove something look at what they
should."""

import io
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import LORA, draw, flags, make_policy, read_metrics, save_tiny_pixels
from PIL import Image
from safetensors.torch import load_file

import ddpo
import rewards

EXAMPLES = ddpo.EXAMPLES
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "experiments")]
import my_reward  # noqa: E402


def run_script(name, monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_links_are_to_what_is_there():
    for readme in (EXAMPLES / "README.md", EXAMPLES / "experiments/README.md"):
        links = re.findall(r"\]\(([^)]+)\)", readme.read_text(encoding="utf-8"))
        links = [link.partition("#") for link in links if "://" not in link]
        assert len(links) > 9
        for file, _, section in links:
            target = readme.parent / file if file else readme
            assert target.exists(), file
            text = target.read_text(encoding="utf-8") if section else ""
            headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            known = [re.sub(r"[^\w -]", "", name).lower().replace(" ", "-") for name in headings]
            assert not section or section in known, section


@pytest.mark.parametrize("path", [*EXAMPLES.glob("*.flags")], ids=lambda path: path.stem)
def test_flags_are_those_of_ddpo_and_differ_in_what_the_model_needs(path):
    settings, _ = ddpo.parse([f"@{path}"])
    common, _ = ddpo.parse([f"@{EXAMPLES / 'stable-diffusion.flags'}"])
    other = {k for k, v in vars(settings).items() if v != vars(common)[k]}
    assert other <= {"model", "batch_size", "save_memory", "guidance_scale"}


def test_diversity_is_the_mean_distance_to_the_others_of_the_prompt():
    images = torch.rand(6, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    images[4] = images[1] + 1e-4  # nearly alike
    prompts = ["cat", "bee", "cat", "ant", "bee", "cat"]
    expected = []
    for i in range(6):
        distances = []
        for j in range(6):
            if i != j and prompts[i] == prompts[j]:
                squares = [(a - b) ** 2 for a, b in zip(*images[[i, j]].flatten(1).tolist())]
                distances.append((sum(squares) / 60) ** 0.5)
        expected.append(sum(distances) / len(distances) if distances else 0)
    found = my_reward.diversity(images, prompts)
    assert found.tolist() == pytest.approx(expected, rel=1e-3) and found[3] == 0
    mine = EXAMPLES / "my_reward.py"
    terms = rewards.load_rewards(f"{mine}:redness + 2*{mine}:diversity", "compressibility")
    scores = ddpo.score(terms, images, prompts)
    assert [label for label, _, _ in terms] == ["redness", "diversity", "compressibility"]
    torch.testing.assert_close(scores[:, 0], my_reward.redness(images, prompts) + 2 * found)


def write_config(run, model, **settings):
    config = {"model": str(model), "steps": 2, "guidance_scale": 2.0, **settings}
    (run / "config.json").write_text(json.dumps(config))
    return config


def sampled_in_training(policy, prompts, seed):
    x, _ = draw(policy, prompts, torch.Generator().manual_seed(seed))
    return np.hstack([np.asarray(p) for p in rewards.to_pil(policy.decode(x[:, -1]))])


@pytest.mark.parametrize("rank", [4, 0])
def test_generate_draws_before_and_after_as_in_training(rank, tiniest_model, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    config = write_config(tmp_path, tiniest_model)
    policy, _ = make_policy(lora_scale=0.5, lora_rank=rank, **config)
    prompts = ["cat", "bee", "ant"]
    with ddpo.without_lora():
        before = sampled_in_training(policy, prompts, 4)
    if rank:
        ddpo.save_lora(policy, tmp_path / LORA)
    else:
        torch.manual_seed(0)
        for weight in policy.weights:
            weight.data += 0.02 * torch.randn_like(weight)
        policy.pipe.save_pretrained(tmp_path / "pipeline")
    after = sampled_in_training(policy, prompts, 4)
    run_script("generate.py", monkeypatch, tmp_path, "--seed", 4, "--prompts", *prompts)
    picture = np.asarray(Image.open(tmp_path / "generated.png")).astype(int)
    height, width = before.shape[0], before.shape[1] // 3
    drawn = []
    for row in np.split(picture, 2):  # without borders and captions
        tiles = [tile[2 : 2 + height, 2 : 2 + width] for tile in np.split(row, 3, 1)]
        drawn.append(np.concatenate(tiles, 1))
    assert [abs(ours - row).max() <= 1 for ours, row in zip((before, after), drawn)] == [True] * 2
    assert (before != after).mean() > 0.1


def test_generate_draws_with_another_sampler(tiniest_model, tmp_path, monkeypatch):
    """As diffusers draws with it, above without the LoRA and below with it."""
    pytest.importorskip("peft")
    write_config(tmp_path, tiniest_model)
    policy, _ = make_policy(tiniest_model, lora_scale=0.5)
    ddpo.save_lora(policy, tmp_path / LORA)
    how = ["--scheduler=HeunDiscreteScheduler", "--steps=3", "--guidance=1.5", "--prompts=cat"]
    run_script("generate.py", monkeypatch, tmp_path, *how)
    picture = np.asarray(Image.open(tmp_path / "generated.png")).astype(int)
    pipe = diffusers.DiffusionPipeline.from_pretrained(tiniest_model)
    config = {"clip_sample": False, **pipe.scheduler.config}
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(config)
    for row in np.split(picture, 2):
        generator = torch.Generator().manual_seed(0)
        how = {"num_inference_steps": 3, "guidance_scale": 1.5, "generator": generator}
        expected = np.asarray(pipe("cat", **how).images[0]).astype(int)
        assert abs(row[2:-16, 2:-2] - expected).max() <= 1
        pipe.load_lora_weights(tmp_path, weight_name=LORA)

    with pytest.raises(SystemExit) as end:
        run_script("generate.py", monkeypatch, tmp_path, "--scheduler=Euler")
    assert "no scheduler Euler for it; there are DDIMScheduler, DDPM" in end.value.code
    assert "EDM" not in end.value.code  # of which pictures stay noise
    with pytest.raises(SystemExit) as end:
        run_script("generate.py", monkeypatch, tmp_path, "--steps=0")
    assert "--steps must be at least 1" in end.value.code


def test_elsewhere_goes_on_and_means_the_runs(tiniest_model, tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    import elsewhere

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(elsewhere, "WAYS", [("DDIM", 2, 1.0), ("DDIM, eta 0", 3, 3.0)])
    for run, shade in (("a", 0.1), ("b", 0.3)):
        Path(run).mkdir()
        write_config(Path(run), tiniest_model, reward="compressibility")
        Path(run, "shade").write_text(str(shade))
    drawn = []

    class Pipe:
        shade = 0.0

        def load_lora_weights(self, run, weight_name):
            self.shade = float((run / "shade").read_text())

    def judged(pipe, reward, sampler, steps, guidance):
        drawn.append((pipe.shade, sampler, steps, guidance))
        assert reward is rewards.compressibility
        return -steps + pipe.shade, 1 - pipe.shade

    monkeypatch.setattr(elsewhere.generate, "load", lambda model: Pipe())
    monkeypatch.setattr(elsewhere, "judged", judged)
    for argv in (["--steps=2"], []):
        monkeypatch.setattr(sys, "argv", ["elsewhere.py", "a", "b", *argv])
        elsewhere.main()
    assert drawn == [(shade, *way) for way in elsewhere.WAYS for shade in (0.0, 0.1, 0.3)]
    last = capsys.readouterr().out.splitlines()[-2:]
    assert last == ["| DDIM | 2 | 1.0 | -2.000, -1.800 | 100%, 80% |",
                    "| DDIM, eta 0 | 3 | 3.0 | -3.000, -2.800 | 100%, 80% |"]  # fmt: skip


def test_flow_steps_goes_on_and_means_the_seeds(tmp_path, monkeypatch, capsys):
    import flow_steps

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flow_steps, "WAYS", [("grpo", 0.7, 7), ("ddim", 1.0, 10)])
    monkeypatch.setattr(flow_steps, "REWARDS", flow_steps.REWARDS[:2])
    runs = []

    def run_one(reward, step, noise, steps, seed):
        if len(runs) == 5 and stopped:
            raise KeyboardInterrupt
        runs.append((reward, step, seed))
        gain = 0 if reward == "none" else 1 + seed
        return [gain, steps + gain, 0.5, 0.9, 10 + gain, 20 + gain, 0.5, 0.8]

    monkeypatch.setattr(flow_steps, "run_one", run_one)
    monkeypatch.setattr(sys, "argv", ["flow_steps.py"])
    stopped = True
    with pytest.raises(KeyboardInterrupt):
        flow_steps.main()
    stopped = False
    flow_steps.main()
    assert len(runs) == len(set(runs)) == 2 * (1 + 3 * 2)
    monkeypatch.setattr(sys, "argv", ["flow_steps.py", "--table"])
    capsys.readouterr()
    flow_steps.main()
    assert len(runs) == 14 and capsys.readouterr().out.splitlines()[2:] == [
        "| grpo 0.7 7 | 0.000 (90%) / 10.000 (80%) | 2.000 (90%) / 12.000 (80%) |"
        " 7.000 (90%) / 20.000 (80%) | 9.000 (90%) / 22.000 (80%) |",
        "| ddim 1.0 10 | 0.000 (90%) / 10.000 (80%) | 2.000 (90%) / 12.000 (80%) |"
        " 10.000 (90%) / 20.000 (80%) | 12.000 (90%) / 22.000 (80%) |",
        "seeds: 0 1 2",
    ]


@pytest.mark.parametrize("rank", [1, 4])
def test_kohyas_names_are_the_same_lora(rank, tiny_model, tmp_path):
    """In diffusers, which reads both. At rank 1 without the alphas, elsewhere with the rank."""
    pytest.importorskip("peft")
    import generate

    policy, _ = make_policy(tiny_model, 0.5, lora_rank=rank)
    ddpo.save_lora(policy, tmp_path / LORA)
    generate.save_kohya(tmp_path, tmp_path / "kohya.safetensors")
    names = load_file(tmp_path / "kohya.safetensors")
    alphas = [weights.item() for name, weights in names.items() if name.endswith(".alpha")]
    assert alphas == ([] if rank == 1 else [rank] * len(policy.lora))
    pictures = []
    for name in (None, LORA, "kohya.safetensors"):
        pipe = generate.load(tiny_model)
        if name:
            pipe.load_lora_weights(tmp_path, weight_name=name)
        config = {"steps": 2, "guidance_scale": 3.0}
        pictures.append(np.asarray(generate.draw(pipe, ["cat"], 0, config)[0]).astype(int))
    assert abs(pictures[1] - pictures[2]).max() <= 1 < abs(pictures[1] - pictures[0]).max()


@pytest.mark.parametrize("what, said", [
    ("no run", "config.json"),
    ("no LoRA", LORA),  # of the bundled model, by its short name
    ("no model", "gone/model"),
    ("no prompts", "pixels draws without prompts"),
])  # fmt: skip
def test_generate_says_in_a_line_what_it_cannot_draw(
    what, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("peft")  # diffusers asks for it before it looks for the file
    models = {"no LoRA": ddpo.Settings.model, "no model": "gone/model", "no prompts": "pixels"}
    save_tiny_pixels(Path("pixels"))
    if what in models:
        write_config(tmp_path, models[what])
    with pytest.raises(SystemExit) as end:
        run_script("generate.py", monkeypatch, tmp_path, "--prompts", "moon")
    assert ("the bundled model knows" in capsys.readouterr().out) == (what == "no LoRA")
    assert end.value.code.startswith("generate.py: error: ") and said in end.value.code
    assert "\n" not in end.value.code and not Path("generated.png").exists()


def write_run(run, reward, update="update", place="/here", **config):
    run.mkdir()
    made_with = {"update": update, "place": place}
    config = {"out": str(run), "lr": 0.1, "made_with": made_with, **config}
    (run / "config.json").write_text(json.dumps(config))
    rows = ["epoch,queries,reward_mean,kl,diversity,changed", "0,0,,,,"]
    rows += [f"1,64,{reward},0,,", f"2,128,{2 * reward},5,,a text", ""]
    (run / "metrics.csv").write_text("\n".join(rows))
    return run


@pytest.fixture
def plotted(tmp_path, monkeypatch):
    """A function that runs plot.py; returns its panels, and the curves of the first by label."""
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot as plt

    def plotted(*argv):
        out = tmp_path / "curves.png"
        run_script("plot.py", monkeypatch, *argv, "--out", out)
        assert out.stat().st_size > 5_000
        axes = plt.gcf().axes
        return axes, {line.get_label(): line.get_xydata().tolist() for line in axes[0].get_lines()}

    yield plotted
    plt.close("all")


def test_plot_shows_the_mean_and_range_of_seeds(plotted, tmp_path, capsys):
    a = write_run(tmp_path / "a", 1.0, objective="clipped", seed=0)
    b = write_run(tmp_path / "b", 3.0, objective="clipped", seed=1, place="/there")
    c = write_run(tmp_path / "c", 9.0, objective="reinforce", seed=0)
    d = write_run(tmp_path / "d", 5.0, objective="clipped", seed=0, update="forward_update")
    axes, lines = plotted(a, b, c, d)
    assert lines == {
        "objective clipped, update update (2 seeds)": [[64, 2], [128, 4]],
        "objective reinforce, update update": [[64, 9], [128, 18]],
        "objective clipped, update forward_update": [[64, 5], [128, 10]],
    }
    band = axes[0].collections[0].get_paths()[0].vertices.tolist()
    assert {tuple(point) for point in band} == {(64, 1), (64, 3), (128, 2), (128, 6)}
    assert f"saved {tmp_path / 'curves.png'}" in capsys.readouterr().out
    titles = [axis.get_title("left") for axis in axes]  # no run has diversity
    assert titles == ["reward of an epoch's images", "KL to the pretrained model, nats"]
    (legend,) = axes[0].figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(lines)
    _, lines = plotted(a, "--columns", "kl")
    assert lines == {"a": [[64, 0], [128, 5]]}
    e = write_run(tmp_path / "e", 1.0, objective="clipped", seed=0)  # as `a`: not several seeds
    _, lines = plotted(a, e)
    assert lines == {str(run): [[64, 1], [128, 2]] for run in (a, e)}


def test_a_gif_shows_the_evaluations_in_their_order(tmp_path, monkeypatch):
    """Each picture after the first repeats it above its own row, which is what is shown."""
    run = write_run(tmp_path / "run", 1.0)
    rows = ["epoch,eval_reward", "0,-2.0", "1,", "2,-1.5", "4,-1.0"]
    (run / "metrics.csv").write_text("\n".join(rows) + "\n")
    for epoch, colour in [(0, (1, 0, 0)), (2, (0, 1, 0)), (4, (0, 0, 1))]:
        images = torch.tensor(colour).view(1, 3, 1, 1).expand(3, 3, 64, 64)
        ddpo.save_pictures(images, ["cat"] * 3, run / f"samples/epoch_{epoch:04d}.png")
    run_script("plot.py", monkeypatch, "--gif", run)
    with Image.open(run / "run.gif") as gif:
        assert gif.n_frames == 3 and gif.info["loop"] == 0
        seen = []
        for frame in range(3):
            gif.seek(frame)
            pixels = [gif.convert("RGB").getpixel(at) for at in ((70, 21), (70, 23), (70, 200))]
            seen.append((*pixels, gif.info["duration"]))
        assert gif.size == (2 * 144, 20 + 2 * 160)
    white, red, green, blue = (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255)
    assert seen == [(white, red, red, 600), (white, green, green, 600), (white, blue, blue, 2000)]

    run_script("plot.py", monkeypatch, run, "--strip", 3, 1)  # two prompts, an epoch beside another
    with Image.open(run / "strip.png") as strip:
        assert strip.size == (3 * 144, 20 + 2 * 160)
        for y in (23, 183):
            assert [strip.getpixel((144 * x + 70, y)) for x in range(3)] == [red, green, blue]


@pytest.mark.parametrize("argv, said", [
    ("run --gif", "run has no pictures of evaluations"),
    ("run run --gif", "--gif and --strip take one run, and one of them is enough"),
    ("run --strip 1", "run has no such pictures of evaluations"),
    ("run gone", "gone has no metrics.csv: name the folder of a run"),
    ("run --columns kl beauty", "no run has numbers in a column beauty"),
    ("run --columns changed", "no run has numbers in a column changed"),
])  # fmt: skip
def test_what_cannot_be_plotted_is_one_line(argv, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(Path("run"), 1.0)
    with pytest.raises(SystemExit) as end:
        run_script("plot.py", monkeypatch, *argv.split())
    assert end.value.code == 2 and capsys.readouterr().err == f"plot.py: error: {said}\n"


def test_kill_resume_sees_every_difference_but_the_seconds(tiniest_model, tmp_path):
    import kill_resume

    ddpo.parse(kill_resume.FLAGS)  # which are there
    run = tmp_path / "run"
    ddpo.main(flags(tiniest_model, out=run, epochs=1))
    expected = kill_resume.contents(run)
    pictures = {f"samples/epoch_000{epoch}.png" for epoch in (0, 1)}
    assert set(expected) == {"config.json", "metrics.csv", "state.pt", LORA, *pictures}
    other = shutil.copytree(run, tmp_path / "other")
    state = torch.load(other / "state.pt", weights_only=True)
    state["log"][-1]["seconds"] += 1
    torch.save(state, other / "state.pt")
    assert kill_resume.contents(other) == expected
    state["optimizer"]["state"][0]["exp_avg"].view(-1)[0] += 1e-6
    torch.save(state, other / "state.pt")
    found = kill_resume.contents(other)
    assert [name for name in expected if found[name] != expected[name]] == ["state.pt"]
    for name, change in {"config.json": ("0.01", "0.02"), "metrics.csv": ("0,", "1,")}.items():
        text = (run / name).read_text()
        (run / name).write_text(text.replace(*change, 1))
        assert kill_resume.contents(run)[name] != expected[name] and text.count(change[0])


def test_overoptimisation_goes_on_without_the_limit(tmp_path, monkeypatch):
    """The command lines that it runs, here without running them."""
    pytest.importorskip("matplotlib")
    import overoptimisation

    parsed = []

    def run(command, **options):
        settings, resumed = ddpo.parse(command[2:])
        parsed.append((settings, resumed))
        folder = resumed or Path(settings.out)
        folder.mkdir(exist_ok=True)
        config = {**vars(settings), "made_with": {"place": str(EXAMPLES.parent)}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "metrics.csv").write_text("epoch,kl,changed\n0,,\n1,1,\n2,501,a text\n")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.chdir(EXAMPLES.parent)
    (tmp_path / "copy").mkdir()
    overoptimisation.train(tmp_path, 1, 80)
    (held, new), (free, resumed) = parsed
    assert new is None and resumed == tmp_path / "free-1"
    assert (held.reward, held.kl_stop, held.seed, held.epochs) == ("incompressibility", 500, 1, 80)
    assert vars(free) == {**vars(held), "kl_stop": 0.0}
    terms = rewards.load_rewards(held.reward, held.monitor)
    assert [label for label, _, _ in terms[1:]] == [overoptimisation.MONITOR, "diversity"]


def test_tensorboard_reads_back_what_a_run_recorded(tiniest_model, tmp_path, monkeypatch):
    """All columns, by epoch, on resuming too; and the pictures of the epochs with an evaluation."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tmp_path / "run"
    given = {"out": run, "epochs": 1, "eval_every": 9}
    run_script("log_to_tensorboard.py", monkeypatch, *flags(tiniest_model, **given))
    run_script("log_to_tensorboard.py", monkeypatch, "--resume", run, "--epochs", "3")
    rows = read_metrics(run)
    read = loader.EventAccumulator(str(run / "tensorboard")).Reload()
    assert set(read.Tags()["scalars"]) == rows[0].keys() - {"epoch", "changed"}
    for name in read.Tags()["scalars"]:
        found = {event.step: event.value for event in read.Scalars(name)}
        expected = {int(row["epoch"]): float(row[name]) for row in rows if row[name]}
        assert found == pytest.approx(expected, rel=1e-5), name
    assert [event.step for event in read.Images("samples")] == [0, 1, 3]
    last = Image.open(io.BytesIO(read.Images("samples")[-1].encoded_image_string))
    assert np.array_equal(last, Image.open(run / "samples/epoch_0003.png"))


SCRIPTS = "forward.py multi_gpu.py flow.py log_to_tensorboard.py experiments/variance.py".split()


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_under_the_scripts_own_name(script, monkeypatch, capsys):
    """And begins with what the script is for."""
    if "tensorboard" in script:
        pytest.importorskip("tensorboard")
    with pytest.raises(SystemExit) as end:
        run_script(script, monkeypatch, "--help")
    said = " ".join(capsys.readouterr().out.split())
    about = " ".join((EXAMPLES / script).read_text().split('"""')[1].split())
    assert end.value.code == 0 and said.startswith(f"usage: {Path(script).name} ")
    assert about in said and "--images-per-epoch" in said
