"""The models of an evaluation, whole or on one base, and the reward model as it reads text."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.attention import pack
from pipeline.checkpoint import Artifact
from pipeline.config import require
from pipeline.evaluation.judge import Policies, Prompts
from pipeline.lora import ADAPTER, LoRA, quantisation, with_trained_adapter
from pipeline.models import (
    load_causal_lm,
    load_reward_model,
    load_tokenizer,
    load_with_new_head,
    take_constants,
)
from pipeline.parallel import choose_workers
from pipeline.ppo.guard import BEST
from pipeline.ppo.scorers import Scorer, model_scorer
from pipeline.ppo.sharing import AdaptedPolicy, SharedBase
from pipeline.ppo.sources import reading_of
from pipeline.pretrained import from_pretrained
from pipeline.reward.reading import Reading, Words

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def read_tokenizers(
    parents: Mapping[str, Artifact],
) -> "tuple[PreTrainedTokenizerFast, Reading]":
    """Returns the language models' tokenizer, and how the reward model reads text.

    Raises:
        UserError: language models of different vocabularies, or a reward model of another one that
            was not meant to have it.
    """
    tokenizer = load_tokenizer(parents["sft"].path)
    for name in ("pretrain", "ppo"):
        theirs = load_tokenizer(parents[name].path)
        require(
            theirs.get_vocab() == tokenizer.get_vocab(),
            f"{parents[name].path} has another tokenizer than {parents['sft'].path}; "
            "models of one run must share it",
        )
    return tokenizer, reading_of(parents["reward"], tokenizer=tokenizer)


def base_of(ppo: Artifact, reward: Artifact) -> LoRA:
    """Returns the settings of the adapter that PPO trained on the base it shared.

    Raises:
        UserError: there is no such adapter, or none of the reward model, or the base was in 4 bits
            and cannot be here.
    """
    roles = ppo.config.get("roles", "separate")
    require(
        roles == "lora",
        f"on_one_base: {ppo.path} was trained with roles {roles}, not lora. Set it to false",
    )
    require(
        (reward.path / ADAPTER).is_dir(),
        f"on_one_base: there is no {reward.path / ADAPTER}. Set it to false",
    )
    saved = ppo.config["lora"]
    lora = LoRA(**{**saved, "targets": tuple(saved["targets"])})
    quantisation(lora.quantise, setting="on_one_base", otherwise="false")
    return lora


def policy_of(ppo: Artifact, *, wanted: str) -> Path:
    """Returns the folder of one of ppo's policies.

    Args:
        ppo: the stage's folder.
        wanted: last, best, or auto for the best where a guard chose one.

    Raises:
        UserError: there is no best one.
    """
    best = ppo.path / BEST
    require(
        wanted != "best" or best.is_dir(),
        f"policy: there is no {best}, which a guard chooses. Run ppo with --guard.every=1, or set "
        "it to last",
    )
    return best if wanted != "last" and best.is_dir() else ppo.path


@dataclass(frozen=True, kw_only=True)
class Loader:
    """Loads the models of an evaluation and keeps none.

    Attributes:
        parents: folders of the run.
        policy: folder of the aligned model.
        device: where models go.
        lora: of the policy's adapter, where SFT, PPO and the reward model are read as adapters on
            one base; None reads the merged models that their folders hold.
    """

    parents: Mapping[str, Artifact]
    policy: Path
    device: Any
    lora: LoRA | None = None

    @property
    def quantisation(self) -> Any | None:
        """What transformers needs to load the base in 4 bits, where it was."""
        return quantisation(self.lora.quantise) if self.lora else None

    def policies(self, tokenizer: "PreTrainedTokenizerFast") -> Policies:
        """Returns SFT and PPO."""
        sft, ppo = self._folder("sft"), self.policy
        if self.lora is None:
            return Policies(sft=self._reader(sft), ppo=self._reader(ppo), tokenizer=tokenizer)
        base = SharedBase(sft, lora=self.lora, device=self.device)
        base.take("policy", ppo / ADAPTER)
        return Policies(
            sft=AdaptedPolicy(base, adapter=None),
            ppo=AdaptedPolicy(base, adapter="policy"),
            tokenizer=tokenizer,
            on_one_base=True,
        )

    def pretrained(self) -> "PreTrainedModel":
        """Returns the pretrained model."""
        return self._reader(self._folder("pretrain"))

    def reward_model(self) -> "PreTrainedModel":
        """Returns the reward model: as it was saved, or its adapter on the SFT model's body."""
        source = self._folder("reward")
        if self.lora is None:
            return load_reward_model(source).to(self.device)
        from transformers import AutoConfig

        saved = from_pretrained(AutoConfig, source, weights=False)
        model = load_with_new_head(
            self._folder("sft"), pad_id=saved.pad_token_id, quantisation=self.quantisation
        )
        with_trained_adapter(model, source / ADAPTER)
        take_constants(model, saved)
        return model.to(self.device)

    def _folder(self, stage: str) -> Path:
        return self.parents[stage].path

    def _reader(self, folder: Path) -> "PreTrainedModel":
        """Returns a causal LM that reads rows end to end where it can."""
        model = load_causal_lm(folder, quantisation=self.quantisation).to(self.device)
        pack(model)
        return model


def scorer_by(
    reward: "PreTrainedModel",
    prompts: Prompts,
    *,
    reading: Reading,
    tokenizer: "PreTrainedTokenizerFast",
    batch_size: int,
) -> Scorer:
    """Returns what scores rows in the policies' tokens by the reward model."""
    return model_scorer(
        reward,
        reading,
        words=Words.behind(prompts.tokens, prompts.messages, tokenizer=tokenizer),
        name="reward",
        batch_size=batch_size,
        workers=choose_workers(0, reward.device),
    )
