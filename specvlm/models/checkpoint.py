"""Read and validate the files of a checkpoint folder: configuration, weight files, quantisation.

A checkpoint comes from elsewhere, so its files are checked before the weights are loaded. Faults raise a UserError.
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
MOST_PARTS = 1000  # maximum number of layers, experts or labels in a config.json, since code loops over them
PARTS = re.compile(r"^(num|n)_.*(layer|block|stage|expert|label)|layers$|^depths?$")
LARGEST = 2**31  # largest absolute value of any other whole number in a config.json
SAFELY = {"use_safetensors": True, "trust_remote_code": False, "local_files_only": True}  # arguments of from_pretrained
PACKAGES = {"quark": "amd-quark"}  # quantisation methods whose package has a different name


TEXTS = (".json", ".jinja", ".txt", ".model")  # suffixes of files that are read as a whole, so their size is limited


def folder_of(path: str | Path, weights: bool = False, revision: str | None = None) -> Path:
    """Return the checkpoint's folder, downloading it if `path` is a name on the hub.

    Args:
        path: Folder, or "owner/name" on the hub.
        weights: Download the weights as well.
        revision: Branch, tag or commit on the hub; by default its main branch.

    Raises:
        UserError: There is no such model, a revision is given for a folder, the folder has no config.json, or it
            contains a pipe, a device or a text file that is too large.
    """
    folder = Path(path)
    if not folder.exists() and (folder.is_absolute() or len(folder.parts) != 2):
        raise UserError(f"{path}: no such model folder")
    if folder.exists() and revision:
        raise UserError(f"revision={revision} is for a name on the hub, and {path} is a folder: leave it out")
    if not folder.exists():
        from huggingface_hub import snapshot_download

        wanted = ["*.json", "*.jinja", "*.txt", *(["*.safetensors"] if weights else [])]
        with explained(f"{path}: no such model folder, and it cannot be fetched"):
            folder = Path(snapshot_download(str(path), revision=revision, allow_patterns=wanted))
    if not (folder / "config.json").is_file():
        raise UserError(f"{path}: has no config.json, so it is not a Hugging Face model folder")
    for found in sorted(folder.iterdir()):  # Hugging Face opens some of them itself, and would wait for a pipe forever
        check_entry(found)
    return folder


def check_entry(path: Path) -> None:
    """Raise UserError for a pipe, socket or device, and for a text file of more than MOST_BYTES bytes."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{path} is a pipe or a device, not a file")
    if path.is_file() and path.suffix in TEXTS and path.stat().st_size > MOST_BYTES:
        raise UserError(f"{path} has more than {MOST_BYTES} bytes, the most that is read of such a file")


def config_of(folder: Path) -> Any:
    """Load the configuration. Raises UserError if it cannot be used or the folder holds an adapter.

    The attention implementation that it names is replaced by "sdpa", which stands in until the model gets ours.
    """
    from transformers import AutoConfig

    check_numbers(folder, read_json(folder / "config.json"))
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder}: has an adapter_config.json: merge the adapter into the weights, or take the file out")
    with explained(f"{folder}: the config.json cannot be used"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        config._attn_implementation = "sdpa"  # the one it names may not be installed; ours replaces it later
    own = config.dtype
    if own is not None and str(own).removeprefix("torch.") not in DTYPES:
        raise UserError(f"{folder}: dtype={own} in config.json is none of {', '.join(DTYPES)}")
    return config


def check_numbers(folder: Path, found: Any, key: str = "") -> None:
    """Raise UserError if config.json has numbers so large that building the model would never finish.

    Args:
        folder: The model folder, for messages.
        found: Content of config.json, or a part of it.
        key: Key of that part.
    """
    if isinstance(found, dict):
        for name, value in found.items():
            check_numbers(folder, value, str(name))
    elif isinstance(found, list):
        for value in found:
            check_numbers(folder, value, key)
    elif isinstance(found, int | float):
        most = MOST_PARTS if PARTS.search(key) else LARGEST if isinstance(found, int) else float_info.max
        least = -LARGEST if isinstance(found, int) else -float_info.max
        if not least <= found <= most:
            bound = f"at least {least}" if found < least else f"at most {most}"
            raise UserError(f"{folder}: {key}={str(found)[:30]} in config.json: {bound} can be loaded")


def weight_files(folder: Path, config: Any) -> list[Path]:
    """List the weight files that Hugging Face will read.

    These are the file or index that config.json names, else model.safetensors, else the files in the index.

    Raises:
        UserError: A file is missing or is not a safetensors file directly in this folder, the index is invalid, or the
            folder holds shards of a distributed checkpoint.
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
        raise UserError(f"{folder}: holds shards of a distributed checkpoint: save it again with save_pretrained")
    return [folder / name for name in names]


def _shards(index: Path) -> list[str]:
    """Return the names of the weight files in an index. Raises UserError if it has none, or one is not a plain name."""
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise UserError(f"{index}: has no weight_map, which says where each tensor is")
    return sorted({_plain(index.parent, name, index.name) for name in placed.values()})


def _plain(folder: Path, name: Any, where: str) -> str:
    """Return a weight file's name. Raises UserError unless it is a plain *.safetensors name without a path."""
    if not isinstance(name, str) or not PLAIN_NAME.fullmatch(name):
        raise UserError(f"{folder}: {where} names weights {name!r}: only *.safetensors in the folder itself are read")
    return name


def tensors_in(path: Path) -> dict[str, tuple[str, int]]:
    """Map each tensor's name to its dtype (as safetensors spells it) and number of elements.

    Raises UserError for a damaged file.
    """
    from safetensors import safe_open

    with explained(f"{path}: the weights cannot be loaded"), safe_open(path, framework="pt") as held:
        slices = {name: held.get_slice(name) for name in held.keys()}  # noqa: SIM118
        return {name: (part.get_dtype(), torch.Size(part.get_shape()).numel()) for name, part in slices.items()}


def dtype_in(folder: Path, config: Any, dtype: str) -> torch.dtype:
    """Return the dtype to load weights in.

    As in Hugging Face, "auto" is that of config.json, else that of the first float tensor in the first weight file,
    else float32.
    """
    if dtype != "auto":
        return DTYPES[dtype]
    if config.dtype is not None:
        return DTYPES[str(config.dtype).removeprefix("torch.")]
    known = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    found = (known[kind] for kind, _ in tensors_in(weight_files(folder, config)[0]).values() if kind in known)
    return next(found, torch.float32)


def quantization_of(config: Any) -> Any:
    """Return the quantisation settings in config.json, unchecked; None or empty if the checkpoint is not quantised."""
    found = getattr(config, "quantization_config", None) or getattr(config.get_text_config(), "quantization_config", None)
    return found.to_dict() if found and not isinstance(found, dict) and hasattr(found, "to_dict") else found


def method_of(config: Any) -> str | None:
    """Return the name of the checkpoint's quantisation method; None if it is not quantised.

    Settings without a method are those of bitsandbytes.
    """
    found = quantization_of(config)
    return str(found.get("quant_method") or "bitsandbytes") if found else None


def quantizer_of(folder: Path, config: Any) -> Any:
    """Return Hugging Face's quantizer for the checkpoint; None if the checkpoint is not quantised.

    Raises UserError if the quantizer cannot be used, for example because a package is missing.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    found = quantization_of(config)
    if not found:
        return None
    if not isinstance(found, dict):
        raise UserError(f"{folder}: quantization_config in config.json is not an object of settings")
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
    """Return the bytes of a checkpoint's weight files if it is quantised and stays so in memory, else None."""
    reader = quantizer_of(folder, config)
    if reader is None or getattr(reader.quantization_config, "dequantize", False):
        return None
    if method_of(config) == "compressed-tensors" and not getattr(reader, "use_fp8_kernel", False):
        return None
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) or None
