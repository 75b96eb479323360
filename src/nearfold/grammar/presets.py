"""Named operations: the catalogue behind `nearfold ops`, and functions that build the usual ones."""

from __future__ import annotations

from dataclasses import dataclass

from nearfold.grammar.notation import NAMES, did_you_mean, parse
from nearfold.grammar.operation import Operation


@dataclass(frozen=True)
class Entry:
    """One row of the catalogue: how an operator of the field is spelled here, and the three words in prose."""

    name: str
    title: str
    notation: str
    words: tuple[str, str, str]
    source: str

    @property
    def operation(self) -> Operation:
        """The parsed operation."""
        return parse(self.notation)


_FAMILIES: dict[str, tuple[Entry, ...]] = {
    "fixed window": (
        Entry(
            "conv",
            "Convolution 3x3",
            "window(3) | box | kernel",
            ("a fixed window", "dense square", "one shared kernel"),
            "nn.Conv2d",
        ),
        Entry(
            "conv_strided",
            "Strided convolution",
            "window(3, stride=2) | box | kernel",
            ("a fixed window, every other position", "dense square", "one shared kernel"),
            "nn.Conv2d",
        ),
        Entry(
            "conv_dilated",
            "Dilated convolution",
            "window(3, dilation=2) | box | kernel",
            ("a fixed window with holes", "dilated square", "one shared kernel"),
            "arXiv 1511.07122",
        ),
        Entry(
            "conv_causal",
            "Causal convolution (1-D)",
            "window(3) | causal | kernel",
            ("a fixed window that ends at the position", "causal", "one shared kernel"),
            "arXiv 1609.03499",
        ),
        Entry(
            "conv_transposed",
            "Transposed convolution",
            "transposed(4, up=2) | box | kernel",
            ("a fixed window on a grid twice as fine", "dense square", "one shared kernel"),
            "arXiv 1411.4038",
        ),
        Entry(
            "depthwise",
            "Depthwise convolution",
            "window(3) | box | depthwise",
            ("a fixed window", "dense square", "one kernel per channel"),
            "arXiv 1610.02357",
        ),
        Entry(
            "separable",
            "Depthwise-separable convolution",
            "window(3) | box | separable",
            ("a fixed window", "dense square", "one kernel per channel, then a pointwise map"),
            "arXiv 1610.02357",
        ),
        Entry(
            "large_kernel",
            "Large-kernel convolution",
            "window(13) | box | depthwise",
            ("a large fixed window", "dense square", "one kernel per channel"),
            "arXiv 2203.06717",
        ),
        Entry(
            "pool_mean",
            "Average pooling",
            "window(2, stride=2, padding=0) | box | mean",
            ("a fixed window", "dense square", "nothing: the mean"),
            "nn.AvgPool2d",
        ),
        Entry(
            "pool_max",
            "Max pooling",
            "window(2, stride=2, padding=0) | box | max",
            ("a fixed window", "dense square", "nothing: the largest"),
            "nn.MaxPool2d",
        ),
    ),
    "moved window, made kernel": (
        Entry(
            "deformable",
            "Deformable convolution",
            "deformable(3) | box | kernel",
            ("a window whose slots move with the input", "dense square, bent", "one shared kernel"),
            "arXiv 1703.06211",
        ),
        Entry(
            "deformable_v2",
            "Modulated deformable convolution",
            "deformable(3) | box | modulated*kernel",
            (
                "a window whose slots move with the input",
                "dense square, bent",
                "one shared kernel, each slot turned up or down",
            ),
            "arXiv 1811.11168",
        ),
        Entry(
            "involution",
            "Involution",
            "window(7) | box | generated(groups=4)",
            ("a fixed window", "dense square", "a kernel made by the position itself"),
            "arXiv 2103.06255",
        ),
        Entry(
            "dynamic_light",
            "Lightweight dynamic convolution",
            "window(7) | box | generated(groups=4, reduction=0, activation=softmax)",
            ("a fixed window", "dense square", "a softmaxed kernel made by the position itself"),
            "arXiv 1901.10430",
        ),
        Entry(
            "dynamic_conv",
            "Dynamic convolution",
            "window(3) | box | experts(4)",
            ("a fixed window", "dense square", "four kernels mixed for every input"),
            "arXiv 1912.03458",
        ),
    ),
    "attention in a window": (
        Entry(
            "attention_local",
            "Local attention",
            "window(7) | box | softmax(heads=4)",
            ("a fixed window", "dense square", "similarity, softmaxed"),
            "arXiv 1906.05909",
        ),
        Entry(
            "neighborhood",
            "Neighbourhood attention",
            "window(7, mode=inside) | box | softmax(heads=4)",
            ("a window that stays inside the grid", "dense square", "similarity, softmaxed"),
            "arXiv 2204.07143",
        ),
        Entry(
            "neighborhood_dilated",
            "Dilated neighbourhood attention",
            "window(3, dilation=2, mode=inside) | box | softmax(heads=4)",
            ("a window with holes that stays inside the grid", "dilated square", "similarity, softmaxed"),
            "arXiv 2209.15001",
        ),
        Entry(
            "sliding_window",
            "Sliding-window attention (1-D)",
            "window(16) | causal | softmax(heads=4)",
            ("the last 16 positions", "causal", "similarity, softmaxed"),
            "arXiv 2004.05150",
        ),
        Entry(
            "block",
            "Block-local attention",
            "block(4) | box | softmax(heads=4)",
            ("the block that holds the position", "dense square", "similarity, softmaxed"),
            "arXiv 1811.05544",
        ),
        Entry(
            "swin",
            "Swin: window attention",
            "block(7, scaled(bias=table)) | box | softmax(heads=4)",
            ("the block that holds the position", "dense square", "similarity and a table of offsets, softmaxed"),
            "arXiv 2103.14030",
        ),
        Entry(
            "swin_shifted",
            "Swin: shifted-window attention",
            "block(7, scaled(bias=table), shift=3) | box | softmax(heads=4)",
            (
                "the block that holds the position, blocks shifted",
                "dense square",
                "similarity and a table of offsets, softmaxed",
            ),
            "arXiv 2103.14030",
        ),
        Entry(
            "maxvit_grid",
            "Grid attention (MaxViT)",
            "block(7, scaled(bias=table), spread) | box | softmax(heads=4)",
            ("a block spread over the whole grid", "dense square, with holes", "similarity and a table, softmaxed"),
            "arXiv 2204.01697",
        ),
        Entry(
            "acmix",
            "ACmix",
            "a*(window(7, scaled(relative), mode=reflect) | box | softmax(heads=4, project=qkv))"
            " + b*(window(3) | box | shift(4))",
            ("a fixed window, twice", "dense squares", "similarity and a generated kernel, shared projections"),
            "arXiv 2111.14556",
        ),
    ),
    "attention everywhere": (
        Entry(
            "attention",
            "Self-attention",
            "all | row | softmax(heads=4)",
            ("everywhere", "one slot per position", "similarity, softmaxed"),
            "arXiv 1706.03762",
        ),
        Entry(
            "attention_causal",
            "Causal self-attention",
            "all | causal | softmax(heads=4)",
            ("everywhere before", "causal row", "similarity, softmaxed"),
            "arXiv 1706.03762",
        ),
        Entry(
            "attention_strided",
            "Strided sparse attention",
            "all | strided(4) | softmax(heads=4)",
            ("every 4th position", "strided row", "similarity, softmaxed"),
            "arXiv 1904.10509",
        ),
        Entry(
            "attention_alibi",
            "Attention with ALiBi",
            "all(scaled(bias=alibi)) | row | softmax(heads=4)",
            ("everywhere", "one slot per position", "similarity minus distance, softmaxed"),
            "arXiv 2108.12409",
        ),
        Entry(
            "attention_rotary",
            "Attention with rotary positions",
            "all(scaled(rotary)) | row | softmax(heads=2)",
            ("everywhere", "one slot per position", "similarity of vectors turned by position, softmaxed"),
            "arXiv 2104.09864",
        ),
        Entry(
            "attention_grouped",
            "Grouped-query attention",
            "all | row | softmax(heads=4, kv=2)",
            ("everywhere", "one slot per position", "similarity, softmaxed, two query heads to a key head"),
            "arXiv 2305.13245",
        ),
        Entry(
            "attention_multiquery",
            "Multi-query attention",
            "all | row | softmax(heads=4, kv=1)",
            ("everywhere", "one slot per position", "similarity, softmaxed, one key head for all"),
            "arXiv 1911.02150",
        ),
        Entry(
            "cross_attention",
            "Cross-attention",
            "all(cross) | row | softmax(heads=4)",
            ("everywhere in another input", "one slot per position", "similarity, softmaxed"),
            "arXiv 1706.03762",
        ),
        Entry(
            "linear_attention",
            "Linear attention",
            "all(elu) | row | normalized(heads=4)",
            ("everywhere", "one slot per position", "positive similarity, normalised"),
            "arXiv 2006.16236",
        ),
        Entry(
            "mixer",
            "MLP-Mixer's token mixing",
            "all | row | table(64)",
            ("everywhere", "one slot per position", "a learned table"),
            "arXiv 2105.01601",
        ),
    ),
    "fewer keys": (
        Entry(
            "pvt_linear",
            "Attention to pooled keys (PVT v2, linear)",
            "pooled(7, bins) | row | softmax(heads=4)",
            ("the means of 7 x 7 parts of the map", "one slot per part", "similarity, softmaxed"),
            "arXiv 2106.13797",
        ),
        Entry(
            "mvit_pooled",
            "Pooling attention (MViT), mean keys",
            "pooled(2) | row | softmax(heads=4)",
            ("the means of 2 x 2 blocks", "one slot per block", "similarity, softmaxed"),
            "arXiv 2104.11227",
        ),
        Entry(
            "nsa_compressed",
            "Compressed attention (a branch of NSA, 1-D)",
            "pooled(8) | causal | softmax(heads=4)",
            ("the means of the blocks before", "causal, by blocks", "similarity, softmaxed"),
            "arXiv 2502.11089",
        ),
        Entry(
            "agent",
            "Agent attention",
            "all | row | agent(4, heads=4)",
            ("everywhere", "one slot per position", "what 4 x 4 mean queries heard, softmaxed twice"),
            "arXiv 2312.08874",
        ),
    ),
    "between channels": (
        Entry(
            "xca",
            "Cross-covariance attention (XCiT)",
            "window(1) | box | cross_covariance(4)",
            ("the position itself", "one slot", "a map of its channels, made by the whole input"),
            "arXiv 2106.09681",
        ),
        Entry(
            "tsm",
            "Temporal shift (TSM, 1-D)",
            "window(3) | box | channel_shift(share=0.125)",
            ("a fixed window", "dense", "one slot for every channel, nothing learned"),
            "arXiv 1811.08383",
        ),
        Entry(
            "as_mlp",
            "Axial shift (AS-MLP)",
            "(window((1, 5)) | box | ones(project=vo)*channel_shift)"
            " + (window((5, 1)) | box | ones(project=vo)*channel_shift)",
            ("a row and a column of a window", "dense lines", "one slot for every channel, nothing learned"),
            "arXiv 2107.08391",
        ),
    ),
    "nearest neighbours": (
        Entry(
            "conv_nearest",
            "Convolution as nearest neighbours",
            "nearest(9, position, padding=1) | box | kernel",
            ("the 9 nearest in space", "raster order", "one shared kernel"),
            "arXiv 2511.14137",
        ),
        Entry(
            "blend",
            "Between the ends",
            "nearest(9, blend(0.5), self) | ranked | kernel",
            ("the 9 nearest in space and features", "by rank", "one shared kernel"),
            "arXiv 2511.14137",
        ),
        Entry(
            "convnn",
            "ConvNN",
            "nearest(9, cosine, self) | ranked | kernel",
            ("itself and the 8 most similar", "by rank", "one shared kernel"),
            "arXiv 2511.14137",
        ),
        Entry(
            "convnn_random",
            "ConvNN, random candidates",
            "nearest(9, cosine, random(32), self) | ranked | kernel",
            ("itself and the 8 most similar of 32 drawn", "by rank", "one shared kernel"),
            "arXiv 2511.14137",
        ),
        Entry(
            "convnn_attention",
            "ConvNN attention",
            "nearest(9, scaled) | ranked | softmax(heads=4)*depthwise",
            ("the 9 most similar", "by rank", "similarity, softmaxed, times one kernel per channel"),
            "arXiv 2606.14725",
        ),
        Entry(
            "kvt",
            "k-NN attention (KVT)",
            "nearest(9, scaled) | ranked | softmax(heads=4)",
            ("the 9 most similar", "by rank", "similarity, softmaxed"),
            "arXiv 2106.00515",
        ),
        Entry(
            "indexed",
            "Sparse attention with an indexer (DSA)",
            "nearest(9, scaled, by=indexer(4, 16)) | causal | softmax(heads=4)",
            ("the 9 that a lightning indexer chooses, of those before", "causal", "similarity, softmaxed"),
            "arXiv 2512.02556",
        ),
        Entry(
            "moba",
            "Mixture of block attention (MoBA, 1-D)",
            "nearest_blocks(3, 8, self) | causal | softmax(heads=4)",
            ("its own block and the 2 most similar before", "causal, by blocks", "similarity, softmaxed"),
            "arXiv 2502.13189",
        ),
        Entry(
            "vsa",
            "Tiles that choose tiles (VSA)",
            "nearest_blocks(4, 2, pooled) | ranked | softmax(heads=4)",
            ("the 4 tiles that the position's tile likes best", "by rank, by tiles", "similarity, softmaxed"),
            "arXiv 2505.13389",
        ),
        Entry(
            "branch",
            "Hybrid branch",
            "branch(0.5, nearest(9, cosine, self) | ranked | kernel, window(3) | box | kernel, mix)",
            (
                "half the channels the most similar, half a window",
                "by rank, and dense square",
                "kernels, mixed by a pointwise map",
            ),
            "arXiv 2511.14137",
        ),
    ),
    "how many, by the data": (
        Entry(
            "sparsemax",
            "Sparsemax attention",
            "all | row | sparsemax(heads=4)",
            ("everywhere", "one slot per position", "similarity, projected onto the simplex"),
            "arXiv 1602.02068",
        ),
        Entry(
            "entmax",
            "Entmax attention, 1.5",
            "all | row | entmax(heads=4)",
            ("everywhere", "one slot per position", "similarity, entmaxed: exact zeros"),
            "arXiv 1905.05702",
        ),
        Entry(
            "entmax_causal",
            "Sparse transformer by entmax",
            "all | causal | entmax(heads=4)",
            ("everywhere before", "causal row", "similarity, entmaxed: exact zeros"),
            "arXiv 1909.00015",
        ),
        Entry(
            "top_p",
            "Top-p sparse attention (Twilight)",
            "nearest(16, scaled, top_p=0.9) | ranked | softmax(heads=4)",
            ("the fewest of the 16 most similar that hold 0.9", "by rank", "similarity, softmaxed"),
            "arXiv 2502.02770",
        ),
    ),
    "several paths": (
        Entry(
            "sinks",
            "Attention sinks (StreamingLLM, 1-D)",
            "window(16) & first(4) | causal | softmax(heads=4)",
            ("the last 16 positions and the first 4", "causal", "similarity, softmaxed"),
            "arXiv 2309.17453",
        ),
        Entry(
            "bigbird",
            "BigBird: local, global and random",
            "window(3) & first(2) & scattered(3) | box | softmax(heads=4)",
            ("a window, the first positions, and a few drawn once", "dense square, and slots", "similarity, softmaxed"),
            "arXiv 2007.14062",
        ),
        Entry(
            "axial",
            "Axial attention, one axis",
            "axial(0) | box | softmax(heads=4)",
            ("the line through the position", "along the line", "similarity, softmaxed"),
            "arXiv 1912.12180",
        ),
        Entry(
            "criss_cross",
            "Criss-cross attention",
            "axial(0) & axial(1) | box | softmax(heads=4)",
            ("both lines through the position", "along the lines", "similarity, softmaxed"),
            "arXiv 1811.11721",
        ),
        Entry(
            "local_nearest",
            "Local and nearest in one softmax",
            "window(3) & nearest(9, scaled) | ranked | softmax(heads=4)",
            ("a fixed window, and the 9 most similar", "dense square, then by rank", "similarity, softmaxed"),
            "arXiv 2511.14137",
        ),
    ),
    "graphs": (
        Entry(
            "vig",
            "Vision GNN: max-relative",
            "nearest(9, cosine) | ranked | max*relative(groups=4)",
            ("the 9 most similar", "by rank", "the largest difference, beside the own value"),
            "arXiv 2206.00272",
        ),
        Entry(
            "edgeconv",
            "EdgeConv (DGCNN)",
            "nearest(20, euclidean) | ranked | max*edge",
            ("the 20 nearest in features", "by rank", "the largest of a perceptron of each pair"),
            "arXiv 1801.07829",
        ),
    ),
    "state spaces": (
        Entry(
            "mamba",
            "Selective scan (Mamba)",
            "scan(state=16) | causal | selective",
            ("everything before, through a state", "causal, in raster order", "decay and gates made by the input"),
            "arXiv 2312.00752",
        ),
        Entry(
            "mamba2",
            "State-space duality (Mamba-2)",
            "scan(state=64) | causal | selective(heads=4)",
            ("everything before, through a state", "causal, in raster order", "one decay per head, made by the input"),
            "arXiv 2405.21060",
        ),
        Entry(
            "scan_snake",
            "Selective scan, continuous order",
            "scan(state=16, order=snake) | causal | selective",
            (
                "everything before, through a state",
                "causal, every other row backwards",
                "decay and gates made by the input",
            ),
            "arXiv 2403.17695",
        ),
        Entry(
            "scan_cross",
            "Cross-scan (VMamba)",
            "(scan(state=16) | causal | selective)"
            " + (scan(state=16, order=columns) | causal | selective)"
            " + (scan(state=16, reverse) | causal | selective)"
            " + (scan(state=16, order=columns, reverse) | causal | selective)",
            ("everything, through four states", "causal, in four orders", "decay and gates made by the input"),
            "arXiv 2401.10166",
        ),
    ),
    "kernels as long as the map": (
        Entry(
            "hyena",
            "Hyena, order 2 (1-D)",
            "all(dot) | causal | identity(heads=8)*hyena(64)",
            ("everywhere before", "causal, by distance", "a kernel made by an MLP, between two gates"),
            "arXiv 2302.10866",
        ),
        Entry(
            "hyena_heads",
            "Multi-head Hyena (1-D)",
            "all(dot) | causal | identity(heads=2)*hyena(64)",
            ("everywhere before", "causal, by distance", "a kernel made by an MLP, times similarity"),
            "arXiv 2310.18780",
        ),
        Entry(
            "s4d",
            "Diagonal state space (S4D)",
            "all | causal | s4d(64)",
            ("everywhere before", "causal, by distance", "the response of a state space per channel"),
            "arXiv 2206.11893",
        ),
        Entry(
            "s4nd",
            "Diagonal state space on a grid (S4ND)",
            "all | row | s4d(64)",
            ("everywhere", "by offset", "a product of state spaces' responses along the axes"),
            "arXiv 2210.06583",
        ),
        Entry(
            "ckconv",
            "Continuous kernel convolution (1-D)",
            "all | causal | continuous(32)",
            ("everywhere before", "causal, by distance", "a full kernel made by an MLP"),
            "arXiv 2102.02611",
        ),
        Entry(
            "continuous_depthwise",
            "Depthwise continuous kernel (CCNN)",
            "all | row | continuous_depthwise(32)",
            ("everywhere", "by offset", "one kernel per channel made by an MLP"),
            "arXiv 2206.03398",
        ),
        Entry(
            "fno",
            "Spectral convolution (FNO)",
            "all | row | spectral(12)",
            ("everywhere, around the border", "by offset", "a full kernel of the lowest frequencies"),
            "arXiv 2010.08895",
        ),
        Entry(
            "gfnet",
            "Global filter (GFNet)",
            "all | row | global_filter(14)",
            ("everywhere, around the border", "by offset", "one spectrum per channel"),
            "arXiv 2107.00645",
        ),
    ),
}
FAMILIES: dict[str, tuple[str, ...]] = {family: tuple(e.name for e in entries) for family, entries in _FAMILIES.items()}
CATALOGUE: dict[str, Entry] = {entry.name: entry for entries in _FAMILIES.values() for entry in entries}
NAMES.update({name: (entry.notation, f"{entry.title} {entry.source}") for name, entry in CATALOGUE.items()})


def preset(name: str) -> Operation:
    """The operation of a catalogue entry.

    >>> print(preset("convnn"))
    nearest(9, cosine, self) | ranked | kernel
    """
    return entry_of(name).operation


def entry_of(name: str) -> Entry:
    """The catalogue's entry of this name.

    Raises:
        ValueError: when there is none, with those that may be meant.
    """
    if name not in CATALOGUE:
        raise ValueError(f"the catalogue has no {name!r}{did_you_mean(name)}; its names: {', '.join(CATALOGUE)}")
    return CATALOGUE[name]
