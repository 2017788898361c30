"""A small text classification set, made from a seed: letters to a town hall, to be sent to one of six departments.

A letter is about one department's business, and half of the time it mentions a second one's. The clerk who labelled
it usually, but not always, picked the first: a label is *drawn* from probabilities known here (`label_probs`), in the
training and in the test data alike. A model that becomes certain is therefore wrong to be, and how well any model
could do is known (`ceiling`). The out-of-distribution letters have the same openings and closings, and are about
music, chess, planets, bread and the like.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

from .data import Dataset, Example

_OPENINGS = (
    "", "", "", "", "Hello,", "Good morning,", "Again,", "Sorry, but", "I noticed that", "It seems that", "Once more,",
    "Why is it that",
)  # fmt: skip
_CLOSINGS = ("", "", "", "", "", "Thank you.", "Please act.", "Who is responsible?", "It is not urgent.")
_LINKS = ("and", "and also", "while", "because", "just as")
_PLACES = (
    "near the station", "in our street", "behind the school", "by the old mill", "on the market square", "next door",
    "at the corner", "along the river", "by the hospital", "across from the bakery", "at number nine", "up the hill",
)  # fmt: skip

# department -> what its letters are about, and what is the matter with it
_DEPARTMENTS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "roads": (
        ("the pavement", "a deep pothole", "the traffic light", "the zebra crossing", "the street lamp", "the bridge",
         "the cycle lane", "the roundabout", "the kerb", "the new asphalt"),
        ("is crumbling", "has been damaged by lorries", "is dangerous after dark", "was dug up and left open",
         "has cracked in the frost", "does not work any more", "is blocked", "causes accidents"),
    ),
    "water": (
        ("the water main", "a fire hydrant", "the storm drain", "our tap water", "the sewer", "the water meter",
         "a manhole", "the pumping station", "the gutter", "the drinking fountain"),
        ("is leaking", "smells of chlorine", "overflows when it rains", "has no pressure", "is blocked",
         "has turned brown", "was frozen for a week", "does not work any more"),
    ),
    "waste": (
        ("the rubbish bin", "the glass container", "the recycling lorry", "a heap of old mattresses", "the compost bin",
         "the collection calendar", "the bottle bank", "a broken fridge", "the skip", "the litter"),
        ("has not been emptied", "attracts rats", "smells terrible", "was left on the pavement", "is overflowing",
         "came on the wrong day", "is full of broken glass", "was skipped again"),
    ),
    "parks": (
        ("the playground", "the old oak", "the lawn", "a park bench", "the flower bed", "the hedge", "the pond",
         "the swing", "the rose garden", "the sports field"),
        ("is full of weeds", "is about to fall over", "has not been mown", "is dangerous for children", "is flooded",
         "was vandalised", "has dried out", "attracts rats"),
    ),
    "transit": (
        ("the night bus", "the tram", "the bus shelter", "the ticket machine", "my season ticket", "line twelve",
         "the timetable", "the bus driver", "the tram stop", "the ferry"),
        ("never arrives on time", "does not work any more", "was vandalised", "skipped our stop", "is overcrowded",
         "was cancelled without notice", "is too expensive", "is dangerous after dark"),
    ),
    "housing": (
        ("my rent", "the heating in our flat", "the landlord", "the lift", "the stairwell", "our building permit",
         "the roof of the block", "the damp in the cellar", "the lease", "the noise from the flat above"),
        ("is too expensive", "does not work any more", "is unbearable", "has been ignored for months",
         "is making the children ill", "was raised without notice", "needs an inspection", "smells terrible"),
    ),
}  # fmt: skip
_ELSEWHERE = (
    ("the second act of the opera", "the black bishop", "the moon of Jupiter", "my sourdough", "the goalkeeper",
     "the plot of the novel", "the guitar solo", "the kitten", "the compiler", "the volcano", "my knitting pattern",
     "the interest rate", "the marathon", "the vaccine", "the telescope", "the pancake recipe"),
    ("was magnificent", "needs more salt", "was discovered by accident", "has a surprising ending", "is asleep",
     "won in the last minute", "erupted in the last century", "does not compile", "is hard to learn", "fell in spring",
     "was played too fast", "is older than we thought", "should be studied again", "tastes of lemon"),
)  # fmt: skip

LABELS = tuple(_DEPARTMENTS)
SIZES = {"train": 500, "val": 150, "test": 300, "oos_test": 150}
_FIRST, _SECOND = 0.66, 0.24


def label_probs(first: int, second: int | None) -> list[float]:
    """How likely each department is to be the label of a letter about `first` that may also mention `second`."""
    known = {first: _FIRST} if second is None else {first: _FIRST, second: _SECOND}
    rest = (1 - sum(known.values())) / (len(LABELS) - len(known))
    return [known.get(i, rest) for i in range(len(LABELS))]


def make(seed: int = 0, sizes: Mapping[str, int] = SIZES) -> Dataset:
    """The data set of a seed. No letter occurs twice, within or across splits."""
    seen: set[str] = set()
    splits = {}
    for name, size in sizes.items():
        rng = random.Random(f"{seed}/{name}")
        letter = _outside if name.startswith("oos") else _inside
        examples: list[Example] = []
        while len(examples) < size:
            example = letter(rng)
            if example.text not in seen:
                seen.add(example.text)
                examples.append(example)
        splits[name] = examples
    return Dataset(f"town hall letters, seed {seed}", splits, LABELS)


def ceiling() -> dict[str, float]:
    """Expected accuracy and NLL of a classifier that knows `label_probs`: nothing can do better."""
    kinds = label_probs(0, None), label_probs(0, 1)
    return {
        "accuracy": sum(max(probs) for probs in kinds) / 2,
        "nll": -sum(p * math.log(p) for probs in kinds for p in probs) / 2,
    }


def _inside(rng: random.Random) -> Example:
    first = rng.randrange(len(LABELS))
    second = rng.choice([i for i in range(len(LABELS)) if i != first]) if rng.random() < 0.5 else None
    clauses = [_clause(rng, *_DEPARTMENTS[LABELS[i]]) for i in (first, second) if i is not None]
    label = rng.choices(range(len(LABELS)), label_probs(first, second))[0]
    return Example(_letter(rng, clauses), label)


def _outside(rng: random.Random) -> Example:
    clauses = [_clause(rng, *_ELSEWHERE) for _ in range(rng.choice((1, 2)))]
    return Example(_letter(rng, clauses), -1)


def _clause(rng: random.Random, subjects: tuple[str, ...], troubles: tuple[str, ...]) -> str:
    place = rng.choice(_PLACES) + " " if rng.random() < 0.3 else ""
    return f"{rng.choice(subjects)} {place}{rng.choice(troubles)}"


def _letter(rng: random.Random, clauses: list[str]) -> str:
    body = f" {rng.choice(_LINKS)} ".join(clauses)
    return f"{rng.choice(_OPENINGS)} {body}. {rng.choice(_CLOSINGS)}".strip()
