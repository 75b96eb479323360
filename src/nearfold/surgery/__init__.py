"""Surgery: other operations into any network, weights kept.

>>> from torch import nn
>>> from nearfold.surgery import Rule, convert
>>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
>>> report = convert(model, Rule("({self}) + new*(nearest(9, cosine, self) | ranked | kernel)", name="2"))
>>> print(model[2].operation)
(window(3) | box | kernel) + new*(nearest(9, cosine, self) | ranked | kernel)
>>> [(row.name, row.status, row.grade) for row in report.rows]
[('0', 'kept', ''), ('2', 'replaced', 'exact')]
"""

from nearfold.surgery.carry import Carried, carry
from nearfold.surgery.convert import convert
from nearfold.surgery.report import LayerOutcome, Report
from nearfold.surgery.rule import Rule
from nearfold.surgery.save import load_converted, save_converted
from nearfold.surgery.schedule import SpectrumSchedule
from nearfold.surgery.sites import Site

Row = LayerOutcome  # its name before

__all__ = [
    "Carried", "LayerOutcome", "Report", "Row", "Rule", "Site", "SpectrumSchedule", "carry", "convert",
    "load_converted", "save_converted",
]  # fmt: skip
