"""A pass through SampledModel can be captured in a CUDA graph: it waits for no value from the device."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import scramble
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from swag_kernels import AverageState, bayes_average_, draw
from swag_lora import SampledModel, SwagPosterior

SAMPLES, LENGTH, RANK = 4, 7, 3
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=61,
    max_position_embeddings=64,
)


class HostTraffic(TorchDispatchMode):
    """Names of the ops that give the host a value, size a result by values, or make a tensor from the host's values."""

    _TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if self._TAGS & set(op.tags) or op is torch.ops.aten.lift_fresh.default:
            self.ops.append(str(op))
        return op(*args, **(kwargs or {}))


@pytest.fixture
def fine_tune():
    with DEVICE:
        model = LlamaForCausalLM(CONFIG)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    model = scramble(get_peft_model(model, lora)).eval()
    posterior = SwagPosterior(model, rank=RANK)
    for _ in range(RANK):
        walk(posterior)
        posterior.collect()
    return model, posterior


@torch.no_grad()
def walk(posterior):
    for index, parameter in enumerate(posterior.layout.parameters(posterior.model)):
        parameter.mul_(1.01).add_(0.01 * (-1) ** index)


def tokens(length=LENGTH):
    return torch.randint(CONFIG.vocab_size, (1, length), device=DEVICE)


def causal():
    """A mask of four axes, which transformers takes as it is. It looks into one of two axes, and reads a value."""
    return torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool, device=DEVICE).tril()


@pytest.mark.parametrize(
    "read",
    [
        lambda t: t.sum().item(),
        lambda t: bool(t.any()),
        lambda t: t.nonzero(),
        lambda t: t[t > 0],
        lambda t: torch.equal(t, t + 1),
        lambda t: torch.tensor([1.0]) + 1,
    ],
)
def test_traffic_is_seen(read):
    with HostTraffic() as traffic:
        read(torch.randn(3))
    assert traffic.ops


@torch.no_grad()
def test_a_decode_step_waits_for_nothing(fine_tune):
    model, posterior = fine_tune
    sampled = SampledModel(model, posterior.draw(SAMPLES))
    cache = StaticCache(config=CONFIG, max_cache_len=LENGTH + 2)
    sampled(input_ids=tokens(), past_key_values=cache, use_cache=True)
    with HostTraffic() as traffic:
        logits = sampled(input_ids=tokens(1), past_key_values=cache, use_cache=True).logits
    assert logits.shape == (SAMPLES, 1, 1, CONFIG.vocab_size) and cache.get_seq_length() == LENGTH + 1
    assert not traffic.ops


@torch.no_grad()
def test_a_full_pass_waits_for_nothing(fine_tune):
    model, posterior = fine_tune
    sampled = SampledModel(model, posterior.draw(SAMPLES))
    with HostTraffic() as traffic:
        sampled(input_ids=tokens(), attention_mask=causal(), logits_to_keep=1)
    assert not traffic.ops


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_no_more_is_read_than_the_model_itself_reads(fine_tune, padded):
    model, posterior = fine_tune
    batch = {"input_ids": tokens(), "use_cache": False}
    if padded:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    read = []
    for either in (model, SampledModel(model, posterior.draw(SAMPLES))):
        with HostTraffic() as traffic:
            either(**batch)
        read.append(traffic.ops)
    assert read[0] == read[1]


class Pipeline:
    """Collect, draw, sampled forward, average: all that a graph reads and writes stays in its place."""

    def __init__(self, posterior):
        self.posterior, self.ids, self.mask = posterior, tokens(), causal()
        self.weights = posterior.draw(SAMPLES)
        self.sampled = SampledModel(posterior.model, self.weights)
        self.state = AverageState(1, CONFIG.vocab_size, device=DEVICE)

    def step(self):
        posterior = self.posterior
        posterior.collect(check_finite=False)
        std = (posterior.m2 / posterior.count).clamp(min=posterior.var_clamp).sqrt()
        drawn = draw(
            posterior.mean, std, posterior.deviations, SAMPLES, seed=3, first_sample=0, diag_scale=0.7,
            low_rank_scale=0.5, antithetic=True, layout=posterior.layout.table, dtype=self.weights.dtype,
        )  # fmt: skip
        self.weights.buffer.copy_(drawn)
        logits = self.sampled(input_ids=self.ids, attention_mask=self.mask, logits_to_keep=1).logits
        bayes_average_(self.state, logits.flatten(1, 2))

    def kept(self):
        average = (self.state.log_sum, self.state.m2, self.state.votes, self.state.mean_entropy, self.state.count)
        return [*self.posterior.state_dict().values(), self.weights.buffer, *average]


@torch.no_grad()
def test_the_pipeline_waits_for_nothing(fine_tune):
    pipeline = Pipeline(fine_tune[1])
    with HostTraffic() as traffic:
        pipeline.step()
    assert not traffic.ops
    assert torch.allclose(pipeline.state.probs().sum(-1).cpu(), torch.ones(1), atol=1e-5)


@GPU
@torch.no_grad()
def test_the_pipeline_replays_after_the_weights_moved(fine_tune):
    model, posterior = fine_tune
    pipeline = Pipeline(posterior)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            pipeline.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pipeline.step()
    start = [t.clone() for t in pipeline.kept()]
    trained = [p.clone() for p in posterior.layout.parameters(model)]

    def run(step):
        for tensor, value in zip(pipeline.kept(), start, strict=True):
            tensor.copy_(value)
        for parameter, value in zip(posterior.layout.parameters(model), trained, strict=True):
            parameter.copy_(value)
        for _ in range(RANK + 2):
            step()
            walk(posterior)
        return [t.clone() for t in pipeline.kept()]

    for replayed, eager in zip(run(graph.replay), run(pipeline.step), strict=True):
        torch.testing.assert_close(replayed, eager, rtol=1e-4, atol=1e-5)
    assert pipeline.state.num_samples == start[-1] + SAMPLES * (RANK + 2)


@GPU
@torch.no_grad()
def test_decode_steps_replay(fine_tune):
    model, posterior = fine_tune
    sampled, ids = SampledModel(model, posterior.draw(SAMPLES)), tokens()
    cache = StaticCache(config=CONFIG, max_cache_len=LENGTH + 8)
    token = tokens(1)

    def step():
        return sampled(input_ids=token, past_key_values=cache, use_cache=True).logits

    def prefill():
        cache.reset()
        sampled(input_ids=ids, past_key_values=cache, use_cache=True)

    prefill()
    eager = [step() for _ in range(4)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()
    prefill()
    for expected in eager:
        graph.replay()
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
