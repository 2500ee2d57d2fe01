"""Configuration: one YAML file per stage plus dotted overrides, as one frozen dataclass.

The only module that knows jsonargparse.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import UserError
from pipeline.plain_settings import check_values, check_words, check_yaml
from pipeline.secrets import refuse_secrets

CIRCUMSTANCES = (
    *("recipe", "run", "num_processes", "force", "tracking", "overrides", "saving"),
    *("sharding", "activation_checkpointing"),
)
"""Fields that say where and how a stage runs; they do not change what it makes."""
TRACKERS = {"auto": "wandb", "wandb": "wandb", "trackio": "trackio", "tensorboard": "tensorboard"}
"""Libraries of the experiment trackers, by their names."""
LARGEST_SEED = 2**32 - 1
"""numpy takes no larger one."""
MOST_THREADS = 1024
"""More than any machine's cores; libraries that are asked for millions take the process down."""
LONGEST_NAME = 255
"""Bytes of a file's name."""
ROOM = 50_000_000
"""Bytes of disk; the recipe cpu's rows take 19 MB and its downloads 11, other stages' logs less."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What every stage can be told."""

    recipe: str = "cpu"
    """Recipe: the folder below configs/ whose YAML files are read."""
    run: str = ""
    """Run folder; runs/<recipe> when empty."""
    seed: int = 1
    """Seed of every random stream of the stage; each stream derives its own generator from it."""
    threads: int = 0
    """Threads of one process; 0 divides the processor's cores by the number of processes."""
    num_processes: int = 1
    """Processes that were launched; the stage refuses to run when another number is connected."""
    force: bool = False
    """Rebuild a finished folder even when it was made with other command-line settings."""
    deterministic: bool = False
    """Only algorithms that give the same bits every time; slower on GPUs, where it matters."""
    trust_remote_code: tuple[str, ...] = ()
    """Models whose own Python code may run here with your rights, each by the name it is loaded by:
    hub id, folder, or stage as in [pretrain]; none unless named. Read that code first."""
    tracking: str = "auto"
    """Experiment trackers beside metrics.jsonl, several with commas: wandb, trackio, tensorboard;
    auto: wandb, offline without a key or where its server does not answer; none."""
    overrides: tuple[str, ...] = ()
    """Command-line words that changed what the stage makes; filled by `load`, not an option."""

    @property
    def run_dir(self) -> Path:
        """Folder that holds one subfolder per stage."""
        return Path(self.run or f"runs/{self.recipe}")

    @property
    def room(self) -> int:
        """Bytes of disk that the stage takes beside weights: rows, logs, pages."""
        return ROOM

    @property
    def trackers(self) -> tuple[str, ...]:
        """Names of the trackers; none where there is to be none."""
        names = tuple(name.strip() for name in self.tracking.split(","))
        return () if names == ("none",) else names

    def folder(self, stage: str) -> Path:
        """Folder of a stage of this run."""
        return self.run_dir / stage

    def content(self) -> dict[str, Any]:
        """The settings that decide what the stage makes, as plain JSON values.

        Absolute paths are cut to their last name: machines differ in the rest, and what lies there
        is known by the digests of its files.
        """
        values = dataclasses.asdict(self)
        return {key: portable(value) for key, value in values.items() if key not in CIRCUMSTANCES}

    def outside(self, stage: str) -> dict[str, Path]:  # noqa: ARG002 - for those that have some
        """Files and folders of this disk outside the run that the stage reads, by parent's name."""
        return {}

    def __post_init__(self) -> None:
        require(self.seed >= 0, f"seed: must be at least 0, got {self.seed}")
        require(self.seed <= LARGEST_SEED, f"seed: must be at most {LARGEST_SEED}, got {self.seed}")
        require(self.threads >= 0, f"threads: must be at least 0, got {self.threads}")
        require(
            self.threads <= MOST_THREADS,
            f"threads: must be at most {MOST_THREADS}, got {self.threads}",
        )
        require(
            self.num_processes >= 1, f"num_processes: must be at least 1, got {self.num_processes}"
        )
        require(
            self.tracking == "none"
            or (set(self.trackers) <= TRACKERS.keys() and _modules_differ(self.trackers)),
            f"tracking: must be none or some of {', '.join(TRACKERS)}, got {self.tracking!r}",
        )


C = TypeVar("C", bound=StageConfig)


def portable(value: Any) -> Any:
    """Returns a setting as every machine would write it: absolute paths by their last name."""
    if isinstance(value, dict):
        return {key: portable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(portable, value))
    if isinstance(value, str) and Path(value).is_absolute():
        return Path(value).name
    return value


def _modules_differ(trackers: Sequence[str]) -> bool:
    """Whether no tracker is named twice; auto is wandb."""
    return len({TRACKERS[name] for name in trackers}) == len(trackers)


def require(condition: bool, message: str) -> None:
    """Raises UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def load(config_class: type[C], argv: Sequence[str] | None = None, *, stage: str) -> C:
    """Returns the stage's configuration: defaults, then the recipe's YAML, then the command line.

    Args:
        config_class: frozen dataclass whose field docstrings are the documentation.
        argv: command-line words after the program's name; those of sys.argv when None.
        stage: name of the stage; its YAML is configs/<recipe>/<stage>.yaml.

    Raises:
        UserError: unknown key, wrong type, value out of range, a secret, or a recipe without that
            file.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    path = Path("configs") / checked_recipe(_recipe_of(words)) / f"{stage}.yaml"
    parser = _parser(config_class, stage=stage, path=path)
    if any(word in ("-h", "--help") for word in words):
        parser.parse_args(["--help"])
    if not path.is_file():
        raise UserError(f"no configuration {path}; recipes with this stage: {_recipes(stage)}")
    check_yaml(path)
    check_words(value for _, value in _pairs(words))
    try:
        values = vars(parser.instantiate(parser.parse_args(words)))
        names = {field.name for field in dataclasses.fields(config_class)}
        settings = {key: value for key, value in values.items() if key in names}
        config = config_class(**settings, overrides=overrides(words))
        check_values(config)
        typed = {"command line": config.overrides}  # last, so that the setting's name is told
        refuse_secrets({**dataclasses.asdict(config), "overrides": (), **typed})
    except (UserError, argparse.ArgumentError, ValueError, TypeError) as error:
        raise UserError(f"{path} or command line: {_cause(error)}") from error
    return config


def overrides(argv: Sequence[str]) -> tuple[str, ...]:
    """Returns the command-line words that change what a stage makes, in canonical order."""
    pairs = _pairs(argv)
    return tuple(
        sorted(f"{key}={value}" for key, value in pairs if key.split(".")[0] not in CIRCUMSTANCES)
    )


def _pairs(argv: Sequence[str]) -> list[tuple[str, str]]:
    """Splits `--key=value`, `--key value` and `--flag` words into pairs."""
    pairs: list[tuple[str, str]] = []
    for word in argv:
        if word.startswith("--"):
            key, _, value = word[2:].partition("=")
            pairs.append((key, value))
        elif pairs:
            key, value = pairs[-1]
            pairs[-1] = (key, f"{value} {word}".strip())
    return pairs


def checked_recipe(recipe: str) -> str:
    """Returns a recipe's name.

    Raises:
        UserError: it cannot be the name of a folder below configs/.
    """
    is_name = recipe.isprintable() and "/" not in recipe and recipe not in (".", "..")
    require(
        is_name and len(recipe.encode()) <= LONGEST_NAME,
        f"recipe: must be the name of a folder below configs/, got {recipe!r}",
    )
    return recipe


def _recipe_of(words: Sequence[str]) -> str:
    recipes = [value for key, value in _pairs(words) if key == "recipe" and value]
    return recipes[-1] if recipes else "cpu"


def _recipes(stage: str) -> str:
    return ", ".join(sorted(p.parent.name for p in Path("configs").glob(f"*/{stage}.yaml"))) or "-"


def _parser(config_class: type[StageConfig], *, stage: str, path: Path) -> Any:
    import jsonargparse

    class Formatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """Leaves the lines of the stage's docstring as they are."""

    jsonargparse.set_parsing_settings(
        docstring_parse_attribute_docstrings=True,
        # A recipe holds values. By default `class_path: a.module.Class` in one would import the
        # module, and in a field of type Any make the object.
        import_path_denylist=["*"],
        import_path_allowlist=["pipeline", "stages"],
        instantiate_subclass_spec_in_any=False,
    )
    parser = jsonargparse.ArgumentParser(
        prog=f"python -m stages.{stage}",
        description=(sys.modules[config_class.__module__].__doc__ or "").strip(),
        formatter_class=Formatter,
        exit_on_error=False,
        default_env=False,
        default_config_files=[str(path)] if path.is_file() else [],
    )
    parser.add_class_arguments(config_class, None, skip={"overrides"})
    return parser


def _cause(error: BaseException) -> str:
    """The message of the UserError behind a parser's error, or the parser's own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    return str(error)
