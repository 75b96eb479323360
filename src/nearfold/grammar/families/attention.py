"""Attention everywhere, to fewer keys, between channels."""

from nearfold.grammar.entry import Entry

FAMILIES: dict[str, tuple[Entry, ...]] = {
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
            "dat",
            "Deformable attention to shared points (DAT)",
            "sampled(4, groups=2, bias=14) | row | softmax(heads=4)",
            ("the points of a coarse grid, moved by the input", "one slot per point", "similarity, softmaxed"),
            "arXiv 2201.00520",
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
}
