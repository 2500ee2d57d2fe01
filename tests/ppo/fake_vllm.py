"""What stands in vLLM's place: a server and a package with the interface of vLLM 0.31.0.

Names, arguments and answers are those of the real one, which tests/test_vllm.py runs where it is
installed; the models behind them are tiny ones of transformers, which sample by torch's own
generator.
"""

import http.server
import json
import threading
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

REQUEST = {
    "model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "min_p",
    "repetition_penalty", "presence_penalty", "frequency_penalty", "stop_token_ids", "logprobs",
    "return_token_ids",
}  # fmt: skip
"""Fields of a CompletionRequest that the server knows and that this one understands."""


@torch.no_grad()
def completion(
    model: Any, prompt: list[int], *, max_tokens: int, temperature: float, stop: list[int]
) -> tuple[list[int], list[float]]:
    """Tokens up to a stop token, which stays, and the log-probability of each."""
    ids, logprobs = list(prompt), []
    while len(ids) < len(prompt) + max_tokens:
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1].float() / temperature
        said = logits.log_softmax(dim=0)
        ids.append(int(torch.multinomial(said.exp(), 1)))
        logprobs.append(float(said[ids[-1]]))
        if ids[-1] in stop:
            break
    return ids[len(prompt) :], logprobs


class FakeServer:
    """`vllm serve` on a port of its own, with the development endpoints."""

    def __init__(self, model: Any, **config: Any) -> None:
        self.model, self.asked, self.busy = model, list[str](), False
        self.config = {"logprobs_mode": "processed_logprobs", "max_model_len": 64, **config}
        self.device = "cuda"
        fake = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(None)

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                self._answer(json.loads(self.rfile.read(length)))

            def _answer(self, body: Any) -> None:
                status, answer = fake.answer(self.path, body)
                text = b"" if answer is None else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: Any) -> None:
                """Says nothing."""

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        self.asked.append(path)
        if path == "/health":
            return 200, None
        if path == "/v1/models":
            return 200, {"data": [{"id": "tiny"}]}
        if path == "/server_info?config_format=json":
            device = {"device": self.device}
            return 200, {"vllm_config": {"model_config": self.config, "device_config": device}}
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            self.load(Path(body["kwargs"]["weights_path"]))
            return 200, {"results": [None]}
        if path == "/reset_prefix_cache":
            return 200, {"success": not self.busy}
        assert path == "/v1/completions"
        assert set(body) == REQUEST
        return self.complete(body)

    def load(self, folder: Path) -> None:
        """As DefaultModelLoader does: whatever safetensors lie in the folder."""
        (file,) = folder.glob("*.safetensors")
        self.model.load_state_dict(load_file(file), strict=True)

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        assert (body["model"], body["logprobs"], body["return_token_ids"]) == ("tiny", 0, True)
        if max(map(len, body["prompt"])) + body["max_tokens"] > self.config["max_model_len"]:
            return 400, {"error": {"message": "This model's maximum context length is 64"}}
        choices = []
        for index, prompt in enumerate(body["prompt"]):
            tokens, logprobs = completion(
                self.model,
                prompt,
                max_tokens=body["max_tokens"],
                temperature=body["temperature"],
                stop=body["stop_token_ids"],
            )
            said = {"tokens": [""] * len(tokens), "token_logprobs": logprobs}
            choices.append({"index": index, "token_ids": tokens, "logprobs": said})
        return 200, {"choices": choices[::-1]}


PACKAGE = {
    "__init__.py": """
from types import SimpleNamespace
from transformers import AutoModelForCausalLM
from tests.ppo.fake_vllm import completion
__version__ = "0.31.0"
MADE = []

class SamplingParams:
    def __init__(self, *, n, repetition_penalty, temperature, top_p, top_k, min_p, max_tokens,
                 logprobs, stop_token_ids):
        assert (n, repetition_penalty, top_p, top_k, min_p) == (1, 1.0, 1.0, 0, 0.0)
        assert logprobs == 0
        self.given = {"max_tokens": max_tokens, "temperature": temperature, "stop": stop_token_ids}

class RequestOutput:
    def __init__(self, prompt, tokens, logprobs):
        self.prompt_token_ids = prompt
        said = [{token: SimpleNamespace(logprob=logprob, rank=1)}
                for token, logprob in zip(tokens, logprobs)]
        self.outputs = [SimpleNamespace(token_ids=tuple(tokens), logprobs=said)]

class Runner:
    def __init__(self, load_weights):
        self.load_weights = load_weights

class LLM:
    def __init__(self, model, *, tensor_parallel_size, gpu_memory_utilization, max_model_len,
                 max_num_seqs, enable_sleep_mode, model_impl, distributed_executor_backend, seed,
                 max_num_batched_tokens, logprobs_mode, quantization, trust_remote_code):
        assert logprobs_mode == "processed_logprobs"
        self.config = {"max_model_len": max_model_len, "memory": gpu_memory_utilization}
        self.model = AutoModelForCausalLM.from_pretrained(model)
        self.calls = []
        runner = SimpleNamespace(model=Runner(self.load))
        worker = SimpleNamespace(model_runner=runner)
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))
        MADE.append(self)

    def load(self, weights):
        for name, weight in weights:
            self.model.get_parameter(name).data.copy_(weight)

    def generate(self, prompts, sampling_params, *, use_tqdm):
        rows = [prompt["prompt_token_ids"] for prompt in prompts]
        return [RequestOutput(row, *completion(self.model, row, **sampling_params.given))
                for row in rows]

    def reset_prefix_cache(self, reset_running_requests=False, reset_connector=False):
        self.calls.append("reset_prefix_cache")

    def sleep(self, level=1, mode="abort"):
        self.calls.append(f"sleep {level}")
        for parameter in self.model.parameters():
            parameter.data.zero_()

    def wake_up(self, tags=None):
        self.calls.append(f"wake_up {tags}")
""",
    "sampling_params.py": "class StructuredOutputsParams: ...\n",
    "utils/__init__.py": "",
    "utils/network_utils.py": "def get_ip(): ...\n",
    "distributed/__init__.py": "",
    "distributed/weight_transfer/__init__.py": "",
    "distributed/weight_transfer/nccl_common.py": "def trainer_init(init_info): ...\n",
    "distributed/weight_transfer/packed_tensor.py": (
        "def packed_nccl_broadcast_producer(iterator, group, src, post_iter_func): ...\n"
    ),
}


def write_package(folder: Path) -> None:
    """Writes a package `vllm` into a folder."""
    for name, text in PACKAGE.items():
        path = folder / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
