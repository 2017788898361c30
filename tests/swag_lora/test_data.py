import builtins
import gzip

import pytest
from encoder_models import save_colors, save_questions, write_lines

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
    write_lines(tmp_path / "train.jsonl", [{"text": "a", "label": 0}, {"text": "c", "label": 3}])
    assert data.load(tmp_path).labels == ("0", "1", "2", "3")


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
    "no text": [{"label": 0}, "test.jsonl:2: expected"],
    "text a number": [{"text": 5, "label": 0}, "test.jsonl:2: expected"],
    "label too large": [{"text": "a", "label": 3}, "test.jsonl:2: unknown label 3; it must be in 0..2"],
    "label negative": [{"text": "a", "label": -1}, "test.jsonl:2: unknown label -1"],
    "label unknown": [{"text": "a", "label": "pink"}, "test.jsonl:2: unknown label 'pink'"],
    "label a truth value": [{"text": "a", "label": True}, "test.jsonl:2: unknown label True"],
    "label a fraction": [{"text": "a", "label": 1.0}, "test.jsonl:2: unknown label 1.0"],
    "no label": [{"text": "a"}, "test.jsonl:2: unknown label None"],
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
    "choices no list": [{**QUESTION, "choices": "ab"}, "expected"],
    "choice a number": [{**QUESTION, "choices": ["a", 1]}, "expected"],
    "answer too large": [{**QUESTION, "answer": 2}, "unknown answer 2; it must be in 0..1"],
    "answer negative": [{**QUESTION, "answer": -1}, "unknown answer -1"],
    "answer a letter": [{**QUESTION, "answer": "A"}, "unknown answer 'A'"],
    "another kind": [GOOD, "expected"],
}


@pytest.mark.parametrize("line, message", BAD_QUESTIONS.values(), ids=BAD_QUESTIONS)
def test_bad_question_is_named(tmp_path, line, message):
    write_lines(tmp_path / "test.jsonl", [QUESTION, line])
    with pytest.raises(ValueError) as caught:
        data.load(tmp_path)
    assert f"test.jsonl:2: {message}" in str(caught.value)


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
