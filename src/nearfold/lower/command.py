"""`nearfold explain`: how an operator would run on inputs of one shape."""

from __future__ import annotations

import argparse

import torch

from nearfold.grammar import parse
from nearfold.lower.explain import explain
from nearfold.options import PIXELS, brief, sizes, whole

EXAMPLES = """\
examples:
  nearfold explain "window(3) | box | kernel" --shape 16,64,32,32
  nearfold explain "nearest(9, cosine, self) | ranked | kernel" --shape 16x64x32x32 --dtype bfloat16
  nearfold explain convnn --shape 8,32,100 --no-grad"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to its parser."""
    parser.add_argument("notation", metavar="NOTATION", help="an operator in the notation, or its name in `ops`")
    parser.add_argument(
        "--shape", type=_shape, required=True, metavar="B,C,H,W",
        help="shape of the input: batch, channels and the grid (B,C,N for sequences)",
    )  # fmt: skip
    parser.add_argument("--out-channels", type=whole(1, PIXELS), metavar="C", help="default: as many as come in")
    parser.add_argument("--dtype", default="float32", help="of the input, as in torch (default: float32)")
    parser.add_argument("--device", default="cpu", help="where it would run (default: cpu)")
    parser.add_argument(
        "--grad", action=argparse.BooleanOptionalAction, default=True, help="with gradients (default) or without"
    )


def run(args: argparse.Namespace) -> int:
    """Print the explanation: the exit code."""
    dtype = getattr(torch, args.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(
            f"--dtype: torch has no dtype {brief(args.dtype)}; an operator works on float32, bfloat16, float16, float64"
        )
    try:
        device = torch.device(args.device).type
    except RuntimeError:
        raise ValueError(f"--device: torch has no device {brief(args.device)}; for instance cpu, cuda") from None
    print(explain(parse(args.notation), args.shape, args.out_channels, dtype=dtype, device=device, grad=args.grad))
    return 0


def _shape(text: str) -> tuple[int, ...]:
    return sizes(text, 3, "batch, channels and grid, such as 16,64,32,32")
