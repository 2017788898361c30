"""Posteriors of real fine-tunes: the demo's, and with CLINC150 in the environment, the folder of that data set, a second.

With FITS in the environment, a folder, they are kept there from one run to the next.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from swag_lora import SwagPosterior
from swag_lora.data import Dataset
from swag_lora.demo import fit_demo_posterior
from swag_lora.evaluator import Evaluator

SOURCES = {"demo": None} | ({"clinc150": os.environ["CLINC150"]} if "CLINC150" in os.environ else {})

logging.set_verbosity_error()
logging.disable_progress_bar()


@torch.enable_grad()
def fitted(name: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluator, SwagPosterior, Dataset]:
    """The model of one of `SOURCES` in evaluation mode, its posterior, and its data."""
    home = Path(os.environ.get("FITS") or tmp_path_factory.mktemp("fits"))
    evaluator, posterior, examples = fit_demo_posterior(home / name, SOURCES[name])
    evaluator.model.eval()
    return evaluator, posterior, examples
