"""Over-optimisation, measured and held: the bundled model learns to draw pictures that are large as JPEGs, and a limit on the
KL to the pretrained model ends the run in time. Then it goes on without the limit, to see what would have come.

    python examples/overoptimisation.py --jobs 2           # one seed on each of two CPU cores; run it again to go on

A monitor that is never optimised, examples/emoji-clip, says whether the animal can still be recognised. Every run is made by
ddpo.py's command line, in runs/overoptimisation; overoptimisation.png and .md come from what the runs leave there. A dotted
line is the limit, or 90 % of the monitor's start. Needs matplotlib.
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

HERE = Path(__file__).resolve().parent
MONITOR = "clipscore(examples/emoji-clip)"
LIMIT = 500  # nats; chosen after runs of seeds 0 and 1
SETTINGS = {"reward": "incompressibility", "monitor": MONITOR, "kl_stop": LIMIT, "eval_every": 20, "save_every": 5,
            "reward_batch_size": 64, "updates_per_epoch": 4, "samples_per_prompt": 1}  # fmt: skip
SHOWN = {"reward_mean": "reward: kB of the JPEG", MONITOR: "monitor: cosine with the prompt",
         "diversity": "diversity of latents", "kl": "KL to the pretrained model, nats"}  # fmt: skip


# ---------------------------------------------------------------- runs


def read(folder):
    """The columns of metrics.csv as arrays, from epoch 1 on; None before there are any. Blank cells are NaN."""
    if not (folder / "metrics.csv").is_file():
        return None
    _, *rows = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
    return {column: np.array([float(row[column] or "nan") for row in rows]) for column in rows[0]}


def ddpo(log, **settings):
    """ddpo.py with these flags on one core; what it says is added to `log`."""
    flags = [part for name, value in settings.items() for part in ("--" + name.replace("_", "-"), str(value))]
    with open(log, "a") as file:
        command, threads = [sys.executable, "ddpo.py", *flags], {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=HERE.parent, env=threads, stdout=file, stderr=subprocess.STDOUT, check=True)


def train(folder, seed, epochs):
    """The two runs of a seed. The second begins as a copy of the first, which the limit has ended, and goes on without it: up
    to there they are one. What is done already is left alone."""
    held, free = (folder / f"{name}-{seed}" for name in ("held", "free"))
    metrics = read(held)
    if metrics is None or metrics["epoch"][-1] < epochs and not metrics["kl"][-1] > LIMIT:
        begun = (held / "config.json").is_file()
        ddpo(folder / f"held-{seed}.log", **{"resume": held} if begun else {**SETTINGS, "seed": seed, "out": held}, epochs=epochs)
    if not free.exists():
        shutil.copytree(held, folder / "copy" / free.name, dirs_exist_ok=True)
        (folder / "copy" / free.name).rename(free)
    if read(free)["epoch"][-1] < epochs:
        ddpo(folder / f"free-{seed}.log", resume=free, kl_stop=0, epochs=epochs)


# ---------------------------------------------------------------- what came of them


def strip(folder, epoch):
    """The pictures of that epoch: in a later file they are below those of epoch 0."""
    picture = Image.open(folder / f"samples/epoch_{epoch:04d}.png")
    return picture.crop((0, picture.height // 2 if epoch else 0, picture.width, picture.height))


def draw(runs, folder, out):
    """The curves of all seeds, and below them what the first one draws before, at the limit and at the end."""
    figure = plt.figure(figsize=(14, 7.4), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1, 1.1])
    for axes, (column, title) in zip(above.subplots(1, len(SHOWN)), SHOWN.items()):
        for seed, (held, free) in runs.items():
            labels = [f"--kl-stop {LIMIT}", "gone on without it"] if seed == min(runs) else [None, None]
            stop = len(held["epoch"]) - 1
            axes.plot(held["epoch"], held[column], color="tab:blue", lw=1, label=labels[0])
            axes.plot(free["epoch"][stop:], free[column][stop:], color="tab:red", lw=1, label=labels[1])
            axes.plot(held["epoch"][-1], held[column][-1], "o", color="tab:blue", ms=5)
        axes.set(title=title, xlabel="epoch")
        dotted = {"kl": LIMIT, MONITOR: 0.9 * np.mean([held[MONITOR][0] for held, _ in runs.values()])}
        if column in dotted:
            axes.axhline(dotted[column], color="gray", lw=0.8, ls=":")
            axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="upper left")
    seed = min(runs)
    stop, end = (int(metrics["epoch"][-1]) for metrics in runs[seed])
    shown = [("held", 0, "before"), ("held", stop, f"at the limit, epoch {stop}"), ("free", end, f"without it, epoch {end}")]
    for axes, (name, epoch, title) in zip(below.subplots(len(shown), 1), shown):
        axes.imshow(strip(folder / f"{name}-{seed}", epoch))
        axes.set(xticks=[], yticks=[])
        axes.set_title(title, loc="left", fontsize=10)
        axes.spines[:].set_visible(False)
    figure.savefig(out / "overoptimisation.png", dpi=100)


def tabulate(runs):
    """The table in markdown: where the runs ended, compared with epoch 1, whose images are still the pretrained model's."""
    lines = ["Means over the 64 images of an epoch; the start is epoch 1. The limit was chosen after runs of seeds 0 and 1.", "",
             "| seed | run | epochs | KL, nats | reward, kB | gain, of the free run's | monitor | of the start's | diversity |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for seed, (held, free) in runs.items():
        gain = free["reward_mean"][-1] - free["reward_mean"][0]
        for name, m in ((f"`--kl-stop {LIMIT}`", held), ("gone on without", free)):
            reward, monitor = m["reward_mean"], m[MONITOR]
            lines.append(f"| {seed} | {name} | {len(reward)} | {m['kl'][-1]:,.0f} | {reward[0]:.2f} to {reward[-1]:.2f} "
                         f"| {(reward[-1] - reward[0]) / gain:.0%} | {monitor[0]:.3f} to {monitor[-1]:.3f} "
                         f"| {monitor[-1] / monitor[0]:.0%} | {m['diversity'][-1]:.2f} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], metavar="N")
    parser.add_argument("--epochs", type=int, default=80, metavar="N", help="of the runs without the limit (default: 80)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="seeds at a time, each on one core (default: 1)")
    parser.add_argument("--runs", type=Path, default=HERE.parent / "runs/overoptimisation", metavar="FOLDER")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for the figure and the table; default: that of the runs")
    args = parser.parse_args()
    folder, out = args.runs.resolve(), args.out or args.runs
    (folder / "copy").mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda seed: train(folder, seed, args.epochs), args.seeds))
    runs = {seed: (read(folder / f"held-{seed}"), read(folder / f"free-{seed}")) for seed in args.seeds}
    draw(runs, folder, out)
    (out / "overoptimisation.md").write_text(tabulate(runs))
    print(tabulate(runs) + f"\nThe runs took {sum(free['seconds'][-1] for _, free in runs.values()) / 60:.0f} minutes in all.")


if __name__ == "__main__":
    main()
