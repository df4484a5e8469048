"""The demonstration and the script of the README's table, on a tiny model."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import bitfit_fast
from bitfit_fast import demo
from bitfit_fast.models.loading import DEFAULT_MODEL, locate

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.filterwarnings("ignore::bitfit_fast.errors.BitFitWarning")


@pytest.fixture(scope="module")
def glue_table():
    path = BENCHMARKS / "glue_table.py"
    spec = importlib.util.spec_from_file_location("glue_table", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["glue_table"] = module
    spec.loader.exec_module(module)
    return module


def test_the_demo_leaves_a_table_and_two_pictures(bert_folder, tmp_path, monkeypatch, capfd):
    arguments = ["demo", "--output", tmp_path, "--model", bert_folder, "--steps", 5]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    demo.main()
    out = capfd.readouterr().out
    for name in ("frozen", "BitFit", "full"):
        assert name in out
    for picture in ("learning_curves.png", "bias_change.png"):
        assert (tmp_path / picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert str(tmp_path / picture) in out
    summaries = json.loads((tmp_path / "comparison.json").read_text())["runs"]
    trained = {m: s["parameters"]["trained"] for m, s in summaries.items()}
    assert trained["frozen"] < trained["bitfit"] < trained["full"]


def test_the_default_model_is_a_real_bert_that_saves_and_loads(tmp_path):
    labels = ["negative", "positive"]
    model = bitfit_fast.load_model(DEFAULT_MODEL, labels)
    selection = bitfit_fast.select(model)
    assert selection.biases == 26_112
    tokenizer = bitfit_fast.load_tokenizer(DEFAULT_MODEL)
    batch = tokenizer(["the plot was hardly dull", "dreadful"], padding=True, return_tensors="pt")
    model(**batch, labels=torch.tensor([1, 0])).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter -= 0.1 * parameter.grad
        logits = model(**batch).logits
    bitfit_fast.save(model, tmp_path / "demo.safetensors")
    assert (tmp_path / "demo.safetensors").stat().st_size < 130_000
    fresh = bitfit_fast.load_model(DEFAULT_MODEL, labels, seed=1)
    header = bitfit_fast.load(fresh, tmp_path / "demo.safetensors")
    assert header.base == DEFAULT_MODEL
    with torch.no_grad():
        assert torch.equal(fresh(**batch).logits, logits)
    # the same bits in a model whose weights are still mapped from the file
    mapped = AutoModelForSequenceClassification.from_pretrained(locate(DEFAULT_MODEL)).eval()
    bitfit_fast.load(mapped, tmp_path / "demo.safetensors")
    with torch.no_grad():
        assert torch.equal(mapped(**batch).logits, logits)


def test_learning_rates_are_searched_on_a_part_of_the_training_set_only(glue_table):
    texts = tuple((f"sentence {i}",) for i in range(100))
    train = bitfit_fast.Split("train", texts, tuple(range(100)))
    validation = bitfit_fast.Split("validation", (("unseen",),), (0,))
    data = bitfit_fast.TaskData(
        "rte", ("a", "b"), ("accuracy",), {"train": train, "validation": validation}
    )
    held = glue_table.hold_back(data)
    assert len(held.splits["train"]) == 90
    assert len(held.splits["validation"]) == 10
    assert {*held.splits["train"].texts, *held.splits["validation"].texts} == set(texts)


def test_the_table_gives_mean_and_deviation_over_seeds(glue_table):
    rows = [
        {"task": "rte", "method": "bitfit", "seed": seed, "trained": 7, "scores": {"accuracy": a}}
        for seed, a in enumerate((0.5, 0.6, 0.7))
    ]
    table = glue_table.markdown(rows)
    assert "| BitFit | 7 | 60.0 ± 10.0 |" in table
    assert table.splitlines()[-1].endswith("| 3 |")
    assert "full" not in table


def test_a_run_of_the_table_is_done_once(glue_table, bert_folder, tmp_path, monkeypatch):
    folder = tmp_path / "data" / "RTE"
    folder.mkdir(parents=True)
    rows = [f"{i}\tthe plot\twas good\t{('not_', '')[i % 2]}entailment" for i in range(40)]
    for name in ("train", "dev"):
        text = "\n".join(["index\tsentence1\tsentence2\tlabel", *rows])
        (folder / f"{name}.tsv").write_text(text)
    monkeypatch.setattr(glue_table, "SEARCH_STEPS", 2)
    threads = torch.get_num_threads()
    try:
        job = glue_table.Job("rte", "bitfit", 1e-3, 0, search=True)
        where = (str(bert_folder), tmp_path / "data", tmp_path / "runs", "fp32")
        first = glue_table.run(job, *where)
    finally:
        torch.set_num_threads(threads)
    assert first["steps"] == 2
    assert glue_table.run(job, *where)["seconds"] == first["seconds"]
