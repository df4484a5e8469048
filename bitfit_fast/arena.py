"""Flat storage of what trains: one buffer of values, one of gradients, one AdamW update.

BitFit trains some two hundred small vectors. As views of one buffer they are zeroed, clipped,
averaged over processes and updated in a few launches in all, not in a few for each.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.adamw import adamw

from .errors import BitFitError, listed
from .ops._backend import uses_triton
from .ops.adamw import adamw_, squares

__all__ = ["Arena", "ArenaAdamW"]

#: Elements (64 bytes) at whose multiples parameters begin, as in tensors that PyTorch makes.
_ALIGNMENT = 16


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _refuse_amsgrad(groups: Sequence[Mapping[str, Any]]) -> None:
    if any(group.get("amsgrad") for group in groups):
        raise BitFitError("a group has amsgrad=True, and ArenaAdamW is without (amsgrad=False)")


class Arena:
    """Parameters as views of one flat buffer, and their gradients as views of another.

    Parameters
    ----------
    named_parameters : mapping of str to nn.Parameter
        What trains: fp32, on one device, on which they stay until `release`. A parameter
        with several names (tied) comes once, under the first of them. Build the arena before
        data-parallel wrappers.

    Attributes
    ----------
    values, gradients : Tensor
        The buffers, fp32. Parameters lie in the mapping's order, each at a multiple of 64
        bytes; what is between them is zero.
    parameters : dict of str to nn.Parameter
        By name.
    slices : dict of str to (int, int)
        Where each parameter begins and ends in both buffers.

    Raises
    ------
    BitFitError
        For no parameters, or one that cannot lie there; nothing is changed then.
    """

    def __init__(self, named_parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters: dict[str, nn.Parameter] = {}
        self.slices: dict[str, tuple[int, int]] = {}
        size = 0
        for name, parameter in named_parameters.items():
            if any(parameter is present for present in self.parameters.values()):
                continue
            self._refuse(name, parameter)
            self.parameters[name] = parameter
            self.slices[name] = (size, size + parameter.numel())
            size += _aligned(parameter.numel())
        if not self.parameters:
            raise BitFitError("an arena needs at least one parameter that trains, and got none")
        first = next(iter(self.parameters.values())).detach()
        self.values, self.gradients = first.new_zeros(size), first.new_zeros(size)
        #: Addresses of every parameter and its gradient, by which strays are found
        self._places: dict[str, tuple[int, int]] = {}
        for name, parameter in self.parameters.items():
            view, gradient = self.view(name), self.view(name, self.gradients)
            parameter.data = view.copy_(parameter.data)
            self._places[name] = view.data_ptr(), gradient.data_ptr()
        self.check()

    def _refuse(self, name: str, parameter: nn.Parameter) -> None:
        if not parameter.requires_grad:
            raise BitFitError(f"{name} does not train (requires_grad is False)")
        if parameter.dtype != torch.float32:
            raise BitFitError(f"{name} is {parameter.dtype}; what trains has to be torch.float32")
        for other, present in self.parameters.items():
            if parameter.device != present.device:
                raise BitFitError(
                    f"{name} is on {parameter.device} and {other} on {present.device}; "
                    "what trains has to be on one device"
                )
            if parameter.numel() and parameter.data_ptr() == present.data_ptr():
                raise BitFitError(
                    f"{name} shares its memory with {other}; make both the same parameter"
                )

    def view(self, name: str, flat: Tensor | None = None) -> Tensor:
        """Return a parameter's part of a flat tensor, in its shape; by default of `values`."""
        flat = self.values if flat is None else flat
        return flat[slice(*self.slices[name])].view(self.parameters[name].shape)

    @torch.no_grad()
    def check(self) -> None:
        """Put gradients back that came to lie elsewhere; those that are None become zero.

        `Module.zero_grad` drops gradients, and the next backward pass then makes new ones.
        The other methods and `ArenaAdamW.step` check first; before the replay of a CUDA graph
        it is up to the caller.

        Raises
        ------
        BitFitError
            For a parameter whose data lie elsewhere, as after `Module.to`.
        """
        moved: list[tuple[Tensor, Tensor]] = []
        for name, parameter in self.parameters.items():
            value, gradient = self._places[name]
            if parameter.data_ptr() != value:
                raise BitFitError(
                    f"the data of {name} no longer lie in the arena; "
                    "release it before moving or converting the model, and build another"
                )
            if parameter.grad is None:
                parameter.grad = self.view(name, self.gradients).zero_()
            elif parameter.grad.data_ptr() != gradient:
                stray, parameter.grad = parameter.grad, self.view(name, self.gradients)
                moved.append((parameter.grad, stray))
        if moved:
            torch._foreach_copy_([to for to, _ in moved], [stray for _, stray in moved])

    def zero_gradients(self) -> None:
        """Set all gradients to zero."""
        self.check()
        self.gradients.zero_()

    def gradient_norm(self) -> Tensor:
        """Return the 2-norm of all gradients, 0-dimensional, without waiting for the device."""
        self.check()
        return torch.linalg.vector_norm(self.gradients)

    def clip_(self, max_norm: float) -> Tensor:
        """Scale the gradients as `nn.utils.clip_grad_norm_` does; return their norm before."""
        norm = self.gradient_norm()
        # multiplied by 1 where nothing is to clip: to look would wait for the device
        self.gradients.mul_(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
        return norm

    def clipping(self, max_norm: float) -> Tensor:
        """Return what gradients divided by are clipped, 1 where they need not be.

        The fused optimisers of PyTorch divide by their `grad_scale` as they read the gradients.
        """
        return ((self.gradient_norm() + 1e-6) / max_norm).clamp_(min=1.0)

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Average the gradients over the processes, in one message."""
        processes = 1
        if dist.is_available() and dist.is_initialized():
            processes = dist.get_world_size(group)
        if processes > 1:
            self.check()
            dist.all_reduce(self.gradients, group=group)
            self.gradients.div_(processes)  # gloo has no mean

    def release(self) -> None:
        """Give each parameter its own memory again, with its values and no gradient."""
        for name, parameter in self.parameters.items():
            parameter.grad = None
            if parameter.data_ptr() == self._places[name][0]:
                parameter.data = parameter.data.clone()


class ArenaAdamW(torch.optim.AdamW):
    """AdamW over an arena: one fused launch updates all parameters of a group.

    It takes the same steps as `torch.optim.AdamW(fused=True)` over the same parameters, and
    their state dicts are interchangeable. It differs in that a parameter without gradient
    counts as one whose gradient is zero. `state` holds views to read; `load_state_dict`
    writes.

    Parameters
    ----------
    arena : Arena
        The parameters.
    groups : sequence of dict, optional
        Parameter groups, together all of the arena. Each has `names`, or `params` as for
        PyTorch's optimisers, and options of its own such as `weight_decay`.
    lr, betas, eps, weight_decay
        As in `torch.optim.AdamW`, for groups without their own.
    capturable : bool
        Keep the learning rates in tensors on the device, so that `step` can be captured in a
        CUDA graph and replays follow changes: `group["lr"].fill_(value)`, as schedulers do.
        Everything else in the groups is fixed by the capture.

    Raises
    ------
    BitFitError
        If the groups are not the arena's parameters, each once.
    """

    #: What the next step divides the gradients by, where it is set, as gradient scalers do.
    grad_scale: Tensor | None

    def __init__(
        self,
        arena: Arena,
        groups: Sequence[Mapping[str, Any]] | None = None,
        *,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        capturable: bool = False,
    ) -> None:
        self.arena = arena
        self._names = {parameter: name for name, parameter in arena.parameters.items()}
        super().__init__(
            self._with_parameters([{"names": arena.parameters}] if groups is None else groups),
            lr, betas, eps, weight_decay, capturable=capturable, fused=True,
        )  # fmt: skip
        if capturable:
            for group in self.param_groups:
                group["lr"] = arena.values.new_tensor(float(group["lr"]))
        self._moments = {key: torch.zeros_like(arena.values) for key in ("exp_avg", "exp_avg_sq")}
        self._steps = arena.values.new_zeros(len(arena.parameters))
        self._cut([0.0] * len(arena.parameters))

    def _with_parameters(self, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the groups with parameters for names; refuse them if any is missing."""
        _refuse_amsgrad(groups)
        found, parameters = [], self.arena.parameters
        for group in map(dict, groups):
            if "names" in group:
                names = list(group.pop("names"))
                if unknown := [name for name in names if name not in parameters]:
                    raise BitFitError(
                        f"the arena has no {listed(unknown, 3)}; it has {listed(parameters)}"
                    )
                group["params"] = [parameters[name] for name in names]
            found.append({**group, "params": list(group["params"])})
        times = Counter(p for group in found for p in group["params"])
        for parameter in [*times, *self._names]:
            if parameter not in self._names:
                shape = tuple(parameter.shape)
                raise BitFitError(f"a parameter of shape {shape} in the groups is not the arena's")
            if times[parameter] != 1:
                raise BitFitError(
                    f"{self._names[parameter]} is {times[parameter]} times in the groups; "
                    "each parameter of the arena has to be there once"
                )
        return found

    def _cut(self, counts: Sequence[float]) -> None:
        """Cut the buffers where group or step count change, and show the state by parameter.

        Step counts differ where a state dict came from an optimiser that left parameters
        without gradient out.
        """
        groups = {p: i for i, group in enumerate(self.param_groups) for p in group["params"]}
        #: For each group its values, gradients, first and second moments, and steps
        self._runs: list[list[list[Tensor]]] = [[[] for _ in range(5)] for _ in self.param_groups]
        self.state = defaultdict(dict)
        buffers = self.arena.values, self.arena.gradients, *self._moments.values()
        rows = zip(self._names, self._names.values(), counts, self._steps)
        for (index, count), run in groupby(rows, key=lambda row: (groups[row[0]], row[2])):
            parameters, names, _, steps = zip(*run)
            step = steps[0].fill_(count)
            # the padding goes along: it is zero and stays so
            ends = self.arena.slices[names[0]][0], _aligned(self.arena.slices[names[-1]][1])
            for tensors, buffer in zip(self._runs[index], buffers):
                tensors.append(buffer[slice(*ends)])
            self._runs[index][-1].append(step)
            for parameter, name in zip(parameters, names):
                moments = {k: self.arena.view(name, flat) for k, flat in self._moments.items()}
                self.state[parameter] = {"step": step, **moments}

    @property
    def buffers(self) -> list[Tensor]:
        """All that a step changes: values, gradients, moments, step counts."""
        return [self.arena.values, self.arena.gradients, *self._moments.values(), self._steps]

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of all groups, without waiting for the device."""
        for group in self.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)  # where a captured graph reads it
            else:
                group["lr"] = lr

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take the groups of the constructor, and no others."""
        if hasattr(self, "_runs"):
            raise BitFitError("the parameters of an arena are fixed; build another to add a group")
        super().add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set all gradients to zero, in place in either case."""
        self.arena.zero_gradients()

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        max_norm: float = 0.0,
        lr: Tensor | None = None,
    ) -> Any:
        """Update the parameters from their gradients; return what `closure` returns.

        Those that no longer require a gradient stay as they are, with their moments.

        Parameters
        ----------
        closure : callable, optional
            Computes the gradients.
        max_norm : float
            Clips the gradients first, as `nn.utils.clip_grad_norm_` does; 0 does not.
        lr : Tensor, optional
            On the device, in the place of the groups' learning rates.

        Raises
        ------
        BitFitError
            If gradients that a scaler has scaled are to be clipped, or in a CUDA graph without
            `capturable`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        capturable = self.defaults["capturable"]
        on_gpu = self.arena.values.is_cuda
        if on_gpu and not capturable and torch.cuda.is_current_stream_capturing():
            raise BitFitError("a CUDA graph needs ArenaAdamW with capturable=True")
        self.arena.check()
        frozen = self._frozen()
        rates = [group["lr"] if lr is None else lr for group in self.param_groups]
        # what a gradient scaler sets for fused optimisers
        scale, overflow = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
        partial = None
        if max_norm:
            if scale is not None or overflow is not None:
                raise BitFitError(
                    "step(max_norm=...) clips no gradients that a scaler has scaled; "
                    "unscale them, and clip them by Arena.clip_"
                )
            if self._has_kernels(rates):
                partial = squares(self.arena.gradients, self._steps)
            else:
                scale = self.arena.clipping(max_norm)
        for group, rate, runs in zip(self.param_groups, rates, self._runs):
            if partial is not None:
                options = (*group["betas"], group["eps"], group["weight_decay"], group["maximize"])
                for run in zip(*runs):
                    adamw_(*run, rate, partial, max_norm, *options)
                continue
            values, gradients, exp_avgs, exp_avg_sqs, steps = runs
            adamw(
                values, gradients, exp_avgs, exp_avg_sqs, [], steps,
                fused=True, capturable=capturable, amsgrad=False, maximize=group["maximize"],
                beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"],
                lr=rate, weight_decay=group["weight_decay"],
                grad_scale=scale, found_inf=overflow,
            )  # fmt: skip
        for place, value in frozen:
            place.copy_(value)
        # autograd does not see that the parameters changed with the buffer
        increment_version(list(self._names))
        return loss

    def _frozen(self) -> list[tuple[Tensor, Tensor]]:
        """Return places of parameters that were frozen since, which stay, and what is there."""
        places = [
            self.arena.view(name, flat)
            for name, parameter in self.arena.parameters.items()
            if not parameter.requires_grad
            for flat in (self.arena.values, *self._moments.values())
        ]
        return [(place, place.clone()) for place in places]

    def _has_kernels(self, rates: list[Any]) -> bool:
        """Return whether clipping and update are two launches of a GPU."""
        if not uses_triton(self.arena.values):
            return False
        device = self.arena.values.device
        on_device = all(isinstance(rate, Tensor) and rate.device == device for rate in rates)
        return on_device and all(min(group["betas"]) > 0 for group in self.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """Return what `torch.optim.AdamW` over the same parameters returns."""
        state = super().state_dict()
        # in another optimiser each parameter counts its own steps
        state["state"] = {
            index: {**entry, "step": entry["step"].clone()}
            for index, entry in state["state"].items()
        }
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of this optimiser or of `torch.optim.AdamW`, in place."""
        self._refuse_state(state_dict)
        before = self.param_groups
        super().load_state_dict(state_dict)
        for group, own in zip(self.param_groups, before):
            lr = float(group["lr"])
            # a captured graph reads the learning rate where it was
            group["lr"] = own["lr"].fill_(lr) if isinstance(own["lr"], Tensor) else lr
            for key in ("fused", "foreach", "capturable", "differentiable"):
                group[key] = own[key]
        counts = []
        for parameter, name in self._names.items():
            entry = self.state.get(parameter, {})
            counts.append(float(entry.get("step", 0.0)))
            for key, flat in self._moments.items():
                view = self.arena.view(name, flat)
                view.copy_(entry[key]) if entry else view.zero_()
        self._cut(counts)

    def _refuse_state(self, state_dict: dict[str, Any]) -> None:
        _refuse_amsgrad(state_dict["param_groups"])
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        others = "the optimizer's state is of other parameters than those that train: "
        if len(saved) != len(parameters):
            raise BitFitError(f"{others}{len(saved)}, and {len(parameters)} train")
        for index, parameter in zip(saved, parameters):
            shape = tuple(state_dict["state"].get(index, {}).get("exp_avg", parameter).shape)
            if shape != tuple(parameter.shape):
                name, own = self._names[parameter], tuple(parameter.shape)
                raise BitFitError(f"{others}that of {name} has shape {shape}, and it {own}")
