"""CUDA graphs of steps: captured once, then started by one call."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..errors import BitFitError
from .fixed import CannotCapture

__all__ = ["Recorder"]

#: Times that a step runs before it is captured: the first compiles kernels and makes handles.
_WARM_UP = 2


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream of a device that is captured."""
    return torch.cuda.Stream(device)


class Recorder:
    """Captures functions that work on the same tensors at each call, on one device.

    All graphs share one pool of memory. That is safe as long as nothing inside of it is looked
    at after a replay, which the next graph may overwrite: results are to be copied to tensors
    made elsewhere. What the library of products works in lies there, too. So graphs are to be
    replayed one after another.

    Parameters
    ----------
    device : torch.device
        A GPU.
    state : sequence of Tensor
        What the functions change, and capturing them must not: it takes trials.
    """

    def __init__(self, device: torch.device, state: Sequence[Tensor]) -> None:
        self.device, self.state = device, state
        self._stream = _stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        """Capture a function; return what replays it.

        `state` and the device's random numbers are as before, and each replay draws the
        random numbers that a call of the function would have drawn.

        Raises
        ------
        CannotCapture
            If the function waits for the device, or does something else that cannot be
            captured.
        """
        with torch.cuda.device(self.device), self._untouched():
            try:
                self._warm_up(run)
                return self._captured(run)
            except BitFitError:
                raise
            except RuntimeError as error:
                reason = str(error).strip().split("\n")[0]
                raise CannotCapture(f"a step cannot be captured: {reason}") from error

    def _warm_up(self, run: Callable[[], None]) -> None:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                for number in range(_WARM_UP):
                    # a wait that would break the capture is an error already here, from which
                    # there is a way back
                    with _waiting_is_an_error() if number else contextlib.nullcontext():
                        run()
        finally:
            current.wait_stream(self._stream)

    def _captured(self, run: Callable[[], None]) -> Callable[[], None]:
        index = torch.cuda.current_device()
        generator = torch.cuda.default_generators[index]
        # after a capture that failed, generator and stream would be left in the midst of it
        spare, current = generator.clone_state(), torch.cuda.current_stream()
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads may go on as they like, such as those that load data
            with (
                _workspaces_inside(),
                torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ),
            ):
                run()
        except RuntimeError:
            torch.cuda.set_stream(current)
            generator.graphsafe_set_state(spare)
            # the allocator would go on as if it were captured, and give no memory back; where it
            # knows better it says so
            with contextlib.suppress(RuntimeError, AttributeError):
                torch._C._cuda_endAllocateToPool(index, self._pool)
                torch._C._cuda_releasePool(index, self._pool)
            raise
        return graph.replay

    @contextlib.contextmanager
    def _untouched(self) -> Iterator[None]:
        """Put state and random numbers back, whatever happens."""
        random = torch.cuda.get_rng_state(self.device)
        saved = [tensor.clone() for tensor in self.state]
        try:
            yield
        finally:
            torch.cuda.set_rng_state(random, self.device)
            for tensor, value in zip(self.state, saved):
                tensor.copy_(value)


@contextlib.contextmanager
def _workspaces_inside() -> Iterator[None]:
    """Let products that are captured work in memory of the graph's pool.

    cuBLAS keeps what it was given before, which lies outside and which others free while graphs
    still write there: so does `torch.compile` whenever it captures.
    """
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)
    clear()
    try:
        yield
    finally:
        clear()


@contextlib.contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        # that it may miss something, at which a capture fails in any case
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
