"""What lies in a checkpoint folder: its files, its configuration, the files of its weights. All of it is somebody else's, so
whatever is wrong with it ends in one line, before any weight is read.
"""

import re
from pathlib import Path
from sys import float_info
from typing import Any

import torch

from specvlm.errors import UserError, explained, first_line
from specvlm.parsing.files import MOST_BYTES
from specvlm.video.settings import read_json

DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PLAIN_NAME = re.compile(r"[\w-][\w.-]*\.safetensors")
MOST_PARTS = 1000  # layers, experts, labels: what a configuration counts and Python would loop over
PARTS = re.compile(r"^(num|n)_.*(layer|block|stage|expert|label)|layers$|^depths?$")
LARGEST = 2**31  # of any number in a config.json
SAFELY = {"use_safetensors": True, "trust_remote_code": False, "local_files_only": True}  # how models are loaded
PACKAGES = {"quark": "amd-quark"}  # of methods that are not called as what has to be installed for them


TEXTS = (".json", ".jinja", ".txt", ".model")


def folder_of(path: str | Path, weights: bool = False) -> Path:
    """The checkpoint's folder; a name of the hub is fetched, its weights only if they are wanted. Raises UserError."""
    folder = Path(path)
    if not folder.exists() and (folder.is_absolute() or len(folder.parts) != 2):
        raise UserError(f"{path}: no such model folder")
    if not folder.exists():
        from huggingface_hub import snapshot_download

        wanted = ["*.json", "*.jinja", "*.txt", *(["*.safetensors"] if weights else [])]
        with explained(f"{path}: no such model folder, and it cannot be fetched"):
            folder = Path(snapshot_download(str(path), allow_patterns=wanted))
    if not (folder / "config.json").is_file():
        raise UserError(f"{path}: has no config.json, so it is not a Hugging Face model folder")
    for found in sorted(folder.iterdir()):  # Hugging Face opens some of them itself, and a pipe never ends
        check_entry(found)
    return folder


def check_entry(path: Path) -> None:
    """Raises UserError for what is neither a file nor a folder, and for a text file of more than a checkpoint has."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{path} is a pipe or a device, not a file")
    if path.is_file() and path.suffix in TEXTS and path.stat().st_size > MOST_BYTES:
        raise UserError(f"{path} has more than {MOST_BYTES} bytes, the most that is read of such a file")


def config_of(folder: Path) -> Any:
    """The configuration, its attention a stand-in for ours. Raises UserError if unusable, or of files elsewhere."""
    from transformers import AutoConfig

    check_numbers(folder, read_json(folder / "config.json"))
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder}: has an adapter_config.json: merge the adapter into the weights, or take the file out")
    with explained(f"{folder}: the config.json cannot be used"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        config._attn_implementation = "sdpa"  # whatever it names may not be installed, and ours takes its place
    own = config.dtype
    if own is not None and str(own).removeprefix("torch.") not in DTYPES:
        raise UserError(f"{folder}: dtype={own} in config.json is none of {', '.join(DTYPES)}")
    return config


def check_numbers(folder: Path, found: Any, key: str = "") -> None:
    """Raise UserError for numbers that no model has, since making a model of them would never end."""
    if isinstance(found, dict):
        for name, value in found.items():
            check_numbers(folder, value, str(name))
    elif isinstance(found, list):
        for value in found:
            check_numbers(folder, value, key)
    elif isinstance(found, int | float):
        most = MOST_PARTS if PARTS.search(key) else LARGEST if isinstance(found, int) else float_info.max
        if not -LARGEST <= found <= most:
            raise UserError(f"{folder}: {key}={str(found)[:30]} in config.json: at most {most} can be loaded")


def weight_files(folder: Path, config: Any) -> list[Path]:
    """The files that Hugging Face will read, by its rules: what config.json names, else model.safetensors, else those of the
    index. Raises UserError where there are none, or where one is anything but a safetensors file in this very folder.
    """
    name = getattr(config, "transformers_weights", None)
    if name is None:
        name = INDEX if (folder / INDEX).is_file() and not (folder / SINGLE).is_file() else SINGLE
    if isinstance(name, str) and name.endswith(".index.json"):
        _plain(folder, name.removesuffix(".index.json"), "config.json")
        names = _shards(folder / name)
    else:
        names = [_plain(folder, name, "config.json")]
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{folder}: has a config.json but no *.safetensors weights: {name} is not there")
    if any(folder.glob("shard-*-model-*.safetensors")):
        raise UserError(f"{folder}: holds shards of a distributed checkpoint: save it anew with save_pretrained")
    return [folder / name for name in names]


def _shards(index: Path) -> list[str]:
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise UserError(f"{index}: has no weight_map, which says where each tensor is")
    return sorted({_plain(index.parent, name, index.name) for name in placed.values()})


def _plain(folder: Path, name: Any, where: str) -> str:
    if not isinstance(name, str) or not PLAIN_NAME.fullmatch(name):
        raise UserError(f"{folder}: {where} wants weights from {name!r}: only *.safetensors in the folder itself are read")
    return name


def tensors_in(path: Path) -> dict[str, tuple[str, int]]:
    """By name each tensor's dtype, as safetensors writes it, and size. Raises UserError for a damaged file."""
    from safetensors import safe_open

    with explained(f"{path}: the weights cannot be loaded"), safe_open(path, framework="pt") as held:
        slices = {name: held.get_slice(name) for name in held.keys()}  # noqa: SIM118
        return {name: (part.get_dtype(), torch.Size(part.get_shape()).numel()) for name, part in slices.items()}


def dtype_in(folder: Path, config: Any, dtype: str) -> torch.dtype:
    """What weights are held in. "auto": as config.json says, else as the first tensor of floats, like Hugging Face."""
    if dtype != "auto":
        return DTYPES[dtype]
    if config.dtype is not None:
        return DTYPES[str(config.dtype).removeprefix("torch.")]
    known = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    found = (known[kind] for kind, _ in tensors_in(weight_files(folder, config)[0]).values() if kind in known)
    return next(found, torch.float32)


def quantization_of(config: Any) -> Any:
    """What a checkpoint that is quantised says of it, as in its config.json; None for another."""
    found = getattr(config, "quantization_config", None) or getattr(config.get_text_config(), "quantization_config", None)
    return found.to_dict() if found and not isinstance(found, dict) and hasattr(found, "to_dict") else found


def method_of(config: Any) -> str | None:
    """By which a checkpoint is quantised, None for not at all."""
    found = quantization_of(config)
    return str(found.get("quant_method") or "bitsandbytes") if found else None


def quantizer_of(folder: Path, config: Any) -> Any:
    """Hugging Face's reader of a quantised checkpoint, else None. Raises UserError if it cannot be read here."""
    from transformers.quantizers.auto import AutoHfQuantizer

    found = quantization_of(config)
    if not found:
        return None
    if not isinstance(found, dict):
        raise UserError(f"{folder}: quantization_config in config.json is no object of settings")
    method = method_of(config)
    with explained(f"{folder}: is quantised by {method}, which cannot be loaded here"):
        if not AutoHfQuantizer.supports_quant_method(found):
            raise UserError(f"{folder}: is quantised by {method!r}, which the installed transformers does not know")
        try:
            reader = AutoHfQuantizer.from_config(AutoHfQuantizer.merge_quantization_configs(found, None), pre_quantized=True)
            reader.validate_environment(device_map=None, weights_only=True)
        except ImportError as error:
            said = first_line(error)
            hint = "" if "pip install" in said else f": pip install {PACKAGES.get(str(method), method)}"
            raise ImportError(said + hint) from None
    return reader


def packed_bytes(folder: Path, config: Any) -> int | None:
    """Memory of a quantised checkpoint's weights, if they stay as in its files; None for any other checkpoint."""
    reader = quantizer_of(folder, config)
    if reader is None or getattr(reader.quantization_config, "dequantize", False):
        return None
    if method_of(config) == "compressed-tensors" and not getattr(reader, "use_fp8_kernel", False):
        return None
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) or None
