"""One of two processes that train the same model on half a batch each; see test_distributed.py.

Called as `two_processes.py RANK FOLDER`: reads `batch.pt` there, writes `gradients-RANK.pt`.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bitfit_fast.ops import dropout_add_layer_norm, feed_forward, linear


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape, trains=True):
            return nn.Parameter(torch.randn(*shape, generator=generator) / 3, trains)

        self.w1, self.w2 = parameter(24, 16, trains=False), parameter(16, 24, trains=False)
        self.b1, self.b2 = parameter(24), parameter(16)
        self.gamma, self.beta = parameter(16, trains=False), parameter(16)
        self.head, self.head_b = parameter(3, 16), parameter(3)

    def forward(self, x):
        h = feed_forward(x, self.w1, self.b1, self.w2)
        h, _ = dropout_add_layer_norm(h, self.gamma, self.beta, self.b2, residual=x)
        return linear(h, self.head, self.head_b)


def gradients(model, x):
    """Return the gradient of every parameter that trains, of a mean over the rows."""
    module = getattr(model, "module", model)
    model(x).square().mean().backward()
    return {name: p.grad for name, p in module.named_parameters() if p.requires_grad}


def main(rank, folder):
    meeting = (folder / "meeting").as_uri()
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    half = torch.load(folder / "batch.pt").chunk(2)[rank]
    found = gradients(DistributedDataParallel(Model()), half)
    torch.save(found, folder / f"gradients-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
