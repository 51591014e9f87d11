"""Over-optimisation, measured and held: the bundled model learns to draw pictures that are large
as JPEGs, and a limit on the KL to the pretrained model ends the run in time. Then it goes on
without the limit, to see what would have come.

    pip install matplotlib
    python examples/experiments/overoptimisation.py --jobs 2   # a seed on each of two CPU cores

Run it again to go on with what was stopped. A monitor that is never optimised, emoji-clip, says
whether the animal can still be recognised; another, how much pictures of one animal differ. Every
run is made by ddpo.py's command line, in runs/overoptimisation; overoptimisation.png and .md come
from what the runs leave there. A dotted line is the limit, or 90 % of the monitor's start.
"""

import argparse
import csv
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
MONITOR = "clipscore(examples/models/emoji-clip)"
LIMIT = 500  # nats; chosen after runs of seeds 0 and 1
MONITORS = f"{MONITOR},examples/my_reward.py:diversity"
# An epoch is one batch, so that diversity sees all of a prompt's pictures.
SETTINGS = {"reward": "incompressibility", "monitor": MONITORS, "kl_stop": LIMIT, "eval_every": 20,
            "updates_per_epoch": 4, "samples_per_prompt": 1, "batch_size": 64}  # fmt: skip
SHOWN = {"reward_mean": "reward: kB of the JPEG", MONITOR: "monitor: cosine with the prompt",
         "diversity": "monitor: diversity", "kl": "KL to the pretrained model, nats"}  # fmt: skip


# ---------------------------------------------------- runs


def read(folder):
    """The columns of metrics.csv as arrays, from epoch 1 on; None before there are any. Blank
    cells are NaN."""
    if not (folder / "metrics.csv").is_file():
        return None
    _, *rows = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
    columns = [name for name in (rows or [{}])[0] if name != "changed"]  # a text
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in columns} or None


def ddpo(log, **settings):
    """ddpo.py with these flags on one core; what it says is added to `log`."""
    command = [sys.executable, "ddpo.py"]
    for name, value in settings.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    one_core = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "a") as file:
        how = {"stdout": file, "stderr": subprocess.STDOUT, "check": True}
        subprocess.run(command, cwd=ROOT, env=one_core, **how)


def train(folder, seed, epochs):
    """The two runs of a seed. The second begins as a copy of the first, which the limit has ended,
    and goes on without it: up to there they are one. What is done already is left alone."""
    held = folder / f"held-{seed}"
    free = folder / f"free-{seed}"
    metrics = read(held)
    if metrics is None or metrics["epoch"][-1] < epochs and not metrics["kl"][-1] > LIMIT:
        flags = {**SETTINGS, "seed": seed, "out": held}
        if (held / "state.pt").is_file():
            flags = {"resume": held, "monitor": MONITORS}
        ddpo(folder / f"held-{seed}.log", **flags, epochs=epochs)
    if not free.exists():
        shutil.copytree(held, folder / "copy" / free.name, dirs_exist_ok=True)
        (folder / "copy" / free.name).rename(free)
    if read(free)["epoch"][-1] < epochs:
        flags = {"resume": free, "monitor": MONITORS, "kl_stop": 0}
        ddpo(folder / f"free-{seed}.log", **flags, epochs=epochs)


# ---------------------------------------------------- what came of them


def strip(folder, epoch):
    """The pictures of that epoch: in a later file they are below those of epoch 0."""
    picture = Image.open(folder / f"samples/epoch_{epoch:04d}.png")
    top = picture.height // 2 if epoch else 0
    return picture.crop((0, top, picture.width, picture.height))


def draw(runs, folder, out):
    """The curves of all seeds, and below them what the first one draws before, at the limit and at
    the end."""
    figure = plt.figure(figsize=(14, 7.4), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1, 1.1])
    first = min(runs)
    dotted = {"kl": LIMIT}
    dotted[MONITOR] = 0.9 * np.mean([held[MONITOR][0] for held, _ in runs.values()])
    for axes, (column, title) in zip(above.subplots(1, len(SHOWN)), SHOWN.items()):
        for seed, (held, free) in runs.items():
            labels = [f"--kl-stop {LIMIT}", "gone on without it"] if seed == first else [None] * 2
            stop = len(held["epoch"]) - 1
            axes.plot(held["epoch"], held[column], color="tab:blue", lw=1, label=labels[0])
            gone_on = (free["epoch"][stop:], free[column][stop:])
            axes.plot(*gone_on, color="tab:red", lw=1, label=labels[1])
            axes.plot(held["epoch"][-1], held[column][-1], "o", color="tab:blue", ms=5)
        axes.set(title=title, xlabel="epoch")
        if column in dotted:
            axes.axhline(dotted[column], color="gray", lw=0.8, ls=":")
            axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="upper left")
    stop, end = (int(metrics["epoch"][-1]) for metrics in runs[first])
    shown = [("held", 0, "before"), ("held", stop, f"at the limit, epoch {stop}"),
             ("free", end, f"without it, epoch {end}")]  # fmt: skip
    for axes, (name, epoch, title) in zip(below.subplots(len(shown), 1), shown):
        axes.imshow(strip(folder / f"{name}-{first}", epoch))
        axes.set(xticks=[], yticks=[])
        axes.set_title(title, loc="left", fontsize=10)
        axes.spines[:].set_visible(False)
    figure.savefig(out / "overoptimisation.png", dpi=100)


HEADER = """\
Means over the 64 images of an epoch; the start is epoch 1. The limit was chosen after runs of \
seeds 0 and 1.

| seed | run | epochs | KL, nats | reward, kB | gain, of the free run's | monitor \
| of the start's | diversity, of the start's |
|---|---|---|---|---|---|---|---|---|
"""


def tabulate(runs):
    """The table in markdown: where the runs ended, compared with epoch 1, whose images are still
    the pretrained model's."""
    text = HEADER
    for seed, (held, free) in runs.items():
        gain = free["reward_mean"][-1] - free["reward_mean"][0]
        for name, m in ((f"`--kl-stop {LIMIT}`", held), ("gone on without", free)):
            reward = m["reward_mean"]
            monitor = m[MONITOR]
            cells = [str(seed), name, str(len(reward)), f"{m['kl'][-1]:,.0f}"]
            cells += [f"{reward[0]:.2f} to {reward[-1]:.2f}"]
            cells += [f"{(reward[-1] - reward[0]) / gain:.0%}"]
            cells += [f"{monitor[0]:.3f} to {monitor[-1]:.3f}", f"{monitor[-1] / monitor[0]:.0%}"]
            cells += [f"{m['diversity'][-1] / m['diversity'][0]:.2f}"]
            text += f"| {' | '.join(cells)} |\n"
    return text


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1], metavar="N")
    add("--epochs", type=int, default=80, metavar="N", help="of the runs without the limit")
    add("--jobs", type=int, default=1, metavar="N", help="seeds at a time, each on one core")
    add("--runs", type=Path, default=ROOT / "runs/overoptimisation", metavar="FOLDER")
    add("--out", type=Path, metavar="FOLDER", help="of the figure and the table; default: --runs")
    args = parser.parse_args()
    folder = args.runs.resolve()
    out = args.out or folder
    (folder / "copy").mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda seed: train(folder, seed, args.epochs), args.seeds))
    runs = {}
    for seed in args.seeds:
        runs[seed] = (read(folder / f"held-{seed}"), read(folder / f"free-{seed}"))
    draw(runs, folder, out)
    (out / "overoptimisation.md").write_text(tabulate(runs))
    minutes = sum(free["seconds"][-1] for _, free in runs.values()) / 60
    print(tabulate(runs) + f"\nThe runs took {minutes:.0f} minutes in all.")


if __name__ == "__main__":
    main()
