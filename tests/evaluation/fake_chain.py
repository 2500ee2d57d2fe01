"""A run folder up to PPO with tiny models of random weights and invented data."""

import dataclasses
import random
import shutil
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict

from pipeline.checkpoint import Artifact, begin, open_artifact
from pipeline.config import StageConfig
from pipeline.lora import ADAPTER, LoRA, merged, with_adapter, write_adapter
from pipeline.ppo.guard import BEST
from pipeline.ppo.sharing import AdaptedPolicy, SharedBase
from pipeline.reward.training import reward_model_from
from tests.evaluation.fakes import TEXT, tiny_tokenizer
from tests.ppo.worlds import disturb
from tests.reporting.fakes import CHAIN
from tests.support import tiny_llama, tiny_reward_model

STAGES = ("data", "tokenizer", "pretrain", "sft", "reward", "ppo")
TRAINED = {"row_type": "preferences", "max_length": 40, "report_gap": 0.5, "labels": "hard"}
PPO = {"max_prompt_tokens": 30, "max_response_tokens": 6}
WORDS = TEXT.split()


class ChainConfig(StageConfig):
    """Holds what `evaluate` reads of the configurations of reward and ppo."""

    hidden = 16
    """Width of the models."""

    def content(self) -> dict[str, Any]:
        return super().content() | TRAINED | PPO


class AdaptedChainConfig(ChainConfig):
    """The same of a run whose ppo trained an adapter on one base, in 4 bits or not."""

    quantise = "none"

    def content(self) -> dict[str, Any]:
        lora = dataclasses.asdict(LoRA(rank=4, alpha=8, quantise=self.quantise))
        return super().content() | {"roles": "lora", "lora": lora}


class FourBitChainConfig(AdaptedChainConfig):
    """The same in 4 bits, as wide as bitsandbytes wants it on processors."""

    hidden = 64
    quantise = "4bit"


def make_chain(
    folder: Path,
    *,
    same_policy: bool = False,
    best_policy: bool = False,
    kind_of_config: type[ChainConfig] = ChainConfig,
) -> Path:
    """Writes the folders of every stage up to ppo and returns the run folder.

    Args:
        folder: the run.
        same_policy: PPO has SFT's weights.
        best_policy: a guard chose one in ppo, which has them.
        kind_of_config: whether reward and ppo hold adapters beside merged models.
    """
    config = kind_of_config(run=str(folder), recipe="smoke", tracking="none")
    adapted = isinstance(config, AdaptedChainConfig)
    seeds = {"pretrain": 0, "sft": 1, "ppo": 1 if same_policy else 2}
    tokenizer = tiny_tokenizer()
    made: dict[str, Artifact] = {}
    for stage in STAGES:
        kind, parents = CHAIN[stage]
        with begin(
            config, stage=stage, kind=kind, parents={name: made[name] for name in parents}
        ) as run:
            if stage == "data":
                _write_data(run.path)
            elif stage == "reward" and adapted:
                _write_adapted_reward_model(run.path, base=folder / "sft")
            elif stage == "ppo" and adapted:
                _write_adapted_policy(run.path, base=folder / "sft")
            elif stage == "reward":
                tiny_reward_model(vocabulary=len(tokenizer)).save_pretrained(run.path)
            elif stage in seeds:
                model = tiny_llama(
                    vocabulary=len(tokenizer), seed=seeds[stage], hidden=config.hidden
                )
                model.save_pretrained(run.path)
            if stage == "ppo" and best_policy:
                shutil.copytree(folder / "sft", run.path / BEST)
            if stage != "data":
                tokenizer.save_pretrained(run.path)
            run.finish("tiny", chosen={}, summary={}, card="# Tiny")
        made[stage] = open_artifact(folder / stage, kind=kind)
    return folder


def _write_adapted_policy(folder: Path, *, base: Path) -> None:
    lora = LoRA(rank=4, alpha=8)
    policy = AdaptedPolicy(SharedBase(base, lora=lora, device="cpu"), adapter="policy")
    disturb(policy)
    policy.save_pretrained(folder)


def _write_adapted_reward_model(folder: Path, *, base: Path) -> None:
    fresh, model = (reward_model_from(base, pad_id=0, seed=1) for _ in range(2))
    wrapped = with_adapter(fresh, LoRA(rank=2), task="SEQ_CLS", seed=1)
    disturb(wrapped)
    weights = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    write_adapter(folder / ADAPTER, wrapped.peft_config["default"], weights, base=base)
    reward = merged(model, folder / ADAPTER)
    reward.config.reward_mean, reward.config.reward_std = 0.25, 2.0
    reward.save_pretrained(folder)


def _write_data(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    generator = random.Random(0)
    prompts = [
        {"prompt": " ".join(generator.choices(WORDS, k=4)), "group": f"chat-{row // 3}"}
        for row in range(20)
    ]
    prompts.append({"prompt": " ".join(WORDS * 4), "group": "chat-long"})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(prompts), folder / "prompts-test.parquet")
    text = pyarrow.Table.from_pylist([{"text": " ".join(WORDS * 2)}] * 30)
    pyarrow.parquet.write_table(text, folder / "text-test.parquet")
    for split in ("train", "test"):
        rows = [_ranking(generator) for _ in range(3)]
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows), folder / f"preferences-{split}.parquet"
        )


def _ranking(generator: random.Random) -> dict[str, Any]:
    ratings = [[generator.randint(-4, 4) for _ in range(5)] for _ in range(8)]
    return {
        "prompts": ["hello"],
        "set": "tweets",
        "ids": [str(i) for i in range(8)],
        "responses": [" ".join(generator.choices(WORDS, k=5)) for _ in range(8)],
        "scores": [sum(row) / 5 for row in ratings],
        "ratings": ratings,
    }
