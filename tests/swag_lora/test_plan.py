"""Chunks of samples and parts of batches, within a budget of memory."""

import gc
import tracemalloc

import pytest
import torch
from prediction_models import assert_same, fine_tune, texts

from swag_lora import Predictor, predict
from swag_lora.memory import PeakBytes, parse
from swag_lora.plan import Costs, Plan, make_plan


@pytest.fixture(scope="module")
def model_and_posterior():
    return fine_tune()


class Drawing:
    """A posterior that remembers what was drawn from it."""

    def __init__(self, posterior):
        self.posterior, self.calls = posterior, []

    def draw(self, num_samples, *, seed, first, scale, method):
        self.calls.append((first, num_samples))
        return self.posterior.draw(num_samples, seed=seed, first=first, scale=scale, method=method)


@pytest.mark.parametrize(("method", "step"), [("iid", 1), ("iid", 5), ("antithetic", 2), ("antithetic", 6)])
def test_chunks_and_parts_are_the_whole(model_and_posterior, method, step):
    model, posterior = model_and_posterior
    whole = predict(model, posterior, texts(), 16, method=method)
    parts = predict(model, posterior, texts(), 16, method=method, samples_per_pass=step, examples_per_pass=3)
    assert_same(parts, whole, exact=False)
    again = predict(model, posterior, texts(), 16, method=method, samples_per_pass=step, examples_per_pass=3)
    assert_same(parts, again)


def test_memory_is_that_of_one_chunk(model_and_posterior):
    """Tensors by every operation's results, Python's objects by tracemalloc."""
    model, posterior = model_and_posterior
    batch, peaks, objects = texts(3), [], []
    for num_samples in (100, 10_000):  # one chunk, a hundred
        predict(model, posterior, batch, 100, samples_per_pass=100)
        gc.collect()
        tracemalloc.start()
        with PeakBytes() as made:
            predict(model, posterior, batch, num_samples, samples_per_pass=100)
        objects.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        peaks.append(made.peak)
    assert peaks[0] > 100 * posterior.layout.numel * 4
    assert peaks[1] <= 1.02 * peaks[0]
    assert objects[1] <= objects[0] + 10_000 * 200, "no object for each sample; garbage may wait for its collection"


def test_a_budget_is_kept(model_and_posterior):
    model, posterior = model_and_posterior
    batch, drawing = texts(64, 12), Drawing(posterior)
    predictor = Predictor(model, drawing, 512, memory="6MiB", keep_weights=False)
    chosen = predictor.plan(batch)
    assert 2 <= chosen.samples < 512 and chosen.samples % 2 == 0
    with PeakBytes() as made:
        prediction = predictor(batch)
    assert made.peak <= 6 * 2**20
    assert_same(prediction, predict(model, posterior, batch, 512, samples_per_pass=512), exact=False)
    tight = Predictor(model, posterior, 512, memory="1200KiB", keep_weights=False).plan(batch)
    assert tight.examples < chosen.examples <= 64, "less memory: fewer examples at a time"


def test_weights_are_kept_where_they_fit(model_and_posterior):
    model, posterior = model_and_posterior
    for memory, draws in (("1GiB", 1), ("9MiB", 2)):
        drawing = Drawing(posterior)
        predictor = Predictor(model, drawing, 64, samples_per_pass=16, memory=memory)
        predictor.plan(texts())
        drawing.calls.clear()
        for _ in range(2):
            predictor(texts())
        assert drawing.calls.count((32, 16)) == draws


def test_small_requests_are_one_pass_without_measuring(model_and_posterior):
    model, posterior = model_and_posterior
    drawing = Drawing(posterior)
    predict(model, drawing, texts(), 32)
    assert drawing.calls == [(0, 32)]


def plan(budget, wanted=1000, examples=8, group=2, seconds=lambda s, b: s * b * 1e-3, start=2):
    return make_plan(wanted, examples, group, budget, Costs(sample=100, example=10), seconds, start)


def test_the_plan_of_highest_throughput():
    assert plan(10**9, seconds=lambda s, b: 1 + 1e-9 * s) == Plan(1000, 8), "all at once where a pass costs the same"
    assert plan(10**9, seconds=lambda s, b: s * b * 1e-3) == Plan(2, 8), "no more than helps"
    assert plan(10**9, seconds=lambda s, b: max(64, s) * 1e-3) == Plan(64, 8)
    assert plan(180 * 20 + 1, seconds=lambda s, b: 1.0) == Plan(20, 8), "what fits"
    assert plan(240, seconds=lambda s, b: 1.0) == Plan(2, 2), "fewer examples before less than a pair"
    seen = []
    plan(10**9, seconds=lambda s, b: seen.append((s, b)) or max(64, s))
    assert seen == [(2, 8), (4, 8), (8, 8), (16, 8), (32, 8), (64, 8), (128, 8)], "twice the cost of the plan, not more"
    with pytest.raises(
        ValueError, match="less than one draw needs: 200 bytes for the weights of 2 samples and 20 bytes"
    ):
        plan(219)


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 4 << 30), ("512 MiB", 512 << 20), ("1.5gb", 1_500_000_000), (4096, 4096), ("2e9", 2 * 10**9), ("7 B", 7)],
)
def test_memory_in_words(text, size):
    assert parse(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "4 parsecs", "-1GiB", "0", 0, "1..2MiB"])
def test_memory_in_other_words(text):
    with pytest.raises(ValueError, match="memory must be"):
        parse(text)


def test_a_budget_smaller_than_one_sample(model_and_posterior):
    model, posterior = model_and_posterior
    with pytest.raises(ValueError, match="less than one draw needs: .* KiB for the weights of 2 samples"):
        predict(model, posterior, texts(), 32, memory="10KiB")


def test_peak_bytes_counts_what_is_alive():
    with PeakBytes() as made:
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b.view(10, 100) * 2
        del b, c
        torch.zeros(100)
    assert made.peak == 8000
