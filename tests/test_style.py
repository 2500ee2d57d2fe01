"""The house rules that a linter cannot hold: sizes, order, imports, and README's commands."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from statistics import median, quantiles

import pytest

SOURCES = sorted([*Path("pipeline").rglob("*.py"), *Path("stages").glob("*.py")])
TESTS = sorted(Path("tests").rglob("*.py"))
STAGES = ["data", "tokenizer", "pretrain", "sft", "reward", "ppo", "evaluate", "report"]
STAGES += ["reward_guard"]
FORMULAS = ["advantages", "losses", "kl", "rewards", "correction"]
HEAVY = {"torch", "transformers", "trl", "datasets", "sklearn", "matplotlib", "accelerate", "wandb"}


def functions(paths: list[Path]) -> dict[str, int]:
    """Lines of every function, by place."""
    return {
        f"{path}:{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }


def imported(path: Path) -> set[str]:
    """Full names of everything a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_functions_are_short():
    sizes = functions(SOURCES)
    assert not {place: size for place, size in sizes.items() if size > 60}
    assert median(sizes.values()) <= 12
    assert quantiles(sizes.values(), n=10)[-1] <= 45


def test_files_are_short():
    sizes = {str(path): path.read_text().count("\n") for path in SOURCES + TESTS}
    assert not {place: size for place, size in sizes.items() if size > 400}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_mathematics_of_ppo_imports_torch_and_nothing_else(name):
    allowed = {"torch", "jaxtyping", "math", "dataclasses", "typing", "collections"}
    roots = {n.split(".")[0] for n in imported(Path("pipeline", "ppo", f"{name}.py"))}
    others = imported(Path("pipeline", "ppo", f"{name}.py"))
    foreign = {n for n in others if n.startswith("pipeline") and not n.startswith("pipeline.ppo")}
    assert roots - {"pipeline"} <= allowed
    assert not foreign


def test_nothing_imports_what_trl_calls_experimental():
    assert not [path for path in SOURCES if any("trl.experimental" in n for n in imported(path))]


@pytest.mark.parametrize("stage", [*STAGES, "lineage", "dashboard", "doctor"])
def test_every_stage_reads_in_the_same_order(stage):
    tree = ast.parse(Path("stages", f"{stage}.py").read_text())
    names = [n.name for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)]
    words = ast.get_docstring(tree) or ""
    assert f"make {stage}" in words or f"stages.{stage}" in words
    assert names.index("Config") < names.index("run") < names.index("main")
    assert names[-2:] == ["run", "main"]


@pytest.mark.parametrize("stage", STAGES)
def test_help_lists_every_field_and_loads_nothing_heavy(stage):
    program = (
        "import sys\n"
        f"from stages.{stage} import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        f"print('loaded:', sorted(set(sys.modules) & {HEAVY!r}))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "loaded: []" in result.stdout
    for field in ("--recipe", "--run", "--seed", "--force"):
        assert field in result.stdout
    assert "Seed of every random stream" in result.stdout


def commands_in(text: str) -> list[str]:
    """The `make` command lines of a document's code blocks, without their comments."""
    blocks = text.split("```")[1::2]
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("make")]


def test_the_commands_of_the_documents_exist():
    makefile = Path("Makefile").read_text()
    targets = set(re.findall(r"^([a-z_-]+):", makefile, re.MULTILINE)) | set(STAGES)
    variables = set(re.findall(r"^([A-Z_]+) =", makefile, re.MULTILINE))
    documents = [Path("README.md"), Path("CONTRIBUTING.md"), *Path("docs").glob("*.md")]
    lines = [line for path in documents for line in commands_in(path.read_text())]
    assert len(lines) > 5
    for line in lines:
        words = re.sub(r"\"[^\"]*\"", "", line).split()[1:]
        assert {w.partition("=")[0] for w in words if "=" in w} <= variables, line
        assert {w for w in words if "=" not in w} <= targets, line


def test_no_file_names_the_machine_it_was_written_on():
    places = re.compile(r"/(?:tmp|work|root|home)/[a-z]")
    documents = [Path("README.md"), Path("Makefile"), Path("constraints.txt")]
    shipped = [*SOURCES, *Path("configs").rglob("*.yaml"), *Path("docs").rglob("*.md"), *documents]
    assert not [path for path in shipped if places.search(path.read_text())]


def test_the_documents_link_to_what_exists():
    for path in [Path("README.md"), Path("CONTRIBUTING.md"), *Path("docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path} links to {target}"
