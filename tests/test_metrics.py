"""Metrics against scikit-learn and scipy, which GLUE's own scores come from."""

from __future__ import annotations

import string
import warnings

import pytest
import scipy.stats
import sklearn.metrics
import torch
from torch.nn.functional import one_hot

from bitfit_fast.data.glue import GLUE
from bitfit_fast.metrics import METRICS, answer_scores, compute, tag_scores

#: torchmetrics divides in fp32.
FP32 = {"rel": 2e-6, "abs": 2e-6}


@pytest.fixture(autouse=True)
def strict():
    """Warn the user of nothing, whatever the numbers are."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def classes(examples, count, skill, seed=0):
    """Return logits that are right more often than not, and the labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(count, (examples,), generator=generator)
    logits = torch.randn(examples, count, generator=generator) + skill * one_hot(labels, count)
    return logits, labels.tolist()


def scores(examples, seed=0, step=0.2):
    """Return logits and scores in steps, so that there are ties."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.rand(examples, dtype=torch.float64, generator=generator) * 5
    labels = (labels / step).round() * step
    return torch.randn(examples, 1, generator=generator) + labels[:, None].float(), labels.tolist()


def predicted(*values, count=2):
    return one_hot(torch.tensor(values), count).float()


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("examples", [5, 277, 1043, 40_000])
@pytest.mark.parametrize("skill", [0.01, 1.0, 20.0, -2.0])
def test_accuracy_and_mcc_are_those_of_scikit_learn(count, examples, skill):
    logits, labels = classes(examples, count, skill)
    choice = logits.argmax(-1).tolist()
    found = compute(["accuracy", "mcc"], logits, labels)
    assert found == {
        "accuracy": pytest.approx(sklearn.metrics.accuracy_score(labels, choice), **FP32),
        "mcc": pytest.approx(sklearn.metrics.matthews_corrcoef(labels, choice), **FP32),
    }


@pytest.mark.parametrize("examples", [5, 408, 40_000])
@pytest.mark.parametrize("skill", [0.01, 1.0, 20.0, -2.0])
def test_f1_is_that_of_scikit_learn(examples, skill):
    logits, labels = classes(examples, 2, skill)
    expected = sklearn.metrics.f1_score(labels, logits.argmax(-1).tolist())
    assert compute(["f1"], logits, labels) == {"f1": pytest.approx(expected, **FP32)}


@pytest.mark.parametrize("examples", [3, 50, 1500, 70_000])
@pytest.mark.parametrize("step", [0.2, 1.0, 1e-9])
def test_correlations_are_those_of_scipy_ties_included(examples, step):
    logits, labels = scores(examples, step=step)
    for values in (logits, logits.round(), logits * 1e-4 + 3):
        flat = values.double().squeeze(-1).numpy()
        assert compute(["pearson", "spearman"], values, labels) == {
            "pearson": pytest.approx(scipy.stats.pearsonr(flat, labels).statistic, **FP32),
            "spearman": pytest.approx(scipy.stats.spearmanr(flat, labels).statistic, **FP32),
        }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_logits_of_any_precision_are_judged_as_they_are(dtype):
    logits, labels = classes(500, 3, 1.0)
    logits = logits.to(dtype)
    assert compute(["accuracy", "mcc"], logits, labels) == compute(
        ["accuracy", "mcc"], logits.float(), labels
    )
    logits, labels = scores(500)
    logits = logits.to(dtype)
    flat = logits.double().squeeze(-1).numpy()
    found = compute(["pearson", "spearman"], logits, labels)
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(flat, labels).statistic, **FP32)
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(flat, labels).statistic, **FP32)


@pytest.mark.parametrize(
    ("labels", "constant"),
    [
        ([0, 1, 1, 1], 1),
        ([0, 1, 1, 1], 0),
        ([0] * 700 + [1] * 300, 0),
        ([0] * 700 + [1] * 300, 1),
        ([1, 1, 1], 1),
        ([0, 0, 0], 1),
        ([0, 0, 0], 0),
    ],
)
@pytest.mark.parametrize("count", [2, 3])
def test_a_constant_class_has_no_correlation(labels, constant, count):
    logits = predicted(*[constant] * len(labels), count=count)
    share = labels.count(constant) / len(labels)
    assert compute(["mcc", "accuracy"], logits, labels) == {"mcc": 0.0, "accuracy": share}


def test_labels_of_one_class_have_no_correlation():
    assert compute(["mcc"], predicted(0, 1, 0, 1), [1, 1, 1, 1]) == {"mcc": 0.0}


@pytest.mark.parametrize(
    ("choice", "labels", "f1"),
    [
        ((0, 0, 0), [0, 0, 0], 0.0),
        ((0, 0, 0), [1, 0, 1], 0.0),
        ((1, 1, 1), [0, 0, 0], 0.0),
        ((1, 1, 1), [1, 1, 1], 1.0),
        ((1, 1, 1, 1), [1, 1, 1, 0], 6 / 7),
    ],
)
def test_f1_of_constants(choice, labels, f1):
    assert compute(["f1"], predicted(*choice), labels) == {"f1": pytest.approx(f1, **FP32)}


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -1e30, 1e-30])
def test_a_constant_score_has_no_correlation(value):
    labels = [0.5, 1.0, 3.8, 2.2, 5.0, 0.1, 0.7]
    both = {"pearson": 0.0, "spearman": 0.0}
    assert compute(["pearson", "spearman"], torch.full((7, 1), value), labels) == both
    logits = torch.tensor(labels)[:, None]
    assert compute(["pearson", "spearman"], logits, [value] * 7) == both


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_no_success(value):
    logits = torch.tensor([[1.0], [value], [3.0], [4.0]])
    found = compute(["pearson"], logits, [1.0, 2.0, 3.0, 4.0])
    assert found == {"pearson": 0.0}


def test_a_diverged_model_has_no_rank_correlation():
    found = compute(["spearman"], torch.full((4, 1), float("nan")), [1.0, 2.0, 3.0, 4.0])
    assert found == {"spearman": 0.0}


@pytest.mark.parametrize(
    ("values", "labels", "sign"),
    [([1.0, 2.0, 3.0], [0.0, 0.1, 0.2], 1.0), ([3.0, 2.0, 1.0], [0.0, 1.0, 2.0], -1.0)],
)
def test_a_straight_line_correlates_fully(values, labels, sign):
    assert compute(["pearson", "spearman"], torch.tensor(values)[:, None], labels) == {
        "pearson": pytest.approx(sign, **FP32),
        "spearman": pytest.approx(sign, **FP32),
    }


def test_rank_correlation_is_blind_to_the_shape_of_a_curve():
    logits, labels = scores(200)
    assert compute(["spearman"], logits.double().exp(), labels) == compute(
        ["spearman"], logits.double(), labels
    )


def test_whole_scores_may_be_given_as_ints():
    logits = torch.tensor([[1.0], [3.0], [2.0]])
    names = ["pearson", "spearman"]
    assert compute(names, logits, [1, 2, 3]) == compute(names, logits, [1.0, 2.0, 3.0])


def test_values_are_plain_numbers_in_the_order_asked_for():
    logits, labels = classes(20, 2, 1.0)
    found = compute(["f1", "accuracy", "mcc"], logits.requires_grad_(), tuple(labels))
    assert list(found) == ["f1", "accuracy", "mcc"]
    assert {type(value) for value in found.values()} == {float}


def test_the_metrics_of_every_task_exist():
    assert {name for task in GLUE.values() for name in task.metrics} == set(METRICS)


def official(prediction: str, truths: list[str]) -> tuple[float, bool]:
    """F1 and exact match of one answer, by the words of SQuAD's paper and script, version 1.1."""

    def plain(text):
        text = "".join(sign for sign in text.lower() if sign not in string.punctuation)
        return [word for word in text.split() if word not in ("a", "an", "the")]

    def f1(truth):
        ours, theirs = plain(prediction), plain(truth)
        same = sum(min(ours.count(word), theirs.count(word)) for word in set(ours))
        return 2 * same / (len(ours) + len(theirs)) if same else 0.0

    return max(map(f1, truths)), any(plain(prediction) == plain(truth) for truth in truths)


ANSWERS = [
    ("The Plot", ["plot"]),
    ("a plot, and an actor", ["plot and actor", "something"]),
    ("the the plot", ["plot plot"]),
    ("3.5 stars", ["35 stars", "five"]),
    ("theater", ["the ater", "ater"]),
    ("good good film", ["good film film"]),
    ("Łódź - naïve", ["łódź  -  NAÏVE"]),
    ("", ["plot"]),
    ("nothing right", ["plot", "actor"]),
    ("co-operation", ["co operation", "cooperation"]),
]


@pytest.mark.parametrize("prediction, truths", ANSWERS)
def test_answers_are_scored_as_by_squads_own_definition(prediction, truths):
    found = answer_scores(("f1", "exact_match"), [prediction], [truths])
    f1, exact = official(prediction, truths)
    assert list(found) == ["f1", "exact_match"]
    assert found == pytest.approx({"f1": f1, "exact_match": float(exact)}, abs=1e-6)


def test_scores_of_answers_are_means_over_the_questions():
    many = ANSWERS * 200
    found = answer_scores(("exact_match", "f1"), *map(list, zip(*many)))
    values = [official(*pair) for pair in ANSWERS]
    assert found["f1"] == pytest.approx(sum(f for f, _ in values) / len(values), abs=2e-6)
    assert found["exact_match"] == pytest.approx(sum(e for _, e in values) / len(values), abs=2e-6)


def test_tags_are_scored_by_word():
    assert tag_scores(("accuracy",), [(1, 2), (0,)], [(1, 1), (0,)]) == {"accuracy": 0.6666667}
    assert tag_scores(("accuracy",), [(-1, 2)], [(-1, 2)]) == {"accuracy": 0.5}
