"""The vocabulary: every word of the language is a frozen dataclass whose fields are its arguments.

A word is used the same way in Python (``Window(3, dilation=2)``) and in the notation (``window(3,
dilation=2)``); parser and printer read the fields, so a new word is one class in `paths` or `weights` (and a new
similarity one in `similarity`). ``kind`` names the place where a word may stand: path, shape, rho, kernel, similarity
or candidates. All of them can be had from here.
"""

from nearfold.grammar.apart import Rectified, Sigmoid
from nearfold.grammar.beside import Beside
from nearfold.grammar.blocks import NearestBlocks
from nearfold.grammar.channels import ChannelShift, CrossCovariance, Excite
from nearfold.grammar.deformable import Deformable, Points, Sampled
from nearfold.grammar.fast import MLSTM, RWKV7, Additive, Delta, FastWeights
from nearfold.grammar.graphs import Edge, Relative
from nearfold.grammar.latents import Latents, Nystrom, Projected, Seeds, Synthesized
from nearfold.grammar.long import S4D, Continuous, ContinuousDepthwise, GlobalFilter, Hyena, Long, Spectral
from nearfold.grammar.maps import Efficient, Favor, Key, Relu, Unit
from nearfold.grammar.paths import (
    ORDERS,
    All,
    AllCandidates,
    Block,
    Candidates,
    Grid,
    Nearby,
    Nearest,
    Path,
    Random,
    Scan,
    Size,
    Window,
)
from nearfold.grammar.pooled import Agent, Pooled
from nearfold.grammar.selectors import Indexer, Selector
from nearfold.grammar.shapes import Box, Causal, Ranked, Row, Shape, Strided
from nearfold.grammar.sparse import Entmax, Sparsemax
from nearfold.grammar.transposed import Transposed
from nearfold.grammar.unions import Axial, First, Scattered, Union
from nearfold.grammar.weights import (
    Dense,
    Depthwise,
    Experts,
    Generated,
    Identity,
    Inverse,
    Kernel,
    Max,
    Mean,
    Modulated,
    Normalized,
    Ones,
    Rho,
    Selective,
    Separable,
    Shares,
    Shift,
    Softmax,
    Table,
)

__all__ = [
    "MLSTM",
    "ORDERS",
    "RWKV7",
    "S4D",
    "Additive",
    "Agent",
    "All",
    "AllCandidates",
    "Axial",
    "Beside",
    "Block",
    "Box",
    "Candidates",
    "Causal",
    "ChannelShift",
    "Continuous",
    "ContinuousDepthwise",
    "CrossCovariance",
    "Deformable",
    "Delta",
    "Dense",
    "Depthwise",
    "Edge",
    "Efficient",
    "Entmax",
    "Excite",
    "Experts",
    "FastWeights",
    "Favor",
    "First",
    "Generated",
    "GlobalFilter",
    "Grid",
    "Hyena",
    "Identity",
    "Indexer",
    "Inverse",
    "Kernel",
    "Key",
    "Latents",
    "Long",
    "Max",
    "Mean",
    "Modulated",
    "Nearby",
    "Nearest",
    "NearestBlocks",
    "Normalized",
    "Nystrom",
    "Ones",
    "Path",
    "Points",
    "Pooled",
    "Projected",
    "Random",
    "Ranked",
    "Rectified",
    "Relative",
    "Relu",
    "Rho",
    "Row",
    "Sampled",
    "Scan",
    "Scattered",
    "Seeds",
    "Selective",
    "Selector",
    "Separable",
    "Shape",
    "Shares",
    "Shift",
    "Sigmoid",
    "Size",
    "Softmax",
    "Sparsemax",
    "Spectral",
    "Strided",
    "Synthesized",
    "Table",
    "Transposed",
    "Union",
    "Unit",
    "Window",
]
