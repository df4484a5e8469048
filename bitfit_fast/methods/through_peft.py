"""LoRA, (IA)^3, prefix and prompt tuning, made by PEFT, inside of an ordinary model.

PEFT is imported when a method needs it. What it adds is kept inside the model, which keeps its
class, its head and the lengths of its outputs, whatever the head is.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from ..additions import Addition
from ..errors import BitFitError
from .places import of_terms

__all__ = ["IA3", "Lora", "PrefixTuning", "PromptTuning"]

_NAME = "default"


def _peft(method: str) -> Any:
    try:
        import peft
    except ImportError:
        raise BitFitError(
            f"method '{method}' needs peft: pip install 'bitfit_fast[peft]'"
        ) from None
    return peft


def _family(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", type(model).__name__)


class _Injected(Addition):
    """What PEFT puts around linear layers, which keep their weights below `base_layer`."""

    #: Terms of the linear layers' biases, and of the layer in their stead where q, k, v are one.
    places: ClassVar[tuple[str, ...]] = ()
    fused: ClassVar[str] = "query-key-value"

    def __init__(self, method: str, options: Mapping[str, Any]) -> None:
        super().__init__(method, options)
        _peft(method)  # before a model is touched

    def config(self, peft: Any, targets: dict[str, list[str]]) -> Any:
        """Return PEFT's configuration for the linear layers `targets`, by term."""
        raise NotImplementedError

    def tuner(self, peft: Any) -> Any:
        """Return PEFT's class that does it."""
        raise NotImplementedError

    def attach(self, model: nn.Module, head: set[str]) -> None:
        """Let PEFT replace the linear layers."""
        peft = _peft(self.method)
        targets = of_terms(model, *self.places, self.fused)
        if targets[self.fused]:
            missing = [t for t in self.places if t not in ("query", "key", "value")]
        else:
            missing = list(self.places)
        if lacking := [term for term in missing if not targets[term]]:
            raise BitFitError(
                f"method '{self.method}' does not know the linear layers of the terms "
                f"{' and '.join(lacking)} in models of the family '{_family(model)}'"
            )
        grads = {name: p.requires_grad for name, p in model.named_parameters()}
        self._peft: Any = self.tuner(peft)(model, self.config(peft, targets), _NAME)
        for name, parameter in model.named_parameters():
            if (before := grads.get(self.base_name(name))) is not None:
                parameter.requires_grad_(before)

    def base_name(self, name: str) -> str:
        """Return the name without the layer that PEFT put in between."""
        return name.replace(".base_layer.", ".")

    def remove(self, model: nn.Module) -> None:
        """Put the linear layers back."""
        self._peft.unload()

    def fold(self, model: nn.Module) -> None:
        """Multiply out, and add to the weights."""
        self._peft.merge_and_unload()


class Lora(_Injected):
    """Low-rank changes of the query and value projections (Hu et al., ICLR 2022)."""

    marks: ClassVar[tuple[str, ...]] = (".lora_",)
    places: ClassVar[tuple[str, ...]] = ("query", "value")

    def config(self, peft: Any, targets: dict[str, list[str]]) -> Any:
        """Return the ranks and where they go."""
        names = [name for found in targets.values() for name in found]
        rank, alpha = self.options["rank"], self.options["alpha"]
        transposed = bool(targets[self.fused])
        return peft.LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=names, fan_in_fan_out=transposed
        )

    def tuner(self, peft: Any) -> Any:
        """Return PEFT's LoRA."""
        return peft.LoraModel


class IA3(_Injected):
    """Learned factors of keys, values and what enters the output projection (Liu et al. 2022)."""

    marks: ClassVar[tuple[str, ...]] = (".ia3_",)
    places: ClassVar[tuple[str, ...]] = ("key", "value", "output")

    def config(self, peft: Any, targets: dict[str, list[str]]) -> Any:
        """Return what is scaled, and where it is the input that is."""
        names = [name for found in targets.values() for name in found]
        return peft.IA3Config(
            target_modules=names,
            feedforward_modules=targets["output"],
            fan_in_fan_out=bool(targets[self.fused]),
        )

    def tuner(self, peft: Any) -> Any:
        """Return PEFT's (IA)^3."""
        return peft.IA3Model


#: What models call the keys and values of earlier tokens: transformers since 5.24, and before.
_PAST = ("cache", "past_key_values")


class _Prompted(Addition):
    """Vectors before the tokens, which PEFT makes and hooks hand to the base model.

    What the base model gives begins with the first real token, so a head of any kind sees the
    tokens that it is meant for.
    """

    marks: ClassVar[tuple[str, ...]] = ("peft_prompt.",)
    cannot_merge: ClassVar[str | None] = "what it puts before the tokens is no weight of the model"
    #: Arguments of which the base model must take one each, and what they are for.
    needs: ClassVar[dict[tuple[str, ...], str]] = {}

    def __init__(self, method: str, options: Mapping[str, Any]) -> None:
        super().__init__(method, options)
        _peft(method)  # before a model is touched
        self.tokens = self.options["tokens"]
        self._handles: list[Any] = []

    def config(self, peft: Any, base: Any) -> Any:
        """Return PEFT's configuration."""
        raise NotImplementedError

    def hooks(self, base: Any, prompt: _Prompt) -> list[Any]:
        """Let the base model see the vectors; return the handles of the hooks."""
        raise NotImplementedError

    def attach(self, model: nn.Module, head: set[str]) -> None:
        """Let PEFT make the vectors."""
        peft = _peft(self.method)
        base: Any = getattr(model, "base_model", model)
        takes = inspect.signature(base.forward).parameters
        needs = {("input_ids",): "tokens", ("attention_mask",): "a mask", **self.needs}
        for names, what in needs.items():
            if takes.keys().isdisjoint(names):
                raise BitFitError(
                    f"method '{self.method}' needs a model that takes {what} "
                    f"({' or '.join(names)}), and those of the family '{_family(model)}' do not"
                )
        grads = {name: p.requires_grad for name, p in model.named_parameters()}
        try:
            maker = peft.PeftModelForFeatureExtraction(base, self.config(peft, base), _NAME)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            reason = str(error).split("\n")[0]
            raise BitFitError(
                f"peft refuses method '{self.method}' for a {type(model).__name__}: {reason}"
            ) from None
        finally:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(grads[name])
        base.peft_prompt = maker.prompt_encoder[_NAME]
        self._handles = self.hooks(base, _Prompt(maker, self.tokens, list(takes)))

    def remove(self, model: nn.Module) -> None:
        """Take the vectors out."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        base: Any = getattr(model, "base_model", model)
        del base.peft_prompt


class _Prompt:
    """What hooks on a base model need to put `count` vectors before its tokens."""

    def __init__(self, maker: Any, count: int, arguments: list[str]) -> None:
        self.maker, self.count, self.arguments = maker, count, arguments

    def prefix(self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hand keys and values of every layer over, as if of tokens before."""
        kwargs, batch = self._with_mask(args, kwargs)
        name = next(name for name in _PAST if name in self.arguments)
        kwargs[name] = self.maker.get_prompt(batch)
        return (), kwargs

    def prompt(self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Put embeddings before those of the tokens."""
        kwargs, batch = self._with_mask(args, kwargs)
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            embeds = base.get_input_embeddings()(kwargs.pop("input_ids"))
        prompts = self.maker.get_prompt(batch).to(embeds.dtype)
        kwargs["inputs_embeds"] = torch.cat((prompts, embeds), 1)
        types = kwargs.get("token_type_ids")
        if types is not None:
            kwargs["token_type_ids"] = torch.cat((types.new_zeros(batch, self.count), types), 1)
        return (), kwargs

    def cut(self, base: Any, args: tuple[Any, ...], output: Any) -> Any:
        """Take the vectors' own outputs away again; the pooler reads the first token."""
        output.last_hidden_state = output.last_hidden_state[:, self.count :]
        if output.get("pooler_output") is not None:
            hidden, pooler = output.last_hidden_state, base.pooler
            # ALBERT's is a linear layer, other families' takes the first token itself
            output.pooler_output = (
                base.pooler_activation(pooler(hidden[:, 0]))
                if isinstance(pooler, nn.Linear)
                else pooler(hidden)
            )
        return output

    def _with_mask(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], int]:
        kwargs = {**dict(zip(self.arguments, args)), **kwargs}
        given = kwargs.get("input_ids")
        given = kwargs["inputs_embeds"] if given is None else given
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = torch.ones(given.shape[:2], dtype=torch.long, device=given.device)
        kwargs["attention_mask"] = torch.cat((mask.new_ones(len(mask), self.count), mask), 1)
        return kwargs, len(mask)


class PrefixTuning(_Prompted):
    """Learned keys and values in every layer (Li and Liang, ACL 2021).

    PEFT hands them over as the past of a model that generates; the tokens' positions come
    behind them.
    """

    needs: ClassVar[dict[tuple[str, ...], str]] = {_PAST: "keys and values of earlier tokens"}

    def config(self, peft: Any, base: Any) -> Any:
        """Return how many; PEFT reads the rest off the model's configuration."""
        return peft.PrefixTuningConfig(num_virtual_tokens=self.tokens)

    def hooks(self, base: Any, prompt: _Prompt) -> list[Any]:
        """Return the hook that hands them over."""
        return [base.register_forward_pre_hook(prompt.prefix, with_kwargs=True)]


class PromptTuning(_Prompted):
    """Learned embeddings before the tokens' (Lester et al., EMNLP 2021), begun as random words'."""

    needs: ClassVar[dict[tuple[str, ...], str]] = {("inputs_embeds",): "embeddings"}

    def config(self, peft: Any, base: Any) -> Any:
        """Return how many, and that words begin them."""
        return peft.PromptTuningConfig(
            num_virtual_tokens=self.tokens,
            prompt_tuning_init="SAMPLE_VOCAB",
            # what PEFT would read off the configuration, which not every family calls the same
            token_dim=base.get_input_embeddings().weight.shape[1],
            num_layers=base.config.num_hidden_layers,
            num_attention_heads=base.config.num_attention_heads,
        )

    def hooks(self, base: Any, prompt: _Prompt) -> list[Any]:
        """Return the hooks before and behind the base model."""
        return [
            base.register_forward_pre_hook(prompt.prompt, with_kwargs=True),
            base.register_forward_hook(prompt.cut),
        ]
