"""Fast weights: matrices that a sequence writes and reads."""

from nearfold.grammar.entry import Entry

_BEFORE = "everything before, through a matrix per head"
_RASTER = "causal, in raster order"

FAMILIES: dict[str, tuple[Entry, ...]] = {
    "fast weights": (
        Entry(
            "retention",
            "Retention (RetNet)",
            "scan(state=16) | causal | additive(heads=4, project=vo)",
            (_BEFORE, _RASTER, "query times key, with a fixed decay per head"),
            "arXiv 2307.08621",
        ),
        Entry(
            "gated_retention",
            "Gated retention (YOCO)",
            "scan(state=16) | causal | additive(heads=4, project=vo, decay=head)",
            (_BEFORE, _RASTER, "query times key, with a decay per head made by the input"),
            "arXiv 2405.05254",
        ),
        Entry(
            "gla",
            "Gated linear attention",
            "scan(state=16) | causal | additive(heads=4, project=vo, decay=channel)",
            (_BEFORE, _RASTER, "query times key, with a decay per feature made by the input"),
            "arXiv 2312.06635",
        ),
        Entry(
            "deltanet",
            "Delta rule (DeltaNet)",
            "scan(state=16) | causal | delta(heads=4, project=vo)",
            (_BEFORE, _RASTER, "a share of what a key holds is replaced"),
            "arXiv 2406.06484",
        ),
        Entry(
            "gated_deltanet",
            "Gated delta rule (Gated DeltaNet)",
            "scan(state=16) | causal | delta(heads=4, project=vo, decay=head)",
            (_BEFORE, _RASTER, "a share of what a key holds is replaced, and heads forget"),
            "arXiv 2412.06464",
        ),
        Entry(
            "kimi_delta",
            "Kimi delta attention",
            "scan(state=16) | causal | delta(heads=4, project=vo, decay=channel)",
            (_BEFORE, _RASTER, "a share of what a key holds is replaced, and features forget"),
            "arXiv 2510.26692",
        ),
        Entry(
            "mlstm",
            "Matrix memory (mLSTM of xLSTM)",
            "scan(state=16) | causal | mlstm(heads=4, project=vo)",
            (_BEFORE, _RASTER, "query times key, between exponential gates, normalised"),
            "arXiv 2405.04517",
        ),
        Entry(
            "rwkv7",
            "Generalised delta rule (RWKV-7)",
            "scan(state=16) | causal | rwkv7(heads=4, project=vo)",
            (_BEFORE, _RASTER, "what one key holds gives way to another, and features forget"),
            "arXiv 2503.14456",
        ),
        Entry(
            "gated_deltanet_bidirectional",
            "Gated delta rule, both ways",
            "(scan(state=16) | causal | delta(heads=4, project=vo, decay=head))"
            " + (scan(state=16, reverse) | causal | delta(heads=4, project=vo, decay=head))",
            ("everything, through two matrices per head", "causal, in two orders", "as the gated delta rule"),
            "arXiv 2412.06464",
        ),
    ),
}
