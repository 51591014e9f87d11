"""Plot runs: reward, KL and diversity against reward queries.

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

PANELS = {"reward_mean": "reward", "kl": "KL to the pretrained model, nats", "diversity": "diversity"}


def read(run):
    """The settings and, for each column of metrics.csv, its (queries, values)."""
    config = json.loads((run / "config.json").read_text())
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    points = {c: [(int(r["queries"]), float(r[c])) for r in rows if r.get(c) not in ("", None)] for c in PANELS}
    return config, {c: np.array(p).T for c, p in points.items() if p}


def groups(runs):
    """Runs by what they have in common; the label is what sets a group apart from the others."""
    settings = {run: {k: v for k, v in read(run)[0].items() if k not in ("seed", "out", "made_with")} for run in runs}
    varied = [k for k in next(iter(settings.values())) if len({str(s.get(k)) for s in settings.values()}) > 1]
    by_label = {}
    for run in runs:
        by_label.setdefault(", ".join(f"{k} {settings[run].get(k)}" for k in varied) or runs[0].name, []).append(run)
    return by_label


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument("--out", default="plot.png", help="the picture")
    args = parser.parse_args()
    figure, axes = plt.subplots(len(PANELS), 1, sharex=True, figsize=(7, 8), height_ratios=[2, 1, 1])
    for label, runs in groups(args.runs).items():
        curves = [read(run)[1] for run in runs]
        for axis, (column, title) in zip(axes, PANELS.items()):
            found = [c[column] for c in curves if column in c]
            if not found:
                continue
            queries = max((x for x, _ in found), key=len)
            values = np.array([np.interp(queries, x, y, right=np.nan) for x, y in found])  # a run that ended earlier has no value
            axis.plot(queries, np.nanmean(values, 0), label=f"{label} ({len(found)} seeds)" if len(found) > 1 else label)
            axis.fill_between(queries, np.nanmin(values, 0), np.nanmax(values, 0), alpha=0.2)
            axis.set_ylabel(title)
    axes[0].legend()
    axes[-1].set_xlabel("reward queries")
    figure.tight_layout()
    figure.savefig(args.out, dpi=130)
    print(f"saved {args.out}")


if __name__ == "__main__":
    main()
