"""Define the 13 emotions of AffectNetFused and their positions in the valence-arousal plane."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

#: Gaussian of each class: mean valence, its standard deviation, mean arousal, its standard deviation.
VALENCE_AROUSAL: dict[str, tuple[float, float, float, float]] = {
    "neutral": (0.00, 0.10, 0.00, 0.10),
    "happy": (0.81, 0.21, 0.51, 0.26),
    "sad": (-0.63, 0.23, -0.27, 0.34),
    "surprised": (0.40, 0.30, 0.67, 0.27),
    "fear": (-0.64, 0.20, 0.60, 0.32),
    "disgust": (-0.60, 0.20, 0.35, 0.41),
    "angry": (-0.51, 0.20, 0.59, 0.33),
    "contempt": (-0.23, 0.39, 0.31, 0.33),
    "serene": (0.65, 0.29, -0.33, 0.36),
    "contemplative": (0.15, 0.41, -0.18, 0.30),
    "secure": (0.74, 0.22, -0.13, 0.32),
    "untroubled": (0.79, 0.25, -0.01, 0.46),
    "quiet": (0.19, 0.57, -0.40, 0.21),
}

#: The classes in the order of every distribution in this project.
EMOTIONS: tuple[str, ...] = tuple(VALENCE_AROUSAL)

#: Name of the column of images in a table of predictions. The other columns are classes.
IMAGE = "image"


def label_distribution(valence: npt.NDArray[np.float64], arousal: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Compute the distribution over EMOTIONS of points in the valence-arousal plane.

    p(class | v, a) is proportional to N(v; mu_v, sigma_v) N(a; mu_a, sigma_a), with the Gaussians of VALENCE_AROUSAL.
    The built-in sample is labelled by this rule. Whether the annotations of AffectNetFused follow it is not verified.

    Args:
        valence: [N], in [-1, 1].
        arousal: [N], in [-1, 1].

    Returns:
        [N, 13], each row non-negative with sum 1.
    """
    v_mean, v_std, a_mean, a_std = np.array(list(VALENCE_AROUSAL.values())).T
    log_p = (
        -0.5 * ((valence[:, None] - v_mean) / v_std) ** 2
        - 0.5 * ((arousal[:, None] - a_mean) / a_std) ** 2
        - np.log(v_std * a_std)
    )
    p = np.exp(log_p - log_p.max(axis=1, keepdims=True))
    result: npt.NDArray[np.float64] = p / p.sum(axis=1, keepdims=True)
    return result


def check_class_names(classes: Sequence[str]) -> None:
    """Check that the names of the classes are distinct and printable, and can be columns of a table of predictions.

    Raises:
        ValueError: a name occurs twice, is empty, contains control characters, or is `image`.
    """
    if twice := sorted({name for name in classes if classes.count(name) > 1}):
        raise ValueError(f"each class may be named only once, but these names occur again: {', '.join(twice)}")
    if IMAGE in classes:
        raise ValueError(f"no class may be named {IMAGE}, as the column of images in predictions; rename this class")
    if odd := [ascii(name) for name in classes if not name.isprintable() or not name.strip()]:
        raise ValueError(f"each class needs a name of printable characters, got {', '.join(odd)}")


def class_distances(classes: tuple[str, ...]) -> npt.NDArray[np.float64] | None:
    """Compute the Euclidean distances between the class means in the valence-arousal plane.

    Returns:
        [K, K], or None if a class has no point in the plane.
    """
    if not set(classes) <= set(VALENCE_AROUSAL):
        return None
    means = np.array([(VALENCE_AROUSAL[c][0], VALENCE_AROUSAL[c][2]) for c in classes])
    result: npt.NDArray[np.float64] = np.linalg.norm(means[:, None] - means[None], axis=-1)
    return result
