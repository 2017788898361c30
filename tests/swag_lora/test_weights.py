import pytest
import torch

from swag_lora.layout import Layout
from swag_lora.weights import SampledWeights

SHAPES = {"a": (3, 5), "b": (), "c": (1030,)}


def members(samples=4, dtype=torch.float32):
    return {name: torch.randn(samples, *shape).to(dtype) for name, shape in SHAPES.items()}


def test_from_mapping_is_a_view_of_one_buffer():
    tensors = members()
    weights = SampledWeights.from_mapping(tensors)
    assert list(weights) == list(SHAPES) and weights.num_samples == 4
    assert (weights.seed, weights.first, weights.method, weights.dtype) == (None, 0, "given", torch.float32)
    for name, tensor in weights.items():
        assert torch.equal(tensor, tensors[name])
        assert tensor.untyped_storage().data_ptr() == weights.buffer.untyped_storage().data_ptr()
    weights.buffer.zero_()
    assert not weights["a"].any() and tensors["a"].any()


@pytest.mark.parametrize("index", [0, 2, -1])
def test_sample_gives_the_tensors_of_one_sample(index):
    tensors = members()
    sample = SampledWeights.from_mapping(tensors).sample(index)
    for name, shape in SHAPES.items():
        assert sample[name].shape == shape and torch.equal(sample[name], tensors[name][index])


def test_sample_out_of_range():
    with pytest.raises(IndexError, match="sample 4 of 4"):
        SampledWeights.from_mapping(members()).sample(4)


def test_mixed_dtypes_become_float32():
    tensors = members()
    tensors["a"] = tensors["a"].bfloat16()
    assert SampledWeights.from_mapping(tensors).dtype == torch.float32
    assert SampledWeights.from_mapping(members(dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_immutable():
    weights = SampledWeights.from_mapping(members())
    with pytest.raises(TypeError):
        weights["a"] = torch.zeros(1)
    with pytest.raises(AttributeError):
        weights.buffer = torch.zeros(1)


def test_repr_says_what_it_is():
    assert repr(SampledWeights.from_mapping(members())) == (
        "SampledWeights(num_samples=4, tensors=3, weights=1046, dtype=torch.float32, device='cpu', method='given', "
        "seed=None, first=0)"
    )


@pytest.mark.parametrize(
    "tensors",
    [{}, {"a": torch.zeros(2, 3), "b": torch.zeros(3, 3)}, {"a": torch.zeros(0, 3)}, {"a": torch.zeros(())}],
    ids=["none", "ragged", "no samples", "no sample axis"],
)
def test_bad_mappings(tensors):
    with pytest.raises(ValueError, match="sample|at least one name"):
        SampledWeights.from_mapping(tensors)


def test_buffer_of_another_size():
    layout = Layout.of({"a": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"buffer must be \[S, 1024\]"):
        SampledWeights(layout, torch.zeros(2, 3))
