"""The training loop: batches, evaluations, checkpoints, progress; the step is a backend's."""

from __future__ import annotations

import math
import os
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn

from ..additions import addition
from ..checkpoint import fingerprint, read, save, stored, versions
from ..data.batches import subset, training_batches
from ..data.task import Split, TaskData
from ..errors import BitFitError, BitFitWarning, listed
from ..files import write_json
from ..kinds import KINDS, Encoded
from ..models.loading import align_weights, ensure_padding
from ..plots import learning_curves
from ..selection import HEAD, Selection
from .backends import choose_backend
from .checks import check_gradients, check_length, check_outputs, choose_device
from .display import Display
from .evaluate import evaluate
from .measure import StepClock, device_name, mean_step_ms, peak_memory, reset_peak_memory
from .run_folder import Progress, RunFolder
from .settings import Plan, Settings

__all__ = ["train"]

#: Steps between reads of the loss: reading waits for a GPU.
_LOG_EVERY = {"cpu": 1, "cuda": 10}
#: Training examples that an evaluation looks at where no validation set sets the number.
_TRAIN_SAMPLE = 1000
#: Of them, those that are evaluated on the way where only the end is of interest.
_EARLY_SAMPLE = 64


def _name_outputs(model: nn.Module, data: TaskData) -> None:
    """Write the task's labels into the model's configuration, for checkpoints and pipelines."""
    config: Any = model.config
    for key, value in KINDS[data.kind].configure(data.labels).items():
        setattr(config, key, value)


class _Run:
    """One call of `train`: everything is checked in the constructor, before files change."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        data: TaskData,
        settings: Settings,
        folder: RunFolder | None,
        console: Console | None,
    ) -> None:
        self.kind = KINDS[data.kind]
        settings = settings.for_kind(self.kind)
        self.model, self.data, self.settings = model, data, settings
        self.folder, self.console = folder, console
        self.selection, self.addition = Selection.of(model), addition(model)
        if not self.selection.names:
            raise BitFitError("nothing trains: no parameter of the model has requires_grad")
        if data.train is None or data.train.labels is None:
            raise BitFitError(f"the task {data.name} has no training split with labels")
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise BitFitError(
                f"train runs in one process, and there are {dist.get_world_size()}; "
                "BitFitTrainer trains in several"
            )
        check_outputs(model, data)
        assert settings.max_length is not None
        check_length(settings.max_length, model, tokenizer)
        ensure_padding(model, tokenizer)
        validation = {n: s for n, s in data.splits.items() if n.startswith("validation")}
        if settings.patience is not None and not validation:
            raise BitFitError(
                f"patience {settings.patience} needs a validation set, and {data.name} has none"
            )
        self.device = choose_device(settings.device)
        examples = settings.examples_of(len(data.train))
        train = data.train.take(subset(len(data.train), examples, settings.seed))
        self.features = self._encoded(train, tokenizer).features
        self.plan = Plan.of(settings, self.selection.method, len(self.features), self.device)
        self.backend, self.why = choose_backend(settings.backend, model, self.selection, self.plan)
        self.base = fingerprint(model, stored(model))

        # as many training examples as validation examples are evaluated, so that the
        # generalisation gap costs no more than the validation itself
        sample = min(map(len, validation.values()), default=_TRAIN_SAMPLE)
        chosen = subset(examples, sample, settings.seed + 1)
        self.evaluated = {"train": self._encoded_again(train.take(chosen), tokenizer)}
        self.evaluated |= {n: self._encoded(split, tokenizer) for n, split in validation.items()}
        self.glanced = self.evaluated
        if settings.validate_once:
            few = train.take(chosen[:_EARLY_SAMPLE])
            self.glanced = {"train": self._encoded_again(few, tokenizer)}
        self.judge = next(iter(validation), None)

        self.collate = self.backend.collate(tokenizer, self.plan, self.kind.name)
        self.progress = Progress()
        self.clock = StepClock()

    def _encoded(self, split: Split, tokenizer: Any) -> Encoded:
        return self.kind.encode(split, tokenizer, self._options())

    def _encoded_again(self, split: Split, tokenizer: Any) -> Encoded:
        """Encode a part of what was: what there is to say of it was said."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BitFitWarning)
            return self._encoded(split, tokenizer)

    def _options(self) -> dict[str, int]:
        return {name: getattr(self.settings, name) for name in self.kind.options}

    def described(self) -> dict[str, Any]:
        """Return what makes this run the one that it is."""
        return {
            "task": self.data.name,
            "model": getattr(self.model.config, "name_or_path", ""),
            "method": self.selection.method,
            "terms": list(self.selection.terms),
            "layers": list(self.selection.layers),
            "head": HEAD in self.selection.counts,
            "data": self.data.digest(),
            **self.settings.described(),
            **({} if self.addition is None else {"options": self.addition.options}),
            "backend": self.backend.name,
            "device": self.device.type,
        }

    def fit(self, resume: bool) -> dict[str, Any]:
        """Train to the end and return the summary."""
        torch.manual_seed(self.settings.seed)
        _name_outputs(self.model, self.data)
        align_weights(self.model)
        self.model.to(self.device)
        undo, said = self.backend.patch(self.model, self.selection, self.plan)
        try:
            if self.console:
                line = f"backend {self.backend.name} ({self.why})"
                self.console.print("\n".join([line, said] if said else [line]), markup=False)
            self.model.train()
            return self._fit(resume)
        finally:
            undo()
            self.model.eval()

    def _fit(self, resume: bool) -> dict[str, Any]:
        self.step = self.backend.step(self.model, self.plan)
        try:
            return self._steps(resume)
        finally:
            self.step.close()

    def _steps(self, resume: bool) -> dict[str, Any]:
        if self.folder and resume and self.folder.state.exists():
            optimizer, self.progress = self.folder.load_state(self.model, self.base, self.device)
            self.step.restore(optimizer, self.progress.step)
            if self.progress.best is not None:
                read(self.folder.model)  # what was best so far, or why it cannot be told
        reset_peak_memory(self.device)
        self.started = time.perf_counter() - self.progress.seconds
        title = f"{self.selection.method} {self.data.name}"
        with Display(self.console, title, self.plan.steps, self.progress.step) as self.display:
            while not self._finished():
                self._train_to_next_evaluation()
                self._evaluate()
        return self._summary()

    def _finished(self) -> bool:
        patience = self.settings.patience
        worn = patience is not None and self.progress.without_better >= patience
        return worn or self.progress.step >= self.plan.steps

    def _train_to_next_evaluation(self) -> None:
        every = self.plan.eval_every
        end = min(self.plan.steps, (self.progress.step // every + 1) * every)
        batches = training_batches(
            self.features,
            self.collate,
            self.settings.batch_size,
            self.settings.seed,
            self.progress.step,
        )
        pending: list[Tensor] = []
        examples = 0
        self.clock.restart()
        while self.progress.step < end:
            count, batch = next(batches)
            pending.append(self.step(batch))
            examples += count
            if self.step.steps == 1:
                self._check_gradients()
            self.progress.step += 1
            if len(pending) == _LOG_EVERY[self.device.type] or self.progress.step == end:
                losses = torch.stack(pending).tolist()  # waits for the device
                self.clock.lap(len(losses), examples)
                for step, loss in enumerate(losses, self.progress.step - len(losses) + 1):
                    self._check_finite(loss, step)
                self.display.trained(self.progress.step, losses, self.clock.examples_per_second)
                pending, examples = [], 0

    def _check_gradients(self) -> None:
        names = set(self.selection.names) - self.step.no_gradient
        if self.selection.method == "full":
            # some models hold weights that a task does not use, as XLNet's mask embedding
            idle = [n for n, p in self.model.named_parameters() if n in names and p.grad is None]
            if idle:
                text = f"{len(idle)} parameters get no gradient and stay: {listed(idle, 5)}"
                warnings.warn(text, BitFitWarning, stacklevel=2)
            names -= set(idle)
        check_gradients(self.model, names)

    def _check_finite(self, loss: float, step: int) -> None:
        if math.isfinite(loss):
            return
        kept = "no checkpoint had been written yet"
        if self.folder and self.progress.best:
            kept = f"the checkpoint of step {self.progress.best['step']} is {self.folder.model}"
        raise BitFitError(
            f"the loss is {loss} at step {step}, so training stopped; {kept} "
            "(a lower learning rate usually helps)"
        )

    def _evaluate(self) -> None:
        """Evaluate every split, and keep what a later look or a resumed run needs."""
        progress, main = self.progress, self.data.metrics[0]
        rows: list[dict[str, Any]] = []
        early = self.settings.validate_once and progress.step < self.plan.steps
        for name, encoded in (self.glanced if early else self.evaluated).items():
            self.display.evaluating(name)
            scores = evaluate(
                self.model, encoded, self.collate, self.data.metrics, self.settings.precision
            )
            # a broken update shows here first: nothing of it may reach the checkpoint
            self._check_finite(scores["loss"], progress.step)
            rows.append(
                {
                    "step": progress.step,
                    "epoch": progress.step / self.plan.steps_per_epoch,
                    "split": name,
                    **scores,
                    "examples_per_second": self.clock.examples_per_second,
                    "step_ms": self.clock.step_ms,
                    "peak_memory_bytes": peak_memory(self.device),
                }
            )
        by_split = {row["split"]: row for row in rows}
        # before, there is nothing that could be saved
        settled = self.addition is None or self.addition.settled
        better = settled and (
            self.judge is None
            or self.settings.validate_once  # nothing is chosen: the last step is kept
            or progress.best is None
            or by_split[self.judge][main] > progress.best[self.judge][main]
        )
        if better:
            progress.best = {"step": progress.step, **by_split}
        progress.without_better = 0 if better or not settled else progress.without_better + 1
        progress.seconds = time.perf_counter() - self.started
        progress.rows += rows
        if self.folder:
            # an old run goes when the new one has something to show
            if not self.folder.begun:
                self.folder.begin(self.described())
            if better:
                self._save()
            state = self.step.state()
            self.folder.keep(rows, self.model, state, progress, self.base, self.device)
        self.display.evaluated(progress.step, by_split, self.data.metrics, self.judge or "train")

    def _save(self) -> None:
        assert self.folder
        task: dict[str, Any] = {
            "name": self.data.name,
            "metrics": list(self.data.metrics),
            **self._options(),
            **self.data.source,
        }
        if self.data.columns:
            task["text_columns"], task["label_column"] = self.data.columns
        save(self.model, self.folder.model, task=task, base_fingerprint=self.base)

    def _summary(self) -> dict[str, Any]:
        progress, selection = self.progress, Selection.of(self.model)
        last = progress.rows[-1]["step"]
        summary = {
            **self.described(),
            "lr": self.plan.lr,
            "device": device_name(self.device),
            "versions": versions(),
            "examples": len(self.features),
            "steps": progress.step,
            "epochs": progress.step / self.plan.steps_per_epoch,
            "metrics": list(self.data.metrics),
            "parameters": {
                "by_term": selection.counts,
                "biases": selection.biases,
                "share": selection.share,
                "trained": selection.total,
                "model": selection.base_parameters + selection.head_parameters,
            },
            "best": progress.best,
            "final": {
                "step": last,
                **{row["split"]: row for row in progress.rows if row["step"] == last},
            },
            "step_ms": mean_step_ms(progress.rows),
            "examples_per_second": statistics.median(
                r["examples_per_second"] for r in progress.rows
            ),
            "peak_memory_bytes": max(r["peak_memory_bytes"] for r in progress.rows),
            "seconds": progress.seconds,
        }
        if self.folder:
            summary["file_bytes"] = self.folder.model.stat().st_size
            title = f"{selection.method} on {self.data.name}"
            learning_curves(
                {title: progress.rows}, self.data.metrics[0], self.folder.curves, title=title
            )
            write_json(self.folder.summary, summary)
        return summary


def train(
    model: nn.Module,
    tokenizer: Any,
    data: TaskData,
    settings: Settings | None = None,
    output: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train what is selected in `model`, and evaluate on the way.

    Parameters
    ----------
    model : PreTrainedModel
        After `select` (or any other choice of `requires_grad`); trained in place. It ends
        in evaluation mode, on the device of the settings, with the last step's parameters
        and the task's labels in its configuration.
    tokenizer : PreTrainedTokenizerBase
        The model's own.
    data : TaskData
        From `load_task`; its `train` split trains, its `validation*` splits are evaluated,
        beside as many training examples.
    settings : Settings, optional
        Hyper-parameters.
    output : str or PathLike, optional
        Folder for metrics, checkpoint, summary and learning curves; by default nothing
        is written. The checkpoint is the evaluation with the best main metric.
    resume, overwrite : bool
        Go on with the run in the folder, or replace it.
    console : rich.console.Console, optional
        Where the progress goes; by default nothing is shown.

    Returns
    -------
    dict
        What `summary.json` holds: settings, versions, the best and the final evaluation,
        median time per step, peak memory.

    Raises
    ------
    BitFitError
        For settings that the model cannot take, an output folder that holds a run, nothing to
        resume, a selected parameter without a gradient, or a loss that is not finite (the last good
        checkpoint is kept).
    """
    if resume and output is None:
        raise BitFitError("resume goes on with the run in an output folder; name it (output)")
    folder = None if output is None else RunFolder(Path(output))
    if folder:
        folder.check(resume, overwrite)
    run = _Run(model, tokenizer, data, settings or Settings(), folder, console)
    if folder and resume:
        folder.check_same(run.described())
    return run.fit(resume)
