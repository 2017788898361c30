"""Point estimates as the samples of a posterior: deep ensembles and MultiSWA."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from .adapter_folder import AdapterFolder
from .drawing import named_samples
from .layout import Layout
from .posterior import SwagPosterior
from .weights import SampledWeights

_OF_THE_FORWARD = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


class Ensemble:
    """M weight vectors, of which sample k is number k: a deep ensemble (Lakshminarayanan et al. 2017, arXiv 1612.01474).

    ``p(y|x) = 1/M Σ_m p(y|x, w_m)``. Nothing is random: a seed and a scale may be given to `draw`, as a `Predictor` does,
    and mean nothing. Members are not mirror images of each other, so the method is "iid":
    ``predict(model, ensemble, batch, num_samples=len(ensemble), method="iid")``.

    Args:
        model: the model that runs the members; its other parameters are common to all of them.
        states: for each member parameter name -> tensor, the same names for all. Copied, in the dtype that these
            parameters share in the model, else in float32, to their device.

    Raises:
        ValueError: no members or no tensors, or a state that does not fit the model or the first state; the message
            names the member and the tensor.
    """

    def __init__(self, model: nn.Module, states: Sequence[Mapping[str, Tensor]]) -> None:
        if not states or not states[0]:
            raise ValueError("an ensemble needs at least one member with at least one tensor")
        parameters = {name: parameter for name, parameter in model.named_parameters() if name in states[0]}
        self.layout = Layout.of(parameters)
        for index, state in enumerate(states):
            there = {name: state[name] for name in parameters if name in state}
            if difference := self.layout.difference(Layout.of({**there, **state})):
                whose = "the model's parameters" if index == 0 else "member 0"
                raise ValueError(f"member {index} does not fit {whose}: {difference}")
        device = next(iter(parameters.values())).device
        self._buffer = torch.zeros(len(states), self.layout.size, dtype=self.layout.common_dtype, device=device)
        for name, view in self.layout.views(self._buffer).items():
            for row, state in zip(view, states, strict=True):
                row.copy_(state[name].detach())

    @classmethod
    def of_means(cls, posteriors: Sequence[SwagPosterior]) -> Ensemble:
        """MultiSWA: the means of posteriors that are tied to one model."""
        if not posteriors:
            raise ValueError("an ensemble needs at least one member")
        return cls(posteriors[0].model, [posterior.mean_state_dict() for posterior in posteriors])

    @classmethod
    def from_folders(cls, model: PeftModel, folders: Sequence[str | os.PathLike[str]]) -> Ensemble:
        """Members from saved PEFT adapters, as other values of the model's active adapter; the model stays as it is.

        Raises:
            FileNotFoundError: a folder without an adapter.
            ValueError: several active adapters; an adapter that is damaged or not LoRA, of another configuration or with
                other tensors, or one whose buffers (of modules_to_save) are not the model's.
        """
        if len(model.active_adapters) != 1:
            raise ValueError(f"activate one adapter with set_adapter(name), active are {model.active_adapters}")
        return cls(model, [_read(model, model.active_adapters[0], Path(folder)) for folder in folders])

    def draw(
        self,
        num_samples: int,
        seed: int = 0,
        first: int = 0,
        scale: float = 1.0,
        method: str = "iid",
    ) -> SampledWeights:
        """Members ``first … first + num_samples - 1``, not copied.

        Args:
            seed, scale: without meaning here.
            method: "iid".

        Raises:
            ValueError: more members than there are, or another method.
        """
        num_samples, _, first = named_samples(num_samples, seed, first)
        if method != "iid":
            raise ValueError(f"members of an ensemble are no mirror images: method must be 'iid', got {method!r}")
        if first + num_samples > len(self):
            raise ValueError(
                f"this ensemble has {len(self)} members; {num_samples} from number {first} on were asked for"
            )
        return SampledWeights(self.layout, self._buffer[first : first + num_samples], first=first)

    def __len__(self) -> int:
        return len(self._buffer)

    def __repr__(self) -> str:
        return f"Ensemble(members={len(self)}, weights={self.layout.numel}, dtype={self._buffer.dtype})"


def _read(model: PeftModel, adapter: str, folder: Path) -> dict[str, Tensor]:
    """The adapter in the folder by the model's parameter names."""
    weights = AdapterFolder.load(folder).tensors
    mine, theirs = model.peft_config[adapter], PeftConfig.from_pretrained(str(folder))
    for field in _OF_THE_FORWARD:
        here, there = getattr(mine, field, None), getattr(theirs, field, None)
        if here != there:
            raise ValueError(f"the adapter in {folder} has {field}={there}, the model {field}={here}")
    state = model.state_dict(keep_vars=True)
    saved = get_peft_model_state_dict(model, state, adapter, save_embedding_layers=False)
    for name in sorted(saved.keys() ^ weights.keys()):
        lacks, has = (folder, "the model's adapter") if name in saved else ("the model's adapter", folder)
        raise ValueError(f"the adapter in {folder} does not fit the model: {has} has {name}, {lacks} has not")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, own in saved.items():
        if id(own) not in names and not torch.equal(own.cpu(), weights[name]):
            raise ValueError(
                f"{name} of {folder} is no parameter and differs from the model's: it cannot vary by member"
            )
    return {names[id(own)]: weights[name] for name, own in saved.items() if id(own) in names}
