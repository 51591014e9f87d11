"""The GPU memory that ddpo.py needs, counted without a GPU: the README's table.

    cd examples/experiments
    python memory.py                        # Stable Diffusion 1.5 and XL, in a minute
    python memory.py sd15 --batch-size=2    # one row of your own

The model lies on PyTorch's "meta" device, where tensors have a shape and no content. All that is
alive there is added up: at rest, and at the peaks of sampling, decoding and updating. --int8 counts
weights of linear layers as torchao's, cast where they are used.
"""

import sys
import warnings
import weakref
from dataclasses import replace
from functools import partial
from unittest import mock

import benchmark
import diffusers
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ddpo

ROWS = """sd15 | sd15 --batch-size=1 | sd15 --batch-size=1 --save-memory
    | sd15 --batch-size=1 --save-memory --int8 | sd15 --batch-size=1 --lora-rank=0
    | sdxl | sdxl --no-save-memory | sdxl --int8""".split("|")


class Card(str):
    """A device that is a GPU to ddpo.py and "meta" to PyTorch."""

    type = "cuda"


class Alive(TorchDispatchMode):
    """Adds up the storages on "meta", in CUDA's blocks of 512 bytes."""

    now = peak = 0

    def hold(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        old = {tensor.untyped_storage() for tensor in tree_leaves(args) if torch.is_tensor(tensor)}
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor) and tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage not in old:
                    size = -(-storage.nbytes() // 512) * 512
                    self.hold(size)
                    weakref.finalize(storage, self.hold, -size)
        return out


class Autocast(TorchFunctionMode):
    """What torch.autocast does on a GPU, which it does not on "meta": layers in half precision,
    norms in float32, and the weights' casts kept to the end of a call of the network."""

    def __init__(self, device, dtype, enabled):
        super().__init__()
        self.dtypes = {F.linear: dtype, F.conv2d: dtype, F.group_norm: torch.float32,
                       F.layer_norm: torch.float32} if enabled else {}  # fmt: skip
        self.kept = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.dtypes:
            of = {"dtype": self.dtypes[func]}
            args = [a.to(**of) if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
            self.kept += args[1:]
        return func(*args, **kwargs or {})


class Int8Linear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias)


class OnPaper(ddpo.Policy):
    """A policy whose numbers do not matter, but for its steps, of which two will do."""

    def set_steps(self, settings):
        card, self.device = self.device, torch.device("cpu")
        super().set_steps(settings)
        self.device = card
        self.levels = self.levels.to(card)
        self.scheduler.timesteps = self.scheduler.timesteps[:2].to(card)
        self.trained_steps = self.trained_steps[:2]

    def embed(self, prompt):  # text encoders are on the host
        config = self.unet.config
        sizes = [(77, config.cross_attention_dim)]
        if self.xl:
            sizes += [(config.projection_class_embeddings_input_dim - 1536,)]  # beside the time ids
        return [torch.zeros(1, 2, *size, device="meta", dtype=self.unet.dtype) for size in sizes]

    def try_out(self):
        self.encode(["a"])


def load(arch, int8, model, dtype):
    """In the place of ddpo.load_pipeline: on "meta", without what stays on the host."""
    pipe = benchmark.random_pipeline(arch, "meta")
    for name in {"text_encoder", "text_encoder_2"} & pipe.components.keys():
        setattr(pipe, name, None)
    for layer in pipe.unet.to(dtype).modules():
        if int8 and type(layer) is nn.Linear:
            layer.__class__ = Int8Linear
            layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    return pipe


def fused(q, k, v, **_):
    """Attention as on a GPU, which keeps no map of who looks at whom."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


def count(arch, *flags):
    """10^9 bytes at rest, and at the peaks of sampling, decoding and updating."""
    line = [flag for flag in flags if flag != "--int8"]
    settings, _ = ddpo.parse([f"@{ddpo.EXAMPLES / benchmark.FLAGS[arch]}", *line])
    peaks = []

    def measure(function, *args):
        alive.peak = alive.now
        result = function(*args)
        peaks.append(alive.peak / 1e9)
        return result

    with (Alive() as alive,
          mock.patch.object(ddpo, "load_pipeline", partial(load, arch, "--int8" in flags)),
          mock.patch.object(F, "scaled_dot_product_attention", fused),
          mock.patch.object(torch, "autocast", Autocast),
          mock.patch.object(torch.Tensor, "item", lambda self: 1.0)):  # fmt: skip
        policy = OnPaper(settings, Card("meta"))
        run = ddpo.Run(replace(settings, updates_per_epoch=1), policy)
        run.optimizer.param_groups[0]["foreach"] = True  # as on a GPU
        peaks.append(alive.now / 1e9)
        n = policy.batch_size
        x_T = torch.zeros(n, *policy.latent_shape, device="meta")
        x, logp = measure(ddpo.rollout, policy, ["a"] * n, x_T, None)
        measure(policy.decode, x[:, -1])
        cond = policy.encode(["a"] * n)
        samples = ddpo.Samples(["a"] * n, cond, x, logp, None, torch.zeros(n, device="meta"))
        ddpo.update(run, samples, torch.Generator())  # from now on there is Adam's memory
        measure(ddpo.update, run, samples, torch.Generator())
    return peaks


def main(argv):
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    rows = [" ".join(argv)] if argv else ROWS
    if rows[0].split()[0] not in benchmark.FLAGS:
        sys.exit(f"memory.py: error: begin with one of {', '.join(benchmark.FLAGS)}")
    print("| | at rest | sampling | decoding | update | highest |\n|---|---|---|---|---|---|")
    for row in rows:
        try:
            gigabytes = count(*row.split())
        except ddpo.UserError as error:
            sys.exit(f"memory.py: error: {error}")
        gigabytes.append(max(gigabytes))
        print(f"| {row.strip()} | {' | '.join(f'{g:.2f}' for g in gigabytes)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
