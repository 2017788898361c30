"""What `swag-lora bench` times the strategies on: a model with LoRA and a synthetic posterior, and one case of the sweep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from . import plan
from .posterior import SwagPosterior
from .shapes import LinearSizes, Shape
from .twin import twin_of
from .weights import SampledWeights

SCALE, RANK = 0.5, 20


@dataclass(frozen=True)
class Adapted:
    """A model with LoRA and a synthetic posterior over it: `RANK` collections of a random walk of the adapters."""

    model: PeftModel
    lora: LoraConfig
    posterior: SwagPosterior
    sizes: LinearSizes
    random_layers: int

    @classmethod
    @torch.no_grad()
    def of(cls, shape: Shape, base: nn.Module, rank: int, targets: tuple[str, ...] | None, layers: int) -> Adapted:
        """LoRA on the last `layers` layers of a module tree that shares `base`'s tensors; `base` stays as it is."""
        sizes = LinearSizes.of(base)
        some = None if layers == sizes.layers else list(range(sizes.layers - layers, sizes.layers))
        lora = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=None if targets is None else list(targets),
            layers_to_transform=some,
        )
        model = _with_lora(shape, twin_of(base), lora).eval()
        random = [p for p in model.parameters() if p.requires_grad]
        for p in random:
            p.normal_(std=0.05)
        posterior = SwagPosterior(model, rank=RANK)
        for _ in range(RANK):
            for p in random:
                p.add_(torch.randn_like(p), alpha=0.02)
            posterior.collect()
        return cls(model, lora, posterior, sizes, layers)

    @property
    def sample_bytes(self) -> int:
        return self.posterior.layout.size * next(self.model.parameters()).dtype.itemsize


def lora_weights(shape: Shape, rank: int, targets: tuple[str, ...] | None) -> int:
    """How many weights LoRA has on all layers of a shape, counted without allocating them."""
    with torch.device("meta"):
        lora = LoraConfig(r=rank, target_modules=None if targets is None else list(targets))
        model = _with_lora(shape, shape.random_model(torch.float32), lora)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _with_lora(shape: Shape, model: Any, lora: LoraConfig) -> PeftModel:
    try:
        return get_peft_model(model, lora, autocast_adapter_dtype=False)
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"no LoRA on {shape.name}: {reason} (name the modules with --target-modules)") from None


@dataclass
class Case:
    """One cell of the sweep: K samples of one model on one batch. Weights are drawn once, when first asked for."""

    adapted: Adapted
    inputs: Mapping[str, Any]
    samples: int
    seed: int

    @cached_property
    def weights(self) -> SampledWeights:
        method = "antithetic" if self.antithetic else "iid"
        return self.adapted.posterior.draw(self.samples, self.seed, scale=SCALE, method=method)

    @property
    def antithetic(self) -> bool:
        return self.samples % 2 == 0

    @property
    def batch(self) -> int:
        return len(self.inputs["input_ids"])

    @property
    def key(self) -> tuple[int, int, int]:
        """K, B and T."""
        batch, length = self.inputs["input_ids"].shape
        return self.samples, batch, length

    @property
    def tokens(self) -> int:
        """Of one sample's rows."""
        return self.inputs["input_ids"].numel()

    def few(self, samples: int) -> Case:
        """The case of the first `samples` samples alone."""
        case = Case(self.adapted, self.inputs, samples, self.seed)
        drawn = self.weights
        case.weights = SampledWeights(
            drawn.layout, drawn.buffer[:samples], seed=drawn.seed, first=drawn.first, method=drawn.method
        )
        return case

    @property
    def samples_per_pass(self) -> int:
        group = 2 if self.antithetic else 1
        return min(self.samples, plan.samples_at_once(self.adapted.posterior.device, self.tokens, group))

    def hidden_bytes(self, samples: int) -> int:
        """Most bytes of a layer's activations while so many samples' rows pass."""
        # Query, key, value, attention, residual and the feed-forward's inside, before and after its activation.
        wide = getattr(self._config, "intermediate_size", None) or 4 * self._config.hidden_size
        return samples * self.tokens * (8 * self._config.hidden_size + 2 * wide) * self._size

    def logit_bytes(self, samples: int) -> int:
        """Of so many samples' logits and their softmax in float32."""
        classes = self._config.vocab_size if "logits_to_keep" in self.inputs else self._config.num_labels
        return samples * self.batch * classes * (self._size + 4)

    @property
    def _config(self) -> Any:
        config: Any = self.adapted.model.config
        return config.get_text_config()

    @property
    def _size(self) -> int:
        return next(self.adapted.model.parameters()).dtype.itemsize
