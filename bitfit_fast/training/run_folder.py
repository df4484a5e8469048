"""What a run leaves on disk, and how it goes on after a kill."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..additions import addition, own_state
from ..errors import BitFitError, listed
from ..files import append_json_line, to_json, write_json, write_text
from ..tensorfile import read_tensors, write_tensors

__all__ = ["Progress", "RunFolder"]

_KIND = "training state"
_RNG_CPU, _RNG_CUDA = "rng/cpu", "rng/cuda"


@dataclass
class Progress:
    """Where a run stands: what must survive a kill besides tensors."""

    step: int = 0
    seconds: float = 0.0
    best: dict[str, Any] | None = None
    without_better: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)


class RunFolder:
    """The files of one run.

    `settings.json` (written first), `metrics.jsonl` (a line an evaluated split),
    `model.safetensors` (the best evaluation), `state.safetensors` (the last one, to go on
    from), `summary.json` and `curves.png` (at the end).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = path / "settings.json"
        self.metrics = path / "metrics.jsonl"
        self.model = path / "model.safetensors"
        self.state = path / "state.safetensors"
        self.summary = path / "summary.json"
        self.curves = path / "curves.png"
        self.heatmap = path / "bias_change.png"
        self.begun = False

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that a run may leave."""
        return (
            self.settings, self.metrics, self.model, self.state, self.summary, self.curves,
            self.heatmap,
        )  # fmt: skip

    def check(self, resume: bool, overwrite: bool) -> None:
        """Refuse a folder that holds a run, or none to resume, before anything is changed."""
        above = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not above.is_dir():
            raise BitFitError(f"{above} is a file, so {self.path} cannot be an output folder")
        if not os.access(above, os.W_OK):
            raise BitFitError(f"{above} is not writable, so {self.path} cannot be an output folder")
        holds = [file.name for file in self.files if file.exists()]
        if resume and overwrite:
            raise BitFitError("--resume and --overwrite exclude each other")
        if resume and not self.settings.exists():
            raise BitFitError(f"the output folder {self.path} holds no run to resume")
        if holds and not (resume or overwrite):
            raise BitFitError(
                f"the output folder {self.path} holds a run already ({listed(holds)}); "
                "pass --overwrite to replace it or --resume to go on with it"
            )

    def begin(self, described: dict[str, Any]) -> None:
        """Start a new run, described by its settings; what an old one left goes.

        All but its checkpoint, which the new one's first replaces: there is always a whole one.
        """
        for file in self.files:
            if file != self.model:
                file.unlink(missing_ok=True)
        write_json(self.settings, described)
        self.begun = True

    def check_same(self, described: dict[str, Any]) -> None:
        """Refuse to resume under other settings than those that the run began with."""
        try:
            before = json.loads(self.settings.read_text(encoding="utf-8"))
        except ValueError:
            raise BitFitError(f"{self.settings} is altered: it is not JSON") from None
        if not isinstance(before, dict):
            raise BitFitError(f"{self.settings} is altered: it is no JSON object")
        now = json.loads(to_json(described))
        for key in {**before, **now}:
            if before.get(key) != now.get(key):
                raise BitFitError(
                    f"cannot resume {self.path}: its {key} was {before.get(key)}, "
                    f"and now it is {now.get(key)}"
                )

    def keep(
        self,
        rows: list[dict[str, Any]],
        model: nn.Module,
        optimizer: dict[str, Tensor],
        progress: Progress,
        base: str,
        device: torch.device,
    ) -> None:
        """Add an evaluation's rows to the metrics, and save what the run goes on from.

        The continuation is bit-identical: parameters, optimiser and random state are kept.
        """
        for row in rows:
            append_json_line(self.metrics, row)
        tensors: dict[str, Tensor] = {
            f"model/{n}": p for n, p in model.named_parameters() if p.requires_grad
        }
        tensors |= {f"model/{name}": tensor for name, tensor in own_state(model).items()}
        tensors |= {f"optimizer/{name}": value for name, value in optimizer.items()}
        tensors[_RNG_CPU] = torch.get_rng_state()
        if device.type == "cuda":
            tensors[_RNG_CUDA] = torch.cuda.get_rng_state(device)
        header = {"kind": _KIND, "base": base, "progress": asdict(progress)}
        write_tensors(self.state, header, tensors)

    def load_state(
        self, model: nn.Module, base: str, device: torch.device
    ) -> tuple[dict[str, Tensor], Progress]:
        """Put the saved parameters and random state back.

        Returns
        -------
        optimizer, progress
            What `keep` was given. Lines of `metrics.jsonl` that were written after
            it, before the kill, are taken out.
        """
        header, tensors = read_tensors(self.state, _KIND)
        if header["base"] != base:
            raise BitFitError(f"cannot resume {self.path}: the base model's weights have changed")
        saved = {key.partition("/")[2]: t for key, t in tensors.items() if key.startswith("model/")}
        if (extra := addition(model)) is not None:
            extra.resume(model, saved)
        parameters = {**dict(model.named_parameters()), **own_state(model)}
        optimizer = {}
        with torch.no_grad():
            for path, value in tensors.items():
                kind, _, name = path.partition("/")
                if kind == "model":
                    parameters[name].copy_(value)
                elif kind == "optimizer":
                    optimizer[name] = value
        torch.set_rng_state(tensors[_RNG_CPU])
        if _RNG_CUDA in tensors and device.type == "cuda":
            torch.cuda.set_rng_state(tensors[_RNG_CUDA], device)
        self.begun = True
        progress = Progress(**header["progress"])
        write_text(self.metrics, "".join(to_json(row) + "\n" for row in progress.rows))
        return optimizer, progress
