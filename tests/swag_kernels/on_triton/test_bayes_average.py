from importlib import import_module

import torch
from average_checks import check


def test_more_classes_than_the_scans_of_a_row_take(device, monkeypatch):
    """Then each takes more of them."""
    module = import_module("swag_kernels.triton.bayes_average")
    monkeypatch.setattr(module, "PART", 1024)
    monkeypatch.setattr(module, "PARTS", 2)
    check(3 * torch.randn(3, 2, 5000), device=device)
