"""Evaluation: in the precision in which the model trains."""

import pytest
import torch

import bitfit_fast
from bitfit_fast import Split
from bitfit_fast.inference import evaluate_checkpoint, predict_checkpoint
from bitfit_fast.kinds import KINDS
from bitfit_fast.training.backends import BACKENDS
from bitfit_fast.training.evaluate import predict
from bitfit_fast.training.settings import Plan

TEXTS = tuple((text,) for text in ("good plot", "the acting was very dull", "it was not bad"))
PLAN = Plan(
    steps=100, steps_per_epoch=10, warmup_steps=0, eval_every=10, lr=1e-3, schedule="linear",
    precision="bf16", grad_clip=0.0, batch_size=3, max_length=16, device=torch.device("cpu"),
)  # fmt: skip


def noting(module):
    """Note the dtype of what a module computes."""
    seen = []
    module.register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
    return seen


@pytest.mark.parametrize(
    ("backend", "expected"),
    [("fast", torch.float32), ("modules", torch.bfloat16), ("reference", torch.bfloat16)],
)
def test_the_head_is_evaluated_as_it_trains(bert_folder, backend, expected):
    model = bitfit_fast.load_model(str(bert_folder), ["no", "yes"], 0)
    tokenizer = bitfit_fast.load_tokenizer(str(bert_folder))
    selection = bitfit_fast.select(model)
    kind, one = KINDS["sequence"], BACKENDS[backend]
    encoded = kind.encode(Split("train", TEXTS, (0, 1, 0)), tokenizer, {"max_length": 16})
    one.patch(model.eval(), selection, PLAN)
    seen, collate = noting(model.classifier), one.collate(tokenizer, PLAN)
    _, loss = predict(model, encoded, collate, precision="bf16")
    training = one.step(model, PLAN)(collate(encoded.features))
    assert seen == [expected] * 2
    assert loss == pytest.approx(training.item(), rel=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_is_evaluated_with_the_head_in_its_own_precision(
    bert_folder, tmp_path, precision
):
    split = Split("validation", TEXTS, (0, 1, 0))
    data = bitfit_fast.TaskData("toy", ("no", "yes"), ("accuracy",), {"validation": split})
    model = bitfit_fast.load_model(str(bert_folder), ["no", "yes"], 0)
    bitfit_fast.select(model)
    bitfit_fast.save(model, tmp_path / "file")
    model, tokenizer, checkpoint = bitfit_fast.open_model(tmp_path / "file")
    seen, kinds = noting(model.classifier), [type(module) for module in model.modules()]
    options = {"precision": precision, "max_length": 16}
    evaluate_checkpoint(model, tokenizer, checkpoint, data, **options)
    predict_checkpoint(model, tokenizer, checkpoint, data, tmp_path, "validation", **options)
    assert seen == [torch.float32] * 2
    assert [type(module) for module in model.modules()] == kinds
