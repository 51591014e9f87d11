"""The paper's main comparison in small: DDPO against reward-weighted regression (RWR), at equal
reward queries.

    pip install matplotlib
    python examples/compare.py --quick   # one reward, one seed, 10 epochs: about 5 minutes
    python examples/compare.py           # three rewards, three seeds; goes on with what was stopped

Times are for two free CPU cores. Run it from the repository's folder. compare.png and compare.md,
a table, come from the runs that have ended. Flags of ddpo.py can be added (--epochs 50); what
METHODS and RWR below set, stays. Commands with different --rewards or --seeds can share the work.

DDPO-IS and DDPO-SF are ddpo.py with the bundled model's settings; SF takes one update an epoch,
from all of its images.

RWR samples and scores as DDPO does, then trains on the denoising loss of the final latents, of the
guided prediction as in the paper's code. An image counts with softmax(b * adv), where adv is
DDPO's advantage. The paper has b = 0.2 and raw rewards, kB of 512 x 512 pixels among them; here
their std is 0.3 kB, with which b = 0.2 would hardly select. RWR-sparse keeps the best tenth of an
epoch's images. The paper draws 10,000 images a round and makes 400 updates; here a round is an
epoch of DDPO, with 8 updates of 64 noisy latents: as many calls of the network as DDPO's, under
clipscore four times as many.

Fitting a model to its own images makes them plainer, whatever the weights. Under compressibility
that passes for progress, so there a control is run as well: RWR with equal weights, which know
nothing of the reward.

clipscore is the cosine of prompt and picture by examples/emoji-clip. With the bundled model's 10
guided steps it is 0.86 and leaves little to learn, so to be rewarded the model draws with 4
unguided ones, at a fifth of the price, which give 0.73; DDPO learns from the first two of them, as
the others add hardly any noise. Under the JPEG rewards the same score is only watched: it tells
whether the pictures still show their animals.

What was tried, all on seed 0:

    compressibility     the best recognisable JPEG in kB. RWR with lr 0.001: 1.69 (b = 1),
                        1.64 (3), 1.71 (10). RWR-sparse: 1.76 (lr 0.0003), 1.70 (0.001).
                        DDPO's settings are from sweep.py.
    incompressibility   the same, larger is better. RWR with lr 0.0001: 2.20 (b = 3), 2.20 (10);
                        with 0.0003 and b = 10 it ends at 2.07, below its start of 2.18.
                        RWR-sparse: 2.19 (lr 0.0001), 2.10 (0.0003; ends at 1.60).
    clipscore           at the end, from 0.759. DDPO-IS: 0.842 (lr 0.003), 0.829 (0.006).
                        DDPO-SF: 0.827 (0.01), 0.283 (0.02). RWR: b = 1, 0.739 (lr 0.00003),
                        0.67 (0.0001, 20 epochs), 0.26 (0.0003, 16); b = 3, 0.748 (0.00003),
                        0.673 (0.0001); b = 10, 0.756 (0.00003), 0.733 (0.0001); 4 rounds of 416
                        images with 52 updates, b = 3, 0.687 (0.0001). RWR-sparse: 0.741
                        (0.00003), 0.39 (0.0003, 16).
"""

import argparse
import csv
import importlib.util
import itertools
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ddpo

CLIP = "clipscore(examples/emoji-clip)"  # whether the pictures still show their animals
REWARDS = {
    "compressibility": {"reward": "compressibility", "monitor": CLIP, "eval_images": 45},
    "incompressibility": {"reward": "incompressibility", "monitor": CLIP, "eval_images": 45},
    "clipscore": {"reward": CLIP, "eval_images": 45, "steps": 4, "guidance_scale": 1, "lr": 0.003,
                  "epochs": 26},
}  # fmt: skip
METHODS = {  # those with `keep` are kinds of RWR
    "DDPO-IS": {"objective": "clipped"},
    "DDPO-SF": {"objective": "reinforce", "updates_per_epoch": 1, "lr": 0.01},
    "RWR": {"updates_per_epoch": 8, "keep": 1.0},
    "RWR-sparse": {"updates_per_epoch": 8, "keep": 0.1, "inverse_temperature": 0.0},
    "equal weights": {"updates_per_epoch": 8, "keep": 1.0, "inverse_temperature": 0.0},
}
RWR = {  # of all its kinds, but for what METHODS sets
    "compressibility": {"lr": 1e-3, "inverse_temperature": 3.0},
    "incompressibility": {"lr": 1e-4, "inverse_temperature": 10.0},
    "clipscore": {"lr": 3e-5, "inverse_temperature": 10.0},
}
RECOGNISABLE = 0.8  # the clipscore; untrained it is 0.86
SECONDS = 0.006  # an image's call of the network, its share of training included, on two CPU cores


# ---------------------------------------------------- reward-weighted regression


@dataclass(frozen=True)
class RWRSettings(ddpo.Settings):
    """Those of ddpo.py and two of RWR's own. Of DDPO's own, such as the objective, RWR uses none.
    An update takes `micro_batch` noisy latents from all of the epoch's images."""

    inverse_temperature: float = 0.0  # an image counts with softmax(this * advantage)
    keep: float = 1.0  # this share of the images counts, the best ones


def rwr_weights(adv, inverse_temperature, keep):
    """softmax(inverse_temperature * adv) of the best share `keep` of N advantages and of those
    equal to the last of them, 0 for the others; times N: (N,) with mean 1."""
    kept = adv >= adv.quantile(1 - keep)
    return (inverse_temperature * adv).masked_fill(~kept, -math.inf).softmax(0) * len(adv)


def denoising_loss(policy, x_0, noise, t, cond):
    """What diffusion models are pretrained with: the squared error of the prediction from x_t,
    which is x_0 (B, C, H, W) with noise added, (B,). With guidance, as in the paper's code: what
    is fitted to the images is the model that sampled them."""
    x_t = policy.scheduler.add_noise(x_0, noise, t)
    kind = policy.scheduler.config.prediction_type
    if kind == "epsilon":
        target = noise
    elif kind == "v_prediction":
        target = policy.scheduler.get_velocity(x_0, noise, t)
    else:  # "sample"
        target = x_0
    return ((policy.predict(x_t, t, cond) - target) ** 2).mean((1, 2, 3))


def rwr_update(run, samples, generator):
    """An epoch of RWR, in the place of ddpo.update: `updates_per_epoch` steps on the weighted
    denoising loss of the final latents. Returns the epoch's metrics."""
    x, _, cond, adv = samples
    settings = run.settings
    policy = run.policy
    weights = rwr_weights(adv, settings.inverse_temperature, settings.keep)
    counted = weights.nonzero().flatten()  # the others would be work for nothing
    timesteps = policy.scheduler.config.num_train_timesteps
    losses = []
    norms = []
    for _ in range(settings.updates_per_epoch):
        drawn = torch.randint(len(counted), (policy.micro_batch,), generator=generator)
        i = counted[drawn.to(x.device)]
        t = torch.randint(timesteps, i.shape, generator=generator).to(x.device)
        noise = torch.randn(len(i), *x.shape[2:], generator=generator).to(x.device)
        loss = weights[i] * denoising_loss(policy, x[i, -1], noise, t, cond[i])
        loss = loss.mean() * len(counted) / len(x)
        run.scaler.scale(loss).backward()
        losses.append(loss.item())
        norms.append(run.step())
    skipped = sum(not math.isfinite(norm) for norm in norms)
    return {"loss": float(np.mean(losses)), "grad_norm": float(np.mean(norms)), "skipped": skipped}


# ---------------------------------------------------- runs


def plan(args, flags):
    """(reward, method, seed, settings) of every run. `flags` are more flags of ddpo.py, for all."""
    todo = []
    for seed, reward, method in itertools.product(args.seeds, args.rewards, METHODS):
        if method == "equal weights" and reward != "compressibility":
            continue  # a control, for where it could pass for progress
        given = [f"--{name.replace('_', '-')}={v}" for name, v in REWARDS[reward].items()]
        if args.quick:
            given.append("--epochs=10")
        given += flags  # of two, the later one counts
        given += [f"--seed={seed}", f"--out={args.runs}/{reward}/{method}-{seed}"]
        settings, resumed = ddpo.parse(given)
        if resumed:
            raise ddpo.UserError("--resume: the same command goes on by itself")
        values = {**asdict(settings), "eval_every": settings.epochs}
        if "keep" in METHODS[method]:
            settings = RWRSettings(**{**values, **RWR[reward], **METHODS[method]})
        else:
            settings = ddpo.Settings(**{**values, **METHODS[method]})
        todo.append((reward, method, seed, settings))
    return todo


def finished(settings):
    """Whether a run has been to its end; UserError if its folder holds another experiment."""
    folder = Path(settings.out)
    if (folder / "config.json").is_file():
        saved = json.loads((folder / "config.json").read_text())
        now = {**asdict(settings), "out": saved.get("out")}
        changed = [name for name in now if saved.get(name) != now[name]]
        if changed:
            names = ", ".join(changed)
            how = "delete it or name other --runs"
            raise ddpo.UserError(f"{folder} was run with another {names}: {how}")
    if not (folder / "metrics.csv").is_file():
        return False
    last = read(settings)[-1]
    return last["epoch"] == settings.epochs and "eval_reward" in last


def run_one(settings):
    """Train a run to its end, from where it was stopped if it was."""
    folder = Path(settings.out)
    folder.mkdir(parents=True, exist_ok=True)
    update = rwr_update if isinstance(settings, RWRSettings) else ddpo.update
    ddpo.launch(settings, folder, update=update)  # all else is the same for every method


# ---------------------------------------------------- results


def read(settings):
    """The rows of a run's metrics.csv, with numbers in them; blank cells are left out."""
    with open(Path(settings.out) / "metrics.csv") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def best_window(values, least):
    """Means of three successive rows of `values`, whose columns are a reward, what is watched, and
    any others (epochs, columns): those with the best reward where what is watched is `least` or
    more, and the last row's number. None if there are none."""
    best = None
    for last in range(2, len(values)):
        means = np.mean(values[last - 2 : last + 1], 0)
        if means[1] >= least and (best is None or means[0] > best[0][0]):
            best = (means, last)
    return best


def best_recognisable(rows):
    """The best mean reward of three successive epochs with a clipscore of at least RECOGNISABLE,
    and the queries so far; NaN if there are none."""
    epochs = rows[1:]
    found = best_window([[row["reward_mean"], row[CLIP]] for row in epochs], RECOGNISABLE)
    if not found:
        return math.nan, math.nan
    means, last = found
    return means[0], epochs[last]["queries"]


def mean_and_spread(values, digits):
    """As text, "-" if one of the values is missing."""
    if not values or not np.isfinite(values).all():
        return "-"
    text = f"{np.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1):.{digits}f}"
    return text


def cells(seeds, evaluated, epoch):
    """Of the runs of several seeds, as text: the reward of one evaluation, the clipscore of one
    epoch, the best reward that leaves the pictures recognisable, and after how many queries."""
    watched = [rows for rows in seeds if CLIP in rows[epoch]]
    best = [best_recognisable(rows) for rows in watched]
    return [
        mean_and_spread([rows[evaluated]["eval_reward"] for rows in seeds], 3),
        mean_and_spread([rows[epoch][CLIP] for rows in watched], 3),
        mean_and_spread([reward for reward, _ in best], 3),
        mean_and_spread([queries for _, queries in best], 0),
    ]


def draw_curves(axis, methods, column):
    """For each method a curve, the mean of its seeds, and a band from the lowest to the highest."""
    for method, seeds in methods.items():
        curves = [[row[column] for row in rows[1:] if column in row] for rows in seeds]
        if curves and curves[0]:
            queries = [row["queries"] for row in seeds[0][1:]]
            style = "--" if "sparse" in method else "-"
            axis.plot(queries, np.mean(curves, 0), style, label=method)
            axis.fill_between(queries, np.min(curves, 0), np.max(curves, 0), alpha=0.2)


def report(todo, folder):
    """compare.md and compare.png, from the runs that have ended. A reward in the table is that of
    the last evaluation: the same prompts and noise for every method and, before training, for the
    pretrained model. The other columns are of `cells`."""
    import matplotlib.pyplot as plt

    runs = {}
    for reward, method, _, settings in todo:
        seeds = runs.setdefault(reward, {}).setdefault(method, [])
        if finished(settings):
            seeds.append(read(settings))
    header = ("reward", "method", "at the end", "clipscore", "best recognisable", "at query")
    table = [header, ("---",) * 6]
    figure, axes = plt.subplots(2, len(runs), figsize=(5 * len(runs), 7), squeeze=False,
                                sharex="col", height_ratios=[2, 1])  # fmt: skip
    for (upper, lower), (reward, methods) in zip(axes.T, runs.items()):
        untrained = max(methods.values(), key=len)
        table.append((reward, "pretrained", *cells(untrained, 0, 1)[:2], "-", "-"))
        for method, seeds in methods.items():
            table.append((reward, method, *cells(seeds, -1, -1)))
        draw_curves(upper, methods, "reward_mean")
        draw_curves(lower, methods, CLIP)
        if untrained:  # epoch 1 is of images that were drawn before any update
            start = np.mean([rows[1]["reward_mean"] for rows in untrained])
            upper.axhline(start, color="grey", linestyle=":", label="pretrained")
        upper.set_title(f"{reward}, {len(untrained)} seed" + "s" * (len(untrained) > 1))
        lower.set(xlabel="reward queries", ylabel="clipscore")
        if not lower.lines:
            lower.set_visible(False)
            upper.tick_params(labelbottom=True)
            upper.set_xlabel("reward queries")
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(folder / "compare.png", dpi=130)
    plt.close(figure)
    text = "\n".join(f"| {' | '.join(row)} |" for row in table)
    (folder / "compare.md").write_text(text + "\n", encoding="utf-8")
    print(f"{text}\nsaved {folder / 'compare.png'} and compare.md beside it")


def parse(argv):
    """Our own flags, with their defaults filled in, and the rest, which are ddpo.py's."""
    style = argparse.RawDescriptionHelpFormatter
    how = {"formatter_class": style, "allow_abbrev": False}
    parser = argparse.ArgumentParser("compare.py", description=__doc__, **how)
    add = parser.add_argument
    add("--quick", action="store_true", help="compressibility, one seed, 10 epochs")
    add("--rewards", nargs="+", choices=REWARDS, help="default: all", metavar="NAME")
    add("--seeds", type=int, nargs="+", help="default: 0 1 2", metavar="INT")
    add("--runs", help="folder of the runs; default: runs/compare or runs/compare-quick")
    add("--out", type=Path, help="folder of compare.png and .md; default: that of the runs")
    args, flags = parser.parse_known_args(argv)
    args.rewards = args.rewards or (["compressibility"] if args.quick else list(REWARDS))
    args.seeds = args.seeds or ([0] if args.quick else [0, 1, 2])
    args.runs = args.runs or ("runs/compare-quick" if args.quick else "runs/compare")
    args.out = args.out or Path(args.runs)
    return args, flags


def main(argv=None):
    args, flags = parse(argv)
    if not importlib.util.find_spec("matplotlib"):  # better said now than after a night
        sys.exit("compare.py: error: it draws with matplotlib: pip install matplotlib")
    try:
        todo = plan(args, flags)
        left = [run for run in todo if not finished(run[-1])]
        calls = 0
        for *_, s in left:
            calls += s.epochs * s.images_per_epoch * s.steps * (1 + (s.guidance_scale > 1))
        minutes = f"about {calls * SECONDS / 60:.0f} minutes on two free CPU cores"
        print(f"{len(left)} of {len(todo)} runs to go: {minutes}", flush=True)
        for n, (reward, method, seed, settings) in enumerate(left, 1):
            print(f"\n{n} of {len(left)}: {reward}, {method}, seed {seed}")
            run_one(settings)
        report(todo, args.out)
    except ddpo.UserError as error:
        why, in_mid_run, _ = str(error).partition("; go on with:")
        sys.exit(f"compare.py: {why}; the same command goes on" if in_mid_run
                 else f"compare.py: error: {why}")  # fmt: skip


if __name__ == "__main__":
    main()
