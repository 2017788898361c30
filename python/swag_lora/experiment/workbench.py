"""The fits of all seeds on one base model in memory, and each method as a posterior over its weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..dropout import DropoutPosterior
from ..ensemble import Ensemble
from ..evaluate import load_folder
from ..evaluator import Encoded, Evaluator, Sampling, labels_of
from ..files import write_text
from ..fit import UNFINISHED
from ..mixture import Mixture
from ..posterior import SwagPosterior
from ..predictor import Posterior
from ..scale import ScaleChoice, choose_rank, choose_scale
from ..temperature import fit_temperature
from ..training import arithmetic
from .methods import POOLED
from .settings import AUTO, Settings
from .sources import Sources

SELECTION_FILE = "selection.json"
DIAGONAL_FACTOR = 2
"""A fixed scale is for half diagonal, half low rank; the diagonal alone takes twice of it (Maddox et al. 2019)."""


@dataclass(frozen=True)
class Averaged:
    """What a method averages over: samples of a posterior, which are those of `members` posteriors."""

    posterior: Posterior
    sampling: Sampling
    members: int = 1
    scale: float | None = None
    rank: int | None = None
    temperature: float | None = None

    @property
    def counts(self) -> tuple[int, ...]:
        """Numbers of samples at which the average is looked at: 2 for each member, 4, 8, … and all."""
        first, most = 2 * self.members, self.sampling.samples
        if most < first or self.sampling.samples == self.members:
            return ()
        return (*(first << i for i in range(most.bit_length()) if first << i < most), most)


class Workbench:
    """Holds the model once; posteriors and adapters of the seeds' folders become samples of its weights."""

    def __init__(self, settings: Settings, sources: Sources, folder: Path, show: bool) -> None:
        self.settings, self.sources, self.folder, self._show = settings, sources, folder, show
        self._posteriors: dict[int, SwagPosterior] = {}
        self._encoded: dict[str, Encoded] = {}

    @cached_property
    def evaluator(self) -> Evaluator:
        settings = self.settings
        evaluator, _ = load_folder(self.seed_folder(settings.seeds[0]), settings.model, settings.batch_size)
        return replace(evaluator, show=self._show)

    def seed_folder(self, seed: int) -> Path:
        return self.folder / f"seed-{seed}"

    def arithmetic(self) -> torch.autocast:
        return arithmetic(next(self.evaluator.model.parameters()).device)

    def encoded(self, split: str) -> Encoded:
        if split not in self._encoded:
            examples = self.sources.inside.split("val") if split == "val" else self.sources.splits()[split]
            self._encoded[split] = self.evaluator.encode(examples)
        return self._encoded[split]

    def posterior(self, seed: int) -> SwagPosterior:
        model = self.evaluator.model
        if seed not in self._posteriors:
            self._posteriors[seed] = SwagPosterior.from_pretrained(model, self.seed_folder(seed))
        return self._posteriors[seed]

    def points(self, part: str, seeds: Sequence[int]) -> Ensemble:
        """Point estimates of seeds; `part` is the folder of an adapter in theirs."""
        model: Any = self.evaluator.model
        return Ensemble.from_folders(model, [self.seed_folder(seed) / part for seed in seeds])

    def select(self, seed: int) -> None:
        """Choose scale and rank on validation data, and write what each scale gave."""
        # A fit that was killed after its posterior was whole leaves it.
        shutil.rmtree(self.seed_folder(seed) / UNFINISHED, ignore_errors=True)
        with self.arithmetic():
            chosen = self._select(seed)
        rank = chosen["rank"] if self.settings.choose_rank else None
        task = replace(self.evaluator.task, seed=seed, scale=float(chosen["scale"]), rank=rank)
        task.save(self.seed_folder(seed))
        write_text(self.seed_folder(seed) / SELECTION_FILE, json.dumps(chosen, indent=1) + "\n")

    def _select(self, seed: int) -> dict[str, Any]:
        settings, posterior = self.settings, self.posterior(seed)
        held = min(int(posterior.count), posterior.rank)
        chosen: dict[str, Any] = {"scales": [], "nll": [], "accuracy": [], "ece": [], "brier": [], "rank": held}
        if settings.choose_rank:
            scales = None if settings.scale == AUTO else (float(settings.scale),)
            ranks = choose_rank(self.evaluator, posterior, self.encoded("val"), seed=seed, scales=scales)
            chosen |= _curve(ranks.choice) | {"rank": ranks.rank, "scale": ranks.choice.scale}
            chosen["ranks"] = {
                str(rank): _curve(choice) for rank, choice in zip(ranks.ranks, ranks.choices, strict=True)
            }
        elif settings.scale == AUTO:
            choice = choose_scale(self.evaluator, posterior, self.encoded("val"), seed=seed)
            chosen |= _curve(choice) | {"scale": choice.scale}
        else:
            chosen["scale"] = settings.scale
        if settings.scale == AUTO:
            diagonal = choose_scale(
                self.evaluator, posterior.truncated(0), self.encoded("val"), seed=seed, title="diagonal, "
            )
            chosen["diagonal"] = _curve(diagonal) | {"scale": diagonal.scale}
        else:
            chosen["diagonal"] = {"scale": DIAGONAL_FACTOR * chosen["scale"]}
        return chosen

    def selection(self, seed: int) -> dict[str, Any]:
        return json.loads((self.seed_folder(seed) / SELECTION_FILE).read_text(encoding="utf-8"))

    def averaged(self, method: str, seed: int | None) -> Averaged:
        """A method of one seed; of all seeds where `seed` is None."""
        seeds = self.settings.seeds if method in POOLED or seed is None else (seed,)
        first, samples = seeds[0], self.settings.samples
        selections = [self.selection(one) for one in seeds]
        if method in ("map-last", "map-best", "ensemble", "ensemble-best", "temperature"):
            best = method in ("map-best", "ensemble-best")
            points = self.points("map-best" if best else "map", seeds)
            temperature = self._temperature(points) if method == "temperature" else None
            return Averaged(points, _each(points), len(seeds), temperature=temperature)
        if method in ("swa", "multiswa"):
            means = Ensemble.of_means([self.posterior(one) for one in seeds])
            return Averaged(means, _each(means), len(seeds))
        if method == "mc-dropout":
            state = self.points("map", seeds).draw(1).sample(0)
            dropout = DropoutPosterior(self.evaluator.model, state=state)
            return Averaged(dropout, Sampling(samples, first, 1.0, "iid"))
        if method == "swag-diagonal":
            scale = selections[0]["diagonal"]["scale"]
            return Averaged(self.posterior(first).truncated(0), Sampling(samples, first, scale), scale=scale, rank=0)
        members = [self.posterior(one).truncated(chosen["rank"]) for one, chosen in zip(seeds, selections, strict=True)]
        if method == "swag":
            scale, rank = selections[0]["scale"], selections[0]["rank"]
            return Averaged(members[0], Sampling(samples, first, scale), scale=scale, rank=rank)
        mixture = Mixture(members, [chosen["scale"] for chosen in selections])
        return Averaged(mixture, Sampling(samples * len(seeds), first, 1.0), len(seeds))

    def _temperature(self, points: Ensemble) -> float:
        val = self.encoded("val")
        return fit_temperature(self.evaluator.sampled(points, val, _each(points)).log_probs, labels_of(val))


def _each(points: Ensemble) -> Sampling:
    return Sampling(len(points), 0, 1.0, "iid")


def _curve(choice: ScaleChoice) -> dict[str, Any]:
    names = ("scales", "nll", "accuracy", "ece", "brier", "samples", "seed")
    return {name: getattr(choice, name) for name in names}
