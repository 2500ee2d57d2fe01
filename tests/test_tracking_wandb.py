"""The real wandb, without network: where it finds a key, when it goes offline, how runs go on.

In processes of their own, for wandb reads the environment once and keeps what it read.
"""

import json
import struct
import subprocess
import sys
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

from tests.support import at_home

KEY = "0123456789" * 4
OURS = "machine wandb.example.org:8080\n login user\n password " + KEY
BEFORE = "machine api.wandb.ai\n login user\n password " + KEY
NOW = "machine api.forge.coreweave.com\n login user\n password " + KEY
SERVER = "https://wandb.example.org:8080/"
PLACES = [
    ({}, {}, False),
    ({"WANDB_API_KEY": KEY}, {}, True),
    ({"WANDB_IDENTITY_TOKEN_FILE": "token"}, {}, True),
    ({}, {".netrc": BEFORE}, True),
    ({}, {".netrc": NOW}, True),
    ({}, {".netrc": OURS}, False),
    ({}, {".netrc": "machine api.wandb.ai\n login user"}, False),
    ({}, {".netrc": "machine"}, False),
    ({"NETRC": "~/mine"}, {"mine": BEFORE}, True),
    ({"NETRC": "~/mine"}, {".netrc": BEFORE}, False),
    ({"WANDB_BASE_URL": SERVER}, {".netrc": OURS}, True),
    ({"WANDB_BASE_URL": SERVER}, {".netrc": BEFORE}, False),
    ({"WANDB_BASE_URL": "https://api.wandb.ai"}, {".netrc": BEFORE}, True),
    ({"WANDB_BASE_URL": "https://api.wandb.ai"}, {".netrc": NOW}, False),
    ({}, {".netrc": OURS, ".config/wandb/settings": f"[default]\nbase_url = {SERVER}"}, True),
    ({}, {".netrc": OURS, "wandb/settings": f"[default]\nbase_url = {SERVER}"}, True),
    ({"WANDB_CONFIG_DIR": "~/c"}, {"c/settings": f"[default]\napi_key = {KEY}"}, True),
]
"""Variables, files of the home folder, and whether wandb finds a key there."""

ASKED = """
import json, os, sys
import wandb
from wandb.sdk import wandb_setup
from wandb.sdk.lib import wbauth
from pipeline.trackers import key_is_configured

outer, found = dict(os.environ), []
for home, variables in json.load(sys.stdin):
    os.environ.clear()
    os.environ.update(outer | variables | {"HOME": home})
    os.chdir(home)
    ours = key_is_configured()
    host = wandb_setup.singleton().settings.base_url
    theirs = wbauth.authenticate_session(host=host, source="", prompt=False, update_session=False)
    found.append([ours, theirs is not None])
    wandb.teardown()
print(json.dumps(found))
"""

SESSION = """
import logging, sys
from pipeline import distributed
from pipeline.checkpoint import begin
from pipeline.config import StageConfig

logging.basicConfig(level="INFO", format="%(message)s")
config = StageConfig()
distributed.setup(config)
with begin(config, stage="sft", kind="causal-lm", parents={}) as run:
    run.total_steps = 4
    point = run.latest_point()
    for step in range(point[0] + 1 if point else 1, 5):
        run.log(step, {"train/loss": float(step)})
        if step == 2:
            run.save_point(step, lambda path: (path / "a").write_text("a"))
        if str(step) in sys.argv[1:]:
            sys.exit("killed")
    run.finish("done", chosen={}, summary={"loss": {"last": 0.5}}, card="")
"""
"""A stage that saves at step 2 and, where it is told to, dies after a step."""


def records(path: Path) -> list[Record]:
    """What a run's file holds: LevelDB's log, pieces with 7 bytes before each in blocks of 32 KiB.

    The 7 bytes are a checksum, the length and the kind: whole, first, middle or last.
    """
    data, found, begun, place = path.read_bytes(), [], b"", 7
    while place < len(data):
        if (left := 2**15 - place % 2**15) < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        begun += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            found.append(Record.FromString(begun))
            begun = b""
    return found


def steps(sent: list[Record]) -> list[int]:
    """The steps whose loss was sent."""
    rows = [{i.key or i.nested_key[0]: i.value_json for i in one.history.item} for one in sent]
    return [int(row["step"]) for row in rows if "train/loss" in row]


def test_a_key_is_found_where_wandb_finds_one(tmp_path):
    asked = []
    for number, (variables, files, _) in enumerate(PLACES):
        home = tmp_path / str(number)
        for name, text in files.items():
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_text(text)
        home.mkdir(exist_ok=True)
        asked.append((str(home), variables))
    done = at_home(sys.executable, "-c", ASKED, folder=tmp_path, input=json.dumps(asked))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[found, found] for *_, found in PLACES]


def test_an_address_that_is_none_is_told_in_one_line(tmp_path):
    program = "from pipeline.trackers import key_is_configured; key_is_configured()"
    done = at_home(
        sys.executable, "-c", program, folder=tmp_path, variables={"WANDB_BASE_URL": "my server"}
    )
    assert "UserError: WANDB_BASE_URL is no address of a server (" in done.stderr.splitlines()[-1]


def test_a_server_that_does_not_answer_leaves_the_run_offline(tmp_path):
    closed = {"WANDB_BASE_URL": "http://127.0.0.1:1", "WANDB_API_KEY": KEY}
    done = at_home(
        sys.executable,
        "-c",
        SESSION,
        folder=tmp_path,
        variables=closed | {"WANDB_INIT_TIMEOUT": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "it goes on offline" in done.stderr
    assert "wandb was offline; to upload this run: " in done.stderr
    assert "wandb sync runs/cpu/wandb/*-" in done.stderr
    [file] = (tmp_path / "runs" / "cpu" / "wandb").glob("offline-run-*/*.wandb")
    assert steps(records(file)) == [1, 2, 3, 4]


def test_a_run_that_goes_on_is_the_same_run_of_wandb(tmp_path):
    killed = at_home(sys.executable, "-c", SESSION, "3", folder=tmp_path)
    assert killed.stderr.endswith("killed\n")
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nmode = offline")  # by `wandb offline`
    done = at_home(sys.executable, "-c", SESSION, folder=tmp_path, variables={"WANDB_API_KEY": KEY})
    assert done.returncode == 0, done.stderr

    files = sorted((tmp_path / "runs" / "cpu" / "wandb").glob("offline-run-*/*.wandb"))
    sent = [records(file) for file in files]
    assert [steps(each) for each in sent] == [[1, 2, 3], [4]]
    first, second = (next(one.run for one in each if one.HasField("run")) for each in sent)
    assert first.run_id == second.run_id
    assert first.resume is second.resume is True
    assert (second.display_name, second.run_group) == (first.display_name, first.run_group)
    assert [path.name for path in files[1].parent.glob("files/manifest.json")] == ["manifest.json"]

    said = [line for line in done.stderr.splitlines() if "to upload this run: " in line]
    command = said[0].split("to upload this run: ")[1]
    dry = ["sh", "-c", command.replace(" sync ", " sync --dry-run ")]
    told = subprocess.run(dry, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "Would sync 2 run(s)" in told.stdout + told.stderr
