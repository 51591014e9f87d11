#!/usr/bin/env bash
# Guess: a model that is run on the "meta" device, to add up the memory that it needs, asks for as much as
# the same model anywhere else.
#
# What happens (torch 2.13.0): scaled_dot_product_attention has no fused kernel there. It takes the steps of
# its definition, and makes the map of who looks at whom, in several copies: 1,100 MB for one layer of
# 8 heads x 4096 positions x 40 numbers in bfloat16, where the fused kernel of a CPU needs 2.8 MB. So what
# is counted on "meta" is that of a network which nobody runs. Calling
# torch.ops.aten._scaled_dot_product_flash_attention there gives the fused one's count.
#
# Seen:
#   meta: 1100.0 MB
#   cpu: 2.8 MB
#   meta, flash by name: 2.8 MB
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import weakref

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode


class Alive(TorchDispatchMode):
    """Adds up the storages that operators make, as long as they live."""

    now = peak = 0

    def hold(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        old = {a.untyped_storage() for a in args if isinstance(a, torch.Tensor)}
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in old:
                size = tensor.untyped_storage().nbytes()
                self.hold(size)
                weakref.finalize(tensor.untyped_storage(), self.hold, -size)
        return out


def megabytes(attention, device):
    q = torch.zeros(1, 8, 4096, 40, dtype=torch.bfloat16, device=device, requires_grad=True)
    with Alive() as alive:
        attention(q, q, q)
    return alive.peak / 1e6


flash = torch.ops.aten._scaled_dot_product_flash_attention
seen = {
    "meta": megabytes(F.scaled_dot_product_attention, "meta"),
    "cpu": megabytes(F.scaled_dot_product_attention, "cpu"),
    "meta, flash by name": megabytes(flash, "meta"),
}
for how, size in seen.items():
    print(f"{how}: {size:.1f} MB")
assert seen["meta"] > 100 * seen["cpu"] and seen["meta, flash by name"] < 2 * seen["cpu"]
PY
