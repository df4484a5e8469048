"""Where methods find the parts of an encoder that they change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn

from ..models.families import family_of, head_prefix

__all__ = ["in_layers", "is_transposed", "matrices", "of_terms", "width_out"]


def is_transposed(module: nn.Module) -> bool:
    """Tell a linear layer whose weight is `[in, out]`, as GPT-2's."""
    return type(module).__name__ == "Conv1D"


def _is_linear(module: nn.Module) -> bool:
    # PyTorch's own attention takes the weight of this one, and never calls the module
    unseen = type(module).__name__ == "NonDynamicallyQuantizableLinear"
    return (isinstance(module, nn.Linear) and not unseen) or is_transposed(module)


def width_out(module: nn.Module) -> int:
    """Return the size of what a linear layer gives."""
    weight = module.get_parameter("weight")
    return weight.shape[1 if is_transposed(module) else 0]


def in_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the name and module of everything inside the model's layers, in model order."""
    prefix = head_prefix(model) or ""
    path = family_of(model).layer_path()
    for name, module in model.named_modules():
        if name.startswith(prefix) and path.match(f"{name[len(prefix) :]}."):
            yield name, module


def matrices(model: nn.Module, head: set[str]) -> dict[str, nn.Module]:
    """Return the linear layers inside the model's layers, by name.

    Left out are those of the head, and those whose weight other modules use as well.
    """
    used = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return {
        name: module
        for name, module in in_layers(model)
        if _is_linear(module)
        and f"{name}.weight" not in head
        and module.get_parameter("weight").is_floating_point()
        and used[id(module.get_parameter("weight"))] == 1
    }


def of_terms(model: nn.Module, *terms: str) -> dict[str, list[str]]:
    """Return for each term the names of the linear layers, one a layer, that its bias is of.

    A term that the model's family lacks has none.
    """
    prefix = head_prefix(model) or ""
    family = family_of(model)
    path = family.layer_path()
    paths = {family.inside[t].removesuffix(".bias"): t for t in terms if t in family.inside}
    found: dict[str, list[str]] = {term: [] for term in terms}
    for name, module in in_layers(model):
        inside = path.sub("", f"{name[len(prefix) :]}.", count=1).removesuffix(".")
        if inside in paths and _is_linear(module):
            found[paths[inside]].append(name)
    return found
