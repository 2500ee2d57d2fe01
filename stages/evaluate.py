r"""Holds PPO against SFT on prompts that no stage has seen, or generates in bulk.

Reads   runs/<recipe>/{data,pretrain,sft,reward,ppo}; of the data the test split, and only here.
Writes  runs/<recipe>/evaluate: results.json (every figure with its interval, best-of-n, the
        alignment tax, the reward-model report) and samples.jsonl (the replies of both policies side
        by side).
Run     make evaluate RECIPE=cpu

In bulk, from any causal language model and without a run folder:
        python -m stages.evaluate --generate.model=FOLDER --generate.prompts=FILE \
            --generate.output=FILE.jsonl
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.checkpoint import Artifact, begin, open_artifact
from pipeline.command import command
from pipeline.config import StageConfig, require
from pipeline.data.tables import stage_rows
from pipeline.distributed import gather_objects, is_main, rank, setup, to_be_divided, world_size
from pipeline.evaluation.targets import RUN_TARGETS, TARGETS
from pipeline.manifest import mending_command
from pipeline.spacing import evenly_spaced
from pipeline.storage import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from pipeline.evaluation.judge import Policies, Prompts, Said
    from pipeline.evaluation.loading import Loader
    from pipeline.evaluation.records import Record
    from pipeline.evaluation.sampling import Sampling
    from pipeline.reward.reading import Reading

log = logging.getLogger(__name__)

PARENTS = {
    "data": "dataset",
    "pretrain": "causal-lm",
    "sft": "causal-lm",
    "reward": "reward",
    "ppo": "causal-lm",
}

FEWEST_DRAWS = 100
"""Resamples whose 2.5% and 97.5% are ends of an interval at all: of one, both are that one."""
POLICIES = ("auto", "last", "best")


@dataclass(frozen=True, kw_only=True)
class BestOf:
    """Best-of-n of the SFT model by the reward model, the control of PPO."""

    sizes: list[int] = field(default_factory=lambda: [2, 4, 8, 16])
    """The n that are measured, ascending; empty for none."""
    num_prompts: int = 0
    """Prompts it is measured on, evenly spaced over the evaluation's; 0 for all of them."""

    def __post_init__(self) -> None:
        ascending = self.sizes == sorted(set(self.sizes)) and all(n >= 2 for n in self.sizes)
        require(ascending, f"best_of.sizes: must be ascending numbers from 2 on, got {self.sizes}")
        require(
            self.num_prompts >= 0,
            f"best_of.num_prompts: must be at least 0, got {self.num_prompts}",
        )


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Generation in bulk; it needs no run folder and evaluates nothing."""

    model: str = ""
    """Folder of a causal language model; empty evaluates the run instead."""
    prompts: str = ""
    """File of prompts: .jsonl rows with `prompt` (text or messages), or text with one a line."""
    output: str = ""
    """File that receives one JSON row per prompt: prompt, response, ended."""
    temperature: float = 1.0
    """Divides the logits."""
    max_response_tokens: int = 64
    """Length limit of every reply, EOS included."""

    def __post_init__(self) -> None:
        together = {"model": self.model, "prompts": self.prompts, "output": self.output}
        missing = [name for name, value in together.items() if not value]
        require(
            len(missing) in (0, len(together)),
            f"generate.{missing[0] if missing else ''}: needed beside the other two of generate.*",
        )
        require(
            self.temperature > 0, f"generate.temperature: must be above 0, got {self.temperature}"
        )
        require(
            self.max_response_tokens >= 1,
            f"generate.max_response_tokens: must be at least 1, got {self.max_response_tokens}",
        )


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Evaluation of a run."""

    num_prompts: int = 500
    """Test prompts, evenly spaced over the split; every policy gets the same."""
    batch_size: int = 128
    """Prompts or replies of one forward pass."""
    bootstrap_samples: int = 2000
    """Resamples of conversations behind every 95% interval."""
    text_rows: int = 128
    """Rows of held-out text on which the alignment tax is measured."""
    policy: str = "auto"
    """Which of ppo's policies: last; best (the one that a guard chose on validation, in ppo/best);
    auto: the best where there is one."""
    on_one_base: bool = False
    """Read SFT, PPO and the reward model as ppo with roles lora held them: adapters on one frozen
    base, in 4 bits where its lora.quantise says so; then the pretrained model is too. It takes less
    memory; from the merged models that the folders hold they differ by rounding."""
    best_of: BestOf = field(default_factory=BestOf)
    """Control: best-of-n of SFT."""
    targets: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)
    """Ranges that the report holds the run against, by figure: [low, high], null for no bound.
    Figures not named keep the cpu recipe's."""
    generate: Generate = field(default_factory=Generate)
    """Generation in bulk instead of an evaluation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {
            "num_prompts": 1,
            "batch_size": 1,
            "text_rows": 1,
            "bootstrap_samples": FEWEST_DRAWS,
        }
        for name, number in least.items():
            value = getattr(self, name)
            require(value >= number, f"{name}: must be at least {number}, got {value}")
        require(
            self.policy in POLICIES,
            f"policy: must be one of {', '.join(POLICIES)}, got {self.policy!r}",
        )
        require(
            self.best_of.num_prompts <= self.num_prompts,
            f"best_of.num_prompts: must be at most num_prompts {self.num_prompts}, "
            f"got {self.best_of.num_prompts}",
        )

        known = [target.name for target in TARGETS + RUN_TARGETS]
        for name, (low, high) in self.targets.items():
            require(name in known, f"targets: must be among {', '.join(known)}; got {name!r}")
            require(
                (low, high) != (None, None) and (low is None or high is None or low <= high),
                f"targets.{name}: must be [low, high] with one of them null at most, low first, "
                f"got [{low}, {high}]",
            )

    @property
    def draw_rows(self) -> frozenset[int]:
        """Numbers of the prompts that best-of-n is measured on."""
        count = self.best_of.num_prompts or self.num_prompts
        return frozenset(evenly_spaced(self.num_prompts, count))


def held_out_prompts(parents: Mapping[str, Artifact], *, num_prompts: int) -> tuple["Prompts", int]:
    """Returns test prompts, evenly spaced over the split, and how many were too long to count.

    As in training, prompts of more than PPO's max_prompt_tokens are left out.

    Raises:
        UserError: no test prompts, or fewer than asked for.
    """
    from pipeline.evaluation.judge import Prompts
    from pipeline.evaluation.prompt_files import prompt_text
    from pipeline.models import load_tokenizer
    from pipeline.tokenizer import encode_prompt

    path = parents["data"].path / "prompts-test.parquet"
    require(
        path.is_file(),
        f"{path} does not exist: the data stage put no prompts there. Bring more "
        f"(docs/own-data.md), then run: {mending_command(path.parent)} FORCE=1",
    )
    rows = list(stage_rows(path, "prompts"))
    tokenizer, longest = load_tokenizer(parents["sft"].path), parents["ppo"].config
    pairs = [(row, encode_prompt(tokenizer, row["prompt"])) for row in rows]
    usable = [pair for pair in pairs if len(pair[1]) <= longest["max_prompt_tokens"]]
    require(
        len(usable) >= num_prompts,
        f"num_prompts: {path} holds only {len(usable)} prompts of at most "
        f"{longest['max_prompt_tokens']} tokens, {num_prompts} asked for",
    )
    chosen = [usable[index] for index in evenly_spaced(len(usable), num_prompts)]
    prompts = Prompts(
        rows=list(range(num_prompts)),
        texts=[prompt_text(row["prompt"]) for row, _ in chosen],
        groups=[row["group"] for row, _ in chosen],
        tokens=[tokens for _, tokens in chosen],
        messages=[row["prompt"] for row, _ in chosen],
    )
    return prompts, len(rows) - len(usable)


def hear(
    models: "Loader",
    prompts: "Prompts",
    config: Config,
    *,
    sampling: "Sampling",
    tokenizer: "PreTrainedTokenizerFast",
) -> "tuple[Said, dict[str, float] | None]":
    """Returns what both policies say to this process's prompts, and the alignment tax."""
    from pipeline.evaluation.judge import converse

    policies = models.policies(tokenizer)
    said = converse(
        policies,
        prompts=prompts.only(range(rank(), len(prompts.rows), world_size())),
        sampling=sampling,
        draws=max(config.best_of.sizes, default=0),
        draw_rows=config.draw_rows,
    )
    return said, measure_tax(policies, models.parents, config)


def measure(
    models: "Loader", prompts: "Prompts", config: Config
) -> "tuple[list[Record], dict[str, Any]]":
    """Returns the records of all processes in the order of the prompts, and what else was measured.

    Models are loaded one after the other, PPO's beside SFT's.
    """
    from pipeline.evaluation.judge import batching_of, judged, surprises
    from pipeline.evaluation.loading import read_tokenizers, scorer_by
    from pipeline.evaluation.sampling import Sampling
    from pipeline.parallel import choose_workers

    parents = models.parents
    tokenizer, reading = read_tokenizers(parents)
    sampling = Sampling(
        seed=config.seed,
        max_response_tokens=parents["ppo"].config["max_response_tokens"],
        batch_size=config.batch_size,
        workers=choose_workers(0, models.device),
    )
    said, tax = hear(models, prompts, config, sampling=sampling, tokenizer=tokenizer)
    pretrain = models.pretrained()
    nll = surprises(pretrain, said, batching=batching_of(tokenizer, sampling))
    del pretrain
    reward = models.reward_model()
    scorer = scorer_by(
        reward, prompts, reading=reading, tokenizer=tokenizer, batch_size=config.batch_size
    )
    shares = gather_objects(judged(said, nll=nll, scorer=scorer))
    records = sorted((record for share in shares for record in share), key=lambda one: one.row)
    report = report_on_ratings(reward, parents, reading=reading, seed=config.seed)
    return records, {"reward_model": report, "alignment_tax": tax}


def report_on_ratings(
    reward: "PreTrainedModel",
    parents: Mapping[str, Artifact],
    *,
    reading: "Reading",
    seed: int,
) -> dict[str, Any]:
    """Returns the reward model's report on the test texts, as it was trained to read them."""
    from pipeline.reward.held_out import Trained, held_out_report

    return held_out_report(
        reward,
        reading=reading,
        data=parents["data"].path,
        split="test",
        trained=Trained.of(parents["reward"].config),
        seed=seed,
    )


def measure_tax(
    policies: "Policies", parents: Mapping[str, Artifact], config: Config
) -> dict[str, float] | None:
    """Returns the alignment tax on the test text, in rows as long as PPO's longest."""
    from pipeline.evaluation.alignment_tax import alignment_tax

    longest = parents["ppo"].config
    return alignment_tax(
        policies.sft,
        policies.ppo,
        text=parents["data"].path / "text-test.parquet",
        tokenizer=policies.tokenizer,
        length=longest["max_prompt_tokens"] + longest["max_response_tokens"],
        num_rows=config.text_rows,
    )


def generate_in_bulk(config: Config, *, device: Any) -> None:
    """Writes one reply for every prompt of a file."""
    from pipeline.evaluation.prompt_files import check_output, read_prompts, write_replies
    from pipeline.evaluation.sampling import Sampling, load_any, reply_to_all
    from pipeline.parallel import choose_workers

    wanted = config.generate
    prompts = read_prompts(Path(wanted.prompts))
    check_output(Path(wanted.output), prompts=Path(wanted.prompts))
    model, tokenizer = load_any(wanted.model)
    mine = range(rank(), len(prompts), world_size())
    replies = reply_to_all(
        model.to(device),
        tokenizer=tokenizer,
        prompts=[prompts[row] for row in mine],
        rows=list(mine),
        sampling=Sampling(
            seed=config.seed,
            max_response_tokens=wanted.max_response_tokens,
            temperature=wanted.temperature,
            batch_size=config.batch_size,
            workers=choose_workers(0, device),
        ),
    )
    found = {
        row: reply
        for part in gather_objects(dict(zip(mine, replies, strict=True)))
        for row, reply in part.items()
    }
    if is_main():
        rows = [
            {"prompt": prompt, "response": found[row].text, "ended": found[row].ended}
            for row, prompt in enumerate(prompts)
        ]
        write_replies(Path(wanted.output), rows)
        log.info("evaluate: %d replies -> %s", len(rows), wanted.output)


def run(config: Config) -> None:
    """Measures both policies and writes the report folder, or generates in bulk."""
    accelerator = setup(config, divides="stage")
    if to_be_divided() and is_main():
        log.info("evaluate: models are whole on every process, whatever ACCELERATE_CONFIG divides")
    if config.generate.model:
        generate_in_bulk(config, device=accelerator.device)
        return
    from pipeline.evaluation.loading import Loader, base_of, policy_of

    parents = {
        name: open_artifact(config.folder(name), kind=kind) for name, kind in PARENTS.items()
    }
    prompts, num_left_out = held_out_prompts(parents, num_prompts=config.num_prompts)
    lora = base_of(parents["ppo"], parents["reward"]) if config.on_one_base else None
    policy = policy_of(parents["ppo"], wanted=config.policy)
    with begin(config, stage="evaluate", kind="report", parents=parents) as stage:
        from pipeline.evaluation.comparison import compare
        from pipeline.evaluation.markdown import headline, results_markdown
        from pipeline.evaluation.targets import figures

        models = Loader(parents=parents, policy=policy, device=accelerator.device, lora=lora)
        records, measured = measure(models, prompts, config)
        results = compare(
            records,
            sizes=config.best_of.sizes,
            bootstrap_samples=config.bootstrap_samples,
            seed=config.seed,
        )
        results |= {
            **measured,
            "max_response_tokens": parents["ppo"].config["max_response_tokens"],
            "policy": "last" if policy == parents["ppo"].path else "best",
            "targets": config.targets,
            "prompts_left_out": num_left_out,
            **({"on_one_base": lora.quantise} if lora else {}),
        }
        flat = figures(results)
        stage.log(0, {f"evaluate/{name}": value for name, value in flat.items()})
        stage.log_samples(0, [dataclasses.asdict(record) for record in records])
        if stage.is_main:
            write_json(stage.path / "results.json", results)
        stage.finish(headline(flat), chosen={}, summary=flat, card=results_markdown(results))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of the command line."""
    return command(Config, run, argv, stage="evaluate")


if __name__ == "__main__":
    raise SystemExit(main())
