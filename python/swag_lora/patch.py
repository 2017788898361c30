"""S samples of a PEFT model's weights in one forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .sample_axis import AxisReached
from .twin import install, twin_of

_CAPTURES = ("output_hidden_states", "output_attentions", "output_router_logits")


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
        self.model = twin_of(peft_model)
        self.training = peft_model.training
        core = peft_model.get_base_model() if isinstance(peft_model, PeftModel) else peft_model
        self._config = getattr(core, "config", None)
        self._takes_use_cache = hasattr(self._config, "use_cache") and _accepts(core, "use_cache")
        self._axis, self._boundary, self._sampled = install(self.model, self._parameters_like, num_samples)
        self.set_weights(weights)

    @property
    def num_samples(self) -> int:
        return self._axis.num_samples

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The samples in use; `set_weights` exchanges them, after `release_weights` there are none."""
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

    @property
    def rows_computed(self) -> dict[str, int]:
        """How many rows have gone through each module since construction, by the model's module names.

        Rows that the samples share count once: after one pass over B examples a module ahead of all randomness has B,
        one behind it S * B.
        """
        return dict(self._axis.computed)

    @contextmanager
    def same_batch(self) -> Iterator[None]:
        """Within, every call is on one batch: what precedes the first random module runs in the first call alone.

        For many passes over a batch, with `set_weights` between them. Kept are that part's outputs, for B rows, not
        S * B. Where gradients are recorded nothing is kept.

        Raises:
            ValueError: by a call with other inputs than the first.
        """
        self._boundary.open()
        try:
            yield
        finally:
            self._boundary.close()

    def release_weights(self) -> None:
        """Let go of the samples in use, so that others can be drawn in their place; `set_weights` before the next call."""
        for sampled, _ in self._sampled:
            sampled.bind({})
        self._weights = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self._weights:
            raise RuntimeError("the weights were released: call set_weights first")
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("adapter_names cannot be combined with samples: activate one adapter with set_adapter")
        if self._takes_use_cache and kwargs.get("past_key_values") is None:
            kwargs.setdefault("use_cache", False)
        asked = {name: kwargs.get(name) for name in _CAPTURES}
        captures = any(getattr(self._config, name, False) if value is None else value for name, value in asked.items())
        axis, boundary = self._axis, self._boundary
        fresh = boundary.enter(args, kwargs)
        wide = axis.enter(args, kwargs, share_prefix=not captures)
        if not (fresh and axis.mistakable and axis.can_scout(wide)):
            return axis.leave(self.model(*wide[0], **wide[1]))
        with nullcontext() if boundary.is_open else self.same_batch():
            self._scout(args, kwargs)
            boundary.enter(args, kwargs)
            wide = axis.enter(args, kwargs, share_prefix=True)
            return axis.leave(self.model(*wide[0], **wide[1]))

    def _scout(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Run what precedes the first random module with a number of samples that leaves no doubt which rows are whose."""
        axis, samples = self._axis, self._axis.num_samples
        axis.num_samples, axis.scouting = axis.unmistakable(), True
        try:
            wide = axis.enter(args, kwargs, share_prefix=True)
            self.model(*wide[0], **wide[1])
        except AxisReached:
            pass
        finally:
            axis.num_samples, axis.scouting = samples, False

    def generate(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            "a SampledModel does not generate, with or without beams: swag_lora.generate(model, posterior, input_ids) "
            "averages the next token's distribution over the samples; call this object for logits [S, B, ...]"
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
