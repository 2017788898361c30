"""The paper's protocol end to end on real text, over two seeds: one classification and one multiple-choice task.

``DATA`` names the folder with goemotions4, arc_easy and arc_challenge as JSON lines. Small enough for two CPU cores: it shows
that every stage and every method runs on real text, and not the effect, which needs a fine-tune long enough to overfit.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from swag_lora.cli import main
from swag_lora.demo import encoder
from swag_lora.experiment.methods import POOLED, TITLES

SMALL = [
    "--recipe",
    "default",
    "--seeds",
    "0,1",
    "--samples",
    "8",
    "--max-length",
    "64",
    "--rank",
    "5",
    "--collections",
    "5",
]


@pytest.fixture
def folder() -> Path:
    data = Path(os.environ.get("DATA", "../shared/data"))
    if not data.is_dir():
        pytest.fail(f"no folder {data.resolve()}: DATA names the one with goemotions4, arc_easy and arc_challenge")
    return data


def reproduced(output: Path, *arguments: str) -> dict[str, Any]:
    """The results of a run, started twice: what is finished is not done again, and gives the same."""
    command = ["reproduce", str(encoder()), "--output", str(output), *SMALL, *arguments]
    assert main(command) == 0
    first = json.loads((output / "results.json").read_text())
    assert main(command) == 0
    assert json.loads((output / "results.json").read_text()) == first
    print((output / "table.md").read_text())
    assert main(["compare", str(output)]) == 0
    return first


def check(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Every method has every metric, and figures are there; returns the means on the test split."""
    assert set(results["methods"]) == set(TITLES)
    for method, found in results["methods"].items():
        assert list(found["seeds"]) == (["all"] if method in POOLED else ["0", "1"])
        for task in results["ood"]:
            assert 0 <= found["summary"][task["name"]]["ood_auroc_entropy"]["mean"] <= 1
    return {
        method: {name: value["mean"] for name, value in found["summary"]["test"].items()}
        for method, found in results["methods"].items()
    }


def bench_classification(folder, tmp_path):
    """Emotions of Reddit comments, clinc150's out-of-scope queries as inputs from elsewhere."""
    limit = "train=800,val=120,test=300,ood=120"
    recipe = ["--epochs", "10", "--start", "0.5", "--limit", limit]
    test = check(reproduced(tmp_path / "run", "--data", str(folder / "goemotions4"), *recipe))
    assert all(found["accuracy"] > 0.4 and found["nll"] < math.log(4) for found in test.values())
    assert {path.name for path in (tmp_path / "run/figures").iterdir()} >= {"reliability.png", "risk-coverage.png"}


def bench_multiple_choice(folder, tmp_path):
    """Science questions, harder ones as a shift."""
    limit = "train=120,val=40,test=80,ood=40"
    recipe = ["--epochs", "6", "--start", "0.5", "--batch-size", "16", "--limit", limit]
    data = ["--data", str(folder / "arc_easy"), "--ood", str(folder / "arc_challenge")]
    results = reproduced(tmp_path / "run", *data, *recipe)
    check(results)
    assert "accuracy" in results["methods"]["swag"]["summary"]["arc_challenge"]
