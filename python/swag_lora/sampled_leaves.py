"""Sampled forms of modules that hold random parameters themselves: linear layers, norms, embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .sample_axis import SampleAxis
from .sampled_modules import Sampled, SampledModule, features, per_row

_BROADCAST_NORMS = ("RMSNorm", "T5LayerNorm", "DebertaLayerNorm")
_HALF = (torch.float16, torch.bfloat16)


class SampledLinear(Sampled):
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
            h = features(rows).expand(len(weight), -1, -1)
            bias = None if self.module.bias is None else self.samples("bias").unsqueeze(1)
            y = torch.bmm(h, weight) if bias is None else torch.baddbmm(bias, h, weight)
            return self.axis.join(y.unflatten(1, rows.shape[1:-1]), x)
        if self._transposed:
            y = torch.matmul(rows, self.module.weight)
        else:  # quantised layers know of no more axes than the model gives them
            y = self._unbiased(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
        return self.axis.join((y + per_row(self.samples("bias"), y)).to(y.dtype), x)


class SampledNorm(Sampled):
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
            y = y * per_row(self.samples("weight"), y)
        if getattr(module, "bias", None) is not None:
            y = y + per_row(self.samples("bias"), y)
        if x.device.type == "cpu" or not torch.is_autocast_enabled(x.device.type):
            y = y.to(x.dtype)
        return self.axis.join(y, x)


class SampledBroadcast(Sampled):
    """Norms of the model families (Llama's, Gemma's 1 + weight, T5's): their own forward, the parameters broadcast."""

    def __init__(self, axis: SampleAxis, name: str, module: nn.Module, parameters: frozenset[str]) -> None:
        super().__init__(axis, name, module, parameters)
        self._forward = module.forward
        for parameter in parameters:
            module.__dict__[parameter] = module._parameters.pop(parameter)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.axis.split(x, self.name)
        for parameter in self.parameters:
            self.module.__dict__[parameter] = per_row(self.samples(parameter), rows)
        return self.axis.join(self._forward(rows), x)


class SampledEmbedding(Sampled):
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
