"""An interrupted average goes on from its file, and no digit tells."""

import importlib
import os
import random
import signal
import threading

import pytest
from prediction_models import assert_same, fine_tune, texts
from ranks import run_ranks

from swag_lora import Prediction, Predictor, predict


class Stopping:
    """A posterior that is interrupted at sample `at`."""

    def __init__(self, posterior, at):
        self.posterior, self.at, self.drawn = posterior, at, []

    def draw(self, num_samples, *, first, **options):
        if first >= self.at:
            raise KeyboardInterrupt
        self.drawn.append(first)
        return self.posterior.draw(num_samples, first=first, **options)


@pytest.fixture(scope="module")
def model_and_posterior():
    return fine_tune(spread=0.3)


OPTIONS = {"num_samples": 40, "samples_per_pass": 4}


@pytest.mark.parametrize("at", [4, 12, 17, 36])
def test_an_interrupted_call(model_and_posterior, tmp_path, at):
    model, posterior = model_and_posterior
    expected = predict(model, posterior, texts(), **OPTIONS)
    path = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        predict(model, Stopping(posterior, at), texts(), **OPTIONS, resume=path, save_every=2)
    assert [file.name for file in tmp_path.iterdir()] in ([], ["state"])
    again = Stopping(posterior, 1000)
    assert_same(predict(model, again, texts(), **OPTIONS, resume=path, save_every=2), expected)
    done = -(-at // 4) // 2 * 2
    assert [first for first in again.drawn[1:]] == list(range(4 * done, 40, 4)), "at most one interval is done again"
    finished = Stopping(posterior, 1)
    assert_same(predict(model, finished, texts(), **OPTIONS, resume=path, save_every=2), expected)
    assert finished.drawn == [0], "a finished call is read from the file"


def test_many_batches_and_parts(model_and_posterior, tmp_path):
    model, posterior = model_and_posterior
    batches = [texts(5, 6, seed) for seed in range(3)]
    options = {"samples_per_pass": 4, "examples_per_pass": 2}
    for how in ({"num_samples": 24}, {"tolerance": 0.02, "max_samples": 40}):
        path = tmp_path / str(len(how))
        expected = [Predictor(model, posterior, **how, **options)(batch) for batch in batches]
        with pytest.raises(KeyboardInterrupt):
            interrupted = Predictor(
                model, Stopping(posterior, 10**6), **how, **options, resume=path, keep_weights=False
            )
            interrupted(batches[0])
            interrupted._posterior.at = 4
            interrupted(batches[1])
        resumed = Predictor(model, posterior, **how, **options, resume=path)
        for batch, prediction in zip(batches, expected, strict=True):
            assert_same(resumed(batch), prediction)


def test_a_plan_that_was_measured_stays(model_and_posterior, tmp_path, monkeypatch):
    """Another time a machine may find another size of chunk faster; the digits must not show it."""
    model, posterior = model_and_posterior
    module, path = importlib.import_module("swag_lora.predictor"), tmp_path / "state"
    monkeypatch.setattr(module.plan, "make_plan", lambda *args: module.Plan(6, 4))
    expected = predict(model, posterior, texts(), 60, memory="1GiB")
    with pytest.raises(KeyboardInterrupt):
        predict(model, Stopping(posterior, 30), texts(), 60, memory="1GiB", resume=path, save_every=2)
    monkeypatch.setattr(module.plan, "make_plan", lambda *args: module.Plan(10, 7))
    assert_same(predict(model, posterior, texts(), 60, memory="1GiB", resume=path, save_every=2), expected)


def killed(path, seconds):
    """Predictions for three batches in a process that is killed after some seconds, or not."""
    model, posterior = fine_tune(spread=0.3)
    if seconds is not None:
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
    predictor = Predictor(model, posterior, 1200, samples_per_pass=4, resume=path, save_every=5)
    return [vars(predictor(texts(5, 6, seed))) for seed in range(3)]


def test_killed_at_random(tmp_path):
    """kill -9, three times: the result has the digits of a run that nobody killed."""
    path, dice, deaths, sizes = str(tmp_path / "state"), random.Random(0), 0, []
    for _ in range(3):
        (found,) = run_ranks(killed, 1, path, dice.uniform(0.3, 1.0), may_die={0})
        deaths += found is None
        sizes.append(os.path.getsize(path) if os.path.exists(path) else 0)
    assert deaths and sizes[-1], "it was killed, with something done"
    (resumed,) = run_ranks(killed, 1, path, None)
    (alone,) = run_ranks(killed, 1, None, None)
    for mine, expected in zip(resumed, alone, strict=True):
        assert_same(Prediction(**mine), Prediction(**expected))


def test_files_of_other_calls(model_and_posterior, tmp_path):
    model, posterior = model_and_posterior
    path = tmp_path / "state"
    predict(model, posterior, texts(), **OPTIONS, resume=path)
    before = path.read_bytes()
    for changed in ({"seed": 1}, {"scale": 1.0}, {"num_samples": 44}, {"method": "iid"}):
        with pytest.raises(ValueError, match="belongs to another posterior or to other arguments"):
            predict(model, posterior, texts(), **OPTIONS | changed, resume=path)
    for batch, changed in ((texts(seed=5), {}), (texts(6), {})):
        with pytest.raises(ValueError, match="written for other data"):
            predict(model, posterior, batch, **OPTIONS | changed, resume=path)
    _, other = fine_tune(spread=0.2)
    with pytest.raises(ValueError, match="belongs to another posterior"):
        predict(model, other, texts(), **OPTIONS, resume=path)
    assert path.read_bytes() == before
    path.write_bytes(before[:100])
    with pytest.raises(ValueError, match="is no resume file"):
        predict(model, posterior, texts(), **OPTIONS, resume=path)
    with pytest.raises(ValueError, match="no folder .* for the resume file"):
        predict(model, posterior, texts(), **OPTIONS, resume=tmp_path / "nowhere" / "state")
    with pytest.raises(ValueError, match="save_every must be at least 1"):
        predict(model, posterior, texts(), **OPTIONS, save_every=0)
