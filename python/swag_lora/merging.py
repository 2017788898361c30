"""Whole models with given weights merged in, which transformers loads without PEFT."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .adapter_folder import AdapterFolder, BaseChange
from .layout import find_parameter
from .pretrained import brief
from .tasks import TASK_FILE, Task

_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_LETTERS = "head with rows for the answers' letters alone, which is no model that transformers loads"


def load_model(adapter: AdapterFolder, base_model: str, name: str) -> tuple[PeftModel, PreTrainedTokenizerBase | None]:
    """The base model with the adapter of a posterior's folder under `name`, and the tokenizer that lies in it, if any.

    The class is that of the task in ``task.json``; where there is none, that of ``task_type`` or ``auto_mapping`` in
    ``adapter_config.json``, with as many labels as the trained head has. A model that answers with letters gets its whole
    output head back.

    Raises:
        ValueError: the base model is quantised, its class is not known, its tensors have other shapes than the adapter's,
            its trained head has the letters' rows alone, or PEFT does not change its weights as it did in training.
    """
    change = BaseChange.of(adapter.config)
    if change is not None and not change.repeats:
        raise ValueError(
            f"{change.option} changed the weights of the base model in a way that PEFT does not repeat exactly: merge in "
            "the program that trained it, with export_samples(posterior, output, merge=True)"
        )
    _refuse_quantised(getattr(AutoConfig.from_pretrained(base_model), "quantization_config", None), base_model)
    folder = adapter.path
    tokenizer: Any = None
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder)
    task = Task.load(folder).with_model(base_model) if (folder / TASK_FILE).is_file() else None
    try:
        if task is None or task.kind == "letters":
            base = _whole_model(adapter, base_model, task)
        else:
            base, _ = task.base_model(tokenizer or task.tokenizer())
        return PeftModel.from_pretrained(base, str(folder), adapter_name=name).eval(), tokenizer
    except RuntimeError as error:
        raise ValueError(f"the adapter in {folder} does not fit {base_model}: {brief(error)}") from None


def write_merged(
    model: PeftModel, weights: Mapping[str, Tensor], folder: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> None:
    """Save `model` with the parameters in `weights` and its active adapter merged; `model` stays as it is.

    The update is added in the dtype of the base weight, so a model in 16 bits rounds it. Weights that merging leaves alone
    are not copied, unless `dtype` casts all.

    Raises:
        ValueError: the base model is quantised, a LoRA layer's weight is another layer's too, a LoRA layer has a bias and
            the layer under it none, or the output head has rows for the answers' letters alone.
    """
    _refuse_unmergeable(model)
    changed = [module for module in model.modules() if isinstance(module, LoraLayer)]
    own = {id(parameter) for module in changed if isinstance(module, nn.Module) for parameter in module.parameters()}
    own |= {id(find_parameter(model, name)) for name in weights}
    shared = {id(p): p for p in model.parameters() if id(p) not in own} if dtype is None else {}
    copied = copy.deepcopy(model, shared)
    with torch.no_grad():
        for name, value in weights.items():
            parameter = find_parameter(copied, name)
            if parameter is None:
                raise ValueError(f"the model has no parameter {name}")
            parameter.copy_(value)
    merged: Any = copied.merge_and_unload(safe_merge=True)
    merged = merged if dtype is None else merged.to(dtype)
    merged.save_pretrained(str(folder))


def _whole_model(adapter: AdapterFolder, base_model: str, task: Task | None) -> Any:
    trained = None if task is None else adapter.of_letters(task.letters)
    if trained is not None:
        raise ValueError(
            f"{trained} belongs to a {_LETTERS}: it runs through swag_lora alone, and to merge it fit again without "
            "--train-head and without LoRA on the head"
        )
    heads = [t for key in adapter.trained_modules if (t := adapter.tensors[key]).dim() == 2]
    kind = _class_of(adapter.config)
    labels = {"num_labels": len(heads[-1])} if heads and "Classification" in kind.__name__ else {}
    return kind.from_pretrained(base_model, **labels)


def rows_of_letters(model: PeftModel) -> int:
    """How many rows the model's output head has, if fewer than its vocabulary, as in a task of kind letters; else 0."""
    base: Any = model.get_base_model()
    if not isinstance(base, PreTrainedModel):
        return 0
    weight = getattr(base.get_output_embeddings(), "weight", None)
    vocabulary = getattr(base.config.get_text_config(), "vocab_size", None) or 0
    return len(weight) if isinstance(weight, Tensor) and len(weight) < vocabulary else 0


def _refuse_unmergeable(model: PeftModel) -> None:
    """Raises a ValueError that names the first LoRA layer whose update no plain layer in its place would hold."""
    base: Any = model.get_base_model()
    _refuse_quantised(getattr(getattr(base, "config", None), "quantization_config", None), "the base model")
    if rows_of_letters(model):
        raise ValueError(
            f"the model has a {_LETTERS}: unless it is trained, save the posterior and export the folder "
            "(`swag-lora export FOLDER --merge`), which puts the whole head back"
        )
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            layer: Any = module.get_base_layer()
            weight = getattr(layer, "weight", None)
            plain = isinstance(weight, Tensor) and type(weight.data) is Tensor and weight.is_floating_point()
            _refuse_quantised(None if plain else type(weight).__name__, name)
            # PEFT adds the update to the data of the weight, whoever else has it.
            others = [other for other in names.get(id(weight), ()) if not other.startswith(f"{name}.")]
            if others:
                raise ValueError(
                    f"the weight of {name}, which has LoRA, is tied to {others[0]}, and merged into the one the update "
                    "would change the other: export adapters instead, which keep them apart"
                )
            if getattr(layer, "bias", None) is None and any(map(module.lora_bias.get, module.active_adapters)):
                raise ValueError(
                    f"the LoRA of {name} has a bias (lora_bias) and the layer under it none, so that no merged model "
                    "holds it: export adapters instead"
                )


def _refuse_quantised(found: object, what: str) -> None:
    if found is not None:
        raise ValueError(
            f"{what} is quantised, and an update cannot be merged into it: export adapters instead, which are served on "
            "top of it, or name an unquantised copy of the base model with --model"
        )


def _class_of(config: Mapping[str, Any]) -> Any:
    name = _CLASSES.get(str(config.get("task_type")))
    if name is None:
        mapping = config.get("auto_mapping") or {}
        if str(mapping.get("parent_library", "")).startswith("transformers."):
            name = str(mapping.get("base_model_class"))
    kind = None if name is None else getattr(transformers, name, None)
    if kind is None:
        raise ValueError(
            "the adapter's configuration has no task_type by which to load its base model: load it yourself and call "
            "export_samples(SwagPosterior.from_pretrained(model, folder), output, merge=True)"
        )
    return kind
