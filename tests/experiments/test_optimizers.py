from __future__ import annotations

import pytest
import torch

from tests.experiments.tiny import TINY, build_model
from torchdyn_snopt import SNOpt
from torchdyn_snopt.errors import InvalidInputError
from torchdyn_snopt.experiments.optimizers import OptimizerSpec, parse_spec, parse_specs


def test_a_list_of_names_is_read_in_order_and_without_repetitions():
    specs = parse_specs(["snopt,adam", "sgd,adam"])
    assert [spec.name for spec in specs] == ["snopt", "adam", "sgd"]


def test_settings_are_read_as_numbers_truth_values_and_words():
    spec = parse_spec("snopt:lr=1e-2:update_freq=5:maximize=false:preconditioner=kfac:kl_clip=none")
    assert spec.chosen == {
        "lr": 0.01,
        "update_freq": 5,
        "maximize": False,
        "preconditioner": "kfac",
        "kl_clip": None,
    }


def test_a_learning_rate_goes_to_those_that_name_none():
    specs = parse_specs(["adam,sgd:lr=0.5"], lr=0.25)
    assert [spec.chosen["lr"] for spec in specs] == [0.25, 0.5]


def test_chosen_settings_go_before_the_tasks_and_those_before_the_rows():
    assert OptimizerSpec("sgd").settings(TINY) == {"momentum": 0.9, "lr": 0.1}
    assert OptimizerSpec("sgd", {"momentum": 0.5}).settings(TINY) == {"momentum": 0.5, "lr": 0.1}


def test_labels_and_folders_tell_settings_apart():
    plain, tuned = parse_specs(["adam,adam:lr=3e-3:sensitivity=adjoint"])
    assert (plain.label, plain.slug) == ("Adam", "adam")
    assert tuned.label == "Adam lr=0.003 sensitivity=adjoint"
    assert tuned.slug == "adam-lr-0.003-sensitivity-adjoint"
    assert tuned.sensitivity == "adjoint"
    assert "sensitivity" not in tuned.settings(TINY)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adam", torch.optim.Adam),
        ("adamw", torch.optim.AdamW),
        ("sgd", torch.optim.SGD),
        ("snopt", SNOpt),
        ("snopt-paper", SNOpt),
    ],
)
def test_every_row_builds_its_optimizer(name, kind):
    optimizer = OptimizerSpec(name, {"lr": 0.125}).build(build_model(), TINY)
    assert type(optimizer) is kind
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_the_papers_optimizer_has_the_papers_settings():
    group = OptimizerSpec("snopt-paper", {"lr": 0.1}).build(build_model(), TINY).param_groups[0]
    chosen = {key: group[key] for key in ("preconditioner", "damping", "update_freq", "alpha")}
    assert chosen == {
        "preconditioner": "ekfac",
        "damping": 0.05,
        "update_freq": 100,
        "alpha": 0.75,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adagrad", r"(?s)no such optimizer.*'adagrad'.*snopt, snopt-paper, adam, adamw, sgd"),
        ("adam:lr", r"(?s)cannot be read.*'lr' in 'adam:lr'"),
        ("adam:=3", r"(?s)cannot be read.*'=3'"),
        ("adam:rate=1", r"(?s)adam has no such setting.*got: rate.*sensitivity, lr, betas"),
        ("snopt:rate=1", r"(?s)snopt has no such setting.*got: rate"),
        ("", "no optimizer is named"),
        (" , ", "no optimizer is named"),
    ],
)
def test_what_cannot_be_read_is_answered_with_what_can(text, message):
    with pytest.raises(InvalidInputError, match=message):
        parse_specs([text])
