"""The gate: what a version must show on this very node before it is activated.

It is whole, signed where that is asked for, and of the graphs that the node runs; it means what the active
version means, or somebody has confirmed that it does not; its golden case comes out right in the worker's
own runtime; and on the golden cases of the site it is not worse than the active version, nor much slower or
larger. Every check is one sentence of the report, and nothing else decides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from models.agreement import agreement, same_labels
from models.bundle import Bundle
from models.changes import meaning_changes
from models.errors import Refusal, SegnodeError, SignatureError
from models.manifest import Label
from models.nifti import read_labelmap
from models.registry import Registry
from models.signing import key_id, signer_of
from models.volume import Labelmap
from service.gate_checks import (
    CaseFigures,
    Check,
    VersionFigures,
    judge_count,
    judge_dice,
    judge_golden,
    judge_memory,
    judge_time,
)
from service.orders import order_of_job
from service.protocol import RunJob
from service.records.database import Records
from service.settings import Settings
from service.site_cases import list_cases
from service.spool import Spool
from service.trial import Trial, TrialRun
from service.watch import Stop

SCHEMA_VERSION = 1
GOLDEN = "golden"


@dataclass(frozen=True)
class GateReport:
    """What the gate found. ``content`` is JSON, as the records keep it."""

    passed: bool
    digest: str | None
    against_version: str | None
    against_digest: str | None
    content: dict[str, Any]

    @property
    def failed_sentences(self) -> list[str]:
        """A sentence for each check that was not passed."""
        return [check["sentence"] for check in self.content["checks"] if not check["passed"]]


@dataclass(frozen=True)
class _Case:
    name: str
    order: RunJob
    approved: Labelmap
    labels: tuple[Label, ...]  # as they are written in ``approved``


def run_gate(
    settings: Settings,
    records: Records,
    spool: Spool,
    registry: Registry,
    name: str,
    version: str,
    *,
    accept_changed_labels: bool,
    stop: Stop,
    renew: Callable[[], None] = lambda: None,
) -> GateReport:
    """Put a version to the test.

    Parameters
    ----------
    accept_changed_labels : bool
        Whether somebody has confirmed that labels, channels or orientation may change.
    stop : Stop
        Ends it: StoppingError is raised.
    renew : callable
        Called now and then.

    Raises
    ------
    ModelUnknownError
        If the version is not installed. All else that is wrong with it is in the report.
    """
    checks: list[Check] = []
    candidate = _open(registry, name, version, checks)
    against, incomparable = _active(registry, name)
    if candidate is None:
        return _report(name, version, None, against, checks, None, None)
    checks.append(incomparable or _judge_meaning(candidate, against, accept_changed_labels))
    cases, unusable = _site_cases(settings, records, spool, registry, name)
    checks += unusable
    now = _try(settings, candidate, cases, stop, renew)
    compared = against is not None and against.digest != candidate.digest
    then = _try(settings, against, cases, stop, renew) if against is not None and compared else None
    rules = settings.gate
    checks += [
        judge_golden(now.golden),
        judge_count(len(cases), rules),
        judge_dice(now, then, rules),
        judge_time(now, then, rules),
        judge_memory(now, then, rules),
    ]
    return _report(name, version, candidate, against, checks, now, then)


def _open(registry: Registry, name: str, version: str, checks: list[Check]) -> Bundle | None:
    """Read every byte of the version again; None where it is not to be run."""
    try:
        bundle = registry.verify(name, version, check_golden=False)
    except SignatureError as error:
        checks.append(Check("signature", False, error.message))
        return None
    except SegnodeError as error:
        if version not in registry.versions(name):
            raise
        checks.append(Check("digests", False, error.message))
        return None
    checks.append(Check("digests", True, f"Every file has its digest; the model digest is {bundle.digest}."))
    checks.append(Check("signature", True, _signature(registry, bundle)))
    checks.append(Check("graph", True, "Its networks hold only operators that the node runs."))
    return bundle


def _signature(registry: Registry, bundle: Bundle) -> str:
    if registry.trusted_keys is None:
        return "This node does not ask for signatures."
    return f"Signed by the trusted key {key_id(signer_of(bundle.folder, registry.trusted_keys))}."


def _active(registry: Registry, name: str) -> tuple[Bundle | None, Check | None]:
    """The active version to compare with, or a check that was not passed where there is one that cannot be
    read; neither where there is none, or a withdrawn one."""
    version = registry.active_version(name)
    if version is None or registry.is_withdrawn(name, version):
        return None, None
    try:
        return registry.get(name, version), None
    except SegnodeError as error:
        what = (
            f"Nothing can be compared with the active version {version}: {_why_unusable(error)} Or withdraw "
            "that version, or activate this one with --override-gate."
        )
        return None, Check("active", False, what)


def _why_unusable(error: SegnodeError) -> str:
    """Why an installed version cannot be read, and what to do: one that is merely not trusted (any more) is
    whole, and is not to be repaired."""
    if isinstance(error, SignatureError):
        return f"its signature is not trusted now. {error.message} {error.remedy}"
    return f"{error.message} {error.remedy}"


def _judge_meaning(candidate: Bundle, active: Bundle | None, accepted: bool) -> Check:
    changes = meaning_changes(active.manifest, candidate.manifest) if active is not None else []
    if not changes:
        return Check("labels", True, "Labels, channels and orientation are those of the active version.")
    assert active is not None
    what = f"Against {active.manifest.version}, {'; '.join(changes)}"
    if accepted:
        return Check("labels", True, f"{what}. That this is meant was confirmed.")
    return Check("labels", False, f"{what}. That this is meant must be confirmed.")


def _site_cases(
    settings: Settings, records: Records, spool: Spool, registry: Registry, name: str
) -> tuple[list[_Case], list[Check]]:
    """The site's golden cases, ready to be run; a check that was not passed for each other one."""
    cases, unusable = [], []
    with records.read() as session:
        for row in list_cases(session, model_name=name):
            path, maker = spool.absolute(row.path), row.job.model_version or ""
            case = f"The site's golden case {row.case_id}"
            try:
                if hashlib.sha256(path.read_bytes()).hexdigest() != row.sha256:
                    raise OSError("altered")
                approved = read_labelmap(path)
            except (OSError, Refusal):
                what = "is damaged: restore it, or remove the case."
                unusable.append(Check("site_cases", False, f"{case} {what}"))
                continue
            try:
                made_by = registry.get(name, maker)
            except SegnodeError as error:
                what = f"cannot be used without version {maker}, which made it: {_why_unusable(error)}"
                unusable.append(Check("site_cases", False, f"{case} {what}"))
                continue
            order = order_of_job(session, settings, spool, row.job_id, attempt=0, output_dir=path)
            cases.append(_Case(row.case_id, order, approved, tuple(made_by.manifest.labels)))
    return cases, unusable


def _try(
    settings: Settings, bundle: Bundle, cases: list[_Case], stop: Stop, renew: Callable[[], None]
) -> VersionFigures:
    with Trial(settings, bundle, stop, renew=renew) as trial:
        golden = golden_figures(trial, bundle)
        site = [_figures(c.name, trial.run(c.order), bundle, c.approved, c.labels) for c in cases]
    return VersionFigures(bundle.manifest.version, golden, site)


def golden_figures(trial: Trial, bundle: Bundle) -> CaseFigures:
    """Run a bundle's golden case, and compare it with what the training framework gave."""
    labels = tuple(bundle.manifest.labels)
    return _figures(GOLDEN, trial.run_golden_case(), bundle, _golden_labelmap(bundle), labels)


def _golden_labelmap(bundle: Bundle) -> Labelmap | None:
    try:
        return read_labelmap(bundle.golden_labelmap_path)
    except Refusal:
        return None


def _figures(
    case: str, run: TrialRun, bundle: Bundle, expected: Labelmap | None, labels: tuple[Label, ...]
) -> CaseFigures:
    """Compare what came out with what should have."""
    dice, sentence, code = None, run.sentence, run.code
    if run.labelmap is not None and expected is not None:
        if run.labelmap.array.shape != expected.array.shape:
            code, sentence = "GRIDS_DIFFER", "the result lies on another grid than the approved labelmap."
        else:
            pairs = same_labels(bundle.manifest.labels, labels)
            found = agreement(run.labelmap.array, expected.array, pairs)
            dice = {name: each.dice for name, each in found.items()}
    elif run.labelmap is not None:
        code, sentence = "UNREADABLE", "its labelmap cannot be read."
    return CaseFigures(case, dice, run.seconds, run.peak_bytes, run.precision, code, sentence)


def _report(
    name: str,
    version: str,
    candidate: Bundle | None,
    against: Bundle | None,
    checks: list[Check],
    now: VersionFigures | None,
    then: VersionFigures | None,
) -> GateReport:
    digest = candidate.digest if candidate is not None else None
    against_version = against.manifest.version if against is not None else None
    against_digest = against.digest if against is not None else None
    passed = all(check.passed for check in checks)
    content = {
        "schema_version": SCHEMA_VERSION,
        "model": {"name": name, "version": version, "digest": digest},
        "against": {"version": against_version, "digest": against_digest} if against is not None else None,
        "passed": passed,
        "checks": [check.as_json() for check in checks],
        "candidate": _figures_json(now),
        "active": _figures_json(then),
    }
    return GateReport(passed, digest, against_version, against_digest, content)


def _figures_json(figures: VersionFigures | None) -> dict[str, Any] | None:
    if figures is None:
        return None
    return {
        "version": figures.version,
        "cases": [case.as_json() for case in (figures.golden, *figures.site)],
        "seconds": round(figures.seconds, 3),
        "peak_bytes": figures.peak_bytes,
    }
