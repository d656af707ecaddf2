"""Write the files of a run, each completely or not at all, except for steps.jsonl, which grows by a line per round."""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TextIO

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from specvlm.errors import UserError
from specvlm.parsing.files import open_regular

FILES = ("config.yaml", "steps.jsonl", "summary.json")
ATTENTION = "attention"


@contextmanager
def files_of(folder: Path | None) -> Iterator[None]:
    """Remove the files of an earlier run before the block, and those of this run if the block raises an OSError.

    After any other error, and after a broken pipe, the files stay: a run that is out of memory keeps partial results.

    Args:
        folder: The run's folder. None: write nothing.

    Raises:
        UserError: The folder holds the samples of a job, or cannot be written.
    """
    if folder is None:
        yield
        return

    def clear() -> None:
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / ATTENTION, ignore_errors=True)

    if any(folder.glob("samples*.jsonl")):
        raise UserError(f"{folder} holds the samples of a job: take another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        clear()
        yield
    except BrokenPipeError:  # comes from the terminal, not from the folder
        raise
    except OSError as error:
        if folder.is_dir():
            clear()
        raise UserError(f"cannot write into {folder}: {error.strerror or error}") from error


def steps_file(folder: Path | None) -> TextIO:
    """Open steps.jsonl for writing; the null device if there is no folder."""
    if folder is None:
        return Path(os.devnull).open("w")
    file: TextIO = open_regular(folder / "steps.jsonl", "w")
    return file


def check_there(file: IO[Any]) -> None:
    """Raise FileNotFoundError if an open file was removed or moved: writes would still succeed, but be lost."""
    try:
        same = os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except FileNotFoundError:
        same = False
    if not same:
        raise FileNotFoundError(errno.ENOENT, "it was removed or moved while being written", file.name)


def write_yaml(path: Path, content: Any) -> None:
    """Write plain data as YAML."""
    write_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=2**31))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write plain data as JSON."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: readers never see half of it, and the last of several writers wins."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def attention_file(folder: Path, number: int) -> Path:
    """Path of the recorded attention of a sample. number: index in the data set; 0 in a run of one video."""
    return folder / ATTENTION / f"{number}.safetensors"


def write_attention(folder: Path | None, number: int, attention_N: Tensor) -> None:
    """Write attention scores, (N,) for N video tokens, as float16 multiples of their mean; nothing without a folder.

    The scores themselves would underflow in float16.
    """
    if folder is None:
        return
    path = attention_file(folder, number)
    path.parent.mkdir(exist_ok=True)
    mean = attention_N.float().mean().clamp(min=torch.finfo(torch.float32).tiny)
    save_file({"verifier_attention": (attention_N.float() / mean).half().cpu()}, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)
