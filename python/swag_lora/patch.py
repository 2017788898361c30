"""S samples of a PEFT model's weights in one forward pass."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from types import MethodType
from typing import Any, NoReturn

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig

from .sample_axis import Lanes, Prefix, SampleAxis
from .sampled_modules import SampledModule, sampled_leaf, sampled_lora_module

_READS_WEIGHTS_DIRECTLY = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
_CAPTURES = ("output_hidden_states", "output_attentions", "output_router_logits")
_DEBERTA_BATCHED = ("hidden_states", "attention_mask", "query_states")


class SampledModel(nn.Module):
    """A model that runs S samples of its random weights in one pass.

    ``sampled(**batch)`` takes what the model takes and returns the model's own output type, with every batch-leading
    tensor as ``[S, B, ...]``: entry s is what the model returns with sample s's weights set, up to rounding. Scalars
    (a loss is the mean over samples) and caches stay as they are; a cache is made only where ``use_cache=True`` asks
    for one.

    The samples pass as one batch of S * B rows. What precedes the first random module runs once for B rows, unless
    hidden states or attentions are asked for.

    The model given is never changed: this object holds a twin of its module tree that shares every parameter, buffer
    and config, and only the twin's forwards differ. Training steps on the model are therefore seen here. Replacing
    its modules or moving it to another device or dtype calls for a new `SampledModel`. The twin takes the model's
    train or eval mode at construction and has its own from then on.

    Args:
        peft_model: a PEFT model (or a transformers model with adapters) in the state whose samples are wanted: one
            active adapter, not merged.
        weights: ``{parameter name: [S, *shape]}`` with names from ``peft_model.named_parameters()``, such as
            `SampledWeights`; on the parameters' device.

    Raises:
        ValueError: names, shapes or the adapter's state do not fit the model.
        TypeError: a random parameter sits in a module that has no sampled form.
    """

    def __init__(self, peft_model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._parameters_like = _random_parameters(peft_model, weights)
        _check_adapters(peft_model, weights)
        num_samples = _num_samples(self._parameters_like, weights)
        self.model = _twin(peft_model)
        self.training = peft_model.training
        core = peft_model.get_base_model() if isinstance(peft_model, PeftModel) else peft_model
        self._config = getattr(core, "config", None)
        self._takes_use_cache = hasattr(self._config, "use_cache") and _accepts(core, "use_cache")
        self._axis, self._sampled = _install(self.model, self._parameters_like, num_samples)
        self.set_weights(weights)

    @property
    def num_samples(self) -> int:
        return self._axis.num_samples

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The samples in use; `set_weights` exchanges them."""
        return self._weights

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Exchange the samples for others of the same parameters. S may differ; nothing is rebuilt.

        Raises:
            ValueError: other names or shapes than at construction; the samples in use then stay.
        """
        if self._parameters_like.keys() != weights.keys():
            name = min(self._parameters_like.keys() ^ weights.keys())
            raise ValueError(
                f"{name} is in one set of weights and not in the other: to change which parameters are random, "
                "build a new SampledModel"
            )
        num_samples = _num_samples(self._parameters_like, weights)
        for sampled, names in self._sampled:
            sampled.bind({parameter: weights[name] for parameter, name in names.items()})
        self._axis.num_samples = num_samples
        self._weights = weights

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("adapter_names cannot be combined with samples: activate one adapter with set_adapter")
        if self._takes_use_cache and kwargs.get("past_key_values") is None:
            kwargs.setdefault("use_cache", False)
        asked = {name: kwargs.get(name) for name in _CAPTURES}
        captures = any(getattr(self._config, name, False) if value is None else value for name, value in asked.items())
        args, kwargs = self._axis.enter(args, kwargs, share_prefix=not captures)
        return self._axis.leave(self.model(*args, **kwargs))

    def generate(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            "SampledModel does not generate, with or without beams: call it for logits [S, B, ...]"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> NoReturn:
        raise RuntimeError(
            "a SampledModel shares its tensors with the model it was built from: move or cast that model, then build "
            "a new SampledModel"
        )


def _accepts(module: nn.Module, argument: str) -> bool:
    parameters = inspect.signature(module.forward).parameters
    return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _random_parameters(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """The model's parameters that `weights` names."""
    if not weights:
        raise ValueError("no weights given: a SampledModel needs at least one random parameter")
    known = dict(model.named_parameters(remove_duplicate=False))
    unknown = [name for name in weights if name not in known]
    if unknown:
        raise ValueError(
            f"{unknown[0]} is no parameter of this model ({len(unknown)} of {len(weights)} names are not): the weights "
            "are of another model, or the adapter was renamed or removed since; use the model they were collected from"
        )
    parameters = {name: known[name] for name in weights}
    first: dict[int, str] = {}
    for name, parameter in parameters.items():
        if first.setdefault(id(parameter), name) != name:
            raise ValueError(f"{name} and {first[id(parameter)]} are one tied parameter: give weights for one name")
    return parameters


def _num_samples(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> int:
    """S, after checking that every tensor is ``[S, *shape]`` of its parameter, floating, and on its device."""
    reference, samples = "", 0
    for name, parameter in parameters.items():
        tensor = weights[name]
        if tensor.dim() == 0 or tensor.shape[1:] != parameter.shape:
            raise ValueError(
                f"weights of {name} have shape {list(tensor.shape)}, its parameter has {list(parameter.shape)}: "
                f"expected [S, {', '.join(map(str, parameter.shape))}] (another model, or another LoRA rank?)"
            )
        if not reference:
            reference, samples = name, len(tensor)
        if len(tensor) != samples or samples < 1:
            raise ValueError(
                f"{name} has {len(tensor)} samples and {reference} {samples}: all need the same number, at least 1"
            )
        if not tensor.is_floating_point() or tensor.device != parameter.device:
            raise ValueError(
                f"weights of {name} are {tensor.dtype} on {tensor.device}, its parameter is {parameter.dtype} on "
                f"{parameter.device}: give floating-point weights on the parameter's device"
            )
    return samples


def _check_adapters(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Refuse a model whose forward is not that of one active, unmerged adapter to which the weights belong."""
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"{model.active_peft_config.peft_type.value} prepends learned prompts, which have no sampled form: use LoRA"
        )
    for name, module in model.named_modules():
        if not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            continue
        if module.merged_adapters:
            raise ValueError(f"{name} has merged adapters, which cannot be sampled: call unmerge_adapter() first")
        if module.disable_adapters:
            raise ValueError(f"{name} has its adapters disabled: call enable_adapter_layers() first")
        if len(module.active_adapters) > 1:
            raise ValueError(
                f"{name} has several active adapters {module.active_adapters}: activate one with set_adapter(name)"
            )
        active = set(module.active_adapters)
        for weight in weights:
            if not weight.startswith(f"{name}."):
                continue
            path = weight.removeprefix(f"{name}.").split(".")
            if path[0] != "base_layer" and (path[0] == "original_module" or active.isdisjoint(path)):
                raise ValueError(
                    f"{weight} takes no part in the forward pass while {active or 'no adapter'} is active: activate "
                    "the adapter the weights belong to with set_adapter(name)"
                )


def _twin(model: nn.Module) -> nn.Module:
    """The same module tree in new modules, all tensors and configs shared."""
    shared = {id(value): value for module in model.modules() for value in _to_share(module.__dict__)}
    return copy.deepcopy(model, shared)


def _to_share(value: object) -> Iterator[object]:
    """Tensors, configs and owners of hooks within an attribute value, which the twin has in common with the model."""
    if isinstance(value, (Tensor, PretrainedConfig, GenerationConfig, PeftConfig)):
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


def _install(
    twin: nn.Module, parameters: Mapping[str, nn.Parameter], num_samples: int
) -> tuple[SampleAxis, list[tuple[SampledModule, dict[str, str]]]]:
    """Give the twin's modules their sampled forwards.

    Returns:
        The axis they share, and each sampled module with ``{its own parameter name: name in the weights}``.
    """
    random = {id(parameter): name for name, parameter in parameters.items()}
    holders = _holders(twin, random)
    random_modules = {id(module) for _, module, _ in holders}
    containers = {id(m) for m in twin.modules() if any(id(d) in random_modules for d in m.modules())}
    prefixes = list(_prefixes(twin, containers, {id(m) for _, m, _ in holders if isinstance(m, BaseTunerLayer)}, set()))
    loose = [m for m in twin.modules() if id(m) in containers - random_modules]
    loose += [m for m in (*prefixes, *(m for _, m, _ in holders)) if isinstance(m, nn.Embedding)]
    axis = SampleAxis(num_samples, _sizes(loose))

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
    for module in prefixes:
        module.forward = Prefix(axis, module).forward
    for module in twin.modules():
        if _needs_lanes(module, containers):
            module.forward = Lanes(axis, module, _DEBERTA_BATCHED).forward
    return axis, sampled


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


def _sizes(modules: list[nn.Module]) -> frozenset[int]:
    """Sizes of the tensors these modules hold: tables and loose parameters may pass between modules without a batch."""
    return frozenset(
        size
        for module in modules
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
        for size in tensor.shape
    )


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
