"""What holds for every method: what moves, files, undoing, refusals."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import bitfit_fast
from bitfit_fast import Selection, Settings, load, merge, open_model, save, unload
from bitfit_fast.checkpoint import read, stored
from bitfit_fast.methods import METHODS, prepare, remove
from bitfit_fast.tensorfile import read_tensors, write_tensors
from bitfit_fast.training.run_folder import RunFolder

from ..conftest import refusal

ADDED = [name for name, method in METHODS.items() if method.kind is not None]
#: Those that have to be trained before there is something to save.
PHASED = {"diff-pruning"}
SETTINGS = Settings(max_steps=6, eval_every=1, batch_size=8, max_length=16, lr=1e-2)
BATCH = {
    "input_ids": torch.tensor([[1, 5, 9, 12, 2], [1, 7, 2, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
}
pytestmark = pytest.mark.filterwarnings("ignore::bitfit_fast.errors.BitFitWarning")


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, state):
    now = model.state_dict()
    return list(now) == list(state) and all(torch.equal(now[n], state[n]) for n in state)


def settle(model, move):
    """Bring a method to where its result can be saved."""
    extra = bitfit_fast.additions.addition(model)
    if extra is not None and not extra.settled:
        move(model)
        assert extra.advance(model, 5, 10)
    return model


@pytest.fixture
def trained(fresh, move, tmp_path):
    """Make a trained model and its file."""

    def make(method, **options):
        model = fresh()
        prepare(model, method, **options)
        move(settle(model, move))
        path = tmp_path / f"{method}.safetensors"
        save(model, path)
        return model, path

    return make


@pytest.mark.parametrize("method", ADDED)
def test_exactly_what_is_meant_trains(fresh, method):
    model = fresh()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    selection = prepare(model, method)
    assert selection.method == method == Selection.of(model).method
    extra = bitfit_fast.additions.addition(model)
    meant = {n for n, _ in model.named_parameters() if extra.owns(n) or n.startswith("classifier")}
    if method == "adapters":
        meant |= {n for n in before if "LayerNorm" in n and "layer." in n}
    assert set(selection.names) == meant
    assert (method in str(selection) and "gates" in selection.counts) or method not in PHASED
    own = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    # where a factor begins with zero, the other's gradient is zero at first
    for _ in range(2):
        optimizer.zero_grad()
        penalty = extra.penalty(model)
        loss = model.train()(**BATCH, labels=torch.tensor([0, 1])).loss
        (loss if penalty is None else loss + penalty).backward()
        gradients = {n for n, p in model.named_parameters() if p.grad is not None}
        assert gradients == meant
        optimizer.step()
    after = dict(model.named_parameters())
    assert all(not torch.equal(after[name], value) for name, value in own.items())
    remove(model)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    moved = {n for n in before if not torch.equal(after[n], before[n])}
    assert moved == {n for n in meant if n in before}


@pytest.mark.parametrize("method", ADDED)
def test_the_file_gives_the_same_bits_and_goes_without_a_trace(trained, fresh, logits, method):
    model, path = trained(method)
    base = fresh()
    before, untrained = state_of(base), logits(base)
    header = load(base, path)
    assert header.method == method and header.options["seed"] == 0
    assert torch.equal(logits(base), logits(model))
    assert not torch.equal(logits(base), untrained)
    twin = copy.deepcopy(base)
    load(base, path)  # once more, over itself
    assert torch.equal(logits(base), logits(model))
    unload(base)
    assert same(base, before)
    assert torch.equal(logits(base), untrained)
    assert type(base).__name__ == header.model_class
    assert torch.equal(logits(twin), logits(model))
    opened, _, _ = open_model(path)
    assert torch.equal(logits(opened), logits(model))
    assert list(read(path).tensors) == sorted(bitfit_fast.additions.base_name(model, n)
                                              for n in stored(model))  # fmt: skip


def test_one_file_is_loaded_over_another(trained, fresh, logits):
    base = fresh()
    before = state_of(base)
    files = [trained(method) for method in ("lora", "random-uniform")]
    for model, path in [*files, *reversed(files)]:
        load(base, path)
        assert torch.equal(logits(base), logits(model))
    unload(base)
    assert same(base, before)


def test_the_fingerprint_is_that_of_the_bare_base(fresh, trained):
    head = ["classifier.weight", "classifier.bias"]
    bare = bitfit_fast.fingerprint(fresh(), head)
    for method in ADDED:
        model, path = trained(method)
        if method != "adapters":  # which trains LayerNorms, too
            assert read(path).header.fingerprint == bare
            assert bitfit_fast.fingerprint(model, head) == bare


@pytest.mark.parametrize("method", ADDED)
def test_merging_gives_an_ordinary_model_or_says_why_not(trained, logits, tmp_path, method):
    model, path = trained(method)
    if METHODS[method].kind.cannot_merge:
        text = refusal(merge, path, tmp_path / "merged")
        assert f"the method '{method}', which cannot be merged: " in text
        assert not (tmp_path / "merged").exists()
        return
    merge(path, tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    exact = method not in ("lora", "ia3")  # whose product with the input comes in two parts
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=0 if exact else 1e-5)
    assert not any(METHODS[method].kind.owns(name) for name in merged.state_dict())


class Killed(Exception):
    pass


@pytest.mark.parametrize("method", ADDED)
def test_a_run_reports_itself_and_resumes_to_the_same_bits(
    fresh, bert_folder, data, tmp_path, monkeypatch, method
):
    def run(folder, resume=False):
        model = fresh()
        prepare(model, method, **({"gate_steps": 0.6} if method in PHASED else {}))
        tokenizer = bitfit_fast.load_tokenizer(str(bert_folder))
        return bitfit_fast.train(model, tokenizer, data, SETTINGS, folder, resume=resume)

    summary = run(tmp_path / "straight")
    assert summary["method"] == method and summary["backend"] == "reference"
    assert summary["options"]["seed"] == 0
    assert summary["parameters"]["trained"] == sum(summary["parameters"]["by_term"].values())
    assert summary["step_ms"] > 0 and summary["peak_memory_bytes"] > 0
    assert summary["file_bytes"] == (tmp_path / "straight" / "model.safetensors").stat().st_size
    if method in PHASED:
        assert summary["best"]["step"] > 4  # never one of the first phase

    keep = RunFolder.keep
    for last in (2, 5):  # in either phase

        def kill(self, rows, model, optimizer, progress, *rest, last=last):
            keep(self, rows, model, optimizer, progress, *rest)
            if progress.step == last:
                raise Killed

        folder = tmp_path / f"killed-{last}"
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(RunFolder, "keep", kill)
            run(folder)
        again = run(folder, resume=True)
        assert again["final"]["validation"]["loss"] == summary["final"]["validation"]["loss"]
        assert again["parameters"] == summary["parameters"]
        one, two = read(tmp_path / "straight"), read(folder)
        assert one.tensors.keys() == two.tensors.keys()
        assert all(torch.equal(tensor, two.tensors[n]) for n, tensor in one.tensors.items())


@pytest.mark.parametrize("head", ["ForTokenClassification", "ForQuestionAnswering"])
@pytest.mark.parametrize("method", METHODS)
def test_other_heads_train_too_and_see_the_same_tokens(build, method, head):
    model = build("Bert", head)
    shape = model(**BATCH)[0].shape
    selection = prepare(model, method)
    assert selection.method == method
    assert selection.counts["head"] == 66
    output = model.train()(**BATCH)
    assert output[0].shape == shape == ((2, 5, 2) if "Token" in head else (2, 5))
    output[0].sum().backward()
    # a loss without labels of the end of an answer leaves nothing of the base out
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(selection.names)


@pytest.mark.parametrize("prefix", ["Roberta", "DistilBert", "GPT2", "Albert"])
@pytest.mark.parametrize("method", ADDED)
def test_families_take_a_method_or_say_what_they_lack(build, move, prefix, method):
    model = build(prefix)
    before = state_of(model)
    lacking = {("DistilBert", "prefix-tuning"), ("Albert", "prefix-tuning")}
    if (prefix, method) in lacking:
        assert "take keys and values" in refusal(prepare, model, method).replace(
            "that takes", "take"
        )
        assert same(model, before) and all(p.requires_grad for p in model.parameters())
        return
    selection = prepare(model, method)
    model.train()(**BATCH, labels=torch.tensor([0, 1])).loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(selection.names)
    remove(model)
    heads = ("classifier", "score", "pre_classifier")
    now = model.state_dict()
    assert all(torch.equal(now[n], t) for n, t in before.items() if not n.startswith(heads))
    assert list(now) == list(before)


@pytest.mark.parametrize("method", ADDED)
def test_a_family_without_a_row_is_served_or_refused_in_a_sentence(build, method):
    model = build("FNet")
    before = state_of(model)
    if method in ("random-uniform", "random-row-col", "diff-pruning"):
        assert prepare(model, method).method == method
        model.train()(input_ids=BATCH["input_ids"], labels=torch.tensor([0, 1])).loss.backward()
        remove(model)
    else:
        text = refusal(prepare, model, method)
        assert f"method '{method}'" in text and "family 'fnet'" in text
        assert all(p.requires_grad for p in model.parameters())
    assert same(model, before)


def test_a_model_of_pictures_has_no_tokens(build):
    text = refusal(prepare, build("ViT", "ForImageClassification"), "prompt-tuning")
    assert text == (
        "method 'prompt-tuning' needs a model that takes tokens (input_ids), and those of the "
        "family 'vit' do not"
    )
    assert prepare(build("ViT", "ForImageClassification"), "lora").counts["lora"] > 0


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("loar", {}, "unknown method 'loar'; valid ones are bitfit, full, frozen, random-uniform"),
        ("lora", {"share": 0.1}, "method 'lora' does not take share; it takes rank, alpha"),
        ("bitfit", {"rank": 1}, "method 'bitfit' does not take rank; it has no options"),
        ("ia3", {"rank": 1}, "method 'ia3' does not take rank; it has no options"),
        ("lora", {"rank": 0}, "rank must be at least 1, not 0"),
        ("lora", {"rank": "many"}, "rank must be at least 1, not many"),
        ("lora", {"alpha": "much"}, "alpha must be above 0, not much"),
        ("diff-pruning", {"share": 1.5}, "share must be above 0 and at most 1, not 1.5"),
        ("diff-pruning", {"gate_steps": 1}, "gate-steps must be above 0 and below 1, not 1"),
        ("random-uniform", {"parameters": 16385}, "parameters must be at most 16384, the weights"),
        ("adapters", {"terms": "query"}, "terms and layers choose biases; method 'adapters' does"),
        ("lora", {"layers": "0"}, "terms and layers choose biases; method 'lora' does not"),
        ("lora", {"head": ["clasifier"]}, "no parameter of BertForSequenceClassification begins"),
    ],
)
def test_what_a_method_cannot_do_is_refused_and_nothing_changes(fresh, method, options, message):
    model = fresh()
    before = state_of(model)
    assert refusal(prepare, model, method, **options).startswith(message)
    assert same(model, before) and all(p.requires_grad for p in model.parameters())


def test_two_methods_do_not_mix(fresh, trained):
    model, _ = trained("lora")
    for call in (
        lambda: prepare(model, "adapters"),
        lambda: bitfit_fast.select(model),
        lambda: prepare(model, "full"),
        lambda: prepare(model, "frozen"),
    ):
        assert refusal(call).startswith("the model has what method 'lora' added to it; take a")
    assert "cannot be patched: method 'lora' changes" in refusal(bitfit_fast.patch, model)
    assert "method 'lora' changes what" in refusal(bitfit_fast.patch_encoder, model)
    assert Selection.of(model).method == "lora"


@pytest.mark.parametrize("backend", ["fast", "modules"])
def test_only_the_reference_takes_what_changes_the_layers(fresh, bert_folder, data, backend):
    from dataclasses import replace

    model = fresh()
    prepare(model, "random-uniform")
    tokenizer = bitfit_fast.load_tokenizer(str(bert_folder))
    text = refusal(bitfit_fast.train, model, tokenizer, data, replace(SETTINGS, backend=backend))
    assert "method 'random-uniform' changes what its layers compute; auto would take ref" in text


def test_a_file_of_before_there_were_options_is_read(fresh, tmp_path, logits, move):
    model = fresh()
    bitfit_fast.select(model)
    save(move(model), tmp_path / "new.safetensors")
    header, tensors = read_tensors(tmp_path / "new.safetensors", "checkpoint")
    del header["options"]
    write_tensors(tmp_path / "old.safetensors", header, tensors)
    base = fresh()
    assert load(base, tmp_path / "old.safetensors").options == {}
    assert torch.equal(logits(base), logits(model))


def altered(path, tmp_path, change):
    header, tensors = read_tensors(path, "checkpoint")
    change(header, tensors)
    write_tensors(tmp_path / "altered.safetensors", header, tensors)
    return tmp_path / "altered.safetensors"


@pytest.mark.parametrize(
    "holds", [None, "bitfit", "random-uniform", "diff-pruning", "adapters", "lora", "prefix-tuning"]
)
def test_a_file_that_does_not_fit_changes_nothing(trained, fresh, tmp_path, logits, holds):
    _, lora = trained("lora")
    _, random = trained("random-uniform")
    base = fresh()
    bare = state_of(base)
    if holds is not None:
        load(base, trained(holds)[1])
    before, computed, selection = state_of(base), logits(base), Selection.of(base)
    random_state = torch.get_rng_state()

    def unknown(header, tensors):
        header["method"] = "telepathy"

    def other_rank(header, tensors):
        header["options"]["rank"] = 4

    def no_rank(header, tensors):
        del header["options"]["rank"]

    def negative_rank(header, tensors):
        header["options"]["rank"] = -1

    def too_far(header, tensors):
        tensors[next(n for n in tensors if n.endswith("indices"))][-1] = 10**6

    def other_place(header, tensors):
        name = next(n for n in tensors if n.endswith("indices"))
        tensors["bert.encoder.layer.7.x.sparse_indices"] = tensors.pop(name)

    for path, change, message in (
        (lora, unknown, "of the method 'telepathy', which this version of bitfit_fast does not"),
        (lora, other_rank, "what it adds does not fit BertForSequenceClassification"),
        (lora, no_rank, "with options that lack 'rank'"),
        (lora, negative_rank, "; rank must be at least 1, not -1"),
        (random, too_far, "entries, fewer than saved"),
        (random, other_place, "has no linear layer bert.encoder.layer.7.x to add to"),
    ):
        assert message in refusal(load, base, altered(path, tmp_path, change))
        assert same(base, before)
        assert torch.equal(logits(base), computed)
        assert Selection.of(base) == selection
        assert torch.equal(torch.get_rng_state(), random_state)
    if holds is None:
        assert "nothing to unload" in refusal(unload, base)
    else:
        unload(base)
        assert same(base, bare)


def test_what_trains_is_there_after_a_file_that_does_not_fit(trained, fresh, move, tmp_path):
    def other_rank(header, tensors):
        header["options"]["rank"] = 4

    file = altered(trained("lora")[1], tmp_path, other_rank)
    for method in ADDED:
        model = fresh()
        selection = prepare(model, method)
        extra = bitfit_fast.additions.addition(model)
        extra.apply(move(model))
        before, settled = state_of(model), extra.settled
        refusal(load, model, file)
        assert same(model, before)
        assert Selection.of(model) == selection
        assert bitfit_fast.additions.addition(model).settled == settled


@pytest.mark.parametrize("place", ["_add", "align_weights", "_put"])
@pytest.mark.parametrize("holds", ["bitfit", "random-uniform"])
def test_an_interrupted_load_changes_nothing(trained, fresh, logits, monkeypatch, holds, place):
    from bitfit_fast import checkpoint

    base = fresh()
    bare = state_of(base)
    load(base, trained(holds)[1])
    before, computed = state_of(base), logits(base)
    path, usual = trained("adapters")[1], getattr(checkpoint, place)

    def interrupted(*arguments):
        monkeypatch.undo()
        usual(*arguments)
        raise KeyboardInterrupt

    def unloads(model):
        monkeypatch.undo()
        unload(model)
        monkeypatch.setattr(checkpoint, place, interrupted)  # of what is put in, not taken out

    monkeypatch.setattr(checkpoint, "unload", unloads)
    with pytest.raises(KeyboardInterrupt):
        load(base, path)
    assert same(base, before) and torch.equal(logits(base), computed)
    unload(base)
    assert same(base, bare)


@pytest.mark.parametrize("patch", [bitfit_fast.patch, bitfit_fast.patch_encoder])
def test_what_changes_the_layers_is_not_loaded_into_a_patched_model(trained, fresh, logits, patch):
    model = fresh()
    bitfit_fast.select(model)
    patch(model)
    before, computed = state_of(model), logits(model)
    for method in ADDED:
        text = refusal(load, model, trained(method)[1])
        assert text.startswith(f"the model is patched, and method '{method}' of ")
        assert same(model, before)
    assert torch.equal(logits(model), computed)
    bitfit_fast.unpatch(model)
    load(model, trained("lora")[1])


def test_what_is_not_settled_is_not_saved(fresh, tmp_path):
    model = fresh()
    prepare(model, "diff-pruning")
    assert "method 'diff-pruning' has not chosen what it keeps" in refusal(
        save, model, tmp_path / "file.safetensors"
    )
    assert not (tmp_path / "file.safetensors").exists()


def test_the_head_may_stay_as_it_is_or_be_named(fresh):
    model = fresh()
    assert "head" not in prepare(model, "random-uniform", head=False).counts
    remove(model)
    selection = prepare(model, "random-uniform", head=["bert.pooler", "classifier"])
    assert selection.counts["head"] == 66 + 32 * 33
    assert selection.head_parameters == 66 + 32 * 33


def test_a_named_head_is_what_stays_to_train(fresh):
    model = fresh()
    assert prepare(model, "frozen", head=["classifier.bias"]).names == ("classifier.bias",)
    selection = prepare(model, "frozen", head=["bert.pooler", "classifier"])
    assert selection.method == "frozen" and selection.head_parameters == 66 + 32 * 33
    full = prepare(model, "full", head=["bert.pooler", "classifier"])
    assert full.total == sum(p.numel() for p in model.parameters())
    assert full.method == "full" and full.head_parameters == 66 + 32 * 33
    without = prepare(model, "full", head=[])
    assert without == prepare(model, "full", head=False) and "head" not in without.counts
    assert "begins with 'telepathy'" in refusal(prepare, model, "full", head=["telepathy"])
    plain = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    assert prepare(plain, "frozen", head=["1."]).names == ("1.weight", "1.bias")


@pytest.mark.parametrize(
    ("terms", "named"),
    [
        ("query+intermediate", ["query", "intermediate"]),
        ("b_m2+b_q", ["query", "intermediate"]),
        ("m2", ["intermediate"]),
        ("query", ["query"]),
    ],
)
def test_the_papers_choices_of_biases_are_named_in_header_and_summary(
    fresh, bert_folder, data, tmp_path, terms, named
):
    model = fresh()
    selection = prepare(model, "bitfit", terms=terms)
    assert selection.method == "bitfit" and list(selection.terms) == named
    tokenizer = bitfit_fast.load_tokenizer(str(bert_folder))
    bitfit_fast.train(model, tokenizer, data, SETTINGS, tmp_path / "run")
    assert read(tmp_path / "run").header.terms == named
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["method"], summary["terms"]) == ("bitfit", named)
    assert "options" not in summary
