"""A file that is replaced in one step."""

import os

import pytest

from swag_lora.files import write_atomic, write_text


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "figure.png"
    path.write_text("old")

    def write(fresh):
        assert fresh.parent == tmp_path and fresh.suffix == ".png" and not fresh.exists()
        fresh.write_text("half")
        assert path.read_text() == "old"
        fresh.write_text("new")

    write_atomic(path, write)
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["figure.png"]


@pytest.mark.parametrize("stage", ["write", "fsync", "replace"])
def test_a_failure_leaves_the_old_file_alone(tmp_path, monkeypatch, stage):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*arguments):
        raise OSError("disk full")

    def write(fresh):
        fresh.write_text("new")
        if stage == "write":
            fail()

    if stage != "write":
        monkeypatch.setattr(os, stage, fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, write)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_it_is_synced_before_it_takes_the_place(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a)))
    write_text(tmp_path / "file", "text ×\n")
    assert calls == ["fsync", "replace"] and (tmp_path / "file").read_bytes() == "text ×\n".encode()


def test_links_and_what_is_no_file(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "new"
    reader, writer = os.pipe()
    write_text(f"/dev/fd/{writer}", "through the pipe")
    assert os.read(reader, 100) == b"through the pipe"
    os.close(reader)
    os.close(writer)
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path, "")
