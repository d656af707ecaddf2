"""Turn bf16 weights into the checkpoint folders that ship: `python -m experiments.embedded_pair.export --family qwen2_5_vl
--folder runs/embedded_pair/qwen2_5_vl --plain plain-1500 --aware aware-6000`."""

import argparse
from pathlib import Path

from safetensors.torch import load_file

from experiments.embedded_pair.models import build, load_weights, save_folder
from experiments.embedded_pair.tokenizer import FAMILIES

ASSETS = Path(__file__).resolve().parents[2] / "specvlm" / "assets"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=FAMILIES, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="holds target.safetensors and the drafts' files")
    parser.add_argument("--plain", required=True, help="name of the draft to ship as plain")
    parser.add_argument("--aware", help="name of the draft to ship as aware, if there is one")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="the folders go into its family's folder")
    args = parser.parse_args()
    for role, source in (("target", "target"), ("plain", args.plain), *([("aware", args.aware)] if args.aware else [])):
        model = build(args.family, "target" if role == "target" else "draft")
        load_weights(model, load_file(args.folder / f"{source}.safetensors"))
        save_folder(model, args.family, args.assets / args.family / role)


if __name__ == "__main__":
    main()
