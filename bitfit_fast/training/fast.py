"""The fast step: whole encoders without padding, and one flat buffer of what trains."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..arena import Arena, ArenaAdamW
from ..data.batches import Batch, Collate, Features, move
from ..encoder import LENGTHS, MEMORY, encoder_of, for_model, refusal
from ..errors import BitFitError
from ..kernels import library
from ..kinds import KINDS, forward, kind_of
from ..patching import patch_encoder, unpatch
from ..selection import NO_GRADIENT, Selection
from .fixed import LONGEST, FixedSteps, budgets, check_budget
from .graph import Recorder
from .heap import keep_freed_memory
from .measure import multiplies_bf16, slow_in
from .settings import Plan

__all__ = ["FastBackend", "FastStep"]


def _free_memory(device: torch.device) -> int | None:
    """Return how much memory a step may take, in bytes; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _is_out_of_memory(error: RuntimeError) -> bool:
    # PyTorch has a class of its own for GPUs, and only words for CPUs
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


class FastStep:
    """One optimiser step of a model with a patched encoder.

    Where `torch.distributed` runs several processes, each takes the step with a batch of its
    own: they begin with the parameters of process 0, and gradients are averaged over all in
    one message a step.

    Parameters
    ----------
    model : nn.Module
        After `patch_encoder`; its parameters with `requires_grad` train, and lie in an arena
        until `close`.
    plan : Plan
        Learning rate, precision, clipping and budgets; and whether steps on a GPU are captured
        in CUDA graphs, as far as that is possible. In several processes forward and backward
        pass are captured, and messages and update are not.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.model, self.plan = model, plan
        self.no_gradient: frozenset[str] = getattr(model, NO_GRADIENT, frozenset())
        self.arena = Arena({n: p for n, p in model.named_parameters() if p.requires_grad})
        self.device = self.arena.values.device
        if self.device.type == "cpu":
            keep_freed_memory()
        initialised = dist.is_available() and dist.is_initialized()
        self.parallel = initialised and dist.get_world_size() > 1
        self.encoder = encoder_of(model)
        captures = plan.graph and self.device.type == "cuda"
        self.optimizer = ArenaAdamW(
            self.arena, lr=plan.lr, weight_decay=0.0, capturable=captures and not self.parallel
        )
        if self.encoder is not None:
            self.encoder.write_to(self.arena)
        self.steps = 0
        self._one: Tensor | None = None
        #: Bytes that a step may take.
        self.room = _free_memory(self.device)
        if self.room is not None and self.encoder is not None:
            self.room -= self.encoder.stack.bytes_packed()
        #: The steps on packings of a fixed size, if there are any.
        self.fixed: FixedSteps | None = None
        if captures and self.encoder is not None:
            self.fixed = self.of_fixed_size(Recorder(self.device, self.optimizer.buffers))
        if self.parallel:
            dist.broadcast(self.arena.values, 0)

    def of_fixed_size(self, record: Recorder | None = None, after: int = 1) -> FixedSteps:
        """Return these steps on packings of a fixed size; parameters as in `FixedSteps`."""
        assert self.encoder is not None
        longest = self.plan.max_length or LONGEST
        given = self.plan.token_budget or budgets(self.plan.batch_size * longest)
        # what processes send each other, and the update that waits for it, are not captured
        step = self._passed if self.parallel else self._trained
        return FixedSteps(self.model, self.encoder, step, given, self.device, record, after)

    def __call__(self, batch: Batch) -> Tensor:
        """Train on one batch; return its loss, detached, without waiting for the device.

        Raises
        ------
        BitFitError
            For a batch that is larger than the largest budget of the plan, or than memory.
        """
        if self.plan.token_budget:
            check_budget(batch, self.plan.token_budget)
        lr, loss = self.plan.lr_at(self.steps), None
        # the first step tells which parameters get no gradient
        if self.steps and self.fixed is not None:
            self.arena.check()
            loss = self.fixed(batch, lr)
            if loss is not None and self.parallel:
                self.optimizer.set_lr(lr)
                self._update()
        if loss is None:
            self.optimizer.set_lr(lr)
            loss = self._eager(batch)
        self.steps += 1
        return loss

    def _eager(self, batch: Batch) -> Tensor:
        """Train on a batch as it is."""
        self.arena.zero_gradients()
        idle = self._without_gradient() if not self.steps else []
        try:
            inputs = for_model(move(batch, self.device))
            loss = forward(self.model, inputs).loss
            self._backward(loss)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            raise BitFitError(self._what_fits(batch)) from None
        idle = [parameter for parameter in idle if parameter.grad is None]
        self._update()
        for parameter in idle:
            parameter.grad = None  # for the caller to see
        return loss.detach()

    def _trained(self, inputs: dict[str, Any], lr: Tensor) -> Tensor:
        """Train on what the model takes, with this learning rate; return the loss."""
        loss = self._passed(inputs, lr)
        self._update(lr)
        return loss

    def _passed(self, inputs: dict[str, Any], lr: Tensor) -> Tensor:
        """Leave the gradients of what the model takes in the arena; return the loss."""
        assert self.encoder is not None
        # what autograd makes is then copied to the arena at once, not added one by one; and what
        # the encoder makes takes the place of what is there, so that nothing has to be zero
        self._without_gradient()
        self.encoder.overwrites = True
        try:
            loss = forward(self.model, inputs).loss
        finally:
            # where the encoder did not come to run
            self.encoder.overwrites = False
        self._backward(loss)
        self.arena.check()
        return loss.detach()

    def _backward(self, loss: Tensor) -> None:
        """Compute gradients from a tensor of 1, which autograd would make anew each time."""
        if self._one is None or (self._one.dtype, self._one.shape) != (loss.dtype, loss.shape):
            self._one = torch.ones_like(loss)
        loss.backward(self._one)

    def _update(self, lr: Tensor | None = None) -> None:
        self.arena.all_reduce()
        self.optimizer.step(max_norm=self.plan.grad_clip, lr=lr)

    def _what_fits(self, batch: Batch) -> str:
        """Say which batches would have fitted, by what the layers keep of a token."""
        if self.encoder is None or self.room is None or "input_ids" not in batch:
            return "out of memory; a smaller batch or another memory mode needs less"
        examples, length = batch["input_ids"].shape
        said = f"out of memory with {examples} examples of up to {length} tokens"
        stack = self.encoder.stack
        width, inner = stack.layers[0].down.weight.shape
        # besides, the widest tensors of one layer and the embeddings in fp32
        passing = 3 * inner * stack.dtype.itemsize + 12 * width
        fits = {
            mode: int(self.room // (stack.bytes_kept(length, mode) + length * passing))
            for mode in MEMORY[MEMORY.index(stack.memory) :]
        }
        # as many as did not fit are too many, whatever the estimate
        least = fits[stack.memory] = min(fits[stack.memory], examples - 1)
        less = [mode for mode, count in fits.items() if mode != stack.memory and count > least]
        said += f" in memory mode '{stack.memory}'; by estimate "
        said += f"batches of {least} fit" if least > 0 else "no batch fits"
        if less:
            mode = next((m for m in less if fits[m] >= examples), less[-1])
            said += f", or of {max(1, fits[mode])} in mode '{mode}'"
        return said

    def _without_gradient(self) -> list[nn.Parameter]:
        """Take away the gradients that autograd will make, to find what gets none."""
        inside = set() if self.encoder is None else self.encoder.written
        outside = [p for name, p in self.arena.parameters.items() if name not in inside]
        for parameter in outside:
            parameter.grad = None
        return outside

    def state(self) -> dict[str, Tensor]:
        """Return the optimiser's tensors by name, for `restore`."""
        return {
            f"{key}/{name}": value.clone()
            for name, parameter in self.arena.parameters.items()
            for key, value in self.optimizer.state[parameter].items()
        }

    def restore(self, state: dict[str, Tensor], steps: int) -> None:
        """Continue after `steps` steps, from what `state` returned then."""
        self.steps = steps
        known = self.optimizer.state_dict()
        for index, name in enumerate(self.arena.parameters):
            entry = {
                key: state[f"{key}/{name}"]
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"{key}/{name}" in state
            }
            if entry:
                known["state"][index] = entry
        self.optimizer.load_state_dict(known)

    def close(self) -> None:
        """Give the parameters their own memory again."""
        if self.fixed is not None:
            self.fixed.close()
            self.fixed = None
        if self.encoder is not None:
            self.encoder.write_to(None)
        self.arena.release()


class FastBackend:
    """Whole encoders as one operation, packed tokens, an arena."""

    name = "fast"

    def refusal(self, model: nn.Module, selection: Selection, plan: Plan) -> str | None:
        """Return why the model's encoder cannot run as one operation, or None."""
        return refusal(model)

    def patch(
        self, model: nn.Module, selection: Selection, plan: Plan
    ) -> tuple[Callable[[], None], str]:
        """Let the encoder run as one operation."""
        # the loss of spans leaves padding out, whatever the model's own would do
        spans = not kind_of(type(model).__name__).classes
        done = patch_encoder(
            model,
            selection,
            precision=plan.precision,
            memory=plan.memory,
            reads_padding=False if spans else None,
        )
        said = str(done)
        if plan.device.type == "cpu" and (reason := library.unavailable()):
            said += f"\nwithout the kernels for CPUs, which makes it slow: {reason}"
        if plan.precision == "fp32" and multiplies_bf16(plan.device):
            said += "\nthis processor multiplies bf16, in which a step is faster (precision bf16)"
        if slow := slow_in(plan.precision, plan.device):
            encoder = encoder_of(model)
            assert encoder is not None
            if not encoder.stack.bytes_packed():  # then PyTorch multiplies
                said += f"\n{slow}"
        return partial(unpatch, model), said

    def collate(self, tokenizer: Any, plan: Plan, kind: str = "sequence") -> Collate:
        """Pad each batch to its longest example; the model takes the padding out.

        It is told the lengths, which are known here without asking the device.
        """
        padded = KINDS[kind].collate(tokenizer)
        if tokenizer.padding_side != "right":
            return padded

        def collate(features: Features) -> Batch:
            batch = padded(features)
            return {**batch, LENGTHS: tuple(len(f["input_ids"]) for f in features)}

        return collate

    def step(self, model: nn.Module, plan: Plan) -> FastStep:
        """Return the fast step."""
        return FastStep(model, plan)
