"""Rigid registration of one image of a patient to another, so that the same run always moves it the same way.

Mattes mutual information, a rotation about the centre of the fixed image and a shift, three resolutions, one
thread and a fixed seed: SimpleITK's ``ImageRegistrationMethod``, ITK's registration framework of version 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import SimpleITK
from numpy.typing import NDArray

from models.errors import ReasonCode, Refusal
from models.volume import Affine, Volume, spacing_xyz_mm

_BINS = 32
_SAMPLES = 60_000  # of the fixed image, at each resolution
_ITERATIONS = 200
_LEVELS = ((4, 4.0), (2, 2.0), (1, 0.0))  # shrink factor along each axis, smoothing in mm
_SMALLEST_SIDE = 6  # an image of fewer slices than this after shrinking is not shrunk so far
_FIRST_STEP, _LAST_STEP, _RELAXATION = 2.0, 1e-4, 0.8  # steps are scaled by the shift they make
_SEED = 20201
_LITTLE = 1e-9

METHOD = (
    f"rigid; Mattes mutual information, {_BINS} bins; regular step gradient descent, at most {_ITERATIONS} "
    f"iterations at shrink factors {', '.join(str(factor) for factor, _ in _LEVELS)}; linear interpolation"
)
"""The parameters, in the words that go into records and reports."""


@dataclass(frozen=True, eq=False)
class Registration:
    """How an image has to be moved to lie on another.

    Parameters
    ----------
    transform : (4, 4) array, float64
        From LPS millimetres of the fixed image to LPS millimetres of the moving one.
    metric : float
        Mattes mutual information at the end, as ITK states it: negative, and smaller is better.
    iterations : int
        At the last resolution.
    rotation_degrees, moved_mm : float
        The angle of the rotation, and how far the corner of the fixed image that moves most is moved, both
        from where the registration began.
    """

    transform: Affine
    metric: float
    iterations: int
    rotation_degrees: float
    moved_mm: float

    def figures(self) -> dict[str, Any]:
        """As JSON, for records and measurements."""
        return {
            "method": METHOD,
            "software": f"SimpleITK {SimpleITK.Version_VersionString()}",
            "metric": round(self.metric, 6),
            "iterations": self.iterations,
            "rotation_degrees": round(self.rotation_degrees, 3),
            "moved_mm": round(self.moved_mm, 3),
            "transform_lps_mm": [[round(float(v), 6) for v in row] for row in self.transform],
        }


def register_rigid(fixed: Volume, moving: Volume, *, limit_mm: float, name: str) -> Registration:
    """Find the rigid motion that lays ``moving`` on ``fixed``.

    Where both lie in one frame of reference it begins as they lie there, otherwise with centre on centre.

    Parameters
    ----------
    fixed, moving : Volume
        Of one channel each, LPS.
    limit_mm : float
        How far the corner that moves most may be moved.
    name : str
        What a message calls the moving image.

    Raises
    ------
    Refusal
        REGISTRATION_FAILED, if the motion is larger than that, or makes the images agree no better.
    """
    start = SimpleITK.Euler3DTransform()
    start.SetCenter(_centre_mm(fixed).tolist())
    together = fixed.frame_of_reference_uid is not None
    if not together or fixed.frame_of_reference_uid != moving.frame_of_reference_uid:
        start.SetTranslation((_centre_mm(moving) - _centre_mm(fixed)).tolist())
    begun_at = _matrix(start)
    method = _method(fixed)
    method.SetInitialTransform(start, inPlace=False)
    try:
        with _one_thread():
            images = [_as_image(volume) for volume in (fixed, moving)]
            before = float(method.MetricEvaluate(*images))
            found = SimpleITK.Euler3DTransform(method.Execute(*images).GetBackTransform())
    except RuntimeError as error:  # ITK's: for images that do not overlap, or whose slices are sheared
        raise _refusal(
            f"The channel {name} cannot be registered: it shares too little with the reference."
        ) from error
    metric = float(method.GetMetricValue())
    result = Registration(
        transform=_matrix(found),
        metric=metric,
        iterations=int(method.GetOptimizerIteration()),
        rotation_degrees=_angle_degrees(_matrix(found)[:3, :3]),
        moved_mm=_furthest_mm(fixed, begun_at, _matrix(found)),
    )
    if result.moved_mm > limit_mm:
        raise _refusal(
            f"The registration would move the channel {name} by up to {result.moved_mm:.1f} mm; at most "
            f"{limit_mm:g} mm are plausible."
        )
    if metric > before + _LITTLE:
        raise _refusal(
            f"The registration of the channel {name} made it agree no better with the reference "
            f"(metric {metric:.4f} after {before:.4f})."
        )
    return result


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in another order give another motion, and ITK's metrics heed the process-wide setting alone."""
    threads = SimpleITK.ProcessObject.GetGlobalDefaultNumberOfThreads()
    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)


def _method(fixed: Volume) -> Any:
    method = SimpleITK.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(_BINS)
    method.SetInterpolator(SimpleITK.sitkLinear)
    levels = [level for level in _LEVELS if level[0] * _SMALLEST_SIDE <= min(fixed.shape_zyx)] or _LEVELS[-1:]
    voxels = int(np.prod(fixed.shape_zyx))
    if voxels > _SAMPLES:
        method.SetMetricSamplingStrategy(method.REGULAR)
        shares = [min(1.0, _SAMPLES * factor**3 / voxels) for factor, _ in levels]
        method.SetMetricSamplingPercentagePerLevel(shares, _SEED)
    method.SetOptimizerAsRegularStepGradientDescent(
        _FIRST_STEP, _LAST_STEP, _ITERATIONS, relaxationFactor=_RELAXATION, gradientMagnitudeTolerance=1e-8
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([factor for factor, _ in levels])
    method.SetSmoothingSigmasPerLevel([sigma for _, sigma in levels])
    method.SetSmoothingSigmasAreSpecifiedInPhysicalUnits(True)
    return method


def _as_image(volume: Volume) -> Any:
    image = SimpleITK.GetImageFromArray(volume.array[0])
    spacing = np.array(spacing_xyz_mm(volume.affine))
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(volume.affine[:3, 3].tolist())
    image.SetDirection((volume.affine[:3, :3] / spacing).ravel().tolist())
    return image


def _centre_mm(volume: Volume) -> NDArray[np.float64]:
    middle = (np.array(volume.shape_zyx[::-1]) - 1) / 2
    return np.asarray(volume.affine[:3, :3] @ middle + volume.affine[:3, 3])


def _matrix(transform: Any) -> Affine:
    """A rigid transform as a (4, 4) matrix: p becomes R (p - c) + c + t."""
    rotation = np.reshape(transform.GetMatrix(), (3, 3))
    centre = np.array(transform.GetCenter())
    matrix = np.eye(4)
    matrix[:3, :3] = rotation
    matrix[:3, 3] = centre + np.array(transform.GetTranslation()) - rotation @ centre
    return matrix


def _angle_degrees(rotation: NDArray[np.float64]) -> float:
    return float(np.degrees(np.arccos(np.clip((np.trace(rotation) - 1) / 2, -1.0, 1.0))))


def _furthest_mm(fixed: Volume, one: Affine, other: Affine) -> float:
    """How far apart two transforms put a corner of the fixed image, at most."""
    size = np.array(fixed.shape_zyx[::-1]) - 1
    corners = np.array([[*(size * corner), 1.0] for corner in np.ndindex(2, 2, 2)]) @ fixed.affine.T
    return float(np.linalg.norm((corners @ (one - other).T)[:, :3], axis=1).max())


def _refusal(message: str) -> Refusal:
    return Refusal(
        ReasonCode.REGISTRATION_FAILED,
        message,
        remedy="Look whether both series show the same part of the patient; if so, send them registered, or "
        "have the route's limit raised.",
    )
