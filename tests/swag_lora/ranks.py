"""Process groups on this machine, for the tests of what many ranks do together."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

PRELOADED = [
    "torch.distributed.fsdp",
    "transformers.models.bert.modeling_bert",
    "transformers.trainer",
    "peft",
    "pytest",
    "swag_lora",
]


class RankError(AssertionError):
    """A rank raised, died or hung; the message has the traceback."""


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60, may_die: Collection[int] = ()
) -> list[Any]:
    """Call ``function(*args)`` in `world_size` new processes that form a gloo group; their results in rank's order.

    Each process has one thread, the seed 0, and RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as
    ``torchrun`` sets them. The first launch of a test session starts a server that imports torch, transformers and
    peft; processes are forked from it, so that a launch costs some tenths of a second, not seconds.

    Args:
        function: a function at the top of its module; the processes load it from its file.
        world_size: number of ranks.
        args: what ``pickle`` takes; results likewise.
        timeout: seconds until the launch is killed; a collective waits a little less, so that it is what fails.
        may_die: ranks that may end without a result (killed, ``os._exit``), which then is None.

    Raises:
        RankError: the first rank that raised, with its traceback; a rank that died or was not done in time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    source = (function.__code__.co_filename, function.__module__, function.__qualname__)
    payload = pickle.dumps(args)
    results: list[Any] = [None] * world_size
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        waiting: dict[Connection, int] = {}
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(
                    target=_main, args=(theirs, source, payload, rank, world_size, f"{folder}/store", timeout)
                )
                process.start()
                theirs.close()
                waiting[ours] = rank
                processes.append(process)
            deadline = time.monotonic() + timeout
            while waiting:
                ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise RankError(f"ranks {sorted(waiting.values())} of {world_size} not done after {timeout} s")
                for connection in ready:
                    assert isinstance(connection, Connection)
                    rank = waiting.pop(connection)
                    results[rank] = _result(connection, rank, world_size, rank in may_die)
        finally:
            for process in processes:
                # Those that are done may still wait for one another to leave the group.
                process.join(0 if waiting else 10)
                process.kill()
                process.join()
    return results


def refused(call: Callable[[], object]) -> str | None:
    """The error of ``call``, None if it raises none: what a rank has to tell the test."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _result(connection: Connection, rank: int, world_size: int, may_die: bool) -> Any:
    try:
        result, error = pickle.loads(connection.recv_bytes())
    except EOFError:
        if may_die:
            return None
        raise RankError(f"rank {rank} of {world_size} died without a word") from None
    if error is not None:
        raise RankError(f"rank {rank} of {world_size}:\n{error}")
    return result


def _main(
    connection: Connection,
    source: tuple[str, str, str],
    payload: bytes,
    rank: int,
    world_size: int,
    store: str,
    timeout: float,
) -> None:
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT="0", OMP_NUM_THREADS="1",
    )  # fmt: skip
    import torch
    import torch.distributed as dist

    try:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        patience = timedelta(seconds=0.8 * timeout)
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=patience
        )
        function = _load(*source)
        outcome = pickle.dumps((function(*pickle.loads(payload)), None))
    except BaseException:
        outcome = pickle.dumps((None, traceback.format_exc()))
    connection.send_bytes(outcome)
    connection.close()
    # Without the interpreter's end: threads of the group, and caches of the libraries, would only cost time.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _load(file: str, module_name: str, qualname: str) -> Callable[..., Any]:
    """The function from its file: under pytest a test module's name is not one that a process could import."""
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, Path(file))
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    found: Any = sys.modules[module_name]
    for part in qualname.split("."):
        found = getattr(found, part)
    return found
