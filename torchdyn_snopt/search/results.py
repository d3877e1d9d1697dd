"""What a search has found, as plain records and as a table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial, TrialState

from torchdyn_snopt.search.arms import DEPTH_SEARCH, get_arm
from torchdyn_snopt.search.objective import HISTORY, REASON
from torchdyn_snopt.search.plan import ABANDONED, KEY, Place, places
from torchdyn_snopt.search.settings import SearchSettings

if TYPE_CHECKING:
    import pandas as pd

BEST_SHARE = 0.25  # of a depth search's trials: those whose t1 span its interval


@dataclass(frozen=True)
class TrialRecord:
    """A trial.

    Attributes:
        place: Where it stands in the plan.
        number: Optuna's.
        state: 'complete', 'pruned', 'fail', 'abandoned', 'running' or 'waiting'.
        params: What was proposed.
        history: One row per epoch, as `Progress.as_dict`.
        objective: ``error + weight·NFE`` after the last epoch of a completed trial.
        reason: Why it was not completed.
    """

    place: Place
    number: int
    state: str
    params: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    objective: float | None
    reason: str | None

    def last(self, name: str) -> float | None:
        """A figure after the last epoch.

        Args:
            name: Of a field of `Progress`.

        Returns:
            The figure; None where there was no epoch.
        """
        return None if not self.history else self.history[-1][name]

    def final(self, name: str) -> float:
        """A figure of a trial that has reported.

        Args:
            name: Of a field of `Progress`.

        Returns:
            The figure; NaN where there is none.
        """
        value = self.last(name)
        return math.nan if value is None else float(value)

    def row(self) -> dict[str, Any]:
        """Everything but the history, flat.

        Returns:
            A dictionary of plain values.
        """
        figures = ("t1", "error", "nfe", "evaluations", "seconds")
        return {
            "arm": self.place.arm,
            "seed": self.place.seed,
            "index": self.place.index,
            "number": self.number,
            "state": self.state,
            "objective": self.objective,
            **{name: self.last(name) for name in figures},
            **{f"param {name}": value for name, value in self.params.items()},
            "reason": self.reason,
        }


@dataclass(frozen=True)
class ArmSummary:
    """An arm with one seed.

    Attributes:
        arm: Its name.
        seed: Of weights and batches.
        best: The completed trial with the least objective, if there is one.
        evaluations: Field evaluations of all its trials, pruned, failed and abandoned ones too.
        seconds: Seconds of training of all its trials.
        counts: Trials by state.
        interval: Smallest and largest t1 among its best trials, for a depth search.
    """

    arm: str
    seed: int
    best: TrialRecord | None
    evaluations: int
    seconds: float
    counts: Mapping[str, int]
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Comparison:
    """The outcome of a search, as far as it has come.

    Attributes:
        settings: What determined it.
        records: Its trials, in the order of the plan; abandoned ones behind the one that counts.
        planned: The number of places.
        title: Of the problem.
    """

    settings: SearchSettings
    records: Sequence[TrialRecord]
    planned: int
    title: str = ""
    files: list[Any] = field(default_factory=list)

    @property
    def ended(self) -> int:
        """The number of places that have their result."""
        return sum(record.state in {"complete", "pruned", "fail"} for record in self.records)

    def rows(self) -> list[dict[str, Any]]:
        """The tidy table: one row per trial."""
        return [record.row() for record in self.records]

    def to_pandas(self) -> pd.DataFrame:
        """The tidy table as a data frame; needs pandas.

        Returns:
            One row per trial.
        """
        import pandas as pd

        return pd.DataFrame(self.rows())

    def of(self, arm: str, seed: int | None = None) -> list[TrialRecord]:
        """Trials of an arm.

        Args:
            arm: Its name.
            seed: Of one seed only.

        Returns:
            In the order of the plan.
        """
        return [r for r in self.records if r.place.arm == arm and seed in {None, r.place.seed}]

    def summaries(self) -> list[ArmSummary]:
        """One entry for every arm and seed that has trials."""
        pairs = [(a, s) for a in self.settings.arms for s in range(self.settings.seeds)]
        return [self.summary(arm, seed) for arm, seed in pairs if self.of(arm, seed)]

    def summary(self, arm: str, seed: int) -> ArmSummary:
        """What an arm came to with a seed.

        Args:
            arm: Its name.
            seed: The seed.

        Returns:
            The summary.
        """
        records = self.of(arm, seed)
        complete = [r for r in records if r.objective is not None]
        ranked = sorted(complete, key=lambda r: float(r.objective or 0.0))
        counts: dict[str, int] = {}
        for record in records:
            counts[record.state] = counts.get(record.state, 0) + 1
        return ArmSummary(
            arm=arm,
            seed=seed,
            best=ranked[0] if ranked else None,
            evaluations=sum(int(r.last("evaluations") or 0) for r in records),
            seconds=math.fsum(r.last("seconds") or 0.0 for r in records),
            counts=counts,
            interval=_interval(ranked) if arm in DEPTH_SEARCH else None,
        )

    def verdicts(self, search: str = "tpe") -> list[Verdict]:
        """The policy's single run against a depth search, seed by seed.

        Args:
            search: The arm that searches.

        Returns:
            One entry for every seed in which both have a result.
        """
        found = []
        for seed in range(self.settings.seeds):
            policy, depth = self.summary("policy", seed), self.summary(search, seed)
            if policy.best is not None and depth.best is not None and depth.interval is not None:
                found.append(_verdict(seed, policy, depth))
        return found

    def pareto(self) -> list[TrialRecord]:
        """Completed trials that no other one beats in both error and NFE, by NFE.

        Returns:
            Over all arms and seeds.
        """
        done = [r for r in self.records if r.state == "complete" and r.history]
        points = {id(r): (r.final("nfe"), r.final("error")) for r in done}
        front = [r for r in done if not any(_beats(points[id(o)], points[id(r)]) for o in done)]
        return sorted(front, key=lambda r: points[id(r)])


@dataclass(frozen=True)
class Verdict:
    """The policy against a depth search with one seed.

    Attributes:
        seed: The seed.
        policy_objective: Of the policy's run.
        search_objective: The best of the search.
        policy_evaluations: Cost of the run.
        search_evaluations: Cost of the search.
        policy_t1: Where the policy ended.
        interval: Of the t1 of the search's best quarter of trials.
    """

    seed: int
    policy_objective: float
    search_objective: float
    policy_evaluations: int
    search_evaluations: int
    policy_t1: float
    interval: tuple[float, float]

    @property
    def share(self) -> float:
        """The policy's cost as a share of the search's."""
        return self.policy_evaluations / self.search_evaluations

    @property
    def reached(self) -> bool:
        """Whether the policy's objective is at most the search's."""
        return self.policy_objective <= self.search_objective

    @property
    def inside(self) -> bool:
        """Whether the policy's t1 is within the search's interval."""
        return self.interval[0] <= self.policy_t1 <= self.interval[1]


def read_comparison(
    trials: Iterable[FrozenTrial], settings: SearchSettings, title: str = ""
) -> Comparison:
    """Gather what the storage says of a search.

    Args:
        trials: Of all its studies.
        settings: What determined it.
        title: Of the problem.

    Returns:
        The comparison, which need not be complete.
    """
    plan = list(places(settings))
    by_key: dict[str, list[FrozenTrial]] = {}
    for trial in trials:
        by_key.setdefault(trial.user_attrs.get(KEY, ""), []).append(trial)
    records = []
    for place in plan:
        group = [_record(place, t, settings) for t in by_key.get(place.key, [])]
        records += sorted(group, key=lambda r: r.state == "abandoned")
    return Comparison(settings, records, len(plan), title)


def _record(place: Place, trial: FrozenTrial, settings: SearchSettings) -> TrialRecord:
    attributes = trial.user_attrs
    abandoned = ABANDONED in attributes
    history = attributes.get(HISTORY, [])
    complete = trial.state is TrialState.COMPLETE and not abandoned
    objective = None
    if complete and history:
        objective = history[-1]["error"] + settings.nfe_weight * history[-1]["nfe"]
    return TrialRecord(
        place=place,
        number=trial.number,
        state="abandoned" if abandoned else trial.state.name.lower(),
        params=trial.params,
        history=history,
        objective=objective,
        reason=attributes.get(ABANDONED) or attributes.get(REASON),
    )


def _interval(ranked: Sequence[TrialRecord]) -> tuple[float, float] | None:
    best = ranked[: max(2, math.ceil(BEST_SHARE * len(ranked)))]
    times = [t1 for t1 in (record.last("t1") for record in best) if t1 is not None]
    return (min(times), max(times)) if times else None


def _verdict(seed: int, policy: ArmSummary, depth: ArmSummary) -> Verdict:
    assert policy.best is not None
    assert depth.best is not None
    assert depth.interval is not None
    return Verdict(
        seed=seed,
        policy_objective=float(policy.best.objective or 0.0),
        search_objective=float(depth.best.objective or 0.0),
        policy_evaluations=policy.evaluations,
        search_evaluations=depth.evaluations,
        policy_t1=policy.best.final("t1"),
        interval=depth.interval,
    )


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] <= other[0] and one[1] <= other[1]


# --- the table per arm ----------------------------------------------------------------------------


@dataclass(frozen=True)
class ArmTable:
    """One row per arm: medians over its seeds, and their ranges where there are several."""

    title: str
    head: list[str]
    body: list[list[str]]
    notes: list[str]

    def markdown(self) -> str:
        """As a Markdown table with its notes.

        Returns:
            Text that ends in a newline.
        """
        rule = ["---", *["---:"] * (len(self.head) - 1)]
        lines = ["| " + " | ".join(row) + " |" for row in (self.head, rule, *self.body)]
        return "\n".join([*lines, "", *[f"{note}\n" for note in self.notes]])


def arm_table(comparison: Comparison) -> ArmTable:
    """Summarize a comparison.

    Args:
        comparison: As far as it has come.

    Returns:
        The table.
    """
    summaries = comparison.summaries()
    arms = [arm for arm in comparison.settings.arms if any(s.arm == arm for s in summaries)]
    body = [_arm_row(arm, [s for s in summaries if s.arm == arm]) for arm in arms]
    weight, seeds = comparison.settings.nfe_weight, comparison.settings.seeds
    notes = [
        f"Objective: validation error + {weight:g} × field evaluations (NFE) of the forward solve, "
        "after the last epoch; the least of an arm's completed trials. Cost counts every trial, "
        "pruned, failed and abandoned ones too. Seconds are those of training.",
    ]
    if seeds > 1:
        notes.append(f"Medians over {seeds} seeds, and their range.")
    notes += [_verdict_note(comparison, arm) for arm in arms if arm in DEPTH_SEARCH]
    return ArmTable(
        f"{comparison.title}: {comparison.ended} of {comparison.planned} trials",
        ["arm", "objective", "error [%]", "NFE", "t1", "trials", "cost [evaluations]", "cost [s]"],
        body,
        [note for note in notes if note],
    )


def _arm_row(arm: str, summaries: Sequence[ArmSummary]) -> list[str]:
    best = [s.best for s in summaries if s.best is not None]
    return [
        get_arm(arm).title,
        _spread([r.objective for r in best], "{:.4f}"),
        _spread([_times(100.0, r.last("error")) for r in best], "{:.2f}"),
        _spread([r.last("nfe") for r in best], "{:.0f}"),
        _spread([r.last("t1") for r in best], "{:.3f}"),
        _counts(summaries),
        _spread([s.evaluations for s in summaries], "{:.0f}"),
        _spread([s.seconds for s in summaries], "{:.1f}"),
    ]


def _times(factor: float, value: float | None) -> float | None:
    return None if value is None else factor * value


def _spread(values: Iterable[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    middle = form.format(statistics.median(known))
    low, high = form.format(min(known)), form.format(max(known))
    return middle if low == high else f"{middle} [{low}, {high}]"


def _counts(summaries: Sequence[ArmSummary]) -> str:
    total: dict[str, int] = {}
    for summary in summaries:
        for state, count in summary.counts.items():
            total[state] = total.get(state, 0) + count
    return ", ".join(f"{count} {state}" for state, count in sorted(total.items()))


def _verdict_note(comparison: Comparison, search: str) -> str:
    verdicts = comparison.verdicts(search) if "policy" in comparison.settings.arms else []
    if not verdicts:
        return ""
    reached = sum(v.reached for v in verdicts)
    inside = sum(v.inside for v in verdicts)
    share = _spread([100.0 * v.share for v in verdicts], "{:.1f}")
    gain = _spread([v.policy_objective - v.search_objective for v in verdicts], "{:+.4f}")
    low, high = verdicts[0].interval
    spans = f" ([{low:.2f}, {high:.2f}])" if len(verdicts) == 1 else ""
    return (
        f"Policy against {get_arm(search).title}: objective {gain} of the search's best (at most "
        f"it in {reached} of {len(verdicts)} seeds) at {share} % of its field evaluations; its t1 "
        f"is within those of the search's best quarter{spans} in {inside} of {len(verdicts)}."
    )
