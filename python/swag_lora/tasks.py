"""What a fit and its evaluation must agree on: the model, the classes, and how text becomes logits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from . import answer_head, choice_scores, prompts
from .data import Dataset, Example
from .files import write_text
from .forward import Forward
from .pretrained import PEFT_HEADS, brief, load_classifier, load_config, load_tokenizer

TASK_FILE = "task.json"
LEAST_LETTERS = 5
"""Letters of a task at least, so that a shifted data set with five choices can be answered after training on fewer."""


@dataclass(frozen=True)
class Task:
    """Text classification, or multiple choice where `labels` is None.

    `scale` is the sample scale chosen for the posterior saved beside it, and `rank` how many of its deviations, the most
    recent ones, where that was chosen too; `seed` that of the fit, with which parameters that the checkpoint lacks are
    initialised.

    `kind` is "classification" of texts or pairs of texts; "scores", one score for each choice of a question; or
    "letters", a prompt that a causal language model answers with one of `letters` letters, whose logits at the prompt's
    last token are the classes. By default it follows from `labels`, without letters. `template` is the prompt as text,
    see `prompts`; None gives a tokenizer its segments as they are. `train_head` trains the letters' rows of the output
    head too, which otherwise stay as they are.
    """

    model: str
    labels: tuple[str, ...] | None
    max_length: int = 128
    seed: int = 0
    scale: float = 0.5
    rank: int | None = None
    kind: str = ""
    template: str | None = None
    letters: int = 0
    train_head: bool = False

    def __post_init__(self) -> None:
        if not self.kind:
            object.__setattr__(self, "kind", "scores" if self.labels is None else "classification")
        kinds = ("scores", "letters") if self.labels is None else ("classification",)
        if self.kind not in kinds:
            data = "multiple choice" if self.labels is None else "classification"
            raise ValueError(f"{data} data is a task of kind {' or '.join(kinds)}, not {self.kind!r}")
        if self.train_head and self.kind != "letters":
            raise ValueError(f"train_head is for tasks of kind letters; the head for {self.kind} is always trained")

    @classmethod
    def of(
        cls,
        model: str | Path,
        dataset: Dataset,
        max_length: int,
        seed: int,
        kind: str | None = None,
        template: str | Path | None = None,
        train_head: bool = False,
    ) -> Task:
        """The task of fitting a model to a data set; `template` is a file.

        Without a `kind`, causal language models answer multiple choice with letters, and all others score the choices.

        Raises:
            ValueError: no such model, a kind that does not go with the data or the model, or a template that does not
                fit, with its file and line.
        """
        task = cls(_absolute(model), dataset.labels, max_length, seed, kind=kind or "")
        config = type(load_config(task.model))
        causal = config in MODEL_FOR_CAUSAL_LM_MAPPING
        if kind is None and task.is_choice and causal and config not in MODEL_FOR_MASKED_LM_MAPPING:
            kind = "letters"
        # Their positions are counted from elsewhere, or behind an encoder.
        if kind == "letters" and (not causal or config in MODEL_FOR_MASKED_LM_MAPPING):
            raise ValueError(
                f"{model} is no causal language model, so it cannot answer with letters: take --task scores (kind)"
            )
        kind = kind or task.kind
        examples = [example for split in dataset.splits.values() for example in split]
        text = prompts.default(kind) if template is None else prompts.read(template, kind)
        if template is not None and text is not None and kind == "classification":
            prompts.check_pairs(text, examples, str(template))
        letters = max([LEAST_LETTERS, *(len(example.choices) for example in examples)]) if kind == "letters" else 0
        if letters > len(ascii_uppercase):
            raise ValueError(
                f"{dataset.name} has a question with {letters} choices, more than letters: take --task scores (kind)"
            )
        return replace(task, kind=kind, template=text, letters=letters, train_head=train_head)

    def with_model(self, model: str | Path) -> Task:
        """The same task on a base model that lies elsewhere."""
        return replace(self, model=_absolute(model))

    @property
    def is_choice(self) -> bool:
        return self.labels is None

    def save(self, folder: str | Path) -> None:
        write_text(Path(folder) / TASK_FILE, json.dumps(asdict(self), indent=1) + "\n")

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
            named = {field.name: values.get(field.name, field.default) for field in fields(cls)}
            missing = [name for name, value in named.items() if value is MISSING]
            if missing:
                raise KeyError(missing[0])
            named["labels"] = None if named["labels"] is None else tuple(named["labels"])
            return cls(**named)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is not a task: {type(error).__name__} {error}") from None

    def check(self, dataset: Dataset) -> None:
        """Refuse data of the other kind; `data.load` has compared the class names already."""
        if dataset.is_choice != self.is_choice:
            kinds = {True: "multiple choice", False: "text classification"}
            raise ValueError(f"{dataset.name} is {kinds[dataset.is_choice]}, the model is for {kinds[self.is_choice]}")
        for examples in dataset.splits.values():
            self._check_examples(examples, dataset.name)

    def _check_examples(self, examples: Sequence[Example], name: str) -> None:
        most = max((len(example.choices) for example in examples), default=0)
        if self.kind == "letters" and most > self.letters:
            raise ValueError(
                f"{name} has a question with {most} choices, the model answers with {self.letters} letters"
            )
        if self.kind == "classification" and self.template is not None:
            prompts.check_pairs(self.template, examples, f"{name} does not fit the task's prompt template")

    def tokenizer(self, folder: str | Path | None = None) -> PreTrainedTokenizerBase:
        """The model's tokenizer, or the one saved in `folder`, with a padding token in any case."""
        return load_tokenizer(folder or self.model)

    def base_model(self, tokenizer: PreTrainedTokenizerBase, device: str | None = None) -> tuple[nn.Module, list[str]]:
        """The pretrained model with a head for this task, and the modules that its checkpoint does not hold.

        Classification and models without a multiple-choice head of their own take the sequence-classification head,
        for multiple choice with one label. For letters it is the causal language model with their rows of its head, and
        the modules are its head where it is trained. On the `device` "meta" it has shapes and no weights.
        """
        if self.kind == "letters":
            tokens = answer_head.letter_tokens(tokenizer, self.template or "", self.letters)
            core, head = answer_head.load(self.model, tokens, device)
            core.config.pad_token_id = tokenizer.pad_token_id
            return core, [head] if self.train_head else []
        model, fresh = load_classifier(self.model, self.labels, self.seed, device)
        config: Any = model.config
        config.pad_token_id = tokenizer.pad_token_id
        return model, fresh

    def peft_model(self, tokenizer: PreTrainedTokenizerBase, lora: LoraConfig, device: str | None = None) -> PeftModel:
        """A new LoRA adapter on the base model; modules that the checkpoint lacks, as the head, are trained whole."""
        model, fresh = self.base_model(tokenizer, device)
        if self.kind == "letters":
            lora.task_type = TaskType.CAUSAL_LM
        elif self.kind == "classification":
            lora.task_type = TaskType.SEQ_CLS
            fresh = [name for name in fresh if name.split(".")[0] not in PEFT_HEADS]
        lora.modules_to_save = fresh or None
        torch.manual_seed(self.seed)
        try:
            return get_peft_model(model, lora)
        except ValueError as error:
            raise ValueError(
                f"no LoRA on {self.model}: {brief(error)} (name the modules with --target-modules)"
            ) from None

    def encode(self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """Token ids of each example's rows (one row, with scores one for each choice), with its label and choices."""
        self._check_examples(examples, "the data")
        first, second = prompts.segments(self.template, self.kind, examples)
        if self.kind == "letters":
            rows: Mapping[str, Any] = answer_head.prompt_rows(tokenizer, first, self.max_length)
        else:
            rows = tokenizer(first, second, truncation=True, max_length=self.max_length)
        encoded, start = [], 0
        for example in examples:
            stop = start + (len(example.choices) if self.kind == "scores" else 1)
            part = {name: values[start:stop] for name, values in rows.items()}
            length = max(map(len, part["input_ids"]))
            encoded.append({**part, "label": example.label, "choices": len(example.choices), "length": length})
            start = stop
        return encoded

    def collate(self, tokenizer: PreTrainedTokenizerBase, encoded: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """One batch: the model's inputs [rows, L], `labels` [B] and for multiple choice `sizes` [B], the choices.

        Letters are asked for behind the last token, so their prompts are padded on the left.
        """
        names = [name for name in encoded[0] if name not in ("label", "choices", "length")]
        rows = {name: [row for example in encoded for row in example[name]] for name in names}
        side = "left" if self.kind == "letters" else None
        batch = dict(tokenizer.pad(rows, padding_side=side, return_tensors="pt"))
        if self.kind == "letters":
            batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        batch["labels"] = torch.tensor([example["label"] for example in encoded])
        if self.is_choice:
            batch["sizes"] = torch.tensor([example["choices"] for example in encoded])
        return batch

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor], width: int | None = None) -> Tensor:
        """Class logits [B, C] of the model, [S, B, C] of a `SampledModel`.

        With scores C is the largest number of choices in the batch, or `width`, and with letters their number; choices
        that an example does not have get probability zero.
        """
        if self.kind == "letters":
            return answer_head.letter_logits(model, batch)
        if self.kind == "scores":
            return choice_scores.score_logits(model, batch, width)
        return model(**{name: value for name, value in batch.items() if name != "labels"}).logits


@dataclass(frozen=True)
class TaskForward(Forward):
    """How a collated batch goes through the model of a task; `width` is the largest number of choices, for scores."""

    task: Task
    width: int | None = None

    def size(self, inputs: dict[str, Any]) -> int:
        return len(inputs["sizes"]) if self.task.kind == "scores" else super().size(inputs)

    def select(self, inputs: dict[str, Any], examples: slice | Tensor) -> dict[str, Any]:
        if self.task.kind == "scores":
            return choice_scores.select_examples(inputs, examples)
        return super().select(inputs, examples)

    def logits(self, sampled: nn.Module, inputs: dict[str, Any]) -> Tensor:
        return self.task.logits(sampled, inputs, self.width)


def _absolute(model: str | Path) -> str:
    return str(Path(model).resolve() if Path(model).is_dir() else model)
