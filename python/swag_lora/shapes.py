"""Models to time: named shapes with random weights, which take as long as trained ones, or the model of a folder."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    RobertaConfig,
)
from transformers.pytorch_utils import Conv1D

from . import memory

CLASSES = 8
"""Of the classification head of a named encoder."""

_ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_LLAMA_3 = {"vocab_size": 128256, "max_position_embeddings": 8192}

SHAPES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "minilm": (
        BertConfig,
        {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    ),
    "bert-base": (BertConfig, {}),
    "bert-large": (BertConfig, _LARGE),
    "roberta-base": (RobertaConfig, _ROBERTA),
    "roberta-large": (RobertaConfig, _ROBERTA | _LARGE),
    "gpt2": (GPT2Config, {}),
    "llama-2-7b": (LlamaConfig, {"max_position_embeddings": 4096}),
    "llama-2-13b": (
        LlamaConfig,
        {
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "max_position_embeddings": 4096,
        },
    ),
    "llama-3-8b": (LlamaConfig, _LLAMA_3 | {"intermediate_size": 14336, "num_key_value_heads": 8}),
}
"""What distinguishes each shape from its family's defaults in transformers, which are BERT-base, GPT-2 and Llama-2-7B."""


@dataclass(frozen=True)
class Shape:
    """A model that can be built: its configuration, and where its weights come from (a folder, or None for random)."""

    name: str
    config: PretrainedConfig
    folder: str | None = None

    @classmethod
    def named(cls, name: str, layers: int | None = None) -> Shape:
        """A shape of `SHAPES`, cut to its first `layers` layers."""
        if name not in SHAPES:
            raise ValueError(f"no shape is called {name!r}; known are {', '.join(SHAPES)}")
        family, values = SHAPES[name]
        return cls(name, family(**{**values, "num_labels": CLASSES}))._cut(layers)

    @classmethod
    def of_folder(cls, folder: str, layers: int | None = None) -> Shape:
        """The model that `folder` (or a hub name) holds, cut to its first `layers` layers."""
        try:
            config = AutoConfig.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot load the model {folder}: {' '.join(str(error).split())[:200]}") from None
        return cls(folder, config, folder)._cut(layers)

    def _cut(self, layers: int | None) -> Shape:
        if layers is None:
            return self
        if layers > self.layers:
            raise ValueError(f"{self.name} has {self.layers} layers, {layers} were asked for (--layers)")
        config = copy.deepcopy(self.config)
        config.num_hidden_layers = layers
        return Shape(self.name, config, self.folder)

    @property
    def layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def is_decoder(self) -> bool:
        """Whether it is timed as a language model, by the logits after the last token, and not as a classifier."""
        if self.folder is None:
            return isinstance(self.config, (GPT2Config, LlamaConfig))
        names = getattr(self.config, "architectures", None) or ()
        return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)

    @property
    def positions(self) -> int | None:
        """The longest sequence that the model's position embeddings take, None for no limit."""
        limit = getattr(self.config, "max_position_embeddings", None)
        if isinstance(self.config, RobertaConfig) and limit is not None:
            return limit - self.config.pad_token_id - 1  # RoBERTa counts positions from there
        return limit

    def parameters(self, layers: int) -> int:
        """How many parameters the model has with so many layers, counted without allocating them."""
        with torch.device("meta"):
            return sum(p.numel() for p in self._cut(layers).random_model(torch.float32).parameters())

    def check_memory(self, dtype: torch.dtype, device: torch.device, extra: int = 0) -> int:
        """The bytes of the model's weights, after looking whether they fit beside `extra` bytes.

        Raises:
            ValueError: they do not; it names what is needed, what is free, and how many layers fit.
        """
        one, two = self.parameters(1), self.parameters(2) if self.layers > 1 else 0
        each = max(two - one, 0) * dtype.itemsize
        needed, free = one * dtype.itemsize + (self.layers - 1) * each, memory.available(device)
        if needed + extra <= free:
            return needed
        fit = 1 + (free - extra - one * dtype.itemsize) // each if each else 0
        way_out = f"--layers {fit} fits" if fit >= 1 else "not even one layer fits"
        raise ValueError(
            f"{self.name} with {self.layers} layers needs {memory.text(needed)} for its {dtype_name(dtype)} weights "
            f"and {memory.text(extra)} to work, {memory.text(free)} of memory is free on {device}: {way_out}"
        )

    def build(self, dtype: torch.dtype, device: torch.device, seed: int) -> nn.Module:
        """The model in evaluation mode, frozen; random weights are a function of the seed and the device's type."""
        torch.manual_seed(seed)
        if self.folder is None:
            with device:
                model = self.random_model(dtype)
        else:
            try:
                model = self._auto.from_pretrained(self.folder, config=self.config, dtype=dtype).to(device)
            except (OSError, ValueError, RuntimeError) as error:
                raise ValueError(f"cannot load the model {self.folder}: {' '.join(str(error).split())[:200]}") from None
        return model.eval().requires_grad_(False)

    def batch(self, model: nn.Module, batch: int, length: int, device: torch.device, seed: int) -> dict[str, Any]:
        """Random tokens ``[batch, length]`` without padding; a decoder gives the logits of the last position alone."""
        vocabulary = self.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(vocabulary // 10, vocabulary, (batch, length), generator=generator).to(device)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.is_decoder:
            taken = inspect.signature(model.forward).parameters
            asked = {"logits_to_keep": 1, "use_cache": False}
            inputs |= {name: value for name, value in asked.items() if name in taken}
        return inputs

    def random_model(self, dtype: torch.dtype) -> nn.Module:
        """The model with random weights, on torch's default device of the moment."""
        try:
            return self._auto.from_config(copy.deepcopy(self.config), dtype=dtype)
        except ValueError as error:
            kind = "language model" if self.is_decoder else "classifier"
            raise ValueError(f"{self.name} has no {kind}: {' '.join(str(error).split())[:200]}") from None

    @property
    def _auto(self) -> Any:
        return AutoModelForCausalLM if self.is_decoder else AutoModelForSequenceClassification


@dataclass(frozen=True)
class LinearSizes:
    """Weights of a model's linear layers: `each` transformer layer's, which meet every token, and the `head`'s."""

    layers: int
    each: int
    head: int

    @classmethod
    def of(cls, model: nn.Module) -> LinearSizes:
        stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
        if not stacks:
            raise ValueError(f"{type(model).__name__} has no list of layers")
        stack = max(stacks, key=len)
        inside = _linear_weights(stack)
        return cls(len(stack), inside // len(stack), _linear_weights(model) - inside)


def _linear_weights(module: nn.Module) -> int:
    weights = [m.weight for m in module.modules() if isinstance(m, (nn.Linear, Conv1D))]
    return sum(weight.numel() for weight in weights)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
