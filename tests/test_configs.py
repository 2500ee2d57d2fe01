"""Every YAML in configs/ loads, and every recipe is complete."""

import importlib
from pathlib import Path

import pytest
import yaml

from pipeline.config import StageConfig, load

STAGES = ["data", "tokenizer", "pretrain", "sft", "reward", "ppo", "evaluate", "report"]
NOT_RECIPES = {"accelerate", "slurm"}
RECIPES = sorted(p for p in Path("configs").iterdir() if p.is_dir() and p.name not in NOT_RECIPES)
FILES = [path for recipe in RECIPES for path in sorted(recipe.glob("*.yaml"))]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_yaml_loads(path):
    stage = importlib.import_module(f"stages.{path.stem}")
    config = load(stage.Config, [f"--recipe={path.parent.name}"], stage=path.stem)
    assert isinstance(config, StageConfig)
    assert config.recipe == path.parent.name


@pytest.mark.parametrize("recipe", sorted(path.name for path in RECIPES))
def test_a_recipe_has_a_yaml_for_every_stage(recipe):
    assert {f"{stage}.yaml" for stage in STAGES} <= {
        p.name for p in Path("configs", recipe).iterdir()
    }


@pytest.mark.parametrize("path", sorted(Path("configs", "accelerate").glob("*.yaml")), ids=str)
def test_every_accelerate_yaml_is_one_that_accelerate_reads(path):
    from accelerate.commands.config.config_args import ClusterConfig

    config = ClusterConfig.from_yaml_file(str(path))
    assert config.num_processes == yaml.safe_load(path.read_text())["num_processes"] >= 1
