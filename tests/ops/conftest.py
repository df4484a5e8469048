"""What the tests of the operations share: backends, random tensors, the tolerance rule."""

import pytest
import torch

from bitfit_fast.kernels._launch import INTERPRETED


@pytest.fixture(params=["torch", "triton", "native"])
def backend(request, choose_backend):
    """Which implementation runs; float64 tests ask for `torch` alone."""
    return choose_backend(request.param)


@pytest.fixture
def randn(device):
    """Draw the same numbers in every run."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, dtype=torch.float32):
        wide = torch.promote_types(dtype, torch.float32)
        return torch.randn(*shape, generator=generator, dtype=wide).to(device, dtype)

    return draw


@pytest.fixture
def seed(device):
    return torch.tensor([1234567], device=device)


@pytest.fixture
def differentiate():
    """Run a function of named tensors, forward and backward.

    Returns its outputs as `y0`, `y1`, ..., and the gradient of each input by the input's name.
    """

    def run(function, inputs, dys, frozen=()):
        leaves = {
            name: None if t is None else t.detach().requires_grad_(name not in frozen)
            for name, t in inputs.items()
        }
        out = function(**leaves)
        outs = [out] if isinstance(out, torch.Tensor) else [t for t in out if t is not None]
        wanted = [name for name, t in leaves.items() if t is not None and t.requires_grad]
        grads = torch.autograd.grad(
            outs,
            [leaves[name] for name in wanted],
            [dy if dy.dtype == y.dtype else dy.to(y.dtype) for dy, y in zip(dys, outs)],
        )
        return {f"y{i}": y.detach() for i, y in enumerate(outs)} | dict(zip(wanted, grads))

    return run


@pytest.fixture
def unit(backend):
    """Return the relative error of a number that is stored in a dtype."""

    def rounding(dtype):
        cut_off = backend == "triton" and INTERPRETED and dtype == torch.bfloat16
        # Triton's interpreter cuts fp32 off to bf16, where a GPU rounds
        return torch.finfo(dtype).eps * (1 if cut_off else 0.5)

    return rounding


@pytest.fixture
def as_exact():
    """Assert the tolerance rule: at most twice PyTorch's error in the same dtype, above a floor.

    The floor is `roundings` of the largest element in the dtype of what is judged, and for a sum
    over tokens, what the roundings of `terms` to fp32 add up to if they are at random.
    """

    def judge(ours, pytorch, exact, roundings=1, sums=(), terms=()):
        assert ours.keys() == exact.keys()
        largest = max((t.abs().max().item() for t in terms if t.numel()), default=0.0)
        rows = max((t.shape[:-1].numel() for t in terms), default=0)
        for name, out in ours.items():
            true = exact[name].double()
            assert out.shape == true.shape, name
            if out.numel():
                error = (out.double() - true).abs().max()
                floor = roundings * torch.finfo(out.dtype).eps * true.abs().max()
                if name in sums:
                    floor += 2.0**-23 * rows**0.5 * largest
                allowed = 2 * (pytorch[name].double() - true).abs().max() + floor
                assert bool(error <= allowed), (name, error, allowed)

    return judge


@pytest.fixture
def compare(differentiate, as_exact):
    """Judge an operation's outputs and gradients by PyTorch's, and see that inputs stay as is.

    `roundings` is the number of roundings that the operation has and PyTorch lacks.
    """

    def run(ours, theirs, inputs, *dys, roundings=1, frozen=()):
        given = [t for t in (*inputs.values(), *dys) if t is not None]
        before = [(t.clone(), t._version) for t in given]
        found = differentiate(ours, inputs, dys, frozen)
        for t, (values, version) in zip(given, before):
            assert torch.equal(t, values) and t._version == version

        def by_pytorch(dtype):
            cast = {name: None if t is None else t.to(dtype) for name, t in inputs.items()}
            return differentiate(theirs, cast, [dy.to(dtype) for dy in dys], frozen)

        dtype, exact = inputs["x"].dtype, by_pytorch(torch.float64)
        sums = inputs.keys() - {"x", "w", "w1", "w2", "residual"}
        terms = [*dys, *(exact[name] for name in ("x",) if name in exact)]
        as_exact(found, by_pytorch(dtype), exact, roundings, sums, terms)
        for name, out in found.items():
            assert out.dtype == (inputs[name].dtype if name in inputs else dtype), name
        return found

    return run
