from __future__ import annotations

import math

import pytest

from torchdyn_snopt.errors import InvalidInputError
from torchdyn_snopt.experiments.runlog import RunLog, read_log


def test_what_is_written_is_there_at_once_and_read_back(tmp_path):
    path = tmp_path / "log.jsonl"
    with RunLog(path) as log:
        log.write("header", label="x")
        log.write("step", loss=0.5, nested={"a": [1, 2]})
        assert list(read_log(path)) == [
            {"kind": "header", "label": "x"},
            {"kind": "step", "loss": 0.5, "nested": {"a": [1, 2]}},
        ]
        assert log.size == path.stat().st_size


def test_numbers_that_json_does_not_know_become_null(tmp_path):
    path = tmp_path / "log.jsonl"
    with RunLog(path) as log:
        log.write("step", loss=math.nan, more=[math.inf, {"x": -math.inf}, 1.0])
    assert list(read_log(path)) == [
        {"kind": "step", "loss": None, "more": [None, {"x": None}, 1.0]}
    ]


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"kind": "step", "loss": 1.0}\n{"kind": "step", "lo')
    assert [record["loss"] for record in read_log(path)] == [1.0]


@pytest.mark.parametrize("line", [b"no json\n", b"[1]\n", b'{"loss": 1.0}\n'])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"kind": "step"}\n' + line)
    with pytest.raises(InvalidInputError, match=r"log\.jsonl, line 2"):
        list(read_log(path))


def test_going_on_drops_what_came_after_the_kept_part(tmp_path):
    path = tmp_path / "log.jsonl"
    with RunLog(path) as log:
        log.write("step", iteration=1)
        kept = log.size
        log.write("step", iteration=2)
    with RunLog(path, keep_bytes=kept) as log:
        log.write("step", iteration=3)
    assert [record["iteration"] for record in read_log(path)] == [1, 3]


def test_a_log_shorter_than_its_checkpoint_says_is_refused(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"short\n")
    with pytest.raises(InvalidInputError, match=r"(?s)6 bytes.*at least 7 bytes"):
        RunLog(path, keep_bytes=7)
    assert path.read_bytes() == b"short\n"
