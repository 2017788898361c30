"""The twin: a second module tree over the same tensors, whose forwards take S samples of the random parameters."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MethodType
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import GenerationConfig, PretrainedConfig

from .prefix import Boundary, Prefix
from .sample_axis import SampleAxis
from .sampled_leaves import sampled_leaf
from .sampled_modules import SampledModule, sampled_lora_module

_READS_WEIGHTS_DIRECTLY = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
_DEBERTA_BATCHED = ("hidden_states", "attention_mask", "query_states")


def twin_of(model: nn.Module) -> nn.Module:
    """The same module tree in new modules, all tensors and configs shared."""
    shared = {id(value): value for module in model.modules() for value in _to_share(module.__dict__)}
    return copy.deepcopy(model, shared)


def _to_share(value: object) -> Iterator[object]:
    """Tensors, configs, owners of hooks and quantisation states within an attribute value: what twin and model share."""
    if isinstance(value, (Tensor, PretrainedConfig, GenerationConfig, PeftConfig)) or _is_quantisation_state(value):
        yield value
    elif isinstance(value, MethodType):
        if not isinstance(value.__self__, nn.Module):
            yield value.__self__
    elif isinstance(value, dict):
        for item in value.values():
            yield from _to_share(item)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _to_share(item)


def _is_quantisation_state(value: object) -> bool:
    """Whether it is what a layer of bitsandbytes keeps beside its weight, and moves the weight's own tensors to when called."""
    return type(value).__module__.startswith("bitsandbytes.") and not isinstance(value, nn.Module)


def install(
    twin: nn.Module, parameters: Mapping[str, nn.Parameter], num_samples: int
) -> tuple[SampleAxis, Boundary, list[tuple[SampledModule, dict[str, str]]]]:
    """Give the twin's modules their sampled forwards.

    Returns:
        The axis they share, what is kept from before it, and each sampled module with ``{its own parameter name: name
        in the weights}``.
    """
    random = {id(parameter): name for name, parameter in parameters.items()}
    holders = _holders(twin, random)
    random_modules = {id(module) for _, module, _ in holders}
    containers = {id(m) for m in twin.modules() if any(id(d) in random_modules for d in m.modules())}
    prefixes = list(_prefixes(twin, containers, {id(m) for _, m, _ in holders if isinstance(m, BaseTunerLayer)}, set()))
    loose = [m for m in twin.modules() if id(m) in containers - random_modules]
    loose += [m for m in (*prefixes, *(m for _, m, _ in holders)) if isinstance(m, nn.Embedding)]
    features = {size for p in twin.parameters() if id(p) not in random for size in p.shape}
    axis = SampleAxis(num_samples, _sizes(loose), tuple(sorted(features)))

    sampled: list[tuple[SampledModule, dict[str, str]]] = []
    for name, module, own in holders:
        if "forward" in module.__dict__:
            raise ValueError(
                f"{name} has a forward of its own on the instance (a device-map hook or a patch), which sampling would "
                "bypass: remove it first"
            )
        names = frozenset(own)
        if isinstance(module, BaseTunerLayer):
            base_is_random = any(id(m) in random_modules for m in module.get_submodule("base_layer").modules())
            form: SampledModule = sampled_lora_module(axis, name, module, names, base_is_random)
        else:
            form = sampled_leaf(axis, name, module, names)
        module.forward = form.forward
        sampled.append((form, own))
    names_of = {id(module): name for name, module in twin.named_modules()}
    boundary = Boundary()
    for module in prefixes:
        module.forward = Prefix(axis, boundary, names_of[id(module)], module).forward
    for module in twin.modules():
        if _needs_lanes(module, containers):
            module.forward = _Lanes(axis, module, _DEBERTA_BATCHED).forward
    return axis, boundary, sampled


def _holders(twin: nn.Module, random: Mapping[int, str]) -> list[tuple[str, nn.Module, dict[str, str]]]:
    """Modules that hold random parameters (a LoRA layer holds those of its lora_A and lora_B), with their names."""
    holders = []
    claimed: set[int] = set()
    for name, module in twin.named_modules():
        if isinstance(module, _READS_WEIGHTS_DIRECTLY) and any(id(p) in random for p in module.parameters()):
            raise TypeError(
                f"{name} is a {type(module).__name__}, which reads its layers' weights directly and so has no sampled "
                "form: leave its parameters out of the weights"
            )
        adapter_layer = isinstance(module, BaseTunerLayer)
        own = {
            path: random[id(parameter)]
            for path, parameter in module.named_parameters(recurse=adapter_layer)
            if id(parameter) in random and not path.startswith("base_layer.")
        }
        if own and id(module) not in claimed:
            holders.append((name, module, own))
        if adapter_layer:
            base = {id(m) for m in module.get_submodule("base_layer").modules()}
            claimed |= {id(m) for m in module.modules()} - base
    return holders


def _prefixes(module: nn.Module, containers: set[int], skipped: set[int], seen: set[int]) -> Iterator[nn.Module]:
    """The largest modules with parameters, none of them random."""
    for child in module.children():
        if id(child) in seen or id(child) in skipped:
            continue
        seen.add(id(child))
        if id(child) in containers or type(child).forward is nn.Module.forward:
            yield from _prefixes(child, containers, skipped, seen)
        elif next(child.parameters(), None) is not None:
            yield child


def _sizes(modules: list[nn.Module]) -> tuple[int, ...]:
    """Sizes of the tensors these modules hold: tables and loose parameters may pass between modules without a batch."""
    sizes = {
        size
        for module in modules
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
        for size in tensor.shape
    }
    return tuple(sorted(sizes))


def _needs_lanes(module: nn.Module, containers: set[int]) -> bool:
    """DeBERTa projects and normalises its table of relative positions, which has no batch, with its layers' weights."""
    if not getattr(module, "relative_attention", False):
        return False
    parts: tuple[str, ...] = ()
    if type(module).__name__ == "DisentangledSelfAttention":
        parts = ("pos_key_proj", "pos_query_proj", "pos_proj", "pos_q_proj")
        if getattr(module, "share_att_key", False):
            parts += ("query_proj", "key_proj")
    elif type(module).__name__ == "DebertaV2Encoder":
        parts = ("LayerNorm",)
    return any(id(getattr(module, part, None)) in containers for part in parts)


class _Lanes:
    """Forward of a module whose random parts also see tensors without a batch: one sample after the other.

    Args:
        batched: names of the module's arguments that are batch-leading.
    """

    def __init__(self, axis: SampleAxis, module: nn.Module, batched: Iterable[str]) -> None:
        self._axis = axis
        self._inner: Callable[..., Any] = module.forward
        self._names = list(inspect.signature(module.forward).parameters)
        self._batched = frozenset(batched)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        axis = self._axis
        if axis.lane is not None:
            return self._inner(*args, **kwargs)
        kwargs = dict(zip(self._names, args, strict=False)) | kwargs
        lanes = []
        for lane in range(axis.num_samples):
            axis.lane = lane
            lanes.append(self._inner(**{name: self._lane(value, name) for name, value in kwargs.items()}))
        axis.lane = None
        return tree_map(lambda *v: torch.cat(v) if isinstance(v[0], Tensor) else v[0], *lanes)

    def _lane(self, value: Any, name: str) -> Any:
        if name not in self._batched or not isinstance(value, Tensor) or len(value) == 1 < self._axis.num_samples:
            return value
        return value.unflatten(0, (self._axis.num_samples, -1))[self._axis.lane]
