"""Every row of the matrix of faults has a test."""

import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.support.fault_injection import POINTS, find
from tests.support.fault_matrix import ROWS, row

COLLECT = """
import sys, pytest

class Claims:
    def pytest_collection_finish(self, session):
        for item in session.items:
            rows = sorted({number for mark in item.iter_markers("fault") for number in mark.args})
            print("rows:", *rows, "of", item.nodeid)

sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "-m", "fault"], plugins=[Claims()]))
"""


def test_every_row_of_the_matrix_is_claimed_by_a_test():
    found = subprocess.run([sys.executable, "-c", COLLECT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    claims = [re.match("rows: ([0-9 ]*)of (.+)", line) for line in found.stdout.splitlines()]
    claims = {claim[2]: claim[1].split() for claim in claims if claim}
    assert [test for test, rows in claims.items() if not rows] == [], "mark them with tests.support.fault_matrix.row"
    claimed = {int(number) for rows in claims.values() for number in rows}
    assert {number: fault for number, fault in ROWS.items() if number not in claimed} == {}


@pytest.mark.parametrize("point", POINTS)
def test_a_fault_point_is_a_function(point):
    assert callable(getattr(*find(point)))


@pytest.mark.parametrize("numbers", [(), (99,), (1, 0)])
def test_a_number_that_is_no_row_is_refused(numbers):
    with pytest.raises(ValueError, match="row"):
        row(*numbers)


def test_the_mark_of_a_row_keeps_its_numbers():
    assert row(5, 26).mark == pytest.mark.fault(5, 26).mark
