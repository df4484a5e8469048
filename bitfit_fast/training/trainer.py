"""BitFit in `transformers.Trainer`: scripts for that one work with the name changed."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if importlib.util.find_spec("accelerate") is None:
    raise ImportError("BitFitTrainer needs accelerate: pip install 'bitfit_fast[trainer]'")

from accelerate.data_loader import DataLoaderShard
from transformers import Trainer
from transformers.training_args import ParallelMode

from ..additions import addition, obstacle
from ..arena import Arena
from ..checkpoint import fingerprint, save, stored
from ..encoder import MEMORY, PRECISIONS, encoder_of
from ..errors import BitFitError, check_known, listed
from ..patching import patch, patch_encoder, unpatch
from ..selection import Selection, is_patched, select, undone_on_failure
from .fixed import LONGEST, budgets, check_budget
from .graph import Recorder
from .in_arena import InArena, OverArena, without_wrapper
from .obstacles import capture_obstacle, checkpoints, encoder_obstacle, manager
from .passes import Passes
from .settings import Settings, low_rate

__all__ = ["FILE", "BitFitTrainer"]

logger = logging.getLogger(__name__)

#: Name of the file of trained biases and head in every folder that the trainer saves.
FILE = "bitfit.safetensors"

#: Options of AdamW that the arena's has too, and those that say only how it is computed.
_OPTIONS, _HOW = {"lr", "betas", "eps", "weight_decay"}, {"fused", "foreach"}


class BitFitTrainer(Trainer):
    """`transformers.Trainer` that trains biases and the task head, and only computes that.

    The model is selected when the trainer is made. While `train` runs, its encoder runs as one
    operation where `patch_encoder` takes the model, with bias-only modules (`patch`) elsewhere,
    and what trains lies in one `Arena` with one AdamW over it where AdamW is the optimiser. In
    several processes the gradients are averaged in one message a step, without
    `DistributedDataParallel`. On a GPU, forward and backward pass of a batch are captured in CUDA
    graphs, for each of a few budgets of tokens; accumulation, clipping, update and callbacks are
    the plain trainer's. (It waits for each loss to see whether it is a number; with
    `logging_nan_inf_filter=False` nothing does.) Evaluation and prediction run the same encoder.
    Before and after, the model is an ordinary one; what is saved is so at any time. A logger,
    `bitfit_fast.training.trainer`, says once what was done and what could not be, and why.

    Every folder that is saved holds the whole model, for `from_pretrained`, and beside it
    `bitfit.safetensors`, which is what `bitfit_fast.save` writes. Of a method that adds something
    to the model (adapters, LoRA and others of `bitfit_fast.prepare`) only the latter is complete:
    `bitfit_fast.load` puts it into the base model, and `merge` makes an ordinary folder of it.

    Parameters
    ----------
    model, args, *rest, **options
        As for `transformers.Trainer`. With `args.bf16` the encoder computes in bf16, without
        in fp32. A model in which parameters are frozen already keeps that selection, unless
        one of the next three is given.
    terms, layers, head : optional
        What trains, as for `select`, and with its defaults.
    memory : str
        How much the encoder keeps for the backward pass, as for `patch_encoder`; `fast` is
        `lowest` where `args` ask for gradient checkpointing.
    graph : bool
        Whether passes on a GPU are captured in CUDA graphs where they can be. Hooks that are
        added while the model trains are not called by those.
    token_budget : sequence of int, optional
        Tokens of a batch that the graphs are made for; a batch of more than the largest is an
        error, on any device. By default as many as any batch can have.

    Raises
    ------
    BitFitError
        For a term, layer, head, memory mode or budget that there is not, and for a model that
        Diff-Pruning is to train.

    Examples
    --------
    >>> from bitfit_fast import BitFitTrainer
    >>> from transformers import AutoModelForSequenceClassification, TrainingArguments
    >>> model = AutoModelForSequenceClassification.from_pretrained("bert-base-uncased")
    >>> arguments = TrainingArguments("runs/rte", learning_rate=1e-3, num_train_epochs=10)
    >>> trainer = BitFitTrainer(model, arguments, train_dataset=train, eval_dataset=validation)
    >>> trainer.train()
    >>> trainer.save_model()
    >>> bitfit_fast.load(another, "runs/rte/bitfit.safetensors")
    """

    model: Any
    optimizer: Any

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *rest: Any,
        terms: str | Iterable[str] | None = None,
        layers: str | int | Iterable[int] | None = None,
        head: bool | Sequence[str] | None = None,
        memory: str = "fast",
        graph: bool = True,
        token_budget: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        check_known("memory mode", memory, MEMORY)
        budget = None if token_budget is None else tuple(token_budget)
        self.memory, self.graph = memory, graph
        self.token_budget = Settings(token_budget=budget).token_budget
        choice = {"terms": terms, "layers": layers, "head": head}
        self._choice: Any = {key: value for key, value in choice.items() if value is not None}
        #: What ends with `train`; None outside of it
        self._ends: contextlib.ExitStack | None = None
        #: What trains, while it lies in an arena
        self._trained: InArena | None = None
        #: Captured passes, or why there are none; and for which batches they were made
        self._passes: Passes | str | None = None
        self._passes_size: int | None = None
        self._fingerprint: str | None = None
        self._said: set[str] = set()
        with contextlib.ExitStack() as stack:
            if model is not None:  # else `call_model_init` does
                stack.enter_context(undone_on_failure(model))
                self._select(model)
            super().__init__(model, args, *rest, **options)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make a model, and select what trains."""
        model = super().call_model_init(trial)
        self._select(model)
        return model

    def _select(self, model: nn.Module) -> None:
        extra = addition(model)
        if extra is not None and not extra.settled:
            raise BitFitError(
                f"BitFitTrainer cannot train method '{extra.method}', whose gates and penalty "
                "only bitfit_fast.train knows"
            )
        if self._choice or not _is_selected(model):
            select(model, **self._choice)

    def _say(self, level: int, text: str) -> None:
        if text not in self._said and self.args.process_index == 0:
            logger.log(level, text)
        self._said.add(text)

    # ------------------------------------------------------------------ around training

    def train(self, *args: Any, **options: Any) -> Any:
        """Train as `transformers.Trainer` does; the model is an ordinary one afterwards."""
        with contextlib.ExitStack() as self._ends:
            # what `create_optimizer` begins, which comes when the model is there and in place
            self._ends.callback(self._end)
            return super().train(*args, **options)

    def _end(self) -> None:
        self._ends = self._trained = self._fingerprint = None
        self._leave_passes()

    def _leave_passes(self) -> None:
        if isinstance(self._passes, Passes):
            self._passes.steps.close()
        self._passes = None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimiser; in `train`, make the model fast before."""
        if self._ends is None or self._trained is not None or self._managed():
            return super().create_optimizer(model)
        # with its number, as of "cpu:0", a device looks like another
        device = torch.empty(0, device=self.args.device).device
        if any(p.device != device for p in self.model.parameters()):
            self.model.to(device)
        options = self._arena_options()
        if options is not None and self._in_parallel():
            # before copies of weights in other dtypes are made
            for tensor in [*self.model.parameters(), *self.model.buffers()]:
                dist.broadcast(tensor.data, 0)
        self._make_fast(self._ends, wraps=options is None and self._in_parallel())
        if options is None:
            return super().create_optimizer(model)
        state = None
        if self.optimizer is not None:  # of an earlier call of `train`
            state, self.optimizer = self.optimizer.state_dict(), None
        self._trained = InArena(self.model, self._ends)
        if self._in_parallel():
            without_wrapper(self.model, self.accelerator, self._ends)
        chosen = self.optimizer_cls_and_kwargs
        self.optimizer_cls_and_kwargs = self._trained.optimizer(), options
        try:
            made = super().create_optimizer(model)
        finally:
            self.optimizer_cls_and_kwargs = chosen
        if state is not None:
            made.load_state_dict(state)
        self._ends.callback(made.register_step_pre_hook(self._trained.share).remove)
        return made

    def _managed(self) -> bool:
        """Return whether something else lays out the parameters, and say so."""
        name = manager(self)
        if name is not None:
            self._say(logging.WARNING, f"the model stays as it is: {name} lays it out")
        return name is not None

    def _patch_encoder(self) -> str:
        """Let the encoder run as one operation; return what there is to say of it."""
        memory = "lowest" if checkpoints(self.args) and self.memory == "fast" else self.memory
        precision = "bf16" if self.args.bf16 else "fp32"
        return str(patch_encoder(self.model, precision=precision, memory=memory))

    def _make_fast(self, ends: contextlib.ExitStack, wraps: bool) -> None:
        """Patch the model as far as it can be, until training ends."""
        model = self.model
        if is_patched(model):
            return
        reason, method = encoder_obstacle(self), Selection.of(model).method
        if reason is None and wraps:
            reason = "without an arena DistributedDataParallel wraps it, and writes its weights"
        if reason is None:
            self._say(logging.INFO, self._patch_encoder())
        elif method not in ("bitfit", "frozen"):
            reason = obstacle(model) or "its weights train"
            self._say(logging.WARNING, f"the model stays as it is: {reason}")
            return
        else:
            done = patch(model)
            text = f"the encoder does not run as one operation: {reason}; instead: {done}"
            self._say(logging.WARNING, text)
        ends.callback(unpatch, model)
        # as the default of `TrainingArguments` is
        slow = low_rate(self.args.learning_rate) if method == "bitfit" else None
        if slow is not None and self.optimizer is None:
            self._say(logging.WARNING, slow)

    def _arena_options(self) -> dict[str, Any] | None:
        """Return the options of AdamW if the arena's can take its place."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if optimizer is not None and not isinstance(optimizer, OverArena):
            self._say(logging.INFO, f"{type(optimizer).__name__} updates each parameter by itself")
            return None
        kind, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
            self.args, self.model
        )
        options = {key: value for key, value in options.items() if key not in _HOW}
        if kind is not torch.optim.AdamW or not options.keys() <= _OPTIONS:
            text = f"{getattr(kind, '__name__', kind)} updates each parameter by itself"
            self._say(logging.INFO, text)
            return None
        trains = [p for p in self.model.parameters() if p.requires_grad]
        if strange := {p.dtype for p in trains} - {torch.float32}:
            text = "each parameter is updated by itself: what trains is "
            self._say(logging.WARNING, text + f"{listed(strange)}, not torch.float32")
            return None
        return options if trains and self.args.n_gpu <= 1 else None

    def _in_parallel(self) -> bool:
        return self.args.parallel_mode == ParallelMode.DISTRIBUTED and self.args.world_size > 1

    # ------------------------------------------------------------------ a step

    def _captures(self) -> bool:
        """Return whether passes are to be captured."""
        return self.graph and self.args.device.type == "cuda"

    def _record(self, arena: Arena) -> Callable[[Callable[[], None]], Callable[[], None]] | None:
        """Return what captures passes."""
        return Recorder(arena.gradients.device, [arena.gradients])

    def _on_host(self) -> bool:
        """Return whether batches come to the device packed, in one message."""
        own = type(self).training_step is BitFitTrainer.training_step
        return own and self._ends is not None and self._captures() and not self._managed()

    def get_train_dataloader(self) -> Any:
        """Make the batches; captured passes take them from the host, which knows their lengths."""
        loader = super().get_train_dataloader()
        if self._on_host() and isinstance(loader, DataLoaderShard):
            loader.device = None
        return loader

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Take the batches of a step and count their labels, without waiting for the device."""
        waits = torch.device(device).type != "cuda" or self.args.world_size > 1
        if waits or not self._on_host():
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        batches, labels = super().get_batch_samples(
            epoch_iterator, num_batches, torch.device("cpu")
        )
        if isinstance(labels, Tensor) and labels.device.type == "cpu":
            labels = labels.pin_memory().to(device, non_blocking=True)
        return batches, labels

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Run forward and backward pass of a batch, captured where they can be."""
        if self.token_budget is not None:
            check_budget(inputs, self.token_budget)
        loss = self._replayed(model, inputs, num_items_in_batch)
        if loss is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
        scales = self.accelerator.scaler is not None and self.accelerator.sync_gradients
        if scales and self._trained is not None:
            # before it looks for what is not finite, for all processes to leave out the same steps
            self._trained.share()
        return loss

    def _replayed(self, model: nn.Module, inputs: Any, labels: Any) -> Tensor | None:
        """Run a captured pass; None where there is none for this batch."""
        trained = self._trained
        if trained is None or not self._captures():
            return None
        if self._passes is None or self._passes_size != self._train_batch_size:
            self._leave_passes()
            self._passes = self._make_passes(model, trained.arena)
            self._passes_size = self._train_batch_size
        if isinstance(self._passes, str):
            self._say(logging.WARNING, f"steps run without a CUDA graph where {self._passes}")
            return None
        model.train()
        trained.attach()
        trained.arena.check()
        return self._passes(dict(inputs), labels, self.current_gradient_accumulation_steps)

    def _make_passes(self, model: nn.Module, arena: Arena) -> Passes | str:
        """Return captured passes, or why there are none."""
        encoder = encoder_of(self.model)
        if encoder is None:
            return "the encoder does not run as one operation"
        if (reason := capture_obstacle(self, model)) is not None:
            return reason
        step = super().training_step

        def run(inputs: dict[str, Any], labels: Tensor | None, batches: Tensor) -> Tensor:
            count, self.current_gradient_accumulation_steps = (
                self.current_gradient_accumulation_steps, batches
            )  # fmt: skip
            try:
                return step(model, inputs, labels)
            finally:
                self.current_gradient_accumulation_steps = count

        longest = getattr(self.model.config, "max_position_embeddings", LONGEST)
        given = self.token_budget or budgets(self._train_batch_size * longest)
        say = partial(self._say, logging.WARNING)
        return Passes(self.model, encoder, arena, run, given, self._record(arena), say=say)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self._trained is None:
            return super()._clip_grad_norm(model)
        return self._shared(self._trained).clip_(self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if self._trained is None or grad_norm is not None:
            return super()._get_grad_norm(model, grad_norm)
        return self._shared(self._trained).gradient_norm()

    def _shared(self, trained: InArena) -> Arena:
        """Return the arena with the gradients that the optimiser is to take."""
        trained.share()
        self.accelerator.unscale_gradients()
        return trained.arena

    # ------------------------------------------------------------------ evaluation

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        """Evaluate or predict as `transformers.Trainer` does, with the fast encoder."""
        with self._fast_encoder():
            return super().evaluation_loop(*args, **options)

    @contextlib.contextmanager
    def _fast_encoder(self) -> Iterator[None]:
        model = self.model
        if self._ends is not None or is_patched(model) or not self._evaluates_fast():
            yield
            return
        self._say(logging.INFO, self._patch_encoder())
        try:
            yield
        finally:
            unpatch(model)

    def _evaluates_fast(self) -> bool:
        casts = self.args.bf16_full_eval or self.args.fp16_full_eval
        # a CPU with its number, as under torchrun, is one to which weights are copied again
        casts = casts or self.args.device != torch.empty(0, device=self.args.device).device
        return not casts and not self._managed() and encoder_obstacle(self) is None

    # ------------------------------------------------------------------ files

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self._managed() and (kept := addition(self.model)) is not None:
            kept.apply(self.model)  # the last update is in the weights from the next pass on
        super()._save(output_dir, state_dict)
        if not self.args.should_save or self._managed():
            return
        model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        extra = addition(model)
        foreign = hasattr(model, "peft_config") if extra is None else not extra.settled
        if Selection.of(model).method == "full" or foreign:
            return
        known = self._fingerprint or fingerprint(model, stored(model))
        if self._ends is not None:  # while training, what is frozen stays so
            self._fingerprint = known
        save(model, Path(output_dir or self.args.output_dir or "", FILE), base_fingerprint=known)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str | os.PathLike[str], model: Any = None
    ) -> None:
        with self._weights_change():
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[arg-type]

    def _load_best_model(self) -> None:
        with self._weights_change():
            super()._load_best_model()

    @contextlib.contextmanager
    def _weights_change(self) -> Iterator[None]:
        """Let frozen weights be written, of which the encoder has copies."""
        self._fingerprint = None
        model = self.model
        encoder = encoder_of(model) if not self._managed() else None
        if encoder is None:
            yield
            return
        dtypes = {dtype: name for name, dtype in PRECISIONS.items()}
        self._leave_passes()  # they run the encoder of before, and hold its memory
        unpatch(model)
        try:
            yield
        finally:
            precision, stack = dtypes[encoder.stack.dtype], encoder.stack
            patch_encoder(model, None, precision, stack.memory, encoder.reads_padding)
            if self._trained is not None:
                self._trained.take_gradients()


def _is_selected(model: nn.Module) -> bool:
    """Return whether a weight or bias is frozen; tables of positions always are in some models."""
    return is_patched(model) or any(
        not parameter.requires_grad
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for name, parameter in module.named_parameters(recurse=False)
        if name in ("weight", "bias")
    )
