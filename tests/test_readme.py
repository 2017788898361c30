import re
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=[f"snippet{i}" for i in range(len(SNIPPETS))])
def test_snippet_runs(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {"__name__": "__main__"})


def test_layout_in_the_readme_is_the_layout_on_disk():
    tree = re.search(r"```text\n(.*?)```", README, flags=re.DOTALL)
    assert tree is not None
    for line in tree.group(1).splitlines():
        path = line.split("  ")[0].strip()
        if path:
            assert (Path(__file__).resolve().parents[1] / path).exists(), f"README names {path}, which is not there"
