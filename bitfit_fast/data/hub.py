"""Datasets from the Hugging Face hub; the only place that imports `datasets`."""

from __future__ import annotations

from typing import Any

from ..errors import BitFitError

__all__ = ["load_hub_split"]


def load_hub_split(repository: str, config: str, split: str) -> Any:
    """Load one split of a dataset from the hub, its local cache, or a local folder.

    Raises
    ------
    BitFitError
        If `datasets` is missing, or neither the hub nor the cache has the dataset whole.
    """
    try:
        import datasets
    except ImportError:
        raise BitFitError(
            f"loading {repository} needs the package 'datasets'; install it, or pass --data-dir"
        ) from None
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return datasets.load_dataset(repository, config, split=split)
    # "unreachable and not cached" is an OSError; ValueError says that the cache has only other
    # configurations, or no such split, and RuntimeError that a repository is a program
    except (
        OSError, ValueError, RuntimeError, HfHubHTTPError, datasets.exceptions.DatasetsError
    ) as error:  # fmt: skip
        reason = str(error).strip().split("\n")[0]
        raise BitFitError(
            f"the dataset {repository} ({config}) is neither in the local cache nor to be had "
            f"from the hub ({reason}); pass a local folder with --data-dir"
        ) from error
