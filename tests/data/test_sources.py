"""Sources: the members of the real archives' layout, and the ledger."""

import io
import json
import tarfile
import zipfile
from collections import Counter

import pytest

from pipeline.data import sources, synthetic
from pipeline.data.packages import CHITCHAT, HUTTO, Package
from pipeline.data.ratings import FOLDER, RESOURCE, SETS, file_names


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as opened:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            opened.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def wheel_of(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as opened:
        opened.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def archives(monkeypatch):
    """The two packages' archives in their layout, filled with made-up content."""
    files = {}
    for name in SETS:
        contents = synthetic.ratings(name, texts=24, seed=1)
        for file, content in zip(file_names(name), contents, strict=True):
            files[f"{FOLDER}/{file}"] = content
    packed = {
        CHITCHAT: wheel_of(sources.CHITCHAT_FILE, synthetic.chats(conversations=3, seed=1)),
        HUTTO: tar_of({RESOURCE: tar_of(files)}),
    }

    def fetch(package: Package) -> bytes:
        return packed[package]

    monkeypatch.setattr(sources, "fetch", fetch)


def test_chats_come_out_of_the_wheel():
    raw, source = sources.chats(is_synthetic=False, conversations=1, seed=1)
    assert len(json.loads(raw)) == 3
    assert (source.version, source.sha256, source.licence) == ("0.9.0", CHITCHAT.sha256, "MIT")


def test_ratings_come_out_of_the_nested_archive():
    rated, source = sources.ratings(SETS[:2], is_synthetic=False, texts=1, seed=1)
    assert Counter(item.set for item in rated) == {SETS[0]: 24, SETS[1]: 24}
    assert (source.version, source.sha256, source.licence) == ("3.3.2", HUTTO.sha256, "MIT")


def test_ledger():
    _, source = sources.chats(is_synthetic=True, conversations=1, seed=1)
    source.count("text", split="train", num_rows=5)
    source.drop("prompts", Counter({"why": 2}))
    entry = source.as_json()
    assert entry["rows"] == {"text": {"train": 5}}
    assert entry["dropped"] == {"prompts: why": 2}
    assert set(entry) == {"origin", "version", "sha256", "licence", "rows", "dropped"}
