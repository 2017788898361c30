"""The hub's data sets in memory, with the columns and splits that they have there."""

import pytest

from swag_lora import data, hub
from swag_lora.data import Example

datasets = pytest.importorskip("datasets")

TEXT, FLAG, NUMBER = datasets.Value("string"), datasets.Value("bool"), datasets.Value("int32")
OPTIONS = datasets.Sequence({"text": TEXT, "label": TEXT})
ARC = {"id": TEXT, "question": TEXT, "choices": OPTIONS, "answerKey": TEXT}
MMLU = {
    "question": TEXT,
    "subject": TEXT,
    "choices": datasets.Sequence(TEXT),
    "answer": datasets.ClassLabel(names=[*"ABCD"]),
}
MRPC = {
    "sentence1": TEXT,
    "sentence2": TEXT,
    "label": datasets.ClassLabel(names=["not_equivalent", "equivalent"]),
    "idx": NUMBER,
}
COLA = {"sentence": TEXT, "label": datasets.ClassLabel(names=["unacceptable", "acceptable"]), "idx": NUMBER}
MNLI = {
    "premise": TEXT,
    "hypothesis": TEXT,
    "label": datasets.ClassLabel(names=["entailment", "neutral", "contradiction"]),
    "idx": NUMBER,
}


def options(labels):
    return {"text": [f"text {label}" for label in labels], "label": list(labels)}


def arc(number, split, answer="A", labels="ABCD"):
    return {"id": f"{number}", "question": f"{split} {number}", "choices": options(labels), "answerKey": answer}


def split(features, rows):
    columns = {name: [row[name] for row in rows] for name in features}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@pytest.fixture
def hubbed(monkeypatch):
    """Puts data sets on the hub, by path and configuration; whatever else is asked for is not there."""
    there = {}

    def load_dataset(path, config=None):
        if (path, config) not in there:
            raise ValueError(f"BuilderConfig '{config}' of {path} not found")
        return datasets.DatasetDict({name: split(*given) for name, given in there[path, config].items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return there


def three(features, row):
    return {name: (features, [row(i, name) for i in range(30)]) for name in ("train", "validation", "test")}


def check_held_out(loaded, of_validation):
    """Validation data is the test split, and about a fifth of train is val."""
    assert list(loaded.splits) == ["train", "val", "test"]
    assert all(of_validation(example) for example in loaded.splits["test"])
    assert len(loaded.splits["train"]) + len(loaded.splits["val"]) == 30
    assert 1 <= len(loaded.splits["val"]) <= 13
    assert not set(loaded.splits["val"]) & set(loaded.splits["train"])


@pytest.mark.parametrize("name, config", [("arc-easy", "ARC-Easy"), ("arc-challenge", "ARC-Challenge")])
def test_arc(hubbed, name, config):
    hubbed["allenai/ai2_arc", config] = three(ARC, lambda i, s: arc(i, s, *(("3", "123") if i else ("E", "ABCDE"))))
    loaded = data.load(name)
    assert loaded.is_choice and loaded.name == name
    assert {key: len(rows) for key, rows in loaded.splits.items()} == {"train": 30, "val": 30, "test": 30}
    assert loaded.splits["val"][0] == Example("validation 0", 4, tuple(f"text {x}" for x in "ABCDE"))
    assert loaded.splits["test"][1] == Example("test 1", 2, ("text 1", "text 2", "text 3"))


def test_openbookqa(hubbed):
    features = {"id": TEXT, "question_stem": TEXT, "choices": OPTIONS, "answerKey": TEXT}
    hubbed["allenai/openbookqa", "main"] = three(features, lambda i, s: arc(i, s, "B") | {"question_stem": f"{s} stem"})
    loaded = data.load("openbookqa", ("val", "test"))
    assert list(loaded.splits) == ["val", "test"]
    assert loaded.splits["test"][0] == Example("test stem", 1, tuple(f"text {x}" for x in "ABCD"))


def test_commonsense_qa_has_no_test_answers(hubbed):
    hubbed["tau/commonsense_qa", None] = three(
        ARC | {"question_concept": TEXT}, lambda i, s: arc(i, s, "" if s == "test" else "D") | {"question_concept": "c"}
    )
    loaded = data.load("commonsense_qa")
    check_held_out(loaded, lambda example: example.text.startswith("validation") and example.label == 3)
    assert data.load("commonsense_qa", ("train",)).splits["train"] == loaded.splits["train"]
    assert len(data.load("commonsense_qa", val_fraction=0.5).splits["val"]) > len(loaded.splits["val"])


def test_mmlu(hubbed):
    for group in hub.MMLU.values():
        for subject in group:
            row = {"question": subject, "subject": subject, "choices": ["a", "b", "c", "d"], "answer": 2}
            hubbed["cais/mmlu", subject] = {
                "test": (MMLU, [row, row]),
                "validation": (MMLU, [row]),
                "dev": (MMLU, [row]),
            }
    loaded = data.load("mmlu:computer_science")
    assert list(loaded.splits) == ["test"] and loaded.is_choice
    assert [example.text for example in loaded.splits["test"][::2]] == [
        "college_computer_science",
        "computer_security",
        "high_school_computer_science",
        "machine_learning",
    ]
    assert loaded.splits["test"][0] == Example("college_computer_science", 2, ("a", "b", "c", "d"))
    law = data.load_outside("mmlu:law")
    assert {example.text for example in law.splits["test"]} == {
        "international_law",
        "jurisprudence",
        "professional_law",
    }
    assert len(data.load("mmlu:jurisprudence").splits["test"]) == 2
    with pytest.raises(ValueError, match="no hub data set either: BuilderConfig 'chess' of cais/mmlu not found"):
        data.load("mmlu:chess")


def test_boolq(hubbed):
    features = {"question": TEXT, "answer": FLAG, "passage": TEXT}
    there = three(features, lambda i, s: {"question": f"{s} {i}", "answer": i % 2 == 1, "passage": "p"})
    hubbed["google/boolq", None] = {name: there[name] for name in ("train", "validation")}
    loaded = data.load("boolq")
    check_held_out(loaded, lambda example: example.text.startswith("validation"))
    assert loaded.labels == ("no", "yes")
    assert loaded.splits["test"][:2] == [
        Example("validation 0", 0, text_pair="p"),
        Example("validation 1", 1, text_pair="p"),
    ]


def test_winogrande(hubbed):
    features = {"sentence": TEXT, "option1": TEXT, "option2": TEXT, "answer": TEXT}

    def row(i, name):
        answer = "" if name == "test" else str(1 + i % 2)
        return {"sentence": f"{name} {i} _", "option1": "one", "option2": "two", "answer": answer}

    for size in ("xl", "debiased"):
        hubbed["allenai/winogrande", f"winogrande_{size}"] = three(features, row)
    loaded = data.load("winogrande")
    check_held_out(loaded, lambda example: example.text.startswith("validation"))
    assert loaded.splits["test"][1] == Example("validation 1 _", 1, ("one", "two"))
    assert data.load("winogrande:debiased").splits == loaded.splits
    with pytest.raises(ValueError, match="sizes of winogrande are xs, s, m, l, xl, debiased"):
        data.load("winogrande:huge")


def test_glue_pairs(hubbed):
    hubbed["nyu-mll/glue", "mrpc"] = three(
        MRPC, lambda i, s: {"sentence1": f"{s} {i}", "sentence2": "same", "label": i % 2, "idx": i}
    )
    hubbed["nyu-mll/glue", "rte"] = hubbed["nyu-mll/glue", "mrpc"]
    check_held_out(data.load("glue:rte"), lambda example: example.text.startswith("validation"))
    loaded = data.load("glue:mrpc")  # the one task with public test labels
    assert {name: len(rows) for name, rows in loaded.splits.items()} == {"train": 30, "val": 30, "test": 30}
    assert loaded.labels == ("not_equivalent", "equivalent")
    assert loaded.splits["test"][1] == Example("test 1", 1, text_pair="same")
    with pytest.raises(ValueError, match="does not match the model: class 0 is 'not_equivalent' against 'no'"):
        data.load("glue:mrpc", labels=("no", "yes"))


def test_glue_texts_and_hidden_labels(hubbed):
    hubbed["nyu-mll/glue", "cola"] = three(
        COLA, lambda i, s: {"sentence": f"{s} {i}", "label": -1 if s == "test" else i % 2, "idx": i}
    )
    loaded = data.load("glue:cola")
    check_held_out(loaded, lambda example: example.text.startswith("validation"))
    assert loaded.splits["test"][1] == Example("validation 1", 1)
    with pytest.raises(ValueError, match=r"glue:stsb: the tasks are glue:cola, .*glue:wnli"):
        data.load("glue:stsb")


def test_glue_mnli_takes_the_matched_split(hubbed):
    there = three(MNLI, lambda i, s: {"premise": f"{s} {i}", "hypothesis": "h", "label": i % 3, "idx": i})
    hubbed["nyu-mll/glue", "mnli"] = {"train": there["train"], "validation_matched": there["validation"]}
    check_held_out(data.load("glue:mnli"), lambda example: example.text_pair == "h")


def test_columns_and_splits_that_are_not_there(hubbed):
    hubbed["allenai/ai2_arc", "ARC-Easy"] = three({"id": TEXT, "question": TEXT}, lambda i, s: arc(i, s))
    with pytest.raises(ValueError, match=r"ai2_arc/ARC-Easy\[train\] row 0: no column 'choices'; it has id, question"):
        data.load("arc-easy")
    hubbed["nyu-mll/glue", "rte"] = {"train": (MRPC, [])}
    with pytest.raises(ValueError, match="nyu-mll/glue has no validation split; it has train"):
        data.load("glue:rte")
    hubbed["allenai/ai2_arc", "ARC-Challenge"] = three(ARC, lambda i, s: arc(i, s, "" if i == 7 else "A"))
    with pytest.raises(ValueError, match=r"ARC-Challenge\[train\] row 7: unknown answer ''"):
        data.load("arc-challenge")
    for name in ("mmlu", "glue"):
        with pytest.raises(ValueError, match=f"{name}: .*{name}:"):
            data.load(name)


def test_a_folder_comes_first(hubbed, tmp_path, monkeypatch):
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq" / "train.jsonl").write_text('{"text": "a", "label": "b"}\n')
    monkeypatch.chdir(tmp_path)
    assert data.load("boolq").labels == ("b",)


def test_any_other_set_has_our_columns(hubbed):
    features = {"text": TEXT, "label": datasets.ClassLabel(names=["no", "yes"])}
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    hubbed["someone/something", None] = {
        "train": (features, rows),
        "dev": (features, rows[:1]),
        "extra": (features, rows),
    }
    loaded = data.load("someone/something")
    assert loaded.labels == ("no", "yes") and list(loaded.splits) == ["train", "val"]
    assert loaded.splits["val"] == [Example("a", 0)]
    with pytest.raises(ValueError, match=r"someone/something has none of the splits test; it has train, val"):
        data.load("someone/something", ("test",))
    hubbed["someone/something", None] = {"extra": (features, rows)}
    with pytest.raises(ValueError, match="none of the splits train, val, test, oos_test; it has extra"):
        data.load("someone/something")
    other = {**features, "label": datasets.ClassLabel(names=["yes", "no"])}
    hubbed["someone/something", None] = {"train": (features, rows), "test": (other, rows)}
    with pytest.raises(ValueError, match="class names of its splits train and test differ"):
        data.load("someone/something")
