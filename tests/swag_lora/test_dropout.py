"""MC dropout as samples of lora_A: the masks' distribution and names, and PEFT's own forward with a mask set by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from posterior_models import step, tiny_peft, trainable
from prediction_models import texts
from torch import nn

from swag_kernels.reference import philox
from swag_lora import Prediction, SampledModel, predict
from swag_lora.dropout import DropoutPosterior


def model_with(p=0.3, **config):
    torch.manual_seed(1)
    model = tiny_peft(lora_dropout=p, **config).eval()
    step(model, 0.5)
    return model


def masks(model, posterior, **arguments):
    """m / (1 - p) of each layer, [S, in], read off the samples."""
    parameters = dict(model.named_parameters())
    return {
        name: (samples / parameters[name].detach()).mean(1) for name, samples in posterior.draw(**arguments).items()
    }


class Masked(nn.Module):
    """A dropout module with one mask for everything."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


def test_peft_s_forward_with_the_mask_set_by_hand():
    model, batch, number = model_with(), texts(), 5
    posterior = DropoutPosterior(model)
    assert len(posterior.rates) == 4 and set(posterior.rates.values()) == {0.3}
    assert set(posterior.layout.names) == {name for name, _ in model.named_parameters() if "lora_A" in name}
    with torch.no_grad():
        sampled = SampledModel(model, posterior.draw(number, seed=3)).eval()(**batch).logits
    factors = masks(model, posterior, num_samples=number, seed=3)
    layers = {
        f"{name}.lora_A.default.weight": module for name, module in model.named_modules() if hasattr(module, "lora_A")
    }
    logits = []
    for k in range(number):
        for name, module in layers.items():
            module.lora_dropout["default"] = Masked(factors[name][k])
        with torch.no_grad():
            logits.append(model(**batch).logits)
    torch.testing.assert_close(sampled, torch.stack(logits), rtol=1e-4, atol=1e-5)
    assert sampled.std(0).min() > 1e-4
    assert predict(model_with(), posterior, batch, 5, method="iid").mutual_information.max() > 1e-5


@pytest.mark.parametrize("p", [0.05, 0.3, 0.75])
def test_masks_are_bernoulli_and_independent(p):
    """Five standard errors, of frequencies and of correlations between features, layers and samples."""
    model, number = model_with(), 3000
    found = torch.cat(list(masks(model, DropoutPosterior(model, p), num_samples=number, seed=5).values()), 1)
    torch.testing.assert_close(found.unique(), torch.tensor([0.0, 1 / (1 - p)]))
    kept = (found > 0).double()
    assert kept.shape == (number, 64)
    assert (kept.mean(0) - (1 - p)).abs().max() < 5 * math.sqrt(p * (1 - p) / number)
    assert abs(kept.mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / kept.numel())
    correlation = torch.corrcoef(kept.T) - torch.eye(64)
    assert correlation.abs().max() < 5 / math.sqrt(number)
    following = torch.corrcoef(torch.stack([kept[1:].flatten(), kept[:-1].flatten()]))[0, 1]
    assert following.abs() < 5 / math.sqrt(kept.numel())


def test_mean_of_the_samples_is_the_model_s_weight():
    model = model_with(0.2)
    weights = DropoutPosterior(model).draw(4000)
    for name, parameter in model.named_parameters():
        if name in weights:
            bound = 5 * parameter.abs() * math.sqrt(0.2 / 0.8 / 4000) + 1e-6
            assert ((weights[name].mean(0) - parameter).abs() < bound).all()


def test_bits_are_those_of_the_documented_counter():
    model, posterior = model_with(0.25), DropoutPosterior(model_with(0.25))
    for layer, (name, factor) in enumerate(masks(model, posterior, num_samples=1, first=6, seed=2**40 + 1).items()):
        for i in range(16):
            word = philox(torch.tensor([[i // 4], [6], [layer], [3]]), 2**40 + 1)[i % 4].item()
            assert (factor[0, i] > 0).item() == (word < round(0.75 * 2**32)), (name, i)


@settings(max_examples=20, deadline=None)
@given(first=st.integers(0, 2**32 - 9), number=st.integers(1, 8), seed=st.integers(0, 2**64 - 1))
def test_sample_k_does_not_depend_on_what_else_is_drawn(first, number, seed):
    several = POSTERIOR.draw(number, seed, first)
    assert (several.seed, several.first, several.method) == (seed, first, "iid")
    for row in {0, number // 2, number - 1}:
        assert torch.equal(several.buffer[row], POSTERIOR.draw(1, seed, first + row).buffer[0])


POSTERIOR = DropoutPosterior(model_with(hidden=18))


def test_samples_and_layers_differ():
    assert len(POSTERIOR.draw(20).buffer.unique(dim=0)) == 20
    assert not torch.equal(POSTERIOR.draw(2, seed=0).buffer, POSTERIOR.draw(2, seed=1).buffer)
    assert torch.equal(POSTERIOR.draw(2, scale=0.5).buffer, POSTERIOR.draw(2, scale=9.0).buffer)


def test_the_posterior_keeps_the_weights_it_was_made_with():
    model = model_with()
    posterior = DropoutPosterior(model)
    before = posterior.draw(2).buffer
    step(model)
    assert torch.equal(posterior.draw(2).buffer, before)


def test_a_given_state_is_in_the_samples():
    model = model_with()
    current = DropoutPosterior(model)
    state = trainable(model)
    step(model)
    posterior, batch = DropoutPosterior(model, state=state), texts()
    drawn, masked = posterior.draw(3, seed=1), current.draw(3, seed=1)
    assert set(drawn) == set(state)
    for name in drawn:
        assert torch.equal(drawn[name], masked[name] if name in masked else state[name].expand(3, *state[name].shape))
    logits = []
    for k in range(3):
        with torch.no_grad():
            logits.append(torch.func.functional_call(model, drawn.sample(k), kwargs=batch).logits)
    expected = Prediction.from_logits(torch.stack(logits))
    torch.testing.assert_close(predict(model, posterior, batch, 3, seed=1).log_probs, expected.log_probs)


def test_layers_without_dropout_are_not_random():
    model = model_with()
    layer = model.get_base_model().bert.encoder.layer[0].attention.self.query
    layer.lora_dropout["default"] = nn.Identity()
    posterior = DropoutPosterior(model)
    assert len(posterior.rates) == 3 and not any("layer.0.attention.self.query" in name for name in posterior.rates)
    assert len(DropoutPosterior(model, 0.1).rates) == 4
    assert predict(model, posterior, texts(), 2, method="iid").mutual_information.max() > 0


def test_embeddings_have_no_dropout_to_sample():
    model = model_with(target_modules=["query", "word_embeddings"])
    assert len(DropoutPosterior(model).rates) == 2 and "word_embeddings" not in str(DropoutPosterior(model).rates)


def test_dtype_is_the_model_s():
    assert DropoutPosterior(model_with().to(torch.bfloat16)).draw(2).dtype == torch.bfloat16


def test_refusals():
    with pytest.raises(ValueError, match=r"no LoRA dropout: train it with LoraConfig\(lora_dropout=0.1\), or .* p="):
        DropoutPosterior(model_with(0.0))
    for p in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="above 0 and below 1"):
            DropoutPosterior(model_with(), p)
    with pytest.raises(ValueError, match="no LoRA layer"):
        DropoutPosterior(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="the state does not fit the model: nothing.here"):
        DropoutPosterior(model_with(), state={"nothing.here": torch.zeros(1)})
    with pytest.raises(ValueError, match="method must be 'iid', got 'antithetic'"):
        predict(model_with(), POSTERIOR, texts(), 2)
    with pytest.raises(ValueError, match="seed must lie in"):
        POSTERIOR.draw(1, seed=2**64)
    with pytest.raises(ValueError, match="outside"):
        POSTERIOR.draw(2, first=2**32 - 1)
    conv = get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 2)), LoraConfig(target_modules=["0"], lora_dropout=0.1))
    with pytest.raises(TypeError, match="is no matrix"):
        DropoutPosterior(conv)
