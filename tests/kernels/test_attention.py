"""Attention over packed sequences under Triton's interpreter, or on a GPU, against PyTorch."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="triton is installed on Linux only")

from bitfit_fast.kernels import _attention, attention, attention_bwd
from bitfit_fast.kernels._launch import INTERPRETED
from bitfit_fast.ops.attention import backward_definition, forward_definition
from bitfit_fast.ops.dropout import kept

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Of a sequence in queries and in keys: none, one, a block's edge, and more than a block.
SAME = ((5, 5), (0, 0), (1, 1), (37, 37), (16, 16))
ONE_QUERY = ((1, 5), (1, 1), (1, 70))
CROSSED = ((20, 3), (0, 4), (3, 0), (1, 40), (17, 33))
#: Where one block has all keys, but not all queries; and where none has either.
LONG = ((70, 70), (2, 2), (0, 0))
LONGER = ((130, 130), (2, 2))
LONG_CROSSED = ((70, 100), (66, 0), (0, 4), (3, 128))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Let every new tensor begin as NaN, so that an element that is not written shows."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *s, **o: empty(*s, **o).fill_(float("nan")))


def seed_of(number):
    return torch.tensor([number], device=DEVICE)


def starts_of(lengths):
    cuts = [0, *itertools.accumulate(lengths)]
    return torch.tensor(cuts, dtype=torch.int32, device=DEVICE)


class Case:
    """Packed inputs, which the kernels take as views of wider buffers."""

    def __init__(self, lengths, dtype=torch.float32, heads=2, d=24, p=0.0, bias=False):
        generator = torch.Generator().manual_seed(heads * 1000 + d)
        of_q, of_k = zip(*lengths) if lengths else ((), ())

        def randn(*shape):
            return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

        self.q = randn(sum(of_q), 3, heads, d)[:, 0]
        self.k, self.v = randn(sum(of_k), 3, heads, d)[:, 1:].unbind(1)
        self.do = randn(sum(of_q), heads, d)
        self.starts = starts_of(of_q), starts_of(of_k)
        self.most = max(of_q, default=0), max(of_k, default=0)
        self.p, self.seed = p, seed_of(2**62 - 1) if p else None
        # as of an embedding of relative positions, which has the heads last
        self.bias = randn(self.most[0] + 2, self.most[1] + 1, heads).permute(2, 0, 1)
        self.bias = self.bias if bias else None
        rows = sum(of_q) * heads
        self.keep = kept(rows, self.most[1], p, self.seed) if p else None

    def forward(self):
        options = (*self.starts, *self.most, self.p, self.seed, self.bias)
        return attention.attention_fwd(self.q, self.k, self.v, *options)

    def backward(self, **options):
        parts = (self.q, self.k, self.v, *self.starts, *self.most, self.p, self.seed, self.bias)
        return attention_bwd.attention_bwd(self.do, *parts, **options)

    def defined(self, dtype):
        """Return o, dq, dk and dv as the definition computes them in `dtype`."""
        q, k, v, do = (t.to(dtype) for t in (self.q, self.k, self.v, self.do))
        options = (*self.starts, self.p, self.keep, self.bias)
        dq, dkv = backward_definition(do, q, k, v, *options)
        return forward_definition(q, k, v, *options), dq, *dkv.unbind(1)

    def by_autograd(self, dtype):
        """Return o, dq, dk and dv by PyTorch's own operations and gradients, all in `dtype`."""
        q, k, v = (t.detach().to(dtype).requires_grad_() for t in (self.q, self.k, self.v))
        cuts_q, cuts_k = (starts.tolist() for starts in self.starts)
        out = []
        for a, b, c, d in zip(cuts_q, cuts_q[1:], cuts_k, cuts_k[1:]):
            scores = torch.einsum("ihd,jhd->hij", q[a:b], k[c:d]) * q.shape[-1] ** -0.5
            if self.bias is not None:
                scores = scores + self.bias[:, : b - a, : d - c].to(dtype)
            weights = scores.softmax(-1)
            if self.keep is not None:
                keep = self.keep.view(len(q), -1, self.most[1])[a:b, :, : d - c]
                weights = torch.where(keep.transpose(0, 1), weights, 0) / (1 - self.p)
            out.append(torch.einsum("hij,jhd->ihd", weights, v[c:d]))
        o = torch.cat(out)
        return o.detach(), *torch.autograd.grad(o, (q, k, v), self.do.to(dtype))


def check(case):
    """Assert the tolerance rule on every output: twice PyTorch's error, above a floor."""
    inputs = (case.q, case.k, case.v, case.do)
    before = [t.clone() for t in inputs]
    o, (dq, dkv) = case.forward(), case.backward()
    assert all(torch.equal(*pair) for pair in zip(inputs, before))
    assert o.shape == case.q.shape and o.is_contiguous()
    exact, same = case.by_autograd(torch.float64), case.by_autograd(case.q.dtype)
    found = {"o": o, "dq": dq, "dk": dkv[:, 0], "dv": dkv[:, 1]}
    for (name, ours), true, theirs in zip(found.items(), exact, same):
        assert ours.dtype == case.q.dtype and ours.shape == true.shape, name
        check_one(name, ours, true, theirs)


def check_one(name, ours, true, theirs):
    floor = 2 * torch.finfo(ours.dtype).eps * true.abs().max().item()
    error = (ours.double() - true).abs().max().item()
    assert error <= 2 * (theirs.double() - true).abs().max().item() + floor, name


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    "lengths", [SAME, ONE_QUERY, CROSSED], ids=["same", "one query", "crossed"]
)
def test_the_definition_is_attention_and_its_gradient(lengths, p):
    case = Case(lengths, torch.float64, d=5, p=p, bias=True)
    for ours, true in zip(case.defined(torch.float64), case.by_autograd(torch.float64)):
        torch.testing.assert_close(ours, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_definitions_gradient_passes_gradcheck(p):
    case = Case(((3, 3), (0, 0), (2, 4)), torch.float64, d=3, p=p, bias=True)
    options = (*case.starts, p, case.keep, case.bias)

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *parts):
            ctx.save_for_backward(*parts)
            return forward_definition(*parts, *options)

        @staticmethod
        def backward(ctx, do):
            dq, dkv = backward_definition(do, *ctx.saved_tensors, *options)
            return dq, *dkv.unbind(1)

    parts = [t.detach().clone().requires_grad_() for t in (case.q, case.k, case.v)]
    assert torch.autograd.gradcheck(Attention.apply, parts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    "lengths",
    [SAME, ONE_QUERY, CROSSED, LONG, LONGER, LONG_CROSSED],
    ids=["same", "one query", "crossed", "long", "longer", "long crossed"],
)
def test_every_pass_is_as_exact_as_pytorch(lengths, p, dtype):
    if lengths[0][0] > 40 and dtype == torch.float32:
        lengths = ((50, 50),)  # its blocks are smaller
    case = Case(lengths, dtype, p=p)
    if (3, 0) in lengths:  # of which PyTorch makes zeros too
        assert not case.forward()[20:23].any()
    check(case)


@pytest.mark.parametrize(
    ("dtype", "lengths"),
    [
        *((torch.float32, lengths) for lengths in (ONE_QUERY, CROSSED)),
        *((torch.bfloat16, lengths) for lengths in (SAME, CROSSED, LONG, LONGER)),
    ],
)
def test_a_bias_of_any_strides(lengths, dtype):
    check(Case(lengths, dtype, p=0.2, bias=True))
    case = Case(lengths, dtype, bias=True)
    case.bias = case.bias.float().contiguous()
    check(case)


@pytest.mark.parametrize("width", [24, 96])
def test_a_bias_of_minus_infinity_masks_keys(width):
    case = Case(((40, 40),), d=width, bias=True)
    # a whole block of keys, which no query before them sees
    case.bias = case.bias.clone()
    case.bias[:, 1:, :20] = float("-inf")
    check(case)


@pytest.mark.parametrize("d", [1, 16, 33, 96, 128])
@pytest.mark.parametrize("heads", [1, 3])
def test_sizes_and_numbers_of_heads(d, heads):
    check(Case(((18, 18), (3, 3)), torch.bfloat16, heads, d, p=0.1))


def test_a_head_that_is_too_wide_is_refused():
    with pytest.raises(ValueError, match="a head of 129 is wider than the 128"):
        Case(((2, 2),), d=129).forward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [((9, 9),), ((70, 70),), ((1, 70),)], ids=str)
def test_the_forward_pass_drops_what_the_definition_drops(lengths, dtype):
    case = Case(lengths, dtype, heads=3, d=80, p=0.4)
    # with equal scores and values of one element each, o holds the probabilities
    case.q = torch.zeros_like(case.q)
    case.v = torch.eye(lengths[0][1], 80, device=DEVICE, dtype=dtype)[:, None].expand(-1, 3, 80)
    (queries, keys), heads = lengths[0], 3
    seen = case.forward()[:, :, :keys].reshape(queries * heads, keys) != 0
    assert torch.equal(seen, case.keep)


def test_the_mask_does_not_depend_on_blocks(monkeypatch):
    case = Case(((37, 37), (3, 3)), heads=1, p=0.5)
    found = case.forward(), *case.backward()
    config = _attention.attention_config

    def other(*arguments):
        return {**config(*arguments), "BLOCK_M": 32, "BLOCK_N": 128}

    for module in (attention, attention_bwd):
        monkeypatch.setattr(module, "attention_config", other)
    for ours, theirs in zip((case.forward(), *case.backward()), found):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", [SAME, ONE_QUERY, LONG], ids=["same", "one query", "long"])
def test_gradients_lie_in_one_buffer_where_there_are_as_many_queries_as_keys(lengths):
    case = Case(lengths, torch.bfloat16)
    dq, dkv = case.backward()
    if lengths is ONE_QUERY:
        assert dq.is_contiguous() and dkv.is_contiguous()
        assert dq.data_ptr() != dkv.data_ptr()
    else:
        dqkv = dq._base
        assert dqkv is dkv._base and dqkv.is_contiguous()
        assert dqkv.shape == (len(case.q), 3, *case.q.shape[1:])
        assert torch.equal(dqkv, torch.cat((dq[:, None], dkv), 1))


@pytest.mark.parametrize("lengths", [SAME, CROSSED, LONGER], ids=["same", "crossed", "longer"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_gradient_of_the_queries_alone(lengths, p):
    case = Case(lengths, torch.bfloat16, p=p)
    dq, nothing = case.backward(needs_kv=False)
    assert nothing is None and dq.is_contiguous()
    assert torch.equal(dq, case.backward()[0])


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_gradient_of_the_queries_alone_where_one_block_has_all_keys(p):
    # all gradients come from a kernel of their own there, which adds up in another order
    case = Case(LONG, torch.bfloat16, p=p)
    dq, nothing = case.backward(needs_kv=False)
    assert nothing is None and dq.is_contiguous()
    check_one("dq", dq, case.by_autograd(torch.float64)[1], case.by_autograd(dq.dtype)[1])


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_same_inputs_give_the_same_bits(p):
    case = Case(CROSSED, torch.bfloat16, p=p, bias=True)
    once, again = ((case.forward(), *case.backward()) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(once, again))


@pytest.mark.parametrize("kind", ["expanded", "transposed", "strided"])
def test_gradients_of_any_strides(kind):
    case = Case(SAME)
    case.do = {
        "expanded": case.do[:1, :1, :1].expand(case.do.shape),
        "transposed": case.do.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        "strided": torch.cat((case.do, case.do), 1)[:, ::2],
    }[kind]
    check(case)


def test_longer_sequences_may_be_announced_than_there_are():
    case = Case(SAME, torch.bfloat16)
    found = case.forward(), *case.backward()
    case.most = 512, 512
    for ours, theirs in zip((case.forward(), *case.backward()), found):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("lengths", [(), ((0, 0),), ((0, 0), (0, 0))], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_no_rows_give_nothing(lengths, p):
    case = Case(lengths, p=p)
    dq, dkv = case.backward()
    assert case.forward().shape == dq.shape == (0, 2, 24)
    assert dkv.shape == (0, 2, 2, 24)


@pytest.mark.parametrize(
    ("sizes", "passes"),
    [
        ((64, 64, 64, 2), ("bwd",)),
        ((1, 512, 64, 2), ("bwd",)),
        ((65, 128, 64, 2), ("bwd_all",)),
        ((128, 128, 24, 2), ("bwd_all",)),
        ((128, 129, 64, 2), ("bwd", "bwd_kv")),
        ((128, 128, 65, 2), ("bwd", "bwd_kv")),
        ((128, 128, 64, 4), ("bwd", "bwd_kv")),
    ],
)
def test_one_launch_where_a_block_has_all_queries_or_all_keys(sizes, passes):
    assert attention_bwd.attention_bwd_passes(*sizes) == passes
    assert attention_bwd.attention_bwd_passes(*sizes, needs_kv=False) == ("bwd",)
    if len(passes) == 1:
        assert attention_bwd.attention_sums(7, *sizes, True) == (7, 7)


def test_keys_without_queries_have_gradients_of_zero():
    dq, dkv = Case(((0, 40), (0, 3))).backward()
    assert dq.shape[0] == 0 and torch.equal(dkv, torch.zeros(43, 2, 2, 24, device=DEVICE))


@pytest.mark.parametrize("pass_", ["fwd", "bwd", "bwd_all", "bwd_kv"])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("d", [1, 24, 64, 128])
def test_blocks_are_powers_of_two_and_few(pass_, itemsize, d):
    lengths = [1, 16, 17, 64, 65, 128, 512, 8192]
    configs = [
        _attention.attention_config(max_q, max_k, d, itemsize, pass_)
        for max_q, max_k in itertools.product(lengths, lengths)
    ]
    assert len({tuple(config.values()) for config in configs}) <= 4
    for config in configs:
        assert config["BLOCK_D"] >= max(16, d)
        assert all(size >= 16 for name, size in config.items() if name.startswith("BLOCK"))
        assert config.get("maxnreg", 255) == 255  # as many as a thread may have
        assert all(size & (size - 1) == 0 for name, size in config.items() if name != "maxnreg")


@pytest.mark.parametrize(
    ("lengths", "needs_kv", "p"),
    [(SAME, True, 0.2), (SAME, False, 0.0), (ONE_QUERY, True, 0.0), (CROSSED, True, 0.0)],
)
def test_sums_of_the_gradients_come_along(lengths, needs_kv, p):
    case = Case(lengths, torch.float32, p=p)
    heads, d = case.q.shape[1:]
    given = (len(lengths), *case.most, d, case.q.element_size(), needs_kv)
    # every partial row is written, or this would be NaN
    q_sums, v_sums = (
        torch.empty(n, heads * d, device=DEVICE) for n in attention_bwd.attention_sums(*given)
    )
    dq, dkv = case.backward(needs_kv=needs_kv, q_sums=q_sums, v_sums=v_sums)
    _, true_dq, _, true_dv = case.defined(torch.float64)
    alone = case.backward(needs_kv=needs_kv)[0]
    assert torch.equal(dq, alone)
    pairs = [(q_sums, true_dq)] + ([(v_sums, true_dv)] if needs_kv else [])
    assert dkv is not None or not needs_kv
    for sums, gradient in pairs:
        exact = gradient.double().sum(0).flatten()
        torch.testing.assert_close(sums.double().sum(0), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", [((40, 40),) * 2, LONG, LONGER], ids=str)
def test_the_sums_are_of_what_is_not_rounded(lengths, dtype):
    case = Case(lengths, dtype)
    given = (len(lengths), *case.most, case.q.shape[2], 2, True)
    q_sums, v_sums = (
        torch.empty(n, 48, device=DEVICE) for n in attention_bwd.attention_sums(*given)
    )
    case.backward(q_sums=q_sums, v_sums=v_sums)
    _, dq, _, dv = case.defined(torch.float64)
    _, rounded_dq, _, rounded_dv = case.defined(dtype)
    for sums, true, pytorchs in ((q_sums, dq, rounded_dq), (v_sums, dv, rounded_dv)):
        exact = true.double().sum(0).flatten()
        theirs = (pytorchs.double().sum(0).flatten() - exact).norm()
        assert (sums.double().sum(0) - exact).norm() <= 2 * theirs + 1e-3 * exact.norm()
