import math
import shutil

import numpy as np
import pytest

from raytune_emotion.errors import UserError
from raytune_emotion.storage.atomic import write_text
from raytune_emotion.storage.locations import Folder
from raytune_emotion.tuning.policy.warm_start import EARLIER, NOTHING, name_earlier, read_earlier
from raytune_emotion.tuning.space.parser import parse_space
from raytune_emotion.tuning.study.earlier import gather_earlier
from raytune_emotion.tuning.study.open_study import load, make_study
from raytune_emotion.tuning.study.optuna_study import create_study, load_study
from raytune_emotion.tuning.study.request import SearchRequest
from raytune_emotion.tuning.study.resume_check import refused_changes
from raytune_emotion.tuning.study.spec import write_spec
from tests.support.reports import short_report
from tests.support.studies import run_here, searcher_of, spec_of

SPACE = {
    "model.backbone": "test_vit",
    "optim.lr": {"log_uniform": [1e-4, 1e-2]},
    "augment.flip": {"uniform": [0, 0.5]},
}
#: Of other faces: another space, that has the learning rate in common.
EARLIER_SPACE = {"optim.lr": {"log_uniform": [1e-5, 1e-2]}, "model.dropout": {"uniform": [0, 0.4]}}
BEST = 4e-4


def write_study(folder, store, trials):
    """An earlier study of made-up trials, whose loss has a valley in the learning rate."""
    folder.mkdir()
    space = parse_space(EARLIER_SPACE)
    searcher = searcher_of(create_study(folder, space), space)
    for _ in range(trials):
        proposal = searcher.ask()
        js = 0.1 * math.exp(abs(math.log(proposal.settings["optim.lr"] / BEST)))
        searcher.observe(proposal.trial_id, short_report(1, js, finished=True))
        searcher.tell(proposal.trial_id, "complete")
    write_spec(folder, spec_of(store, space=EARLIER_SPACE))
    return folder


def test_a_study_begins_where_earlier_ones_were_good_and_keeps_what_they_said(tmp_path, store):
    earlier = write_study(tmp_path / "earlier", store, 20)
    folder = tmp_path / "study"
    make_study(folder, spec_of(store, space=SPACE, trials=3, epochs=1), gather_earlier([Folder(earlier)]))
    shutil.rmtree(earlier)
    records = run_here(load(folder))
    rates = np.array([record.settings["optim.lr"] for record in records])
    assert len(rates) == 3
    assert (abs(np.log10(rates / BEST)) < 0.5).all(), rates  # a range of two decades

    (folder / EARLIER).unlink()
    assert read_earlier(folder) == []


def test_studies_that_cannot_be_started_from_are_refused_at_once(tmp_path, store):
    short = write_study(tmp_path / "short", store, 3)
    load_study(short)
    with pytest.raises(UserError) as refused:
        gather_earlier([Folder(short), Folder(tmp_path / "none")])
    assert len(refused.value.faults) == 2
    assert refused.value.faults[0] == f"--warm-start {short}: fewer than 4 of its trials have reported; leave it out"
    assert "no such folder" in refused.value.faults[1]


def test_a_study_that_goes_on_keeps_the_earlier_studies_that_it_began_with(tmp_path, store):
    earlier, other = (Folder(write_study(tmp_path / name, store, 4)) for name in ("earlier", "other"))
    write_text(tmp_path / EARLIER, gather_earlier([earlier]))
    spec = spec_of(store)

    def refused(*studies):
        return refused_changes(SearchRequest(Folder(tmp_path), warm_start=[*studies]), spec, tmp_path)

    assert refused(earlier) == []
    for asked in ((other,), (earlier, other), ("none",)):
        assert refused(*asked) == [
            f"--warm-start: a study keeps the warm-start that it began with, {earlier}; leave the option out, or begin "
            f"a new study under another name"
        ]


@pytest.mark.parametrize("text", ["{", "3", "[3]"])
def test_what_a_study_started_from_has_no_name_in_a_damaged_file(tmp_path, text):
    assert name_earlier(tmp_path) == NOTHING
    (tmp_path / EARLIER).write_text(text)
    with pytest.raises(UserError, match=r"earlier\.json: damaged \(.*; restore it from a copy"):
        name_earlier(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "3", "[3]", "[{}]"),
        *(
            f'[{{"space": {{"optim.lr": {{"uniform": [1, 2]}}}}, "trials": [[{trial}]]}}]'
            for trial in ('{}, {"one": 1}', '{}, {"1": true}', f'{{"optim.lr": {10**400}}}, {{"1": 1}}')
        ),
    ],
)
def test_damaged_memory_of_earlier_studies_is_a_sentence(tmp_path, text):
    (tmp_path / EARLIER).write_text(text)
    with pytest.raises(UserError, match=r"earlier\.json: damaged \(.*; restore it from a copy"):
        read_earlier(tmp_path)
