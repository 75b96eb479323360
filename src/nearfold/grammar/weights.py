"""Words for what to value (Weight): rho turns scores into one number per slot, a kernel maps slots to channels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from nearfold.grammar.place import check_coordinates
from nearfold.grammar.word import Word, all_ones, check, number, one_of, positive

if TYPE_CHECKING:
    from nearfold.grammar.operation import Basic


class Rho(Word):
    """One number per slot, alpha, from the scores."""

    kind = "rho"
    needs_score: ClassVar[bool] = True
    default_projections: ClassVar[str] = "qkvo"
    paths: ClassVar[tuple[str, ...]] = ()  # paths it goes with; empty: any
    takes_kernel: ClassVar[bool] = True
    heads: int
    kv: int | None = None  # heads of keys and values, where they are fewer
    project: str | None

    def require(self, op: Basic) -> None:
        if not one_of(op.path, self.paths):
            raise ValueError(f"{self.word} goes with path {' or '.join(self.paths)}, got {op.path}")

    def sized(self, positions: int) -> Rho:
        """The rho for a map of so many positions; itself where any number will do."""
        return self


class _Static(Rho):
    """A rho without arguments of its own that looks at no score."""

    needs_score = False
    default_projections = ""


def require_projections(word: Any) -> None:
    """ValueError where heads or projections of a rho are none."""
    positive(word, heads=word.heads)
    if word.project is not None:
        ok = word.project == "none" or (
            isinstance(word.project, str)
            and word.project != ""
            and word.project == "".join(c for c in "qkvo" if c in word.project)
        )
        check(ok, word, "project", word.project, "none or letters of qkvo in this order")


@dataclass(frozen=True)
class _Plain(Rho):
    """A rho with heads and projections, and nothing else."""

    heads: int = 1
    project: str | None = None

    def __post_init__(self) -> None:
        require_projections(self)


@dataclass(frozen=True)
class Ones(_Plain):
    """alpha = 1."""

    word = "ones"
    primitive = ("IDENTITY", 1)
    needs_score = False
    default_projections = ""


@dataclass(frozen=True)
class Identity(_Plain):
    """alpha = score."""

    word = "identity"
    examples: ClassVar[dict[str, str]] = {
        "window_identity": "window((3, 5), cosine, dilation=2, mode=reflect) | box"
        " | identity(heads=2)*separable(coordinates)",
        "all_identity_causal": "all(cosine(coordinates=sinusoidal)) | causal | identity(heads=2)",
    }
    primitive = ("DYNAMIC_ATTENTION", 2)


@dataclass(frozen=True)
class Shares(Rho):
    """A rho that makes shares, which add up to one, of scale * score.

    ``kv`` heads of keys and values, each shared by heads / kv heads of queries: grouped-query attention (arXiv
    2305.13245), multi-query with one (arXiv 1911.02150).
    """

    primitive = ("DYNAMIC_ATTENTION", 2)
    heads: int = 1
    scale: float = 1.0
    project: str | None = None
    kv: int | None = None

    def __post_init__(self) -> None:
        require_projections(self)
        if self.kv is not None:
            positive(self, kv=self.kv)
            check(self.heads % self.kv == 0, self, "kv", self.kv, f"a divisor of heads={self.heads}")
            ok = self.project is None or set("kv") <= set(self.project)
            check(ok, self, "project", self.project, "left out, or with k and v, next to kv")
        number(self, "scale", self.scale)
        object.__setattr__(self, "scale", float(self.scale))


@dataclass(frozen=True)
class Softmax(Shares):
    """alpha = softmax over the slots of scale * score.

    ``kv`` heads of keys and values, each shared by heads / kv heads of queries: grouped-query attention (arXiv
    2305.13245), multi-query with one (arXiv 1911.02150).
    """

    word = "softmax"


@dataclass(frozen=True)
class Inverse(_Plain):
    """alpha = 1 / (distance + 1e-8), distance = -score."""

    word = "inverse"
    examples: ClassVar[dict[str, str]] = {
        "window_inverse": "window(3, euclidean(squared)) | box | inverse(project=qkv)",
        "nearest_squared": "nearest(5, euclidean(squared), grid(3)) | box | inverse(heads=2)*kernel(groups=2)",
    }
    primitive = ("DYNAMIC_ATTENTION", 2)


@dataclass(frozen=True)
class Normalized(_Plain):
    """alpha = score / sum of the scores over the slots: linear attention, with a similarity that is never negative.

    Source: arXiv 2006.16236, eq. 4; a row whose scores sum to zero is zero.
    """

    word = "normalized"
    examples: ClassVar[dict[str, str]] = {
        "all_linear_causal": "all(elu) | causal | normalized(heads=2)",
        "all_cross_linear": "all(elu, cross) | row | normalized(heads=2)",
    }
    primitive = ("DYNAMIC_ATTENTION", 2)

    def require(self, op: Basic) -> None:
        super().require(op)
        if not op.path.similarity.never_negative:
            raise ValueError(
                "normalized divides by the sum of the scores, which must not be negative: use elu, such as "
                f"{op.path.word}(..., elu), got {op.path}"
            )


@dataclass(frozen=True)
class Mean(_Plain):
    """alpha = 1 / number of valid slots: average pooling."""

    word = "mean"
    examples: ClassVar[dict[str, str]] = {
        "window_mean": "window(3, stride=2) | box | mean(heads=2, project=v)",
        "all_mean": "all(stride=2) | row | mean",
        "nearest_mean": "nearest(4, euclidean) | ranked | mean*kernel",
    }
    primitive = ("IDENTITY", 1)
    needs_score = False
    default_projections = ""


@dataclass(frozen=True)
class Max(_Static):
    """alpha = 1 for the slot with the channel's largest value (the first of them), 0 for the others: max pooling.

    Under `relative` or `edge` the largest is that of what these make of the slots.
    """

    word = "max"
    examples: ClassVar[dict[str, str]] = {
        "window_max": "window((3, 2), stride=2, mode=reflect) | box | max",
        "nearest_max": "nearest(4, cosine) | ranked | max",
        "block_max": "block((2, 3)) | box | max",
    }
    dynamic = True
    primitive = ("LARGEST", 2)  # which slot counts depends on the input
    paths = ("window", "block", "nearest", "first", "scattered", "axial")
    takes_kernel = False
    heads = 1
    project = None

    def require(self, op: Basic) -> None:
        for path in op.path.inside:
            if not one_of(path, self.paths):
                raise ValueError(f"{self.word} goes with path {' or '.join(self.paths)}, got {path}")


@dataclass(frozen=True)
class Generated(Rho):
    """alpha = one number per slot made from the query position's own features; ``groups`` of channels share them.

    Two pointwise maps with a ReLU between, by a ``reduction`` of the channels, make it an involution (arXiv 2103.06255,
    eq. 6, without its batch norm); reduction=0 is a single map. ``activation`` is none, softmax over the slots
    (lightweight dynamic convolution, arXiv 1901.10430; those outside the grid take their share and read zero) or
    sigmoid.
    """

    word = "generated"
    examples: ClassVar[dict[str, str]] = {
        "window_generated": "window(3, stride=2) | box | generated(groups=2, activation=sigmoid)*kernel",
    }
    dynamic = True
    primitive = ("DYNAMIC_KERNEL", 2)
    paths = ("window",)
    needs_score = False
    default_projections = ""
    heads: int = field(default=1, metadata={"notation": "groups", "always": True, "named": True})
    reduction: int = 4
    activation: str = "none"
    project: str | None = None

    def __post_init__(self) -> None:
        require_projections(self)
        check(type(self.reduction) is int and self.reduction >= 0, self, "reduction", self.reduction, "an int >= 0")
        check(
            self.activation in ("none", "softmax", "sigmoid"),
            self, "activation", self.activation, "none, softmax or sigmoid",
        )  # fmt: skip


@dataclass(frozen=True)
class Modulated(_Static):
    """alpha = what the path's own net makes of the input for every slot, beside its offsets.

    ``activation`` is sigmoid (deformable v2, arXiv 1811.11168), softmax over the slots of a group (Deformable DETR,
    arXiv 2010.04159; DCNv3, arXiv 2211.05778), whether they lie on the map or not, or none (DCNv4, arXiv 2401.06197).
    """

    word = "modulated"
    dynamic = True
    primitive = ("DYNAMIC_KERNEL", 2)
    paths = ("deformable", "points")
    heads = 1
    activation: str = "sigmoid"
    project: str | None = None

    def __post_init__(self) -> None:
        require_projections(self)
        known = ("sigmoid", "softmax", "none")
        check(self.activation in known, self, "activation", self.activation, "sigmoid, softmax or none")
        if self.project is not None:
            check(not set("qk") & set(self.project.replace("none", "")), self, "project", self.project, "v, o or vo")


@dataclass(frozen=True)
class Table(_Static):
    """alpha = a learned matrix of ``outputs`` x ``inputs`` positions: a grid of exactly this many (arXiv 2105.01601).

    ``outputs`` other than ``inputs`` (the default) are for sequences.
    """

    word = "table"
    examples: ClassVar[dict[str, str]] = {
        "all_table": "all | row | table(42)",
    }
    primitive = ("SHARED_KERNEL", 1)
    paths = ("all",)
    takes_kernel = False
    inputs: int
    outputs: int | None = field(default=None, metadata={"positional": True})
    heads = 1
    project = None

    def __post_init__(self) -> None:
        positive(self, inputs=self.inputs)
        if self.outputs is not None:
            positive(self, outputs=self.outputs)

    def require(self, op: Basic) -> None:
        super().require(op)
        if not all_ones(getattr(op.path, "stride", 1)):
            raise ValueError(f"{self} has a row for every output already; leave stride out, got {op.path}")

    def sized(self, positions: int) -> Rho:
        return Table(positions)


@dataclass(frozen=True)
class Selective(Rho):
    """alpha[i, j] = C_i exp(sum of A delta over the positions from j + 1 to i) B_j delta_j: a selective state space.

    B, C and the step delta are pointwise maps of what is scanned; the decay A is negative and learned, the skip D too.
    Without ``heads`` every channel has a decay for each number of its state and a delta through ``rank`` numbers
    (Mamba, arXiv 2312.00752; rank: a 16th of the channels). With ``heads`` a head's channels share one decay and delta
    (Mamba-2's structured dual, arXiv 2405.21060).
    """

    word = "selective"
    dynamic = True
    primitive = ("SELECTIVE", 2)
    paths = ("scan",)
    takes_kernel = False
    needs_score = False
    default_projections = ""
    scan_heads: int | None = field(default=None, metadata={"notation": "heads"})
    rank: int | None = None
    project: str | None = None
    heads = 1

    def __post_init__(self) -> None:
        require_projections(self)
        if self.scan_heads is not None:
            positive(self, heads=self.scan_heads)
            check(self.rank is None, self, "rank", self.rank, "left out next to heads")
        if self.rank is not None:
            positive(self, rank=self.rank)
        if self.project is not None:
            check(not set("qk") & set(self.project.replace("none", "")), self, "project", self.project, "v, o or vo")


class Kernel(Word):
    """Learned weights over slots, in torch's layout (out, in / groups, *slots)."""

    kind = "kernel"
    edges: ClassVar[bool] = False  # whether what a slot brings depends on the query's own value; no numbers for slots
    everywhere: ClassVar[bool] = False  # whether its slots are the offsets of a whole map
    default_projections: ClassVar[str] = ""  # where the rho does not say; empty: the rho's own


@dataclass(frozen=True)
class Dense(Kernel):
    """A full convolution kernel. ``coordinates`` appends the positions, encoded, to the values it reads."""

    word = "kernel"
    primitive = ("SHARED_KERNEL", 1)
    groups: int = 1
    coordinates: bool | str = False

    def __post_init__(self) -> None:
        check_coordinates(self)
        positive(self, groups=self.groups)


@dataclass(frozen=True)
class Depthwise(Kernel):
    """One weight per channel and slot."""

    word = "depthwise"
    primitive = ("SHARED_KERNEL", 1)


@dataclass(frozen=True)
class Separable(Kernel):
    """Depthwise over slots, then a pointwise map of the channels."""

    word = "separable"
    primitive = ("SHARED_KERNEL", 1)
    groups: int = 1
    coordinates: bool | str = False

    @property
    def primitives(self) -> dict[str, float]:
        """The kernel, and the pointwise map, which has no path and no shape of its own."""
        return {"SHARED_KERNEL": 1, "POINTWISE": 1}

    def __post_init__(self) -> None:
        check_coordinates(self)
        positive(self, groups=self.groups)


@dataclass(frozen=True)
class Experts(Kernel):
    """``count`` kernels, mixed anew for every input: their shares come from its mean over all positions.

    Two pointwise maps with a ReLU between, by a ``reduction`` of the channels, then softmax(. / temperature): dynamic
    convolution over kernels (arXiv 1912.03458, eq. 2 to 4).
    """

    word = "experts"
    examples: ClassVar[dict[str, str]] = {
        "window_experts": "window(3, mode=reflect, stride=2) | box | experts(2)",
        "nearest_experts": "nearest(3, dot) | box | experts(2)",
    }
    takes_keys = False  # their shares come from a mean over all positions
    dynamic = True
    primitive = ("DYNAMIC_KERNEL", 2)
    count: int
    reduction: int = 4
    temperature: float = 30.0

    def __post_init__(self) -> None:
        positive(self, count=self.count, reduction=self.reduction)
        number(self, "temperature", self.temperature)
        check(self.temperature > 0, self, "temperature", self.temperature, "above 0")
        object.__setattr__(self, "temperature", float(self.temperature))

    def require(self, op: Basic) -> None:
        if op.weight.rho.word != "ones":
            raise ValueError(f"experts goes with rho ones, got {op.weight}")


@dataclass(frozen=True)
class Shift(Kernel):
    """ACmix's convolution: k^2 pointwise maps of the 3 x heads projections, shifted and summed.

    Reads query, key and value (arXiv 2111.14556, eq. 9-11). ``interleaved`` leaves the output channels
    in the grouped convolution's order (head dimension first), as the public code does. ``bias`` adds one number to each
    of the k^2 maps before they are shifted, as the public Swin layer does.
    """

    word = "shift"
    examples: ClassVar[dict[str, str]] = {
        "shift_bias": "window(3, stride=2) | box | shift(2, interleaved, bias)",
    }
    default_projections = "qkv"
    primitive = ("SHARED_KERNEL", 1)
    heads: int
    interleaved: bool = False
    bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, heads=self.heads)

    @property
    def takes_keys(self) -> bool:  # type: ignore[override]
        """Without a bias, which stands at every position of the map."""
        return not self.bias

    def require(self, op: Basic) -> None:
        plain = op.path.word == "window" and op.shape.word == "box" and op.weight.rho.word == "ones"
        if not (plain and set("qkv") <= set(op.weight.projections)):
            raise ValueError(
                "shift goes with window | box, rho ones and projections q, k, v: window(3) | box | shift(4)"
            )
