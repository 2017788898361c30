"""Multiple choice by scores: each choice of a question is a row of its own, and its one logit the class's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING

from .answer_head import NO_CHOICE, transformers_model


def score_logits(model: nn.Module, batch: Mapping[str, Tensor], width: int | None) -> Tensor:
    """Logits [B, C] from one row a choice, [S, B, C] of a `SampledModel`.

    `batch` has the rows of one example after the other, and their numbers as `sizes` [B]. C is `width`, or the largest
    number of choices; choices that an example does not have get probability zero.
    """
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "sizes")}
    if type(transformers_model(model).config) in MODEL_FOR_MULTIPLE_CHOICE_MAPPING:
        inputs = {name: value[:, None] for name, value in inputs.items()}
    scores = model(**inputs).logits.squeeze(-1)
    sizes = batch["sizes"]
    width = int(sizes.max()) if width is None else width
    there = torch.arange(width, device=sizes.device) < sizes[:, None]
    grouped = scores.new_full((*scores.shape[:-1], *there.shape), NO_CHOICE)
    grouped[..., there] = scores
    return grouped


def select_examples(inputs: dict[str, Any], examples: slice | Tensor) -> dict[str, Any]:
    """The rows and sizes of some examples of a batch, by a slice or by their indices."""
    sizes = inputs["sizes"]
    chosen = torch.arange(len(sizes), device=sizes.device)[examples]
    of_example = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
    order = torch.cat([(of_example == i).nonzero()[:, 0] for i in chosen.tolist()] or [chosen])
    return {name: value[chosen if name == "sizes" else order] for name, value in inputs.items()}
