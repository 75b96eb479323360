"""Which slow cells `make slow` leaves to `make thorough`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from helpers.cells import OF_ONE_PART, leave_a_sample


@dataclass
class Item:
    """What of a test is looked at."""

    nodeid: str
    marks: list[str] = field(default_factory=lambda: ["slow"])
    path: Path = Path("test_some.py")

    def get_closest_marker(self, name: str) -> Any:
        return name if name in self.marks else None

    def add_marker(self, mark: Any) -> None:
        self.marks.append(mark.name)


def slow(items: list[Item]) -> list[str]:
    """What `make slow` runs, once the sample is marked."""
    leave_a_sample(cast(list[pytest.Item], items))
    return [item.nodeid for item in items if "slow" in item.marks and "thorough" not in item.marks]


@pytest.mark.parametrize(("cells", "kept"), [(1, 1), (5, 5), (12, 12), (13, 12), (100, 12)])
def test_a_sample_is_slow_and_the_rest_thorough(cells: int, kept: int) -> None:
    items = [Item(f"a::test_many[{n}]") for n in range(cells)]
    assert len(slow(items)) == kept
    assert sum("thorough" in item.marks for item in items) == cells - kept


def test_the_sample_spans_the_parameters() -> None:
    found = slow([Item(f"a::test_many[{n}]") for n in range(100)])
    assert [found[0], found[-1]] == ["a::test_many[0]", "a::test_many[99]"]
    assert all(any(f"[{tens}" in name for name in found) for tens in (1, 2, 3, 4, 5, 6, 7, 8, 9))


def test_what_is_quick_alone_or_of_another_test_is_not_counted() -> None:
    quick = [Item(f"a::test_quick[{n}]", marks=[]) for n in range(40)]
    alone = [Item(f"a::test_{n}") for n in range(40)]
    others = [Item(f"a::test_other[{n}]") for n in range(12)]
    assert len(slow(quick + alone + others)) == 52
    assert not any(item.marks for item in quick)


def test_files_of_cells_that_differ_are_whole() -> None:
    assert len(slow([Item(f"a::test_page[{n}]", path=Path("tests/test_docs.py")) for n in range(40)])) == 40


@pytest.mark.parametrize("name", OF_ONE_PART)
def test_what_only_the_kernels_break_is_thorough_and_there(name: str) -> None:
    assert slow([Item(f"tests/{name}"), Item("tests/test_some.py::test_other")]) == ["tests/test_some.py::test_other"]
    file, _, test = name.partition("::")
    assert f"def {test.partition('[')[0]}(" in (Path(__file__).parent / file).read_text(encoding="utf-8")
