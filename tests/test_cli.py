"""The command line as a newcomer meets it: whole ways through it, and every refusal."""

import csv
import json
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import ModernBertConfig, T5Config, ViTConfig

from bitfit_fast import cli
from bitfit_fast.training.fast import FastStep

pytestmark = pytest.mark.filterwarnings("ignore::bitfit_fast.errors.BitFitWarning")
COMMANDS = ("train", "evaluate", "predict", "inspect", "merge", "parity", "study")
ROWS = [(("the plot was good", "bad")[i % 2], "it is one", i % 2) for i in range(24)]


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the command line; returns exit code, output and errors."""

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


@pytest.fixture(scope="session")
def rte_folder(tmp_path_factory):
    """GLUE's RTE layout with two dozen rows a split."""
    folder = tmp_path_factory.mktemp("glue") / "RTE"
    folder.mkdir()
    for name in ("train", "dev", "test"):
        labelled = name != "test"
        lines = ["index\tsentence1\tsentence2" + "\tlabel" * labelled]
        for i, (a, b, y) in enumerate(ROWS):
            label = "\t" + ("entailment", "not_entailment")[y] if labelled else ""
            lines.append(f"{i}\t{a}\t{b}{label}")
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder.parent


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A training and a validation CSV of single sentences."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("train", "validation"):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *((a, y) for a, _, y in ROWS)])
    return folder


def quick(model, output, *more):
    return (
        "train", "--model", model, "--output", output, "--max-steps", "4", "--eval-every", "2",
        "--batch-size", "8", "--max-length", "16", *more,
    )  # fmt: skip


@pytest.fixture(scope="session")
def trained(bert_folder, rte_folder, users_environment, tmp_path_factory):
    """A finished BitFit run on the small RTE."""
    output = tmp_path_factory.mktemp("runs") / "rte"
    arguments = quick(bert_folder, output, "--task", "RTE", "--data-dir", rte_folder)
    command = [sys.executable, "-m", "bitfit_fast", *map(str, arguments)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=120, env=users_environment
    )
    # warnings are one line each for the person at the keyboard
    warned = done.stderr.splitlines()
    assert all(line.startswith("warning: ") for line in warned), warned
    assert warned[-1].startswith("warning: 4 steps are few for BitFit")
    return output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "Usage: bitfit-fast " + command in out
    # every option says what it is for
    bare = [line for line in out.splitlines() if line.startswith("│ --") and len(line.split()) < 4]
    assert not bare


def test_train_prints_the_audit_and_leaves_a_run(trained, run, bert_folder, rte_folder, tmp_path):
    names = {path.name for path in trained.iterdir()}
    assert names >= {
        "settings.json", "metrics.jsonl", "summary.json", "model.safetensors", "curves.png"
    }  # fmt: skip
    code, out, _ = run(
        *quick(bert_folder, tmp_path / "out", "--task", "rte", "--data-dir", rte_folder)
    )
    assert code == 0
    for term in ("query", "attention-layernorm", "intermediate", "pooler", "head"):
        assert term in out
    assert "validation" in out and "4 steps" in out


def test_evaluate_gives_the_accuracy_that_training_measured(trained, run, rte_folder, tmp_path):
    code, out, _ = run(
        "evaluate", trained, "--data-dir", rte_folder, "--output", tmp_path / "scores.json"
    )
    assert code == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    best = json.loads((trained / "summary.json").read_text())["best"]["validation"]
    assert scores["validation"]["accuracy"] == best["accuracy"]
    assert scores["validation"]["loss"] == pytest.approx(best["loss"], rel=1e-6)
    assert "accuracy" in out


def test_predict_writes_the_submission_with_the_servers_label_names(
    trained, run, rte_folder, tmp_path
):
    code, _, _ = run("predict", trained, "--data-dir", rte_folder, "--output", tmp_path)
    assert code == 0
    lines = (tmp_path / "RTE.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction"
    assert [line.split("\t")[0] for line in lines[1:]] == [str(i) for i in range(len(ROWS))]
    assert {line.split("\t")[1] for line in lines[1:]} <= {"entailment", "not_entailment"}
    # those of another split do not take its place
    before = (tmp_path / "RTE.tsv").read_bytes()
    more = ("--data-dir", rte_folder, "--output", tmp_path, "--split", "validation")
    assert run("predict", trained, *more)[0] == 0
    assert (tmp_path / "RTE.tsv").read_bytes() == before
    assert (tmp_path / "RTE-validation.tsv").exists()


def test_the_whole_way_works_for_roberta_which_has_no_token_types(
    run, roberta_folder, rte_folder, tmp_path
):
    arguments = quick(roberta_folder, tmp_path / "run", "--task", "rte", "--data-dir", rte_folder)
    assert run(*arguments)[0] == 0
    out = ("--output", tmp_path / "out")
    assert run("predict", tmp_path / "run", "--data-dir", rte_folder, *out)[0] == 0
    assert len((tmp_path / "out" / "RTE.tsv").read_text().splitlines()) == len(ROWS) + 1


def test_inspect_shows_the_header_and_draws_the_heatmap(trained, run, tmp_path, bert_folder):
    code, out, _ = run("inspect", trained, "--output", tmp_path / "change.png")
    assert code == 0
    assert "BertForSequenceClassification" in out
    assert "mean |change|" in out and "output-layernorm" in out
    assert (tmp_path / "change.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    code, out, _ = run("inspect", "--model", bert_folder)
    assert code == 0 and "attention-output" in out
    picture = ("--output", tmp_path / "other.png")
    refused(run("inspect", "--model", bert_folder, *picture), "--output", "not of --model")


def test_merge_writes_a_folder_and_refuses_to_overwrite_one(trained, run, tmp_path):
    assert run("merge", trained, tmp_path / "merged")[0] == 0
    assert (tmp_path / "merged" / "config.json").exists()
    code, _, err = run("merge", trained, tmp_path / "merged")
    assert code == 2 and "exists already" in err


def test_files_train_evaluate_and_predict(run, files, bert_folder, tmp_path):
    run_folder = tmp_path / "run"
    test = tmp_path / "test.jsonl"
    test.write_text("".join(json.dumps({"text": a}) + "\n" for a, _, _ in ROWS))
    three = (
        "--train-file", files / "train.csv", "--validation-file", files / "validation.csv",
        "--test-file", test,
    )  # fmt: skip
    assert run(*quick(bert_folder, run_folder, *three, "--text-column", "text"))[0] == 0
    assert len((run_folder / "files-test.tsv").read_text().splitlines()) == len(ROWS) + 1
    code, out, _ = run("evaluate", run_folder, "--file", files / "validation.csv")
    assert code == 0 and "mcc" in out
    code, _, _ = run(
        "predict", run_folder, "--file", files / "validation.csv", "--output", tmp_path
    )
    assert code == 0
    lines = (tmp_path / "files-test.tsv").read_text().splitlines()
    assert {line.split("\t")[1] for line in lines[1:]} <= {"0", "1"}


def test_labels_of_a_test_file_are_not_read(run, files, bert_folder, tmp_path):
    test = tmp_path / "test.csv"
    test.write_text("text,label\n" + "".join(f"{a},-1\n" for a, _, _ in ROWS))
    three = ("--train-file", files / "train.csv", "--test-file", test)
    assert run(*quick(bert_folder, tmp_path / "run", *three))[0] == 0
    assert len((tmp_path / "run" / "files-test.tsv").read_text().splitlines()) == len(ROWS) + 1
    more = ("--file", test, "--data-dir", tmp_path, "--output", tmp_path / "out")
    refused(run("predict", tmp_path / "run", *more), "data folder", "not of sequence files")


def test_overwrite_and_resume_on_the_command_line(run, files, bert_folder, tmp_path):
    arguments = quick(bert_folder, tmp_path / "run", "--train-file", files / "train.csv")
    assert run(*arguments)[0] == 0
    assert run(*arguments)[0] == 2
    assert run(*arguments, "--resume")[0] == 0
    assert run(*arguments, "--overwrite")[0] == 0


@pytest.mark.parametrize("method", ["full", "frozen"])
def test_other_methods_train(run, files, bert_folder, tmp_path, method):
    code, _, _ = run(
        *quick(bert_folder, tmp_path / "run", "--train-file", files / "train.csv"),
        "--method", method, "--precision", "bf16", "--schedule", "constant",
    )  # fmt: skip
    assert code == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["method"] == method


def refused(result, *words):
    """Assert exit code 2, one sentence on the error stream, and no traceback."""
    code, out, err = result
    sentences = [line for line in err.splitlines() if line and not line.startswith("warning:")]
    assert code == 2, (code, out, err)
    assert len(sentences) == 1 and sentences[0].startswith("error: "), err
    assert "Traceback" not in err + out
    for word in words:
        assert str(word) in sentences[0], sentences[0]


TRAIN_REFUSALS = {
    "unknown task": (("--task", "rtee"), ("rtee", "cola", "reviews")),
    "unknown term": (("--terms", "query,keys"), ("keys", "query, key, value")),
    "unknown method": (("--method", "loar"), ("loar", "bitfit, full, frozen")),
    "option of another method": (("--method", "lora", "--share", "0.1"), ("share", "rank, alpha")),
    "layer out of range": (("--layers", "0-2"), ("layer 2", "layers 0-1")),
    "malformed layers": (("--layers", "one"), ("one", "0-5,11")),
    "terms of another method": (("--method", "full", "--terms", "query"), ("full",)),
    "frozen without head": (("--method", "frozen", "--no-head"), ("head",)),
    "unknown backend": (("--backend", "warp"), ("warp", "auto, fast, reference, modules")),
    "unknown device": (("--device", "tpu9"), ("tpu9", "auto, cpu, cuda")),
    "unknown schedule": (("--schedule", "cosine"), ("cosine", "linear, constant")),
    "unknown precision": (("--precision", "int8"), ("int8", "fp32, bf16")),
    "too long": (("--max-length", "200"), ("200", "128")),
    "missing model": (("--model", "./nowhere"), ("nowhere", "does not exist")),
    "no network": (("--model", "some/model"), ("some/model", "local folder")),
    "task and files": (("--train-file", "x.csv"), ("not both",)),
}


@pytest.mark.parametrize("case", TRAIN_REFUSALS)
def test_train_refuses(run, case, bert_folder, rte_folder, tmp_path):
    more, words = TRAIN_REFUSALS[case]
    base = {"--model": bert_folder, "--task": "rte", "--data-dir": rte_folder, "--max-length": 16}
    base |= dict(zip(more[::2], more[1::2])) if "--no-head" not in more else {more[0]: more[1]}
    flags = ["--no-head"] if "--no-head" in more else []
    options = [str(item) for pair in base.items() for item in pair]
    result = run("train", "--output", tmp_path / "out", *options, *flags)
    refused(result, *words)
    assert not (tmp_path / "out").exists()


def test_train_refuses_data_that_is_missing_or_broken(run, bert_folder, rte_folder, tmp_path):
    def train(*more):
        return run(*quick(bert_folder, tmp_path / "out", *more))

    refused(train(), "name a task", "rte")
    refused(train("--task", "mrpc", "--data-dir", rte_folder), "MRPC", "RTE")
    refused(train("--task", "rte", "--data-dir", tmp_path / "no"), tmp_path / "no")
    refused(train("--task", "rte"), "nyu-mll/glue", "--data-dir")  # neither network nor cache
    text = (rte_folder / "RTE" / "train.tsv").read_text()
    broken = tmp_path / "glue" / "RTE"
    broken.mkdir(parents=True)
    (broken / "dev.tsv").write_text(text)

    def with_train(content):
        (broken / "train.tsv").write_text(content)
        return train("--task", "rte", "--data-dir", broken.parent)

    refused(with_train(text[:-25]), broken / "train.tsv", "line 25", "cut short")
    refused(with_train(text.replace("\tnot_entailment", "\tmaybe", 1)), "line 3", "maybe")
    refused(with_train(text.replace("sentence2", "premise")), "train.tsv", "sentence2")
    refused(with_train(text.splitlines()[0] + "\n"), "train.tsv", "no examples")
    (broken / "train.tsv").unlink()
    refused(train("--task", "rte", "--data-dir", broken.parent), "train.tsv", "missing")
    refused(train("--train-file", tmp_path / "no.csv"), "no.csv", "missing")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "config",
    [
        T5Config(d_model=32, d_ff=64, num_layers=2, num_heads=2, d_kv=16, vocab_size=64),
        ModernBertConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            vocab_size=64, pad_token_id=0, cls_token_id=1, sep_token_id=2, bos_token_id=1,
            eos_token_id=2,
        ),
    ],
    ids=["t5", "modernbert"],
)  # fmt: skip
def test_train_refuses_a_model_without_biases(run, config, bert_folder, files, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(bert_folder).save_pretrained(tmp_path / "model")
    result = run(*quick(tmp_path / "model", tmp_path / "out", "--train-file", files / "train.csv"))
    refused(result, "has no bias terms outside its head", "none")


def test_a_folder_that_holds_a_run_is_refused_before_anything_is_loaded(run, trained, rte_folder):
    result = run(
        "train", "--task", "rte", "--data-dir", rte_folder, "--model", "./nowhere",
        "--output", trained,
    )  # fmt: skip
    refused(result, trained, "--overwrite", "--resume")
    result = run(
        "train", "--task", "rte", "--data-dir", rte_folder, "--output", trained,
        "--overwrite", "--resume",
    )  # fmt: skip
    refused(result, "exclude each other")


def test_a_loss_that_is_nan_exits_with_2(run, bert_folder, files, tmp_path, monkeypatch):
    call = FastStep.__call__
    monkeypatch.setattr(FastStep, "__call__", lambda self, batch: call(self, batch) * float("nan"))
    result = run(*quick(bert_folder, tmp_path / "out", "--train-file", files / "train.csv"))
    refused(result, "loss is nan at step 1", "learning rate")


@pytest.mark.parametrize("step", [0, 3])
def test_an_interrupt_promises_only_what_was_saved(
    run, step, bert_folder, files, tmp_path, monkeypatch
):
    call = FastStep.__call__

    def interrupted(self, batch):
        if self.steps == step:
            raise KeyboardInterrupt
        return call(self, batch)

    arguments = quick(bert_folder, tmp_path / "out", "--train-file", files / "train.csv")
    with monkeypatch.context() as context:
        context.setattr(FastStep, "__call__", interrupted)
        code, _, err = run(*arguments, "--overwrite")
    assert code == 130
    if step:
        assert "--resume in place of --overwrite" in err
        assert run(*arguments, "--resume")[0] == 0
    else:
        assert "nothing was saved" in err and not (tmp_path / "out").exists()


def test_a_damaged_run_is_not_resumed(run, bert_folder, files, tmp_path):
    out = tmp_path / "out"
    arguments = quick(bert_folder, out, "--train-file", files / "train.csv")
    assert run(*arguments)[0] == 0
    model, settings = (out / "model.safetensors"), (out / "settings.json")
    whole = model.read_bytes()
    model.write_bytes(whole[:100])
    refused(run(*arguments, "--resume"), model)
    model.unlink()
    refused(run(*arguments, "--resume"), model)
    model.write_bytes(whole)
    settings.write_text("[]")
    refused(run(*arguments, "--resume"), settings, "JSON object")


def test_checkpoints_that_cannot_be_trusted_are_refused(
    run, trained, rte_folder, roberta_folder, tmp_path
):
    good = (trained / "model.safetensors").read_bytes()
    path = tmp_path / "model.safetensors"
    data = ("--data-dir", rte_folder)

    refused(run("evaluate", tmp_path / "none.safetensors", *data), "does not exist")
    path.write_bytes(good[: len(good) // 2])
    refused(run("evaluate", path, *data), path, "cut short")
    path.write_bytes(good[:-3] + bytes([good[-3] ^ 1]) + good[-2:])
    refused(run("predict", path, *data, "--output", tmp_path), path, "altered")
    path.write_bytes(pickle.dumps({"weight": [1.0]}))
    refused(run("merge", path, tmp_path / "merged"), path, "pickle")
    torch.save({"weight": torch.ones(2)}, path)
    refused(run("inspect", path), path, "pickle")
    path.write_bytes(good)
    refused(run("evaluate", path, *data, "--base", roberta_folder), "BertForSequence")
    given = ("--file", rte_folder / "RTE" / "dev.tsv", "--split", "foo")
    refused(run("evaluate", path, *given), "foo", "train, validation, test")
    assert not (tmp_path / "merged").exists()


def test_another_base_is_refused_by_name_and_fingerprint_unless_told(
    run, trained, rte_folder, bert_folder, tmp_path
):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    other = tmp_path / "other-bert"
    model = AutoModelForSequenceClassification.from_pretrained(bert_folder)
    with torch.no_grad():
        model.bert.encoder.layer[1].attention.self.query.weight[0, 0] += 1
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(bert_folder).save_pretrained(other)
    arguments = ("evaluate", trained, "--data-dir", rte_folder, "--base", other)
    refused(run(*arguments), bert_folder, other, "fingerprint", "--any-base")
    assert run(*arguments, "--any-base")[0] == 0


def test_a_checkpoint_is_not_used_for_a_task_of_other_labels(run, trained, tmp_path):
    folder = tmp_path / "CoLA"
    folder.mkdir()
    (folder / "dev.tsv").write_text("gj04\t1\t\tThe plot was good.\n")
    refused(
        run("evaluate", trained, "--task", "cola", "--data-dir", tmp_path), "cola", "entailment"
    )


def test_image_models_select_but_cannot_be_trained_on_text(run, files, bert_folder, tmp_path):
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    config.save_pretrained(tmp_path / "vit")
    arguments = quick(tmp_path / "vit", tmp_path / "out", "--train-file", files / "train.csv")
    refused(run(*arguments), "vit")


def test_settings_of_evaluate_and_predict_are_checked(run, trained, rte_folder, tmp_path):
    evaluate = ("evaluate", trained, "--data-dir", rte_folder)
    refused(run(*evaluate, "--precision", "fp64"), "fp64", "fp32, bf16")
    refused(run(*evaluate, "--max-length", "0"), "max-length", "0")
    refused(run(*evaluate, "--max-length", "5000"), "5000", "128")
    refused(run(*evaluate, "--split", "dev"), "dev", "train, validation, test")
    refused(run(*evaluate, "--task", "rte", "--file", "x.csv"), "not both")
    refused(run(*evaluate, "--text-column", "text"), "of a file")
    refused(run("predict", trained, "--file", tmp_path / "no.csv", "-o", tmp_path), "no.csv")


def test_a_pair_model_takes_files_with_columns_of_any_name_and_without_labels(
    run, trained, tmp_path
):
    path = tmp_path / "new.jsonl"
    path.write_text(
        "".join(json.dumps({"one": a, "two": b, "label": 9}) + "\n" for a, b, _ in ROWS)
    )
    columns = ("--text-column", "one", "--text-column", "two")
    assert run("predict", trained, "--file", path, *columns, "-o", tmp_path)[0] == 0
    lines = (tmp_path / "files-test.tsv").read_text().splitlines()
    assert {line.split("\t")[1] for line in lines[1:]} <= {"entailment", "not_entailment"}


def test_columns_of_a_task_are_its_own(run, bert_folder, rte_folder, tmp_path):
    arguments = quick(bert_folder, tmp_path / "out", "--task", "rte", "--data-dir", rte_folder)
    refused(run(*arguments, "--label-column", "y"), "rte", "column")


def test_places_that_cannot_be_written_are_one_sentence(run, trained, files, bert_folder, tmp_path):
    taken = files / "train.csv"
    arguments = ("--train-file", taken)
    refused(run(*quick(bert_folder, taken / "x", *arguments)), taken, "cannot be an output folder")
    refused(run("merge", trained, taken / "x"), taken)
    refused(run("inspect", trained, "--output", taken / "x.png"), taken)
    refused(run("inspect", trained, "--output", tmp_path / "change"), "change", ".png, .svg")
    assert list(tmp_path.iterdir()) == []


def test_paths_may_look_like_markup(run, files, bert_folder, tmp_path):
    output = tmp_path / "a[/b]c[red]"
    code, out, _ = run(*quick(bert_folder, output, "--train-file", files / "train.csv"))
    assert code == 0 and str(output) in out.replace("\n", "")
    assert run("inspect", output)[0] == 0


def test_inspect_shows_models_of_other_fields(run, tmp_path):
    ViTConfig().save_pretrained(tmp_path / "vit")
    code, out, _ = run("inspect", "--model", tmp_path / "vit")
    assert code == 0 and "patch-embedding" in out and "final-layernorm" in out


def test_a_model_without_a_padding_token_pads_with_its_end_token(run, files, tmp_path, bert_folder):
    from transformers import AutoTokenizer, GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "gpt2")
    tokenizer = AutoTokenizer.from_pretrained(bert_folder)
    tokenizer.pad_token = None
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(tmp_path / "gpt2")
    run_folder = tmp_path / "run"
    arguments = quick(tmp_path / "gpt2", run_folder, "--train-file", files / "train.csv")
    code, out, err = run(*arguments)
    assert code == 0, err
    assert "query-key-value" in out
    assert run("evaluate", run_folder, "--file", files / "validation.csv")[0] == 0


def test_a_base_that_is_only_a_pickle_is_refused(run, files, bert_folder, tmp_path):
    import shutil

    from safetensors.torch import load_file

    folder = shutil.copytree(bert_folder, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    result = run(*quick(folder, tmp_path / "out", "--train-file", files / "train.csv"))
    refused(result, folder, "safetensors")


def test_the_module_runs_as_a_program_and_fails_with_2():
    command = [sys.executable, "-m", "bitfit_fast", "train", "--task", "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown task 'nonsense'")


def test_parity_says_so_and_writes_the_numbers(run, files, bert_folder, tmp_path):
    code, out, _ = run(
        "parity", "--model", bert_folder, "--train-file", files / "train.csv",
        "--steps", "2", "--batch-size", "4", "--max-length", "16", "--by-layer",
        "--output", tmp_path / "parity.json",
    )  # fmt: skip
    assert code == 0 and "parity: gradients in fp32 within" in out
    found = json.loads((tmp_path / "parity.json").read_text())
    assert found["failures"] == [] and len(found["losses"]["fast bf16"]) == 2


def test_a_batch_beyond_the_token_budget_ends_training(run, bert_folder, rte_folder, tmp_path):
    start = quick(bert_folder, tmp_path / "run", "--task", "rte", "--data-dir", rte_folder)
    code, _, err = run(*start, "--token-budget", "16,40")
    assert code == 2 and "a batch of 8 examples has" in err and "token budget is 40" in err
    assert not (tmp_path / "run").exists()
    code, _, err = run(*start, "--token-budget", "many")
    assert code == 2 and "whole numbers joined by commas, as in 1024,2048, not 'many'" in err
    code, _, err = run(*start, "--token-budget", "400", "--backend", "reference")
    assert code == 2 and "it has no token budget, and 400 is asked for" in err
    assert run(*start, "--token-budget", "400", "--no-graph")[0] == 0
