"""`SWAG`, a drop-in for the class of the SWAG-LoRA code (Onal et al. 2024, arXiv 2405.03425)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from swag_kernels import collect_

from .compat_density import Densities
from .compat_state import Moments, load_hook, save_hook
from .layout import Layout, common_dtype, require_finite


class SWAG(Densities, nn.Module):
    """SWAG over the leaf modules of ``base``, with the constructor, methods and checkpoints of the published class.

    With ``R = max_num_models`` as configured, D the deviations of the last R models collected (zero where fewer were)
    and ``sigma^2 = max(variance, var_clamp)``, a sample is

        block=False   w = mean + sqrt(scale) (sigma * eps + D^T z / sqrt(R - 1)),   one z for all tensors
        block=True    w = mean + scale (sigma * eps + D^T z / sqrt(R - 1)),         a fresh z for each tensor

    and is written in place into the parameters of ``base``, which ``forward`` runs. The moments are kept in float32
    whatever the dtype of the model, by Welford's update; nothing is moved to the host. They are not buffers of the
    inner modules, so ``base.state_dict()`` and ``base.save_pretrained()`` are those of ``base`` alone.

    Args:
        base: a model, whose parameters are sampled.
        no_cov_mat: True keeps no deviations (a diagonal posterior).
        max_num_models: R, number of deviations kept.
        var_clamp: smallest variance a weight is given.
        modules_to_swag: "grad_only", every parameter of each leaf module that has one requiring a gradient;
            "lora_only", of those the modules with "lora" in their name; "all", every leaf module with parameters.

    Further arguments are taken and ignored, as published.

    Attributes:
        n_models: int64 ``[1]``, number of models collected.
        params: ``(module, parameter name)`` of each random tensor.
    """

    n_models: Tensor

    def __init__(
        self,
        base: nn.Module,
        no_cov_mat: bool = True,
        max_num_models: int = 0,
        var_clamp: float = 1e-30,
        modules_to_swag: str = "grad_only",
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if not isinstance(base, nn.Module):
            raise TypeError(f"base must be a model (an nn.Module instance), got {base!r}")
        if modules_to_swag not in ("grad_only", "lora_only", "all"):
            raise ValueError(f'modules_to_swag must be "grad_only", "lora_only" or "all", got {modules_to_swag!r}')
        if max_num_models < 0:
            raise ValueError(f"max_num_models must not be negative, got {max_num_models}")
        self.register_buffer("n_models", torch.zeros(1, dtype=torch.long))
        self.register_state_dict_post_hook(save_hook)
        self.register_load_state_dict_pre_hook(load_hook)
        self.no_cov_mat = no_cov_mat
        self.max_num_models = max_num_models
        self.var_clamp = var_clamp
        self.modules_to_swag = modules_to_swag
        self.base = base
        self.module_names = [name for name, module in base.named_modules() if self._is_chosen(name, module)]
        self.init_swag_model()

    def init_swag_model(self) -> None:
        """Choose the random tensors and start from nothing collected."""
        tensors: dict[str, Tensor] = {}
        self.params: list[tuple[nn.Module, str]] = []
        self.buffer_names: list[str] = []
        for module_name in self.module_names:
            module = self.base.get_submodule(module_name)
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    tensors[f"{module_name}.{name}".lstrip(".")] = parameter
                    self.params.append((module, name))
                    self.buffer_names.append(f"{module_name.replace('.', '-')}-{name}")
        if not tensors:
            raise ValueError(f'base has no leaf module that modules_to_swag="{self.modules_to_swag}" selects')
        device = next(iter(tensors.values())).device
        rank = None if self.no_cov_mat else self.max_num_models
        self._moments = Moments(Layout.of(tensors), rank, device)
        self.n_models = torch.zeros(1, dtype=torch.long, device=device)
        self._has_models = False

    def is_swag_module(self, name: str, module: nn.Module) -> bool:
        """Whether the parameters of ``module``, called ``name`` in its model, are sampled."""
        return name in self.module_names and _is_leaf(module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base(*args, **kwargs)

    def collect_model(self, base_model: nn.Module) -> None:
        """Take the weights of ``base_model``, which has the modules of ``base`` under the same names.

        Raises:
            ValueError: a parameter is missing, has another shape or is not finite. The message names it, and nothing
                is collected.
        """
        moments, names = self._moments, self._moments.layout.names
        parameters = moments.layout.parameters(extract_model_from_parallel(base_model, keep_torch_compile=False))
        require_finite(names, parameters)
        values = [parameter.detach() for parameter in parameters]
        count = self.n_models.view(())
        collect_(values, moments.mean, moments.m2, moments.deviations, count, moments.layout.table)
        self._has_models = True

    def sample(
        self,
        scale: float = 1.0,
        cov: bool = False,
        seed: int | None = None,
        block: bool = False,
        fullrank: bool = True,
    ) -> None:
        """Write one sample into ``base``.

        Args:
            scale: factor on the covariance, or with ``block`` on the deviation from the mean; 0 gives the mean.
            cov: add the low-rank term.
            seed: passed to ``torch.manual_seed`` first, as published; None goes on with torch's global generator, from
                which each sample takes its seed.
            block: a fresh z for each tensor.
            fullrank: with ``block``, False leaves the low-rank term out; without, it means nothing, as published.

        Raises:
            RuntimeError: no model collected yet.
            ValueError: a negative scale, or ``cov`` without a covariance to draw from.
        """
        if seed is not None:
            torch.manual_seed(seed)
        if block:
            self.sample_blockwise(scale, cov, fullrank)
        else:
            self.sample_fullrank(scale, cov, fullrank)

    def sample_fullrank(self, scale: float, cov: bool, fullrank: bool = True) -> None:
        """`sample` with one z for all tensors."""
        divisor = self._check_sample(scale, cov)
        self._write_sample(self._moments.sample, math.sqrt(scale), divisor)

    def sample_blockwise(self, scale: float, cov: bool, fullrank: bool = True) -> None:
        """`sample` with a fresh z for each tensor."""
        divisor = self._check_sample(scale, cov and fullrank)
        self._write_sample(self._moments.sample_blocks, scale, divisor)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = False, assign: bool = False) -> Any:
        """Load a checkpoint written here or by the published code; `compat_state.Moments` lists its entries.

        The variance loses what ``sq_mean - mean^2`` cancels, unless the checkpoint is the state this object is in: then
        the float32 moments stay as they are, and only ``base`` is restored.
        """
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def export_numpy_params(self, export_cov_mat: bool = False) -> tuple[Any, ...]:
        """``(mean, variance)``, float32 arrays of all random weights in order; with ``export_cov_mat`` also a list of
        each tensor's raveled ``[columns, numel]`` deviations, oldest first."""
        means, variances, columns = ([t.cpu().numpy().ravel() for t in ts] for ts in self.generate_mean_var_covar())
        arrays = np.concatenate(means), np.concatenate(variances)
        return (*arrays, columns) if export_cov_mat else arrays

    def import_numpy_weights(self, w: np.ndarray) -> None:
        """Write ``w``, an array of all random weights in the order of `export_numpy_params`, into ``base``."""
        layout = self._moments.layout
        if w.size != layout.numel:
            raise ValueError(f"expected {layout.numel} weights, got an array of {w.size}")
        parts = torch.tensor(w).reshape(-1).split([math.prod(shape) for shape in layout.shapes])
        self._write([part.view(shape) for part, shape in zip(parts, layout.shapes, strict=True)])

    def generate_mean_var_covar(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """For each random tensor its mean and variance ``[*shape]`` and its deviations ``[columns, numel]``, oldest
        first: float32 copies, the variance not clamped."""
        moments = self._moments
        variance = moments.m2 / self.n_models.clamp(min=1)
        return (
            [mean.clone() for mean in moments.layout.views(moments.mean).values()],
            list(moments.layout.views(variance).values()),
            moments.columns(int(self.n_models)),
        )

    def _is_chosen(self, name: str, module: nn.Module) -> bool:
        if not _is_leaf(module):
            return False
        trainable = any(parameter.requires_grad for parameter in module.parameters())
        in_lora = "lora" in name or self.modules_to_swag != "lora_only"
        return self.modules_to_swag == "all" or (trainable and in_lora)

    def _sampled(self) -> list[Tensor]:
        return [getattr(module, name) for module, name in self.params]

    def _check_sample(self, scale: float, cov: bool) -> float:
        """sqrt(R - 1), or infinity without the low-rank term."""
        if not (math.isfinite(scale) and scale >= 0):
            raise ValueError(f"scale must be finite and not negative, got {scale}")
        if not self._has_models:
            raise RuntimeError("no model collected yet: call collect_model() before sample()")
        if not cov:
            return math.inf
        if self.no_cov_mat:
            raise ValueError("cov=True needs the deviations: make SWAG with no_cov_mat=False")
        if self.max_num_models < 2:
            raise ValueError(
                "cov=True needs at least two deviations: make SWAG with max_num_models of 2 or more, "
                f"not {self.max_num_models}"
            )
        return math.sqrt(self.max_num_models - 1)

    def _write_sample(self, sample: Callable[..., list[Tensor]], diag_scale: float, divisor: float) -> None:
        std = self._moments.std(self.n_models, self.var_clamp)
        dtype = common_dtype(tensor.dtype for tensor in self._sampled())
        # The key comes from torch's generator on the CPU, so torch.manual_seed governs it and no device is waited for.
        seed = int(torch.randint(2**63 - 1, ()))
        self._write(sample(std, seed, diag_scale, diag_scale / divisor, dtype))

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        torch._foreach_copy_(self._sampled(), values)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SWAG:
        super()._apply(fn, recurse)
        # The moments follow the model to another device, and stay float32 when it changes its dtype.
        self._moments.to(fn(self._moments.mean[:0]).device)
        return self


def _is_leaf(module: nn.Module) -> bool:
    return bool(module._parameters) and not list(module.children())
