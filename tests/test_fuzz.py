"""Damaged files of every kind end in a result or a sentence: some of the cases of `python -m tests.fuzz`."""

import pytest

from tests.fuzz import Fuzzer, make_files, make_targets

CASES = 60


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory):
    scratch = tmp_path_factory.mktemp("fuzz")
    make_files(scratch / "corpora")
    return Fuzzer(make_targets(scratch / "corpora"), scratch, seed=1)


def test_files_as_they_are_end_in_a_result(fuzzer, no_plots):
    assert fuzzer.check() == []


def test_damaged_files_end_in_a_result_or_a_sentence(fuzzer, no_plots):
    found = [fuzzer.case(number) for number in range(CASES)]
    assert [failure for failure in found if failure is not None] == []
    assert {code for _, code in fuzzer.codes} == {0, 2}
