"""Secrets that tests plant, and the search for them."""

from pathlib import Path

PLANTED = {
    "WANDB_API_KEY": "PLANTEDwandbPLANTEDwandbPLANTEDwandb0000",
    "HF_TOKEN": "hf_PLANTEDhubPLANTEDhubPLANTEDhub",
    "AWS_SECRET_ACCESS_KEY": "PLANTEDawsPLANTEDaws",
    "OPENAI_API_KEY": "PLANTEDopenai",
    "OUR_DATABASE_PASSWORD": "PLANTEDdatabase",
    "GIT_TOKEN": "PLANTEDgit",
    "PLAIN": "PLANTEDplain",
}
"""Variables of the environment with their values."""
NETRC = "PLANTEDnetrcPLANTEDnetrcPLANTEDnetrc0000"
"""A password in ~/.netrc."""


def home_with_netrc(folder: Path) -> Path:
    """Returns a home folder whose .netrc holds a password of the tracker's."""
    folder.mkdir()
    file = folder / ".netrc"
    file.write_text(f"machine api.wandb.ai login user password {NETRC}\n", encoding="utf-8")
    file.chmod(0o600)
    return folder


def found_in(folder: Path) -> list[str]:
    """Returns the files that hold a planted secret, in their bytes or their names, columns too."""
    from pyarrow import parquet

    found = []
    for path in folder.rglob("*"):
        content = path.name.encode()
        if path.is_file():
            content += path.read_bytes()
        if path.suffix == ".parquet":
            content += str(parquet.read_table(path).to_pydict()).encode()
        if any(secret.encode() in content for secret in (*PLANTED.values(), NETRC, "PLANTED")):
            found.append(str(path))
    return found
