"""One prediction by one to four processes: the same bits, and errors that reach all of them."""

import contextlib
import io
import json
import os
import signal
import time

import pytest
import torch
from prediction_models import assert_same, fine_tune, texts
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh

from swag_kernels import AverageState
from swag_lora import Prediction, predict
from swag_lora.cli import main
from swag_lora.prediction import Chunk
from swag_lora.ranks import Ranks

CASES = {
    "fixed": {"num_samples": 22, "samples_per_pass": 4},
    "one chunk": {"num_samples": 8, "samples_per_pass": 8},
    "iid": {"num_samples": 7, "samples_per_pass": 1},
    "until sure": {"tolerance": 0.01, "max_samples": 80, "samples_per_pass": 4},
    "in parts": {"num_samples": 16, "samples_per_pass": 4, "examples_per_pass": 2},
}


def shared(meshes, names=None):
    """On each rank: the predictions of each case with each mesh, as plain tensors."""
    model, posterior = fine_tune(spread=0.3)
    results = []
    for shape, dimensions in meshes:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=dimensions)
        found = [predict(model, posterior, texts(), mesh=mesh, **CASES[name]) for name in names or CASES]
        results.append([vars(prediction) for prediction in found])
    return results


@pytest.mark.parametrize(
    ("world_size", "meshes"),
    [
        (1, [((1,), ("samples",)), ((1, 1), ("samples", "data"))]),
        (2, [((2,), ("samples",)), ((2,), ("data",))]),
        (3, [((3,), ("samples",)), ((3,), ("data",))]),
        (4, [((4,), ("samples",)), ((2, 2), ("samples", "data")), ((4,), ("data",))]),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_every_number_of_ranks_gives_one_answer(world_size, meshes):
    """22 samples in chunks of 4 are six chunks, the last one short: no number of ranks here divides all of them."""
    model, posterior = fine_tune(spread=0.3)
    alone = {name: predict(model, posterior, texts(), **options) for name, options in CASES.items()}
    for results in run_ranks(shared, world_size, meshes):
        for (_, dimensions), found in zip(meshes, results, strict=True):
            for (name, expected), values in zip(alone.items(), found, strict=True):
                # Without parts given, ranks along "data" split the batch, and its products round in another way.
                exact = "data" not in dimensions or world_size == 1 or name == "in parts"
                assert_same(Prediction(**values), expected, exact)


def refused():
    """Messages on each rank; every rank is told, and none is left waiting."""
    rank, messages = int(os.environ["RANK"]), []
    model, posterior = fine_tune()
    samples = init_device_mesh("cpu", (2,), mesh_dim_names=("samples",))

    def attempt(**options):
        try:
            predict(model, posterior, texts(), **{"mesh": samples, **options})
        except ValueError as error:
            messages.append(str(error))

    attempt(num_samples=2)
    attempt(num_samples=8, seed=rank)
    attempt(mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))
    attempt(mesh=init_device_mesh("cpu", (2,)))
    posterior.m2[5] += 1e-3 * rank
    attempt(num_samples=8)
    return messages


def test_refusals():
    for messages in run_ranks(refused, 2):
        few, arguments, name, nameless, posterior = messages
        assert few.startswith("2 ranks share 1 draws")
        assert "the arguments of rank 1 differ" in arguments
        assert name.startswith("mesh has the dimensions ['tp']") and nameless.startswith("mesh has the dimensions []")
        assert posterior.startswith("the posterior of rank 1 differs from rank 0's; load the same folder")


def dying():
    """Rank 1 is killed in the middle; what the others hear, and after how long."""
    model, posterior = fine_tune()
    mesh = init_device_mesh("cpu", (3,), mesh_dim_names=("samples",))

    class Dying:
        def draw(self, num_samples, *, first, **options):
            if os.environ["RANK"] == "1" and first >= 20:
                os.kill(os.getpid(), signal.SIGKILL)
            return posterior.draw(num_samples, first=first, **options)

    begin = time.monotonic()
    try:
        predict(model, Dying(), texts(), 60, samples_per_pass=2, mesh=mesh)
    except Exception as error:
        return type(error).__name__, time.monotonic() - begin
    return "finished", 0.0


def test_a_rank_that_dies():
    timeout = 20
    first, dead, last = run_ranks(dying, 3, timeout=timeout, may_die={1})
    assert dead is None
    for name, seconds in (first, last):
        assert name.endswith("Error") and seconds < timeout


def resumed(path, killed):
    """A prediction over two ranks, of which rank 0 is killed once, with a file to go on from."""
    model, posterior = fine_tune(spread=0.3)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("samples",))

    class Killed:
        calls = 0

        def draw(self, num_samples, *, first, **options):
            if killed and first >= 12:
                os.kill(os.getpid(), signal.SIGKILL)
            Killed.calls += 1
            return posterior.draw(num_samples, first=first, **options)

    prediction = predict(model, Killed(), texts(), 24, samples_per_pass=2, mesh=mesh, resume=path, save_every=2)
    return vars(prediction), Killed.calls


def test_another_number_of_ranks_goes_on_from_the_file(tmp_path):
    path = str(tmp_path / "state")
    assert run_ranks(resumed, 2, path, True, timeout=20, may_die={0, 1}) == [None, None]
    model, posterior = fine_tune(spread=0.3)
    expected = predict(model, posterior, texts(), 24, samples_per_pass=2)
    (mine, calls), (other, _) = run_ranks(resumed, 2, path, False)
    assert_same(Prediction(**mine), expected)
    assert_same(Prediction(**other), expected)
    assert calls < 7, "six chunks of this rank and the first samples, if it had begun anew"
    assert_same(predict(model, posterior, texts(), 24, samples_per_pass=2, resume=path, save_every=2), expected)


def test_the_chunks_of_a_round_are_exact():
    """What the exchange adds is zeros: infinities and small numbers arrive as they were, also where a rank has none."""
    for found in run_ranks(exchanged, 3):
        for rank, (state, shape) in enumerate(found):
            assert torch.equal(state["log_sum"], torch.tensor([[-torch.inf, 1e-30 + rank]]))
            assert state["count"] == rank + 1 and shape == (1, 1)
        assert len(found) == 2


def exchanged():
    ranks = Ranks.of(init_device_mesh("cpu", (3,), mesh_dim_names=("samples",)))
    state = AverageState(1, 2)
    state.log_sum.copy_(torch.tensor([[-torch.inf, 1e-30 + ranks.sample_rank]]))
    state.count += ranks.sample_rank + 1
    mine = Chunk(state, torch.Size((1, 1)), torch.float32) if ranks.sample_rank < 2 else None
    return [(vars(one.state), tuple(one.shape)) for one in ranks.gather(mine, 2)]


def command(folder, data):
    """`swag-lora evaluate` as torchrun starts it; what each rank printed to its standard output."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        status = main(["evaluate", folder, "--data", data, "--samples", "8", "--json", "-"])
    return status, out.getvalue()


def test_the_command_under_a_launcher(home, tmp_path):
    """One rank prints the result, which is that of one process up to the rounding of other chunks."""
    fit = ["fit", str(home / "bert"), "--data", str(home / "colors"), "--output", str(tmp_path / "fit")]
    assert main([*fit, "--epochs", "1", "--collections", "2", "--rank", "2", "--max-length", "16"]) == 0
    ((_, alone),) = run_ranks(command, 1, str(tmp_path / "fit"), str(home / "colors"))
    (first, printed), (second, nothing) = run_ranks(command, 2, str(tmp_path / "fit"), str(home / "colors"))
    assert first == second == 0 and nothing == ""
    one, two = json.loads(alone), json.loads(printed)
    for name in ("accuracy", "nll", "brier", "ood_auroc_entropy"):
        assert two["rows"][-1][name] == pytest.approx(one["rows"][-1][name], rel=1e-4), name
