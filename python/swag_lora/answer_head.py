"""Causal language models that answer with a letter: only the letters' rows of the output head are ever computed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from .examples import Example
from .patch import SampledModel
from .pretrained import brief
from .prompts import fill

NO_CHOICE = -1e4
"""The logit of a choice that an example does not have; exp(-1e4) is zero, and unlike -inf it gives no NaN in p log p."""


def letter_tokens(tokenizer: PreTrainedTokenizerBase, template: str, number: int) -> list[int]:
    """Token ids of the first `number` letters as they follow a prompt: " A" after "Answer:".

    Raises:
        ValueError: a letter that is no token of its own there, or two that are the same.
    """
    letters = ascii_uppercase[:number]
    prompt = fill(template, "letters", Example("?", -1, tuple(letters)))[0]
    before, *after = _plain_ids(tokenizer, [prompt, *(f"{prompt} {letter}" for letter in letters)])
    tokens: list[int] = []
    for letter, ids in zip(letters, after, strict=True):
        found = ids[len(before) :]
        if ids[: len(before)] != before or len(found) != 1 or found[0] in (*tokens, tokenizer.unk_token_id):
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path or type(tokenizer).__name__} gives the answer {letter!r} no "
                f"token of its own after the prompt ({tokenizer.convert_ids_to_tokens(found)}): end the prompt template "
                "otherwise, or take one score for each choice (--task scores)"
            )
        tokens += found
    return tokens


def prompt_rows(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_length: int
) -> dict[str, list[list[int]]]:
    """Token ids and masks of prompts, with the special tokens that the tokenizer puts at the beginning, none at the end.

    Of a prompt that is too long the beginning is cut off.
    """
    whole = tokenizer("A", return_special_tokens_mask=True)
    start = whole["input_ids"][: whole["special_tokens_mask"].index(0)]
    room = max_length - len(start)
    if room < 1:
        raise ValueError(f"max_length {max_length} leaves no room for a prompt after {len(start)} special tokens")
    rows = [start + ids[-room:] for ids in _plain_ids(tokenizer, prompts)]
    return {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}


def load(model: str, tokens: Sequence[int], device: str | None = None) -> tuple[PreTrainedModel, str]:
    """The causal language model of a folder or hub name with only these rows of its head, and the head's name.

    On the `device` "meta" its weights are not read.

    Raises:
        ValueError: no model, a checkpoint without the head, or a head that `keep_rows` refuses.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True, device_map=device)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the model {model}: {brief(error)}") from None
    core, report = loaded
    if report["missing_keys"]:
        raise ValueError(
            f"{model} is no whole language model, its checkpoint lacks {min(report['missing_keys'])}: take one score for "
            "each choice (--task scores)"
        )
    return core, keep_rows(core, tokens)


def keep_rows(model: PreTrainedModel, tokens: Sequence[int]) -> str:
    """Put a linear layer of only these rows in place of the model's output head; returns its name in the model.

    The layer ``[A, hidden]`` is a copy, no longer tied to the embeddings. What the model does to its logits after the
    head (softcapping, scaling) it does as before.

    Raises:
        ValueError: the head is not linear, or quantised.
    """
    head: Any = model.get_output_embeddings()
    linear = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    if not linear or type(head.weight.data) is not Tensor or not head.weight.is_floating_point():
        what = type(head.weight.data).__name__ if linear else type(head).__name__
        raise ValueError(
            f"the output head of {type(model).__name__} is a {what}, of which no rows can be taken: leave the head out "
            "of quantisation, or take one score for each choice (--task scores)"
        )
    name = next(name for name, module in model.named_modules() if module is head)
    rows = nn.Linear(
        head.in_features, len(tokens), head.bias is not None, device=head.weight.device, dtype=head.weight.dtype
    )
    with torch.no_grad():
        rows.weight.copy_(head.weight[tokens])
        if head.bias is not None:
            rows.bias.copy_(head.bias[tokens])
    rows.requires_grad_(head.weight.requires_grad)
    model.set_submodule(name, rows)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    for key in [key for key in model.all_tied_weights_keys if key.startswith(f"{name}.")]:
        del model.all_tied_weights_keys[key]
    return name


def letter_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits [B, A] of the letters after each prompt, [S, B, A] of a `SampledModel`.

    `batch` has prompts padded on the left, their `position_ids`, and `sizes` [B], the choices of each example.
    """
    takes = inspect.signature(type(transformers_model(model)).forward).parameters
    inputs: dict[str, Any] = {name: value for name, value in batch.items() if name in takes and name != "labels"}
    if "logits_to_keep" in takes:
        inputs["logits_to_keep"] = 1
    if "use_cache" in takes:
        inputs["use_cache"] = False
    logits = model(**inputs).logits[..., -1, :]
    there = torch.arange(logits.shape[-1], device=logits.device) < batch["sizes"][:, None]
    return logits.masked_fill(~there, NO_CHOICE)


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model within the wrappers of samples, adapters and parallel training."""
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        if isinstance(inner, PeftModel):
            inner = inner.get_base_model()
        else:
            inner = inner.model if isinstance(inner, SampledModel) else inner.module
    return inner


def _plain_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]
