"""Every fault has a row in the table, and a test that makes the row."""

from pathlib import Path

import fault_table
import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("fault", fault_table.FAULTS)
def test_every_fault_has_a_row_and_a_test_that_makes_it(fault):
    row = fault_table.read()[fault]
    assert all(cell.strip() for cell in row.strip("|").split("|"))
    assert len(row.strip("|").split("|")) == 4
    made = [path for path in TESTS.rglob("test_*.py") if f'fault="{fault}"' in path.read_text()]
    assert len(made) == 1


def test_the_table_holds_nothing_else():
    lines = fault_table.PLACE.read_text().splitlines()
    assert "\n".join(lines[:2]) + "\n" == fault_table.HEAD
    assert len(lines) == 2 + len(fault_table.FAULTS)
