"""What the gate makes of its figures: one check after the other, each passed or not, each with a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from models.golden import MINIMUM_DICE
from models.manifest import Precision
from service.governance_rules import GateRules

_NAMED = 5  # figures that a sentence names at most


@dataclass(frozen=True)
class Check:
    """One thing that a version must show."""

    name: str
    passed: bool
    sentence: str

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "passed": self.passed, "sentence": self.sentence}


@dataclass(frozen=True)
class CaseFigures:
    """How one version did on one case. Without ``dice`` it gave no result: ``sentence`` says why."""

    case: str
    dice: Mapping[str, float] | None
    seconds: float
    peak_bytes: int | None
    precision: str | None = None
    code: str | None = None
    sentence: str | None = None

    def as_json(self) -> dict[str, Any]:
        dice = None if self.dice is None else {name: round(value, 5) for name, value in self.dice.items()}
        return {
            "case": self.case,
            "dice": dice,
            "seconds": round(self.seconds, 3),
            "peak_bytes": self.peak_bytes,
            "code": self.code,
            "sentence": self.sentence,
        }


@dataclass(frozen=True)
class VersionFigures:
    """How one version did: on a golden case of its own, and on the site's."""

    version: str
    golden: CaseFigures
    site: Sequence[CaseFigures] = field(default=())

    @property
    def seconds(self) -> float:
        """Over all cases, each from its files to its labelmap."""
        return sum(case.seconds for case in (self.golden, *self.site))

    @property
    def peak_bytes(self) -> int | None:
        return max(
            (c.peak_bytes for c in (self.golden, *self.site) if c.peak_bytes is not None), default=None
        )


def judge_golden(candidate: CaseFigures) -> Check:
    """The bundle's own golden case, with the runtime and the precision that live jobs have."""
    if candidate.dice is None:
        return Check("golden", False, f"The bundle's golden case gave no result: {candidate.sentence}")
    precision = Precision(candidate.precision or Precision.FLOAT32)
    needed = MINIMUM_DICE[precision]
    low = {name: dice for name, dice in candidate.dice.items() if dice < needed}
    if low:
        return Check(
            "golden", False, f"The bundle's golden case disagrees: {_figures(low)}; {needed} is needed."
        )
    return Check("golden", True, f"The bundle's golden case comes out right: {_lowest(candidate.dice)}.")


def judge_count(count: int, rules: GateRules) -> Check:
    """Whether the site has golden cases enough for anything to be said."""
    passed = count >= rules.minimum_cases
    sentence = f"The site has {count} golden case(s) of this model"
    if not passed:
        sentence += f", and asks for {rules.minimum_cases}"
    elif not count:
        sentence += ": nothing of the site's own is compared"
    return Check("site_cases", passed, f"{sentence}.")


def judge_dice(candidate: VersionFigures, active: VersionFigures | None, rules: GateRules) -> Check:
    """Dice per label with what the site has approved, on its own and against the active version."""
    wrong = [f"{c.case} gave no result: {c.sentence}" for c in candidate.site if c.dice is None]
    wrong += [
        f"{c.case} has Dice {_figures(low)}, where {rules.minimum_dice:g} is needed"
        for c in candidate.site
        if c.dice is not None
        and (low := {name: dice for name, dice in c.dice.items() if dice < rules.minimum_dice})
    ]
    before = {c.case: c.dice for c in active.site if c.dice is not None} if active is not None else {}
    pairs: dict[str, list[tuple[float, float]]] = {}
    for case in candidate.site:
        for name, dice in (case.dice or {}).items():
            if name in before.get(case.case, {}):
                pairs.setdefault(name, []).append((dice, before[case.case][name]))
                if before[case.case][name] - dice > rules.maximum_case_dice_loss:
                    wrong.append(
                        f"{name} has Dice {dice:.4f} in {case.case}, {before[case.case][name]:.4f} before"
                    )
    for name, values in pairs.items():
        now, then = fmean(v for v, _ in values), fmean(v for _, v in values)
        if then - now > rules.maximum_mean_dice_loss:
            wrong.append(f"{name} has Dice {now:.4f} on average, {then:.4f} before")
    if wrong:
        more = f"; and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
        return Check(
            "dice", False, f"The version is worse on the site's cases: {'; '.join(wrong[:_NAMED])}{more}."
        )
    if not candidate.site:
        return Check("dice", True, "There is no golden case of the site to compare on.")
    if not pairs:
        return Check(
            "dice", True, "The site's cases come out well; there is no active version to compare with."
        )
    assert active is not None
    return Check(
        "dice", True, f"On no label of {len(candidate.site)} case(s) is it worse than {active.version}."
    )


def judge_time(candidate: VersionFigures, active: VersionFigures | None, rules: GateRules) -> Check:
    """Time over all cases, beside the active version's."""
    now = candidate.seconds
    if active is None:
        return Check("time", True, f"The cases took {now:.1f} s; there is no active version to compare with.")
    then = active.seconds
    sentence = f"The cases took {now:.1f} s, {then:.1f} s with {active.version}"
    slow = now > then * rules.maximum_time_ratio and now - then > rules.noticed_time_s
    limit = f": more than {rules.maximum_time_ratio:g} times as long" if slow else ""
    return Check("time", not slow, f"{sentence}{limit}.")


def judge_memory(candidate: VersionFigures, active: VersionFigures | None, rules: GateRules) -> Check:
    """Peak memory of the inference process, beside the active version's."""
    now = candidate.peak_bytes
    if now is None:
        return Check("memory", True, "This system does not tell how much memory a process takes.")
    then = active.peak_bytes if active is not None else None
    if active is None or then is None:
        return Check("memory", True, f"The peak is {_mib(now)}; there is no active version to compare with.")
    sentence = f"The peak is {_mib(now)}, {_mib(then)} with {active.version}"
    large = now > then * rules.maximum_memory_ratio and now - then > rules.noticed_memory_bytes
    limit = f": more than {rules.maximum_memory_ratio:g} times as much" if large else ""
    return Check("memory", not large, f"{sentence}{limit}.")


def _figures(dice: Mapping[str, float]) -> str:
    named = [f"{name} {value:.4f}" for name, value in sorted(dice.items(), key=lambda each: each[1])]
    return ", ".join(named[:_NAMED]) + (f" and {len(named) - _NAMED} more" if len(named) > _NAMED else "")


def _lowest(dice: Mapping[str, float]) -> str:
    name, value = min(dice.items(), key=lambda each: each[1])
    return f"the lowest Dice is {value:.4f} ({name})"


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 1024**2:.0f} MiB"
