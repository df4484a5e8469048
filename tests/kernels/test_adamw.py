"""Clipping and AdamW under the interpreter, or natively on a GPU, against PyTorch's in float64."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is installed on Linux only")

from bitfit_fast.arena import Arena, ArenaAdamW
from bitfit_fast.kernels import adamw
from bitfit_fast.kernels._launch import INTERPRETED
from bitfit_fast.ops._backend import BACKEND_VARIABLE

DEVICE = "cpu" if INTERPRETED else "cuda"
STEPS = 4


def parameters(size, dtype=torch.float32):
    generator = torch.Generator().manual_seed(size)
    drawn = torch.randn(1 + STEPS, size, generator=generator, dtype=torch.float64)
    drawn[0] *= 0.1
    return drawn.to(DEVICE, dtype)


def by_pytorch(drawn, max_norm, **options):
    """Return the values after each step, and the clipped gradients."""
    parameter = torch.nn.Parameter(drawn[0].clone())
    optimizer = torch.optim.AdamW([parameter], **options)
    ends = []
    for gradient in drawn[1:]:
        parameter.grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_([parameter], max_norm)
        optimizer.step()
        ends += [parameter.detach().clone(), parameter.grad]
    return ends


def by_kernels(
    drawn, max_norm, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, maximize=False
):
    values, (first, second) = drawn[0].clone(), torch.zeros_like(drawn[:2])
    steps, rate = torch.zeros(3, device=DEVICE), torch.tensor(lr, device=DEVICE)
    ends = []
    for number, gradient in enumerate(drawn[1:], 1):
        gradient = gradient.clone()
        partial = adamw.squares(gradient, steps)
        assert steps.tolist() == [number] * 3
        options = (max_norm, *betas, eps, weight_decay, maximize)
        adamw.adamw(values, gradient, first, second, steps[0], rate, partial, *options)
        ends += [values.clone(), gradient]
    return ends


@pytest.mark.parametrize("size", [1, 1000, 1024, 3001])
@pytest.mark.parametrize("max_norm", [0.5, 1000.0])
@pytest.mark.parametrize(
    "options",
    [{"lr": 1e-3}, {"lr": 0.1, "weight_decay": 0.5}, {"lr": 0.01, "maximize": True, "eps": 1e-3}],
    ids=str,
)
def test_steps_are_those_of_pytorch(size, max_norm, options):
    exact = by_pytorch(parameters(size, torch.float64), max_norm, **options)
    theirs = by_pytorch(parameters(size), max_norm, **options)
    ours = by_kernels(parameters(size), max_norm, **options)
    for one, other, true in zip(ours, theirs, exact):
        allowed = 2 * (other.double() - true).abs().max() + 8 * 2.0**-24 * true.abs().max()
        assert (one.double() - true).abs().max() <= allowed


def test_more_numbers_than_programs_have_at_once(monkeypatch):
    monkeypatch.setattr(adamw, "MOST_PARTS", 2)
    gradients, steps = parameters(5000)[0], torch.zeros(2000, device=DEVICE)
    partial = adamw.squares(gradients, steps)
    assert len(partial) == 2 and torch.equal(steps, torch.ones_like(steps))
    torch.testing.assert_close(partial.sum().sqrt(), gradients.norm())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_shows(bad):
    drawn = parameters(10)
    drawn[1, 3] = bad
    values = by_kernels(drawn, 1.0, 0.1)[0]
    assert bool(values.isnan().any())


def test_the_arena_takes_them(monkeypatch):
    """Groups with options of their own, and a learning rate on the device."""
    ends = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv(BACKEND_VARIABLE, backend)
        drawn = parameters(900)
        named = {name: torch.nn.Parameter(part) for name, part in zip("abc", drawn[0].split(300))}
        arena = Arena(named)
        groups = [{"names": ["a", "c"], "weight_decay": 0.1}, {"names": ["b"], "lr": 0.5}]
        optimizer = ArenaAdamW(arena, groups, lr=0.1)
        rate = torch.tensor(0.2, device=DEVICE)
        # one that lies elsewhere is not for them
        assert optimizer._has_kernels([rate, rate]) == (backend == "triton")
        assert not optimizer._has_kernels([rate, rate.to("meta")])
        for gradient in drawn[1:]:
            for parameter, part in zip(named.values(), gradient.split(300)):
                parameter.grad.copy_(part)
            optimizer.step(max_norm=1.0, lr=rate)
        states = [optimizer.state[p] for p in named.values()]
        assert all(state["step"] == STEPS for state in states)
        ends.append((arena.values, arena.gradients, *optimizer._moments.values()))
    for one, other in zip(*ends):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
