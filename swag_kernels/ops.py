"""The four ops: schemas, fakes, argument checks and dispatch. The one place where an op is declared.

The maths of each op stands in :mod:`swag_kernels.reference`; :mod:`swag_kernels.backend` picks who computes it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from swag_kernels.average import AverageState
from swag_kernels.backend import select
from swag_kernels.layout import BLOCK, check_layout

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_UINT64 = 2**64

_library = torch.library.Library("swag_kernels", "DEF")
_library.define(
    "collect_(Tensor[] params, Tensor(a!) mean, Tensor(b!) m2, Tensor(c!)? deviations, Tensor(d!) count, Tensor layout) -> ()"
)
_library.define(
    "draw(Tensor mean, Tensor std, Tensor? deviations, SymInt num_samples, *, int seed, SymInt first_sample, "
    "float diag_scale, float low_rank_scale, bool antithetic, Tensor layout, ScalarType dtype) -> Tensor"
)
_library.define("sampled_lora(Tensor x, Tensor A, Tensor B, float scaling, Tensor base) -> Tensor")
_library.define(
    "sampled_lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor A, Tensor B, float scaling) -> Tensor"
)
_library.define("sampled_lora_(Tensor x, Tensor A, Tensor B, float scaling, Tensor(a!) base) -> ()")
_library.define(
    "sampled_lora_backward(Tensor grad, Tensor x, Tensor A, Tensor B, float scaling) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "bayes_average_(Tensor(a!) log_sum, Tensor(b!) m2, Tensor(c!) votes, Tensor(d!) entropy, Tensor(e!) count, "
    "Tensor logits, int group) -> ()"
)
_ops = torch.ops.swag_kernels
# Overloads resolved once, because that costs as much as a small op.
_collect, _draw, _bayes_average = _ops.collect_.default, _ops.draw.default, _ops.bayes_average_.default
_sampled_lora, _sampled_lora_inplace = _ops.sampled_lora.default, _ops.sampled_lora_.default
_sampled_lora_backward, _sampled_lora_linear = _ops.sampled_lora_backward.default, _ops.sampled_lora_linear.default


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_arena(op: str, size: int, device: torch.device, **buffers: Tensor | None) -> None:
    _require(
        size % BLOCK == 0,
        f"{op}: the arena's size {size} is not a multiple of {BLOCK}; use swag_kernels.arena_size(layout)",
    )
    for name, buffer in buffers.items():
        if buffer is None:
            continue
        _require(
            buffer.dtype in (torch.float32, torch.float64) and buffer.is_contiguous() and buffer.device == device,
            f"{op}: {name} must be contiguous float32 on {device}, got {buffer.dtype} on {buffer.device}",
        )
        _require(
            buffer.shape[-1:] == (size,), f"{op}: {name} has shape {list(buffer.shape)}, its last size must be {size}"
        )


def collect_(
    params: Sequence[Tensor], mean: Tensor, m2: Tensor, deviations: Tensor | None, count: Tensor, layout: Tensor
) -> None:
    """Add the current parameters to the running moments, in one pass over all tensors.

    With n = ``count`` and θ the parameter in float32 (Welford 1962; SWAG: Maddox et al. 2019, Algorithm 1)::

        δ = θ − mean;  mean += δ/(n+1);  m2 += δ·(θ − mean);  deviations[n mod R] = θ − mean;  count = n + 1

    Args:
        params: T tensors of float32, bfloat16 or float16, of any shape and stride, in the layout's order.
        mean, m2: float32 ``[N]``, updated in place.
        deviations: float32 ``[R, N]``, of which row n mod R is overwritten; None keeps no deviations.
        count: int64 scalar on the arena's device, increased by one.
        layout: int64 ``[T, 3]`` on the CPU, see :mod:`swag_kernels.layout`.

    Nothing is allocated for contiguous parameters. Non-finite parameters are not looked for here.

    Raises:
        ValueError: a size, dtype or device does not fit; nothing was written.
    """
    params = list(params)
    with torch.no_grad():
        if mean.is_cuda and not torch.compiler.is_compiling():
            again = getattr(select(mean.device), "recollect", None)
            if again is not None and again(params, mean, m2, deviations, count, layout):
                return
        _collect(params, mean, m2, deviations, count, layout)


def _collect_impl(
    params: list[Tensor], mean: Tensor, m2: Tensor, deviations: Tensor | None, count: Tensor, layout: Tensor
) -> None:
    _check_arena("collect_", mean.numel(), mean.device, mean=mean, m2=m2, deviations=deviations)
    _require(mean.dim() == 1 and m2.dim() == 1, "collect_: mean and m2 are flat buffers [N]")
    _require(deviations is None or deviations.dim() == 2, "collect_: deviations must be [R, N]")
    _require(count.dtype == torch.int64 and count.dim() == 0, "collect_: count must be an int64 scalar tensor")
    rows = check_layout(layout, mean.numel())
    _require(len(rows) == len(params), f"collect_: {len(params)} parameters for a layout of {len(rows)} tensors")
    for index, (param, (_, numel, _)) in enumerate(zip(params, rows, strict=True)):
        # Not _require: formatting the message for every tensor would cost a third of the op.
        if param.numel() != numel or param.dtype not in _FLOATS or param.device != mean.device:
            raise ValueError(
                f"collect_: parameter {index} is {param.dtype} {list(param.shape)} on {param.device}; the layout has "
                f"{numel} elements there, on {mean.device}"
            )
    if deviations is not None and not len(deviations):
        deviations = None
    select(mean.device, _widest(mean, *params)).collect_(params, mean, m2, deviations, count, layout)


def _widest(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in [t.dtype for t in tensors] else torch.float32


def draw(
    mean: Tensor,
    std: Tensor,
    deviations: Tensor | None,
    num_samples: int,
    *,
    seed: int,
    first_sample: int,
    diag_scale: float,
    low_rank_scale: float,
    antithetic: bool,
    layout: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Draw ``num_samples`` samples of a Gaussian with diagonal plus low-rank covariance, reading its state once.

    ``w_s = mean + diag_scale · std ⊙ ε_s + low_rank_scale · deviationsᵀ z_s`` with ``ε_s ~ N(0, I_N)`` and one
    ``z_s ~ N(0, I_R)`` for all tensors (Maddox et al. 2019, eq. 1, whose ``1/√(R−1)`` and ``1/√2`` the caller folds into the scales).

    Sample k is a pure function of (mean, std, deviations, seed, k): normals come from Philox4x32-10 (Salmon et al. 2011)
    keyed by ``seed`` at the counter ``(quad, sample, tensor, stream)`` and Box–Muller, see :mod:`swag_kernels.reference`.
    With ``antithetic`` samples 2j and 2j+1 are ``mean ± d`` with the d of sample j.

    Args:
        mean, std: float32 ``[N]``.
        deviations: float32 ``[R, N]``, the rows in use; None for a diagonal covariance.
        num_samples: S ≥ 1.
        seed: 0 ≤ seed < 2⁶⁴.
        first_sample: index of the first sample; first_sample + S ≤ 2³².
        layout: int64 ``[T, 3]`` on the CPU, see :mod:`swag_kernels.layout`.
        dtype: float32, bfloat16 or float16.

    Returns:
        ``[S, N]``; elements between the layout's segments are zero.

    Raises:
        ValueError: an argument does not fit.
    """
    _require(0 <= seed < _UINT64, f"draw: seed must lie in [0, 2**64), got {seed}")
    signed = seed - _UINT64 if seed >= _UINT64 // 2 else seed
    return _draw(
        mean,
        std,
        deviations,
        num_samples,
        seed=signed,
        first_sample=first_sample,
        diag_scale=diag_scale,
        low_rank_scale=low_rank_scale,
        antithetic=antithetic,
        layout=layout,
        dtype=dtype,
    )


def _draw_impl(
    mean: Tensor,
    std: Tensor,
    deviations: Tensor | None,
    num_samples: int,
    *,
    seed: int,
    first_sample: int,
    diag_scale: float,
    low_rank_scale: float,
    antithetic: bool,
    layout: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    _check_arena("draw", mean.numel(), mean.device, mean=mean, std=std, deviations=deviations)
    _require(mean.dim() == 1 and std.dim() == 1, "draw: mean and std are flat buffers [N]")
    _require(deviations is None or deviations.dim() == 2, "draw: deviations must be [R, N]")
    _require(num_samples >= 1, f"draw: num_samples must be at least 1, got {num_samples}")
    _require(
        first_sample >= 0 and first_sample + num_samples <= 2**32,
        f"draw: samples {first_sample} to {first_sample + num_samples} lie outside [0, 2**32]",
    )
    _require(dtype in _FLOATS, f"draw: dtype must be float32, bfloat16 or float16, got {dtype}")
    check_layout(layout, mean.numel())
    kernels = select(mean.device, torch.float64 if torch.float64 in (mean.dtype, dtype) else mean.dtype)
    return kernels.draw(
        mean,
        std,
        deviations,
        num_samples,
        seed=seed,
        first_sample=first_sample,
        diag_scale=diag_scale,
        low_rank_scale=low_rank_scale,
        antithetic=antithetic,
        layout=layout,
        dtype=dtype,
    )


def sampled_lora(x: Tensor, A: Tensor, B: Tensor, scaling: float, base: Tensor) -> Tensor:
    """Add each sample's LoRA update to the base layer's output: ``y_s = base_s + scaling · (x_s A_sᵀ) B_sᵀ``.

    (Hu et al. 2021, eq. 3, with the sample as a batch axis.) Accumulates in float32; differentiable in x, A, B and base;
    the same inputs give the same bits.

    Args:
        x: ``[S or 1, M, in]``; M rows for each sample.
        A: ``[S, r, in]``, and B: ``[S, out, r]``, of x's dtype; any stride on the sample axis.
        scaling: LoRA's α/r (or α/√r), the same for all samples.
        base: ``[S or 1, M, out]``, of any floating dtype, which the result takes over.

    A size of 1 on the sample axis of x or base broadcasts.

    Returns:
        ``[S, M, out]``. ``base`` is consumed: where it has that shape, is contiguous and no gradient is recorded, the
        result is written into it and returned.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    recorded = torch.is_grad_enabled() and (x.requires_grad or A.requires_grad or B.requires_grad or base.requires_grad)
    if not recorded and base.is_contiguous() and base.shape[0] == A.shape[0]:
        _sampled_lora_inplace(x, A, B, scaling, base)
        return base
    return _sampled_lora(x, A, B, scaling, base)


def sampled_lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """A linear layer and each sample's LoRA update of it: ``y_s = x_s Wᵀ + bias + scaling · (x_s A_sᵀ) B_sᵀ``.

    What `sampled_lora` gives after the layer, up to rounding; in one kernel where that is faster. (LoRAFusion, Zhu et al.
    2025, adds the update inside the layer's product.)

    Args:
        x: ``[S or 1, M, in]``.
        weight: ``[out, in]``, and bias: ``[out]`` or None, of x's dtype.
        A: ``[S, r, in]``, and B: ``[S, out, r]``, as for `sampled_lora`.

    Returns:
        ``[S, M, out]``, in the layer's dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    given = (x, weight, A, B) if bias is None else (x, weight, bias, A, B)
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return sampled_lora(x, A, B, scaling, linear(x, weight, bias))
    return _sampled_lora_linear(x, weight, bias, A, B, scaling)


def _check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> torch.dtype:
    for name, t, axes in (("weight", weight, 2), ("bias", bias, 1)):
        if t is not None and (t.dim() != axes or t.dtype != x.dtype or t.device != x.device):
            raise ValueError(
                f"sampled_lora_linear: {name} must have {axes} axes and be {x.dtype} on {x.device} as x is, got "
                f"{t.dtype} {list(t.shape)} on {t.device}"
            )
    out, features = weight.shape
    if x.dim() != 3 or x.shape[2] != features or (bias is not None and bias.shape[0] != out):
        raise ValueError(
            f"sampled_lora_linear: expected x [S or 1, M, in], weight [out, in], bias [out], got x {list(x.shape)}, "
            f"weight {list(weight.shape)}, bias {None if bias is None else list(bias.shape)}"
        )
    return _check_lora(x, A, B, x[:, :, :1].expand(-1, -1, out))


def _check_lora(x: Tensor, A: Tensor, B: Tensor, base: Tensor) -> torch.dtype:
    """The widest dtype, after a check of everything; in few steps, as small calls take as long as their checks."""
    shapes = x.shape, A.shape, B.shape, base.shape
    try:
        (x_samples, rows, features), (samples, rank, _), _, (base_samples, _, out) = shapes
    except ValueError:
        raise ValueError(f"sampled_lora: all tensors have three axes, got {_named_shapes(*shapes)}") from None
    if not (
        x_samples in (1, samples)
        and base_samples in (1, samples)
        and shapes[1][2] == features
        and shapes[2] == (samples, out, rank)
        and shapes[3][1] == rows
    ):
        raise ValueError(
            f"sampled_lora: expected x [S or 1, M, in], A [S, r, in], B [S, out, r], base [S or 1, M, out], "
            f"got {_named_shapes(*shapes)}"
        )
    dtype, base_dtype = x.dtype, base.dtype
    if not (dtype == A.dtype == B.dtype and dtype in _FLOATS and base_dtype in _FLOATS):
        raise ValueError(
            f"sampled_lora: x, A and B need one floating dtype, got {x.dtype}, {A.dtype}, {B.dtype} (base {base.dtype})"
        )
    if not x.device == A.device == B.device == base.device:
        raise ValueError("sampled_lora: all tensors must be on one device")
    return torch.float64 if base_dtype == torch.float64 else dtype


def _named_shapes(*shapes: Sequence[int]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in zip(("x", "A", "B", "base"), shapes, strict=True))


def _sampled_lora_impl(x: Tensor, A: Tensor, B: Tensor, scaling: float, base: Tensor) -> Tensor:
    return select(x.device, _check_lora(x, A, B, base)).sampled_lora(x, A, B, scaling, base)


def _sampled_lora_inplace_impl(x: Tensor, A: Tensor, B: Tensor, scaling: float, base: Tensor) -> None:
    dtype = _check_lora(x, A, B, base)
    if base.size(0) != A.size(0):
        raise ValueError("sampled_lora_: base cannot broadcast over samples in place")
    select(x.device, dtype).sampled_lora_(x, A, B, scaling, base)


def _sampled_lora_linear_impl(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float
) -> Tensor:
    kernels = select(x.device, _check_linear(x, weight, bias, A, B))
    fused = getattr(kernels, "sampled_lora_linear", None)
    y = None if fused is None else fused(x, weight, bias, A, B, scaling)
    if y is not None:
        return y
    base = linear(x, weight, bias)
    if len(base) != len(A):
        return kernels.sampled_lora(x, A, B, scaling, base)
    kernels.sampled_lora_(x, A, B, scaling, base)
    return base


def _sampled_lora_backward_impl(
    grad: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    return select(x.device, _check_lora(x, A, B, grad)).sampled_lora_backward(grad, x, A, B, scaling)


def _sampled_lora_setup(ctx, inputs, output) -> None:
    x, A, B, scaling, base = inputs
    ctx.save_for_backward(x, A, B)
    ctx.scaling, ctx.base_shape = scaling, base.shape


def _sampled_lora_grad(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    dx = dA = dB = None
    if any(ctx.needs_input_grad[:3]):
        dx, dA, dB = _sampled_lora_backward(grad, *ctx.saved_tensors, ctx.scaling)
    return dx, dA, dB, None, grad.sum_to_size(ctx.base_shape) if ctx.needs_input_grad[4] else None


def bayes_average_(state: AverageState, logits: Tensor) -> None:
    """Stream S more samples into the running average ``state``; see :class:`swag_kernels.AverageState` for its fields.

    With ``p_s = softmax(logits_s)``: log Σ p_s in the log domain, the mean of the entropies ``H[p_s]``, the votes
    ``argmax p_s`` (the first class at a tie), and the squared deviations of the draws from their mean by the
    pairwise update of Chan et al. (1979). No ``[S, B, C]`` tensor of probabilities is made.

    Args:
        state: accumulators for B rows and C classes, updated in place.
        logits: ``[S, B, C]``, float32, bfloat16 or float16; −inf excludes a class. S must be even if the state is
            antithetic: samples 2j and 2j+1 are one draw.

    Raises:
        ValueError: a shape, dtype or device does not fit; the state is unchanged.
    """
    with torch.no_grad():
        _bayes_average(state.log_sum, state.m2, state.votes, state.mean_entropy, state.count, logits, state.group)


def _bayes_average_impl(
    log_sum: Tensor, m2: Tensor, votes: Tensor, entropy: Tensor, count: Tensor, logits: Tensor, group: int
) -> None:
    shape, dtype, device = log_sum.shape, log_sum.dtype, log_sum.device
    if logits.dim() != 3 or logits.shape[1:] != shape or logits.dtype not in _FLOATS:
        raise ValueError(
            f"bayes_average_: logits must be floating [S, {', '.join(map(str, shape))}], "
            f"got {logits.dtype} {list(logits.shape)}"
        )
    if logits.device != device:
        raise ValueError(f"bayes_average_: logits are on {logits.device}, the state on {device}")
    if group not in (1, 2) or len(logits) % group:
        raise ValueError(
            f"bayes_average_: {len(logits)} samples do not make whole antithetic pairs; stream an even number"
        )
    if not (
        len(shape) == 2
        and m2.shape == votes.shape == shape
        and entropy.shape == shape[:1]
        and dtype in (torch.float32, torch.float64)
        and all(t.dtype == dtype and t.device == device and t.is_contiguous() for t in (log_sum, m2, votes, entropy))
    ):
        raise ValueError(
            "bayes_average_: the state's tensors must be contiguous float32 [B, C] and [B] on one device; "
            "make them with swag_kernels.AverageState"
        )
    kernels = select(logits.device, _widest(logits, log_sum))
    kernels.bayes_average_(log_sum, m2, votes, entropy, count, logits, group)


for _name, _impl in {
    "collect_": _collect_impl,
    "draw": _draw_impl,
    "sampled_lora": _sampled_lora_impl,
    "sampled_lora_": _sampled_lora_inplace_impl,
    "sampled_lora_linear": _sampled_lora_linear_impl,
    "sampled_lora_backward": _sampled_lora_backward_impl,
    "bayes_average_": _bayes_average_impl,
}.items():
    _library.impl(_name, _impl, "CompositeExplicitAutograd")


@torch.library.register_fake("swag_kernels::collect_", lib=_library)
def _collect_fake(params, mean, m2, deviations, count, layout) -> None:
    return None


@torch.library.register_fake("swag_kernels::draw", lib=_library)
def _draw_fake(mean, std, deviations, num_samples, *, dtype, **_) -> Tensor:
    return mean.new_empty((num_samples, mean.shape[0]), dtype=dtype)


@torch.library.register_fake("swag_kernels::sampled_lora", lib=_library)
def _sampled_lora_fake(x, A, B, scaling, base) -> Tensor:
    _check_lora(x, A, B, base)
    return base.new_empty((A.shape[0], *base.shape[1:]))


@torch.library.register_fake("swag_kernels::sampled_lora_", lib=_library)
def _sampled_lora_inplace_fake(x, A, B, scaling, base) -> None:
    _check_lora(x, A, B, base)


@torch.library.register_fake("swag_kernels::sampled_lora_linear", lib=_library)
def _sampled_lora_linear_fake(x, weight, bias, A, B, scaling) -> Tensor:
    _check_linear(x, weight, bias, A, B)
    return x.new_empty((A.shape[0], x.shape[1], weight.shape[0]))


@torch.library.register_fake("swag_kernels::sampled_lora_backward", lib=_library)
def _sampled_lora_backward_fake(grad, x, A, B, scaling) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), A.new_empty(A.shape), B.new_empty(B.shape)


@torch.library.register_fake("swag_kernels::bayes_average_", lib=_library)
def _bayes_average_fake(log_sum, m2, votes, entropy, count, logits, group) -> None:
    return None


torch.library.register_autograd(
    "swag_kernels::sampled_lora", _sampled_lora_grad, setup_context=_sampled_lora_setup, lib=_library
)
