"""The committed notebooks: executed in order, without warnings or errors, small, and linked."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

TUTORIALS = Path(__file__).resolve().parent.parent / "tutorials"
NOTEBOOKS = sorted(TUTORIALS.glob("*.ipynb"))
LARGEST = 600_000  # bytes
LINK = re.compile(r"\]\((?!https?://)([^)#\s]+)")

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def outputs(path: Path) -> list[dict[str, Any]]:
    return [output for cell in cells(path, "code") for output in cell["outputs"]]


def test_there_are_ten_and_the_overview_lists_them():
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{i:02}" for i in range(10)]
    overview = (TUTORIALS / "README.md").read_text(encoding="utf-8")
    assert {path.name for path in NOTEBOOKS} <= set(LINK.findall(overview))


@each
def test_executed_from_top_to_bottom_in_a_fresh_kernel(path):
    counts = [cell["execution_count"] for cell in cells(path, "code")]
    assert counts == list(range(1, len(counts) + 1))
    metadata = json.loads(path.read_text(encoding="utf-8"))["metadata"]
    assert metadata["kernelspec"]["name"] == "python3"


@each
def test_no_warning_and_no_traceback(path):
    for output in outputs(path):
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr"
        assert "Warning:" not in json.dumps(output.get("text", ""))


@each
def test_has_pictures_and_is_small(path):
    assert any("image/png" in output.get("data", {}) for output in outputs(path))
    assert path.stat().st_size < LARGEST


@each
def test_names_no_folder_of_the_machine_that_ran_it(path):
    shown = [output.get("text", "") for output in outputs(path)]
    shown += [output.get("data", {}).get("text/plain", "") for output in outputs(path)]
    assert not re.search(r"(?<![\w.])/(tmp|work|root|home)/", json.dumps(shown))


@pytest.mark.parametrize("path", [*NOTEBOOKS, TUTORIALS / "README.md"], ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join("".join(cell["source"]) for cell in cells(path, "markdown"))
    for target in LINK.findall(text):
        assert (path.parent / target).exists(), target
