"""Several windows, lines or blocks: summed, or each for a share of the channels."""

from nearfold.grammar.entry import Entry

FAMILIES: dict[str, tuple[Entry, ...]] = {
    "several windows": (
        Entry(
            "aspp",
            "Atrous spatial pyramid, summed (DeepLab v2)",
            "(window(3, dilation=6) | box | kernel) + (window(3, dilation=12) | box | kernel)"
            " + (window(3, dilation=18) | box | kernel) + (window(3, dilation=24) | box | kernel)",
            ("four fixed windows with holes", "dilated squares", "a kernel for each"),
            "arXiv 1606.00915",
        ),
        Entry(
            "repvgg",
            "RepVGG's training block, without norms",
            "(window(3) | box | kernel) + (window(1) | box | kernel) + (window(1) | box | ones)",
            ("a fixed window, and the position itself", "dense squares", "two kernels, and the value as it is"),
            "arXiv 2101.03697",
        ),
        Entry(
            "acnet",
            "Asymmetric convolution block (ACNet)",
            "(window(3) | box | kernel) + (window((1, 3)) | box | kernel) + (window((3, 1)) | box | kernel)",
            ("a fixed square, its row and its column", "dense square and lines", "a kernel for each"),
            "arXiv 1908.03930",
        ),
        Entry(
            "slak",
            "Two long strips and a square (SLaK)",
            "(window((51, 5)) | box | depthwise) + (window((5, 51)) | box | depthwise) + (window(5) | box | depthwise)",
            ("two long fixed strips and a square", "dense rectangles", "one kernel per channel for each"),
            "arXiv 2207.03620",
        ),
        Entry(
            "mixconv",
            "Mixed depthwise convolution (MixConv)",
            "branch(0.5, window(3) | box | depthwise, window(5) | box | depthwise, split)",
            ("windows of two sizes, each for half the channels", "dense squares", "one kernel per channel"),
            "arXiv 1907.09595",
        ),
        Entry(
            "inceptionnext",
            "Inception depthwise convolution (InceptionNeXt)",
            "branch(0.625, window(1) | box | ones, branch(0.3334, window(3) | box | depthwise,"
            " branch(0.5, window((1, 11)) | box | depthwise, window((11, 1)) | box | depthwise, split), split), split)",
            ("a square, a row or a column for an eighth of the channels each", "dense", "one kernel per channel"),
            "arXiv 2303.16900",
        ),
        Entry(
            "poolformer",
            "Pooling as token mixer (PoolFormer)",
            "(window(3) | box | mean) + -1.0*(window(1) | box | ones)",
            ("a fixed window, less the position itself", "dense square", "nothing: the mean"),
            "arXiv 2111.11418",
        ),
        Entry(
            "strip_pooling",
            "Strip pooling, its two means",
            "(axial(0) | box | mean) + (axial(1) | box | mean)",
            ("both lines through the position", "along the lines", "nothing: the means"),
            "arXiv 2003.13328",
        ),
        Entry(
            "cross_shaped",
            "Cross-shaped windows (CSWin)",
            "branch(0.5, block((2, 512)) | box | softmax(heads=2, project=qkv),"
            " block((512, 2)) | box | softmax(heads=2, project=qkv), mix)",
            ("stripes of rows for half the heads, of columns for the others", "dense", "similarity, softmaxed"),
            "arXiv 2107.00652",
        ),
        Entry(
            "hilo",
            "HiLo attention (LITv2)",
            "branch(0.5, block(2) | box | softmax(heads=2), pooled(2) | row | softmax(heads=2))",
            ("a small block for half the heads, the means of blocks for the others", "dense", "similarity, softmaxed"),
            "arXiv 2205.13213",
        ),
        Entry(
            "biformer",
            "Bi-level routing attention (BiFormer)",
            "(nearest_blocks(4, 2, pooled) | ranked | softmax(heads=4, project=qkv))"
            " + (window(5) | box | ones(project=v)*depthwise)",
            (
                "the 4 regions that the position's region likes best, and a window",
                "by rank, and dense square",
                "similarity, softmaxed, and one kernel per channel of the same values",
            ),
            "arXiv 2303.08810",
        ),
    ),
}
