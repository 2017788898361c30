"""Run folders as the experiment leaves them, with predictions made of random logits."""

import json
import math

import torch
from safetensors.torch import save_file

from swag_lora import metrics
from swag_lora.experiment.methods import POOLED, TITLES
from swag_lora.prediction import Prediction

# How confident each method is, and how far its samples lie apart.
_SHARPNESS = {
    "map-last": 3.0,
    "map-best": 1.2,
    "temperature": 1.3,
    "swa": 2.2,
    "swag-diagonal": 2.2,
    "ensemble-best": 1.2,
}
_SPREAD = {"swag-diagonal": 0.2, "swag": 1.0, "mc-dropout": 0.5, "ensemble": 1.0, "ensemble-best": 1.0, "multiswa": 1.0}
POINTS = {"map-last", "map-best", "temperature", "swa"}
SCALES = [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0]


def write_run(
    folder,
    methods=tuple(TITLES),
    seeds=(0, 1),
    num_classes=4,
    test=120,
    ood=(("shifted", 60, True), ("out-of-scope", 50, False)),
    samples=4,
    noise_seed=0,
    scales=tuple(SCALES),
):
    """Methods see the same examples with logits of their own; returns the folder."""
    examples = {"test": _examples(num_classes, test, 1.2, True, 0)}
    for place, (name, count, labelled) in enumerate(ood):
        examples[name] = _examples(num_classes, count, 0.7 if labelled else 0.2, labelled, 1 + place)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "format": 1,
        "model": "/models/all-MiniLM-L6-v2",
        "data": {"name": "goemotions4", "labels": None, "splits": {"train": 2000, "val": 300, "test": test}},
        "ood": [{"name": name, "labelled": labelled, "examples": count} for name, count, labelled in ood],
        "seeds": list(seeds),
        "recipe": {"epochs": 15},
        "samples": samples,
        "scale": "auto",
        "rank": None,
        "methods": list(methods),
        "environment": {"torch": "2.13.0", "device": "cpu", "arithmetic": "bfloat16"},
    }
    (folder / "experiment.json").write_text(json.dumps(settings))
    for place, seed in enumerate(seeds):
        (folder / f"seed-{seed}").mkdir(exist_ok=True)
        (folder / f"seed-{seed}" / "selection.json").write_text(json.dumps(_selection(place, scales)))
    for method in methods:
        (folder / "predictions" / method).mkdir(parents=True, exist_ok=True)
        for seed in [None] if method in POOLED else seeds:
            members = len(seeds) if method in POOLED else 1
            write_prediction(folder, method, seed, members, 1 if _single(method) else samples, examples, noise_seed)
    return folder


def prediction_path(folder, method, seed):
    name = "all" if seed is None else f"seed-{seed}"
    return folder / "predictions" / method / f"{name}.safetensors"


def write_prediction(folder, method, seed, members, samples, examples, noise_seed=0):
    total = members * samples
    place = 1000 * noise_seed + 100 * (seed or 0) + list(TITLES).index(method)
    generator = torch.Generator().manual_seed(place)
    tensors, curve = {}, None
    for name, (logits, labels) in examples.items():
        own = logits + 0.7 * torch.randn(logits.shape, generator=generator)
        spread = _SPREAD.get(method, 1.0) if total > 1 else 0.0
        sampled = own + spread * torch.randn(total, *logits.shape, generator=generator)
        sampled = _SHARPNESS.get(method, 2.0) * sampled
        prediction = Prediction.from_logits(sampled)
        tensors |= {f"{name}/{key}": tensor for key, tensor in prediction.tensors().items()}
        tensors[f"{name}/labels"] = labels
        if name == "test" and samples > 2:
            counts = [2**power for power in range(1, int(math.log2(total)) + 1)]
            curve = _curve([Prediction.from_logits(sampled[:k]).log_probs for k in counts], labels, counts)
    told = {
        "method": method,
        "seed": seed,
        "samples": total,
        "members": members,
        "passes": total,
        "seconds": {name: 0.004 * total * len(labels) for name, (_, labels) in examples.items()},
        "scale": 2.0 + (seed or 0) if "swag" in method else None,
        "rank": 10 if "swag" in method and "diagonal" not in method else None,
        "temperature": 1.8 if method == "temperature" else None,
        "examples": {name: f"hash of {name} {len(labels)}" for name, (_, labels) in examples.items()},
        "curve": curve,
    }
    save_file(tensors, prediction_path(folder, method, seed), metadata={"json": json.dumps(told)})


def _examples(num_classes, count, margin, labelled, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (count,), generator=generator)
    logits = margin * torch.nn.functional.one_hot(labels, num_classes).float() * (1 + math.log(num_classes) / 3)
    logits = logits + torch.randn(logits.shape, generator=generator)
    return logits, labels if labelled else torch.full_like(labels, -1)


def _curve(log_probs, labels, counts):
    result = {"samples": counts}
    for key in ("accuracy", "nll", "ece"):
        result[key] = [getattr(metrics, key)(p, labels) for p in log_probs]
    return result


def _selection(place, scales):
    best = 4.0 if place % 2 else 2.0
    nll = [0.8 + 0.05 * place + 0.04 * (math.log2(max(s, 0.1) / best)) ** 2 for s in scales]
    return {
        "scales": list(scales),
        "nll": nll,
        "accuracy": [0.66 - 0.01 * place - 0.002 * max(0, math.log2(max(s, 0.1)) - 2) ** 2 for s in scales],
        "ece": [0.03 + 0.03 * abs(math.log2(max(s, 0.1) / (2 * best))) for s in scales],
        "scale": scales[nll.index(min(nll))],
        "rank": 10,
    }


def _single(method):
    return method in POINTS or method in {"ensemble", "ensemble-best", "multiswa"}
