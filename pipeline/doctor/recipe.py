"""A recipe's settings of all stages, and the architecture of its models before any is here."""

import contextlib
import functools
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.borrowed import Borrowed, borrow_tokenizer
from pipeline.config import require
from pipeline.doctor.blueprint import Blueprint
from pipeline.errors import UserError, told
from pipeline.pretrained import from_pretrained
from pipeline.stepping import steps_by_cache
from pipeline.templates import read_template
from pipeline.weights import check_it_continues

PATIENCE = 3.0
"""Seconds that the hub has to answer for a model's config.json."""
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+))?")
"""A model on the hub, and the commit that is meant, if any."""
OTHERS = ("model_type", "id2label", "label2id")
"""Of a model's configuration what does not say how large it is: labels are ours."""
TOKENIZER = "tokenizer_config.json"
"""File that every tokenizer's folder has."""
PAIR = 2
"""Texts of a ranking that is a pair."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe as it stands.

    Attributes:
        name: folder below configs/.
        folder: of the run.
        configs: settings by stage.
    """

    name: str
    folder: Path
    configs: Mapping[str, Any]

    @property
    def ranking(self) -> int:
        """Texts of a row of the reward stage: those of rated sets, else a pair."""
        ratings = self.configs["data"].ratings
        return PAIR if ratings.source == "none" else int(ratings.ranking_size)

    def tokenizer(self) -> tuple[str, Borrowed] | None:
        """Returns where the run's tokenizer lies, and it; else the one that the stage would write.

        None where it is still to be trained, or to be fetched.

        Raises:
            UserError: it cannot be read, or the stage would refuse it.
        """
        from pipeline.models import load_tokenizer

        own, settings = self.folder / "tokenizer", self.configs["tokenizer"]
        if (own / TOKENIZER).is_file():
            return str(own), Borrowed(load_tokenizer(own), ())
        taken = tokenizer_folder(settings.init_from)
        if taken is None:
            return None
        drops = settings.drop_default_system
        try:
            given = read_template(settings.chat_template, recipe=self.name)
            borrowed = borrow_tokenizer(str(taken), drop_default_system=drops, given=given)
        except UserError as error:
            raise UserError(f"tokenizer: {error}") from error
        return settings.init_from, borrowed

    def origin_config(self) -> Any | None:
        """Returns the configuration of the model to start from; None where it is not reached."""
        from transformers import AutoConfig

        folder = config_folder(self.configs["pretrain"].init_from)
        if folder is None:
            return None
        with told(f"{folder}: no configuration of a model could be read there"):
            return from_pretrained(AutoConfig, folder, weights=False)

    def blueprint(self, *, packs: bool) -> Blueprint:
        """Returns what the recipe's language models are made like.

        Raises:
            UserError: nothing says it, or transformers knows no such model.
        """
        from transformers import CONFIG_MAPPING

        pretrain = self.configs["pretrain"]
        said = pretrain.architecture
        options = dict(said.options)
        if pretrain.init_from and not options:
            config = self.origin_config()
            require(
                config is not None,
                f"configs/{self.name}/pretrain.yaml: {pretrain.init_from} is not reached from "
                "here. Say in its section architecture what it is (model_type, options)",
            )
            assert config is not None
            kept = {key: value for key, value in config.to_dict().items() if key not in OTHERS}
            found = Blueprint(model_type=config.model_type, options=kept, packs=packs)
            return _checked(found, pretrain.init_from)
        require(
            said.model_type in CONFIG_MAPPING,
            f"architecture.model_type: {said.model_type!r} unknown",
        )
        if not pretrain.init_from:
            options |= {
                "vocab_size": self.vocabulary(),
                "max_position_embeddings": pretrain.context_length or pretrain.sequence_length,
            }
        found = Blueprint(model_type=said.model_type, options=options, packs=packs)
        return _checked(found, "architecture.model_type")

    def vocabulary(self) -> int:
        """Returns the tokens of the run's tokenizer, or the most that it may have."""
        file = self.folder / "tokenizer" / "tokenizer.json"
        if file.is_file():
            from pipeline.models import load_tokenizer

            return len(load_tokenizer(file.parent))
        return int(self.configs["tokenizer"].vocabulary_size)


def _checked(blueprint: Blueprint, where: str) -> Blueprint:
    """Returns a blueprint of which the stages could make a language model.

    Raises:
        UserError: they could not.
    """
    with told(f"{where}: no causal language model of {blueprint.model_type} could be made"):
        model = blueprint.of_depth(2).causal_lm()
    check_it_continues(model, where)
    require(
        steps_by_cache(model),
        f"{where}: {blueprint.model_type} keeps no cache of keys and values, and what replies take "
        "without one is not known here",
    )
    return blueprint


def tokenizer_folder(init_from: str) -> Path | None:
    """Returns the folder of a model's tokenizer on this disk, in the hub's cache too; else None."""
    if (Path(init_from or "-") / TOKENIZER).is_file():
        return Path(init_from)
    found = HUB_ID.fullmatch(init_from)
    if found is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    repository, commit = found.groups()
    known = try_to_load_from_cache(repository, TOKENIZER, revision=commit)
    return Path(known).parent if isinstance(known, str) else None


@functools.cache
def config_folder(init_from: str) -> Path | None:
    """Returns the folder with the config.json of a model; None where it is not reached.

    It may lie on this disk, in the hub's cache, or on the hub.
    """
    if (Path(init_from or "-") / "config.json").is_file():
        return Path(init_from)
    found = HUB_ID.fullmatch(init_from)
    if found is None or init_from.endswith(".gguf"):
        return None
    repository, commit = found.groups()
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    known = try_to_load_from_cache(repository, "config.json", revision=commit)
    if not isinstance(known, str) and not constants.HF_HUB_OFFLINE:
        with contextlib.suppress(OSError, ValueError):  # no network, no such model, no permission
            _knock(constants.ENDPOINT)
            known = hf_hub_download(
                repository, "config.json", revision=commit, etag_timeout=PATIENCE
            )
    return Path(known).parent if isinstance(known, str) else None


def _knock(endpoint: str) -> None:
    """Raises OSError where a server does not answer at once; the hub's client tries for minutes."""
    address = urlsplit(endpoint)
    port = address.port or (443 if address.scheme == "https" else 80)
    socket.create_connection((address.hostname or "", port), timeout=PATIENCE).close()
