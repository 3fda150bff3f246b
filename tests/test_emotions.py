import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from raytune_emotion.emotions import EMOTIONS, VALENCE_AROUSAL, check_class_names, class_distances, label_distribution

ORDER = "neutral happy sad surprised fear disgust angry contempt serene contemplative secure untroubled quiet"
POINT = st.floats(-1, 1)


def test_the_classes_have_their_order():
    assert " ".join(EMOTIONS) == ORDER


@given(POINT, POINT)
def test_a_label_is_the_normalised_product_of_gaussians(v, a):
    density = np.array([norm.pdf(v, mv, sv) * norm.pdf(a, ma, sa) for mv, sv, ma, sa in VALENCE_AROUSAL.values()])
    np.testing.assert_allclose(
        label_distribution(np.array([v]), np.array([a]))[0], density / density.sum(), rtol=1e-9, atol=1e-15
    )


def test_no_class_has_the_name_of_another_column_of_predictions():
    check_class_names(("calm", "tense", "Image"))
    with pytest.raises(ValueError, match="no class may be named image, as the column of images"):
        check_class_names(("calm", "image"))


def test_distances_are_those_of_the_plane():
    distances = class_distances(EMOTIONS)
    assert distances[0, 1] == np.hypot(0.81, 0.51)
    np.testing.assert_array_equal(distances, distances.T)
    assert class_distances(("neutral", "bored")) is None
