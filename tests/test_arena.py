"""The arena against separate parameters, and its AdamW against PyTorch's."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import bitfit_fast
from bitfit_fast.arena import Arena, ArenaAdamW
from bitfit_fast.errors import BitFitError

#: Sizes on both sides of the vector lengths and of the alignment, two scalars and a matrix.
SHAPES = {"a": (7,), "b": (64,), "c": (3, 5), "d": (1,), "empty": (0,), "e": (33, 17), "f": ()}
#: As `transformers.Trainer` makes them: matrices decay, the rest doesn't.
GROUPS = [
    {"names": ["c", "e"], "weight_decay": 0.1},
    {"names": ["a", "b", "d", "empty", "f"], "weight_decay": 0.0},
]


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in SHAPES.items()}


def gradients(seed: int) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in parameters(1000 + seed).items()}


def pytorch_groups(ps) -> list[dict]:
    return [
        {"params": [ps[n] for n in group["names"]], "weight_decay": group["weight_decay"]}
        for group in GROUPS
    ]


def give(ps, seed: int) -> None:
    """Add gradients to those there are, as a backward pass does."""
    for name, gradient in gradients(seed).items():
        loss = (ps[name] * gradient).sum()
        loss.backward()


def assert_ulps(ours, theirs, ulps: int) -> None:
    """Compare by name; the tail of a vector may be rounded otherwise than its body."""
    for name, value in ours.items():
        ulp = torch.finfo(torch.float32).eps * theirs[name].abs().clamp(min=0.1)
        assert bool(((value - theirs[name]).abs() <= ulps * ulp).all()), name


def padding(arena: Arena) -> torch.Tensor:
    outside = torch.ones_like(arena.values, dtype=torch.bool)
    for start, stop in arena.slices.values():
        outside[start:stop] = False
    return outside


def test_parameters_and_gradients_become_views_with_the_same_values():
    ps, before = parameters(), parameters()
    ps["b"].grad = torch.ones(64)
    identity = {name: id(p) for name, p in ps.items()}
    arena = Arena(ps)
    assert arena.parameters.keys() == arena.slices.keys() == ps.keys()
    assert arena.values.dtype == arena.gradients.dtype == torch.float32
    assert arena.values.dim() == 1
    assert arena.values.numel() % 16 == 0
    assert not arena.values.requires_grad
    for name, p in ps.items():
        start, stop = arena.slices[name]
        assert start % 16 == 0
        assert stop - start == p.numel()
        assert id(p) == identity[name]
        assert torch.equal(p, before[name])
        assert p.shape == p.grad.shape == torch.Size(SHAPES[name])
        assert p.requires_grad
        if p.numel():
            assert p.data_ptr() == arena.values[start:].data_ptr()
            assert p.grad.data_ptr() == arena.gradients[start:].data_ptr()
            assert p.data_ptr() % 64 == p.grad.data_ptr() % 64 == 0
        assert torch.equal(arena.view(name), p)
        assert torch.equal(arena.view(name, arena.gradients), p.grad)
    assert torch.equal(ps["b"].grad, torch.ones(64))  # a gradient that was there
    assert arena.gradients.sum() == 64
    assert not arena.values[padding(arena)].any()


def test_a_parameter_that_is_not_contiguous_keeps_its_values():
    p = nn.Parameter(torch.arange(6.0).view(2, 3).t())
    arena = Arena({"p": p})
    assert torch.equal(p, torch.tensor([[0.0, 3], [1, 4], [2, 5]]))
    assert torch.equal(arena.values[:6], torch.tensor([0.0, 3, 1, 4, 2, 5]))


def test_the_default_dtype_does_not_matter():
    ps = parameters()
    torch.set_default_dtype(torch.float64)
    try:
        optimizer = ArenaAdamW(Arena(ps), capturable=True)
        optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert optimizer.arena.values.dtype == optimizer.arena.gradients.dtype == torch.float32
    assert optimizer.state[ps["a"]]["step"].dtype == torch.float32
    assert optimizer.param_groups[0]["lr"].dtype == torch.float32


def test_a_tied_parameter_comes_once():
    p, q = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(5))
    arena = Arena({"first": p, "other": q, "second": p})
    assert list(arena.parameters) == ["first", "other"]
    assert arena.values.numel() == 32


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (nn.Parameter(torch.ones(2), False), "odd does not train"),
        (nn.Parameter(torch.ones(2).half()), "odd is torch.float16; .* torch.float32"),
        (nn.Parameter(torch.ones(2, device="meta")), "odd is on meta and b on cpu"),
    ],
)
def test_what_cannot_lie_in_an_arena_is_named_and_nothing_changes(odd, message):
    ps = parameters()
    addresses = {name: p.data_ptr() for name, p in ps.items()}
    with pytest.raises(BitFitError, match=message):
        Arena({"b": ps["b"], "odd": odd})
    assert addresses == {name: p.data_ptr() for name, p in ps.items()}
    assert ps["b"].grad is None


def test_shared_memory_and_nothing_at_all_are_refused():
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(BitFitError, match="q shares its memory with p"):
        Arena({"p": p, "q": nn.Parameter(p.data)})
    with pytest.raises(BitFitError, match="at least one"):
        Arena({})


def test_backward_adds_into_the_flat_buffer():
    ps = parameters()
    arena = Arena(ps)
    views = {name: p.grad for name, p in ps.items()}
    for _ in range(2):
        give(ps, 0)
    for name, gradient in gradients(0).items():
        assert ps[name].grad is views[name]
        assert torch.equal(arena.view(name, arena.gradients), 2 * gradient)
    arena.zero_gradients()
    assert not arena.gradients.any()
    assert all(ps[name].grad is views[name] for name in ps)


@pytest.mark.parametrize("max_norm", [0.5, 1, 1e6])
def test_clipping_is_that_of_pytorch(max_norm):
    ps, plain = parameters(), parameters()
    arena = Arena(ps)
    give(ps, 0)
    give(plain, 0)
    theirs = nn.utils.clip_grad_norm_(plain.values(), max_norm)
    before = arena.gradient_norm()
    ours = arena.clip_(max_norm)
    assert before.dim() == 0
    assert torch.equal(before, ours)
    torch.testing.assert_close(ours, theirs)
    if max_norm > theirs:
        assert all(torch.equal(ps[name].grad, p.grad) for name, p in plain.items())
    assert_ulps({n: p.grad for n, p in ps.items()}, {n: p.grad for n, p in plain.items()}, 4)


def test_a_step_does_not_clip_what_a_scaler_scaled():
    ps = parameters()
    optimizer = ArenaAdamW(Arena(ps))
    give(ps, 0)
    optimizer.grad_scale = torch.tensor(2.0)
    before = {name: p.detach().clone() for name, p in ps.items()}
    with pytest.raises(BitFitError, match="scaler"):
        optimizer.step(max_norm=1.0)
    assert all(torch.equal(p, before[name]) for name, p in ps.items())


def test_clipping_a_norm_that_is_not_finite_gives_what_pytorch_gives():
    for value in (torch.inf, torch.nan):
        ps, plain = parameters(), parameters()
        arena = Arena(ps)
        for group in (ps, plain):
            give(group, 0)
            group["b"].grad[3] = value
        nn.utils.clip_grad_norm_(plain.values(), 1.0)
        arena.clip_(1.0)
        for name, p in plain.items():
            assert torch.equal(ps[name].grad.isnan(), p.grad.isnan())
        arena.zero_gradients()
        assert arena.gradient_norm() == 0


def test_dropped_and_replaced_gradients_are_put_back():
    ps = parameters()
    arena = Arena(ps)
    give(ps, 0)
    ps["a"].grad = None  # as by Module.zero_grad
    ps["b"].grad = torch.full((64,), 2.0)  # as by a backward pass after it
    arena.check()
    assert not ps["a"].grad.any()
    assert torch.equal(arena.view("b", arena.gradients), torch.full((64,), 2.0))
    assert torch.equal(ps["c"].grad, gradients(0)["c"])
    give(ps, 1)
    assert torch.equal(arena.view("a", arena.gradients), gradients(1)["a"])
    ps["a"].grad, ps["b"].grad = None, torch.ones(64)
    arena.zero_gradients()
    give(ps, 2)
    for name, gradient in gradients(2).items():
        assert torch.equal(arena.view(name, arena.gradients), gradient)


def test_norm_clipping_and_the_step_see_gradients_that_were_made_anew():
    module, plain = nn.Linear(5, 3), nn.Linear(5, 3)
    plain.load_state_dict(module.state_dict())
    arena = Arena(dict(module.named_parameters()))
    optimizers = ArenaAdamW(arena, lr=0.1), torch.optim.AdamW(plain.parameters(), lr=0.1)
    for seed in range(3):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
        for model, optimizer in zip((module, plain), optimizers):
            model.zero_grad()
            model(x).square().sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    for ours, theirs in zip(module.parameters(), plain.parameters()):
        torch.testing.assert_close(ours, theirs)
    module.zero_grad()
    assert arena.gradient_norm() == 0


def test_moved_or_converted_parameters_are_named():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    arena = Arena(dict(model.named_parameters()))
    optimizer = ArenaAdamW(arena)
    model.to("cpu").float()  # changes nothing
    arena.check()
    model[1].bfloat16()
    for method in (arena.check, arena.zero_gradients, arena.gradient_norm, optimizer.step):
        with pytest.raises(BitFitError, match=r"the data of 1\.weight no longer lie"):
            method()
    arena.release()
    assert model[1].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_parameter_frozen_later_stays(decay):
    """As with PyTorch's, to which its gradient is None."""
    ours, theirs = parameters(), parameters()
    optimizers = (
        ArenaAdamW(Arena(ours), lr=0.1, weight_decay=decay),
        torch.optim.AdamW(theirs.values(), lr=0.1, weight_decay=decay, fused=True),
    )
    name = list(ours)[1]
    for number in range(4):
        for ps, optimizer in zip((ours, theirs), optimizers):
            optimizer.zero_grad()
            ps[name].requires_grad_(number < 2)
            loss = sum(
                (ps[other] * gradient).sum()
                for other, gradient in gradients(number).items()
                if ps[other].requires_grad
            )
            loss.backward()
            optimizer.step()
    assert_ulps(ours, theirs, 4)
    state = [optimizer.state[ps[name]] for ps, optimizer in zip((ours, theirs), optimizers)]
    for key in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(state[0][key], state[1][key])


def test_release_gives_each_parameter_its_own_memory():
    ps, before = parameters(), parameters()
    arena = Arena(ps)
    give(ps, 0)
    arena.release()
    arena.values.fill_(7.0)
    for name, p in ps.items():
        assert torch.equal(p, before[name])
        assert p.grad is None
        assert p.untyped_storage().nbytes() == 4 * p.numel()
    with pytest.raises(BitFitError, match="the data of a no longer lie"):
        arena.check()
    Arena(ps).check()


@pytest.mark.parametrize("decay", [None, 0.0, 0.1])
def test_twenty_steps_are_those_of_pytorch(decay):
    ps, fused, foreach = parameters(), parameters(), parameters()
    options = {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-7}
    arena = Arena(ps)
    if decay is None:
        ours = ArenaAdamW(arena, GROUPS, **options)
        theirs = [
            torch.optim.AdamW(pytorch_groups(fused), fused=True, **options),
            torch.optim.AdamW(pytorch_groups(foreach), foreach=True, **options),
        ]
    else:
        options["weight_decay"] = decay
        ours = ArenaAdamW(arena, **options)
        theirs = [
            torch.optim.AdamW(fused.values(), fused=True, **options),
            torch.optim.AdamW(foreach.values(), foreach=True, **options),
        ]
    schedulers = [LambdaLR(o, lambda t: 1 / (1 + t)) for o in (ours, *theirs)]
    for t in range(20):
        for group, optimizer, scheduler in zip((ps, fused, foreach), (ours, *theirs), schedulers):
            optimizer.zero_grad()
            give(group, t)
            optimizer.step()
            scheduler.step()
    assert ours.param_groups[0]["lr"] == theirs[0].param_groups[0]["lr"] == 1e-2 / 21
    assert_ulps(ps, fused, 4)
    assert torch.equal(ps["b"], fused["b"])  # without a tail
    for name, p in ps.items():
        torch.testing.assert_close(p, foreach[name])
    assert not arena.values[padding(arena)].any()
    assert not arena.gradients[padding(arena)].any()


def test_one_update_serves_neighbours_of_one_group(monkeypatch):
    sizes = []
    update = torch._fused_adamw_

    def spy(values, *args, **options):
        sizes.append([v.numel() for v in values])
        return update(values, *args, **options)

    monkeypatch.setattr(torch, "_fused_adamw_", spy)
    arena = Arena(parameters())
    ArenaAdamW(arena).step()
    assert sizes.pop() == [arena.values.numel()]
    ArenaAdamW(arena, GROUPS).step()
    # c and e apart; a and b, d, f
    assert sizes == [[16, 576], [16 + 64, 16, 16]]
    ArenaAdamW(arena, [*GROUPS, {"names": []}]).step()


def test_the_state_of_each_parameter_is_on_view():
    ps = parameters()
    optimizer = ArenaAdamW(Arena(ps), GROUPS)
    give(ps, 0)
    optimizer.step()
    assert len(optimizer.state) == len(ps)
    for name, p in ps.items():
        state = optimizer.state[p]
        assert list(state) == ["step", "exp_avg", "exp_avg_sq"]
        assert state["step"] == 1
        torch.testing.assert_close(state["exp_avg"], 0.1 * gradients(0)[name])
    assert isinstance(optimizer, torch.optim.AdamW)


def test_groups_may_hold_parameters_as_those_of_pytorch_do():
    ps, named = parameters(), parameters()
    optimizers = ArenaAdamW(Arena(ps), pytorch_groups(ps)), ArenaAdamW(Arena(named), GROUPS)
    for group, optimizer in zip((ps, named), optimizers):
        give(group, 0)
        optimizer.step()
    assert all(torch.equal(ps[name], p) for name, p in named.items())


def test_groups_hold_each_parameter_once():
    arena = Arena(parameters())
    names = list(SHAPES)
    with pytest.raises(BitFitError, match="has no g, h; it has a, b, c, d, empty, e, f"):
        ArenaAdamW(arena, [{"names": [*names, "g", "h"]}])
    with pytest.raises(BitFitError, match="f is 0 times in the groups"):
        ArenaAdamW(arena, [{"names": names[:-1]}])
    with pytest.raises(BitFitError, match="b is 2 times in the groups"):
        ArenaAdamW(arena, [{"names": names}, {"names": ["b"]}])
    with pytest.raises(BitFitError, match=r"shape \(2,\) in the groups is not the arena's"):
        ArenaAdamW(arena, [{"names": names}, {"params": [nn.Parameter(torch.ones(2))]}])
    with pytest.raises(BitFitError, match="amsgrad=True"):
        ArenaAdamW(arena, [{"names": names, "amsgrad": True}])
    with pytest.raises(BitFitError, match="fixed; build another"):
        ArenaAdamW(arena).add_param_group({"params": [nn.Parameter(torch.ones(2))]})


def trained(make, ps, start: int, stop: int, state=None):
    optimizer = make(ps)
    if state is not None:
        optimizer.load_state_dict(state)
    for t in range(start, stop):
        optimizer.zero_grad()
        give(ps, t)
        optimizer.step()
    return optimizer


def in_arena(ps):
    return ArenaAdamW(Arena(ps), GROUPS, lr=1e-2)


def plain_fused(ps):
    return torch.optim.AdamW(pytorch_groups(ps), lr=1e-2, fused=True)


def plain(ps):
    return torch.optim.AdamW(pytorch_groups(ps), lr=1e-2)


@pytest.mark.parametrize("first", [in_arena, plain_fused, plain])
@pytest.mark.parametrize("second", [in_arena, plain_fused, plain])
def test_a_state_dict_moves_both_ways(first, second, tmp_path):
    straight, ps = parameters(), parameters()
    trained(plain_fused, straight, 0, 6)
    optimizer = trained(first, ps, 0, 3)
    ps = {name: nn.Parameter(p.detach().clone()) for name, p in ps.items()}
    torch.save(optimizer.state_dict(), tmp_path / "state")
    optimizer = trained(second, ps, 3, 6, torch.load(tmp_path / "state", weights_only=True))
    assert_ulps(ps, straight, 8)
    assert {float(state["step"]) for state in optimizer.state.values()} == {6.0}


def test_the_format_of_the_state_is_that_of_pytorch():
    ours = trained(in_arena, parameters(), 0, 2).state_dict()
    theirs = trained(plain_fused, parameters(), 0, 2).state_dict()
    assert ours.keys() == theirs.keys()
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for index, entry in theirs["state"].items():
        assert list(ours["state"][index]) == list(entry)
        for key, value in entry.items():
            assert ours["state"][index][key].shape == value.shape
            assert ours["state"][index][key].dtype == value.dtype
            torch.testing.assert_close(ours["state"][index][key], value)


def test_loading_changes_no_address_and_its_own_state_changes_nothing():
    ps, same = parameters(), parameters()
    optimizer = trained(in_arena, ps, 0, 3)
    trained(in_arena, same, 0, 5)
    addresses = [t.data_ptr() for run in optimizer._runs for tensors in run for t in tensors]
    optimizer.load_state_dict(optimizer.state_dict())
    assert addresses == [
        t.data_ptr() for run in optimizer._runs for tensors in run for t in tensors
    ]
    for t in (3, 4):
        optimizer.zero_grad()
        give(ps, t)
        optimizer.step()
    assert all(torch.equal(ps[name], p) for name, p in same.items())


def test_unequal_step_counts_are_kept():
    ps = parameters()
    optimizer = plain_fused(ps)
    for t in range(3):
        optimizer.zero_grad()
        give(ps, t)
        if t < 2:
            ps["b"].grad = None  # which PyTorch's AdamW leaves out
        ps["e"].grad = None
        optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    moved = {name: nn.Parameter(p.detach().clone()) for name, p in ps.items()}
    ours = trained(in_arena, moved, 3, 6, state)
    for t in range(3, 6):
        optimizer.zero_grad()
        give(ps, t)
        optimizer.step()
    assert_ulps(moved, ps, 4)
    steps = {name: float(ours.state[p]["step"]) for name, p in moved.items()}
    assert steps == dict.fromkeys(SHAPES, 6.0) | {"b": 4.0, "e": 3.0}


def test_a_state_that_does_not_fit_is_refused_before_anything_changes():
    ps = parameters()
    optimizer = trained(in_arena, ps, 0, 2)
    before = copy.deepcopy(optimizer.state_dict())
    odd = copy.deepcopy(before)
    odd["state"][0]["exp_avg"] = torch.ones(1)
    with pytest.raises(BitFitError, match=r"that of c has shape \(1,\), and it \(3, 5"):
        optimizer.load_state_dict(odd)
    amsgrad = torch.optim.AdamW(pytorch_groups(parameters()), amsgrad=True)
    with pytest.raises(BitFitError, match="amsgrad"):
        optimizer.load_state_dict(amsgrad.state_dict())
    fewer = len(before["param_groups"][0]["params"])
    with pytest.raises(BitFitError, match=rf"other .* train: {fewer}, and {len(SHAPES)} train$"):
        optimizer.load_state_dict({**before, "param_groups": before["param_groups"][:1]})
    empty = {**before["param_groups"][0], "params": []}
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({**before, "param_groups": [*before["param_groups"], empty]})
    for index, entry in optimizer.state_dict()["state"].items():
        assert all(torch.equal(entry[key], before["state"][index][key]) for key in entry)


def test_capturable_keeps_learning_rates_where_they_are():
    ps, other = parameters(), parameters()
    ours = ArenaAdamW(Arena(ps), GROUPS, lr=1e-2, capturable=True)
    rates = [group["lr"] for group in ours.param_groups]
    assert rates[0].data_ptr() != rates[1].data_ptr()
    theirs = torch.optim.AdamW(pytorch_groups(other), lr=1e-2, fused=True)
    schedulers = [LambdaLR(o, lambda t: 1 / (1 + t)) for o in (ours, theirs)]
    for t in range(4):
        for group, optimizer, scheduler in zip((ps, other), (ours, theirs), schedulers):
            optimizer.zero_grad()
            give(group, t)
            optimizer.step()
            scheduler.step()
    ours.load_state_dict(theirs.state_dict())  # with learning rates that are numbers
    for group, rate in zip(ours.param_groups, rates):
        assert group["lr"] is rate
        assert group["capturable"] and group["fused"]
        assert rate == pytest.approx(2e-3)
    for name, p in ps.items():
        torch.testing.assert_close(p, other[name])


def test_a_gradient_scaler_unscales_and_skips():
    ps, other = parameters(), parameters()
    optimizers = in_arena(ps), plain_fused(other)
    for group, optimizer in zip((ps, other), optimizers):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for t in range(4):
            optimizer.zero_grad()
            scaler.scale(sum((group[n] * g).sum() for n, g in gradients(t).items())).backward()
            if t == 2:
                group["b"].grad[0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
    assert_ulps(ps, other, 4)
    assert optimizers[0].state[ps["b"]]["step"] == optimizers[1].state[other["b"]]["step"] == 3


def test_step_takes_a_closure_and_tells_autograd_of_its_changes():
    p = nn.Parameter(torch.ones(4))
    optimizer = ArenaAdamW(Arena({"p": p}), lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4
    assert p[0] < 1
    loss = p.square().sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.fixture
def model(bert_folder):
    model = bitfit_fast.load_model(str(bert_folder), ["no", "yes"])
    bitfit_fast.select(model)
    return model.eval()  # no dropout, so that two models can be compared


def train(model, optimizer) -> None:
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(4, 20, (4, 9), generator=generator)
        labels = torch.randint(0, 2, (4,), generator=generator)
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("head", [False, True])
def test_bert_trains_to_the_same_parameters_and_is_saved_the_same(model, head, tmp_path):
    bitfit_fast.select(model, head=head)
    other = copy.deepcopy(model)
    arena = Arena({n: p for n, p in model.named_parameters() if p.requires_grad})
    train(model, ArenaAdamW(arena, lr=1e-2))
    trains = [p for p in other.parameters() if p.requires_grad]
    train(other, torch.optim.AdamW(trains, lr=1e-2, fused=True))
    moved = dict(model.named_parameters())
    for name, p in other.named_parameters():
        if not head:
            assert torch.equal(moved[name], p), name
        elif not name.endswith("key.bias"):
            # the bias of two scores is shorter than a vector and may be rounded otherwise, and
            # of the noise that is a key bias's gradient Adam makes steps
            torch.testing.assert_close(moved[name], p, rtol=1e-5, atol=1e-6, msg=name)
    bitfit_fast.save(model, tmp_path / "arena.safetensors")
    model.save_pretrained(tmp_path / "arena")
    arena.release()
    bitfit_fast.save(model, tmp_path / "own.safetensors")
    model.save_pretrained(tmp_path / "own")
    for ours, theirs in [
        ("arena.safetensors", "own.safetensors"),
        ("arena/model.safetensors", "own/model.safetensors"),
    ]:
        assert (tmp_path / ours).read_bytes() == (tmp_path / theirs).read_bytes()


def test_a_checkpoint_is_loaded_into_the_arena(model, tmp_path):
    bitfit_fast.save(model, tmp_path / "before")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    arena = Arena({n: p for n, p in model.named_parameters() if p.requires_grad})
    train(model, ArenaAdamW(arena, lr=1e-2))
    bitfit_fast.load(model, tmp_path / "before")
    arena.check()
    assert all(torch.equal(arena.view(n), before[n]) for n in arena.parameters)


def test_all_reduce_of_one_process_changes_nothing():
    ps = parameters()
    arena = Arena(ps)
    give(ps, 0)
    before = arena.gradients.clone()
    arena.all_reduce()
    assert torch.equal(arena.gradients, before)


#: One of two processes: each gives the arena gradients of its own and averages them.
WORKER = """
import sys, torch, torch.distributed as dist
from torch import nn
from bitfit_fast.arena import Arena
rank, meeting = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
arena = Arena({"a": nn.Parameter(torch.zeros(5)), "b": nn.Parameter(torch.zeros(2, 3))})
arena.parameters["a"].grad.fill_(rank + 1.0)
arena.parameters["b"].grad = None if rank else torch.full((2, 3), 4.0)
sent, send = [], dist.all_reduce
dist.all_reduce = lambda t, **options: (sent.append(t.numel()), send(t, **options))
arena.all_reduce()
assert sent == [32], sent
assert torch.equal(arena.parameters["a"].grad, torch.full((5,), 1.5))
assert torch.equal(arena.parameters["b"].grad, torch.full((2, 3), 2.0))
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch lacks its distributed part")
def test_all_reduce_averages_over_two_processes(tmp_path, two_ranks):
    two_ranks("-c", WORKER, meeting=(tmp_path / "meeting").as_uri())


def test_the_trainer_of_transformers_takes_it_and_resumes(model, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # the Trainer puts the model into training mode
    other = copy.deepcopy(model)
    arena = Arena({n: p for n, p in model.named_parameters() if p.requires_grad})

    class OverArena(ArenaAdamW):
        def __init__(self, groups, **options):
            super().__init__(arena, groups, **options)

    data = [{"input_ids": torch.arange(4, 12) + i, "labels": i % 2} for i in range(8)]
    for each, optimizer in [(model, OverArena), (other, torch.optim.AdamW)]:
        folder = str(tmp_path / optimizer.__name__)
        arguments = TrainingArguments(
            folder, max_steps=4, per_device_train_batch_size=4, save_steps=2, weight_decay=0.1,
            use_cpu=True, report_to=[], disable_tqdm=True,
        )  # fmt: skip
        chosen = {"optimizer_cls_and_kwargs": (optimizer, {"lr": 1e-2})}
        Trainer(each, arguments, train_dataset=data, **chosen).train()
        resumed = Trainer(each, arguments, train_dataset=data, **chosen)
        resumed.train(f"{folder}/checkpoint-2")
        assert len(resumed.optimizer.param_groups) == 2
    arena.check()
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters()):
        if not name.endswith("key.bias"):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)
