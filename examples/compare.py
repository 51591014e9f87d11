"""The paper's main comparison in small: DDPO against reward-weighted regression (RWR), at equal reward queries.

    pip install matplotlib
    python examples/compare.py --quick      # one reward, one seed, 10 epochs: about 5 minutes on two free CPU cores
    python examples/compare.py              # three rewards, three seeds; the same command goes on with what was stopped

Run it from the repository's folder. compare.png and compare.md, a table, come from the runs that have ended. Flags of ddpo.py can
be added (--epochs 50); what METHODS and RWR below set, stays. Commands with different --rewards or --seeds can share the work.

DDPO-IS and DDPO-SF are ddpo.py with the bundled model's settings; SF takes one update an epoch, from all of its images.

RWR samples and scores as DDPO does, then trains on the denoising loss of the final latents, of the guided prediction as in the
paper's code. An image counts with softmax(b * adv), where adv is DDPO's advantage. The paper has b = 0.2 and raw rewards, kB of
512 x 512 pixels among them; here their std is 0.3 kB, with which b = 0.2 would hardly select. RWR-sparse keeps the best tenth of
an epoch's images. The paper draws 10,000 images a round and makes 400 updates; here a round is an epoch of DDPO, with 8 updates
of 64 noisy latents: as many calls of the network as DDPO's, under clipscore four times as many.

Fitting a model to its own images makes them plainer, whatever the weights. Under compressibility that passes for progress, so
there a control is run as well: RWR with equal weights, which know nothing of the reward.

clipscore is the cosine of prompt and picture by examples/emoji-clip. With the bundled model's 10 guided steps it is 0.86 and
leaves little to learn, so to be rewarded the model draws with 4 unguided ones, at a fifth of the price, which give 0.73; DDPO
learns from the first two of them, as the others add hardly any noise. Under the JPEG rewards the same score is only watched: it
tells whether the pictures still show their animals.

What was tried, all on seed 0:

    compressibility     the best recognisable JPEG in kB. RWR with lr 0.001: 1.69 (b = 1), 1.64 (3), 1.71 (10).
                        RWR-sparse: 1.76 (lr 0.0003), 1.70 (0.001). DDPO's settings are from sweep.py.
    incompressibility   the same, larger is better. RWR with lr 0.0001: 2.20 (b = 3), 2.20 (10); with 0.0003 and b = 10 it
                        ends at 2.07, below its start of 2.18. RWR-sparse: 2.19 (lr 0.0001), 2.10 (0.0003; ends at 1.60).
    clipscore           at the end, from 0.759. DDPO-IS: 0.842 (lr 0.003), 0.829 (0.006). DDPO-SF: 0.827 (0.01), 0.283 (0.02).
                        RWR: b = 1, 0.739 (lr 0.00003), 0.67 (0.0001, 20 epochs), 0.26 (0.0003, 16); b = 3, 0.748 (0.00003),
                        0.673 (0.0001); b = 10, 0.756 (0.00003), 0.733 (0.0001); 4 rounds of 416 images with 52 updates,
                        b = 3, 0.687 (0.0001). RWR-sparse: 0.741 (0.00003), 0.39 (0.0003, 16).
"""

import argparse
import csv
import dataclasses
import importlib.util
import itertools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ddpo
import rewards

CLIP = "clipscore(examples/emoji-clip)"  # whether the pictures still show their animals
REWARDS = {
    "compressibility": {"reward": "compressibility", "monitor": CLIP, "eval_images": 45},
    "incompressibility": {"reward": "incompressibility", "monitor": CLIP, "eval_images": 45},
    "clipscore": {"reward": CLIP, "steps": 4, "guidance_scale": 1, "lr": 0.003, "epochs": 26, "eval_images": 45},
}
METHODS = {
    "DDPO-IS": {"objective": "clipped"},
    "DDPO-SF": {"objective": "reinforce", "updates_per_epoch": 1, "lr": 0.01},
    "RWR": {"objective": "rwr", "updates_per_epoch": 8},
    "RWR-sparse": {"objective": "rwr-sparse", "updates_per_epoch": 8},
    "equal weights": {"objective": "rwr", "updates_per_epoch": 8, "inverse_temperature": 0.0},
}
RWR = {
    "compressibility": {"lr": 1e-3, "inverse_temperature": 3.0},
    "incompressibility": {"lr": 1e-4, "inverse_temperature": 10.0},
    "clipscore": {"lr": 3e-5, "inverse_temperature": 10.0},
}  # of all three kinds, but for equal weights
RECOGNISABLE = 0.8  # the clipscore; untrained it is 0.86
SECONDS = 0.006  # for one image a call of the network, with its share of training, on two free CPU cores


# ---------------------------------------------------------------- reward-weighted regression


@dataclass(frozen=True)
class RWRSettings(ddpo.Settings):
    """Those of ddpo.py, read as follows: an update takes `micro_batch` noisy latents from the whole epoch's images."""

    objective: str = ddpo.option("rwr", "rwr or rwr-sparse", choices=("rwr", "rwr-sparse"))
    inverse_temperature: float = ddpo.option(10.0, "rwr: weights are softmax(this * advantage)", least=0)
    keep: float = ddpo.option(0.1, "rwr-sparse: share of the images that is kept, all with the same weight", above=0)


def rwr_weights(reward, inverse_temperature):
    """softmax(inverse_temperature * reward) of B rewards, times B: (B,) with mean 1."""
    return torch.softmax(inverse_temperature * reward, 0) * len(reward)


def sparse_weights(reward, keep):
    """The same weight for the best share `keep` of B rewards and for those equal to the last of them, 0 for the others: (B,)
    with mean 1."""
    kept = (reward >= reward.quantile(1 - keep)).float()
    return kept / kept.mean()


def denoising_loss(policy, x_0, noise, t, cond):
    """What diffusion models are pretrained with: the squared error of the prediction from x_t, which is x_0 (B, C, H, W) with
    noise added, (B,). With guidance, as in the paper's code: what is fitted to the images is the model that sampled them."""
    x_t = policy.scheduler.add_noise(x_0, noise, t)
    kind = policy.scheduler.config.prediction_type
    target = {"epsilon": noise, "sample": x_0}[kind] if kind != "v_prediction" else policy.scheduler.get_velocity(x_0, noise, t)
    return ((policy.predict(x_t, t, cond) - target) ** 2).mean((1, 2, 3))


def rwr_update(run, samples, generator, tick=lambda: None):
    """One epoch of RWR, in the place of ddpo.update and with its arguments: `updates_per_epoch` steps on the weighted denoising
    loss of the final latents. Returns the epoch's metrics."""
    (x, _, cond, adv), settings, policy = samples, run.settings, run.policy
    sparse = settings.objective == "rwr-sparse"
    weights = sparse_weights(adv, settings.keep) if sparse else rwr_weights(adv, settings.inverse_temperature)
    counted = weights.nonzero().flatten()  # the others would be work for nothing
    losses, grad_norms, skipped = [], [], 0
    for _ in range(settings.updates_per_epoch):
        i = counted[torch.randint(len(counted), (run.policy.micro_batch,), generator=generator).to(x.device)]
        t = torch.randint(policy.scheduler.config.num_train_timesteps, i.shape, generator=generator).to(x.device)
        noise = torch.randn(len(i), *x.shape[2:], generator=generator).to(x.device)
        loss = (weights[i] * denoising_loss(policy, x[i, -1], noise, t, cond[i])).mean() * len(counted) / len(x)
        run.scaler.scale(loss).backward()
        run.scaler.unscale_(run.optimizer)
        losses.append(loss.item())
        grad_norms.append(nn.utils.clip_grad_norm_(policy.weights, settings.grad_clip).item())
        if math.isfinite(grad_norms[-1]):
            run.scaler.step(run.optimizer)
        else:
            skipped += 1
        run.scaler.update()
        run.optimizer.zero_grad()
        tick()
    return {"loss": np.mean(losses).item(), "grad_norm": np.mean(grad_norms).item(), "skipped": skipped}


# ---------------------------------------------------------------- runs


def plan(args, flags):
    """(reward, method, seed, settings) of every run. `flags` are more of ddpo.py's flags, for all of them."""
    todo = []
    for seed, reward, method in itertools.product(args.seeds, args.rewards, METHODS):
        if method == "equal weights" and reward != "compressibility":
            continue  # a control, for where it could pass for progress
        given = [f"--{name.replace('_', '-')}={value}" for name, value in REWARDS[reward].items()]
        given += [*(["--epochs=10"] if args.quick else []), *flags]  # of two, the later one counts
        given += [f"--seed={seed}", f"--out={args.runs}/{reward}/{method}-{seed}"]
        settings, resumed, _ = ddpo.parse(given)
        if resumed:
            raise rewards.UserError("--resume: the same command goes on by itself")
        common = dataclasses.asdict(settings)
        rwr = METHODS[method]["objective"].startswith("rwr")
        own = {"eval_every": common["epochs"], **(RWR[reward] if rwr else {}), **METHODS[method]}
        todo.append((reward, method, seed, (RWRSettings if rwr else ddpo.Settings)(**{**common, **own})))
    return todo


def last_state(settings):
    """The newest state file of a run, or None; UserError if its folder holds another experiment."""
    folder = Path(settings.out)
    if (folder / "config.json").is_file():
        saved = json.loads((folder / "config.json").read_text())
        changed = [k for k, v in dataclasses.asdict(settings).items() if k != "out" and saved.get(k) != v]
        if changed:
            raise rewards.UserError(f"{folder} was run with another {', '.join(changed)}: delete it or name other --runs")
    return max(folder.glob("state_*.pt"), default=None)


def finished(settings):
    """Whether a run has its last state."""
    state = last_state(settings)
    return state is not None and state.name == f"state_{settings.epochs:05d}.pt"


def run_one(settings):
    """Train a run to its end, from its newest state if there is one."""
    (Path(settings.out) / "samples").mkdir(parents=True, exist_ok=True)
    update = rwr_update if isinstance(settings, RWRSettings) else ddpo.update
    with mock.patch.object(ddpo, "update", update):  # all else is the same for every method
        ddpo.launch(settings, Path(settings.out), last_state(settings))


# ---------------------------------------------------------------- results


def read(settings):
    """The rows of a run's metrics.csv with numbers in them."""
    with open(Path(settings.out) / "metrics.csv") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def best_window(values, least):
    """Means of three successive rows of `values`, whose columns are a reward, what is watched, and any others (epochs, columns):
    those with the best reward where what is watched is `least` or more, and the last row's number. None if there are none."""
    if len(values) < 3:
        return None
    means = np.lib.stride_tricks.sliding_window_view(np.array(values), 3, 0).mean(-1)  # (epochs - 2, columns)
    best = max((i for i in range(len(means)) if means[i, 1] >= least), key=lambda i: means[i, 0], default=None)
    return None if best is None else (means[best], best + 2)


def best_recognisable(rows):
    """The best mean reward of three successive epochs with a clipscore of at least RECOGNISABLE, and the queries so far; NaN if
    there are none."""
    found = best_window([[row["reward_mean"], row[CLIP]] for row in rows[1:]], RECOGNISABLE)
    return (found[0][0], rows[1 + found[1]]["queries"]) if found else (math.nan, math.nan)


def cells(seeds, evaluated, epoch):
    """Of the runs of several seeds, as text: the reward of one evaluation, the clipscore of one epoch, the best reward that
    leaves the pictures recognisable, and after how many queries."""
    ends, watched = [rows[evaluated]["eval_reward"] for rows in seeds], [rows for rows in seeds if CLIP in rows[epoch]]
    best, queries = np.array([best_recognisable(rows) for rows in watched]).reshape(-1, 2).T
    texts = []
    for values, n in [(ends, 3), ([rows[epoch][CLIP] for rows in watched], 3), (best, 3), (queries, 0)]:
        spread = f" ± {np.std(values, ddof=1):.{n}f}" if len(values) > 1 else ""
        texts.append(f"{np.mean(values):.{n}f}{spread}" if np.isfinite(values).all() and len(values) else "-")
    return texts


def report(todo, folder):
    """compare.md and compare.png, from the runs that have ended. A reward in the table is that of the last evaluation: the same
    prompts and noise for every method and, before training, for the pretrained model. The other columns are of `cells`."""
    import matplotlib.pyplot as plt

    runs = {}
    for reward, method, _, settings in todo:
        runs.setdefault(reward, {}).setdefault(method, []).extend([read(settings)] if finished(settings) else [])
    table = [("reward", "method", "at the end", "clipscore", "best recognisable", "at query"), ("---",) * 6]
    figure, axes = plt.subplots(2, len(runs), figsize=(5 * len(runs), 7), squeeze=False, sharex="col", height_ratios=[2, 1])
    for (upper, lower), (reward, methods) in zip(axes.T, runs.items()):
        untrained = max(methods.values(), key=len)
        table.append((reward, "pretrained", *cells(untrained, 0, 1)[:2], "-", "-"))
        for method, seeds in methods.items():
            table.append((reward, method, *cells(seeds, -1, -1)))
            for axis, column in [(upper, "reward_mean"), (lower, CLIP)]:
                values = np.array([[row[column] for row in rows[1:] if column in row] for rows in seeds])  # (seeds, epochs)
                if values.size:
                    queries = [row["queries"] for row in seeds[0][1:]]
                    axis.plot(queries, values.mean(0), "--" if "sparse" in method else "-", label=method)
                    axis.fill_between(queries, values.min(0), values.max(0), alpha=0.2)
        if untrained:
            start = np.mean([rows[1]["reward_mean"] for rows in untrained])  # of images that were drawn before any update
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
    lines = [f"| {' | '.join(row)} |" for row in table]
    (folder / "compare.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines) + f"\nsaved {folder / 'compare.png'} and compare.md beside it")


def main(argv=None):
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="compressibility, one seed, 10 epochs")
    parser.add_argument("--rewards", nargs="+", choices=REWARDS, metavar="NAME", help=f"some of {', '.join(REWARDS)}")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="INT", help="default: 0 1 2")
    parser.add_argument("--runs", help="folder of the runs; default: runs/compare or runs/compare-quick")
    parser.add_argument("--out", type=Path, help="folder of compare.png and compare.md; default: that of the runs")
    args, flags = parser.parse_known_args(argv)
    if not importlib.util.find_spec("matplotlib"):  # better said now than after a night
        sys.exit("compare.py: error: it draws with matplotlib: pip install matplotlib")
    args.rewards = args.rewards or (["compressibility"] if args.quick else list(REWARDS))
    args.seeds = args.seeds or ([0] if args.quick else [0, 1, 2])
    args.runs = args.runs or ("runs/compare-quick" if args.quick else "runs/compare")
    try:
        todo = plan(args, flags)
        left = [run for run in todo if not finished(run[-1])]
        minutes = sum(s.epochs * s.images_per_epoch * s.steps * (1 + (s.guidance_scale > 1)) for *_, s in left) * SECONDS / 60
        print(f"{len(left)} of {len(todo)} runs to go: about {minutes:.0f} minutes on two free CPU cores", flush=True)
        for n, (reward, method, seed, settings) in enumerate(left, 1):
            print(f"\n{n} of {len(left)}: {reward}, {method}, seed {seed}")
            run_one(settings)
        report(todo, args.out or Path(args.runs))
    except rewards.UserError as error:
        stopped = isinstance(error.__context__, KeyboardInterrupt)
        sys.exit("compare.py: stopped; the same command goes on" if stopped else f"compare.py: error: {error}")


if __name__ == "__main__":
    main()
