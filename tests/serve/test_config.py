"""What a pool's file may say; whatever else it says is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from thaw_vllm.errors import StorageError, UsageError
from thaw_vllm.serve.config import Model, read, registered


def written(folder: Path, text: str) -> Path:
    path = folder / "models.toml"
    path.write_text(text)
    return path


def test_everything(tmp_path: Path):
    (tmp_path / "m").mkdir()
    text = """
        drain = 5
        parked = 2
        idle_park = 60
        share = 0.5
        [models.a]
        path = "m"
        snapshot = "w.thaw"
        args = ["--max-model-len", "512"]
        pinned = true
        idle_stop = 10.5
        [models."org/b"]
        path = "org/b"
        share = 0.25
        park = false
        deadline = 3
    """
    found = read(written(tmp_path, text), [f"c={tmp_path}"])
    assert (found.drain, found.parked) == (5, 2) and list(found.models) == ["a", "org/b", "c"]
    assert found.models["a"] == Model(
        "a",
        str(tmp_path / "m"),
        str(tmp_path / "w.thaw"),
        ("--max-model-len", "512"),
        share=0.5,
        pinned=True,
        idle_park=60,
        idle_stop=10.5,
    )
    assert found.models["org/b"] == Model("org/b", "org/b", share=0.25, park=False, idle_park=60, deadline=3)
    assert found.models["c"] == Model("c", str(tmp_path), share=0.5, idle_park=60)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[models.a]\npath = 3", "path is missing"),
        ("[models.a]", "path is missing"),
        ("[models.a]\npath = 'm'\nsnapshot = 3", "snapshot must be a path"),
        ("[models.a]\npath = 'm'\nargs = 'x'", "args must be a list"),
        ("[models.a]\npath = 'm'\nargs = [1]", "args must be a list"),
        ("[models.a]\npath = 'm'\nshare = 0", "share must be a number, more than 0"),
        ("[models.a]\npath = 'm'\nshare = 1.5", "share must be a number"),
        ("[models.a]\npath = 'm'\nshare = true", "share must be a number"),
        ("[models.a]\npath = 'm'\ndeadline = nan", "deadline must be a number"),
        ("[models.a]\npath = 'm'\nidle_stop = -1", "idle_stop must be a number"),
        ("[models.a]\npath = 'm'\npinned = 1", "pinned must be true or false"),
        ("[models.a]\npath = 'm'\nminimum = -1", "minimum must be a whole number from 0 on"),
        ("[models.a]\npath = 'm'\nmaximum = 0", "maximum must be a whole number from 1 on"),
        ("[models.a]\npath = 'm'\nbusy = 1.5", "busy must be a whole number from 1 on"),
        ("[models.a]\npath = 'm'\nminimum = 2", "minimum is 2, more than maximum, which is 1"),
        ("parked_gib = 'much'\n[models.a]\npath = 'm'", "parked_gib must be a number"),
        ("[models.a]\npath = 'm'\nfast = true", "says 'fast', which is nothing known"),
        ("[models.'a b']\npath = 'm'", "cannot name a model"),
        ("models = 3", "models must be tables"),
        ("[models]\na = 'm'", "models must be tables"),
        ("speed = 3", "says 'speed', which is nothing known"),
        ("drain = 'x'", "drain must be a number"),
        ("parked = 1.5", "parked must be a whole number"),
        ("parked = -1", "parked must be a whole number"),
        ("x = ", "is not TOML"),
        ("[models.a]\npath='m'\npinned=true\n[models.b]\npath='m'", "'b' has no room beside what is pinned ('a')"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, said: str):
    with pytest.raises(UsageError) as told:
        read(written(tmp_path, text))
    assert said in str(told.value)


def test_no_file(tmp_path: Path):
    with pytest.raises(StorageError, match=r"none\.toml"):
        read(tmp_path / "none.toml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="is not TOML"):
        read(tmp_path / "binary")


@pytest.mark.parametrize("words", [["a"], ["=m"], ["a="], ["a=m", "a=n"]])
def test_what_is_registered_wrongly(words: list[str]):
    with pytest.raises(UsageError, match=r"--register|twice"):
        registered(words)


def test_registered_beside_the_file(tmp_path: Path):
    with pytest.raises(UsageError, match="twice"):
        read(written(tmp_path, "[models.a]\npath = 'm'"), ["a=n"])
