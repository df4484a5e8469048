"""Take two steps of a patched model in two processes, each with half of a batch.

`python two_processes.py FOLDER modules|encoder` reads a model's folder and `inputs.safetensors`
there, patches the one or the other, and writes what gradients each process ends with to
`gradients-0.safetensors` and `gradients-1.safetensors`.
"""

import multiprocessing
import sys

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from bitfit_fast import patch, patch_encoder, select

#: What is patched, by the command line's word for it.
PATCHES = {
    "modules": patch,
    "encoder": lambda model: patch_encoder(model, precision="fp32"),
}


def train(rank, folder, patched, model, inputs):
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    select(model)
    PATCHES[patched](model)
    wrapped = DistributedDataParallel(model)
    half = {name: t[2 * rank : 2 * rank + 2] for name, t in inputs.items()}
    for _ in range(2):  # a gradient that never came is missed at the second
        model.zero_grad(set_to_none=True)
        wrapped(**half).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    save_file(grads, f"{folder}/gradients-{rank}.safetensors")
    # were its reducer the last to hold the group, it would wait for the group's thread without
    # giving up the interpreter's lock, which that thread may need to finish the last message
    del wrapped
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, patched = sys.argv[1:]
    (name,) = transformers.AutoConfig.from_pretrained(folder).architectures
    model = getattr(transformers, name).from_pretrained(folder, attn_implementation="eager")
    inputs = load_file(f"{folder}/inputs.safetensors")
    # what takes long, the imports, is done once; no thread runs yet
    fork = multiprocessing.get_context("fork")
    arguments = folder, patched, model, inputs
    ranks = [fork.Process(target=train, args=(rank, *arguments)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))
