"""Small runs of the experiment, and how its methods are computed the plain way."""

import gzip
import json

import torch
from encoder_models import COLORS, OBJECTS, write_lines
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from swag_kernels.reference import philox
from swag_lora.experiment.settings import Settings
from swag_lora.recipe import Recipe

SAMPLES = 8
LIVELY = Recipe(
    epochs=7, start=0.6, restart_best=True, collections=4, rank=3, lr=0.05, swag_lr=0.002, batch_size=4
)  # last and best epoch differ, and so do the scales of the two seeds
QUICK = Recipe(epochs=2, start=0.5, collections=3, rank=3, lr=0.03, swag_lr=0.02, batch_size=8)


def save_outside(folder):
    """A shift with labels, in a file that is called as a split is, and texts of elsewhere whose labels mean nothing."""
    rows = [{"text": f"{o} or {COLORS[i % 3]} is the {o}", "label": COLORS[i % 3]} for i, o in enumerate(OBJECTS)]
    write_lines(folder / "shift" / "val.jsonl", rows)
    write_lines(folder / "elsewhere" / "test.jsonl", [{"text": f"the {o} ?", "label": "odd"} for o in OBJECTS[:5]])
    return folder


def settings_of(home, recipe=LIVELY, **changes):
    asked = {"model": str(home / "bert"), "data": str(home / "colors"), "seeds": (0, 1)}
    return Settings(**(asked | {"recipe": recipe, "samples": SAMPLES, "max_length": 16} | changes))


def predictions(folder):
    """Every tensor by method, file and name, and beside them what was told without the seconds."""
    found = {}
    # What a kill leaves half written has a name that begins with a dot.
    for path in sorted((folder / "predictions").rglob("[!.]*.safetensors")):
        with safe_open(path, "pt") as file:
            told = json.loads(file.metadata()["json"])
            told["seconds"] = sorted(told["seconds"])
            key = f"{path.parent.name}/{path.stem}"
            found[key] = {name: file.get_tensor(name) for name in file.keys()}, told  # noqa: SIM118
    return found


def table_without_seconds(folder):
    """The cells of `table.md`, without the column of seconds."""
    lines = []
    for line in (folder / "table.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) > 1:
            if "s / 1000" in cells:
                seconds = cells.index("s / 1000")
            del cells[seconds]
            cells = [cell for cell in cells if set(cell) - set("-:")]
        lines.append(cells)
    return lines


def same_predictions(first, second):
    """Bit for bit."""
    first, second = predictions(first), predictions(second)
    assert first.keys() == second.keys()
    for key, (tensors, told) in first.items():
        others, other_told = second[key]
        assert tensors.keys() == others.keys() and told == other_told, key
        for name, tensor in tensors.items():
            # As bits, for the NaN of a standard error.
            assert torch.equal(tensor.view(torch.uint8), others[name].view(torch.uint8)), (key, name)


class Plain:
    """A fit of a classifier as PEFT loads it, and forwards with weights set one after the other."""

    def __init__(self, base, folder, rows):
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
        self.model = PeftModel.from_pretrained(model, str(folder)).eval()
        tokenizer = AutoTokenizer.from_pretrained(base)
        self.batch = tokenizer([row["text"] for row in rows], return_tensors="pt", padding=True)

    @torch.no_grad()
    def logits(self, state=None):
        if state is not None:
            parameters = dict(self.model.named_parameters())
            for name, value in state.items():
                parameters[name].copy_(value)
        return self.model(**self.batch).logits.double()

    def each(self, weights):
        """[S, n, C] of S samples."""
        return torch.stack([self.logits(weights.sample(s)) for s in range(weights.num_samples)])

    def masked(self, samples, p, seed):
        """[S, n, C] with the columns of each lora_A masked, by the bits that `DropoutPosterior` documents."""
        matrices = [(name, value.clone()) for name, value in self.model.named_parameters() if ".lora_A." in name]
        found = []
        for k in range(samples):
            state = {}
            for layer, (name, matrix) in enumerate(matrices):
                width = matrix.shape[1]
                counter = torch.tensor([[i // 4 for i in range(width)], [k] * width, [layer] * width, [3] * width])
                words = philox(counter, seed)[torch.arange(width) % 4, torch.arange(width)]
                state[name] = matrix * (words < round((1 - p) * 2**32)) / (1 - p)
            found.append(self.logits(state))
        return torch.stack(found)


def averaged(logits, pairs):
    """What a prediction file holds, of logits [S, n, C] of which neighbours may be antithetic pairs."""
    probs = logits.softmax(-1)
    mean = probs.mean(0)
    entropy = -(mean * mean.log()).sum(-1)
    expected = -(probs * probs.log()).sum(-1).mean(0)
    draws = probs.unflatten(0, (-1, 2)).mean(1) if pairs else probs
    return {
        "log_probs": mean.log(),
        "entropy": entropy,
        "expected_entropy": expected,
        "mutual_information": entropy - expected,
        "disagreement": (probs.argmax(-1) != mean.argmax(-1)).double().mean(0),
        "std_error": draws.std(0) / len(draws) ** 0.5,
    }


def rows_of(path):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt") as file:
        return [json.loads(line) for line in file]
