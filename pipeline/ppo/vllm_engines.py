"""vLLM as the engine of rollouts: on the GPUs that train, or as a server. Not yet run on GPUs.

Written against vLLM 0.31.0, the newest that TRL 1.16 takes, and run with its build for processors
(`make vllm-check`); docs/engines.md.
"""

import contextlib
import json
import math
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline import distributed
from pipeline.config import require
from pipeline.errors import UserError, first_line, told
from pipeline.ppo.engine_settings import Engine
from pipeline.ppo.rollout import ENGINE_LOGPROBS, Sampled
from pipeline.ppo.settings import Settings
from pipeline.ppo.sharing import AdaptedPolicy, whole_weights

if TYPE_CHECKING:
    from accelerate import Accelerator

PROCESSED = "processed_logprobs"
"""vLLM's name for log-probabilities after the temperature; by default it gives those before."""


def check_engine_is_there(engine: Engine) -> None:
    """Raises UserError when an engine could not start: before any model is loaded."""
    if engine.name == "vllm_server":
        Server(engine).ask("/health")
    if engine.name == "vllm_colocate":
        require(
            find_spec("vllm") is not None,
            "engine.name: vllm_colocate needs vllm, which is not installed; docs/engines.md says "
            "how, or set native",
        )
        require(
            torch.cuda.is_available(),
            "engine.name: vllm_colocate needs a GPU, and there is none; set native",
        )


def as_sampled(
    responses: list[list[int]], logprobs: list[list[float | None]], *, num_prompts: int
) -> Sampled:
    """Returns what an engine sampled; a log-probability that it could not tell becomes NaN.

    Raises:
        UserError: it is not one response per prompt, with a number for every token.
    """
    require(
        len(responses) == num_prompts and [*map(len, responses)] == [*map(len, logprobs)],
        f"engine: {num_prompts} prompts got {len(responses)} responses, or tokens without a "
        "log-probability",
    )
    numbers = [
        torch.tensor([math.nan if value is None else value for value in row]) for row in logprobs
    ]
    return Sampled(responses, {ENGINE_LOGPROBS: numbers})


class Server:
    """A vLLM server's HTTP interface."""

    def __init__(self, engine: Engine) -> None:
        self.url, self.timeout = engine.server_url.rstrip("/"), engine.timeout_seconds

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Returns the answer to a GET, or with a body to a POST.

        Raises:
            UserError: there is no answer, or one that says no.
        """
        request = urllib.request.Request(  # noqa: S310 - its scheme is checked in the settings
            self.url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:  # noqa: S310
                text = answer.read()
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            raise UserError(f"engine: {self.url}{path} answers {error.code}: {said}") from error
        except OSError as error:
            raise UserError(
                f"engine.server_url: {self.url} does not answer ({first_line(error)}); "
                "docs/engines.md says how the server is started"
            ) from error
        with self.understood():
            return json.loads(text) if text else None

    def understood(self) -> contextlib.AbstractContextManager[None]:
        """Turns what an answer of another form leads to into one line."""
        return told(f"engine.server_url: {self.url} does not answer as vLLM 0.31 does")


class ServerEngine:
    """A vLLM server with GPUs and an environment of its own.

    Weights reach it through a folder: TRL's client would send them faster, but needs vLLM in this
    environment, too, and no release of vLLM agrees with the transformers that is here.
    """

    def __init__(self, policy: Any, settings: Settings, *, eos_id: int) -> None:
        self.policy, self.settings, self.eos_id = policy, settings, eos_id
        self.server = Server(settings.engine)
        with self.server.understood():
            self.model = self.server.ask("/v1/models")["data"][0]["id"]
            config = self.server.ask("/server_info?config_format=json")["vllm_config"]
            mode, longest = (config["model_config"][k] for k in ("logprobs_mode", "max_model_len"))
            device = config["device_config"]["device"]
        require(
            mode == PROCESSED,
            f"engine: the server's log-probabilities are {mode}; start it with "
            f"--logprobs-mode {PROCESSED}",
        )
        require(
            longest >= settings.longest,
            f"engine: the server reads {longest} tokens, and prompt and response may have "
            f"{settings.longest}; start it with --max-model-len {settings.longest}",
        )
        if device == "cpu":
            check_nothing_stays_packed(policy)

    def synchronise(self) -> None:
        """Writes the weights into the folder and has the server load them."""
        if distributed.is_main():
            folder = Path(self.settings.engine.weights_dir).resolve()
            write_weights(self.policy, folder, precision=self.settings.precision)
            load = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            self.server.ask("/collective_rpc", load)
            with self.server.understood():
                idle = self.server.ask("/reset_prefix_cache", {})["success"]
            require(idle, "engine: the server is busy with requests of others")
        distributed.barrier()

    def sample(
        self, prompts: Sequence[list[int]], *, uniforms: Float[Tensor, "row position"]
    ) -> Sampled:
        """Returns one response per prompt; the server draws its own numbers."""
        body = {
            "model": self.model,
            "prompt": list(prompts),
            "max_tokens": uniforms.shape[1],
            "temperature": self.settings.temperature,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": [self.eos_id],
            "logprobs": 0,
            "return_token_ids": True,
        }
        with self.server.understood():
            choices = self.server.ask("/v1/completions", body)["choices"]
            choices = sorted(choices, key=lambda choice: choice["index"])
            responses = [choice["token_ids"] for choice in choices]
            logprobs = [choice["logprobs"]["token_logprobs"] for choice in choices]
            return as_sampled(responses, logprobs, num_prompts=len(prompts))


def check_nothing_stays_packed(policy: Any) -> None:
    """Raises UserError where vLLM 0.31 on a processor would go on with weights of the start.

    It packs output weights that are tied to the embeddings, and mixtures of experts, once.
    """
    shapes = {weight.ndim for _, weight in whole_weights(policy)}
    require(
        max(shapes) == 2 and not policy.config.tie_word_embeddings,
        "engine: vLLM on a processor does not take new output weights that are tied to the "
        "embeddings, nor new experts; serve this model from a GPU, or set native",
    )


def checkpoint_weights(policy: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields the policy's whole weights under the names of a saved model, which vLLM reads.

    In memory some models name them otherwise, and lay all experts of a layer in one tensor.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import revert_weight_conversion

    model = policy.base.model if isinstance(policy, AdaptedPolicy) else policy
    if get_model_conversion_mapping(model, add_legacy=False):
        whole = {name: weight.detach() for name, weight in whole_weights(policy)}
        yield from revert_weight_conversion(model, whole).items()
    else:
        yield from whole_weights(policy)


def write_weights(policy: Any, folder: Path, *, precision: str) -> None:
    """Writes the policy's whole weights in the precision that it is sampled in."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    weights = {name: w.detach().to("cpu", dtype) for name, w in checkpoint_weights(policy)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: weight.contiguous() for name, weight in weights.items()},
        folder / ".new",
        metadata={"format": "pt"},
    )
    (folder / ".new").replace(folder / "model.safetensors")


class WholePolicy(nn.Module):
    """The policy as TRL reads a plain model: its folder, and its whole weights by name."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy, self.name_or_path = policy, policy.config.name_or_path

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, Any]]:
        """Yields the weights, an adapter added to its base."""
        return checkpoint_weights(self.policy)


class ColocatedEngine:
    """vLLM in this process on the GPU that trains, through TRL's helper."""

    def __init__(
        self, policy: Any, settings: Settings, *, accelerator: "Accelerator", eos_id: int
    ) -> None:
        from trl.generation.vllm_generation import VLLMGeneration

        self.generation = VLLMGeneration(
            model=WholePolicy(policy),
            accelerator=accelerator,
            processing_class=None,
            mode="colocate",
            gpu_memory_utilization=settings.engine.gpu_memory_frac,
            max_model_length=settings.longest,
            enable_sleep_mode=settings.engine.sleep,
            temperature=settings.temperature,
            max_completion_length=settings.max_response_tokens,
            generation_kwargs={"stop_token_ids": [eos_id]},
        )
        worker = self.generation.llm.llm_engine.model_executor.driver_worker
        require(
            "models.transformers" not in type(worker.model_runner.model).__module__,
            f"engine.name: vLLM has no {policy.config.model_type} of its own and rebuilds the "
            "class of the models that train; set vllm_server or native",
        )

    def synchronise(self) -> None:
        """Loads the policy's weights into vLLM's model."""
        self.generation.sync_weights()

    def sample(
        self,
        prompts: Sequence[list[int]],
        *,
        uniforms: Float[Tensor, "row position"],  # noqa: ARG002 - vLLM draws its own numbers
    ) -> Sampled:
        """Returns one response per prompt of this process."""
        _, responses, logprobs, _ = self.generation.generate(list(prompts), None, 1)
        return as_sampled(
            [list(response) for response in responses],
            [[at_token[0] for at_token in row] for row in logprobs],
            num_prompts=len(prompts),
        )
