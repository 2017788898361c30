"""Pretrained models and their tokenizers, as transformers loads them; what fails is a `ValueError` of one line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING

PEFT_HEADS = ("classifier", "score")
"""Modules that PEFT takes for the head of a sequence classifier."""


def load_config(model: str) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the model {model}: {brief(error)}") from None


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name, with a padding token in any case."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer in {source}: {brief(error)}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_classifier(
    model: str, labels: Sequence[str] | None, seed: int, device: str | None = None
) -> tuple[nn.Module, list[str]]:
    """The model with a head for these classes, and the modules that its checkpoint does not hold.

    Without `labels` it gives one score: by its own multiple-choice head, else by the sequence-classification head with one
    label. What the checkpoint lacks is initialised with `seed`.

    Raises:
        ValueError: no such model, or its checkpoint has a head of another size.
    """
    own_head = labels is None and type(load_config(model)) in MODEL_FOR_MULTIPLE_CHOICE_MAPPING
    auto = AutoModelForMultipleChoice if own_head else AutoModelForSequenceClassification
    names = {i: name for i, name in enumerate(labels or ("score",))}
    heads = {} if own_head else {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    torch.manual_seed(seed)
    try:
        loaded, report = auto.from_pretrained(model, output_loading_info=True, device_map=device, **heads)
    except RuntimeError as error:
        wanted = "one score per choice" if labels is None else f"{len(labels)} classes"
        raise ValueError(f"{model} does not fit a task of {wanted}: {brief(error)}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the model {model}: {brief(error)}") from None
    fresh = {key.rpartition(".")[0] for key in report["missing_keys"]}
    if not fresh:
        fresh = {name for name, _ in loaded.named_children() if name in PEFT_HEADS}
    return loaded, sorted(fresh)


def brief(error: BaseException) -> str:
    """The message in one line, of at most 200 characters and a bit."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]} ..."
