"""Modules that compute with S samples of their weights at once: what they share, and LoRA layers.

A sampled form takes over the ``forward`` of one module of the twin model. Inputs lead with ``S * n`` rows, sample by
sample (`SampleAxis.split`); weights are ``[S, *shape]``. The result is what the module's own forward gives for each
sample's rows with that sample's weights set, up to rounding. Those of other modules are in `sampled_leaves`.
"""

from __future__ import annotations

from typing import Protocol, TypeGuard, cast

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from swag_kernels import sampled_lora, sampled_lora_linear

from .sample_axis import SampleAxis

_QUANTISED_LORA = frozenset({"bnb", "gptq", "awq", "eetq", "hqq", "aqlm"})


class SampledModule(Protocol):
    """A module's forward with S samples of its weights. ``parameters`` are the names it expects in `bind`."""

    parameters: frozenset[str]

    def bind(self, weights: dict[str, Tensor]) -> None:
        """Use these samples from now on: ``[S, *shape]`` for each name in ``parameters``."""

    def forward(self, x: Tensor) -> Tensor: ...


class Sampled:
    """What the sampled modules share: the module, its name for messages, and its samples."""

    def __init__(self, axis: SampleAxis, name: str, module: nn.Module, parameters: frozenset[str]) -> None:
        self.axis, self.name, self.module, self.parameters = axis, name, module, parameters
        self.weights: dict[str, Tensor] = {}
        self._own = dict(module.named_parameters())

    def bind(self, weights: dict[str, Tensor]) -> None:
        self.weights = {k: w.to(self._own[k].dtype) for k, w in weights.items()}

    def samples(self, parameter: str) -> Tensor:
        """The parameter's samples that pass through now, ``[S, *shape]``; the model's own value where not random."""
        if parameter in self.weights:
            return self.axis.of_lane(self.weights[parameter])
        own = self._own[parameter]
        return own.expand(1 if self.axis.lane is not None else self.axis.num_samples, *own.shape)


def features(x: Tensor) -> Tensor:
    """``[S, n, ..., features]`` as ``[S, M, features]``."""
    return x.flatten(1, -2)


def per_row(weight: Tensor, x: Tensor) -> Tensor:
    """``[S, *shape]`` shaped to broadcast against ``[S, n, ..., *shape]``."""
    return weight.view(len(weight), *(1,) * (x.dim() - weight.dim()), *weight.shape[1:])


def _is_plain(layer: nn.Module, dtype: torch.dtype) -> TypeGuard[nn.Linear]:
    """Whether a call of the layer is nothing but the linear map of its own tensors, in this dtype."""
    return (
        type(layer) is nn.Linear
        and not torch.is_autocast_enabled(layer.weight.device.type)
        and type(layer.weight) is nn.Parameter
        and layer.weight.dtype == dtype
        and "forward" not in vars(layer)
        and not (layer._forward_hooks or layer._forward_pre_hooks)
    )


class SampledLora(Sampled):
    """A PEFT LoRA layer on a linear map: the base layer once over all rows, each sample's update by `sampled_lora`.

    ``y_s = base(x_s) + scaling * (lora_B_s(lora_A_s(dropout(x_s))) + bias_s)``, in the base's dtype, where bias_s
    exists under ``lora_bias=True``. The update is computed in the dtype of the weights (of autocast, where it is on);
    a LoRA tensor that is not random is the model's own.

    A quantised base layer is only called, on the rows of all samples, and its weight never looked at. Where its rows
    depend on each other (bitsandbytes' 8-bit layers choose over the whole batch the columns that they keep in 16 bit),
    the batch is the rows of all samples.
    """

    module: LoraLinear

    def __init__(
        self, axis: SampleAxis, name: str, module: LoraLinear, parameters: frozenset[str], base_is_random: bool
    ) -> None:
        super().__init__(axis, name, module, parameters)
        self._adapter = module.active_adapters[0]
        self._a, self._b = f"lora_A.{self._adapter}.weight", f"lora_B.{self._adapter}.weight"
        self._base_is_random = base_is_random

    def bind(self, weights: dict[str, Tensor]) -> None:
        self.weights = dict(weights)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        module, axis, scaling = self.module, self.axis, self.module.scaling[self._adapter]
        base = module.base_layer(x, *args, **kwargs) if self._base_is_random else None
        rows = axis.split(x, self.name)
        A, B = self._factors(x.device.type)
        layer, dropout = module.base_layer, module.lora_dropout[self._adapter]
        drops = dropout.training and not isinstance(dropout, nn.Identity)
        if base is None and x.dtype == A.dtype and not (drops or args or kwargs) and _is_plain(layer, A.dtype):
            y = sampled_lora_linear(features(rows), layer.weight, layer.bias, A, B, scaling)
            y = y.unflatten(1, rows.shape[1:-1])
        else:
            if base is None:
                base = layer(rows.flatten(0, 1), *args, **kwargs)
            base = base.unflatten(0, (len(A) if self._base_is_random else len(rows), -1))[:, : rows.shape[1]]
            y = sampled_lora(dropout(features(rows).to(A.dtype)), A, B, scaling, features(base))
            y = y.unflatten(1, base.shape[1:-1])
        if module.lora_bias[self._adapter]:
            bias = self.samples(f"lora_B.{self._adapter}.bias")
            y = (y + scaling * per_row(bias, y)).to(y.dtype)
        return axis.join(y, x)

    def _factors(self, device_type: str) -> tuple[Tensor, Tensor]:
        """A and B in the dtype of the update."""
        A, B = self.samples(self._a), self.samples(self._b)
        dtype = torch.promote_types(A.dtype, B.dtype)
        if torch.is_autocast_enabled(device_type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device_type)
        return A.to(dtype), B.to(dtype)


def sampled_lora_module(
    axis: SampleAxis, name: str, module: BaseTunerLayer, parameters: frozenset[str], base_is_random: bool
) -> SampledLora:
    """The sampled form of a PEFT layer whose own parameters (not its base layer's) are random.

    Raises:
        TypeError: not LoRA on a linear layer, quantised or not, or a LoRA variant such as DoRA.
    """
    kind = type(module)
    quantised = kind.__module__.removeprefix("peft.tuners.lora.") in _QUANTISED_LORA
    if not (isinstance(module, LoraLinear) or (isinstance(module, LoraLayer) and quantised)):
        raise TypeError(
            f"{name} is a {kind.__module__}.{kind.__name__}, which has no sampled form (LoRA on Linear, Conv1D and "
            "PEFT's quantised linear layers has): leave it out of the weights, or of target_modules"
        )
    adapter = module.active_adapters[0]
    if adapter in module.lora_variant or module.use_dora.get(adapter, False):
        variant = module.lora_variant.get(adapter)
        raise TypeError(
            f"{name} uses the LoRA variant {type(variant).__name__ if variant else 'DoRA'}, which has no sampled form: "
            "train plain LoRA or rsLoRA (use_dora=False and no other variant)"
        )
    return SampledLora(axis, name, cast(LoraLinear, module), parameters, base_is_random)
