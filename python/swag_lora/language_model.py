"""What likelihood and generation ask of a model, a batch of token ids and a number of samples, before any work."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

IGNORED = -100
"""The label of a position without one, as everywhere in transformers."""


def language_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model within `model`: a decoder with an output head over a vocabulary.

    Raises:
        TypeError: no such model; it names what is missing.
    """
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    name = type(core).__name__
    if not isinstance(core, PreTrainedModel):
        raise TypeError(f"{name} is no transformers model: a causal language model is needed")
    if core.config.is_encoder_decoder:
        raise TypeError(
            f"{name} is an encoder-decoder, whose encoder states are no part of the lanes: use a decoder-only model, or "
            "predict() for its logits"
        )
    if not core.can_generate() or core.get_output_embeddings() is None:
        raise TypeError(
            f"{name} is no causal language model (it has no head over the vocabulary, or sees later tokens): load the "
            "model with AutoModelForCausalLM"
        )
    return core


def check_tokens(core: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Refuse a batch that is not token ids ``[B, T]`` of the model's vocabulary, with a mask of 0 and 1 of that shape.

    Raises:
        ValueError: naming what does not fit; also a row without any token.
    """
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.is_floating_point():
        what = (
            f"{input_ids.dtype} {list(input_ids.shape)}" if isinstance(input_ids, Tensor) else type(input_ids).__name__
        )
        raise ValueError(f"input_ids must be integer token ids [B, T], got {what}")
    if not input_ids.numel():
        raise ValueError(f"input_ids {list(input_ids.shape)} is empty: at least one row of one token is needed")
    embedding: Any = core.get_input_embeddings()
    check_in_vocabulary(input_ids, len(embedding.weight), "input_ids")
    if attention_mask is None:
        return
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}, input_ids has {list(input_ids.shape)}: both are [B, T]"
        )
    if not attention_mask.bool().any(1).all():
        raise ValueError("attention_mask hides every token of a row: drop rows that are padding alone")


def check_in_vocabulary(ids: Tensor, size: int, name: str) -> None:
    """Refuse ids outside ``0 ... size - 1``."""
    low, high = ids.aminmax()
    if int(low) < 0 or int(high) >= size:
        wrong = int(low) if int(low) < 0 else int(high)
        raise ValueError(
            f"{name} has token id {wrong}, the model's vocabulary has ids 0 ... {size - 1}: a vocabulary that differs "
            "from the head's or the embedding's (the tokenizer of another model, or tokens added without "
            "resize_token_embeddings?)"
        )


def labels_to_predict(input_ids: Tensor, labels: Tensor | None, mask: Tensor, vocabulary: int) -> Tensor:
    """Labels ``[B, T]``, -100 wherever there is nothing to predict, or nothing to predict it from."""
    if labels is None:
        labels = input_ids.masked_fill(mask == 0, IGNORED)
    elif labels.shape != input_ids.shape:
        raise ValueError(
            f"labels have shape {list(labels.shape)}, input_ids {list(input_ids.shape)}: they are aligned, position by "
            "position, and shifted here"
        )
    seen = torch.cat([torch.zeros_like(mask[:, :1]), mask[:, :-1]], dim=1)
    targets = labels.masked_fill(seen == 0, IGNORED)
    given = targets[targets != IGNORED]
    if not given.numel():
        raise ValueError(
            "there is no label: every position is -100, padding, or the first token of its row, which has no prefix"
        )
    check_in_vocabulary(given, vocabulary, "labels")
    return targets


def answers_of_rows(answers: Tensor, labels: Tensor | None, batch: int, vocabulary: int) -> Tensor:
    """Answers as ``[B, A]``."""
    if labels is not None:
        raise ValueError("give either labels or answers: answers are about the token after the last one")
    if answers.dim() not in (1, 2) or answers.shape[-1] == 0 or (answers.dim() == 2 and len(answers) != batch):
        raise ValueError(f"answers have shape {list(answers.shape)}: expected token ids [A], or [{batch}, A]")
    if answers.is_floating_point():
        raise ValueError(f"answers are {answers.dtype}: expected integer token ids")
    check_in_vocabulary(answers, vocabulary, "answers")
    answers = answers.expand(batch, -1)
    ordered = answers.sort(-1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise ValueError("answers name one token twice for a row: candidates must begin with different tokens")
    return answers
