import math
from collections import Counter

import pytest

from swag_lora import synthetic

SIZES = {"train": 3000, "val": 50, "test": 50, "oos_test": 50}


def test_a_seed_gives_one_data_set():
    assert synthetic.make(0).splits == synthetic.make(0).splits
    assert synthetic.make(0).splits["train"] != synthetic.make(1).splits["train"]
    first = synthetic.make(0).splits["train"][0]
    assert first.text == FIRST_TEXT and first.label == FIRST_LABEL


def test_splits_share_no_letter():
    splits = synthetic.make(3).splits
    texts = [example.text for examples in splits.values() for example in examples]
    assert len(set(texts)) == len(texts) == sum(synthetic.SIZES.values())


def test_a_split_does_not_depend_on_the_others_sizes():
    assert synthetic.make(0, {"test": 20}).splits["test"] == synthetic.make(0, {"test": 40}).splits["test"][:20]


def test_label_probabilities():
    for probs in (synthetic.label_probs(2, None), synthetic.label_probs(2, 4)):
        assert math.isclose(sum(probs), 1) and max(probs) == probs[2] and min(probs) > 0
    assert sorted(synthetic.label_probs(2, 4))[-2] == synthetic.label_probs(2, 4)[4]


def test_labels_are_as_noisy_as_the_ceiling_says():
    """A reader who knows the letters' departments is right as often as `ceiling` says, within three standard errors."""
    examples = synthetic.make(0, SIZES).splits["train"]
    right = sum(_department(example.text) == example.label for example in examples) / len(examples)
    expected = synthetic.ceiling()["accuracy"]
    assert right == pytest.approx(expected, abs=3 * math.sqrt(expected * (1 - expected) / len(examples)))
    assert len(Counter(example.label for example in examples)) == len(synthetic.LABELS)


def test_outside_letters_name_no_department():
    for example in synthetic.make(0, SIZES).splits["oos_test"]:
        assert example.label == -1 and _department(example.text) is None


def _department(text):
    places = {
        i: text.find(subject)
        for i, (subjects, _) in enumerate(synthetic._DEPARTMENTS.values())
        for subject in subjects
        if subject in text
    }
    return min(places, key=places.get) if places else None


FIRST_TEXT = (
    "It seems that a fire hydrant is blocked while the timetable along the river is dangerous after dark. Please act."
)
FIRST_LABEL = 3
