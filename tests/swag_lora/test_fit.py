import pytest
import torch
from safetensors.torch import load_file

from swag_lora import data
from swag_lora.fit import Recipe, fit

STANDING = {"epochs": 12, "collections": 2, "rank": 2, "lr": 0.03, "swag_lr": 1e-30, "batch_size": 8}


def adapters_equal(first, second):
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("start", "point"), [(None, "map-best"), (1.0, "map")])
def test_swag_goes_on_from(home, tmp_path, start, point):
    """With steps too small to change a weight, the mean of the collections is where they began."""
    history = fit(tmp_path, home / "bert", data.load(home / "colors"), Recipe(start=start, **STANDING))
    seen = history["validation_nll"]
    assert min(seen) < seen[-1], "the last epoch is the best: the two starts are one"
    assert adapters_equal(tmp_path, tmp_path / point)
    assert not adapters_equal(tmp_path / "map", tmp_path / "map-best")


@pytest.mark.parametrize(
    ("start", "validated", "epoch"), [(None, True, None), (None, False, 5), (0.5, True, 8), (1e-9, False, 1)]
)
def test_the_epoch_that_swag_leaves(start, validated, epoch):
    assert Recipe(epochs=15, start=start).branch(validated) == epoch
