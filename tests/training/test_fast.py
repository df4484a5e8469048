"""The fast step where it cannot go on, and what it says then."""

import dataclasses

import pytest
import torch

import bitfit_fast
from bitfit_fast.encoder import for_model
from bitfit_fast.errors import BitFitError
from bitfit_fast.training.fast import FastBackend, FastStep
from bitfit_fast.training.settings import Plan

PLAN = Plan(
    steps=10, steps_per_epoch=10, warmup_steps=0, eval_every=10, lr=1e-3, schedule="constant",
    precision="bf16", grad_clip=1.0, batch_size=4, max_length=16, device=torch.device("cpu"),
)  # fmt: skip


@pytest.fixture
def batch():
    ids = torch.randint(4, 20, (6, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}


@pytest.fixture
def model(bert_folder):
    model = bitfit_fast.load_model(str(bert_folder), ["no", "yes"])
    bitfit_fast.select(model)
    return model


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[...] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
@pytest.mark.parametrize("room", [10_000, 100_000])
def test_out_of_memory_names_batches_and_a_mode_that_fit(model, batch, monkeypatch, error, room):
    backend = FastBackend()
    undo, _ = backend.patch(model, bitfit_fast.Selection.of(model), PLAN)
    step = FastStep(model, PLAN)
    step.room = room

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(model.bert.embeddings, "forward", fail)
    with pytest.raises(BitFitError) as caught:
        step(batch)
    said = str(caught.value)
    assert said.startswith("out of memory with 6 examples of up to 9 tokens in memory mode 'fast'")
    # 2 layers of width 32 and 64 inside, in bf16, and what passes; 6 did not fit
    per_example = 9 * (2 * (2 * 32 * 2 + 8 + 96 * 2 + 64 * 2) + 3 * 64 * 2 + 12 * 32)
    fit = min(5, room // per_example)
    assert (f"batches of {fit} fit" if fit else "no batch fits") in said
    assert said.endswith("of 7 in mode 'low'" if room == 100_000 else "of 1 in mode 'lowest'")
    step.close()
    undo()


def test_other_errors_stay_what_they_are(model, batch, monkeypatch):
    undo, _ = FastBackend().patch(model, bitfit_fast.Selection.of(model), PLAN)
    step = FastStep(model, PLAN)
    with pytest.raises((RuntimeError, ValueError), match=r"size|shape"):
        step({**batch, "labels": batch["labels"][:5]})
    step.close()
    undo()


def test_bytes_kept_are_those_of_the_documentation(model, batch):
    """18 d + 8 bytes a token and layer in `fast`, for a feed-forward block of 4 d."""
    bert = model.bert.config
    done = bitfit_fast.patch_encoder(model, precision="bf16")
    stack = bitfit_fast.encoder.encoder_of(model).stack
    d, f = bert.hidden_size, bert.intermediate_size
    expected = {"fast": 10 * d + 2 * f + 8, "low": 10 * d + f + 8}
    expected |= {"lower": 10 * d + 8, "lowest": 4 * d + 8}
    for memory, kept in expected.items():
        assert stack.bytes_kept(7, memory) == 7 * done.layers * kept
    bitfit_fast.unpatch(model)


def test_the_plan_says_precision_and_memory(model):
    plan = dataclasses.replace(PLAN, memory="lower")
    undo, said = FastBackend().patch(model, bitfit_fast.Selection.of(model), plan)
    assert "2 layers run as one operation in bf16, the last one for first tokens only" in said
    assert "memory mode lower" in said and "2 key biases have a gradient of zero" in said
    undo()


@pytest.mark.parametrize("able", [False, True])
def test_where_bf16_would_be_faster_the_report_says_so(able, model, monkeypatch):
    monkeypatch.setattr("bitfit_fast.training.fast.multiplies_bf16", lambda device: able)
    for precision in ("fp32", "bf16"):
        plan = dataclasses.replace(PLAN, precision=precision)
        undo, said = FastBackend().patch(model, bitfit_fast.Selection.of(model), plan)
        undo()
        assert ("(precision bf16)" in said) == (able and precision == "fp32")


def test_the_step_is_told_the_lengths_and_reads_no_mask(model, bert_folder, monkeypatch):
    from bitfit_fast.data.batches import tokenize
    from bitfit_fast.data.task import Split
    from bitfit_fast.packing import Packing

    texts = (("good plot",), ("the acting was very dull and poor",), ("fine",))
    split = Split("train", texts, (0, 1, 0))
    tokenizer = bitfit_fast.load_tokenizer(str(bert_folder))
    features = tokenize(split, tokenizer, 16)
    model.eval()
    losses = []
    for side in ("right", "left"):
        tokenizer.padding_side = side
        backend = FastBackend()
        undo, _ = backend.patch(model, bitfit_fast.Selection.of(model), PLAN)
        batch = backend.collate(tokenizer, PLAN)(features)
        with monkeypatch.context() as context:
            if side == "right":
                context.setattr(Packing, "of_mask", None)
            losses.append(model(**for_model(batch)).loss)
        undo()
    # padded on the left, other positions: another loss, by the model's own layers
    assert not torch.equal(*losses)
    assert "packed_lengths" not in batch


@pytest.mark.parametrize("ours", [False, True])
def test_bf16_without_products_of_our_own_is_said_to_be_slow(ours, model, monkeypatch):
    monkeypatch.setattr("bitfit_fast.training.fast.slow_in", lambda precision, device: "slow")
    packed = property(lambda product: 64 * ours)
    monkeypatch.setattr("bitfit_fast.encoder.product.Product.bytes_packed", packed)
    undo, said = FastBackend().patch(model, bitfit_fast.Selection.of(model), PLAN)
    undo()
    assert said.endswith("\nslow") == (not ours)
