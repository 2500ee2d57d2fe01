"""Training on Trainer: in which precision, and what becomes of an adapter at its end."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from peft import PeftModel
from transformers import Trainer

from pipeline.checkpoint import StageRun
from pipeline.fitting import add_in_float32, merge_adapter, save_merged
from pipeline.lora import LoRA, with_adapter
from pipeline.models import load_causal_lm
from tests.support import assert_close, tiny_llama

IDS = torch.tensor([[3, 4, 5, 6, 7]])


class Ended(Trainer):
    """A trainer with an adapter that has learned something, at its end."""

    def __init__(self, *, is_main: bool = True) -> None:
        self.model = with_adapter(tiny_llama(), LoRA(rank=4), task="CAUSAL_LM", seed=3).eval()
        for name, parameter in self.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        self.args = SimpleNamespace(should_save=is_main)
        self.processing_class = SimpleNamespace(save_pretrained=lambda folder: None)


class Begun(Trainer):
    """A trainer of which only the precision is asked for."""

    def __init__(self, plugin: FullyShardedDataParallelPlugin, *, bf16: bool, divides: bool):
        state = SimpleNamespace(fsdp_plugin=plugin)
        self.args = SimpleNamespace(bf16=bf16)
        self.accelerator = SimpleNamespace(is_fsdp2=divides, state=state)


class Folder(StageRun):
    """A run of which only the folder is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path


def test_gradients_of_a_model_that_accelerate_divides_are_added_in_float32():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    plugin.set_mixed_precision("bf16")  # as Trainer's Accelerator does
    for bf16, divides, output in (
        (False, True, torch.bfloat16),
        (True, False, torch.bfloat16),
        (True, True, None),
    ):
        add_in_float32(Begun(plugin, bf16=bf16, divides=divides))
        assert plugin.mixed_precision_policy.output_dtype == output
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_an_adapter_is_merged_where_its_weights_are(tmp_path):
    trainer, run = Ended(), Folder(tmp_path)
    before, weight = trainer.model(IDS).logits, trainer.model.get_base_model().lm_head.weight
    merge_adapter(trainer, run, base=tmp_path / "base", quantised=False)
    assert not isinstance(trainer.model, PeftModel)
    assert trainer.model.lm_head.weight is weight  # no second copy
    assert_close(trainer.model(IDS).logits.detach(), before.detach(), tolerance=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_an_adapter_on_four_bits_stays_and_merged_weights_are_written(tmp_path):
    trainer, run = Ended(), Folder(tmp_path)
    merge_adapter(trainer, run, base=tmp_path / "base", quantised=True)
    assert isinstance(trainer.model, PeftModel)
    loaded = []
    save_merged(trainer, tmp_path, load=lambda: loaded.append(tiny_llama()) or loaded[0])
    written = load_causal_lm(tmp_path)(IDS).logits
    assert_close(written.detach(), trainer.model(IDS).logits.detach(), tolerance=1e-4)
    assert len(loaded) == 1


def test_other_processes_than_the_main_one_load_nothing(tmp_path):
    save_merged(Ended(is_main=False), tmp_path, load=lambda: pytest.fail("loaded"))
    assert not list(tmp_path.iterdir())
