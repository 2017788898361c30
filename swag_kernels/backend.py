"""Which back end serves which device, and how a user overrides it."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType

import torch

BACKENDS = {"cuda": "cuda", "triton": "triton", "cpu": "native", "reference": "reference"}
"""Back ends by name, and the module of this package that holds each one's ops."""

_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
_DEFAULT = ("reference",)

OPS = (
    "collect_",
    "draw",
    "sampled_lora",
    "sampled_lora_",
    "sampled_lora_linear",
    "sampled_lora_backward",
    "bayes_average_",
)

_forced: ContextVar[str | None] = ContextVar("swag_kernels_backend", default=None)


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} names the back end '{name}'; known are: {', '.join(BACKENDS)}")
    return name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Serve every op inside the block by the back end ``name``, whatever the device's own choice would be.

    The environment variable ``SWAG_KERNELS_BACKEND`` does the same for a whole process.
    """
    token = _forced.set(_check_name(name, "swag_kernels.backend(...)"))
    try:
        yield
    finally:
        _forced.reset(token)


@cache
def _from_environment() -> str | None:
    value = os.environ.get("SWAG_KERNELS_BACKEND")
    return _check_name(value, "SWAG_KERNELS_BACKEND") if value else None


@cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"swag_kernels.{BACKENDS[name]}")


def _missing(name: str) -> str | None:
    """Why the back end cannot run here, or None if it can."""
    return getattr(_module(name), "missing", lambda: None)()


def choose(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """Name of the back end that an op on this device and dtype will use. float64 is always the reference's."""
    if dtype == torch.float64:
        return "reference"
    forced = _forced.get() or _from_environment()
    if forced is not None:
        if not _serves(forced, device.type):
            how = "TRITON_INTERPRET=1, set before Python starts, runs it there; or " if forced == "triton" else ""
            raise RuntimeError(
                f"the back end '{forced}' does not serve tensors on {device}; {how}use backend('reference')"
            )
        if reason := _missing(forced):
            raise RuntimeError(f"the back end '{forced}' is not available: {reason}")
        return forced
    name, reasons = _default(device.type)
    if name == "reference" and reasons:
        warnings.warn(f"swag_kernels runs on the slow '{name}' back end; {reasons}", RuntimeWarning, stacklevel=2)
    return name


def _serves(name: str, device_type: str) -> bool:
    if name == "triton" and device_type == "cpu":
        return _module(name).interpreted()
    return name in _PREFERENCE.get(device_type, _DEFAULT)


@cache
def _default(device_type: str) -> tuple[str, str]:
    """The first back end that can run on a device, and why the preferred ones cannot."""
    reasons = []
    for name in _PREFERENCE.get(device_type, _DEFAULT):
        reason = _missing(name)
        if reason is None:
            break
        reasons.append(f"'{name}' is not available: {reason}")
    return name, "; ".join(reasons)


def select(device: torch.device, dtype: torch.dtype = torch.float32) -> ModuleType:
    """Module whose functions serve an op on this device and dtype."""
    if dtype != torch.float64 and _forced.get() is None and (module := _usual(device.type)):
        return module
    return _module(choose(device, dtype))


@cache
def _usual(device_type: str) -> ModuleType | None:
    """What serves a type of device if nobody asks for another, or None if there is something to say about it."""
    if _from_environment() is not None:
        return None
    name, reasons = _default(device_type)
    return None if name == "reference" and reasons else _module(name)


def info() -> None:
    """Print what was built, what was found, and what each op will use on each device."""
    from swag_kernels import __version__, native

    print(f"swag_kernels {__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in BACKENDS:
        print(f"  back end {name}: {_missing(name) or 'available'}")
    if native.missing() is None:
        sets = native.supported_isas()
        print(
            f"  instruction set {native.isa()} (available: {', '.join(sets)}), OpenMP {'on' if native.openmp() else 'off'}"
        )
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    for device in devices:
        print(f"  on {device}: {_choice(device)}")
    for name, holder in (("cuda", "cuda"), ("triton", "triton.plan")):
        if _missing(name) is None:
            print(f"  sampled_lora by {name}: {importlib.import_module(f'swag_kernels.{holder}').RULE}")


def _choice(device: torch.device) -> str:
    """What each op will use on the device, and why."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            name = choose(device)
        except RuntimeError as error:
            return str(error)
    asked = _forced.get() or _from_environment()
    why = "asked for" if asked else _default(device.type)[1] or "the first choice there"
    server_of = getattr(_module(name), "server_of", lambda op: name)  # a back end may leave an op to another
    return f"{', '.join(f'{op} → {server_of(op)}' for op in OPS)} ({why}); float64 → reference"
