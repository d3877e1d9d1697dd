from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.image import imread

from tests.experiments.tiny import write_log
from torchdyn_snopt.experiments.curves import read_runs
from torchdyn_snopt.experiments.figures import SPARE_STYLES, STYLES, assign_styles, draw_figures
from torchdyn_snopt.experiments.report import write_report


@pytest.fixture
def out(tmp_path):
    for seed, shift in [(0, 0.0), (1, 0.2), (2, 0.4)]:
        losses = [1.0 + shift, 0.8 + shift, 0.6 + shift, 0.4 + shift]
        write_log(tmp_path / "adam" / f"seed-{seed}", losses, label="Adam", seed=seed)
    write_log(
        tmp_path / "sgd" / "seed-0", [1.0, 0.9], optimizer="sgd", label="SGD", status="failed"
    )
    return tmp_path


def lines_of(axes):
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def test_the_curve_is_the_median_of_the_smoothed_losses_and_the_band_their_range(out):
    (axes,) = draw_figures(read_runs(out))["loss_over_iterations"].axes
    curve = lines_of(axes)["Adam"]
    np.testing.assert_allclose(curve.get_xdata(), [1, 2, 3, 4])
    np.testing.assert_allclose(curve.get_ydata(), [1.2, 1.1, 0.9, 0.7])
    (band,) = axes.collections
    edges = band.get_paths()[0].vertices
    assert edges[:, 1].min() == pytest.approx(0.5)
    assert edges[:, 1].max() == pytest.approx(1.4)


def test_a_failed_run_is_a_cross_at_its_end_and_takes_no_part_in_the_median(out):
    (axes,) = draw_figures(read_runs(out))["loss_over_iterations"].axes
    assert "SGD" not in lines_of(axes)
    (cross,) = [line for line in axes.lines if line.get_marker() == "x"]
    assert (cross.get_xdata()[0], cross.get_ydata()[0]) == (2, 0.9)


def test_axes_tell_what_they_show_and_in_what_unit(out):
    figures = draw_figures(read_runs(out))
    labels = {name: (f.axes[0].get_xlabel(), f.axes[0].get_ylabel()) for name, f in figures.items()}
    assert labels["loss_over_time"] == ("seconds of training", "training loss (mean of 2 batches)")
    assert labels["loss_over_iterations"][0] == "iteration"
    assert labels["nfe"] == ("iteration", "field evaluations per iteration")
    assert labels["test"] == ("seconds of training", "test accuracy [%]")
    assert len(figures["overview"].axes) == 4
    assert all(figure.axes[0].get_legend() is not None for figure in figures.values())


def test_field_evaluations_are_those_of_both_solves_smoothed(out):
    (axes,) = draw_figures(read_runs(out))["nfe"].axes
    np.testing.assert_allclose(lines_of(axes)["Adam"].get_ydata(), [22, 22.5, 23.5, 24.5])


def test_the_test_metric_is_in_its_unit(out):
    (axes,) = draw_figures(read_runs(out))["test"].axes
    np.testing.assert_allclose(lines_of(axes)["Adam"].get_ydata(), [75.0])


def test_an_optimizer_keeps_its_style_and_variants_of_it_differ(tmp_path):
    for label in ("Adam", "Adam lr=1", "Adam lr=2"):
        write_log(tmp_path / label / "seed-0", [1.0], label=label)
    styles = assign_styles(read_runs(tmp_path))
    assert styles["Adam"] == STYLES["adam"]
    assert len(set(styles.values())) == 3


def test_no_two_styles_share_colour_line_and_marker():
    styles = [*STYLES.values(), *SPARE_STYLES]
    assert len({style.color for style in styles}) == len(styles)
    assert len({(style.line, style.marker) for style in styles}) == len(styles)


def test_the_report_writes_pictures_that_can_be_opened(out):
    report = write_report(out)
    pictures = [path for path in report.files if path.suffix == ".png"]
    assert sorted(path.stem for path in pictures) == [
        "loss_over_iterations",
        "loss_over_time",
        "nfe",
        "overview",
        "test",
    ]
    for path in pictures:
        pixels = imread(io.BytesIO(path.read_bytes()))
        assert pixels.shape[0] > 400
        assert pixels[..., :3].std() > 0.02  # not blank
    assert (out / "table.md").read_text().startswith("# Tiny")


def test_a_folder_without_a_finished_step_makes_no_pictures(tmp_path):
    write_log(tmp_path / "adam" / "seed-0", [], status=None)
    report = write_report(tmp_path)
    assert [path.name for path in report.files] == ["table.md", "table.csv"]
