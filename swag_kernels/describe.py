"""What tensors are besides their values, as one object: what was derived from it holds for as long as it compares equal."""

from __future__ import annotations

from functools import cache

from torch import Tensor

from swag_kernels import native


def describe(tensors: list[Tensor]) -> object:
    """Equal for two lists only if they agree in every tensor's address, device, dtype, shape and contiguity.

    Equal to nothing where the values may not simply be what the memory holds: sparse, nested, fake, on the meta device,
    complex, lazily zero, or lazily negated, which is looked for only where no stride gives it away: in one element.
    With the extension in one pass, else by torch's getters, which takes several times as long.

    Raises:
        TypeError: an element is no tensor.
    """
    described = _native()(tensors)
    return _by_getters(tensors) if described is None else described


_native = cache(native.describer)


def _by_getters(tensors: list[Tensor]) -> object:
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"expected tensors, got {type(tensor).__name__}")
    try:
        addresses, dtypes = tuple(map(Tensor.data_ptr, tensors)), [t.dtype for t in tensors]
        if not all(addresses) and any(not t.data_ptr() and t.numel() for t in tensors):
            return object()
        if any(map(Tensor.is_neg, tensors)) or any(dtype.is_complex for dtype in set(dtypes)):
            return object()
        contiguous = tuple(map(Tensor.is_contiguous, tensors))
        return addresses, [t.device for t in tensors], dtypes, [t.shape for t in tensors], contiguous
    except RuntimeError:  # no storage
        return object()
