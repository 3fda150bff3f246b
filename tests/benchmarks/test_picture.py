from itertools import product

import pytest

from benchmarks.curves.picture import FACES, picture
from benchmarks.curves.replay import SPENT, WORKERS, found_at
from benchmarks.policies import OURS
from benchmarks.rivals import OF_RANDOM, RANDOM, RAY


def test_medians_and_quartiles_are_drawn_by_what_was_spent():
    rows = {}
    for curves, workers, (place, policy) in product(FACES, WORKERS, enumerate((RANDOM, RAY, OURS))):
        found = {OF_RANDOM: 0.2}
        for spent, share in enumerate(SPENT):
            median = 0.3 - 0.01 * place - 0.02 * spent - 0.0001 * workers
            found |= dict(zip(found_at(share), (median, median - 0.005, median + 0.003), strict=True))
        rows[curves, "surrogate", workers, policy] = found

    axes = picture(rows).axes
    titles = [each.get_title() for each in axes]
    assert titles == [f"{faces} faces, {workers} workers" for faces, workers in product(("real", "drawn"), WORKERS)]
    lines = {line.get_label(): line for line in axes[1].get_lines()}
    assert [*lines] == [RANDOM, RAY, OURS, f"{RANDOM}, after 256"]
    assert list(lines[OURS].get_xdata()) == [2, 4, 8, 16, 32]
    assert list(lines[OURS].get_ydata()) == pytest.approx([0.2792, 0.2592, 0.2392, 0.2192, 0.1992])
    band = axes[1].collections[2].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0.1942, 0.2822))
