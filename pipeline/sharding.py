"""Models whose weights are divided over the processes, by torch's `fully_shard` (FSDP2).

A layer's weights are whole while it is computed, what lies around the layers (embeddings, the last
norm, the head) for the time of a pass. Every process must make the same passes in the same order;
`distributed.even_share` deals the rows so.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from pipeline.config import require
from pipeline.distributed import is_main, world_size
from pipeline.heads import logits_head
from pipeline.last_layer import as_wanted_now
from pipeline.narrow import narrow_type, only_in_products

Result = TypeVar("Result")

PRECISIONS = {
    "fp32": MixedPrecisionPolicy(),
    "bf16": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
}
"""In bf16 weights are gathered and read in bfloat16; they and their gradients stay in float32."""


class Sharded:
    """A model of which each process holds a part, called as a whole one is.

    Attributes:
        model: the model itself; its parameters are DTensors.
        config: of the model.
        device: where it computes.
    """

    def __init__(
        self, model: Any, *, device: torch.device, precision: str = "fp32", offload: bool = False
    ) -> None:
        """Divides a model, which lies on the processor until then, in place.

        Args:
            model: of Transformers.
            device: where it is to compute.
            precision: fp32, or bf16 for mixed precision.
            offload: whether weights, gradients and optimizer stay in the processor's memory, for
                models that compute on a GPU.
        """
        self.model, self.config, self.device = model, model.config, device
        self._outline = outline_of(model)
        for part in (*layers_of(model), model):
            fully_shard(
                part,
                mesh=_mesh(device.type),
                reshard_after_forward=True,
                mp_policy=PRECISIONS[precision],
                offload_policy=CPUOffloadPolicy() if offload else OffloadPolicy(),
            )
            # Gradients are added: losses are divided by the tokens of all processes already.
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)

    def __call__(self, **inputs: Any) -> Any:
        """Returns the model's output."""
        return self.model(**inputs)

    def base_model(self, **inputs: Any) -> Any:
        """Returns the body's output; for jobs of `in_one_pass`, as the heads are."""
        return self.model.base_model(**inputs)

    def get_output_embeddings(self) -> Any:
        """Returns the head of a causal LM."""
        return logits_head(self.model)

    @property
    def score(self) -> Any:
        """The head of a sequence classifier."""
        return self.model.score

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Yields the modules it is made of."""
        yield from self.model.named_children()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields this process's parts."""
        yield from self.model.named_parameters()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yields this process's parts."""
        yield from self.model.parameters()

    def save_pretrained(self, folder: Path) -> None:
        """Writes the whole model on the main process; every process must call it."""
        weights = gathered(dict(self.named_parameters()))
        if is_main():
            self._filled(weights.values()).save_pretrained(folder)

    @contextlib.contextmanager
    def whole(self) -> Iterator[Any]:
        """Yields a model like this one, whole and this process's own, and frees its weights after.

        Under autocast what only products read is gathered as they read it, in half of the bytes.
        Every process must call it; what it does with the model is its own affair.
        """
        narrow = narrow_type(self.device)
        products = only_in_products(self._outline) if narrow else set()
        pairs = zip(self._outline.parameters(), self.parameters(), strict=True)
        parts = (p.detach().to(narrow) if id(one) in products else p.detach() for one, p in pairs)
        model = self._filled(whole_tensor(part, self.device) for part in parts)
        model.to(self.device)  # buffers too
        try:
            yield model
        finally:
            for parameter in model.parameters():
                parameter.data = parameter.new_empty(0)

    def _filled(self, weights: Any) -> Any:
        """Returns a model of these weights, in the order of its parameters."""
        pairs = zip(self._outline.parameters(), weights, strict=True)
        filled = {id(empty): nn.Parameter(weight, requires_grad=False) for empty, weight in pairs}
        return copy.deepcopy(self._outline, filled)


def in_one_pass(model: Any, job: Callable[..., Result], *inputs: Any) -> Result:
    """Returns what a job makes of its inputs that calls body and heads of a model by themselves.

    A divided model's weights are gathered around a call of the whole; here the job is that call.
    What gradients are wanted of must be among the tensors that it returns, alone or in lists,
    tuples and dicts.
    """
    divided = model.model if isinstance(model, Sharded) else model
    if not is_divided(divided):
        return job(*inputs)
    divided.in_one_pass = _call
    register_fsdp_forward_method(divided, "in_one_pass")
    made: Result = divided.in_one_pass(lambda: job(*inputs))  # inputs would be cast and moved
    return made


def call_of(model: Any) -> Callable[..., Any]:
    """Returns what a job of `in_one_pass` calls to read a whole model: the gathering is done."""
    call: Callable[..., Any] = model.forward if is_divided(model) else model
    return call


def is_divided(model: Any) -> bool:
    """Returns whether `fully_shard` has divided a model, ours or Accelerate's call of it."""
    return isinstance(model, FSDPModule)


def is_in_parts(model: Any) -> bool:
    """Returns whether every pass through a model is one that all processes must make."""
    return is_divided(model) or is_partitioned(model)


def is_partitioned(model: Any) -> bool:
    """Returns whether DeepSpeed's ZeRO 3 has divided a model: each module gathers its own weights.

    Every process must make the same passes here too, and no weight is there outside its module.
    """
    return any(hasattr(weight, "ds_id") for weight in model.parameters())


def _call(job: Callable[[], Result]) -> Result:
    return job()


@contextlib.contextmanager
def whole(model: Any) -> Iterator[Any]:
    """Yields a model that this process can call by itself: of a divided one a whole copy."""
    if isinstance(model, Sharded):
        with model.whole() as copied:
            yield copied
    else:
        yield model


def save_role(model: Any, folder: Path) -> None:
    """Writes a whole model as a Hugging Face folder, on the main process; all must call it."""
    if isinstance(model, Sharded) or is_main():
        model.save_pretrained(folder)


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors whole and on the processor, on other processes than the main one nothing.

    Every process must call it. They come one after the other, so that no other process ever holds
    more than one of them.
    """
    found = {}
    for name, tensor in tensors.items():
        whole_one = whole_tensor(tensor.detach(), tensor.device)
        if is_main():
            found[name] = whole_one.cpu()
    return found


def whole_tensor(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor as it is, or out of the parts of all processes, which must all call it."""
    if not isinstance(tensor, DTensor):
        return tensor
    on_mesh: Any = tensor.to(tensor.device_mesh.device_type)
    full: Tensor = on_mesh.full_tensor()
    return full.to(device)


def whole_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns an optimizer's state as it is without division, whole on the main process.

    Every process must call it.
    """
    state = optimizer.state_dict()
    return {**state, "state": {key: gathered(moments) for key, moments in state["state"].items()}}


def load_whole_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Takes up what `whole_state` returned, each process its part."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parts = {
        key: {name: divided_as(parameters[key], tensor) for name, tensor in moments.items()}
        for key, moments in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": parts})


def divided_as(pattern: Tensor, tensor: Tensor) -> Tensor:
    """Returns this process's part of a tensor that all have, where the pattern is divided."""
    if not isinstance(pattern, DTensor) or tensor.shape != pattern.shape:
        return tensor
    mesh, placements = pattern.device_mesh, pattern.placements
    return distribute_tensor(tensor.to(mesh.device_type), mesh, placements, src_data_rank=None)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Returns the layers of a model of Transformers: what it would compute again by itself."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]


def recompute(model: nn.Module) -> None:
    """Makes a model keep the inputs of its layers alone and compute the rest again backward.

    Chen et al. 2016. Transformers' own switch works in training mode only, where there is dropout,
    and takes the cache away from generation.

    Raises:
        UserError: the model has no layers that can.
    """
    layers = layers_of(model)
    require(
        bool(layers),
        f"activation_checkpointing: {type(model).__name__} has no layers that can be computed "
        "again; set it to false",
    )
    for layer in layers:
        layer.forward = functools.partial(_checkpointed, layer.forward)


def _checkpointed(forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    call = as_wanted_now(forward)
    return checkpoint(call, *inputs, use_reentrant=False, preserve_rng_state=False, **named)


def outline_of(model: nn.Module) -> nn.Module:
    """Returns a model's copy without weights; buffers are its own."""
    empty = {
        id(p): nn.Parameter(p.to("meta"), requires_grad=p.requires_grad) for p in model.parameters()
    }
    return copy.deepcopy(model, empty)


@functools.cache
def _mesh(device_type: str) -> DeviceMesh:
    return init_device_mesh(device_type, (world_size(),))
