"""Runs a stage that samples by vLLM in its own process, on processors, which `ppo` refuses itself.

python -m pipeline.launch 2 tests.vllm_on_processors --recipe=smoke --engine.name=vllm_colocate

vLLM's build for processors packs weights for its products when they are loaded, once; here they
stay as they are on GPUs, where `load_weights` writes into what is read.
"""

import os
import sys
from typing import Any
from unittest import mock

from torch.nn import functional

import stages.ppo

PROCESSORS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
"""The environment of vLLM here: a GB of cache, every core, and no process of its own."""


def unpacked(layer: Any, **_: Any) -> None:
    """Stands for the choice of a product."""
    layer.cpu_linear = functional.linear


def main(*words: str) -> int:
    """Returns the exit code of the stage."""
    os.environ |= PROCESSORS
    from vllm.model_executor.layers import utils

    with (
        mock.patch.object(utils, "dispatch_cpu_unquantized_gemm", unpacked),
        mock.patch("pipeline.ppo.vllm_engines.check_engine_is_there"),
    ):
        code: int = stages.ppo.main(list(words))
    return code


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
