"""Kernels for Bayesian averaging over LoRA weights.

Four ops, each with the same name in every layer: :func:`collect_`, :func:`draw`, :func:`sampled_lora` (after a linear
layer, :func:`sampled_lora_linear`) and :func:`bayes_average_`. :func:`info` prints what is available here.
"""

from swag_kernels.average import AverageState
from swag_kernels.backend import backend, info
from swag_kernels.layout import BLOCK, arena_size, segment_table
from swag_kernels.ops import bayes_average_, collect_, draw, sampled_lora, sampled_lora_linear

__version__ = "0.1.0"

__all__ = [
    "BLOCK",
    "AverageState",
    "arena_size",
    "backend",
    "bayes_average_",
    "collect_",
    "draw",
    "info",
    "sampled_lora",
    "sampled_lora_linear",
    "segment_table",
]
