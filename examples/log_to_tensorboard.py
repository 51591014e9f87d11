"""A run that TensorBoard shows while it goes on: the columns of metrics.csv, and the pictures.
`pip install tensorboard`, this with the flags of ddpo.py, then `tensorboard --logdir runs`."""

import functools
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ddpo


class LoggedRun(ddpo.Run):
    def record(self, row):  # of every finished epoch, once
        super().record(row)
        picture = self.folder / "samples" / f"epoch_{row['epoch']:04d}.png"
        with SummaryWriter(self.folder / "tensorboard") as writer:
            for name in row.keys() - {"epoch", "changed"}:
                writer.add_scalar(name, row[name], row["epoch"])
            if picture.is_file():
                pixels = np.asarray(Image.open(picture))
                writer.add_image("samples", pixels, row["epoch"], dataformats="HWC")


if __name__ == "__main__":
    launch = functools.partial(ddpo.launch, run_class=LoggedRun)
    ddpo.main(launch=launch, name="log_to_tensorboard.py", about=__doc__)
