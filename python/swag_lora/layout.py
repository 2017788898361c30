"""Which parameters are random, and where each lies in the flat arena."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from swag_kernels import arena_size, segment_table

Selection = str | Callable[[str, nn.Parameter], bool]


@dataclass(frozen=True)
class Layout:
    """Names, shapes and dtypes of the random tensors, in the order they lie in the arena.

    The order is part of the meaning: a tensor's position is its word in the random counter.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layout:
        return cls(
            tuple(tensors), tuple(tuple(t.shape) for t in tensors.values()), tuple(t.dtype for t in tensors.values())
        )

    @cached_property
    def table(self) -> Tensor:
        """The kernels' layout, int64 ``[T, 3]`` on the CPU: see `swag_kernels.segment_table`."""
        return segment_table([prod(shape) for shape in self.shapes])

    @cached_property
    def segments(self) -> tuple[slice, ...]:
        """Where each tensor lies on the arena's last axis."""
        return tuple(slice(offset, offset + numel) for offset, numel, _ in self.table.tolist())

    @cached_property
    def size(self) -> int:
        """Elements of the arena, padding included."""
        return arena_size(self.table)

    @property
    def numel(self) -> int:
        """Number of random weights."""
        return sum(prod(shape) for shape in self.shapes)

    @property
    def common_dtype(self) -> torch.dtype:
        """The tensors' dtype if they share one, else float32."""
        return common_dtype(self.dtypes)

    def __len__(self) -> int:
        return len(self.names)

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """Each tensor's part of ``buffer [*lead, N]`` as a view ``[*lead, *shape]``."""
        lead = buffer.shape[:-1]
        return {
            name: buffer[..., segment].view((*lead, *shape))
            for name, shape, segment in zip(self.names, self.shapes, self.segments, strict=True)
        }

    def difference(self, other: Layout) -> str | None:
        """What first sets ``other`` apart in names, shapes or order, in words; None if nothing. Dtypes may differ."""
        theirs = dict(zip(other.names, other.shapes, strict=True))
        for name, shape in zip(self.names, self.shapes, strict=True):
            if name not in theirs:
                return f"{name} {list(shape)} is missing"
            if theirs[name] != shape:
                return f"{name} has shape {list(theirs[name])} instead of {list(shape)}"
        for name in other.names:
            if name not in self.names:
                return f"{name} {list(theirs[name])} is not expected"
        for index, (mine, its) in enumerate(zip(self.names, other.names, strict=True)):
            if mine != its:
                return f"{its} is in place {index} instead of {mine}"
        return None

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """The model's parameters of this layout, in order.

        Raises:
            ValueError: a parameter is gone or has another shape; the message names it.
        """
        found = []
        for name, shape in zip(self.names, self.shapes, strict=True):
            parameter = find_parameter(model, name)
            if parameter is None:
                raise ValueError(
                    f"the model has no parameter {name}: was its adapter renamed, deleted or merged, or is it "
                    f"another architecture? {_adapters(model)}"
                )
            if tuple(parameter.shape) != shape:
                raise ValueError(f"{name} has shape {list(parameter.shape)} in the model instead of {list(shape)}")
            found.append(parameter)
        return found

    def to_json(self) -> str:
        rows = zip(self.names, self.shapes, self.dtypes, self.segments, strict=True)
        return json.dumps(
            [
                {"name": name, "shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "offset": at.start}
                for name, shape, dtype, at in rows
            ]
        )

    @classmethod
    def from_json(cls, text: str) -> Layout:
        """Inverse of `to_json`.

        Raises:
            ValueError: not such a text, or its tensors lie at other offsets than this version gives them.
        """
        try:
            rows: list[dict[str, Any]] = json.loads(text)
            layout = cls(
                tuple(str(row["name"]) for row in rows),
                tuple(tuple(int(n) for n in row["shape"]) for row in rows),
                tuple(getattr(torch, row["dtype"]) for row in rows),
            )
            offsets = [int(row["offset"]) for row in rows]
            if not offsets:
                raise KeyError("no tensors")
        except (json.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a layout: {error}") from error
        for name, offset, segment in zip(layout.names, offsets, layout.segments, strict=True):
            if offset != segment.start:
                raise ValueError(f"{name} lies at element {offset}, this version expects {segment.start}")
        return layout


def common_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The one dtype, or float32 if there are several."""
    distinct = set(dtypes)
    return distinct.pop() if len(distinct) == 1 else torch.float32


def select_parameters(model: nn.Module, params: Selection = "trainable") -> dict[str, nn.Parameter]:
    """The parameters of ``model`` that are to be random, by name, in the order of ``model.named_parameters()``.

    Args:
        model: usually a PEFT model.
        params: "trainable", those that require a gradient (LoRA and ``modules_to_save``); "lora", the LoRA tensors of
            the active adapter, whether they require one or not; or a predicate on ``(name, parameter)``.

    A tied parameter appears once, under its first name. The frozen originals that PEFT keeps beside
    ``modules_to_save`` are never selected: the model does not use them.

    Raises:
        ValueError: nothing was selected, or ``params`` is an unknown word.
        TypeError: a selected parameter is not floating point (a quantised base weight).
    """
    wanted: Callable[[str, nn.Parameter], bool]
    if callable(params):
        originals = tuple(
            f"{name}.original_module." for name, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)
        )
        predicate = params

        def wanted(name: str, parameter: nn.Parameter) -> bool:
            return not name.startswith(originals) and bool(predicate(name, parameter))
    elif params == "trainable":

        def wanted(name: str, parameter: nn.Parameter) -> bool:
            return parameter.requires_grad
    elif params == "lora":
        stems = lora_stems(model)

        def wanted(name: str, parameter: nn.Parameter) -> bool:
            return f"{name}.".startswith(stems)
    else:
        raise ValueError(f'params must be "trainable", "lora" or a predicate on (name, parameter), got {params!r}')

    selected = {name: parameter for name, parameter in model.named_parameters() if wanted(name, parameter)}
    if not selected:
        cause = {
            "trainable": "no parameter requires a gradient; load the adapter with is_trainable=True, or use "
            'params="lora"',
            "lora": f"it has no LoRA layer with an active adapter. {_adapters(model)}",
        }
        raise ValueError(
            f"nothing to be random in the model: {cause.get(str(params), 'the predicate accepts no parameter')}"
        )
    for name, parameter in selected.items():
        if not parameter.is_floating_point():
            raise TypeError(f"{name} is {parameter.dtype}: only floating-point parameters can be random")
    return selected


def lora_stems(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the names of the active adapter's LoRA tensors, each ending in a dot."""
    return tuple(
        f"{name}.{part}.{adapter}."
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
        for part in module.adapter_layer_names
        for adapter in module.active_adapters
    )


def find_parameter(model: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter of that dotted name as it is now, None if there is none.

    Follows the module tree alone: ``getattr`` on a PEFT model falls through to the modules it wraps.
    """
    *path, leaf = name.split(".")
    for part in path:
        child = model._modules.get(part)
        if child is None:
            return None
        model = child
    return model._parameters.get(leaf)


def require_device(names: Sequence[str], parameters: Sequence[Tensor], device: torch.device) -> None:
    """Raises a ValueError that names the first parameter on another device than the posterior's ``device``."""
    for name, parameter in zip(names, parameters, strict=True):
        if parameter.device != device:
            raise ValueError(
                f'{name} is on {parameter.device}, the posterior on {device}: call posterior.to("{parameter.device}")'
            )


def require_finite(names: Sequence[str], parameters: Sequence[Tensor]) -> None:
    """Raises a ValueError that names the first parameter with a NaN or an infinity.

    Reduces each tensor to its extremes, which carry a NaN along, and reads them back once: nothing of the parameters'
    size is allocated.
    """
    tensors = {name: p.detach() for name, p in zip(names, parameters, strict=True) if p.numel()}
    if not tensors:
        return
    if next(iter(tensors.values())).device.type != "cpu":
        peaks = torch.stack([norm.float() for norm in torch._foreach_norm(list(tensors.values()), float("inf"))])
    else:
        # On the CPU the infinity norm is ten times slower than aminmax, which copies what is not contiguous.
        extremes = [torch.aminmax(t) if t.is_contiguous() else (t.amin(), t.amax()) for t in tensors.values()]
        peaks = torch.stack([end.float() for pair in extremes for end in pair]).view(-1, 2)
    finite = peaks.isfinite().view(len(tensors), -1).all(1).tolist()
    for name, good in zip(tensors, finite, strict=True):
        if not good:
            raise ValueError(f"{name} holds a NaN or an infinity; nothing was collected")


def _adapters(model: nn.Module) -> str:
    config = getattr(model, "peft_config", None)
    return f"The model's adapters: {', '.join(config)}." if config else "The model has no adapter."
