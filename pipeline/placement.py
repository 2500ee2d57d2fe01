"""Where the processes of a program run: on this machine's processors, or as accelerate's YAML says.

The only module that knows how Accelerate launches. Its YAML cannot read the environment, so what
differs from machine to machine is read here, by our own names or by those that `srun` sets.
"""

import argparse
import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.distributed import USE_CPU, num_cores
from pipeline.errors import UserError, installing, told
from pipeline.plain_settings import check_yaml

log = logging.getLogger(__name__)

MACHINES = ("NUM_MACHINES", "SLURM_NNODES")
MACHINE = ("MACHINE_RANK", "SLURM_NODEID")
ADDRESS = ("MAIN_ADDRESS", "SLURM_LAUNCH_NODE_IPADDR")
PORT = "MAIN_PORT"
JOB = "SLURM_JOB_ID"
FIRST_PORT, PORTS = 20_000, 10_000
"""Ports of jobs that name none; two jobs on one machine get different ones by their numbers."""
MOST_PER_CORE = 16
"""Processes that a core is asked to share; more would only take the machine's memory."""
SUPPORTED = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP", "DEEPSPEED")
PREFIXED = ("fsdp_config", "fp8_config", "dynamo_config")
"""Sections of accelerate's YAML whose entries may leave out the section's name."""
LEFT_OPEN = {"gpu_ids": "all", "mixed_precision": "no", "dynamo_backend": "no"}
"""What accelerate's launcher takes where neither its YAML nor a word says."""

FSDP = {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
"""What stages need of FSDP whatever its YAML says: points that are read whole, and weights that
every process loads itself, where Transformers would leave those of the others empty."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The processes of a program, and those of them that this machine starts.

    Attributes:
        total: processes on all machines.
        machine: this machine's number, from 0.
        machines: how many there are.
        address: where the first machine is reached; the loopback when there is only one.
        port: where the processes meet; 0 leaves it to the system.
        environment: variables that every process gets.
    """

    total: int
    machine: int = 0
    machines: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    environment: Mapping[str, str]

    @property
    def here(self) -> int:
        """Processes of this machine."""
        return self.total // self.machines

    def variables(self, local: int, *, port: int) -> dict[str, str]:
        """Returns what torch reads in the environment of this machine's process of a number."""
        if self.total == 1:
            return dict(self.environment)
        return {
            **self.environment,
            "RANK": str(self.machine * self.here + local),
            "LOCAL_RANK": str(local),
            "WORLD_SIZE": str(self.total),
            "LOCAL_WORLD_SIZE": str(self.here),
            "GROUP_RANK": str(self.machine),
            "GROUP_WORLD_SIZE": str(self.machines),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": str(self.machines == 1),
        }


def on_processors(processes: int) -> Placement:
    """Returns so many processes on the processors of this machine.

    Raises:
        UserError: they are too many for its cores.
    """
    if processes > (most := MOST_PER_CORE * num_cores()):
        raise UserError(f"NPROC={processes}: at most {most} processes on this machine's cores")
    return Placement(total=processes, environment={USE_CPU: "1"})


def as_configured(path: Path, *, processes: int = 0) -> Placement:
    """Returns the processes that accelerate's YAML describes.

    Args:
        path: the YAML.
        processes: on all machines; 0 for as many a machine as the YAML says.

    Raises:
        UserError: the YAML asks for what accelerate cannot read, what is not here, or what
            accelerate would silently do otherwise; or a machine does not know its place.
    """
    from accelerate.commands.config.config_args import load_config_from_file

    check_yaml(path, may_be_empty=False)
    with told(f"{path}: accelerate cannot read it"):
        config = load_config_from_file(str(path))
        kind = str(getattr(config.distributed_type, "value", config.distributed_type))
        machines = int(config.num_machines)
        each = int(config.num_processes) // machines
        precision = str(getattr(config, "mixed_precision", None) or "no")
    if precision != "no":
        log.warning(
            "%s: mixed_precision %s counts for nothing: precision is a setting of the stages",
            path,
            precision,
        )
    if kind not in SUPPORTED:
        raise UserError(f"{path}: distributed_type {kind} is none of {', '.join(SUPPORTED)}")
    if machines > 1:
        machines = _number(MACHINES, path=path, default=str(machines))
    total = processes or each * machines
    if total < 1 or total % machines:
        raise UserError(f"{path}: {total} processes cannot be divided over {machines} machines")
    place = _place(machines, path=path)
    if config.use_cpu:
        return _processors(path, kind=kind, total=total, place=place)
    _refuse_missing(path, kind=kind, here=total // machines)
    return Placement(total=total, environment=_variables(path, total=total, place=place), **place)


def _place(machines: int, *, path: Path) -> dict[str, Any]:
    """Returns this machine's number, how many there are, and where they meet."""
    if machines == 1:
        return {}
    machine = _number(MACHINE, path=path)
    if machine >= machines:
        raise UserError(f"{path}: machine {machine} of {machines}; the first is number 0")
    port = FIRST_PORT + int(os.environ.get(JOB, "0")) % PORTS
    return {
        "machine": machine,
        "machines": machines,
        "address": _variable(ADDRESS, path=path),
        "port": _number((PORT,), path=path, default=str(port)),
    }


def _variable(names: tuple[str, ...], *, path: Path, default: str = "") -> str:
    """Returns the first of these variables that is set."""
    value = next((os.environ[name] for name in names if os.environ.get(name)), default)
    if not value:
        raise UserError(
            f"{path} is for several machines, and {names[0]} is not set. Run the same command on "
            f"each under srun, or set {MACHINES[0]}, {MACHINE[0]}, {ADDRESS[0]} and {PORT}"
        )
    return value


def _number(names: tuple[str, ...], *, path: Path, default: str = "") -> int:
    value = _variable(names, path=path, default=default)
    if not value.isdecimal():
        raise UserError(f"{path}: {names[0]} must be a whole number, got {value!r}")
    return int(value)


def _processors(path: Path, *, kind: str, total: int, place: dict[str, Any]) -> Placement:
    """Returns connected processes on processors; accelerate's own launcher would start one."""
    if kind == "FSDP":
        raise UserError(
            f"{path}: {kind} with use_cpu: accelerate would not shard, it does so on GPUs only"
        )
    environment = on_processors(total // place.get("machines", 1)).environment
    if kind == "DEEPSPEED":
        _refuse_without_deepspeed(path)
        environment = _variables(path, total=total, place=place) | {USE_CPU: "false"}
    return Placement(total=total, environment=environment, **place)


def _refuse_without_deepspeed(path: Path) -> None:
    from accelerate.utils import is_deepspeed_available

    if not is_deepspeed_available():
        raise UserError(
            f"{path} asks for DeepSpeed, which is not installed. Run: "
            f"{installing('deepspeed')}; or use configs/accelerate/fsdp2.yaml for GPUs, which "
            "needs torch alone"
        )


def _refuse_missing(path: Path, *, kind: str, here: int) -> None:
    import torch

    if kind == "DEEPSPEED":
        _refuse_without_deepspeed(path)
    if kind == "MULTI_CPU":
        raise UserError(f"{path}: distributed_type MULTI_CPU needs use_cpu: true")
    if (gpus := torch.cuda.device_count()) < here:
        fewer = f"Say NPROC={gpus} or less, or use" if gpus else "Use"
        raise UserError(
            f"{path} asks for {here} GPU(s) on this machine, which has {gpus}. {fewer} "
            "configs/accelerate/cpu.yaml"
        )


def _variables(path: Path, *, total: int, place: dict[str, Any]) -> dict[str, str]:
    """Returns what accelerate's launcher would put into the environment of a process."""
    from accelerate.utils import check_cuda_p2p_ib_support
    from accelerate.utils.launch import (
        prepare_deepspeed_cmd_env,
        prepare_multi_gpu_env,
        prepare_simple_launcher_cmd_env,
    )

    with told(f"{path}: accelerate cannot launch it"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a port that is chosen here
        args = launch_arguments(path, total=total, place=place)
        if args.use_deepspeed:
            _, found = prepare_deepspeed_cmd_env(args)
        elif args.use_fsdp or args.multi_gpu:
            found = prepare_multi_gpu_env(args) | (FSDP if args.use_fsdp else {})
        else:
            _, found = prepare_simple_launcher_cmd_env(args)
    changed = {name: value for name, value in found.items() if os.environ.get(name) != value}
    if not check_cuda_p2p_ib_support():  # as accelerate's launcher does for these GPUs
        changed |= {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}
    return changed


def launch_arguments(path: Path, *, total: int, place: dict[str, Any]) -> argparse.Namespace:
    """Returns accelerate's launch arguments: those of its YAML, and this machine's place.

    Raises:
        UserError: several processes are to share one GPU, or FSDP is not the second.
    """
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(path))
    words = [f"--config_file={path}", f"--num_processes={total}"]
    words += [f"--num_machines={place.get('machines', 1)}"]
    words += [f"--machine_rank={place.get('machine', 0)}"]
    words += [f"--main_process_port={place.get('port', 0)}"]
    words += [f"--main_process_ip={place['address']}"] if place else []
    args = launch_command_parser().parse_args([*words, "--module", "stages"], _sections(config))
    for name, value in [*vars(config).items(), *LEFT_OPEN.items()]:
        if getattr(args, name, None) is None and not isinstance(value, dict):
            setattr(args, name, value)
    args.gpu_ids = str(args.gpu_ids)
    one = args.gpu_ids != "all" and "," not in args.gpu_ids
    if one and args.multi_gpu and args.num_machines == 1:
        raise UserError(f"{path}: gpu_ids names one GPU, and MULTI_GPU needs two, or all")
    if args.use_fsdp and (version := str(args.fsdp_version)) != "2":
        raise UserError(f"{path}: fsdp_version is {version}; models are divided by 2 only, set it")
    return args


def _sections(config: Any) -> argparse.Namespace:
    """Returns what stands in the sections of accelerate's YAML, by the names of its launcher.

    The command line comes before it, and it before the launcher's defaults.
    """
    kind = config.distributed_type
    sections = {name: value for name, value in vars(config).items() if isinstance(value, dict)}
    entries = {
        _entry(section, key): value
        for section, content in sections.items()
        for key, value in content.items()
    }
    return argparse.Namespace(
        **entries,
        use_deepspeed=kind == "DEEPSPEED",
        use_fsdp=kind == "FSDP",
        multi_gpu=kind == "MULTI_GPU",
        use_parallelism_config=config.parallelism_config != {},
        num_cpu_threads_per_process=os.environ.get("OMP_NUM_THREADS", "1"),
        deepspeed_fields_from_accelerate_config=",".join(config.deepspeed_config),
    )


def _entry(section: str, key: str) -> str:
    """Returns a section's entry as an argument: `version` of fsdp_config is fsdp_version."""
    prefix = section.removesuffix("config")
    return prefix + key if section in PREFIXED and not key.startswith(prefix) else key
