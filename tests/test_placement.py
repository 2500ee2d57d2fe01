"""Accelerate's YAML files, read by accelerate itself: what every process would be given."""

from pathlib import Path

import pytest

from pipeline.distributed import PRECISION
from pipeline.errors import UserError
from pipeline.placement import as_configured, launch_arguments, on_processors

FOLDER = Path("configs/accelerate")
VARIABLES = (
    *("NUM_MACHINES", "SLURM_NNODES", "MACHINE_RANK", "SLURM_NODEID", "MAIN_ADDRESS"),
    *("SLURM_LAUNCH_NODE_IPADDR", "MAIN_PORT", "SLURM_JOB_ID"),
)


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine of eight GPUs that has DeepSpeed, outside of any job."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr("accelerate.utils.is_deepspeed_available", lambda: True)
    for name in (*VARIABLES, PRECISION):
        monkeypatch.delenv(name, raising=False)


def written(folder: Path, name: str, **changes: str) -> Path:
    """A copy of one of our files with other lines."""
    text = (FOLDER / name).read_text()
    for key, value in changes.items():
        lines = [f"{key}: {value}" if line.startswith(f"{key}:") else line
                 for line in text.splitlines()]  # fmt: skip
        text = "\n".join(lines)
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize(
    ("name", "total", "expected"),
    [
        ("cpu", 2, {"ACCELERATE_USE_CPU": "1"}),
        ("one_gpu", 1, {"ACCELERATE_USE_CPU": "False"}),
        ("ddp", 2, {"ACCELERATE_MIXED_PRECISION": "no"}),
        (
            "fsdp2",
            2,
            {
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_VERSION": "2",
                "FSDP_RESHARD_AFTER_FORWARD": "true",
                "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
                "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
                "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
            },
        ),
        (
            "deepspeed_zero2",
            2,
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
        ),
        (
            "deepspeed_zero3",
            2,
            {
                "ACCELERATE_USE_DEEPSPEED": "true",
                "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
                "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
                "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
            },
        ),
    ],
)
def test_every_process_gets_what_accelerates_launcher_would_give_it(name, total, expected):
    placement = as_configured(FOLDER / f"{name}.yaml")
    assert (placement.total, placement.machines) == (total, 1)
    assert expected.items() <= placement.environment.items()
    sharded = {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"}
    assert sharded & placement.environment.keys() == sharded & expected.keys()


UNUSUAL = """
compute_environment: LOCAL_MACHINE
distributed_type: {kind}
debug: true
enable_cpu_affinity: false
mixed_precision: bf16
main_training_function: main
downcast_bf16: 'no'
num_machines: 1
num_processes: 2
gpu_ids: 0,3
dynamo_config:
  dynamo_backend: INDUCTOR
  mode: max-autotune
  dynamo_use_fullgraph: true
fsdp_config:
  version: 2
  offload_params: true
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_cpu_ram_efficient_loading: true
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
deepspeed_config:
  zero_stage: 1
  gradient_clipping: 0.5
  num_machines: 7
parallelism_config:
  parallelism_config_tp_size: 2
"""
"""Fields that `accelerate config` asks for and ours leave out, some without their section's name,
and one that this machine's place comes before."""


@pytest.mark.parametrize(
    ("kind", "expected", "absent"),
    [
        ("MULTI_GPU", {"PARALLELISM_CONFIG_TP_SIZE": "2"}, ("USE_FSDP", "USE_DEEPSPEED")),
        (
            "FSDP",
            {
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_VERSION": "2",
                "FSDP_OFFLOAD_PARAMS": "true",
                "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
                "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
                "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
                "PARALLELISM_CONFIG_TP_SIZE": "2",
            },
            ("USE_DEEPSPEED",),
        ),
        (
            "DEEPSPEED",
            {
                "ACCELERATE_USE_DEEPSPEED": "true",
                "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1",
                "ACCELERATE_GRADIENT_CLIPPING": "0.5",
                "ACCELERATE_CONFIG_DS_FIELDS": "zero_stage,gradient_clipping,num_machines",
            },
            ("USE_FSDP",),
        ),
    ],
)
def test_fields_of_accelerates_own_questions_reach_the_processes(tmp_path, kind, expected, absent):
    (tmp_path / "own.yaml").write_text(UNUSUAL.format(kind=kind))
    found = as_configured(tmp_path / "own.yaml").environment
    expected |= {"ACCELERATE_MIXED_PRECISION": "bf16", "CUDA_VISIBLE_DEVICES": "0,3"}
    expected |= {"ACCELERATE_DEBUG_MODE": "true"}
    if kind != "DEEPSPEED":  # accelerate's launcher says nothing of these there
        expected |= {
            "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
            "ACCELERATE_DYNAMO_MODE": "max-autotune",
            "ACCELERATE_DYNAMO_USE_FULLGRAPH": "True",
        }
    assert expected.items() <= found.items()
    assert not {f"ACCELERATE_{name}" for name in absent} & found.keys()


def test_a_precision_that_counts_for_nothing_is_told(tmp_path, caplog):
    as_configured(written(tmp_path, "cpu.yaml"))
    assert caplog.messages == []
    as_configured(written(tmp_path, "cpu.yaml", mixed_precision="bf16"))
    [line] = caplog.messages
    assert line.endswith(
        "cpu.yaml: mixed_precision bf16 counts for nothing: precision is a setting of the stages"
    )


def test_the_number_of_one_gpu_may_stand_without_quotes(tmp_path):
    path = tmp_path / "one.yaml"
    path.write_text((FOLDER / "one_gpu.yaml").read_text() + "gpu_ids: 3\n")
    assert as_configured(path).environment["CUDA_VISIBLE_DEVICES"] == "3"


@pytest.mark.parametrize(("threads", "expected"), [(None, "1"), ("3", None)])
def test_threads_are_those_of_the_environment_or_one(monkeypatch, threads, expected):
    monkeypatch.delenv("OMP_NUM_THREADS")
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert as_configured(FOLDER / "ddp.yaml").environment.get("OMP_NUM_THREADS") == expected


def test_the_sharding_that_accelerate_builds_of_it_is_torchs_second(monkeypatch):
    from accelerate.utils import FullyShardedDataParallelPlugin

    for name, value in as_configured(FOLDER / "fsdp2.yaml").environment.items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert not plugin.cpu_ram_efficient_loading


def test_accelerate_reads_the_stage_of_zero_from_the_file():
    for stage in (2, 3):
        path = FOLDER / f"deepspeed_zero{stage}.yaml"
        args = launch_arguments(path, total=2, place={})
        assert args.use_deepspeed
        assert not args.use_fsdp
        assert args.zero_stage == stage
        assert args.offload_optimizer_device == args.offload_param_device == "none"


def test_every_file_has_a_test_above():
    known = {"cpu", "one_gpu", "ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3", "multi_node"}
    assert {path.stem for path in FOLDER.glob("*.yaml")} == known


def test_a_machine_finds_its_place_by_what_srun_says(monkeypatch):
    for name, value in {
        "SLURM_NNODES": "3",
        "SLURM_NODEID": "2",
        "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
        "SLURM_JOB_ID": "1230042",
    }.items():
        monkeypatch.setenv(name, value)
    placement = as_configured(FOLDER / "multi_node.yaml")
    assert (placement.total, placement.here, placement.machine) == (24, 8, 2)
    given = placement.variables(5, port=placement.port)
    wanted = {"RANK": "21", "LOCAL_RANK": "5", "WORLD_SIZE": "24", "LOCAL_WORLD_SIZE": "8"}
    wanted |= {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "20042"}
    assert wanted.items() <= given.items()


def test_our_own_names_come_before_sruns(monkeypatch):
    ours = {"NUM_MACHINES": "2", "MACHINE_RANK": "1", "MAIN_ADDRESS": "a", "MAIN_PORT": "4000"}
    sruns = {"SLURM_NNODES": "3", "SLURM_NODEID": "0", "SLURM_LAUNCH_NODE_IPADDR": "b"}
    for name, value in {**ours, **sruns}.items():
        monkeypatch.setenv(name, value)
    found = as_configured(FOLDER / "multi_node.yaml", processes=6)
    assert (found.total, found.machines, found.machine) == (6, 2, 1)
    assert (found.address, found.port) == ("a", 4000)


def test_one_process_is_plain_python():
    assert on_processors(1).variables(0, port=0) == {"ACCELERATE_USE_CPU": "1"}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("ddp", {"distributed_type": "XLA"}, "distributed_type XLA is none of NO, MULTI_CPU"),
        ("ddp", {"distributed_type": "MANY"}, "accelerate cannot read it .*MANY"),
        ("ddp", {"num_processes": "9"}, r"asks for 9 GPU\(s\) on this machine, which has 8"),
        ("ddp", {"num_processes": "0"}, "0 processes cannot be divided over 1 machines"),
        ("ddp", {"mixed_precision": "odd"}, "accelerate cannot launch it .*mixed_precision"),
        ("ddp", {"gpu_ids": "3"}, "gpu_ids names one GPU, and MULTI_GPU needs two, or all"),
        ("cpu", {"use_cpu": "false"}, "distributed_type MULTI_CPU needs use_cpu: true"),
        ("cpu", {"num_processes": "99999"}, "NPROC=99999: at most"),
        ("fsdp2", {"use_cpu": "true"}, "FSDP with use_cpu: accelerate would not shard"),
        ("fsdp2", {"  fsdp_version": "1"}, "fsdp_version is 1; models are divided by 2 only, set"),
        ("multi_node", {}, "is for several machines, and MACHINE_RANK is not set. Run the same"),
    ],
)
def test_what_accelerate_cannot_do_is_told(tmp_path, name, changes, message):
    with pytest.raises(UserError, match=message):
        as_configured(written(tmp_path, f"{name}.yaml", **changes))


def test_deepspeed_divides_on_processors_too(tmp_path):
    """Told by accelerate's own variable to take processors, accelerate would leave it out."""
    found = as_configured(written(tmp_path, "deepspeed_zero2.yaml", use_cpu="true"))
    assert found.total == 2
    assert found.environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert found.environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"
    assert found.environment["ACCELERATE_USE_CPU"] == "false"


def test_deepspeed_that_is_missing_is_told(monkeypatch):
    monkeypatch.setattr("accelerate.utils.is_deepspeed_available", lambda: False)
    with pytest.raises(UserError, match="which is not installed. Run: .* -m pip install "):
        as_configured(FOLDER / "deepspeed_zero3.yaml")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NUM_MACHINES": "two"}, "NUM_MACHINES must be a whole number, got 'two'"),
        ({"MACHINE_RANK": "2"}, "machine 2 of 2; the first is number 0"),
        ({"MACHINE_RANK": "0"}, "MAIN_ADDRESS is not set"),
        ({"NUM_MACHINES": "3"}, "16 processes cannot be divided over 3 machines"),
    ],
)
def test_a_machine_that_does_not_know_its_place_is_told(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        as_configured(FOLDER / "multi_node.yaml", processes=16)
