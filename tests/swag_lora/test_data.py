import builtins
import gzip

import pytest
from encoder_models import COLORS, save_colors, save_questions, write_lines

from swag_lora import data
from swag_lora.data import Example


def test_reads_plain_and_compressed_lines(tmp_path):
    save_colors(tmp_path)
    dataset = data.load(tmp_path)
    assert {name: len(rows) for name, rows in dataset.splits.items()} == {
        "train": 48,
        "val": 24,
        "test": 24,
        "oos_test": 8,
    }
    assert dataset.labels == ("red", "green", "blue") and not dataset.is_choice
    assert dataset.splits["oos_test"][0] == Example("which stone ? or stone", -1)


def test_reads_only_the_splits_asked_for(tmp_path):
    save_colors(tmp_path)
    write_lines(tmp_path / "train.jsonl", ["broken"])
    assert list(data.load(tmp_path, ("test", "oos_test")).splits) == ["test", "oos_test"]


def test_labels_may_be_names_and_blank_lines_are_skipped(tmp_path):
    write_lines(tmp_path / "train.jsonl", [{"text": "a", "label": "b"}, "", {"text": "c", "label": "a"}])
    dataset = data.load(tmp_path)
    assert dataset.labels == ("a", "b")
    assert [example.label for example in dataset.splits["train"]] == [1, 0]


def test_classes_without_names_are_counted(tmp_path):
    rows = [{"text": "a", "label": label} for label in (0, 3, 0)]
    write_lines(tmp_path / "train.jsonl", [*rows, rows[0]])
    assert data.load(tmp_path).labels == ("0", "1", "2", "3")
    write_lines(tmp_path / "train.jsonl", rows)
    with pytest.raises(
        ValueError, match=r"train\.jsonl:2: the label 3 makes 4 classes, more .* has examples \(3\).*from 0"
    ):
        data.load(tmp_path)
    (tmp_path / "labels.json").write_text('["a", "b", "c", "d"]')
    assert data.load(tmp_path).splits["train"][1].label == 3


def test_reads_multiple_choice(tmp_path):
    save_questions(tmp_path)
    dataset = data.load(tmp_path)
    assert dataset.is_choice
    assert {len(example.choices) for example in dataset.splits["train"]} == {2, 3, 4}


def test_subset_is_drawn_at_random_and_repeatable(tmp_path):
    save_colors(tmp_path)
    dataset = data.load(tmp_path)
    small = dataset.subset({"train": 10, "test": 1000}, seed=1)
    assert len(small.splits["train"]) == 10 and small.splits["test"] == dataset.splits["test"]
    assert small.splits["train"] != dataset.splits["train"][:10]
    assert small.splits == dataset.subset({"train": 10}, seed=1).splits
    assert small.splits != dataset.subset({"train": 10}, seed=2).splits


GOOD = {"text": "a", "label": 0}
BAD_LINES = {
    "not JSON": ["{broken", "test.jsonl:2: not JSON: "],
    "not an object": ["3", "test.jsonl:2: expected"],
    "half a character": [
        {"text": "ab\ud83d", "label": 0},
        "test.jsonl:2: \"text\" has '\\ud83d' as character 3, half of a surrogate pair",
    ],
    "no text": [{"label": 0}, 'test.jsonl:2: expected {"text": string, "label": ...}: no column "text"'],
    "text a number": [
        {"text": 5, "label": 0},
        'test.jsonl:2: expected {"text": string, "label": ...}: "text" is no string',
    ],
    "a pair": [
        {"text": "a", "text_pair": "b", "label": 0},
        'test.jsonl:2: a column "text_pair", unlike the rows before',
    ],
    "label too large": [{"text": "a", "label": 3}, "test.jsonl:2: unknown label 3; it must be in 0..2"],
    "label negative": [{"text": "a", "label": -1}, "test.jsonl:2: unknown label -1"],
    "label unknown": [{"text": "a", "label": "pink"}, "test.jsonl:2: unknown label 'pink'"],
    "label a truth value": [{"text": "a", "label": True}, "test.jsonl:2: unknown label True"],
    "label a fraction": [{"text": "a", "label": 1.0}, "test.jsonl:2: unknown label 1.0"],
    "label null": [{"text": "a", "label": None}, "test.jsonl:2: unknown label None"],
    "no label": [{"text": "a"}, 'test.jsonl:2: expected {"text": string, "label": ...}: no column "label"'],
    "another kind": [{"question": "a", "choices": ["b", "c"], "answer": 0}, "test.jsonl:2: expected"],
}


@pytest.mark.parametrize("line, message", BAD_LINES.values(), ids=BAD_LINES)
def test_bad_line_is_named(tmp_path, line, message):
    save_colors(tmp_path)
    write_lines(tmp_path / "test.jsonl", [GOOD, line, GOOD])
    with pytest.raises(ValueError) as caught:
        data.load(tmp_path)
    assert message in str(caught.value)


QUESTION = {"question": "q", "choices": ["a", "b"], "answer": 0}
BAD_QUESTIONS = {
    "one choice": [{**QUESTION, "choices": ["a"]}, "expected"],
    "no question": [{"choices": ["a", "b"], "answer": 0}, "expected"],
    "no choices": [{"question": "q", "answer": 0}, "expected"],
    "no answer": [{"question": "q", "choices": ["a", "b"]}, "expected"],
    "choices no list": [{**QUESTION, "choices": "ab"}, "expected"],
    "choice a number": [{**QUESTION, "choices": ["a", 1]}, "expected"],
    "half a character": [{**QUESTION, "question": "\udc00"}, "\"question\" has '\\udc00' as character 1"],
    "choice half a character": [{**QUESTION, "choices": ["a", "b\ud800"]}, "\"choices\" has '\\ud800' as character 2"],
    "answer too large": [{**QUESTION, "answer": 2}, "unknown answer 2; it must be in 0..1 or A..B"],
    "answer negative": [{**QUESTION, "answer": -1}, "unknown answer -1"],
    "letter too large": [{**QUESTION, "answer": "C"}, "unknown answer 'C'; it must be in 0..1 or A..B"],
    "letter small": [{**QUESTION, "answer": "a"}, "unknown answer 'a'"],
    "letters": [{**QUESTION, "answer": "AB"}, "unknown answer 'AB'"],
    "no letter": [{**QUESTION, "answer": ""}, "unknown answer ''"],
    "another kind": [GOOD, "expected"],
}


@pytest.mark.parametrize("line, message", BAD_QUESTIONS.values(), ids=BAD_QUESTIONS)
def test_bad_question_is_named(tmp_path, line, message):
    write_lines(tmp_path / "test.jsonl", [QUESTION, line])
    with pytest.raises(ValueError) as caught:
        data.load(tmp_path)
    assert f"test.jsonl:2: {message}" in str(caught.value)


def test_answers_may_be_letters(tmp_path):
    write_lines(tmp_path / "test.jsonl", [QUESTION, {**QUESTION, "answer": "B"}, {**QUESTION, "answer": "A"}])
    assert [example.label for example in data.load(tmp_path).splits["test"]] == [0, 1, 0]


def test_reads_pairs(tmp_path):
    pair = {"text": "a", "text_pair": "b", "label": "x"}
    write_lines(tmp_path / "train.jsonl", [pair, {**pair, "text_pair": ""}])
    write_lines(tmp_path / "oos_test.jsonl", [{"text": "alone"}])
    dataset = data.load(tmp_path)
    assert dataset.splits["train"] == [Example("a", 0, text_pair="b"), Example("a", 0, text_pair="")]
    assert dataset.splits["oos_test"] == [Example("alone", -1)]
    write_lines(tmp_path / "val.jsonl", [{**pair, "text": "\U0001f600"}, {**pair, "text_pair": "\ud83d"}])
    with pytest.raises(ValueError, match=r"val\.jsonl:2: \"text_pair\" has '\\ud83d' as character 1"):
        data.load(tmp_path)
    write_lines(tmp_path / "val.jsonl", [{"text": "a", "label": "x"}])
    with pytest.raises(ValueError, match=r'val\.jsonl:1: no column "text_pair", unlike the rows before it'):
        data.load(tmp_path)


def test_labels_that_differ_between_splits(tmp_path):
    """Without labels.json a number would else pass as the index of a name."""
    write_lines(tmp_path / "train.jsonl", [{"text": "a", "label": "b"}, {"text": "c", "label": "a"}])
    write_lines(tmp_path / "val.jsonl", [{"text": "a", "label": "a"}, {"text": "a", "label": 0}])
    with pytest.raises(ValueError, match=r"val\.jsonl:2: unknown label 0; the train split has a, b"):
        data.load(tmp_path)
    write_lines(tmp_path / "val.jsonl", [{"text": "a", "label": "c"}])
    with pytest.raises(ValueError, match=r"val\.jsonl:1: unknown label 'c'; the train split has a, b"):
        data.load(tmp_path)
    write_lines(tmp_path / "train.jsonl", [{"text": "a", "label": "b"}, {"text": "c", "label": 1}])
    with pytest.raises(ValueError, match=r"train\.jsonl:2: the label 1 is a number, the first .*jsonl:1\) a name"):
        data.load(tmp_path)
    write_lines(tmp_path / "train.jsonl", [{"text": "a", "label": 1}, {"text": "c", "label": "b"}])
    with pytest.raises(ValueError, match=r"train\.jsonl:2: the label 'b' is a name, the first .*jsonl:1\) a number"):
        data.load(tmp_path)


def test_a_fraction_of_train_is_held_out_by_a_hash_of_the_text(tmp_path):
    rows = [{"text": f"text {i % 200}", "label": i % 2} for i in range(400)]
    write_lines(tmp_path / "train.jsonl", rows)
    write_lines(tmp_path / "test.jsonl", rows[:3])
    assert list(data.load(tmp_path).splits) == ["train", "test"]
    dataset = data.load(tmp_path, val_fraction=0.2)
    assert list(dataset.splits) == ["train", "val", "test"]
    val, train = ({example.text for example in dataset.splits[name]} for name in ("val", "train"))
    assert val.isdisjoint(train) and len(val | train) == 200 and 25 <= len(val) <= 55
    more = data.load(tmp_path, val_fraction=0.5)
    assert val < {example.text for example in more.splits["val"]}
    assert data.load(tmp_path, ("val",), val_fraction=0.2).splits == {"val": dataset.splits["val"]}
    assert data.load(tmp_path, ("train",), val_fraction=0.2).splits == {"train": dataset.splits["train"]}
    assert data.load(tmp_path, ("test",), ("0", "1"), val_fraction=0.2).splits == {"test": dataset.splits["test"]}
    write_lines(tmp_path / "train.jsonl", rows[::-1])
    assert {example.text for example in data.load(tmp_path, val_fraction=0.2).splits["val"]} == val
    write_lines(tmp_path / "val.jsonl", rows[:5])
    assert len(data.load(tmp_path, val_fraction=0.2).splits["val"]) == 5


def test_a_held_out_split_is_not_empty(tmp_path):
    write_lines(tmp_path / "train.jsonl", [GOOD, GOOD])
    with pytest.raises(ValueError, match="holding out 0.2 of 2 training examples leaves a split empty"):
        data.load(tmp_path, val_fraction=0.2)
    with pytest.raises(ValueError, match="must lie between 0 and 1, got 1"):
        data.load(tmp_path, val_fraction=1)


def test_fingerprints_tell_examples_apart():
    base = [Example("a", 0, ("x", "y")), Example("b", 1, ("x", "y"))]
    seen = {
        data.Dataset("n", {"test": rows}, None).fingerprint("test")
        for rows in (
            base,
            base[::-1],
            base[:1],
            [base[0], Example("b", 0, ("x", "y"))],
            [base[0], Example("b", 1, ("x", "z"))],
            [base[0], Example("b", 1, ("x", "y"), "")],
            [base[0], Example("B", 1, ("x", "y"))],
        )
    }
    assert len(seen) == 7
    assert data.Dataset("other", {"val": base}, None).fingerprint("val") in seen
    assert (
        data.Dataset("n", {"test": base}, None).fingerprint("test") == "b4a024e6358dbdcf"
    )  # the same on every machine


def outside(tmp_path, rows, name="out.jsonl", **options):
    write_lines(tmp_path / name, rows)
    return data.load_outside(tmp_path / name, **options)


def test_shift_to_the_same_classes(tmp_path):
    inside = data.load(save_colors(tmp_path / "colors"))
    rows = [{"text": "a", "label": 2}, {"text": "b", "label": "red"}]
    shifted = outside(tmp_path, rows, "out.jsonl.gz", labels=inside.labels)
    assert [example.label for example in shifted.splits["test"]] == [2, 0] and shifted.labels == inside.labels
    assert data.check_shift(inside, shifted)
    assert data.check_shift(inside, data.load_outside(tmp_path / "colors", inside.labels))
    with pytest.raises(ValueError, match=r"out\.jsonl:2: unknown label 'pink'.*--ood-unlabelled .*out\.jsonl"):
        outside(tmp_path, [rows[0], {"text": "a", "label": "pink"}], labels=inside.labels)
    with pytest.raises(ValueError, match=r"out\.jsonl:2: unknown label -1"):
        outside(tmp_path, [rows[0], {"text": "a", "label": -1}], labels=inside.labels)
    with pytest.raises(ValueError, match="the test split is empty"):
        outside(tmp_path, [])


def test_shift_without_labels(tmp_path):
    inside = data.load(save_colors(tmp_path / "colors"))
    any_label = [{"text": "a"}, {"text": "b", "label": "pink"}, {"text": "b", "label": 7}]
    for rows, options in (
        (any_label, {"labelled": False}),
        ([{"text": "a"}], {}),
        ([{"text": "a", "label": -1}], {}),
        ([{"text": "a", "label": 5}], {"labels": None}),
    ):
        shifted = outside(tmp_path, rows, **{"labels": inside.labels, **options})
        assert {example.label for example in shifted.splits["test"]} == {-1} and not shifted.is_choice
        assert data.check_shift(inside, shifted) is False
    write_lines(tmp_path / "new" / "oos_test.jsonl", any_label)
    shifted = data.load_outside(tmp_path / "new", inside.labels)
    assert list(shifted.splits) == ["test"] and data.check_shift(inside, shifted) is False
    ignored = data.load_outside(tmp_path / "colors", inside.labels, labelled=False)
    assert len(ignored.splits["test"]) == 24 and data.check_shift(inside, ignored) is False
    write_lines(tmp_path / "trained" / "train.jsonl", [GOOD])
    with pytest.raises(ValueError, match="neither a test nor an oos_test split; it has train"):
        data.load_outside(tmp_path / "trained")


def test_shift_to_other_classes_is_refused(tmp_path):
    inside = data.load(save_colors(tmp_path / "colors"))
    other = save_colors(tmp_path / "other")
    (other / "labels.json").write_text('["red", "pink", "blue"]')
    with pytest.raises(
        ValueError, match=r"other has other classes than .*colors \(class 1 is 'pink'.*--ood-unlabelled .*other"
    ):
        data.check_shift(inside, data.load_outside(other, inside.labels))
    with pytest.raises(ValueError, match=r"test\.jsonl has other classes"):  # the names beside a single file
        data.check_shift(inside, data.load_outside(other / "test.jsonl", inside.labels))
    assert data.check_shift(inside, data.load_outside(other, inside.labels, labelled=False)) is False


def test_shift_between_kinds(tmp_path):
    colors, questions = save_colors(tmp_path / "colors"), save_questions(tmp_path / "questions")
    inside = data.load(questions)
    assert data.check_shift(inside, data.load_outside(questions / "test.jsonl"))
    assert data.check_shift(inside, outside(tmp_path, [{"question": "q", "choices": ["a", "b"]}])) is False
    for labelled in (True, False):
        with pytest.raises(ValueError, match="colors is text classification and .*questions multiple choice"):
            data.check_shift(inside, data.load_outside(colors, labelled=labelled))
        with pytest.raises(ValueError, match="questions is multiple choice and .*colors text classification"):
            data.check_shift(data.load(colors), data.load_outside(questions, COLORS, labelled=labelled))


def test_shift_between_pairs_and_single_texts(tmp_path):
    """Their labels mean different things; the inputs alone can be told from each other."""
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    forms = {"single texts": rows, "pairs of sentences": [{**row, "text_pair": "c"} for row in rows]}
    for form, lines in forms.items():
        write_lines(tmp_path / form / "train.jsonl", lines)
    inside = {form: data.load(tmp_path / form) for form in forms}
    for one, other in (("single texts", "pairs of sentences"), ("pairs of sentences", "single texts")):
        shifted = outside(tmp_path, forms[other], labels=inside[one].labels)
        with pytest.raises(
            ValueError, match=rf"out\.jsonl has {other} and .*/{one} {one}, so their.*unlabelled .*out\.jsonl"
        ):
            data.check_shift(inside[one], shifted)
        assert data.check_shift(inside[one], outside(tmp_path, forms[one], labels=inside[one].labels))
        for unlabelled in (
            outside(tmp_path, forms[other], labels=inside[one].labels, labelled=False),
            outside(tmp_path, [{**row, "label": -1} for row in forms[other]], labels=inside[one].labels),
        ):
            assert data.check_shift(inside[one], unlabelled) is False


def test_outside_texts_beside_pairs_leave_them_pairs(tmp_path):
    write_lines(tmp_path / "train.jsonl", [{"text": "a", "text_pair": "b", "label": 0}])
    write_lines(tmp_path / "oos_test.jsonl", [{"text": "a"}])
    assert data.load(tmp_path).is_paired
    assert not data.load(save_colors(tmp_path / "colors")).is_paired


def test_a_byte_order_mark_is_no_text(tmp_path):
    save_colors(tmp_path)
    plain = data.load(tmp_path)
    for name in ("train.jsonl", "labels.json"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
    texts = gzip.decompress((tmp_path / "oos_test.jsonl.gz").read_bytes())
    (tmp_path / "oos_test.jsonl.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + texts))
    assert data.load(tmp_path) == plain


def test_damaged_files_are_named(tmp_path):
    whole = gzip.compress(b'{"text": "a", "label": 0}\n' * 1000)
    (tmp_path / "train.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"train\.jsonl\.gz:\d+: unreadable"):
        data.load(tmp_path)
    (tmp_path / "train.jsonl.gz").write_bytes(b"no gzip at all")
    with pytest.raises(ValueError, match=r"train\.jsonl\.gz:1: unreadable"):
        data.load(tmp_path)
    (tmp_path / "train.jsonl.gz").unlink()
    (tmp_path / "train.jsonl").write_bytes(b'{"text": "\xff", "label": 0}\n')
    with pytest.raises(ValueError, match=r"train\.jsonl:1: unreadable"):
        data.load(tmp_path)


def test_empty_split_is_refused(tmp_path):
    save_colors(tmp_path)
    (tmp_path / "val.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="the val split is empty"):
        data.load(tmp_path)


@pytest.mark.parametrize("names", ["{", '{"a": 0}', "[]", "[1, 2]", '["a", "a"]'])
def test_bad_label_names_are_refused(tmp_path, names):
    save_colors(tmp_path)
    (tmp_path / "labels.json").write_text(names)
    with pytest.raises(ValueError, match=r"labels\.json"):
        data.load(tmp_path)


def test_other_class_names_than_the_model_are_refused(tmp_path):
    save_colors(tmp_path)
    assert data.load(tmp_path, labels=("red", "green", "blue")).labels == ("red", "green", "blue")
    with pytest.raises(ValueError, match="does not match the model: 3 classes against 2"):
        data.load(tmp_path, labels=("red", "green"))
    with pytest.raises(ValueError, match="class 1 is 'green' against 'pink'"):
        data.load(tmp_path, labels=("red", "pink", "blue"))


def test_missing_folder_and_missing_splits(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        data.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has none of train\.jsonl"):
        data.load(tmp_path)
    save_colors(tmp_path, {"train": 3})
    with pytest.raises(ValueError, match="no test split; it has train, oos_test"):
        data.load(tmp_path).split("test")
    with pytest.raises(ValueError, match="is a file"):
        data.load(tmp_path / "train.jsonl")
    (tmp_path / "labels.json").unlink()
    with pytest.raises(ValueError, match="class names are unknown"):
        data.load(tmp_path, ("oos_test",))


def test_hub_data_set_without_datasets(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"swag-kernels\[data\]"):
        data.load("someone/something")


def test_hub_data_set(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})

    def split(labels):
        return datasets.Dataset.from_dict({"text": ["a", "b"], "label": labels}, features=features)

    source = datasets.DatasetDict(train=split([0, 1]), validation=split([1, 1]), test=split([0, 0]))
    monkeypatch.setattr(datasets, "load_dataset", lambda name: source)
    dataset = data.load("someone/something")
    assert dataset.labels == ("no", "yes") and list(dataset.splits) == ["train", "val", "test"]
    assert [example.label for example in dataset.splits["val"]] == [1, 1]
    with pytest.raises(ValueError, match="does not match the model"):
        data.load("someone/something", labels=("yes", "no"))
    monkeypatch.setattr(datasets, "load_dataset", lambda name: 1 / 0)
    with pytest.raises(ValueError, match="no hub data set either: division by zero"):
        data.load("someone/something")
