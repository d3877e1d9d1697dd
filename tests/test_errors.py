"""The exception tree: what it is a kind of, what its messages say, what survives a pickle."""

from __future__ import annotations

import copy
import pickle

import pytest

from torchdyn_snopt.errors import (
    CurvatureError,
    InvalidInputError,
    SNOptError,
    SolverError,
    UnsupportedError,
)


def underflow(**changes: object) -> SolverError:
    arguments: dict[str, object] = {
        "phase": "backward",
        "t": 0.53125,
        "dt": -1.5e-17,
        "steps": 57,
        "norms": {"x": 1234.5, "a": 0.25},
    }
    return SolverError("the step underflowed", **(arguments | changes))


EXAMPLES = {
    "plain": SNOptError("something went wrong"),
    "invalid": InvalidInputError(
        "rtol is not positive", got="rtol=0", allowed="> 0", do="pass 1e-3"
    ),
    "unsupported": UnsupportedError("the state is complex", do="stack real and imaginary part"),
    "solver": underflow(),
    "curvature": CurvatureError("not factorizable", layer="1.conv", failures=3, norms={"A": 2.0}),
}


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (InvalidInputError, ValueError),
        (UnsupportedError, NotImplementedError),
        (SolverError, RuntimeError),
        (CurvatureError, RuntimeError),
    ],
)
def test_each_error_is_caught_by_the_base_and_by_its_builtin(error, builtin):
    assert issubclass(error, SNOptError)
    assert issubclass(error, builtin)


def test_the_kinds_do_not_catch_each_other():
    kinds = (InvalidInputError, UnsupportedError, SolverError, CurvatureError)
    related = [(a, b) for a in kinds for b in kinds if a is not b and issubclass(a, b)]
    assert related == []


def test_a_message_has_its_four_parts_in_order():
    error = InvalidInputError(
        "rtol is not positive",
        do="pass rtol=1e-3",
        allowed="a finite number above 0",
        got="rtol=0",
    )
    assert str(error) == (
        "rtol is not positive\n"
        "  got: rtol=0\n"
        "  allowed: a finite number above 0\n"
        "  do this: pass rtol=1e-3"
    )


def test_parts_that_are_not_given_leave_no_trace():
    assert str(UnsupportedError("events are not supported")) == "events are not supported"
    assert str(UnsupportedError("no events", do="stop at t1")) == "no events\n  do this: stop at t1"


def test_a_solver_error_says_where_it_stopped():
    text = str(underflow())
    assert text.startswith("the backward solve failed: the step underflowed\n")
    assert "got: t=0.53125, dt=-1.5e-17, 57 steps tried; norms x=1.23e+03, a=0.25\n" in text
    assert "not finite" not in text


def test_a_solver_error_carries_what_it_prints():
    norms = {"x": 1.0}
    error = underflow(phase="forward", norms=norms)
    norms["x"] = 2.0
    assert (error.phase, error.t, error.dt, error.steps) == ("forward", 0.53125, -1.5e-17, 57)
    assert error.norms == {"x": 1.0}


def test_a_solver_error_names_the_parts_that_are_not_finite():
    norms = {"x": 3.0, "a": float("nan"), "q": float("inf")}
    assert "norms x=3, a=nan, q=inf; not finite: a, q\n" in str(underflow(norms=norms))


@pytest.mark.parametrize(
    ("phase", "first"),
    [("forward", "tolerances (rtol, atol)"), ("backward", "tolerances of the adjoint")],
)
def test_a_solver_error_advises_in_order(phase, first):
    advice = str(underflow(phase=phase)).partition("do this: ")[2]
    order = [
        advice.index(word)
        for word in (first, "float64", "smoother activation", "fixed-step", "clip")
    ]
    assert order == sorted(order)
    assert [f"({n})" in advice for n in range(1, 7)] == [True] * 5 + [False]


def test_a_solver_error_takes_its_own_allowed_and_do():
    text = str(underflow(allowed="at most 10 steps", do="raise max_steps"))
    assert text.endswith("\n  allowed: at most 10 steps\n  do this: raise max_steps")


def test_a_curvature_error_says_which_layer_and_how_often():
    error = EXAMPLES["curvature"]
    assert str(error) == "not factorizable\n  got: layer '1.conv', 3 failures in a row, norms A=2"
    assert (error.layer, error.failures, error.norms) == ("1.conv", 3, {"A": 2.0})
    assert str(CurvatureError("no layer was watched")) == "no layer was watched"


def test_a_curvature_error_puts_what_it_got_before_the_rest():
    error = CurvatureError(
        "the factor is not finite", got="alpha=0.75", layer="0", norms={"B": 1.0}
    )
    assert str(error).endswith("\n  got: alpha=0.75, layer '0', norms B=1")


@pytest.mark.parametrize(
    "twin", [copy.copy, copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))]
)
@pytest.mark.parametrize("name", EXAMPLES)
def test_copies_and_pickles_keep_everything(name, twin):
    error = EXAMPLES[name]
    other = twin(error)
    assert type(other) is type(error)
    assert str(other) == str(error)
    assert vars(other) == vars(error)


def test_attributes_set_later_survive_a_pickle_too():
    error = underflow()
    error.hint = "while training digits"
    assert pickle.loads(pickle.dumps(error)).hint == "while training digits"
