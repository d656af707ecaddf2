"""Read files that somebody else wrote: within bounds, as plain data, with nothing in them carried out or filled in."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import yaml

from specvlm.errors import UserError, message

MOST_BYTES = 64 * 2**20  # of a file that is read whole
MOST_YAML = 2**20
DEEPEST = 100  # a parser that calls itself ends the process where texts are nested deeply
Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MOST_NODES = 100_000  # of a YAML file, with what aliases stand for counted each time


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """A file's content. Raises UserError for a pipe or the like, and if too long; OSError for what cannot be read."""
    try:
        opened = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))  # noqa: SIM115
    except ValueError as error:  # a name that no file can have
        raise UserError(f"{path} is no file ({error})") from None
    with opened as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise UserError(f"{path} is no file")
        content = file.read(most + 1)
    if len(content) > most:
        raise UserError(f"{path} has more than {most} bytes, the most that is read of such a file")
    return content


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """The same as text. Raises UserError for what is not UTF-8, too."""
    try:
        return read_bytes(path, most).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8") from None


def json_of(text: str | bytes) -> Any:
    """Raises ValueError for what is no JSON, and for what is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def nested(value: Any, most: int = DEEPEST) -> bool:
    """Are there more than `most` lists and objects in each other? What is read back has to be parsed."""
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return most < 0 or any(nested(part, most - 1) for part in inner)


def read_yaml(path: Path) -> Any:
    """A YAML file's plain data, interpolations as text. Raises UserError if none, or over MOST_NODES values."""
    text = read_text(path, MOST_YAML)
    try:
        _check_depth(text)
        root = yaml.compose(text, Loader=Loader)
        if root is not None and _size(root, {}) > MOST_NODES:
            raise UserError(f"{path} comes to more than {MOST_NODES} values, with its aliases")
        return yaml.load(text, Loader=Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is no configuration: it is damaged, or not ours ({message(error)})") from None


def _check_depth(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError("nested too deeply")


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Values below a node, an alias's as often as it stands there. One that holds itself is endless."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = MOST_NODES + 1  # while it is open
    inner = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        inner = [part for pair in node.value for part in pair]
    known[id(node)] = 1 + sum(_size(part, known) for part in inner)
    return known[id(node)]


def literal(value: Any) -> Any:
    """The same value as OmegaConf takes it for plain text: `${HOME}` is what somebody wrote, not what it would stand for."""
    if isinstance(value, dict):
        return {key: literal(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [literal(part) for part in value]
    return escaped(value) if isinstance(value, str) else value


def escaped(text: str) -> str:
    """Text whose `${` OmegaConf reads as these two characters."""
    if "${" not in text:
        return text
    head, *tail = text.split("${")
    for part in tail:  # backslashes before it count, too
        slashes = len(head) - len(head.rstrip("\\"))
        head += "\\" * (slashes + 1) + "${" + part
    return head
