"""Metadata, README and the check script agree with each other and with the package."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import torchdyn_snopt

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(torchdyn_snopt.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")

# Where the name of a module is not that of its distribution.
DISTRIBUTIONS = {"sklearn": "scikit-learn", "yaml": "pyyaml"}

# Rooms that may use what only an extra installs; every other one lives on the core dependencies.
ROOMS_WITH_EXTRAS = {"experiments", "search", "cli"}


def normalized(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def requirement_names(requirements: list[str]) -> set[str]:
    return {normalized(re.match(r"[\w.-]+", line).group()) for line in requirements}


def readme_command(name: str) -> list[str]:
    """The lines of the shell block that follows `<!-- command: name -->`."""
    blocks = re.findall(rf"<!-- command: {name} -->\n```sh\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 1
    return blocks[0].splitlines()


def readme_names() -> set[str]:
    """The names in the first column of the README's table of public names."""
    table = README.split("The public names:", 1)[1].split("\n\n", 2)[1]
    rows = [line.split("|")[1] for line in table.splitlines()[2:]]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def third_party_imports(path: Path) -> Iterator[str]:
    """Top-level names that a file imports, lazily or not, from outside itself and the language."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        for name in (name.partition(".")[0] for name in names):
            if name not in sys.stdlib_module_names | {"torchdyn_snopt"}:
                yield name


# --- one version, one licence ---------------------------------------------------------------------


def test_the_version_is_the_same_everywhere():
    version = importlib.metadata.version("torchdyn-snopt")
    assert PYPROJECT["project"]["version"] == version
    assert str(CITATION["version"]) == version
    assert torchdyn_snopt.__version__ == version


def test_the_changelog_leads_to_this_version():
    headings = re.findall(r"^## \[(.+?)\]", CHANGELOG, flags=re.MULTILINE)
    assert headings[0] in {"Unreleased", PYPROJECT["project"]["version"]}


def test_the_licence_is_the_same_everywhere():
    assert PYPROJECT["project"]["license"] == CITATION["license"] == "Apache-2.0"
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence
    assert "Version 2.0" in licence


def test_the_citation_prefers_the_paper():
    paper = CITATION["preferred-citation"]
    assert paper["title"] == "Second-Order Neural ODE Optimizer"
    assert [author["family-names"] for author in paper["authors"]] == ["Liu", "Chen", "Theodorou"]
    assert paper["title"] in README.replace("{ODE}", "ODE")


# --- README ---------------------------------------------------------------------------------------


def test_the_readme_has_two_set_up_commands_of_one_line():
    assert re.findall(r"<!-- command: (\w+) -->", README) == ["main", "test"]
    (main,), (test,) = readme_command("main"), readme_command("test")
    assert main.endswith("&& torchdyn-snopt search digits")
    assert test.endswith("&& python -m pytest")


def test_the_check_script_runs_the_command_of_the_readme():
    done = subprocess.run(
        ["bash", ROOT / ".ci" / "run", "--list"], capture_output=True, text=True, check=True
    )
    steps = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert [steps["tests"]] == readme_command("test")


@pytest.mark.parametrize("name", ["main", "test"])
def test_the_extras_that_the_readme_installs_exist(name):
    (extra,) = re.findall(r"\.\[(\w+)\]", readme_command(name)[0])
    assert extra in PYPROJECT["project"]["optional-dependencies"]


def test_the_readme_names_every_public_name_and_no_other():
    assert readme_names() == set(torchdyn_snopt.__all__) - {"__version__"}


def test_every_file_that_the_readme_links_to_exists():
    targets = re.findall(r"\]\((?!https?:|#)([^)]+)\)", README)
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_program_in_the_readme_trains():
    (program,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    losses = []
    scope: dict[str, object] = {"__name__": "readme"}
    program = program.replace("    loss.backward()\n", "    loss.backward(); log(loss.item())\n")
    exec(compile(program, "README.md", "exec"), scope | {"log": losses.append})
    assert len(losses) == 60
    assert losses[-1] < 0.5 * losses[0]


# --- what the package offers and imports ----------------------------------------------------------


def test_every_public_name_has_a_docstring_of_its_own():
    bare = [
        name
        for name in torchdyn_snopt.__all__
        if not name.startswith("__") and not inspect.getdoc(getattr(torchdyn_snopt, name))
    ]
    assert bare == []


def test_the_package_is_marked_as_typed():
    assert (PACKAGE / "py.typed").is_file()


def test_every_import_is_declared():
    """No room leans on a package that only a dependency happens to bring along."""
    project = PYPROJECT["project"]
    core = requirement_names(project["dependencies"])
    extras = core.union(*map(requirement_names, project["optional-dependencies"].values()))
    undeclared = {}
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        declared = extras if room in ROOMS_WITH_EXTRAS else core
        imported = {normalized(DISTRIBUTIONS.get(n, n)) for n in third_party_imports(path)}
        if missing := imported - declared:
            undeclared[str(path.relative_to(PACKAGE))] = sorted(missing)
    assert undeclared == {}


def test_a_bare_import_loads_nothing_beyond_the_host():
    """What is not needed to train a model is loaded when it is used."""
    program = (
        "import sys, torchdyn.core, torchdyn.numerics, torchdyn.models, torchdiffeq\n"
        "before = set(sys.modules)\n"
        "import torchdyn_snopt\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(new - sys.stdlib_module_names))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) <= {"torchdyn_snopt", "torch", "torchdyn", "torchdiffeq"}


def test_the_command_is_installed():
    entries = importlib.metadata.entry_points(group="console_scripts", name="torchdyn-snopt")
    assert [entry.value for entry in entries] == ["torchdyn_snopt.cli:app"]
    assert callable(next(iter(entries)).load())
