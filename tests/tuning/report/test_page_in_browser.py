"""The page of a study in a real browser: what it shows, and how it answers."""

import itertools
import math
import random

import pytest

from raytune_emotion.storage.yaml_text import load_yaml
from raytune_emotion.tuning.report.page import write_report
from raytune_emotion.tuning.space.parser import parse_space
from raytune_emotion.tuning.space.space import draw
from raytune_emotion.tuning.study.optuna_study import load_study
from raytune_emotion.tuning.study.records import TrialRecord, read_records
from raytune_emotion.tuning.study.spec import read_spec
from tests.support.browser import browser, needs_chromium
from tests.support.reports import make_report
from tests.support.studies import spec_of, write_study

pytestmark = needs_chromium

SPACE = {
    "model.backbone": {"choice": ["test_resnet", "test_vit", "vit_base_patch16_rope_reg1_gap_256"]},
    "optim.lr": {"log_uniform": [1e-4, 1e-2]},
    "optim.warmup_epochs": {"uniform": [0.0, 0.9]},
    "train.batch_size": {"choice": [32, 64, 128]},
    "loss": {"simplex": ["mse", "kl", "js"]},
}
PLOTS = {"progress", "curves", "parallel", "importance", "simplex", "slice", "cost"}
OF_THE_WINNER = {"calibration", "confusion", "entropy"}


def made(count):
    rng, records = random.Random(0), []
    for i, settings in zip(range(count), draw(parse_space(SPACE), count, seed=0), strict=False):
        status = ["complete", "pruned", "pruned", "failed"][i % 4]
        best = 0.2 + 0.05 * abs(math.log10(settings["optim.lr"]) + 3) + rng.uniform(0, 0.05)
        times = [1e9 + 60 * i + 10 * epoch for epoch in (1, 2, 3)]
        reports = tuple(
            make_report(epoch, best + 0.1 / epoch, time=times[epoch - 1], images_per_second=900.0 + i, val_accuracy=0.5)
            for epoch in range(1, 4 if status == "complete" else 2)
        )
        records.append(
            TrialRecord(f"{i:04d}", status, settings, "out of memory" if status == "failed" else "", reports)
        )
    return records


@pytest.fixture(scope="module")
def page(tmp_path_factory, store):
    """A study of many trials."""
    folder = tmp_path_factory.mktemp("page")
    write_report(folder, spec_of(store, space=SPACE, trials=500, epochs=3), made(500))
    return folder / "report.html"


@pytest.fixture(scope="module")
def trained_page(tmp_path_factory, store):
    """A study that was run, so that its winner predicts."""
    folder = tmp_path_factory.mktemp("trained") / "study"
    write_study(folder, store)
    write_report(folder, read_spec(folder), read_records(folder, load_study(folder)))
    return folder / "report.html"


@pytest.fixture(scope="module")
def tab():
    with browser() as tab:
        yield tab


@pytest.fixture(autouse=True)
def _nothing_is_wrong_and_nothing_is_asked_for(tab):
    tab.errors.clear()
    tab.requests.clear()
    yield
    assert tab.errors == []
    assert [url for url in tab.requests if not url.startswith(("file:", "data:"))] == []


def place_of(tab, trial, chart="curves"):
    """Where the last dot of a trial stands in the window."""
    select = f"document.querySelector('[data-chart={chart}] .dot[data-t=\"{trial}\"]')"
    tab.eval(f"{select}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
    tab.wait_for_frame()
    return tab.eval(f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({select}.getBoundingClientRect())")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1200])
def test_every_plot_is_drawn_and_nothing_scrolls_sideways(tab, page, trained_page, width, dark):
    for file, plots in ((page, PLOTS), (trained_page, PLOTS - {"importance"} | OF_THE_WINNER)):
        tab.show(file, width=width, dark=dark)
        tab.draw_all()
        assert set(tab.eval("figures.map((figure) => figure.dataset.chart)")) == plots
        assert tab.eval("document.documentElement.scrollWidth") == width
        inside = "(e) => { const b = e.getBoundingClientRect(); return b.left >= 0 && b.right <= innerWidth }"
        assert tab.eval(f"[...document.querySelectorAll('svg text')].every({inside})"), "a label runs out of the page"
        background = tab.eval("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, background[4:-1].split(","))) < 200) == dark


def test_axes_have_the_scale_of_the_space_and_ticks_that_do_not_touch(tab, page):
    tab.show(page, width=390)
    tab.draw_all()
    texts = '[...document.querySelectorAll(\'[data-axis="{}"] [aria-label^="x-axis tick label"] text\')]'
    axes = tab.eval("data.axes.map((axis) => axis.name)")
    shown = {name: tab.eval(f"{texts.format(i)}.map((t) => t.textContent)") for i, name in enumerate(axes)}
    assert shown["train.batch_size"] == ["32", "64", "128"]
    assert shown["optim.lr"] == ["1e-4", "0.001", "0.01"]
    for i in range(len(axes)):
        boxes = tab.eval(
            f"{texts.format(i)}.map((t) => t.getBoundingClientRect()).map((b) => [b.left, b.right, b.top])"
        )
        if len({top for _, _, top in boxes}) == 1:  # else they are slanted
            assert all(one[1] < other[0] for one, other in itertools.pairwise(boxes)), axes[i]


def test_hovering_shows_the_settings_of_a_trial(tab, page):
    tab.show(page)
    tab.draw_all()
    x, y = place_of(tab, tab.eval("data.winner"))
    tab.click(x, y, kind="hover")
    tip = tab.eval("document.getElementById('tip').innerText")
    winner = tab.eval("data.winner")
    assert f"trial {winner}, the winner" in tip
    assert all(name in tip for name in SPACE if name != "loss")
    assert tab.eval(f"elements.get('{winner}').every((element) => element.classList.contains('hover'))")
    tab.click(2, 2, kind="hover")
    assert tab.eval("document.getElementById('tip').hidden")


def test_a_finger_shows_and_marks_a_trial(tab, page):
    tab.show(page, width=390)
    tab.draw_all()
    x, y = place_of(tab, tab.eval("data.winner"))
    tab.tap(x, y)
    tab.wait("document.querySelector('[data-chart=curves] .marked')")
    assert tab.eval("document.querySelector('[data-chart=curves] .marked').dataset.t === data.winner")
    assert not tab.eval("document.getElementById('tip').hidden")
    box = tab.eval("(({left, right}) => [left, right])(document.getElementById('tip').getBoundingClientRect())")
    assert box[0] >= 0
    assert box[1] <= 390
    tab.eval("scrollBy(0, 300)")
    tab.wait("document.getElementById('tip').hidden")


def test_clicking_marks_a_trial_in_every_plot_and_table_and_again_unmarks_it(tab, page):
    tab.show(page)
    tab.draw_all()
    winner = tab.eval("data.winner")
    x, y = place_of(tab, winner)
    tab.click(x, y)
    where = "(element) => element.closest('[data-chart]')?.dataset.chart ?? element.tagName"
    assert set(tab.eval(f"[...document.querySelectorAll('.marked')].map({where})")) == PLOTS - {"importance"} | {"TR"}
    assert tab.eval("[...document.querySelectorAll('.marked')].every((e) => e.dataset.t === data.winner)")
    assert winner in tab.eval("document.getElementById('chips').innerText")
    tab.click(*place_of(tab, winner, "cost"))
    assert tab.eval("document.querySelectorAll('.marked').length") == 0
    assert tab.eval("document.getElementById('chips').hidden")


def test_a_mark_stays_when_a_plot_is_drawn_anew(tab, page):
    tab.show(page)
    tab.draw_all()
    tab.eval("toggle(data.winner)")
    tab.eval("document.getElementById('cost').selectedIndex = 2")
    tab.eval("document.getElementById('cost').dispatchEvent(new Event('change'))")
    assert tab.eval("document.querySelector('[data-chart=cost] .marked').dataset.t === data.winner")


def test_settings_are_short_and_copied_with_all_digits(tab, page):
    tab.show(page)
    text = "document.getElementById('settings').textContent"
    rate = tab.eval("byId.get(data.winner).settings['optim.lr']")
    assert f"optim.lr: {rate:.4g}\n" in tab.eval(text)
    tab.eval("document.getElementById('copy').click()")
    tab.wait("['copied', 'selected'].includes(document.getElementById('copy').textContent)")
    copied = load_yaml(tab.eval(text))
    (record,) = (record for record in made(500) if record.trial_id == tab.eval("data.winner"))
    assert copied == record.settings


def test_a_row_marks_its_trial(tab, page):
    tab.show(page)
    tab.draw_all()
    tab.eval("document.querySelector('#all tbody tr:nth-child(3)').click()")
    marked = tab.eval("document.querySelector('#all tbody tr:nth-child(3)').dataset.t")
    assert tab.eval("document.querySelector('[data-chart=curves] .marked').dataset.t") == marked


def test_tables_sort_by_numbers_and_leave_empty_cells_below(tab, page):
    tab.show(page)
    column = "[...document.querySelectorAll('#all tbody tr')].map((row) => row.cells[{}].dataset.v)"
    for head, number, up in (("JS, bits", 3, True), ("lr", None, True), ("lr", None, False)):
        names = tab.eval("[...document.querySelectorAll('#all th')].map((head) => head.textContent)")
        place = number if number is not None else names.index(head)
        tab.eval("document.querySelectorAll('#all th')[" + str(place) + "].querySelector('button').click()")
        values = [float(value) for value in tab.eval(column.format(place)) if value]
        assert values == sorted(values, reverse=not up)
    assert tab.eval("document.querySelectorAll('#all th[aria-sort=descending]').length") == 1


def test_tables_filter_and_show_all(tab, page):
    shown = "[...document.querySelectorAll('#all tbody tr')].filter((row) => !row.hidden).length"
    tab.show(page)
    assert tab.eval(shown) == 20
    tab.eval("document.querySelector('button.more').click()")
    assert tab.eval(shown) == 500
    tab.eval("document.querySelector('#trials select.filter').value = 'failed'")
    tab.eval("document.querySelector('#trials select.filter').dispatchEvent(new Event('change'))")
    assert tab.eval(shown) == 125
    tab.eval("document.querySelector('#trials input').value = 'test_vit 128'")
    tab.eval("document.querySelector('#trials input').dispatchEvent(new Event('input'))")
    rows = tab.eval(
        "[...document.querySelectorAll('#all tbody tr')].filter((row) => !row.hidden).map((r) => r.textContent)"
    )
    assert 0 < len(rows) < 125
    assert all("test_vit" in row and "128" in row for row in rows)


def test_a_phone_sorts_by_a_list(tab, page):
    tab.show(page, width=390)
    by_js_downwards = 1 + 2 * 3 + 1
    tab.eval(f"document.querySelector('#trials .sorter').selectedIndex = {by_js_downwards}")
    tab.eval("document.querySelector('#trials .sorter').dispatchEvent(new Event('change'))")
    values = tab.eval("[...document.querySelectorAll('#all tbody tr')].map((row) => row.cells[3].dataset.v)")
    numbers = [float(value) for value in values if value]
    assert numbers == sorted(numbers, reverse=True)
    assert tab.eval("getComputedStyle(document.querySelector('#all thead')).display") == "none"
