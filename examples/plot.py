"""Plot runs: reward, KL and diversity, or other columns of metrics.csv, against reward queries.

    pip install matplotlib
    python examples/plot.py runs/compressibility                                   # one curve
    python examples/plot.py runs/is-0 runs/is-1 runs/sf-0 runs/sf-1 --out is_sf.png    # two curves, each the mean of two seeds

Runs whose config.json differs only in the seed (and the folder) share a curve: their mean, and a band from the lowest to the
highest. A run folder holds config.json and metrics.csv.
"""

import argparse
import csv
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

TITLES = {"reward_mean": "reward", "kl": "KL to the pretrained model, nats"}  # of other columns, the name


def read(run, columns=("reward_mean", "kl", "diversity")):
    """The settings and, for each of these columns of metrics.csv that has values, its (queries, values)."""
    config = json.loads((run / "config.json").read_text())
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    points = {c: [(int(r["queries"]), float(r[c])) for r in rows if r.get(c) not in ("", None)] for c in columns}
    return config, {c: np.array(p).T for c, p in points.items() if p}


def groups(runs):
    """Runs by what they have in common; the label is what sets a group apart from the others."""
    settings = {run: {k: v for k, v in read(run)[0].items() if k not in ("seed", "out", "made_with")} for run in runs}
    names = dict.fromkeys(k for s in settings.values() for k in s)  # examples/compare.py has runs with settings of their own
    varied = [k for k in names if len({str(s.get(k)) for s in settings.values()}) > 1]
    by_label = {}
    for run in runs:
        label = ", ".join(f"{k} {settings[run][k]}" for k in varied if k in settings[run])
        by_label.setdefault(label or runs[0].name, []).append(run)
    return by_label


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument("--columns", nargs="+", default=["reward_mean", "kl", "diversity"], help="of metrics.csv, one panel each")
    parser.add_argument("--out", default="plot.png", help="the picture")
    args = parser.parse_args()
    sizes = [2, *[1] * (len(args.columns) - 1)]
    figure, axes = plt.subplots(len(sizes), 1, sharex=True, figsize=(7, 2 * sum(sizes)), height_ratios=sizes, squeeze=False)
    axes = axes[:, 0]
    for label, runs in groups(args.runs).items():
        curves = [read(run, args.columns)[1] for run in runs]
        for axis, column in zip(axes, args.columns):
            found = [c[column] for c in curves if column in c]
            if not found:
                continue
            queries = max((x for x, _ in found), key=len)
            values = np.array([np.interp(queries, x, y, right=np.nan) for x, y in found])  # a run that ended earlier has no value
            axis.plot(queries, np.nanmean(values, 0), label=f"{label} ({len(found)} seeds)" if len(found) > 1 else label)
            axis.fill_between(queries, np.nanmin(values, 0), np.nanmax(values, 0), alpha=0.2)
            axis.set_ylabel(TITLES.get(column, column))
    axes[0].legend()
    axes[-1].set_xlabel("reward queries")
    figure.tight_layout()
    figure.savefig(args.out, dpi=130)
    print(f"saved {args.out}")


if __name__ == "__main__":
    main()
