"""What a wheel must do where there is no compiler and no clone; the release workflow runs it on every wheel.

    python tests/wheel.py

Not collected by pytest: it is for an environment that has the wheel, and onnxruntime, and nothing of this tree.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    """Each step ends the process where it fails."""
    import torch

    import nearfold
    from nearfold.export import to_onnx
    from nearfold.kernels import engine
    from nearfold.nn import ConvNN2d

    here = Path(nearfold.__file__)
    assert "site-packages" in here.parts, f"this is {here}, not an installed wheel"
    assert engine.get() is not None, "the wheel has no compiled engine"

    layer, x = ConvNN2d(8, 8, k=9), torch.randn(2, 8, 12, 12)
    with tempfile.TemporaryDirectory() as folder:
        print(to_onnx(layer.eval(), x, Path(folder) / "layer.onnx", dynamic="sizes"))
        command = [sys.executable, "-m", "nearfold"]
        subprocess.run([*command, "ops"], check=True, stdout=subprocess.DEVNULL)
        subprocess.run([*command, "study", "spectrum", "--seeds", "1", "--out", folder], check=True)
    if "--compiled" in sys.argv:  # torch.compile wants a compiler of its own
        step = torch.compile(layer.train())
        step(x).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    print(f"{here.parent}: all done")


if __name__ == "__main__":
    main()
