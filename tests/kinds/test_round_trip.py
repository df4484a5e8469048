"""Each kind of task from training to predictions, with small models of several families."""

import csv
import json
import sys

import pytest
import torch
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForTokenClassification,
    DistilBertConfig,
    DistilBertForMaskedLM,
)

import bitfit_fast
from bitfit_fast import Settings, cli, parity
from bitfit_fast.data.tags import load_tag_files
from bitfit_fast.encoder import encoder_of
from bitfit_fast.errors import BitFitError
from bitfit_fast.inference import evaluate_checkpoint, predict_checkpoint, task_of
from bitfit_fast.kinds import KINDS, forward, kind_of
from bitfit_fast.models.loading import describe_model, ensure_padding
from bitfit_fast.training import loop
from bitfit_fast.training.backends import BACKENDS

from .conftest import DATA, TAGS

pytestmark = pytest.mark.filterwarnings("ignore::bitfit_fast.errors.BitFitWarning")
QUICK = {"max_steps": 6, "eval_every": 3, "batch_size": 8, "max_length": 24, "lr": 1e-2}
SPAN = {"doc_stride": 8, "max_answer_length": 4}
HEADS = {
    "sequence": {"classifier.weight", "classifier.bias"},
    "span": {"qa_outputs.weight", "qa_outputs.bias"},
    "token": {"classifier.weight", "classifier.bias"},
}


def settings(kind, **other):
    return Settings(**{**QUICK, **(SPAN if kind == "span" else {}), **other})


@pytest.fixture(scope="session")
def distilbert_folder(bert_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("distilbert") / "tiny"
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=64, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=130,
        initializer_range=0.2,
    )  # fmt: skip
    DistilBertForMaskedLM(config).save_pretrained(folder)
    tokenizer = bitfit_fast.load_tokenizer(str(bert_folder))
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(params=["bert", "roberta", "distilbert"])
def folder(request):
    return request.getfixturevalue(f"{request.param}_folder")


def fresh(folder, kind, seed=0):
    model = bitfit_fast.load_model(str(folder), DATA[kind].labels, seed, kind)
    bitfit_fast.select(model)
    return model, bitfit_fast.load_tokenizer(str(folder))


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_measured_in_training_is_measured_again(folder, kind, tmp_path, precision):
    model, tokenizer = fresh(folder, kind)
    data, run = DATA[kind], tmp_path / "run"
    summary = bitfit_fast.train(model, tokenizer, data, settings(kind, precision=precision), run)
    assert summary["backend"] == "fast" and summary["metrics"] == list(data.metrics)
    model, tokenizer, checkpoint = bitfit_fast.open_model(run)
    assert checkpoint.kind.name == kind
    assert checkpoint.header.labels == (list(data.labels) if data.labels else None)
    options = {name: getattr(settings(kind), name) for name in KINDS[kind].options}
    assert checkpoint.header.task == {"name": "toy", "metrics": list(data.metrics), **options}
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    again = evaluate_checkpoint(model, tokenizer, checkpoint, data, precision=precision)
    again = again["validation"]
    assert encoder_of(model) is None
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trains
    best = summary["best"]["validation"]
    assert {k: best[k] for k in again} == pytest.approx(again, rel=1e-5)
    # the head is new, and all of it is in the file
    heads = {n for n in checkpoint.tensors if "bias" not in n or n in HEADS[kind]}
    assert heads and all(not n.startswith(f"{model.base_model_prefix}.") for n in heads)


@pytest.mark.parametrize("kind", KINDS)
def test_what_can_be_learned_is_learned(bert_folder, kind):
    model, tokenizer = fresh(bert_folder, kind)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert HEADS[kind] <= trained
    assert all(n.endswith("bias") for n in trained - HEADS[kind])
    more = {"batch_size": 24, "lr": 3e-2} if kind == "token" else {}
    long = settings(kind, max_steps=100, eval_every=100, **more)
    summary = bitfit_fast.train(model, tokenizer, DATA[kind], long)
    scores = summary["final"]["validation"]
    assert all(scores[metric] > 0.9 for metric in DATA[kind].metrics), scores


@pytest.mark.parametrize("kind", ["span", "token"])
def test_the_fast_step_is_the_reference(folder, kind):
    """The gradients of every trained parameter, on batches with padding."""
    model, tokenizer = fresh(folder, kind)
    model.eval()
    ensure_padding(model, tokenizer)
    row, plan_of = KINDS[kind], loop.Plan.of
    encoded = row.encode(
        DATA[kind].train, tokenizer, {"max_length": 24, "doc_stride": 8, "max_answer_length": 4}
    )
    plan = plan_of(settings(kind), "bitfit", len(encoded))
    found = {}
    for name, backend in BACKENDS.items():
        undo, _ = backend.patch(model, bitfit_fast.Selection.of(model), plan)
        batch = backend.collate(tokenizer, plan, kind)(encoded.features[:8])
        assert int((batch["attention_mask"] == 0).sum()) > 10
        if name == "fast":
            assert not encoder_of(model).reads_padding
            encoder, ran = encoder_of(model), []
            run = encoder.run
            encoder.run = lambda *a, run=run, ran=ran: ran.append(1) or run(*a)
        model.zero_grad(set_to_none=True)
        loss = forward(model, loop_batch(name, batch)).loss
        loss.backward()
        if name == "fast":
            assert ran  # the layers ran as one operation
        found[name] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found[name]["loss"] = loss.detach()
        undo()
    reference = found["reference"]
    assert len(reference) >= 20
    for other in ("fast", "modules"):
        for name, gradient in found[other].items():
            torch.testing.assert_close(gradient, reference[name], rtol=1e-4, atol=2e-6)


def loop_batch(name, batch):
    from bitfit_fast.encoder import for_model

    return for_model(batch) if name == "fast" else batch


@pytest.mark.parametrize("kind", ["span", "token"])
def test_parity_is_found(bert_folder, kind):
    model, tokenizer = fresh(bert_folder, kind)
    found = parity.compare(model, tokenizer, DATA[kind], settings(kind), steps=2)
    assert found.failures == []
    # added to all scores of a text, this bias changes nothing
    assert "qa_outputs.bias" not in {row.name for row in found.rows}
    assert max(row.fp32 for row in found.rows) < 1e-3


@pytest.mark.parametrize("kind", ["span", "token"])
def test_a_run_goes_on_where_it_ended(bert_folder, kind, tmp_path):
    class Stopped(Exception):
        pass

    def train(output, **options):
        model, tokenizer = fresh(bert_folder, kind)
        return bitfit_fast.train(model, tokenizer, DATA[kind], settings(kind), output, **options)

    whole = train(tmp_path / "whole")
    keep, patch = loop.RunFolder.keep, pytest.MonkeyPatch()

    def stop(self, *arguments):
        keep(self, *arguments)
        raise Stopped

    with patch.context() as m:
        m.setattr(loop.RunFolder, "keep", stop)
        with pytest.raises(Stopped):
            train(tmp_path / "half")
    resumed = train(tmp_path / "half", resume=True)
    assert resumed["best"]["step"] == whole["best"]["step"]
    for one, other in zip(rows(tmp_path / "whole"), rows(tmp_path / "half")):
        timeless = ("examples_per_second", "step_ms", "peak_memory_bytes")
        assert {k: v for k, v in one.items() if k not in timeless} == {
            k: v for k, v in other.items() if k not in timeless
        }
    a, b = (bitfit_fast.read(tmp_path / name).tensors for name in ("whole", "half"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    model, tokenizer = fresh(bert_folder, kind)
    other = settings(kind, **({"doc_stride": 4} if kind == "span" else {"max_length": 32}))
    with pytest.raises(BitFitError, match="cannot resume"):
        bitfit_fast.train(model, tokenizer, DATA[kind], other, tmp_path / "half", resume=True)


def write_squad(path, split):
    paragraphs = []
    for name, (question, context), ((text, start),) in zip(split.ids, split.texts, split.labels):
        qa = {"id": name, "question": question, "answers": [{"text": text, "answer_start": start}]}
        paragraphs.append({"context": context, "qas": [qa]})
    articles = [{"title": str(i), "paragraphs": [p]} for i, p in enumerate(paragraphs)]
    path.write_text(json.dumps({"version": "1.1", "data": articles}))


def write_tags(path, split):
    text = ""
    for words, tags in zip(split.texts, split.labels):
        lines = enumerate(zip(words, tags), 1)
        text += "".join(f"{n}\t{w}" + f"\t_\t{TAGS[t]}" + "\t_" * 6 + "\n" for n, (w, t) in lines)
        text += "\n"
    path.write_text(text)


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["bitfit-fast", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


QUICK_OPTIONS = ("--max-steps", "4", "--eval-every", "2", "--max-length", "24", "--batch-size", "8")


def test_questions_on_the_command_line(run, bert_folder, tmp_path):
    file, output = tmp_path / "one.json", tmp_path / "run"
    write_squad(file, DATA["span"].train)
    train = ("train", "--model", bert_folder, "--task", "squad", "--data-dir", file, "--output",
             output, *QUICK_OPTIONS)  # fmt: skip
    small = ("--doc-stride", "8", "--max-answer-length", "4")
    share = ("--validation-share", "0.25", "--split-seed", "3")
    code, out, err = run(*train, *small, *share)
    assert code == 0, err
    assert "12 of its 48 articles, with 12 of 48 questions" in out and "best validation" in out
    summary = json.loads((output / "summary.json").read_text())
    assert summary["doc_stride"] == 8 and summary["max_answer_length"] == 4
    # the same questions are held back when it is evaluated
    code, out, err = run("evaluate", output, "--data-dir", file, "--output", tmp_path / "s.json")
    assert code == 0, err
    scores = json.loads((tmp_path / "s.json").read_text())["validation"]
    best = summary["best"]["validation"]
    assert scores == pytest.approx({k: best[k] for k in scores}, rel=1e-5)
    code, _, err = run("predict", output, "--file", file, "--output", tmp_path / "answers")
    assert code == 0, err
    answers = json.loads((tmp_path / "answers" / "files-test.json").read_text())
    assert set(answers) == set(DATA["span"].train.ids)
    contexts = dict(zip(DATA["span"].train.ids, DATA["span"].train.texts))
    assert all(answers[name] and answers[name] in contexts[name][1] for name in answers)
    code, out, err = run("inspect", output)
    assert code == 0 and "spans" in out, err
    code, _, err = run("merge", output, tmp_path / "merged")
    assert code == 0, err
    merged = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "merged")
    model, _, _ = bitfit_fast.open_model(output)
    ids = torch.arange(4, 20)[None]
    assert torch.equal(merged.eval()(ids).start_logits, model(ids).start_logits)
    # what it cannot do, in a sentence each
    for arguments, said in (
        (("evaluate", output, "--task", "reviews"), "the task reviews is a sequence task, and"),
        ((*train, "--overwrite", "--max-length", "200"), "max-length 200 is more than the 128"),
        (("train", "--task", "reviews", "--doc-stride", "8"), "doc-stride is not of a sequence"),
        ((*train, "--overwrite", "--doc-stride", "23"), "doc-stride 23 leaves no room"),
    ):
        code, out, err = run(*arguments)
        assert code == 2 and said in err and err.count("\n") == 1, err


def test_tags_on_the_command_line(run, roberta_folder, tmp_path):
    for name, split in (("train", "train"), ("dev", "validation"), ("test", "validation")):
        write_tags(tmp_path / f"x-{name}.conllu", DATA["token"].splits[split])
    output = tmp_path / "run"
    code, out, err = run("train", "--model", roberta_folder, "--task", "pos", "--data-dir",
                         tmp_path, "--output", output, *QUICK_OPTIONS)  # fmt: skip
    assert code == 0 and "best validation" in out, err
    best = json.loads((output / "summary.json").read_text())["best"]["validation"]
    code, out, err = run("evaluate", output, "--data-dir", tmp_path)
    assert code == 0 and f"{best['accuracy']:.4f}" in out, err
    code, out, err = run("predict", output, "--data-dir", tmp_path, "--output", tmp_path / "tags")
    assert code == 0, err
    predicted = load_tag_files({"test": tmp_path / "tags" / "pos-test.conllu"}, TAGS).splits["test"]
    truth = DATA["token"].splits["validation"]
    assert predicted.texts == truth.texts
    score = KINDS["token"].score(("accuracy",), predicted.labels, truth)["accuracy"]
    assert score == best["accuracy"]
    code, _, err = run("merge", output, tmp_path / "merged")
    assert code == 0, err
    merged = AutoModelForTokenClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.id2label == dict(enumerate(TAGS))


def test_files_of_ones_own_are_trained_on_and_predicted(run, bert_folder, tmp_path):
    """Two columns; the test file is predicted at the end."""
    lines = [[f"{w}\t{TAGS[t]}" for w, t in zip(*pair)] for pair in
             zip(DATA["token"].train.texts, DATA["token"].train.labels)]  # fmt: skip
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.tsv").write_text("\n\n".join("\n".join(s) for s in lines) + "\n")
    files = ("--train-file", tmp_path / "train.tsv", "--validation-file", tmp_path / "dev.tsv",
             "--test-file", tmp_path / "test.tsv", "--task-kind", "token")  # fmt: skip
    output = tmp_path / "run"
    code, _, err = run("train", "--model", bert_folder, *files, "--output", output, *QUICK_OPTIONS)
    assert code == 0, err
    assert (output / "files-test.tsv").read_text().count("\n\n") == len(lines)
    code, _, err = run("evaluate", output)
    assert code == 2 and "was trained on files of its own; name one with --file" in err
    code, _, err = run("evaluate", output, "--file", tmp_path / "dev.tsv")
    assert code == 0, err


def test_a_checkpoint_predicts_what_it_evaluates(bert_folder, tmp_path):
    model, tokenizer = fresh(bert_folder, "span")
    bitfit_fast.train(model, tokenizer, DATA["span"], settings("span"), tmp_path / "run")
    model, tokenizer, checkpoint = bitfit_fast.open_model(tmp_path / "run")
    write_squad(tmp_path / "x.json", DATA["span"].splits["validation"])
    data = task_of(checkpoint, "validation", file=tmp_path / "x.json")
    scores = evaluate_checkpoint(model, tokenizer, checkpoint, data)["validation"]
    paths = predict_checkpoint(model, tokenizer, checkpoint, data, tmp_path, "validation")
    answers = json.loads(paths[0].read_text())
    split = data.splits["validation"]
    right = [answers[name] == own[0][0] for name, own in zip(split.ids, split.labels)]
    assert sum(right) / len(right) == pytest.approx(scores["exact_match"])
    ours = bitfit_fast.load_task(validation_file=tmp_path / "x.json", kinds=("validation",))
    assert ours.digest() == data.digest()


def test_heads_and_tasks_must_fit(bert_folder):
    model, tokenizer = fresh(bert_folder, "sequence")
    with pytest.raises(BitFitError, match="the task toy needs a model ForQuestionAnswering, and "):
        bitfit_fast.train(model, tokenizer, DATA["span"], settings("span"))
    model, tokenizer = fresh(bert_folder, "span")
    with pytest.raises(BitFitError, match="this is a BertForQuestionAnswering; load it with AutoM"):
        bitfit_fast.train(model, tokenizer, DATA["token"], settings("token"))
    with pytest.raises(BitFitError, match="unknown task kind 'spam'; valid ones are sequence, sp"):
        bitfit_fast.load_model(str(bert_folder), None, kind="spam")
    assert type(describe_model(str(bert_folder), "span")).__name__ == "BertForQuestionAnswering"
    assert kind_of("SomethingElse").name == "sequence"


def test_a_label_with_a_tab_or_a_line_end_stays_one_field(tmp_path):
    labels = ("plain", "a\tb", "c\nd")
    split = bitfit_fast.Split("test", (("x",), ("y",), ("z",)), None)
    data = bitfit_fast.TaskData("files", labels, ("accuracy",), {"test": split})
    (path,) = KINDS["sequence"].write(data, split, torch.eye(3), tmp_path)
    with path.open(newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))
    assert rows == [["index", "prediction"], *([str(i), name] for i, name in enumerate(labels))]


def test_defaults_are_the_kinds_own():
    assert Settings().for_kind(KINDS["sequence"]).max_length == 128
    filled = Settings(doc_stride=64).for_kind(KINDS["span"])
    assert (filled.max_length, filled.doc_stride, filled.max_answer_length) == (384, 64, 30)
    assert "doc_stride" not in Settings().for_kind(KINDS["token"]).described()
    assert Settings(max_length=64).for_kind(KINDS["token"]).described()["max_length"] == 64
    for name, value in (("doc_stride", -1), ("max_answer_length", 0)):
        with pytest.raises(BitFitError, match="must be at least"):
            Settings(**{name: value})
