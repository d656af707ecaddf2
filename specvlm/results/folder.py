"""A run's own files: what it writes where, whole or not at all."""

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
    """The run's files: none of an earlier run stay, none of this one if cut short. folder: None writes nothing."""
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
    except BrokenPipeError:  # of what reads the terminal's output
        raise
    except OSError as error:
        if folder.is_dir():
            clear()
        raise UserError(f"cannot write into {folder}: {error.strerror or error}") from error


def steps_file(folder: Path | None) -> TextIO:
    if folder is None:
        return Path(os.devnull).open("w")
    file: TextIO = open_regular(folder / "steps.jsonl", "w")
    return file


def check_there(file: IO[Any]) -> None:
    """A file that was removed takes what is written, and nobody will ever read it. Raises OSError."""
    try:
        same = os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except FileNotFoundError:
        same = False
    if not same:
        raise FileNotFoundError(errno.ENOENT, "it was removed, or put elsewhere, while this wrote into it", file.name)


def write_yaml(path: Path, content: Any) -> None:
    """Plain data, which no reader has to resolve."""
    write_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=2**31))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """All or nothing: a reader never sees half a file, and of several writers the last one's stays."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def attention_file(folder: Path, number: int) -> Path:
    """Of the sample of that number in its data set."""
    return folder / ATTENTION / f"{number}.safetensors"


def write_attention(folder: Path | None, number: int, attention_N: Tensor) -> None:
    """As multiples of its mean, since float16 has no room for the shares themselves."""
    if folder is None:
        return
    path = attention_file(folder, number)
    path.parent.mkdir(exist_ok=True)
    mean = attention_N.float().mean().clamp(min=torch.finfo(torch.float32).tiny)
    save_file({"verifier_attention": (attention_N.float() / mean).half().cpu()}, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)
