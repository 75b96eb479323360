"""How much of other people's networks the x-ray measures: the table of docs/xray.md.

    python recipes/xray_networks.py [NETWORK ...]

Random weights, two images each. Results are kept in benchmarks/results/xray.json, so that a part can be run again.
"""

from __future__ import annotations

import argparse
import gc
import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from nearfold import xray
from nearfold.models.named import named

ROOT = Path(__file__).parents[1]
PAGE, KEPT = ROOT / "docs" / "xray.md", ROOT / "benchmarks" / "results" / "xray.json"
START, END = "<!-- table: recipes/xray_networks.py -->\n", "<!-- end of the table -->"
IMAGES = 2
SIZE = (3, 224, 224)
"""Of images, where a network does not say."""
NETWORKS = {
    "timm": (
        *("resnet18", "resnext26ts", "seresnext26d_32x4d", "res2net50_26w_4s", "regnety_002", "repvgg_a0", "dla34"),
        *("hrnet_w18_small", "densenet121", "efficientnet_b0", "mobilenetv3_small_100", "ghostnet_100"),
        *("convnextv2_atto", "inception_next_atto", "lambda_resnet26t", "halonet26t", "botnet26t_256"),
        *("vit_tiny_patch16_224", "beitv2_base_patch16_224", "swin_tiny_patch4_window7_224", "pvt_v2_b0"),
        *("twins_pcpvt_small", "coat_lite_tiny", "crossvit_9_240", "cait_xxs24_224", "xcit_nano_12_p16_224"),
        *("pit_ti_224", "poolformer_s12", "mixer_s32_224", "resmlp_12_224", "gmlp_s16_224", "mobilevit_xxs"),
        *("maxvit_rmlp_pico_rw_256", "coatnet_pico_rw_224", "edgenext_xx_small", "levit_128s", "efficientformer_l1"),
        *("fastvit_t8", "gcvit_xxtiny", "focalnet_tiny_srf", "mambaout_femto", "tnt_s_patch16_224"),
    ),
    "torchvision": (
        *("alexnet", "vgg11", "resnet50", "googlenet", "squeezenet1_1", "shufflenet_v2_x0_5", "mobilenet_v2"),
        *("mnasnet0_5", "swin_v2_t"),
    ),
    "transformers": (
        *("ViTModel", "DeiTModel", "BeitModel", "Dinov2Model", "ViTMAEModel", "ResNetModel", "SegformerModel"),
        *("PvtModel", "SwinModel", "ConvNextModel"),
    ),
}


def measured(spec: str) -> dict[str, Any]:
    """A network's layers: how many there are, are measured, are measured in the words; why the others are left."""
    torch.manual_seed(0)
    model, size = named(spec)
    seen = xray(model.eval(), torch.randn(IMAGES, *(size or SIZE)))
    return {
        "layers": len(seen.layers) + len(seen.left),
        "measured": len(seen.layers),
        "words": sum(layer.way == "words" for layer in seen.layers),
        "left": dict(sorted(Counter(f"{left.kind}: {left.reason}" for left in seen.left).items())),
        "seconds": round(seen.seconds, 1),
        "note": seen.note,
    }


def table(kept: dict[str, dict[str, Any]]) -> str:
    """The table, in Markdown."""
    total, done, words = (sum(found[key] for found in kept.values()) for key in ("layers", "measured", "words"))
    lines = [
        f"{len(kept)} networks with random weights, {IMAGES} images each: {done} of {total} layers "
        f"({100 * done / total:.1f} %) are measured, {words} of them in the words.",
        "",
        "| network | layers | measured | in the words | left out |",
        "|---|---:|---:|---:|---|",
    ]
    for spec, found in kept.items():
        kinds = Counter[str]()
        for why, count in found["left"].items():
            kinds[why.partition(":")[0]] += count
        left = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        lines.append(f"| {spec} | {found['layers']} | {found['measured']} | {found['words']} | {left} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure what is asked for, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", help="such as timm:resnet18 (default: those that have no result yet)")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    everyone = [f"{library}:{name}" for library, names in NETWORKS.items() for name in names]
    for spec in args.networks or [spec for spec in everyone if spec not in kept]:
        kept[spec] = measured(spec)
        print(spec, kept[spec], flush=True)
        KEPT.write_text(json.dumps({spec: kept[spec] for spec in everyone if spec in kept}, indent=1) + "\n")
        gc.collect()
    before, _, rest = PAGE.read_text().partition(START)
    PAGE.write_text(before + START + "\n" + table(kept) + "\n" + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
