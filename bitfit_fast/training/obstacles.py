"""What of a `transformers.Trainer` and its arguments stands in the way of a fast model."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer
from transformers.training_args import ParallelMode
from transformers.utils import is_sagemaker_mp_enabled

from ..encoder import hooks_on, refusal
from ..errors import listed

__all__ = ["capture_obstacle", "checkpoints", "encoder_obstacle", "manager"]

#: Methods of the trainer that run inside of a captured pass; another's may do anything.
_INSIDE = (
    "compute_loss",
    "compute_loss_context_manager",
    "autocast_smart_context_manager",
    "_prepare_input",
    "_prepare_inputs",
    "_prepare_context_parallel_inputs",
)


def manager(trainer: Any) -> str | None:
    """Return what else lays out the parameters, or None."""
    managers = {
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "FSDP": trainer.is_fsdp_enabled or trainer.is_fsdp_xla_enabled,
        "SageMaker's model parallelism": is_sagemaker_mp_enabled(),
        "a TPU": trainer.args.parallel_mode == ParallelMode.TPU,
        "its map of devices": trainer.is_model_parallel,
        "its sharding": getattr(trainer, "is_distributed_loading_by_transformers", False)
        or getattr(trainer.model, "_tp_size", None) is not None,
    }
    return next((name for name, there in managers.items() if there), None)


def encoder_obstacle(trainer: Any) -> str | None:
    """Return why the encoder cannot run as one operation, or None."""
    if trainer.args.n_gpu > 1:
        return "nn.DataParallel copies it; torchrun starts a process for each GPU instead"
    if trainer.neftune_noise_alpha is not None:
        return "NEFTune's noise depends on the padding"
    return refusal(trainer.model)


def checkpoints(args: Any) -> bool:
    """Return whether gradient checkpointing is asked for."""
    asked = getattr(args, "activation_checkpointing", None)
    return bool(args.gradient_checkpointing if asked is None else asked)


def capture_obstacle(trainer: Any, model: nn.Module) -> str | None:
    """Return why the passes of a model cannot be captured, or None."""
    args, kind = trainer.args, type(trainer)
    others = [
        name
        for name in _INSIDE
        if name in vars(trainer) or getattr(kind, name, None) is not getattr(Trainer, name, None)
    ]
    hooked = hooks_on(trainer.model)
    reasons = {
        f"the model is wrapped in {type(model).__name__}": model is not trainer.model,
        "compute_loss_func computes the loss": trainer.compute_loss_func is not None,
        "labels are smoothed": trainer.label_smoother is not None,
        f"the trainer has {listed(others)} of its own": others,
        f"there are hooks on {listed(hooked, 3)}": hooked,
        "gradients are scaled for fp16": args.fp16 or trainer.accelerator.scaler is not None,
        "there are several GPUs in one process": args.n_gpu > 1,
        "gradient checkpointing is asked for": checkpoints(trainer.args),
        "NEFTune adds noise": trainer.neftune_noise_alpha is not None,
        "Liger kernels are asked for": getattr(args, "use_liger_kernel", False),
        "torch_empty_cache_steps is set": args.torch_empty_cache_steps is not None,
        "debug is set": args.debug,
        "full determinism is asked for": args.full_determinism,
        "sequences are spread over devices": (
            getattr(trainer.accelerator, "parallelism_config", None) is not None
        ),
    }
    return next((reason for reason, there in reasons.items() if there), None)
