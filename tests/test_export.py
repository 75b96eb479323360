"""Every operator that has a name leaves by torch.export, and what was saved loads and runs again."""

from __future__ import annotations

import pytest
import torch
from helpers.cells import slow_but

from nearfold.grammar import CATALOGUE
from nearfold.testing import context_for, make

QUICK = ("local_nearest", "indexed", "vsa", "vig", "entmax", "convnn")


@pytest.mark.parametrize("name", slow_but(QUICK, CATALOGUE))
def test_what_was_exported_loads_again(name, tmp_path):
    """A graph that switches gradients off and on could be made, and not be saved."""
    layer, x = make(CATALOGUE[name].operation, (6, 6), torch.float32)
    context = context_for(layer.eval(), x)
    inputs = (x,) if context is None else (x, context.detach())
    torch.export.save(torch.export.export(layer, inputs), tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    torch.testing.assert_close(loaded(*inputs), layer(*inputs))
