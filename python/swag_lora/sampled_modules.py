"""Modules that compute with S samples of their weights at once.

Each class here takes over the ``forward`` of one module of the twin model. Inputs lead with ``S * n`` rows, sample by
sample (`SampleAxis.split`); weights are ``[S, *shape]``. The result is what the module's own forward gives for each
sample's rows with that sample's weights set, up to rounding.
"""

from __future__ import annotations

from typing import Protocol, TypeGuard, cast

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from swag_kernels import sampled_lora, sampled_lora_linear

from .sample_axis import SampleAxis

_QUANTISED_LORA = frozenset({"bnb", "gptq", "awq", "eetq", "hqq", "aqlm"})
_BROADCAST_NORMS = ("RMSNorm", "T5LayerNorm", "DebertaLayerNorm")
_HALF = (torch.float16, torch.bfloat16)


class SampledModule(Protocol):
    """A module's forward with S samples of its weights. ``parameters`` are the names it expects in `bind`."""

    parameters: frozenset[str]

    def bind(self, weights: dict[str, Tensor]) -> None:
        """Use these samples from now on: ``[S, *shape]`` for each name in ``parameters``."""

    def forward(self, x: Tensor) -> Tensor: ...


class _Sampled:
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


def _features(x: Tensor) -> Tensor:
    """``[S, n, ..., features]`` as ``[S, M, features]``."""
    return x.flatten(1, -2)


def _per_row(weight: Tensor, x: Tensor) -> Tensor:
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


class SampledLora(_Sampled):
    """A PEFT LoRA layer on a linear map: the base layer once over all rows, each sample's update by `sampled_lora`.

    ``y_s = base(x_s) + scaling * (lora_B_s(lora_A_s(dropout(x_s))) + bias_s)``, in the base's dtype, where bias_s
    exists under ``lora_bias=True``. The update is computed in the dtype of the weights (of autocast, where it is on);
    a LoRA tensor that is not random is the model's own.
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
            y = sampled_lora_linear(_features(rows), layer.weight, layer.bias, A, B, scaling)
            y = y.unflatten(1, rows.shape[1:-1])
        else:
            if base is None:
                base = layer(rows.flatten(0, 1), *args, **kwargs)
            base = base.unflatten(0, (len(A) if self._base_is_random else len(rows), -1))[:, : rows.shape[1]]
            y = sampled_lora(dropout(_features(rows).to(A.dtype)), A, B, scaling, _features(base))
            y = y.unflatten(1, base.shape[1:-1])
        if module.lora_bias[self._adapter]:
            bias = self.samples(f"lora_B.{self._adapter}.bias")
            y = (y + scaling * _per_row(bias, y)).to(y.dtype)
        return axis.join(y, x)

    def _factors(self, device_type: str) -> tuple[Tensor, Tensor]:
        """A and B in the dtype of the update."""
        A, B = self.samples(self._a), self.samples(self._b)
        dtype = torch.promote_types(A.dtype, B.dtype)
        if torch.is_autocast_enabled(device_type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device_type)
        return A.to(dtype), B.to(dtype)


class SampledLinear(_Sampled):
    """`torch.nn.Linear` or transformers' `Conv1D`: ``y_s = x_s W_s^T + b_s``, weight and bias each random or not.

    Where only the bias is random, the layer runs once over all rows without its bias, so its weight is never touched.
    """

    module: nn.Linear | Conv1D

    def __init__(self, axis: SampleAxis, name: str, module: nn.Module, parameters: frozenset[str]) -> None:
        super().__init__(axis, name, module, parameters)
        self._transposed = isinstance(module, Conv1D)
        self._unbiased = module.forward
        if parameters == {"bias"} and not self._transposed:
            module.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.axis.split(x, self.name)
        if "weight" in self.weights:
            weight = self.samples("weight")
            weight = weight if self._transposed else weight.mT
            h = _features(rows).expand(len(weight), -1, -1)
            bias = None if self.module.bias is None else self.samples("bias").unsqueeze(1)
            y = torch.bmm(h, weight) if bias is None else torch.baddbmm(bias, h, weight)
            return self.axis.join(y.unflatten(1, rows.shape[1:-1]), x)
        y = torch.matmul(rows, self.module.weight) if self._transposed else self._unbiased(rows)
        return self.axis.join((y + _per_row(self.samples("bias"), y)).to(y.dtype), x)


class SampledNorm(_Sampled):
    """`torch.nn.LayerNorm` and `torch.nn.RMSNorm`: ``y_s = norm(x_s) * weight_s + bias_s``, rounded once."""

    module: nn.LayerNorm | nn.RMSNorm

    def forward(self, x: Tensor) -> Tensor:
        module = self.module
        rows = self.axis.split(x, self.name)
        h = rows.float() if rows.dtype in _HALF else rows
        if isinstance(module, nn.LayerNorm):
            y = F.layer_norm(h, module.normalized_shape, None, None, module.eps)
        else:
            y = F.rms_norm(h, module.normalized_shape, None, module.eps)
        if module.weight is not None:
            y = y * _per_row(self.samples("weight"), y)
        if getattr(module, "bias", None) is not None:
            y = y + _per_row(self.samples("bias"), y)
        if x.device.type == "cpu" or not torch.is_autocast_enabled(x.device.type):
            y = y.to(x.dtype)
        return self.axis.join(y, x)


class SampledBroadcast(_Sampled):
    """Norms of the model families (Llama's, Gemma's 1 + weight, T5's): their own forward, the parameters broadcast."""

    def __init__(self, axis: SampleAxis, name: str, module: nn.Module, parameters: frozenset[str]) -> None:
        super().__init__(axis, name, module, parameters)
        self._forward = module.forward
        for parameter in parameters:
            module.__dict__[parameter] = module._parameters.pop(parameter)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.axis.split(x, self.name)
        for parameter in self.parameters:
            self.module.__dict__[parameter] = _per_row(self.samples(parameter), rows)
        return self.axis.join(self._forward(rows), x)


class SampledEmbedding(_Sampled):
    """`torch.nn.Embedding`: row ``ids`` of each sample's own table ``[S, V, features]``."""

    def forward(self, ids: Tensor) -> Tensor:
        if ids.dim() < 2:
            raise ValueError(
                f"{self.name} was called on a tensor {list(ids.shape)} without a batch: leave it out of the weights"
            )
        rows = self.axis.split(ids, self.name)
        table = self.samples("weight")
        sample = torch.arange(len(table), device=ids.device).view(-1, *(1,) * ids.dim())
        return self.axis.join(table[sample, rows], ids)


def _own_forward(module: nn.Module, of: type[nn.Module]) -> bool:
    return isinstance(module, of) and type(module).forward is of.forward


def sampled_lora_module(
    axis: SampleAxis, name: str, module: BaseTunerLayer, parameters: frozenset[str], base_is_random: bool
) -> SampledLora:
    """The sampled form of a PEFT layer whose own parameters (not its base layer's) are random.

    Raises:
        TypeError: not LoRA on a linear layer, or a LoRA variant such as DoRA.
    """
    kind = type(module)
    quantised = kind.__module__.removeprefix("peft.tuners.lora.") in _QUANTISED_LORA
    if not (isinstance(module, LoraLinear) or (isinstance(module, LoraLayer) and quantised)):
        raise TypeError(
            f"{name} is a {kind.__module__}.{kind.__name__}, which has no sampled form (LoRA on Linear and Conv1D "
            "has): leave it out of the weights, or of target_modules"
        )
    adapter = module.active_adapters[0]
    if adapter in module.lora_variant or module.use_dora.get(adapter, False):
        variant = module.lora_variant.get(adapter)
        raise TypeError(
            f"{name} uses the LoRA variant {type(variant).__name__ if variant else 'DoRA'}, which has no sampled form: "
            "train plain LoRA or rsLoRA (use_dora=False and no other variant)"
        )
    return SampledLora(axis, name, cast(LoraLinear, module), parameters, base_is_random)


def sampled_leaf(axis: SampleAxis, name: str, module: nn.Module, parameters: frozenset[str]) -> SampledModule:
    """The sampled form of a module that holds random parameters itself.

    Raises:
        TypeError: a module type without a sampled form.
    """
    linear = _own_forward(module, nn.Linear) or _own_forward(module, Conv1D)
    if linear or (isinstance(module, nn.Linear) and parameters == {"bias"}):
        return SampledLinear(axis, name, module, parameters)
    if _own_forward(module, nn.LayerNorm) or _own_forward(module, nn.RMSNorm):
        return SampledNorm(axis, name, module, parameters)
    of_positions = any(part.startswith("rel") for part in name.split("."))
    if _own_forward(module, nn.Embedding) and module.max_norm is None and not of_positions:
        return SampledEmbedding(axis, name, module, parameters)
    if type(module).__name__.endswith(_BROADCAST_NORMS) and {p.dim() for p in module.parameters()} == {1}:
        return SampledBroadcast(axis, name, module, parameters)
    raise TypeError(
        f"{name or 'the model'} holds random parameters ({', '.join(sorted(parameters))}) and is a "
        f"{type(module).__name__}, which has no sampled form: leave them out of the weights, for instance with a "
        "predicate or params='lora'"
    )
