"""A Gaussian over a model's random weights, collected from the tail of training."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import Tensor, nn

from swag_kernels import collect_

from . import checkpoint, checkpoint_load
from .drawing import Method, draw_samples, integer
from .layout import Layout, Selection, require_device, require_finite, select_parameters
from .processes import is_replicated, mesh_of, together
from .sharding import Sharding, require_whole, reshard
from .weights import SampledWeights


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

    Of a model that `torch.distributed.fsdp.fully_shard` has split, each rank holds the moments of its own shards, in an
    arena that is that much smaller (`part` is its layout, `sharding` says what lies where). `collect`, `std`,
    `mean_state_dict` and `load_mean` then act on shards; `save_pretrained` writes the folder that one process would
    have written; `gathered` gives a posterior to draw from. Under DistributedDataParallel every rank collects the same
    whole posterior (`replicated` is True), and one writes it.

    Args:
        model: the model whose weights are collected; any module will do, a PEFT model also saves as an adapter. Pass
            it wrapped in DistributedDataParallel, if it is, and after ``fully_shard``.
        rank: R, number of deviations kept; 0 for a diagonal posterior.
        params: "trainable", "lora" or a predicate on ``(name, parameter)``, see `select_parameters`.
        var_clamp: smallest variance a weight is given.

    Raises:
        ValueError: nothing selected, a negative rank or clamp, parameters on several devices or not all sharded alike
            along their first dimension.
    """

    def __init__(
        self, model: nn.Module, rank: int = 20, params: Selection = "trainable", var_clamp: float = 1e-30
    ) -> None:
        self.replicated = is_replicated(model)
        model = _unwrap(model)
        parameters = select_parameters(model, params)
        devices = {parameter.device for parameter in parameters.values()}
        if len(devices) > 1:
            raise ValueError(f"the random parameters must be on one device, they are on {sorted(map(str, devices))}")
        self._allocate(model, Layout.of(parameters), Sharding.of(parameters), rank, var_clamp, devices.pop())

    def _allocate(
        self,
        model: nn.Module,
        layout: Layout,
        sharding: Sharding | None,
        rank: int,
        var_clamp: float,
        device: torch.device | str,
    ) -> None:
        rank = integer("rank", rank, minimum=0)
        if not (math.isfinite(var_clamp) and var_clamp >= 0):
            raise ValueError(f"var_clamp must be finite and not negative, got {var_clamp}")
        self.model = model
        self.layout = layout
        self.sharding = sharding
        self.part = part = layout if sharding is None else sharding.part
        self.adapters: tuple[str, ...] = tuple(model.active_adapters) if isinstance(model, PeftModel) else ()
        self.var_clamp = float(var_clamp)
        self.mean = torch.zeros(part.size, device=device)
        self.m2 = torch.zeros(part.size, device=device)
        self.deviations = torch.zeros(rank, part.size, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def rank(self) -> int:
        """R, number of deviations kept."""
        return len(self.deviations)

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def local_parameters(self, model: nn.Module) -> Sequence[Tensor]:
        """The random parameters of ``model`` as they lie in the arena here: whole tensors, or this rank's shards.

        Raises:
            ValueError: a parameter is gone, has another shape or is sharded otherwise; the message names it.
        """
        if self.sharding is not None:
            return self.sharding.local(model)
        parameters = self.layout.parameters(model)
        require_whole(self.layout.names, parameters)
        return parameters

    def collect(self, check_finite: bool = True) -> None:
        """Take the model's weights as they are now into the posterior; call after ``optimizer.step()``.

        One pass over the weights that allocates nothing of their size.

        Args:
            check_finite: look first for NaN and infinity, which reads one scalar back from the device; False for
                capture in a CUDA graph.

        Raises:
            ValueError: a weight is not finite, or a parameter is gone, has another shape, is on another device than
                the posterior or sharded otherwise. The message names it, and the posterior is as it was. With
                `check_finite`, what one rank of a sharded model refuses, all refuse.
        """
        with nullcontext() if self.sharding is None or not check_finite else together(self.sharding.mesh):
            parameters = self.local_parameters(self.model)
            require_device(self.layout.names, parameters, self.device)
            if check_finite:
                require_finite(self.layout.names, parameters)
        deviations = self.deviations if self.rank else None
        collect_(parameters, self.mean, self.m2, deviations, self.count, self.part.table)

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
            method: "iid", or "antithetic": samples 2j and 2j+1 are mirror images about the mean; or
                "antithetic+orthogonal", where different pairs also have orthogonal z, see `structured`.
            dtype: of the samples; None takes the model's own if its random parameters share one, else float32.
            covariance: None uses the low-rank term if two columns are held, True demands it, False leaves it out.

        Raises:
            RuntimeError: nothing collected yet, or only shards are held here.
            ValueError: S below 1, a negative scale or index, an unknown method, or ``covariance=True`` with fewer than
                two columns.
            TypeError: a seed, a count or an index that is not an integer.
        """
        if self.sharding is not None:
            raise RuntimeError(
                "this rank holds only its shards: draw from posterior.gathered(), which every rank calls, or from "
                "SwagPosterior.from_pretrained of a saved posterior and a model that is not sharded"
            )
        return draw_samples(self, num_samples, seed, first, scale, method, dtype, covariance)

    def std(self) -> Tensor:
        """sigma ``[N]``, ``sqrt(max(m2 / count, var_clamp))``, without the low-rank part and without scale."""
        self._collected("std")
        return self.m2.div(self.count).clamp_(min=self.var_clamp).sqrt_()

    def mean_state_dict(self) -> dict[str, Tensor]:
        """The mean (SWA) as parameter name -> tensor, copied, in each parameter's dtype; of shards, as DTensors."""
        self._collected("mean_state_dict")
        views = self.part.views(self.mean)
        parameters = self.layout.parameters(self.model)
        means = {name: views[name].to(p.dtype, copy=True) for name, p in zip(views, parameters, strict=True)}
        return means if self.sharding is None else self.sharding.assemble(means)

    @torch.no_grad()
    def load_mean(self, model: nn.Module | None = None) -> None:
        """Set the random parameters of ``model`` (None: the model collected from) to the mean, in place."""
        self._collected("load_mean")
        parameters = self.local_parameters(self.model if model is None else _unwrap(model))
        for parameter, value in zip(parameters, self.part.views(self.mean).values(), strict=True):
            parameter.copy_(value)

    def truncated(self, rank: int) -> SwagPosterior:
        """The same mean and variance with the ``rank`` most recent deviations alone; 0 gives the diagonal posterior.

        Shares memory with this one, the deviations too where they lie in one stretch: to draw from and to save, not to
        collect into.

        Raises:
            ValueError: a negative rank, or more deviations than are held.
        """
        count, rank = int(self.count), integer("rank", rank, minimum=0)
        if rank > (held := min(count, self.rank)):
            raise ValueError(f"{rank} deviations were asked for, this posterior holds {held}")
        fewer = copy.copy(self)
        if rank < self.rank:
            # Collection n lies in row n mod R of a ring of R, there and here.
            rows = [n % self.rank for n in sorted(range(count - rank, count), key=lambda n: n % rank)]
            start = rows[0] if rows else 0
            in_one_stretch = rows == list(range(start, start + rank))
            fewer.deviations = self.deviations[start : start + rank] if in_one_stretch else self.deviations[rows]
        return fewer

    def gathered(self) -> SwagPosterior:
        """A posterior with the whole tensors on this rank, to draw from; every rank calls. Not sharded, it is itself."""
        if self.sharding is None:
            return self
        state = self.sharding.gather_state(self.state_dict(), everywhere=True)
        whole = SwagPosterior.__new__(SwagPosterior)
        whole._allocate(self.model, self.layout, None, self.rank, self.var_clamp, self.device)
        whole.adapters, whole.replicated = self.adapters, True
        whole.load_state_dict(state)
        return whole

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
        """Write a PEFT adapter whose weights are the mean, and the posterior beside it, from one process.

        Every rank calls for a sharded posterior: rank 0 gathers and writes, and a failure there is an error
        everywhere. For a model in DistributedDataParallel any ranks call that include rank 0, which writes; the others
        wait for it.

        ``PeftModel.from_pretrained(base, folder)`` loads the mean without this package. Random parameters that PEFT
        does not count to the adapter (a predicate may pick a norm of the base model) are in
        ``swag_posterior.safetensors`` alone: `from_pretrained` then `load_mean` brings them back. See
        `checkpoint.save` for the files and for what a killed save leaves.
        """
        checkpoint.save(self, folder)

    @classmethod
    def from_pretrained(cls, model: nn.Module, folder: str | os.PathLike[str]) -> SwagPosterior:
        """The posterior of `save_pretrained`, tied to ``model``; collecting goes on where it stopped.

        Into a sharded model each rank reads its own shards, whatever number of ranks it was saved from; every rank
        calls.

        The model's weights are not changed. Parameters are found by name, so the adapter may be loaded frozen or
        trainable, but under the name it was saved with.

        Raises:
            FileNotFoundError: the folder has no posterior.
            ValueError: the file is truncated, foreign or of another version, or the model's tensors differ from it;
                the message says which.
        """
        replicated = is_replicated(model)
        model = _unwrap(model)
        with together(mesh_of(model)):
            saved = checkpoint_load.load(model, folder)
        posterior = cls.__new__(cls)
        posterior.replicated = replicated
        posterior._allocate(model, saved.layout, saved.sharding, saved.rank, saved.var_clamp, saved.device)
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
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    reshard(model)
    return model
