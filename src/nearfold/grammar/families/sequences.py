"""State spaces, and kernels as long as the map."""

from nearfold.grammar.entry import Entry

FAMILIES: dict[str, tuple[Entry, ...]] = {
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
