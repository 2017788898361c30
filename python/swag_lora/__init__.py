"""SWAG over LoRA weights for PEFT and transformers: collect a posterior, draw named samples, predict with K in one pass."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swag_lora.compat import SWAG
    from swag_lora.patch import SampledModel
    from swag_lora.posterior import SwagPosterior
    from swag_lora.predict import Prediction, Predictor, predict
    from swag_lora.trainer import SwagCallback
    from swag_lora.weights import SampledWeights

_HOME = {
    "SWAG": "compat",
    "Prediction": "predict",
    "Predictor": "predict",
    "SampledModel": "patch",
    "SampledWeights": "weights",
    "SwagCallback": "trainer",
    "SwagPosterior": "posterior",
    "predict": "predict",
}

__all__ = [
    "SWAG",
    "Prediction",
    "Predictor",
    "SampledModel",
    "SampledWeights",
    "SwagCallback",
    "SwagPosterior",
    "predict",
]


def __getattr__(name: str) -> object:
    # Names load on first use, so that the command line and the drop-in class do not wait for transformers.Trainer.
    if name not in _HOME:
        raise AttributeError(f"module 'swag_lora' has no attribute '{name}'")
    return getattr(import_module(f"swag_lora.{_HOME[name]}"), name)
