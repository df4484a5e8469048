"""Defaults, limits and schedules."""

import warnings

import pytest

from bitfit_fast.errors import BitFitError, BitFitWarning
from bitfit_fast.training.settings import Plan, Settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 0.0), ("lr", float("nan")), ("epochs", -1.0), ("max_steps", 0), ("batch_size", 0),
        ("max_length", 2), ("warmup", 1.0), ("schedule", "cosine"), ("seed", -1),
        ("precision", "fp16"), ("train_fraction", 0.0), ("train_fraction", 1.5),
        ("grad_clip", -1.0), ("eval_every", 0), ("patience", 0),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_named(name, value):
    with pytest.raises(BitFitError, match=f"{name.replace('_', '-')} must be .* not {value}"):
        Settings(**{name: value})


@pytest.mark.parametrize("budget", [(), (0,), (64, -1)])
def test_a_token_budget_is_at_least_one_token(budget):
    with pytest.raises(BitFitError, match="token-budget must be numbers of at least 1, not"):
        Settings(token_budget=budget)


def test_bitfit_trains_for_three_epochs_and_no_fewer_than_500_steps():
    assert Plan.of(Settings(), "bitfit", 2490).steps == 500
    assert Plan.of(Settings(), "bitfit", 8551).steps == 3 * 535
    few = Plan.of(Settings(epochs=2, max_steps=900), "full", 1600)
    assert (few.steps, few.steps_per_epoch, few.eval_every) == (200, 100, 20)
    # a share that stands for whole steps
    assert Plan.of(Settings(epochs=800 / 156), "full", 2490).steps == 800
    assert Plan.of(Settings(epochs=1.1), "full", 1600).steps == 110
    assert Plan.of(Settings(epochs=1.101), "full", 1600).steps == 111


def test_each_method_has_its_learning_rate():
    assert Plan.of(Settings(), "bitfit", 9999).lr == 1e-3
    assert Plan.of(Settings(), "full", 9999).lr == 5e-5
    assert Plan.of(Settings(lr=2e-4), "full", 9999).lr == 2e-4


def test_linear_schedule_warms_up_over_6_percent_and_falls_to_zero():
    plan = Plan.of(Settings(max_steps=1000), "bitfit", 1600)
    assert plan.warmup_steps == 60
    rates = [plan.lr_at(t) for t in range(1000)]
    assert plan.lr_at(1500) == 0.0
    assert rates[0] == pytest.approx(1e-3 / 60)
    assert max(rates) == rates[59] == 1e-3
    assert rates[60:] == sorted(rates[60:], reverse=True)
    assert 0 < rates[-1] < 2e-6


def test_choices_that_exclude_each_other_are_refused():
    with pytest.raises(BitFitError, match=r"train-fraction \(0\.5\) or train-examples \(9\)"):
        Settings(train_fraction=0.5, train_examples=9)
    with pytest.raises(BitFitError, match="patience 3 looks at the validation set on the way"):
        Settings(patience=3, validate_once=True)


def test_constant_schedule_stays_after_warm_up():
    plan = Plan.of(Settings(max_steps=1000, schedule="constant", warmup=0.0), "bitfit", 1600)
    assert {plan.lr_at(t) for t in range(1000)} == {1e-3}


def test_a_low_rate_or_few_steps_warn_with_what_the_paper_used():
    with pytest.warns(BitFitWarning, match=r"5e-05 is low .* paper used 0\.0001 to 0\.001"):
        Plan.of(Settings(lr=5e-5), "bitfit", 9999)
    with pytest.warns(BitFitWarning, match=r"100 steps are few .* 0\.0001 to 0\.001"):
        Plan.of(Settings(max_steps=100), "bitfit", 9999)


def test_other_methods_and_good_settings_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Plan.of(Settings(), "bitfit", 10)
        Plan.of(Settings(lr=1e-5, max_steps=10), "full", 9999)
