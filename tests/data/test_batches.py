"""Tokens, the order of examples, and padding."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from transformers import (
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
)

from bitfit_fast.data.batches import (
    EpochBatches,
    evaluation_batches,
    pad,
    tokenize,
    training_batches,
)
from bitfit_fast.data.task import Split
from bitfit_fast.errors import BitFitWarning

SHAPES = [(1, 1), (1, 16), (7, 3), (12, 4), (16, 16), (17, 16), (100, 7)]
SINGLES = Split("train", (("the plot was good",), ("dull",), ("a very great plot",)), (0, 1, 0))
PAIRS = Split("test", (("the plot", "a very dull plot"), ("it is good", "bad")), None)


@pytest.fixture(scope="module")
def bert(bert_folder):
    return AutoTokenizer.from_pretrained(bert_folder)


@pytest.fixture(scope="module")
def roberta(roberta_folder):
    return AutoTokenizer.from_pretrained(roberta_folder)


def first(count, *args):
    return list(itertools.islice(EpochBatches(*args), count))


def epoch(number, examples, batch_size, seed):
    """Return the batches of one epoch."""
    per_epoch = -(-examples // batch_size)
    return first((number + 1) * per_epoch, examples, batch_size, seed)[number * per_epoch :]


@pytest.mark.parametrize(("examples", "batch_size"), SHAPES)
@pytest.mark.parametrize("number", [0, 1, 4])
def test_every_example_comes_once_an_epoch(examples, batch_size, number):
    batches = epoch(number, examples, batch_size, seed=3)
    assert sorted(itertools.chain(*batches)) == list(range(examples))
    assert len(batches) == EpochBatches(examples, batch_size, 3).per_epoch


@pytest.mark.parametrize(("examples", "batch_size"), SHAPES)
def test_only_the_last_batch_of_an_epoch_may_be_smaller(examples, batch_size):
    sizes = [len(batch) for batch in epoch(1, examples, batch_size, seed=0)]
    assert sizes[:-1] == [batch_size] * (len(sizes) - 1)
    assert sizes[-1] == (examples % batch_size or batch_size)


@pytest.mark.parametrize(("examples", "batch_size"), SHAPES)
@pytest.mark.parametrize("start", [0, 1, 2, 5, 14, 15, 16, 100])
def test_a_start_equals_skipping(examples, batch_size, start):
    everything = first(start + 20, examples, batch_size, 5)
    assert first(20, examples, batch_size, 5, start) == everything[start:]


def test_the_order_depends_on_the_seed_and_the_epoch_alone():
    torch.manual_seed(1)
    once = first(30, 50, 8, 0)
    torch.manual_seed(2)
    torch.rand(7)
    assert first(30, 50, 8, 0) == once


def test_the_order_leaves_the_global_generator_alone(bert):
    features = tokenize(SINGLES, bert, 16)
    state = torch.get_rng_state()
    next(training_batches(features, pad(bert), 2, seed=0))
    assert torch.equal(torch.get_rng_state(), state)


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = [
        tuple(itertools.chain(*epoch(number, 50, 8, seed)))
        for seed in (0, 1, 2, 42)
        for number in range(4)
    ]
    assert len(set(orders)) == len(orders)


def test_the_same_batches_can_be_had_again():
    batches = EpochBatches(20, 6, 1)
    assert list(itertools.islice(batches, 10)) == list(itertools.islice(batches, 10))


def test_tokens_are_those_of_the_tokenizer(bert, in_lists):
    features = tokenize(SINGLES, bert, 64)
    for feature, (text,), label in zip(features, SINGLES.texts, SINGLES.labels):
        assert in_lists(feature) == {**bert(text), "labels": label}


def test_pairs_are_joined_as_the_tokenizer_does(bert, roberta, in_lists):
    for tokenizer in (bert, roberta):
        for feature, pair in zip(tokenize(PAIRS, tokenizer, 64), PAIRS.texts):
            assert in_lists(feature) == dict(tokenizer(*pair))
    (ours, _), (theirs, _) = (tokenize(PAIRS, tokenizer, 64) for tokenizer in (bert, roberta))
    assert ours["token_type_ids"].tolist() == [0] * 4 + [1] * 5
    assert "token_type_ids" not in theirs


def test_a_split_without_labels_makes_features_without(bert):
    assert all("labels" not in feature for feature in tokenize(PAIRS, bert, 16))


@pytest.mark.parametrize("max_length", [5, 6, 8, 12])
def test_examples_are_cut_to_the_longest_length(max_length, bert, roberta):
    long = "the plot was good and the acting was dull"
    for texts in ((long,), (long, "bad"), ("bad", long), (long, long)):
        for tokenizer in (bert, roberta):
            whole = len(tokenizer(*texts)["input_ids"])
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                (feature,) = tokenize(Split("train", (texts,), None), tokenizer, max_length)
            told = [f"1 of 1 examples of the train set are cut to max-length {max_length}"]
            assert [str(w.message) for w in said] == told * (whole > max_length)
            assert len(feature["input_ids"]) == min(whole, max_length)
            assert {len(values) for values in feature.values()} == {len(feature["input_ids"])}


def test_the_longer_sentence_of_a_pair_is_cut_first(bert):
    texts = ("it is bad", "the plot was good and the acting was dull")
    with pytest.warns(BitFitWarning, match="cut to max-length 10"):
        (feature,) = tokenize(Split("train", (texts,), None), bert, 10)
    words = bert.convert_ids_to_tokens(feature["input_ids"])
    assert words == ["[CLS]", "it", "is", "bad", "[SEP]", "the", "plot", "was", "good", "[SEP]"]


def test_a_batch_is_padded_to_its_longest_example(bert):
    features = tokenize(SINGLES, bert, 64)
    batch = pad(bert)(features[:2])
    lengths = [len(feature["input_ids"]) for feature in features[:2]]
    assert batch["input_ids"].shape == (2, max(lengths))
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["labels"].tolist() == [0, 1]


def test_labels_of_batches_have_the_types_that_losses_need(bert):
    for labels, dtype in (((0, 1, 0), torch.int64), ((0.5, 1.0, 2.0), torch.float32)):
        features = tokenize(Split("train", SINGLES.texts, labels), bert, 64)
        assert pad(bert)(features)["labels"].dtype == dtype


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("labels", [None, "number", "by token"])
@pytest.mark.parametrize("folder", ["bert_folder", "roberta_folder"])
def test_batches_are_those_of_the_collators_of_transformers(
    labels, folder, side, in_lists, request
):
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(folder))
    tokenizer.padding_side = side
    features, by_token = tokenize(PAIRS, tokenizer, 64), labels == "by token"
    for i, feature in enumerate(features):
        if by_token:
            feature["labels"] = torch.arange(len(feature["input_ids"]))
        elif labels == "number":
            feature["labels"] = i
    theirs = DataCollatorForTokenClassification if by_token else DataCollatorWithPadding
    expected = theirs(tokenizer)([in_lists(feature) for feature in features])
    batch = pad(tokenizer)(features)
    assert batch.keys() == expected.keys()
    for key, value in batch.items():
        assert torch.equal(value, expected[key]) and value.dtype == expected[key].dtype, key


def numbered(count):
    """Make features whose lengths differ, and whose first token is their index."""
    return [{"input_ids": [i, *range((i * 7) % 5)]} for i in range(count)]


def indices(features):
    return [feature["input_ids"][0] for feature in features]


@pytest.mark.parametrize(("examples", "batch_size"), SHAPES)
@pytest.mark.parametrize("start", [0, 3, 11])
def test_training_batches_follow_the_order(examples, batch_size, start):
    batches = training_batches(numbered(examples), indices, batch_size, 9, start)
    counts, taken = zip(*itertools.islice(batches, 12))
    assert counts == tuple(map(len, taken))
    assert list(taken) == first(12, examples, batch_size, 9, start)


@pytest.mark.parametrize(("examples", "batch_size"), SHAPES)
def test_evaluation_covers_every_example_once(examples, batch_size):
    batches = list(evaluation_batches(numbered(examples), indices, batch_size))
    assert all(positions == batch for positions, batch in batches)
    assert sorted(itertools.chain(*(batch for _, batch in batches))) == list(range(examples))
    assert [len(batch) for _, batch in batches[:-1]] == [batch_size] * (len(batches) - 1)


def test_evaluation_batches_hold_examples_of_like_length():
    features = numbered(40)
    order = itertools.chain(
        *(positions for positions, _ in evaluation_batches(features, indices, 8))
    )
    lengths = [len(features[i]["input_ids"]) for i in order]
    assert lengths == sorted(lengths, reverse=True)
