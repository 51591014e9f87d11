"""The sweep behind the bundled model's ddpo.json: what makes the smallest JPEGs in 5 minutes on
two CPU cores, animals intact?

    python examples/sweep.py --share 0.5   # every variant, half of the time, seed 0
    python examples/sweep.py --only base "lr 0.02" --seeds 0 1 2   # finalists, all of the time

Each variant differs from BASE in what its name says, and makes as many denoising steps as BASE
does in 5 minutes. A command that is repeated goes on with what is there; with a larger --share it
goes on with the runs of the smaller one. The monitor is the share of an epoch's pictures that
examples/emoji-clip can name among its 45 animals. A run counts with the smallest mean JPEG of
three successive epochs in which that is at least 0.9: so many kB after so many of the 5 minutes.
The table of all runs is sweep.md in their folder; that of the runs which ddpo.json was chosen from
is examples/sweep.md.
"""

import argparse
import csv
import functools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
BASE = {"images_per_epoch": 64, "steps": 10, "guidance_scale": 3.0, "samples_per_prompt": 1,
        "updates_per_epoch": 4, "lr": 0.01, "clip_range": 0.002, "min_std": 0.1,
        "lora_rank": 4}  # fmt: skip
VARIANTS = ["lr 0.005", "lr 0.02", "clip_range 0.001", "clip_range 0.004", "updates_per_epoch 2",
            "updates_per_epoch 8", "steps 6", "steps 15", "guidance_scale 2", "guidance_scale 5",
            "images_per_epoch 32", "images_per_epoch 128", "samples_per_prompt 2",
            "samples_per_prompt 4", "min_std 0"]  # fmt: skip
WORK = 40 * 64 * 10  # denoising steps, each with its learning, in 5 minutes on two cores
NAMEABLE = 0.9


@functools.cache
def judge():
    """emoji-clip's eye, and what it reads in the names of the animals."""
    from rewards import load_clip

    see, read, _ = load_clip(HERE / "emoji-clip", HERE / "emoji-clip", "cpu")
    lines = (HERE / "prompts/animals.txt").read_text().splitlines()
    animals = [line for line in lines if not line.startswith("#")]
    return see, animals, read(animals)


@torch.no_grad()
def named(images, prompts):
    """A monitor: 1 where emoji-clip takes the picture (B, 3, H, W) for the animal of its prompt,
    else 0."""
    from rewards import to_pil

    see, animals, words = judge()
    best = (see(to_pil(images)) @ words.T).argmax(1)
    return [float(animals[i] == prompt) for i, prompt in zip(best, prompts)]


def settings(variant):
    """BASE with the changes that a name such as "lr 0.005, steps 15" calls for."""
    changes = {}
    if variant != "base":
        changes = dict(part.split() for part in variant.split(", "))
    unknown = ", ".join(changes.keys() - BASE.keys())
    if unknown:
        known = ", ".join(BASE)
        sys.exit(f"sweep.py: error: {variant}: no setting named {unknown}; there are {known}")
    return {**BASE, **changes}


def epochs_done(run):
    """How many epochs a run has behind it."""
    if not (run / "metrics.csv").is_file():
        return 0
    return len(read_rows(run)) - 1  # row 0 is the evaluation before training


def read_rows(run):
    with open(run / "metrics.csv") as file:
        return list(csv.DictReader(file))


def train(variant, seed, share, folder):
    """Run a variant to its share of WORK, or go on with it, on one core."""
    own = settings(variant)
    run = folder / f"{variant} seed {seed}"
    epochs = round(share * WORK / (int(own["images_per_epoch"]) * int(own["steps"])))
    if epochs_done(run) >= epochs:
        return
    if (run / "config.json").is_file():
        flags = {"resume": run}
    else:
        flags = {**own, "reward": "compressibility", "seed": seed, "eval_every": 1000, "out": run}
    flags |= {"monitor": "examples/sweep.py:named", "epochs": epochs}
    command = [sys.executable, "ddpo.py"]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(folder / f"{run.name}.log", "a") as log:
        how = {"stdout": log, "stderr": subprocess.STDOUT, "check": True}
        subprocess.run(command, cwd=HERE.parent, env=environment, **how)


def result(run):
    """The last of the best three epochs of a run, how many it has, and the means of those three:
    JPEG, share named, nats. None if no three were nameable."""
    from compare import best_window

    columns = ("reward_mean", "named", "kl")
    rows = [[float(row[c] or 0) for c in columns] for row in read_rows(run)[1:]]
    found = best_window(rows, NAMEABLE)
    if not found:
        return None
    (reward, share, nats), last = found
    return last + 1, len(rows), -reward, share, nats


def report(folder):
    """sweep.md, from all runs in the folder, the best first."""
    found = []
    for run in [path.parent for path in folder.glob("*/metrics.csv")]:
        best = result(run)
        if not best:
            continue
        variant, seed = run.name.split(" seed ")
        epoch, ran, size, share, nats = best
        own = settings(variant)
        minutes = 5 * epoch * int(own["images_per_epoch"]) * int(own["steps"]) / WORK
        cells = [variant, seed, str(ran), str(epoch), f"{minutes:.1f}"]
        cells += [f"{size:.2f}", f"{share:.2f}", f"{nats:.0f}"]
        found.append((size, f"| {' | '.join(cells)} |"))
    lines = ["| variant | seed | epochs run | best end at | minutes | kB | named | nats |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    lines += [line for _, line in sorted(found)]
    text = "\n".join(lines) + "\n"
    (folder / "sweep.md").write_text(text)
    print(text, end="")


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("--only", nargs="+", metavar="VARIANT", help="some variants, or others; default: all")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--share", type=float, default=1.0, help="of the 5 minutes on two cores")
    add("--jobs", type=int, default=2, help="runs at once, each on one core")
    add("--runs", type=Path, default=HERE.parent / "runs/sweep", help="folder of the runs")
    args = parser.parse_args()
    folder = args.runs.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        done = []
        for variant in args.only or ["base", *VARIANTS]:
            for seed in args.seeds:
                done.append(pool.submit(train, variant, seed, args.share, folder))
        for future in done:
            future.result()  # or what went wrong in it
    report(folder)


if __name__ == "__main__":
    main()
