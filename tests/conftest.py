"""Small models that every test can build in milliseconds, and the real data where it is."""

import contextlib
import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

# read when triton and the hub's client are imported, which is below
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# what tests start would have as many threads as processors each, and spin waiting for their turn
os.environ["OMP_NUM_THREADS"] = "1"
# nor are the few graphs of a file worth processes that compile them
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from bitfit_fast import BitFitError, load_model, save, select
from bitfit_fast.kernels import library
from bitfit_fast.kernels._launch import INTERPRETED
from bitfit_fast.ops._backend import BACKEND_VARIABLE

# convolutions in fp32 are held to float64 as others are
torch.backends.cudnn.allow_tf32 = False
# tensors this small are done before a second thread has begun
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

WORDS = (
    *("the", "a", "plot", "acting", "was", "is", "good", "bad", "dull", "fine"),
    *("and", "but", "not", "very", "great", "poor", "it", "one", "two"),
)
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 130,
    # wide enough that the random model tells one word from another
    "initializer_range": 0.2,
}
LABELS = ["bad", "good"]
IDS = torch.tensor([[1, 5, 9, 12, 2], [1, 7, 2, 0, 0], [1, 20, 21, 22, 2]])
MASK = (IDS > 0).long()


def pytest_terminal_summary(terminalreporter, config):
    """Say so where whole models ran without the kernels that users' do on a CPU."""
    ran = not torch.cuda.is_available() and not config.option.collectonly
    if ran and (reason := library.unavailable()) is not None:
        terminalreporter.write_line(f"whole models ran PyTorch's operations: {reason}", yellow=True)


def tiny_tokenizer(cls: str, sep: str, pad: str, *, pairs: str, token_types: bool):
    """Return a whole-word tokenizer with BERT's or RoBERTa's special tokens."""
    special = [pad, cls, sep, "[UNK]"]
    vocab = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=pairs,
        special_tokens=[(token, vocab[token]) for token in (cls, sep)],
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    if not token_types:
        names.remove("token_type_ids")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token=pad,
        cls_token=cls,
        sep_token=sep,
        model_max_length=128,
        model_input_names=names,
    )


def tiny_bert(kind=BertForSequenceClassification, **changes):
    torch.manual_seed(0)
    return kind(BertConfig(**SMALL | {"vocab_size": 64} | changes))


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK).logits


def train(model, seed=0):
    """Move what trains, as a training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                step = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.1 * step.to(parameter.dtype))
    return model


def refusal(call, *arguments, **options):
    with pytest.raises(BitFitError) as info:
        call(*arguments, **options)
    text = str(info.value)
    assert "\n" not in text
    return text


#: Files whose tests take minutes, for which the others would wait if they came last.
LONG = (
    "kernels/test_compile.py",
    "test_benchmarks.py",
    "kernels/test_emulated.py",
    "test_demo.py",
    "study/test_runner.py",
)


def pytest_collection_modifyitems(items):
    """Let the longest files begin first."""
    here = Path(__file__).parent
    ranks = {here / name: rank for rank, name in enumerate(LONG)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


def pytest_collection_finish():
    """Leave what is imported out of garbage collections, which trainers ask for at every turn."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    """Let all of it be collected at the end, which libraries look at."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_interpreter(request, monkeypatch):
    """Let whole models run on a CPU as users' do, not in Triton's interpreter.

    Tests of single operations and kernels choose for themselves.
    """
    folder = request.path.relative_to(Path(__file__).parent).parts[0]
    if not torch.cuda.is_available() and folder not in ("kernels", "ops"):
        fast = library.unavailable() is None
        monkeypatch.setenv(BACKEND_VARIABLE, "native" if fast else "torch")


@pytest.fixture
def choose_backend(monkeypatch):
    """Let an implementation run, or skip the test where it cannot."""

    def choose(name):
        if name == "triton":
            pytest.importorskip("triton", reason="triton is installed on Linux only")
        if name == "native" and (reason := library.unavailable()):
            pytest.skip(reason)
        monkeypatch.setenv(BACKEND_VARIABLE, name)
        return name

    return choose


@pytest.fixture
def device(backend):
    """Where an implementation runs, which a fixture of the test's own folder chose."""
    return "cuda" if backend == "triton" and not INTERPRETED else "cpu"


@pytest.fixture
def saved():
    """Collect what autograd keeps."""

    @contextlib.contextmanager
    def collect():
        tensors = []

        def keep(tensor):
            tensors.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield tensors

    return collect


@pytest.fixture(scope="session")
def users_environment() -> dict[str, str]:
    """What a program finds that a user starts: no interpreter of Triton's, no choice of backend."""
    return {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", BACKEND_VARIABLE)}


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory) -> Path:
    """A saved BERT of two layers with random weights, and its tokenizer."""
    folder = tmp_path_factory.mktemp("bert") / "tiny-bert"
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(vocab_size=64, **SMALL)).save_pretrained(folder)
    pairs = "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"
    tiny_tokenizer("[CLS]", "[SEP]", "[PAD]", pairs=pairs, token_types=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def roberta_folder(tmp_path_factory) -> Path:
    """A saved RoBERTa of two layers; its tokenizer makes no token types."""
    folder = tmp_path_factory.mktemp("roberta") / "tiny-roberta"
    torch.manual_seed(0)
    config = RobertaConfig(vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, **SMALL)
    RobertaForSequenceClassification(config).save_pretrained(folder)
    pairs = "<s> $A </s> </s> $B </s>"
    tiny_tokenizer("<s>", "</s>", "<pad>", pairs=pairs, token_types=False).save_pretrained(folder)
    return folder


@pytest.fixture
def fresh(bert_folder):
    """Make the base model, with a head for two labels or others."""

    def make(labels=LABELS, folder=bert_folder, **options):
        return load_model(str(folder), labels, **options)

    return make


@pytest.fixture
def trained(fresh, tmp_path):
    """A trained model and its file."""
    model = fresh()
    select(model)
    path = tmp_path / "trained.safetensors"
    save(train(model), path)
    return model, path


@pytest.fixture(scope="session")
def in_lists():
    """Turn the tensors of a feature into the lists that tokenizers give."""
    return lambda feature: {
        key: value.tolist() if isinstance(value, torch.Tensor) else value
        for key, value in feature.items()
    }


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets; tests that need it skip where it is not set."""
    folder = os.environ.get("BITFIT_FAST_DATA")
    if not folder:
        pytest.skip("BITFIT_FAST_DATA does not name the folder of real data")
    return Path(folder)


@pytest.fixture(scope="session")
def two_ranks():
    """Run a program twice at once, told which of the two it is, and where they meet."""

    def run(*program, meeting):
        processes = [
            subprocess.Popen(
                [sys.executable, *program, str(rank), meeting],
                cwd=Path(__file__).parents[1],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            outputs = [process.communicate(timeout=60)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)

    return run


@pytest.fixture
def of_two_processes(tmp_path):
    """Check that two data-parallel processes, each with half of a batch, get the gradients of one.

    `patched` is the word of `modules/two_processes.py` for what `patch` patches.
    """
    if not hasattr(os, "fork") or not torch.distributed.is_available():
        pytest.skip("processes are forked, and torch's distributed part joins them")

    def check(model, inputs, patched, patch):
        model.save_pretrained(tmp_path)
        save_file(inputs, tmp_path / "inputs.safetensors")
        script = Path(__file__).parent / "modules" / "two_processes.py"
        run = subprocess.run(
            [sys.executable, script, tmp_path, patched],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        assert run.returncode == 0, run.stdout
        select(model)
        done = patch(model)
        model(**inputs).loss.backward()
        expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert expected and not expected.keys() & set(done.no_gradient)
        for rank in range(2):
            found = load_file(tmp_path / f"gradients-{rank}.safetensors")
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        return done

    return check
