"""What several files of tests set up alike. A file that needs it for all its tests says so in `pytestmark`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from nearfold.train import ImageData

# their asserts show the values, as those in a test do
pytest.register_assert_rewrite("helpers")

collect_ignore_glob = ["toys/*"]  # to import one registers its word, for all tests of the process


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what `-m` does not ask for
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the slow cells of a test of many, `CELLS` are slow and the others thorough."""
    from helpers.cells import leave_a_sample

    leave_a_sample(items)


@pytest.fixture
def seeded() -> None:
    """Torch's generator starts from 0."""
    import torch  # not above: the process that hands out the tests needs none

    torch.manual_seed(0)


@pytest.fixture
def float64(seeded: None) -> Iterator[None]:
    """New tensors are float64, and torch's generator starts from 0."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone afterwards."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def digits() -> ImageData:
    """200 of the digits, 180 to train on."""
    from nearfold.train import load_data

    return load_data(limit=200)


@pytest.fixture(scope="session")
def image_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same 120 images in every layout, in several files, with small row groups."""
    from nearfold.recipes import generated

    root = tmp_path_factory.mktemp("generated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generated, "ROW_GROUP", 7)
        for layout in generated.LAYOUTS:
            generated.write(root / layout, layout, 120, size=40, shard=50)
    return root


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small batches of a stream have several lanes."""
    from nearfold.train import stream

    monkeypatch.setattr(stream, "_IMAGES_A_PIECE", 8)


@pytest.fixture
def own_words() -> Iterator[None]:
    """Words that a test makes, and what it registers of them, are gone after it."""
    from nearfold.grammar.word import WORDS
    from nearfold.lower.meaning import MEANINGS

    known: list[dict[Any, Any]] = [*WORDS.values(), MEANINGS]
    before = [dict(table) for table in known]
    yield
    for table, was in zip(known, before, strict=True):
        table.clear()
        table.update(was)
