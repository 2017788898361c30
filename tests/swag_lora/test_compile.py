"""torch.compile takes a sampled forward whole, and neither other samples nor another batch make it compile again."""

import pytest
import torch
from tiny_models import FAMILIES, samples
from torch._dynamo.testing import CompileCounterWithBackend

from swag_lora import SampledModel

S = 4


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(family, late):
    options = {"layers_to_transform": [3], "layers_pattern": FAMILIES[family].layers.split(".")[-1]} if late else {}
    return FAMILIES[family].lora(**options)


@torch.no_grad()
@pytest.mark.parametrize(("family", "late", "backend"), [("bert", True, "aot_eager"), ("llama", False, "eager")])
def test_one_graph(family, late, backend):
    model = build(family, late)
    weights = samples(model, 3 * S)
    sampled = SampledModel(model, {name: w[:S] for name, w in weights.items()}).eval()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(sampled, fullgraph=True, backend=counter)

    def check(batch_size, chunk):
        sampled.set_weights({name: w[chunk * S : (chunk + 1) * S] for name, w in weights.items()})
        batch = FAMILIES[family].batch(batch_size, "right")
        with sampled.same_batch():
            mine = compiled(**batch).logits
        torch.testing.assert_close(mine, sampled(**batch).logits, rtol=1e-4, atol=1e-5)

    for chunk in range(3):
        check(2, chunk)
    assert counter.frame_count == 1, "another chunk of samples is the same graph"
    for batch_size in (3, 5, 11):
        check(batch_size, 0)
    assert counter.frame_count == 2, "the second size of a batch makes the graph dynamic, and that is all"


@torch.no_grad()
def test_dynamic_from_the_start():
    model = build("bert", late=False)
    sampled = SampledModel(model, samples(model, S)).eval()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(sampled, fullgraph=True, dynamic=True, backend=counter)
    for batch_size in (2, 3, 5):
        batch = FAMILIES["bert"].batch(batch_size, "left")
        torch.testing.assert_close(compiled(**batch).logits, sampled(**batch).logits)
    assert counter.frame_count == 1
