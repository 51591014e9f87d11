"""How far from the pretrained model does a run go, epoch by epoch, over all animals? The run itself
sees those alone that it drew in an epoch, and they differ tenfold.

    python examples/experiments/kl_path.py 0 1 2      # seeds, three minutes each on one core
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import race

import ddpo
import rewards

TERMS = rewards.load_rewards("compressibility", race.MONITOR)
ANIMALS = ddpo.load_prompts("animals")


@torch.no_grad()
def look(policy):
    """Two pictures of each animal, from the same noise every time: their KL (90,), reward, and
    whether they are named."""
    samples = ddpo.sample(policy, TERMS, ANIMALS * 2, torch.Generator().manual_seed(12345))
    kl = 0
    micros = torch.arange(len(samples.x)).split(policy.batch_size)
    for step in policy.trained_steps:
        with ddpo.without_lora():
            logp = [ddpo.step_logp(policy, samples, images, step)[1] for images in micros]
        kl = kl + (samples.logp[:, step] - torch.cat(logp)) * samples.x[0, 0].numel()
    return kl, samples.scores[:, 0], samples.scores[:, 2]


class WatchedRun(ddpo.Run):
    def finish(self, row):
        super().finish(row)
        if row["epoch"]:
            kl, reward, named = look(self.policy)
            animal, most = max(zip(ANIMALS, kl.view(2, -1).mean(0)), key=lambda pair: pair[1])
            error = kl.std() / len(kl) ** 0.5
            print(f"seed {self.settings.seed} after epoch {row['epoch']}: {kl.mean():.1f} +- "
                  f"{error:.1f} nats, the {animal} {most:.0f}; reward {reward.mean():.3f},"
                  f" {named.mean():.0%} named", flush=True)  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    for seed in map(int, sys.argv[1:] or [0]):
        settings = ddpo.Settings(seed=seed, batch_size=32, kl_stop=0.0, epochs=9, eval_every=99,
                                 eval_images=1)  # fmt: skip
        ddpo.launch(settings, run_class=WatchedRun)
