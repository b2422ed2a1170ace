"""ImageNet-C's corruption error (Hendrycks and Dietterich, ICLR 2019)."""

from collections.abc import Sequence

import numpy as np

GROUPS = dict(
    noise=('gaussian_noise', 'shot_noise', 'impulse_noise'),
    blur=('defocus_blur', 'glass_blur', 'motion_blur', 'zoom_blur'),
    weather=('snow', 'frost', 'fog', 'brightness'),
    digital=('contrast', 'elastic_transform', 'pixelate', 'jpeg_compression'),
)
CORRUPTIONS = tuple(name for group in GROUPS.values() for name in group)
SEVERITIES = (1, 2, 3, 4, 5)

#: AlexNet's top-1 error on each corruption, 0 to 1, mean over the severities, as published.
ALEXNET = dict(
    gaussian_noise=0.886428,
    shot_noise=0.894468,
    impulse_noise=0.922640,
    defocus_blur=0.819880,
    glass_blur=0.826268,
    motion_blur=0.785948,
    zoom_blur=0.798360,
    snow=0.866816,
    frost=0.826572,
    fog=0.819324,
    brightness=0.564592,
    contrast=0.853204,
    elastic_transform=0.646056,
    pixelate=0.717840,
    jpeg_compression=0.606500,
)


def corruption_errors(errors: dict[str, Sequence[float]]) -> dict[str, float]:
    """The error on each corruption relative to AlexNet's, in percent: its CE.

    Args:
        errors: top-1 errors in percent by corruption, one for each of the five severities;
            corruptions without all five are left out.
    """
    return {
        name: float(np.mean(values)) / ALEXNET[name]
        for name, values in errors.items()
        if len(values) == len(SEVERITIES)
    }


def mce(errors: dict[str, Sequence[float]]) -> float | None:
    """The mean over all 15 corruptions of :func:`corruption_errors`; None if one is missing."""
    found = corruption_errors(errors)
    return float(np.mean(list(found.values()))) if set(found) == set(CORRUPTIONS) else None
