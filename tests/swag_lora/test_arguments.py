"""What a command line may say."""

from argparse import ArgumentTypeError

import pytest

from swag_lora.arguments import (
    at_least,
    check_parent,
    count,
    fraction,
    listed,
    names,
    non_negative,
    positive,
    probability,
)


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (at_least(0), "0", 0),
        (count, "1", 1),
        (positive, "1e-3", 1e-3),
        (non_negative, "0", 0.0),
        (fraction, "1", 1.0),
        (probability, "0", 0.0),
        (listed(count), "1, 2,4", (1, 2, 4)),
        (names, " query,value ,", ("query", "value")),
    ],
)
def test_accepted(parse, text, value):
    assert parse(text) == value and type(parse(text)) is type(value)


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (at_least(2), "1", "must be at least 2, got 1"),
        (count, "0", "must be at least 1, got 0"),
        (count, "1.5", "takes whole numbers, got '1.5'"),
        (positive, "0", "must be a number above 0, got 0"),
        (positive, "inf", "must be a number above 0, got inf"),
        (positive, "soon", "must be a number above 0, got soon"),
        (non_negative, "-0.1", "must be a number, at least 0, got -0.1"),
        (non_negative, "nan", "must be a number, at least 0, got nan"),
        (fraction, "0", "must be a fraction, above 0 and at most 1, got 0"),
        (fraction, "1.1", "must be a fraction, above 0 and at most 1, got 1.1"),
        (probability, "1", "must be a probability, at least 0 and below 1, got 1"),
        (listed(count), "1,0", "must be at least 1, got 0"),
        (names, " , ", "must name at least one, separated by commas"),
    ],
)
def test_refused(parse, text, message):
    with pytest.raises(ArgumentTypeError) as caught:
        parse(text)
    assert str(caught.value) == message


def test_the_folder_of_a_file_to_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for target in (None, "-", "new.json", tmp_path / "new.json"):
        check_parent(target, "--json")
    with pytest.raises(FileNotFoundError, match=f"no folder {tmp_path}/nowhere for --csv"):
        check_parent("nowhere/new.csv", "--csv")
