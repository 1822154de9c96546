"""The sample of slow tests rotates through all of them, and every option does what it says."""

from types import SimpleNamespace

import pytest

from tests.conftest import pytest_collection_modifyitems, sample

NAMES = [f"test_{i}" for i in range(50)]


def test_every_slow_test_gets_its_day():
    days = [sample(NAMES, 12, day) for day in range(20400, 20405)]
    assert all(len(day) == 12 for day in days) and set().union(*days) == set(NAMES)
    assert days[0].isdisjoint(days[1])
    assert sample(NAMES, 12, 20400) == days[0]


def test_sample_is_never_larger_than_the_list():
    assert sample(NAMES[:3], 12, 7) == set(NAMES[:3]) and sample([], 12, 7) == set() and sample(NAMES, 0, 7) == set()


def left(option, *arguments):
    """How many of twenty slow tests and one quick one are run."""
    items = [SimpleNamespace(nodeid=f"t.py::test[{i}]", get_closest_marker=lambda name, i=i: name if i else None) for i in range(21)]
    gone = []
    hook = SimpleNamespace(pytest_deselected=lambda items: gone.extend(items))
    pytest_collection_modifyitems(SimpleNamespace(getoption=lambda name: option, args=list(arguments), hook=hook), items)
    assert len(items) + len(gone) == 21 and items[0].nodeid == "t.py::test[0]"
    return len(items) - 1


def test_options():
    assert [left("all"), left("5"), left("none"), left("99")] == [20, 5, 0, 20]
    assert left("none", "t.py::test[3]") == 20  # what is named always runs
    with pytest.raises(pytest.UsageError, match="takes all, none or a number, found 'some'"):
        left("some")
