"""What a posterior folder holds, read without its model."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .checkpoint import KIND, POSTERIOR_NAME
from .layout import Layout


def describe(folder: str | Path) -> dict[str, str]:
    """Collections, deviations, weights, and where `swag-lora fit` wrote the folder also its task, by name.

    Raises:
        FileNotFoundError, ValueError: no such folder, or no posterior in it.
    """
    path = Path(folder) / POSTERIOR_NAME
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no posterior: it has no {POSTERIOR_NAME}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != KIND:
                raise ValueError(f"{path} is not a posterior: it was not written by SwagPosterior.save_pretrained")
            count = int(file.get_tensor("count"))
            held = file.get_slice("deviations").get_shape()[0]
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from None
    layout = Layout.from_json(metadata["layout"])
    found = {
        "collections": f"{count}",
        "deviations": f"{held} of at most {metadata['rank']}",
        "weights": f"{layout.numel:,} in {len(layout)} tensors",
        "file": f"{path.stat().st_size / 2**20:.1f} MiB",
    }
    return found | _adapter(Path(folder)) | _task(Path(folder))


def _adapter(folder: Path) -> dict[str, str]:
    path = folder / "adapter_config.json"
    if not path.is_file():
        return {}
    config = json.loads(path.read_text(encoding="utf-8"))
    modules = ", ".join(sorted(config.get("target_modules") or ()))
    return {"adapter": f"LoRA r={config.get('r')}, alpha={config.get('lora_alpha')} on {modules}"}


def _task(folder: Path) -> dict[str, str]:
    from .tasks import TASK_FILE, Task

    if not (folder / TASK_FILE).is_file():
        return {}
    task = Task.load(folder)
    points = [name for name in ("map", "map-best") if (folder / name).is_dir()]
    return {
        "task": "multiple choice" if task.labels is None else f"text classification, {len(task.labels)} classes",
        "model": task.model,
        "sample scale": f"{task.scale:g}" + ("" if task.rank is None else f", of the last {task.rank} deviations"),
        "also": ", ".join(points) or "no point estimate",
    }
