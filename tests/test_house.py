"""The rules of the house: direction of imports, small modules and functions, no machine's own paths, every command."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
ROOMS = ("models", "cache", "stages", "pipeline")
MODULES = [path for room in ROOMS for path in sorted((REPOSITORY / room).rglob("*.py"))]
SOURCES = [*MODULES, *sorted((REPOSITORY / "tests").rglob("*.py")), *sorted((REPOSITORY / "data").rglob("*.py"))]


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, at any depth of it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_imports_point_one_way(path: Path) -> None:
    room = path.relative_to(REPOSITORY).parts[0]
    below = ROOMS[: ROOMS.index(room) + 1]
    for name in imported(path):
        other = name.partition(".")[0]
        assert other not in ROOMS or other in below, f"{room} imports {name}"
        assert (room, other) != ("cache", "models") or name.startswith("models.spec."), f"cache imports {name}"


def test_the_check_of_imports_sees_every_form(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text("import a.b\ndef f():\n    from c import d, e as g\n    if f: import h as i\n")
    assert list(imported(path)) == ["a.b", "c.d", "c.e", "h"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_modules_and_functions_are_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
        if node.end_lineno - node.lineno + 1 > 60
    }
    assert long == {}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def tracked_texts() -> list[Path]:
    """What git tracks or would; all files where this is no checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )
    names = [name for name in listed.stdout.split("\0") if name] if not listed.returncode else []
    paths = [REPOSITORY / name for name in names] or [*SOURCES, *REPOSITORY.glob("*.*"), REPOSITORY / "Makefile"]
    return [path for path in paths if path.is_file() and path.suffix not in (".tar", ".png", ".jpg", ".gif")]


def test_no_machine_is_named() -> None:
    # Written in pieces, so that this file does not find itself. Files work on any machine.
    registry = "|".join(("file:/" + "/", "index-" + "url", "find-" + "links", "trusted-" + "host", "python" + "hosted"))
    machine = "|".join("/" + folder for folder in ("home/", "root/", "work/", "Users/", "opt/", "mnt/"))
    found = re.compile(rf"{registry}|(?<![\w.}}>])(?:{machine})")
    for path in tracked_texts():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not found.search(line), f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()}"


def test_make_lists_every_command_and_calls_only_verbs_that_exist() -> None:
    from pipeline.__main__ import VERBS

    listed = subprocess.run(["make"], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60)
    targets = {line.split()[1] for line in listed.stdout.splitlines() if line.startswith("  make ")}
    contract = """setup all stage-N cache-N plan explain status e2e freeze speedup probe report verify repair
        equivalence gc finetune export study bench test check"""
    assert targets - {"help"} == set(contract.split())
    makefile = (REPOSITORY / "Makefile").read_text()
    assert set(re.findall(r"@\$\(PERMAFROST\) (\w+)", makefile)) == set(VERBS)


def test_make_hands_its_variables_on(tmp_path: Path) -> None:
    (tmp_path / ".venv").mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((REPOSITORY / name).read_text())
    (tmp_path / ".venv" / ".ready").touch()
    variables = ["CONFIG=c.toml", "DATA=a b", "DATA_VAL=v", "RUN=r", "CACHE_ROOT=x", "SET=a=1 b=[0,3]"]
    variables.append("ARGS=3 --debug")
    call = ["make", "-s", "stage-12", "PERMAFROST=printf '<%s>'", *variables]
    shown = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60)
    want = "stage 12 --config c.toml --data a|b --data-val v --run r --cache-root x 3 --debug --set a=1 b=[0,3]"
    assert re.findall("<(.*?)>", shown.stdout) == [word.replace("|", " ") for word in want.split()]


def test_make_hands_a_study_its_name_its_hours_and_no_recipe_but_one_that_was_given(tmp_path: Path) -> None:
    (tmp_path / ".venv").mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((REPOSITORY / name).read_text())
    (tmp_path / ".venv" / ".ready").touch()
    call = ["make", "-s", "study", "PERMAFROST=printf '<%s>'", "NAME=plans", "HOURS=1.5", "DATA=a b", "SET=a=1"]
    for given, told in (([], ""), (["CONFIG=c.toml"], "--config c.toml ")):
        shown = subprocess.run([*call, *given], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60)
        want = f"study plans --hours 1.5 {told}--data a|b --set a=1"
        assert re.findall("<(.*?)>", shown.stdout) == [word.replace("|", " ") for word in want.split()]


def test_every_dependency_is_pinned_and_torch_matches_torchvision() -> None:
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lines = (REPOSITORY / "constraints.txt").read_text().split()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines)
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.split(r"[\[>=<]", name)[0] for name in wanted}
    assert names - set(pins) == set()
    major, minor, patch = (int(part) for part in pins["torch"].split("."))
    assert pins["torchvision"] == f"0.{minor + 15}.{patch}" and major == 2
