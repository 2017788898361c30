"""SWAG over LoRA weights for PEFT and transformers: collect a posterior, draw named samples, predict with K in one pass."""

from swag_lora.compat import SWAG
from swag_lora.dropout import DropoutPosterior
from swag_lora.ensemble import Ensemble
from swag_lora.export import export_samples
from swag_lora.generation import Generation, generate
from swag_lora.imported import import_run
from swag_lora.likelihood import TokenLogProbs, log_probs
from swag_lora.mixture import Mixture
from swag_lora.patch import SampledModel
from swag_lora.posterior import SwagPosterior
from swag_lora.predict import Prediction, Predictor, predict
from swag_lora.trainer import SwagCallback
from swag_lora.weights import SampledWeights

__all__ = [
    "SWAG",
    "DropoutPosterior",
    "Ensemble",
    "Generation",
    "Mixture",
    "Prediction",
    "Predictor",
    "SampledModel",
    "SampledWeights",
    "SwagCallback",
    "SwagPosterior",
    "TokenLogProbs",
    "export_samples",
    "generate",
    "import_run",
    "log_probs",
    "predict",
]
