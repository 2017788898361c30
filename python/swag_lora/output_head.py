"""A sampled language model in two parts: its decoder, and its output head for some rows of the vocabulary at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from swag_kernels import sampled_lora

from .language_model import language_model
from .patch import SampledModel

Rows = slice | Tensor
"""Rows of the vocabulary: a range, or ids ``[A]``."""


def vocabulary_size(core: PreTrainedModel) -> int:
    """How many classes the model's output head has.

    Raises:
        TypeError: the head is not linear, so that it has no rows to compute alone.
    """
    return len(_linear(_active(core)).weight)


class SplitModel:
    """`SampledModel` with its output head taken apart, for logits of some tokens and some rows of the vocabulary.

    What the model does to its logits after the head (softcapping, scaling) happens as in the model, because its own
    forward runs around both parts; it has to be elementwise. The sampled model given is used up: its own forward no
    longer gives logits.

    Raises:
        TypeError: the head is not linear.
    """

    def __init__(self, model: nn.Module, sampled: SampledModel) -> None:
        core = language_model(sampled.model)
        head, decoder = core.get_output_embeddings(), core.get_decoder()
        self._sampled = sampled
        self._names = {id(p): n for n, p in model.named_parameters(remove_duplicate=False) if n in sampled.weights}
        self._layer = _active(core)
        self._linear = _linear(_active(language_model(model)))  # the twin's has no bias where that alone is random
        self._decode = decoder.forward
        self._output: Any = None
        self._given: Tensor | None = None
        self._rows: Rows = slice(None)
        decoder.forward = self._decoder_forward
        head.forward = self._head_forward

    def hidden(self, **inputs: Any) -> Tensor:
        """The decoder's last hidden states ``[S, B, T, H]``.

        Raises:
            TypeError: the model's forward does not call what it names as its decoder.
        """
        self._given = self._output = None
        self._sampled(**inputs)
        if self._output is None:
            name = type(language_model(self._sampled.model)).__name__
            raise TypeError(f"{name} does not run its get_decoder(), so its head has no rows of its own: use predict()")
        return self._output.last_hidden_state.unflatten(0, (self._sampled.num_samples, -1))

    def logits(self, hidden: Tensor, rows: Rows) -> Tensor:
        """Logits ``[S, n, rows]`` of hidden states ``[S, n, H]``, of which each is a token of its own."""
        self._given, self._rows = hidden, rows
        tokens = torch.zeros(1, hidden.shape[1], dtype=torch.int64, device=hidden.device)
        return self._sampled(input_ids=tokens).logits.squeeze(1)

    def _decoder_forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._given is None:
            self._output = self._decode(*args, **kwargs)
            return self._output
        return type(self._output)(last_hidden_state=self._given)

    def _head_forward(self, x: Tensor) -> Tensor:
        """The head's rows in use; one column of zeros while only the decoder is wanted."""
        if self._given is None:
            return x.new_zeros(*x.shape[:-1], 1)
        rows, layer = self._rows, self._layer
        y = self._base(x, rows)
        if not isinstance(layer, LoraLinear):
            return y
        adapter = layer.active_adapters[0]
        down, up = (self._samples(part[adapter].weight) for part in (layer.lora_A, layer.lora_B))
        dtype = torch.promote_types(down.dtype, up.dtype)
        scaling = layer.scaling[adapter]
        up = up[:, rows].to(dtype).contiguous()
        y = sampled_lora(x.to(dtype), down.to(dtype), up, scaling, y)
        if layer.lora_bias[adapter]:
            y = (y + scaling * self._samples(layer.lora_B[adapter].bias)[:, None, rows]).to(y.dtype)
        return y

    def _base(self, x: Tensor, rows: Rows) -> Tensor:
        weight, bias = self._linear.weight, self._linear.bias
        if id(weight) not in self._names:
            # As one matrix: on a view of rows of three axes `linear` would copy the weight for each sample.
            y = F.linear(x.flatten(0, 1), weight[rows]).unflatten(0, x.shape[:2])
        else:
            y = x @ self._samples(weight)[:, rows].to(weight.dtype).mT
        return y if bias is None else y + self._samples(bias)[:, None, rows].to(bias.dtype)

    def _samples(self, parameter: Any) -> Tensor:
        """A parameter's samples ``[S, *shape]``; its own value where it is not random."""
        name = self._names.get(id(parameter))
        if name is None:
            return parameter.expand(self._sampled.num_samples, *parameter.shape)
        return self._sampled.weights[name]


def _active(core: PreTrainedModel) -> nn.Module:
    """The output head, of a trained copy the active one."""
    head = core.get_output_embeddings()
    return head.modules_to_save[head.active_adapters[0]] if isinstance(head, ModulesToSaveWrapper) else head


def _linear(head: nn.Module) -> nn.Linear:
    linear = head.base_layer if isinstance(head, LoraLinear) else head
    if isinstance(linear, nn.Linear) and type(linear).forward is nn.Linear.forward and _has_rows(linear.weight):
        return linear
    weight = type(getattr(linear, "weight", None)).__name__
    raise TypeError(
        f"the output head is a {type(linear).__name__} with a {weight}, of which no rows can be computed alone: leave "
        "the head out of quantisation and of adapters other than LoRA, or use predict() for whole logits"
    )


def _has_rows(weight: Tensor) -> bool:
    """Whether rows can be taken out of it: not of every tensor that a quantised `nn.Linear` holds."""
    try:
        weight[:1]
    except NotImplementedError:
        return False
    return True
