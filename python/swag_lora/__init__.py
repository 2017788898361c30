"""SWAG over LoRA weights for PEFT and transformers: collect a posterior, draw named samples, predict with K in one pass."""

from swag_lora.compat import SWAG
from swag_lora.generation import Generation, generate
from swag_lora.likelihood import TokenLogProbs, log_probs
from swag_lora.patch import SampledModel
from swag_lora.posterior import SwagPosterior
from swag_lora.predict import Prediction, Predictor, predict
from swag_lora.trainer import SwagCallback
from swag_lora.weights import SampledWeights

__all__ = [
    "SWAG",
    "Generation",
    "Prediction",
    "Predictor",
    "SampledModel",
    "SampledWeights",
    "SwagCallback",
    "SwagPosterior",
    "TokenLogProbs",
    "generate",
    "log_probs",
    "predict",
]
