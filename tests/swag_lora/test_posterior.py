import math
import warnings

import numpy as np
import pytest
import torch
from posterior_models import TwoTensors, step, tiny_peft, trainable
from torch import nn
from torch.profiler import ProfilerActivity, profile

from swag_lora.posterior import SwagPosterior


def collected(model, rank=5, times=7, **options):
    posterior = SwagPosterior(model, rank=rank, **options)
    for _ in range(times):
        step(model)
        posterior.collect()
    return posterior


def flat(posterior, tensors):
    return torch.cat([tensors[name].double().flatten() for name in posterior.layout.names])


def packed(posterior, buffer):
    """An arena buffer [..., N] without its padding."""
    return torch.cat([buffer[..., segment] for segment in posterior.layout.segments], -1).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("times", [1, 2, 3, 8])
def test_moments_are_those_of_the_snapshots(dtype, times):
    model = tiny_peft().to(dtype)
    rank = 3
    posterior = SwagPosterior(model, rank=rank)
    snapshots, deviations = [], {}
    for n in range(times):
        step(model)
        posterior.collect()
        snapshots.append(flat(posterior, trainable(model)))
        deviations[n % rank] = snapshots[-1] - torch.stack(snapshots).mean(0)
    theta = torch.stack(snapshots)
    tolerance = {"rtol": 1e-5, "atol": 1e-6 * theta.abs().max().item()}
    torch.testing.assert_close(packed(posterior, posterior.mean), theta.mean(0), **tolerance)
    torch.testing.assert_close(packed(posterior, posterior.m2), (theta - theta.mean(0)).square().sum(0), **tolerance)
    for row in range(rank):
        held = deviations.get(row, torch.zeros_like(theta[0]))
        torch.testing.assert_close(packed(posterior, posterior.deviations[row]), held, **tolerance)
    assert int(posterior.count) == times


def test_variance_far_below_the_mean_is_not_cancelled():
    model = TwoTensors()
    posterior = SwagPosterior(model)
    values = [0.75 + 2.0**-20 * i for i in range(8)]  # exact in float32; E[w^2] - E[w]^2 would lose all of it
    for value in values:
        nn.init.constant_(model.linear.weight, value)
        posterior.collect()
    std = posterior.layout.views(posterior.std())["linear.weight"]
    torch.testing.assert_close(std, torch.full_like(std, float(np.std(values))), rtol=1e-2, atol=0)


def test_non_contiguous_parameters():
    model = TwoTensors()
    model.linear.weight = nn.Parameter(torch.randn(2, 3).T)
    posterior = collected(model, times=1)
    assert not model.linear.weight.is_contiguous()
    assert torch.equal(posterior.mean_state_dict()["linear.weight"], model.linear.weight)


def test_sampling_before_collecting():
    posterior = SwagPosterior(tiny_peft())
    for call in (lambda: posterior.draw(2), posterior.std, posterior.mean_state_dict, posterior.load_mean):
        with pytest.raises(RuntimeError, match="nothing collected yet: call collect"):
            call()


@pytest.mark.parametrize(
    "arguments, error, said",
    [
        ({"num_samples": 0}, ValueError, "num_samples must be at least 1, got 0"),
        ({"num_samples": 2.0}, TypeError, "num_samples must be an integer"),
        ({"seed": 0.5}, TypeError, "seed must be an integer, got 0.5"),
        ({"seed": True}, TypeError, "seed must be an integer, got True"),
        ({"seed": None}, TypeError, "seed must be an integer"),
        ({"seed": -1}, ValueError, "seed"),
        ({"first": -1}, ValueError, "first must be at least 0"),
        ({"scale": -0.1}, ValueError, "scale must be finite and not negative, got -0.1"),
        ({"scale": math.nan}, ValueError, "scale must be finite"),
        ({"method": "sobol"}, ValueError, "method must be one of iid, antithetic, antithetic.orthogonal, got 'sobol'"),
    ],
)
def test_bad_arguments_of_draw(arguments, error, said):
    posterior = collected(TwoTensors(), times=3)
    with pytest.raises(error, match=said):
        posterior.draw(**{"num_samples": 2, **arguments})


@pytest.mark.parametrize("arguments, said", [({"rank": -1}, "rank"), ({"var_clamp": -1.0}, "var_clamp")])
def test_bad_arguments_of_the_posterior(arguments, said):
    with pytest.raises(ValueError, match=said):
        SwagPosterior(TwoTensors(), **arguments)


@pytest.mark.parametrize("rank, times, said", [(1, 4, "rank=2 or more"), (0, 4, "rank=2"), (5, 1, "collect once more")])
def test_covariance_asked_for_with_fewer_than_two_columns(rank, times, said):
    posterior = collected(TwoTensors(), rank=rank, times=times)
    with pytest.raises(ValueError, match=f"at least two deviations; .*{said}"):
        posterior.draw(2, covariance=True)
    diagonal = posterior.draw(4, covariance=False, method="iid")
    assert torch.equal(posterior.draw(4, method="iid").buffer, diagonal.buffer)


def test_covariance_false_is_the_diagonal_alone():
    posterior = collected(TwoTensors())
    both = posterior.draw(4)
    assert torch.equal(both.buffer, posterior.draw(4, covariance=True).buffer)
    posterior.deviations.zero_()
    assert not torch.equal(both.buffer, posterior.draw(4, covariance=False).buffer)
    torch.testing.assert_close(posterior.draw(4).buffer, posterior.draw(4, covariance=False).buffer)


@pytest.mark.parametrize("method", ["iid", "antithetic", "antithetic+orthogonal"])
def test_first_counts_samples_of_one_stream(method):
    posterior = collected(tiny_peft())
    seven = posterior.draw(7, seed=3, method=method)
    three = posterior.draw(3, seed=3, first=4, method=method)
    assert torch.equal(three.buffer, seven.buffer[4:])
    assert (three.first, three.seed, three.method) == (4, 3, method)
    assert not torch.equal(posterior.draw(7, seed=4, method=method).buffer, seven.buffer)


def test_antithetic_pairs_mirror_the_mean():
    posterior = collected(tiny_peft())
    buffer = posterior.draw(6).buffer
    pairs = buffer.view(3, 2, -1)
    torch.testing.assert_close(pairs.mean(1), posterior.mean.expand(3, -1), rtol=0, atol=1e-7)
    assert not torch.equal(pairs[0], pairs[1])


def test_samples_have_the_models_names_shapes_and_dtype():
    model = tiny_peft()
    posterior = collected(model)
    weights = posterior.draw(2)
    assert {name: t.shape[1:] for name, t in weights.items()} == {n: t.shape for n, t in trainable(model).items()}
    assert weights.dtype == torch.float32
    assert posterior.draw(2, dtype=torch.bfloat16).dtype == torch.bfloat16
    model.bfloat16()
    assert posterior.draw(2).dtype == torch.bfloat16
    model.classifier.float()
    assert posterior.draw(2).dtype == torch.float32


def test_scale_zero_is_the_mean():
    posterior = collected(tiny_peft())
    assert torch.equal(posterior.draw(1, scale=0.0).buffer[0], posterior.mean)


def test_var_clamp_is_the_smallest_variance():
    model = TwoTensors()
    posterior = SwagPosterior(model, var_clamp=0.25)
    posterior.collect()
    assert (posterior.std() == 0.5).all()


def covariance_error(samples, mean, covariance):
    """Largest deviation of the sample covariance, in standard errors of an entry, and of the sample mean in its own."""
    centred = samples.double() - mean
    n = len(centred)
    diagonal = covariance.diagonal()
    error = (centred.T @ centred / n - covariance) / ((diagonal.outer(diagonal) + covariance.square()) / n).sqrt()
    return max(error.abs().max().item(), (centred.mean(0) / (diagonal / n).sqrt()).abs().max().item())


@pytest.mark.parametrize("rank, times", [(5, 3), (5, 12), (0, 4), (1, 4)])
def test_covariance_of_many_draws(rank, times):
    """20 000 draws, fixed seed: 45 covariances and 9 means, each within 5 standard errors (chance of a miss 3e-5)."""
    posterior = collected(TwoTensors(), rank=rank, times=times)
    scale, columns = 0.3, min(rank, times)
    d = packed(posterior, posterior.deviations[:columns])
    covariance = (packed(posterior, posterior.m2) / times).diag()
    if columns >= 2:
        covariance = covariance + d.T @ d / (columns - 1)
    samples = packed(posterior, posterior.draw(20_000, seed=1, scale=scale, method="iid").buffer)
    assert covariance_error(samples, packed(posterior, posterior.mean), scale * covariance) < 5
    half = packed(posterior, posterior.draw(40_000, seed=1, scale=scale).buffer)[::2]
    assert covariance_error(half, packed(posterior, posterior.mean), scale * covariance) < 5


def test_mean_state_dict_and_load_mean():
    model = tiny_peft().bfloat16()
    posterior = collected(model)
    mean = posterior.mean_state_dict()
    assert {t.dtype for t in mean.values()} == {torch.bfloat16}
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if name not in mean}
    posterior.load_mean()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in {**mean, **frozen}.items())
    assert all(p.requires_grad == (name in mean) for name, p in after.items())
    posterior.mean.zero_()
    assert all(torch.equal(after[name], tensor) for name, tensor in mean.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_weight_is_named_and_nothing_is_lost(value):
    model = tiny_peft()
    posterior = collected(model)
    before = {name: tensor.clone() for name, tensor in posterior.state_dict().items()}
    name = posterior.layout.names[3]
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[5] = value
    with pytest.raises(ValueError, match=f"{name} holds a NaN"):
        posterior.collect()
    assert all(torch.equal(tensor, before[key]) for key, tensor in posterior.state_dict().items())
    posterior.collect(check_finite=False)
    assert int(posterior.count) == int(before["count"]) + 1


def changes():
    def rename(model):
        model.add_adapter("new", model.peft_config["default"])
        model.set_adapter("new")
        model.delete_adapter("default")

    def reshape(model):
        layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
        layer.lora_A["default"].weight = nn.Parameter(torch.zeros(3, 16))

    return {
        "renamed": (rename, "query.lora_A.default.weight: was its adapter renamed.* adapters: new"),
        "unloaded": (lambda model: model.unload(), "no parameter .*query.lora_A.default.weight"),
        "merged": (lambda model: model.merge_and_unload(), "no parameter .*query.lora_A.default.weight"),
        "reshaped": (reshape, r"query.lora_A.default.weight has shape \[3, 16\] in the model instead of \[2, 16\]"),
    }


@pytest.mark.parametrize("change", changes())
def test_an_adapter_changed_since(change):
    alter, said = changes()[change]
    model = tiny_peft()
    posterior = collected(model)
    before = {name: tensor.clone() for name, tensor in posterior.state_dict().items()}
    alter(model)
    with pytest.raises(ValueError, match=said):
        posterior.collect()
    assert all(torch.equal(tensor, before[key]) for key, tensor in posterior.state_dict().items())


def test_state_dict_round_trip():
    model = tiny_peft()
    posterior = collected(model)
    other = SwagPosterior(model, rank=5)
    other.load_state_dict(posterior.state_dict())
    assert torch.equal(other.draw(3).buffer, posterior.draw(3).buffer)
    other.collect()
    assert int(other.count) == 8 and int(posterior.count) == 7
    with pytest.raises(ValueError, match="deviations has shape"):
        SwagPosterior(model, rank=4).load_state_dict(posterior.state_dict())
    with pytest.raises(ValueError, match="no m2"):
        other.load_state_dict({"mean": posterior.mean})


def test_unwraps_compiled_and_parallel_models():
    model = tiny_peft()
    for wrapped in (torch.compile(model), nn.DataParallel(model)):
        posterior = SwagPosterior(wrapped)
        assert posterior.model is model and posterior.layout.names == SwagPosterior(model).layout.names


def test_to_moves_the_posterior_and_collect_says_so():
    posterior = collected(TwoTensors())
    assert posterior.to("cpu") is posterior and posterior.device.type == "cpu"
    posterior.to("meta")
    assert {t.device.type for t in posterior.state_dict().values()} == {"meta"}
    with pytest.raises(ValueError, match=r'linear.weight is on cpu, the posterior on meta: call posterior.to\("cpu"\)'):
        posterior.collect()


def test_the_state_is_mean_m2_and_deviations_and_collect_allocates_no_more():
    model = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(32))
    posterior = SwagPosterior(model, rank=3)
    held = {
        tensor.untyped_storage().data_ptr(): tensor.nbytes
        for tensor in vars(posterior).values()
        if torch.is_tensor(tensor)
    }
    assert sum(held.values()) == 4 * (2 + 3) * posterior.layout.size + 8
    posterior.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        posterior.collect()
    events = [e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for size in events:
        live += size
        peak = max(peak, live)
    # The reference back end, in plain torch, needs a few temporaries of one tensor; an arena is 32 tensors.
    assert 0 < peak <= 4 * 4 * 64 * 64


def test_repr():
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        assert repr(collected(TwoTensors())) == "SwagPosterior(tensors=2, weights=9, rank=5, count=7, device='cpu')"
