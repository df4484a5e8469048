"""Random choices of weights to train, the BitFit paper's comparison (Ben Zaken et al. 2022).

"A randomly-selected set of parameters of the same size" asks whether bias terms are special.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BitFitError
from ..models.families import biases
from .sparse import Sparse

__all__ = ["RandomLines", "RandomUniform"]


def distinct(total: int, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` distinct numbers below `total`, each set of them as likely as the other."""
    if 4 * count > total:
        return torch.randperm(total, generator=generator)[:count]
    # of so many draws fewer than half are repeated; none of the others needs memory
    while True:
        drawn = torch.randint(total, (2 * count + 64,), generator=generator)
        values, place = drawn.unique(return_inverse=True)
        if len(values) >= count:
            first = torch.full((len(values),), len(drawn)).scatter_reduce(
                0, place, torch.arange(len(drawn)), "amin"
            )
            return drawn[first.sort().values[:count]]


class _Random(Sparse):
    """As many entries as `parameters` says, or as BitFit would train biases."""

    def __init__(self, method: str, options: Mapping[str, Any]) -> None:
        super().__init__(method, options)
        self.generator = torch.Generator().manual_seed(self.options["seed"])

    def choose(
        self, model: nn.Module, hosts: dict[str, nn.Module], head: set[str]
    ) -> dict[str, Tensor]:
        """Return entries by seed."""
        shapes: dict[str, tuple[int, int]] = {}
        for name, module in hosts.items():
            rows, columns = module.get_parameter("weight").shape
            shapes[name] = rows, columns
        total = sum(rows * columns for rows, columns in shapes.values())
        count = self.options["parameters"]
        if count is None:
            sizes = {name: p.numel() for name, p in model.named_parameters()}
            count = sum(sizes[b.name] for b in biases(model) if b.name not in head)
            if not count:
                raise BitFitError(
                    f"{type(model).__name__} has no biases to train as many weights as; "
                    "say how many (--parameters)"
                )
        if count > total:
            raise BitFitError(
                f"parameters must be at most {total}, the weights in the layers of "
                f"{type(model).__name__}, not {count}"
            )
        self.options["parameters"] = count
        return self.draw(shapes, total, count)

    def draw(self, shapes: dict[str, tuple[int, int]], total: int, count: int) -> dict[str, Tensor]:
        """Return `count` of `total` entries of weights, as sorted flat indices by host."""
        raise NotImplementedError


class RandomUniform(_Random):
    """Single weights, each as likely as any other."""

    def draw(self, shapes: dict[str, tuple[int, int]], total: int, count: int) -> dict[str, Tensor]:
        """Return single entries."""
        chosen = distinct(total, count, self.generator).sort().values
        ends = list(accumulate(rows * columns for rows, columns in shapes.values()))
        cuts = torch.searchsorted(chosen, torch.tensor(ends[:-1])).tolist()
        parts = chosen.tensor_split(cuts)
        return {n: part - first for n, part, first in zip(shapes, parts, [0, *ends[:-1]])}


class RandomLines(_Random):
    """Whole rows and columns, each as likely as any other.

    An entry where a chosen row crosses a chosen column counts once. Of the last line only as
    many entries train, from its beginning, as are left to choose.
    """

    def draw(self, shapes: dict[str, tuple[int, int]], total: int, count: int) -> dict[str, Tensor]:
        """Return the entries of lines."""
        lines = [(name, i) for name, (m, n) in shapes.items() for i in range(m + n)]
        chosen: dict[str, list[Tensor]] = {name: [] for name in shapes}
        rows: dict[str, list[int]] = {name: [] for name in shapes}
        columns: dict[str, list[int]] = {name: [] for name in shapes}
        left = count
        for number in torch.randperm(len(lines), generator=self.generator).tolist():
            if not left:
                break
            name, line = lines[number]
            m, n = shapes[name]
            taken = torch.tensor(columns[name] if line < m else rows[name], dtype=torch.long)
            free = torch.ones(n if line < m else m, dtype=torch.bool)
            free[taken] = False
            new = free.nonzero().squeeze(1)[:left]
            if line < m:
                rows[name].append(line)
                chosen[name].append(line * n + new)
            else:
                columns[name].append(line - m)
                chosen[name].append(new * n + line - m)
            left -= len(new)
        return {name: torch.cat(parts).sort().values for name, parts in chosen.items() if parts}
