"""What a fit and its evaluation must agree on: the model, the classes, and how text becomes logits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING

from .data import Dataset, Example
from .forward import Forward

TASK_FILE = "task.json"

# A choice that an example does not have; exp(-1e4) is zero, and unlike -inf it gives no NaN in p log p.
_NO_CHOICE = -1e4
_PEFT_HEADS = ("classifier", "score")


@dataclass(frozen=True)
class Task:
    """Text classification, or multiple choice where `labels` is None (one score per choice).

    `scale` is the sample scale chosen for the posterior saved beside it; `seed` that of the fit, with which
    parameters that the checkpoint lacks are initialised.
    """

    model: str
    labels: tuple[str, ...] | None
    max_length: int = 128
    seed: int = 0
    scale: float = 0.5

    @classmethod
    def of(cls, model: str | Path, dataset: Dataset, max_length: int, seed: int) -> Task:
        task = cls(_absolute(model), dataset.labels, max_length, seed)
        task.config()
        return task

    def with_model(self, model: str | Path) -> Task:
        """The same task on a base model that lies elsewhere."""
        return replace(self, model=_absolute(model))

    @property
    def is_choice(self) -> bool:
        return self.labels is None

    def save(self, folder: str | Path) -> None:
        (Path(folder) / TASK_FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Task:
        """The task of a folder that `swag-lora fit` wrote."""
        path = Path(folder) / TASK_FILE
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"no folder {folder}")
        if not path.exists():
            raise FileNotFoundError(f"{folder} has no {TASK_FILE}: it is not a folder that `swag-lora fit` wrote")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            known = {field.name: values[field.name] for field in fields(cls)}
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a task: {type(error).__name__} {error}") from None
        known["labels"] = None if known["labels"] is None else tuple(known["labels"])
        return cls(**known)

    def check(self, dataset: Dataset) -> None:
        """Refuse data of the other kind; `data.load` has compared the class names already."""
        if dataset.is_choice != self.is_choice:
            kinds = {True: "multiple choice", False: "text classification"}
            raise ValueError(f"{dataset.name} is {kinds[dataset.is_choice]}, the model is for {kinds[self.is_choice]}")

    def config(self) -> PretrainedConfig:
        try:
            return AutoConfig.from_pretrained(self.model)
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot load the model {self.model}: {_brief(error)}") from None

    def tokenizer(self, folder: str | Path | None = None) -> PreTrainedTokenizerBase:
        """The model's tokenizer, or the one saved in `folder`, with a padding token in any case."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder or self.model)
        except (OSError, ValueError) as error:
            raise ValueError(f"no tokenizer in {folder or self.model}: {_brief(error)}") from None
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def base_model(self, tokenizer: PreTrainedTokenizerBase) -> tuple[nn.Module, list[str]]:
        """The pretrained model with a head for this task, and the modules that its checkpoint does not hold.

        Classification and models without a multiple-choice head of their own take the sequence-classification head,
        for multiple choice with one label.
        """
        try:
            own_head = self.is_choice and type(self.config()) in MODEL_FOR_MULTIPLE_CHOICE_MAPPING
            auto = AutoModelForMultipleChoice if own_head else AutoModelForSequenceClassification
            names = {i: name for i, name in enumerate(self.labels or ("score",))}
            heads = {} if own_head else {"id2label": names, "label2id": {name: i for i, name in names.items()}}
            torch.manual_seed(self.seed)
            model, report = auto.from_pretrained(self.model, output_loading_info=True, **heads)
        except RuntimeError as error:
            wanted = "one score per choice" if self.is_choice else f"{len(self.labels or ())} classes"
            raise ValueError(f"{self.model} does not fit a task of {wanted}: {_brief(error)}") from None
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot load the model {self.model}: {_brief(error)}") from None
        model.config.pad_token_id = tokenizer.pad_token_id
        fresh = {key.rpartition(".")[0] for key in report["missing_keys"]}
        if not fresh:
            fresh = {name for name, _ in model.named_children() if name in _PEFT_HEADS}
        return model, sorted(fresh)

    def peft_model(self, tokenizer: PreTrainedTokenizerBase, lora: LoraConfig) -> PeftModel:
        """A new LoRA adapter on the base model; modules that the checkpoint lacks, as the head, are trained whole."""
        model, fresh = self.base_model(tokenizer)
        if not self.is_choice:
            lora.task_type = TaskType.SEQ_CLS
            fresh = [name for name in fresh if name.split(".")[0] not in _PEFT_HEADS]
        lora.modules_to_save = fresh or None
        torch.manual_seed(self.seed)
        try:
            return get_peft_model(model, lora)
        except ValueError as error:
            raise ValueError(
                f"no LoRA on {self.model}: {_brief(error)} (name the modules with --target-modules)"
            ) from None

    def encode(self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """Token ids of each example's rows (one row, or one for each choice), with its label."""
        first = [e.text for e in examples for _ in e.choices or ("",)]
        second = [choice for e in examples for choice in e.choices] or None
        rows = tokenizer(first, second, truncation=True, max_length=self.max_length)
        encoded, start = [], 0
        for example in examples:
            stop = start + (len(example.choices) or 1)
            part = {name: values[start:stop] for name, values in rows.items()}
            encoded.append({**part, "label": example.label, "length": max(map(len, part["input_ids"]))})
            start = stop
        return encoded

    def collate(self, tokenizer: PreTrainedTokenizerBase, encoded: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """One batch: the model's inputs [rows, L], `labels` [B] and for multiple choice `sizes` [B]."""
        names = [name for name in encoded[0] if name not in ("label", "length")]
        rows = {name: [row for example in encoded for row in example[name]] for name in names}
        batch = dict(tokenizer.pad(rows, return_tensors="pt"))
        batch["labels"] = torch.tensor([example["label"] for example in encoded])
        if self.is_choice:
            batch["sizes"] = torch.tensor([len(example["input_ids"]) for example in encoded])
        return batch

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor], width: int | None = None) -> Tensor:
        """Class logits [B, C] of the model, [S, B, C] of a `SampledModel`.

        For multiple choice C is the largest number of choices in the batch, or `width`; choices that an example does
        not have get probability zero.
        """
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "sizes")}
        if not self.is_choice:
            return model(**inputs).logits
        if type(_config(model)) in MODEL_FOR_MULTIPLE_CHOICE_MAPPING:
            inputs = {name: value[:, None] for name, value in inputs.items()}
        scores = model(**inputs).logits.squeeze(-1)
        sizes = batch["sizes"]
        width = int(sizes.max()) if width is None else width
        there = torch.arange(width, device=sizes.device) < sizes[:, None]
        grouped = scores.new_full((*scores.shape[:-1], *there.shape), _NO_CHOICE)
        grouped[..., there] = scores
        return grouped


@dataclass(frozen=True)
class TaskForward(Forward):
    """How a collated batch goes through the model of a task; `width` is the number of classes, the most choices."""

    task: Task
    width: int | None = None

    def size(self, inputs: dict[str, Any]) -> int:
        return len(inputs["sizes"]) if self.task.is_choice else super().size(inputs)

    def select(self, inputs: dict[str, Any], examples: slice | Tensor) -> dict[str, Any]:
        if not self.task.is_choice:
            return super().select(inputs, examples)
        sizes = inputs["sizes"]
        chosen = torch.arange(len(sizes), device=sizes.device)[examples]
        of_example = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
        order = torch.cat([(of_example == i).nonzero()[:, 0] for i in chosen.tolist()] or [chosen])
        return {name: value[chosen if name == "sizes" else order] for name, value in inputs.items()}

    def logits(self, sampled: nn.Module, inputs: dict[str, Any]) -> Tensor:
        return self.task.logits(sampled, inputs, self.width)


def _absolute(model: str | Path) -> str:
    return str(Path(model).resolve() if Path(model).is_dir() else model)


def _config(model: nn.Module) -> Any:
    inner: Any = model
    while not hasattr(inner, "config"):
        inner = inner.model
    return inner.config


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]} ..."
