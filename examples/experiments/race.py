"""The race: what it costs DDPO, what came before it and what came after it to reach a reward while
the pictures are still what they should be.

    pip install matplotlib
    python examples/experiments/race.py --jobs 2   # all of it, each run on one core: some hours
    ... --rewards compressibility --methods DDPO-IS --seeds 0   # a few minutes

The same command goes on with what was stopped, and draws race.md and race.png from what there is,
with the rows of all runs in race.csv. With --known examples/experiments/race.csv it runs only what
is missing there; methods that are known there, of settings that ddpo.py no longer has, can be
shown. Run it from the repository's folder.

A run ends when it has reached its targets, has spent its calls, or has spoilt its pictures. What
counts is the mean of three successive epochs of 64 images, with at least 95 % of them named by
emoji-clip as the animal of their prompt. The cost is counted twice: in reward queries,
and in calls of the network for one image with guidance, of which a backward is two and a call
without guidance half of one. Measuring (KL, evaluations) is free.

Compressibility alone could not tell: fitting a model to its own pictures makes them plainer, too.
Under clipscore the model draws with 4 steps without guidance, which leaves much to learn: it
starts at 0.73, and 10 guided steps give 0.86.
"""

import argparse
import csv
import functools
import importlib.util
import itertools
import json
import multiprocessing
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import forward

import ddpo
import rewards

CLIP = "clipscore(examples/models/emoji-clip)"
MONITOR = "examples/experiments/race.py:named"
SETTINGS = {
    "compressibility": {"reward": "compressibility"},
    "incompressibility": {"reward": "incompressibility"},
    "clipscore": {"reward": CLIP, "steps": 4, "guidance_scale": 1},
}
TARGETS = {"compressibility": (-1.8, -1.7), "incompressibility": (2.5, 2.7), "clipscore": (0.82,)}
CALLS = {"compressibility": 15_000, "incompressibility": 15_000, "clipscore": 6_000}  # the most
NAMED = 0.95  # at least, for a reward to count
SPOILT = 0.8  # a run with fewer pictures named does not come back
FORWARD = {"noise_levels": 2, "adv_clip": 5.0, "lr": 0.004}
PAPER = {"samples_per_prompt": 1, "stats_buffer": 32, "min_std": 0.0, "adv_clip": 5.0,
         "clip_range": 0.0, "lr": 0.002}  # of all steps, per-prompt statistics, and 1.64 nats
METHODS = {  # beside the bundled model's own settings, which are groups of 4
    "DDPO-IS": {},
    "DDPO-SF": {"objective": "reinforce", "updates_per_epoch": 1, "lr": 0.004},
    "DDPO-IS-paper": PAPER,
    "RWR": {"method": "rwr", **FORWARD},
    "AWM": {"method": "awm", **FORWARD},
    "NFT": {"method": "nft", "beta": 0.1, **FORWARD},
    "PEPG": {"method": "pepg", **FORWARD},
}
LABELS = {"DDPO-IS": "DDPO-IS, groups of 4", "DDPO-SF": "DDPO-SF, groups of 4",
          "DDPO-IS-paper": "DDPO-IS as in the paper"}  # fmt: skip
TUNED = {  # what suits a method on one reward, by runs of seed 0 at two to four rates
    ("DDPO-IS", "compressibility"): {"lr": 0.002},
    ("DDPO-IS", "incompressibility"): {"lr": 0.006},
    ("DDPO-SF", "incompressibility"): {"lr": 0.01},
    ("AWM", "incompressibility"): {"lr": 0.01},
    ("RWR", "compressibility"): {"lr": 0.0015},
    ("NFT", "compressibility"): {"lr": 0.0015},
    ("AWM", "compressibility"): {"lr": 0.0015},
}


# ---------------------------------------------------- the yardstick


@functools.cache
def judge():
    """emoji-clip's eye, the animals, and what it reads in their names."""
    folder = ddpo.EXAMPLES / "models" / "emoji-clip"
    see, read, _ = rewards.load_clip(folder, folder, "cpu")
    animals = ddpo.load_prompts("animals")
    return see, animals, read(animals)


@torch.no_grad()
def named(images, prompts):
    """A monitor: 1 where emoji-clip takes the picture (B, 3, H, W) for the animal of its prompt,
    else 0."""
    see, animals, words = judge()
    best = (see(rewards.to_pil(images)) @ words.T).argmax(1)
    return [float(animals[i] == prompt) for i, prompt in zip(best, prompts)]


def counted(update):
    """The same update, whose metrics hold the calls of the network so far."""

    @functools.wraps(update)  # config.json has the name
    def counting(run, samples, generator):
        policy = run.policy
        predict = policy.predict
        calls = samples.logp.numel()  # a log-probability for each image and step
        calls -= len(samples.logp) * (1 - 1 / samples.alike)  # groups begin with one call

        def count(x_t, t, cond):
            nonlocal calls
            calls += len(x_t) * (3 if torch.is_grad_enabled() else 1)
            return predict(x_t, t, cond)

        policy.predict = count
        try:
            metrics = update(run, samples, generator)
        finally:
            policy.predict = predict
        calls *= 1.0 if policy.guidance_scale > 1 else 0.5
        return metrics | {"calls": run.log[-1].get("calls", 0) + calls}

    return counting


def windows(rows):
    """The means of three successive epochs, as (reward, share named), and the last one's row."""
    epochs = [row for row in rows if "reward_mean" in row]
    for last in range(2, len(epochs)):
        three = [(row["reward_mean"], row["named"]) for row in epochs[last - 2 : last + 1]]
        reward, share = np.mean(three, 0)
        yield reward, share, epochs[last]


def cost(rows, target):
    """Queries and calls until a target was reached, and the share named then; or None."""
    for reward, share, row in windows(rows):
        if reward >= target and share >= NAMED:
            return row["queries"], row["calls"], share
    return None


def ended(rows, reward):
    """Whether a run has reached its targets, spent its calls or spoilt its pictures."""
    seen = list(windows(rows))
    spoilt = bool(seen) and seen[-1][1] < SPOILT and reward != "clipscore"
    spent = bool(seen) and rows[-1].get("calls", 0) >= CALLS[reward]
    return spoilt or spent or all(cost(rows, target) for target in TARGETS[reward])


class RaceRun(ddpo.Run):
    def too_far(self, row):
        return ended(self.log, reward_of(self.settings))


# ---------------------------------------------------- runs


def reward_of(settings):
    """The name in SETTINGS of what a run learns."""
    return "clipscore" if settings.reward == CLIP else settings.reward


def make_settings(reward, variant, seed, runs):
    """Those of a run. A variant is a method and changes to it: "DDPO-IS lr=0.02 min_std=0"."""
    method, *changes = variant.split()
    if method not in METHODS:
        raise ddpo.UserError(f"{variant}: no method named {method}; there are {', '.join(METHODS)}")
    values = {**SETTINGS[reward], **METHODS[method], **TUNED.get((method, reward), {})}
    for change in changes:
        name, _, text = change.partition("=")
        with ddpo.explained(f"{change}: write it as lr=0.02"):
            values[name] = json.loads(text)
    values |= {"seed": seed, "out": f"{runs}/{reward}/{variant}/{seed}", "eval_every": 10**6,
               "monitor": MONITOR, "epochs": 1000}  # fmt: skip
    kind = forward.ForwardSettings if "method" in values else ddpo.Settings
    with ddpo.explained(variant):
        return kind(**values)


def read(folder):
    """The rows of a run's metrics.csv, as far as they count here; blank cells are left out."""
    path = folder / "metrics.csv"
    if not path.is_file():
        return []
    with open(path) as file:
        return [{k: float(row[k]) for k in ROW[1:] if row.get(k)} for row in csv.DictReader(file)]


def check(settings):
    """UserError if a run's folder holds another experiment."""
    config = Path(settings.out, "config.json")
    if config.is_file():
        saved = json.loads(config.read_text())
        now = asdict(settings) | {"out": saved.get("out")}
        changed = [name for name in now if saved.get(name) != now[name]]
        if changed:
            names = ", ".join(changed)
            raise ddpo.UserError(f"{config.parent} was run with another {names}: name other --runs")


def run_one(settings):
    """Train a run to its end, from where it was stopped if it was."""
    torch.set_num_threads(1)
    folder = Path(settings.out)
    begun = (folder / "state.pt").is_file()
    if folder.exists() and not begun:  # killed in its first evaluation: there is nothing in it
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    learns = forward.forward_update if hasattr(settings, "method") else ddpo.update
    how = {"update": counted(learns), "run_class": RaceRun}
    with open(f"{folder}.log", "a") as log, redirect_stdout(log), redirect_stderr(log):
        ddpo.launch(settings, folder if begun else None, **how)


def in_a_process(settings):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(run_one, settings).result()  # or what went wrong in it


def run_all(todo, jobs):
    """The runs that have not ended, `jobs` at a time."""
    for settings in todo:
        check(settings)
    left = [s for s in todo if not ended(read(Path(s.out)), reward_of(s))]
    print(f"runs to go: {len(left)}", flush=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    with ThreadPoolExecutor(jobs) as pool:  # each waits for a process
        runs = {pool.submit(in_a_process, settings): settings for settings in left}
        try:
            for done in as_completed(runs):
                done.result()
                settings = runs[done]
                queries = read(Path(settings.out))[-1]["queries"]
                print(f"{settings.out}: {queries:.0f} queries", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)  # else all that wait would be begun first


# ---------------------------------------------------- results

ROW = ["run", "epoch", "queries", "calls", "reward_mean", "named"]  # of race.csv


def pack(todo, folder):
    """Write race.csv: a row for each epoch of the runs that have ended."""
    with open(folder / "race.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ROW, extrasaction="ignore")
        writer.writeheader()
        for reward, variant, run in todo:
            rows = read(run)
            for row in rows[1:] if ended(rows, reward) else []:
                values = {name: f"{row[name]:.6g}" for name in ROW[1:]}
                writer.writerow({"run": f"{reward}/{variant}/{run.name}", **values})


def unpack(path, folder):
    """Put the runs of a race.csv where `read` finds them, but none over one that is there."""
    with ddpo.explained(f"--known {path}: no race.csv"), open(path, encoding="utf-8") as file:
        for run, rows in itertools.groupby(csv.DictReader(file), lambda row: row["run"]):
            metrics = folder / run / "metrics.csv"
            if not metrics.parent.exists():
                metrics.parent.mkdir(parents=True)
                with open(metrics, "w", newline="") as out:
                    writer = csv.DictWriter(out, ROW[1:], extrasaction="ignore")
                    writer.writeheader()
                    writer.writerow({"epoch": 0, "queries": 0})
                    writer.writerows(rows)


def cell(runs, target):
    """Thousands of calls to a target, mean and standard deviation over seeds; the queries, and the
    share named then."""
    if not runs:
        return ""
    costs = [cost(rows, target) for rows in runs]
    reached = [found for found in costs if found]
    if not reached:
        return f"0 of {len(runs)}"
    queries, calls, share = np.mean(reached, 0)
    text = f"{calls / 1000:.1f}"
    if len(reached) > 1:
        text += f" ± {np.std(reached, 0, ddof=1)[1] / 1000:.1f}"
    text += f" k ({queries:.0f}; {share:.0%})"
    if len(reached) < len(runs):
        text += f", {len(reached)} of {len(runs)}"
    return text


def best(runs):
    """The best reward at which enough pictures were named, mean and standard deviation."""
    bests = [max((r for r, share, _ in windows(rows) if share >= NAMED), default=None)
             for rows in runs]  # fmt: skip
    found = [value for value in bests if value is not None]
    text = f"{np.mean(found):.2f}" if found else ""
    if len(found) > 1:
        text += f" ± {np.std(found, ddof=1):.2f}"
    return text


def by_variant(todo):
    """The rows of the runs that have ended: {variant: {reward: [rows of a seed, ...]}}."""
    runs = {}
    for reward, variant, run in todo:
        rows = read(run)
        if ended(rows, reward):
            runs.setdefault(variant, {}).setdefault(reward, []).append(rows)
    return runs


def tabulate(runs, shown):
    """The table of the costs, of the rewards in `shown`."""
    targets = [(reward, target) for reward in shown for target in TARGETS[reward]]
    targets += [(reward, "best") for reward in shown]
    table = [["", *(f"{reward} {target}" for reward, target in targets)]]
    table.append(["---"] * len(table[0]))
    for variant, by_reward in runs.items():
        row = [LABELS.get(variant, variant)]
        for reward, target in targets:
            seeds = by_reward.get(reward, [])
            row.append(best(seeds) if target == "best" else cell(seeds, target))
        table.append(row)
    return "".join(f"| {' | '.join(row)} |\n" for row in table)


def draw(runs, shown, path):
    """Each run's means of three epochs against calls, as far as its pictures were named."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(shown), figsize=(5 * len(shown), 4.3), squeeze=False,
                                layout="constrained")  # fmt: skip
    for axis, reward in zip(axes[0], shown):
        for n, (variant, by_reward) in enumerate(runs.items()):
            label = LABELS.get(variant, variant)
            for rows in by_reward.get(reward, []):
                least = SPOILT if reward == "clipscore" else NAMED
                points = [(row["calls"] / 1000, mean) for mean, share, row in windows(rows)
                          if share >= least]  # fmt: skip
                if points:
                    axis.plot(*zip(*points), color=f"C{n}", alpha=0.7, linewidth=1, label=label)
                    label = None
        for target in TARGETS[reward]:
            axis.axhline(target, color="grey", linestyle=":")
        axis.set(title=reward, xlabel="thousand calls of the network")
    lines, labels = axes[0, 0].get_legend_handles_labels()
    if lines:
        figure.legend(lines, labels, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(todo, folder):
    """race.csv, race.md and race.png, of the runs that have ended."""
    runs = by_variant(todo)
    shown = list(dict.fromkeys(reward for reward, _, _ in todo))
    text = tabulate(runs, shown)
    pack(todo, folder)
    (folder / "race.md").write_text(text, encoding="utf-8")
    draw(runs, shown, folder / "race.png")
    print(f"{text}saved race.md, race.csv and race.png in {folder}")


def main(argv=None):
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("race.py", description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("--rewards", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME")
    add("--methods", nargs="+", default=list(METHODS), metavar="METHOD",
        help='default: all; with changes to settings: "DDPO-IS lr=0.02 min_std=0"')  # fmt: skip
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], metavar="INT")
    add("--jobs", type=int, default=1, help="runs at once, each on one core")
    add("--known", metavar="FILE", help="a race.csv, whose runs need not be run")
    add("--runs", type=Path, default=Path("runs/race"), help="folder of the runs and the results")
    args = parser.parse_args(argv)
    if not importlib.util.find_spec("matplotlib"):  # better said now than after a night
        sys.exit("race.py: error: it draws with matplotlib: pip install matplotlib")
    try:
        if args.known:
            unpack(args.known, args.runs)
        todo = []
        settings = []
        for seed, reward, variant in itertools.product(args.seeds, args.rewards, args.methods):
            run = args.runs / reward / variant / str(seed)
            todo.append((reward, variant, run))
            known = not (run / "config.json").is_file() and ended(read(run), reward)
            if not known:  # else its settings need not exist any more
                settings.append(make_settings(reward, variant, seed, args.runs))
        run_all(settings, args.jobs)
        report(todo, args.runs)
    except ddpo.UserError as error:
        # Its note says how ddpo.py would go on, which would count no calls.
        in_mid_run = bool(getattr(error, "__notes__", []))
        sys.exit(f"race.py: error: {error}" + "; the same command goes on" * in_mid_run)
    except KeyboardInterrupt:
        sys.exit("race.py: stopped; the same command goes on")


if __name__ == "__main__":
    main()
