"""A Gaussian over a model's random weights, collected from the tail of training."""

from __future__ import annotations

import math
import operator
import os
from typing import Literal, get_args

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import Tensor, nn

from swag_kernels import collect_, draw

from . import checkpoint
from .layout import Layout, Selection, common_dtype, require_finite, select_parameters
from .weights import SampledWeights

Method = Literal["iid", "antithetic"]


class SwagPosterior:
    """SWAG (Maddox et al. 2019, arXiv 1902.02476) over the random weights of a PEFT model.

    Holds, in float32 and in one flat arena of N elements (`layout` says where each tensor lies):

    =============  ========  ==================================================================
    ``mean``       [N]       mean of the collected weights, the SWA solution
    ``m2``         [N]       sum of squared deviations from the mean; variance is ``m2 / count``
    ``deviations``  [R, N]    ring of ``theta - mean`` at the last R collections
    ``count``      []        int64, number of collections
    =============  ========  ==================================================================

    With k = min(count, R) columns D held, a sample is

        w = mean + sqrt(scale) (sigma * eps + D^T z / sqrt(k - 1)),   sigma^2 = max(m2 / count, var_clamp)

    with eps ~ N(0, I_N) and one z ~ N(0, I_k) for all tensors; ``scale=0.5`` is the paper's half diagonal, half low
    rank. With fewer than two columns the low-rank term is zero.

    Args:
        model: the model whose weights are collected; any module will do, a PEFT model also saves as an adapter.
        rank: R, number of deviations kept; 0 for a diagonal posterior.
        params: "trainable", "lora" or a predicate on ``(name, parameter)``, see `select_parameters`.
        var_clamp: smallest variance a weight is given.

    Raises:
        ValueError: nothing selected, a negative rank or clamp, parameters on several devices.
    """

    def __init__(
        self, model: nn.Module, rank: int = 20, params: Selection = "trainable", var_clamp: float = 1e-30
    ) -> None:
        model = _unwrap(model)
        parameters = select_parameters(model, params)
        devices = {parameter.device for parameter in parameters.values()}
        if len(devices) > 1:
            raise ValueError(f"the random parameters must be on one device, they are on {sorted(map(str, devices))}")
        self._allocate(model, Layout.of(parameters), rank, var_clamp, devices.pop())

    def _allocate(
        self, model: nn.Module, layout: Layout, rank: int, var_clamp: float, device: torch.device | str
    ) -> None:
        rank = _integer("rank", rank, minimum=0)
        if not (math.isfinite(var_clamp) and var_clamp >= 0):
            raise ValueError(f"var_clamp must be finite and not negative, got {var_clamp}")
        self.model = model
        self.layout = layout
        self.adapters: tuple[str, ...] = tuple(model.active_adapters) if isinstance(model, PeftModel) else ()
        self.var_clamp = float(var_clamp)
        self.mean = torch.zeros(layout.size, device=device)
        self.m2 = torch.zeros(layout.size, device=device)
        self.deviations = torch.zeros(rank, layout.size, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def rank(self) -> int:
        """R, number of deviations kept."""
        return len(self.deviations)

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def collect(self, check_finite: bool = True) -> None:
        """Take the model's weights as they are now into the posterior; call after ``optimizer.step()``.

        One pass over the weights that allocates nothing of their size.

        Args:
            check_finite: look first for NaN and infinity, which reads one scalar back from the device; False for
                capture in a CUDA graph.

        Raises:
            ValueError: a weight is not finite, or a parameter is gone, has another shape or is on another device than
                the posterior. The message names it, and the posterior is as it was.
        """
        parameters = self.layout.parameters(self.model)
        for name, parameter in zip(self.layout.names, parameters, strict=True):
            if parameter.device != self.device:
                raise ValueError(
                    f"{name} is on {parameter.device}, the posterior on {self.device}: "
                    f'call posterior.to("{parameter.device}")'
                )
        if check_finite:
            require_finite(self.layout.names, parameters)
        deviations = self.deviations if self.rank else None
        collect_(parameters, self.mean, self.m2, deviations, self.count, self.layout.table)

    def draw(
        self,
        num_samples: int,
        seed: int = 0,
        first: int = 0,
        scale: float = 0.5,
        method: Method | str = "antithetic",
        dtype: torch.dtype | None = None,
        covariance: bool | None = None,
    ) -> SampledWeights:
        """Samples ``first … first + num_samples - 1`` of ``seed``; sample k does not depend on what else is drawn.

        Args:
            num_samples: S, at least 1.
            seed: 64-bit key of the random numbers.
            first: index of the first sample.
            scale: factor on the whole covariance; 0.5 is the paper's, 0 gives the mean.
            method: "iid", or "antithetic": samples 2j and 2j+1 are mirror images about the mean.
            dtype: of the samples; None takes the model's own if its random parameters share one, else float32.
            covariance: None uses the low-rank term if two columns are held, True demands it, False leaves it out.

        Raises:
            RuntimeError: nothing collected yet.
            ValueError: S below 1, a negative scale or index, an unknown method, or ``covariance=True`` with fewer than
                two columns.
            TypeError: a seed, a count or an index that is not an integer.
        """
        num_samples = _integer("num_samples", num_samples, minimum=1)
        seed = _integer("seed", seed)
        first = _integer("first", first, minimum=0)
        if not (math.isfinite(scale) and scale >= 0):
            raise ValueError(f"scale must be finite and not negative, got {scale}")
        if method not in get_args(Method):
            raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
        count = self._collected("draw")
        columns = min(count, self.rank)
        if covariance and columns < 2:
            way_out = (
                f"this posterior has rank={self.rank}: make it with rank=2 or more"
                if self.rank < 2
                else f"{count} collected so far: collect once more"
            )
            raise ValueError(f"a covariance needs at least two deviations; {way_out}, or draw with covariance=False")
        low_rank = columns >= 2 and covariance is not False
        buffer = draw(
            self.mean,
            self.std(),
            self.deviations[:columns] if low_rank else None,
            num_samples,
            seed=seed,
            first_sample=first,
            diag_scale=math.sqrt(scale),
            low_rank_scale=math.sqrt(scale / (columns - 1)) if low_rank else 0.0,
            antithetic=method == "antithetic",
            layout=self.layout.table,
            dtype=dtype or common_dtype(p.dtype for p in self.layout.parameters(self.model)),
        )
        return SampledWeights(self.layout, buffer, seed=seed, first=first, method=method)

    def std(self) -> Tensor:
        """sigma ``[N]``, ``sqrt(max(m2 / count, var_clamp))``, without the low-rank part and without scale."""
        self._collected("std")
        return self.m2.div(self.count).clamp_(min=self.var_clamp).sqrt_()

    def mean_state_dict(self) -> dict[str, Tensor]:
        """The mean (SWA) as parameter name -> tensor, copied, in each parameter's dtype."""
        self._collected("mean_state_dict")
        parameters = self.layout.parameters(self.model)
        views = self.layout.views(self.mean)
        return {name: views[name].to(p.dtype, copy=True) for name, p in zip(views, parameters, strict=True)}

    @torch.no_grad()
    def load_mean(self, model: nn.Module | None = None) -> None:
        """Set the random parameters of ``model`` (None: the model collected from) to the mean, in place."""
        self._collected("load_mean")
        parameters = self.layout.parameters(self.model if model is None else model)
        for parameter, value in zip(parameters, self.layout.views(self.mean).values(), strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """``mean``, ``m2``, ``deviations`` and ``count`` themselves, not copies."""
        return {"mean": self.mean, "m2": self.m2, "deviations": self.deviations, "count": self.count}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy in what `state_dict` gave; a missing entry or another shape is refused and changes nothing."""
        mine = self.state_dict()
        for name, tensor in mine.items():
            if name not in state:
                raise ValueError(f"the posterior state has no {name}")
            if state[name].shape != tensor.shape:
                raise ValueError(f"{name} has shape {list(state[name].shape)} instead of {list(tensor.shape)}")
        for name, tensor in mine.items():
            tensor.copy_(state[name])

    def to(self, device: torch.device | str) -> SwagPosterior:
        """Move the posterior (not the model) to ``device``; returns itself."""
        for name, tensor in self.state_dict().items():
            setattr(self, name, tensor.to(device))
        return self

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write a PEFT adapter whose weights are the mean, and the posterior beside it.

        ``PeftModel.from_pretrained(base, folder)`` loads the mean without this package. Random parameters that PEFT
        does not count to the adapter (a predicate may pick a norm of the base model) are in
        ``swag_posterior.safetensors`` alone: `from_pretrained` then `load_mean` brings them back. See
        `checkpoint.save` for the files and for what a killed save leaves.
        """
        checkpoint.save(self, folder)

    @classmethod
    def from_pretrained(cls, model: nn.Module, folder: str | os.PathLike[str]) -> SwagPosterior:
        """The posterior of `save_pretrained`, tied to ``model``; collecting goes on where it stopped.

        The model's weights are not changed. Parameters are found by name, so the adapter may be loaded frozen or
        trainable, but under the name it was saved with.

        Raises:
            FileNotFoundError: the folder has no posterior.
            ValueError: the file is truncated, foreign or of another version, or the model's tensors differ from it;
                the message says which.
        """
        model = _unwrap(model)
        saved = checkpoint.load(model, folder)
        posterior = cls.__new__(cls)
        posterior._allocate(model, saved.layout, saved.rank, saved.var_clamp, saved.device)
        held = len(saved.tensors["deviations"])
        posterior.mean.copy_(saved.tensors["mean"])
        posterior.m2.copy_(saved.tensors["m2"])
        posterior.deviations[:held].copy_(saved.tensors["deviations"])
        posterior.count.copy_(saved.tensors["count"])
        return posterior

    def _collected(self, wanted_by: str) -> int:
        count = int(self.count)
        if not count:
            raise RuntimeError(f"nothing collected yet: call collect() before {wanted_by}()")
        return count

    def __repr__(self) -> str:
        return (
            f"SwagPosterior(tensors={len(self.layout)}, weights={self.layout.numel}, rank={self.rank}, "
            f"count={int(self.count)}, device='{self.device}')"
        )


def _unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, torch.compile and the like: its own names are the ones that count."""
    return extract_model_from_parallel(model, keep_torch_compile=False)


def _integer(name: str, value: int, minimum: int | None = None) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if minimum is not None and number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    return number
