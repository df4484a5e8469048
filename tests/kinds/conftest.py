"""Tokenizers of the kinds there are, trained on a few sentences, and small sets of each kind."""

import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from bitfit_fast import Split, TaskData

SENTENCES = (
    "The acting wasn't unbelievable, but Zürich's plot (of 1,990) was astonishingly dull…",
    "It is  good\tand fine; one of the  best-acted films in Łódź: naïve, 3.5 stars!",
    "Unquestionably re-watchable 東京 film, acted & re-acted by 12 actors' friends 🎬 today.",
)


def wordpiece():
    """BERT's: lower case, continuations with ##."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    made.train_from_iterator(SENTENCES, trainer)
    special = [(token, made.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
        sep_token="[SEP]", model_max_length=512,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def byte_level(trim: bool = True):
    """RoBERTa's: bytes, spaces part of the words, double separators."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(SENTENCES, trainer)
    made.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=trim, add_prefix_space=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", pad_token="<pad>", cls_token="<s>",
        sep_token="</s>", model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def metaspace():
    """XLM-R's: pieces of a unigram model, words begin with a sign of their own."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], unk_token="<unk>",
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(SENTENCES, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", pad_token="<pad>", cls_token="<s>",
        sep_token="</s>", model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


TOKENIZERS = {
    "wordpiece": wordpiece,
    "byte-level": byte_level,
    "byte-level with spaces": lambda: byte_level(trim=False),
    "metaspace": metaspace,
}


@pytest.fixture(scope="session", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def spans(count: int, name: str) -> Split:
    """The answer is the one number in the text, which begins somewhere else each time."""
    texts, answers = [], []
    filler = ("the", "plot", "was", "good", "and", "the", "acting", "is", "not", "bad", "but")
    for i in range(count):
        number = ("one", "two")[i % 2]
        words = [filler[(i + k) % len(filler)] for k in range(6 + i % 30)]
        words.insert(i * 7 % len(words), number)
        context = " ".join(words)
        texts.append(("it is", context))
        answers.append(((number, context.index(number)),))
    ids = tuple(f"{name}-{i}" for i in range(count))
    return Split(name, tuple(texts), tuple(answers), ids)


TAGS = ("ADJ", "NOUN", "OTHER")


def tagged(count: int, name: str) -> Split:
    """The tag depends on the word alone."""
    words = ("the", "plot", "was", "good", "and", "acting", "is", "not", "bad", "but", "fine")
    kinds = {"plot": 1, "acting": 1, "good": 0, "bad": 0, "fine": 0}
    texts = tuple(
        tuple(words[(i * 5 + k * k) % len(words)] for k in range(2 + i % 9)) for i in range(count)
    )
    return Split(name, texts, tuple(tuple(kinds.get(w, 2) for w in t) for t in texts))


def whole(count: int, name: str) -> Split:
    texts = tuple(
        (("the plot was good", "the acting was dull")[i % 2], "one") for i in range(count)
    )
    return Split(name, texts, tuple(i % 2 for i in range(count)))


def splits(make):
    return {name: make(count, name) for name, count in (("train", 48), ("validation", 20))}


DATA = {
    "sequence": TaskData("toy", ("bad", "good"), ("accuracy", "mcc"), splits(whole)),
    "span": TaskData("toy", None, ("f1", "exact_match"), splits(spans), kind="span"),
    "token": TaskData("toy", TAGS, ("accuracy",), splits(tagged), kind="token"),
}
