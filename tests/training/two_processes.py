"""Train in two processes, and in one with batches twice as large.

`python two_processes.py MODEL FOLDER` writes to FOLDER what gradients each process had before each
optimiser step, and how many numbers it sent, in files `KIND-PROCESSES-RANK.pt`.
"""

import gc
import multiprocessing
import os
import sys

import torch
from torch import distributed, nn
from transformers import AutoModelForSequenceClassification, TrainerCallback, TrainingArguments

import bitfit_fast
from bitfit_fast import BitFitTrainer, Settings, patch_encoder, select
from bitfit_fast.data.batches import in_tensors, pad
from bitfit_fast.training.fast import FastStep
from bitfit_fast.training.settings import Plan

STEPS, BATCH = 4, 4


def examples(count):
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(count):
        ids = [1, *torch.randint(4, 20, (3 + i % 7,), generator=generator).tolist(), 2]
        found.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": i % 2})
    return found


DATA = examples(2 * STEPS * BATCH)


def build(folder, rank):
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    with torch.no_grad():
        model.classifier.weight.add_(rank)  # of which process 0's counts
    select(model)
    return model


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def values(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def step(folder, rank, processes, output, fixed=False):
    """Take steps of `FastStep`."""
    model = build(folder, rank).train()
    patch_encoder(model, precision="fp32")
    settings = Settings(batch_size=BATCH, max_steps=STEPS, epochs=1, lr=1e-3, grad_clip=0)
    one = FastStep(model, Plan.of(settings, "frozen", len(DATA)))
    if fixed:
        one.fixed = one.of_fixed_size(after=0)
    collate = pad(bitfit_fast.load_tokenizer(folder))
    size, found = 2 * BATCH // processes, []
    for number in range(STEPS):
        start = number * 2 * BATCH + rank * size
        rows = DATA[start : start + size]
        loss = one(collate(in_tensors([dict(row) for row in rows])))
        found.append(gradients(model))
    return {"gradients": found, "size": one.arena.gradients.numel(), "loss": torch.zeros(()),
            "wrapper": False, "last": loss}  # fmt: skip


def fixed_step(folder, rank, processes, output):
    """Take steps of which forward and backward pass are of a fixed size."""
    return step(folder, rank, processes, output, fixed=True)


class Note(TrainerCallback):
    def __init__(self):
        self.found = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **options):
        self.found.append(gradients(model))


def mean_loss(outputs, labels, num_items_in_batch=None):
    total = nn.functional.cross_entropy(outputs.logits, labels, reduction="sum")
    return total / num_items_in_batch


class Fixed(BitFitTrainer):
    """Takes passes of a fixed size on any device, and captures none of them."""

    def _captures(self):
        return True

    def _record(self, arena):
        return None

    def _replayed(self, *args):
        loss = super()._replayed(*args)
        self.replayed = getattr(self, "replayed", 0) + (loss is not None)
        return loss


def trainer(
    folder, rank, processes, output, kind=BitFitTrainer, loss=mean_loss, scaler=None, **options
):
    """Train with the trainer, two batches a step."""
    model, note = build(folder, rank), Note()
    optim = options.setdefault("optim", "adamw_torch")
    arguments = TrainingArguments(
        f"{output}/{optim}-{processes}", learning_rate=1e-3, num_train_epochs=1,
        per_device_train_batch_size=BATCH // processes, gradient_accumulation_steps=2,
        use_cpu=True, save_steps=2, logging_steps=1, report_to=[], disable_tqdm=True, **options,
    )  # fmt: skip
    one = kind(
        model, arguments, train_dataset=DATA, callbacks=[note], compute_loss_func=loss,
        processing_class=bitfit_fast.load_tokenizer(folder),
    )  # fmt: skip
    one.accelerator.scaler = scaler
    wrapped, sizes = [], []
    prepare = one._prepare_for_training

    def look(*args, **options):
        found = prepare(*args, **options)
        wrapped.append(isinstance(found[0], nn.parallel.DistributedDataParallel))
        sizes.append(one._trained and one._trained.arena.gradients.numel())
        return found

    one._prepare_for_training = look
    one.train()
    one.evaluate(DATA[:6])
    assert os.path.exists(f"{output}/{optim}-{processes}/checkpoint-2/bitfit.safetensors")
    losses = [row["loss"] for row in one.state.log_history if "loss" in row]
    return {"gradients": note.found, "size": sizes[0], "loss": torch.tensor(losses),
            "wrapper": wrapped[0], "replayed": getattr(one, "replayed", 0),
            "last": values(model)}  # fmt: skip


def wrapped(folder, rank, processes, output):
    """Train with an optimiser that has no arena, which leaves gradients to the wrapper."""
    return trainer(folder, rank, processes, output, optim="sgd")


def fixed_trainer(folder, rank, processes, output):
    """Train with passes of a fixed size, and the loss of the model."""
    return trainer(
        folder, rank, processes, output, Fixed, None, average_tokens_across_devices=False
    )


class Overflows(BitFitTrainer):
    """Has gradients that are infinite once in one process, and takes no norms."""

    def compute_loss(self, *args, **options):
        loss = super().compute_loss(*args, **options)
        overflows = self.state.global_step == 1 and self.args.process_index == 0
        return loss * torch.inf if overflows else loss

    def _get_grad_norm(self, *args, **options):
        return torch.zeros(())


def scaled(folder, rank, processes, output):
    """Train with a gradient scaler, which leaves out steps whose gradients are not finite."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    return trainer(folder, rank, processes, output, Overflows, scaler=scaler, max_grad_norm=0.0)


def run(folder, output, rank, processes):
    torch.set_num_threads(1)
    if processes > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": "0",
        }  # fmt: skip
        distributed.init_process_group(
            "gloo", init_method=f"file://{output}/meet", rank=rank, world_size=processes
        )
    sent, send = [], distributed.all_reduce

    def all_reduce(tensor, *args, **options):
        sent.append(tensor.numel())
        return send(tensor, *args, **options)

    distributed.all_reduce = all_reduce
    for kind in (step, fixed_step, trainer, wrapped, fixed_trainer, scaled):
        del sent[:]
        found = kind(folder, rank, processes, output) | {"messages": list(sent)}
        torch.save(found, f"{output}/{kind.__name__}-{processes}-{rank}.pt")
    if processes > 1:
        gc.collect()  # wrappers of trainers, which may wait for ever if they end after the group
        distributed.barrier()
        distributed.destroy_process_group()


if __name__ == "__main__":
    # what takes long, the imports, is done once; no thread runs yet
    fork = multiprocessing.get_context("fork")
    arguments = [(*sys.argv[1:3], rank, count) for count in (1, 2) for rank in range(count)]
    ranks = [fork.Process(target=run, args=one) for one in arguments]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))
