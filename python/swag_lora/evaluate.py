"""The rows that compare point estimates with the posterior, of a folder that `swag-lora fit` wrote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError

from .adapter_folder import AdapterFolder
from .data import Dataset
from .evaluator import Encoded, Evaluator, Sampling, labels_of
from .metrics import report
from .posterior import SwagPosterior
from .prediction import Prediction
from .tasks import Task

POINT_ESTIMATES = {"map": "MAP, last epoch", "map-best": "MAP, best epoch"}


def load_folder(
    folder: str | Path, model: str | None = None, batch_size: int = 32, show: bool = False
) -> tuple[Evaluator, SwagPosterior]:
    """The model at the posterior mean, and the posterior with the rank chosen, of a folder that `swag-lora fit` wrote.

    `model` replaces the base model that the folder names, which may have moved since.
    """
    task = Task.load(folder)
    task = task if model is None else task.with_model(model)
    tokenizer = task.tokenizer(folder)
    if not (Path(folder) / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{folder} has no adapter (adapter_config.json)")
    base, _ = task.base_model(tokenizer)
    try:
        peft_model = PeftModel.from_pretrained(base, str(folder))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"the adapter in {folder} does not fit {task.model}: {error}") from None
    peft_model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    posterior = SwagPosterior.from_pretrained(peft_model, folder)
    if task.rank is not None:
        posterior = posterior.truncated(task.rank)
    return Evaluator(task, peft_model, tokenizer, batch_size, show), posterior


def rows(
    folder: str | Path, evaluator: Evaluator, posterior: SwagPosterior, dataset: Dataset, sampling: Sampling
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The metrics on the test split, and on `oos_test` if there is one, of each saved point estimate, SWA and SWAG.

    Also how many rows each module computed for SWAG, see `SampledModel.rows_computed`.
    """
    test = evaluator.encode(dataset.split("test"))
    outside = evaluator.encode(dataset.splits["oos_test"]) if "oos_test" in dataset.splits else None
    labels = labels_of(test)
    # Before anything is computed: what is wrong with a budget or with a file to go on from shows here.
    predictors = {
        part: evaluator.prepared(posterior, encoded, sampling, part)
        for part, encoded in (("test", test), ("oos_test", outside))
        if encoded
    }

    def row(name: str, samples: int, predict: Callable[[Encoded, str, str], Prediction]) -> dict[str, Any]:
        ood = predict(outside, f"{name}, out of distribution", "oos_test") if outside else None
        inside = predict(test, name, "test")
        drawn = torch.as_tensor(inside.num_samples).double().mean().item()
        return {"name": name, "samples": samples, "samples_drawn": drawn, **report(inside, labels, ood)}

    def point(encoded: Encoded, title: str, part: str) -> Prediction:
        return evaluator.point(encoded, title)

    def sampled(encoded: Encoded, title: str, part: str) -> Prediction:
        prediction = evaluator.predict(encoded, predictors[part], title)
        computed.update(predictors[part].rows_computed)
        return prediction

    computed: Counter[str] = Counter()
    table = []
    for part, name in POINT_ESTIMATES.items():
        if (Path(folder) / part).is_dir():
            set_peft_model_state_dict(evaluator.model, AdapterFolder.load(Path(folder) / part).tensors)
            table.append(row(name, 1, point))
    posterior.load_mean()
    table.append(row("SWA (mean)", 1, point))
    most = "K=" if sampling.tolerance is None else "K up to "
    table.append(row(f"SWAG, {most}{sampling.samples}", sampling.samples, sampled))
    return table, dict(computed)
