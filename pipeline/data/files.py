"""The user's own rows: a local file or a data set from the hub, in our form or a known schema."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import portable, require
from pipeline.data.adapters.reading import ADAPTERS, adapted
from pipeline.data.cleaning import has_token
from pipeline.data.formats import check_row, row_texts
from pipeline.data.local import SUFFIXES, check_file, local_rows, suffix_of
from pipeline.data.sources import Source
from pipeline.data.splits import Split
from pipeline.data.tables import Row
from pipeline.errors import UserError, first_line

HUB_FORMATS = ("arrow", "csv", "json", "parquet", "text")
"""Formats of a hub data set that hold text alone, by the names of datasets' builders."""

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class OwnRows:
    """Rows of your own in place of the recipe's, for one row type."""

    path: str = ""
    """Local file: .jsonl or .jsonl.gz (one object per line), .json (a list of objects), .csv (a
    header line) or .parquet."""
    hub: str = ""
    """Hub data set as datasets.load_dataset names it, such as owner/name, or a folder like one."""
    hub_config: str = ""
    """Configuration of the hub data set; its default one when empty."""
    hub_dir: str = ""
    """Folder inside the hub data set that is read, such as helpful-base; all of it when empty."""
    hub_split: str = "train"
    """Split of the hub data set that is read (a+b reads two); ours are made from it."""
    revision: str = ""
    """Revision of the hub data set, which must be named: a commit pins it."""
    schema: str = ""
    """What the rows look like: hh, tldr, ultrafeedback, sharegpt, alpaca or oasst, by the data sets
    that made them known (docs/own-data.md); empty: as this row type is written here."""
    languages: tuple[str, ...] = ()
    """Languages that are kept, as in [en,de], where the schema tells them (oasst); empty: all."""
    licence: str = "unknown"
    """Licence of these rows, for sources.json and the model cards."""
    split: Split = field(default_factory=Split)
    """Shares held out; rows with one `group` column (else with the same first words of the user)
    stay together, of a schema those of one document: conversation, post, prompt or tree."""

    def check(self, field: str) -> None:
        """Raises UserError, naming the field's path, for settings that do not fit together."""
        self.split.check(f"{field}.split")
        require(
            not (self.path and self.hub),
            f"{field}.path: name a file or a hub data set, not both",
        )
        require(
            not self.path or bool(suffix_of(Path(self.path))),
            f"{field}.path: must end in {', '.join(SUFFIXES)}, got {self.path!r}",
        )
        require(
            not self.hub or bool(self.revision) or Path(self.hub).is_dir(),
            f"{field}.revision: name the commit of {self.hub} that is read (a tag or a branch such "
            "as main is taken too, and may change)",
        )
        self._check_schema(field)

    def _check_schema(self, field: str) -> None:
        known = ", ".join(ADAPTERS)
        require(
            not self.schema or self.schema in ADAPTERS,
            f"{field}.schema: must be {known} or empty, got {self.schema!r}",
        )
        adapter = ADAPTERS.get(self.schema)
        require(
            adapter is None or field in adapter.gives,
            f"{field}.schema: {self.schema} holds no {field}, only "
            f"{', '.join(adapter.gives if adapter else ())}",
        )
        require(
            not self.languages or (adapter is not None and adapter.language is not None),
            f"{field}.languages: the rows do not tell their language; leave it out",
        )

    @property
    def is_given(self) -> bool:
        """Whether the user brought rows."""
        return bool(self.path or self.hub)


def own_rows(own: OwnRows, row_type: str) -> tuple[Iterator[Row], Source]:
    """Returns the checked rows and their ledger; texts that spell a special token are dropped.

    Rows are read as they are asked for; the ledger is complete when all have been.

    Raises:
        UserError: the file is missing, unreadable or empty, or a row is malformed: the message
            names file and line.
    """
    version, raw = ("", local_rows(Path(own.path))) if own.path else _hub_rows(own)
    source = Source(
        origin=portable(own.path) or f"hub: {_hub_name(own)}",
        version=version,
        sha256=file_digest(own),
        licence=own.licence,
    )
    return _checked(own, row_type, raw, source), source


def _checked(
    own: OwnRows, row_type: str, raw: Iterable[tuple[str, Any]], source: Source
) -> Iterator[Row]:
    form: dict[str, type] | None = None
    num_rows = 0
    for where, value in _in_our_form(own, row_type, raw, source.dropped):
        row = check_row(value, row_type, where=where)
        form = form or _form(row)
        _check_alike(row, form, where=where)
        if any(has_token(text) for text in row_texts(row)):
            source.dropped["a special token in the text"] += 1
        else:
            num_rows += 1
            yield row
    if not num_rows:
        reasons = ", ".join(f"{why}: {count}" for why, count in sorted(source.dropped.items()))
        why = f" (dropped: {reasons})" if reasons else ""
        raise UserError(f"{own.path or source.origin}: no {row_type} rows in it{why}")


def _in_our_form(
    own: OwnRows, row_type: str, raw: Iterable[tuple[str, Any]], dropped: Counter[str]
) -> Iterator[tuple[str, Any]]:
    if own.schema:
        yield from adapted(raw, own.schema, row_type, languages=own.languages, dropped=dropped)
    else:
        for where, value in raw:
            # An empty cell is an absent value, so that an optional column may have gaps.
            absent = isinstance(value, dict) and own.path.endswith(".csv")
            yield where, {k: v for k, v in value.items() if v is not None} if absent else value


def file_digest(own: OwnRows) -> str:
    """Returns the SHA-256 of the local file or folder, or nothing for a data set from the hub."""
    if not own.path:
        folder = Path(own.hub)
        return _folder_digest(folder) if own.hub and folder.is_dir() else ""
    check_file(Path(own.path))
    with Path(own.path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder_digest(folder: Path) -> str:
    """The digest of the names and the digests of all files in it."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(folder)}\0{digest}\n".encode())
    return total.hexdigest()


def _hub_name(own: OwnRows) -> str:
    parts = (str(portable(own.hub)), own.hub_config, own.hub_dir, own.hub_split)
    return " ".join(part for part in parts if part)


def _hub_rows(own: OwnRows) -> tuple[str, Iterator[tuple[str, Any]]]:
    """Returns the commit that was read, empty of a folder, and the rows with their places."""
    import datasets
    import yaml
    from datasets.exceptions import DatasetsError

    is_folder = Path(own.hub).is_dir()
    try:
        builder = datasets.load_dataset_builder(
            own.hub,
            own.hub_config or None,
            data_dir=own.hub_dir or None,
            revision=None if is_folder else own.revision,
        )
        _check_builder(builder, own)
        builder.download_and_prepare()
        rows = builder.as_dataset(split=own.hub_split)
    except (OSError, ValueError, RuntimeError, DatasetsError, yaml.YAMLError) as error:
        # Not found, no network, no such configuration or split, a loading script, a broken file.
        reason = first_line(error)
        raise UserError(f"cannot load the hub data set {own.hub} ({reason})") from error
    placed = ((f"{own.hub} row {number}", row) for number, row in enumerate(rows, start=1))
    return "" if is_folder else str(builder.hash), placed


def _check_builder(builder: Any, own: OwnRows) -> None:
    """Refuses files that are not rows of text, of which some kinds hold pickles; another commit."""
    require(
        builder.name in HUB_FORMATS,
        f"the hub data set {own.hub} is made of {builder.name} files; only "
        f"{', '.join(HUB_FORMATS)} are read",
    )
    # Without a network datasets takes what its cache holds, whatever revision was asked for.
    require(
        not _COMMIT.fullmatch(own.revision) or builder.hash == own.revision,
        f"the hub data set {own.hub} was found at {builder.hash}, not at the revision "
        f"{own.revision}; connect to the network once",
    )


def _check_alike(row: Row, expected: dict[str, type], *, where: str) -> None:
    """Refuses a row whose columns have other types than the first row's."""
    if "chosen" in row:
        row.setdefault("margin", None)
    given = _form(row)
    if given != expected:
        names = sorted(k for k in given.keys() | expected.keys() if given.get(k) != expected.get(k))
        raise UserError(f"{where}: {', '.join(names)} differ in form from the first row's")


def _form(row: Row) -> dict[str, type]:
    """The type of each column; of a ranking's only prompt, its own."""
    forms = {name: type(value) for name, value in row.items() if name != "margin"}
    return forms | ({"prompts": type(row["prompts"][0])} if "prompts" in row else {})
