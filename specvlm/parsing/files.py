"""Read untrusted files as plain data, within size limits, without executing or interpolating anything in them."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import yaml

from specvlm.errors import UserError, message

MOST_BYTES = 64 * 2**20  # maximum size of a file that is read as a whole
MOST_YAML = 2**20  # maximum size of a YAML file in bytes
DEEPEST = 100  # maximum number of nested levels; deeper data would crash recursive parsers
Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MOST_NODES = 100_000  # maximum number of values in a YAML file, with its aliases expanded


def open_regular(path: Path, mode: str = "rb", buffering: int = -1) -> Any:
    """Open a regular file. Refuses a pipe, since opening one waits until another process opens the other end.

    Waits only if another process holds a lease on the file, until that process gives it up.

    Raises:
        UserError: The path is not a valid file name, or names something other than a regular file.
        OSError: The file cannot be opened.
    """
    try:
        file = open(path, mode, buffering, opener=_without_waiting)  # noqa: SIM115
    except ValueError as error:  # not a valid file name
        raise UserError(f"{path} is not a file ({error})") from None
    except BlockingIOError:  # another process holds a lease on it, as file servers do: wait for that one
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{path} is not a file") from None
        file = open(path, mode, buffering)  # noqa: SIM115
    except OSError as error:
        if error.errno == errno.ENXIO:  # a pipe that nobody reads, or a socket
            raise UserError(f"{path} is not a file") from None
        raise
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UserError(f"{path} is not a file")
    return file


def _without_waiting(name: str, flags: int) -> int:
    """Opener for `open` that does not wait for the other end of a pipe."""
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0), 0o666)


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """Read a file of at most `most` bytes.

    Raises:
        UserError: The path is not that of a regular file, or the file has more bytes.
        OSError: The file cannot be read.
    """
    with open_regular(path) as file:
        content: bytes = file.read(most + 1)
    if len(content) > most:
        raise UserError(f"{path} has more than {most} bytes, the most that is read of such a file")
    return content


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """Read a UTF-8 text file of at most `most` bytes, without its byte order mark.

    Raises:
        UserError: The path is not that of a regular file, or the file has more bytes or is not UTF-8.
        OSError: The file cannot be read.
    """
    try:
        return read_bytes(path, most).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8") from None


def json_of(text: str | bytes) -> Any:
    """Parse JSON. Raises ValueError if it is invalid or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def nested(value: Any, most: int = DEEPEST) -> bool:
    """Whether lists and dicts are nested more than `most` deep. As JSON, they could be written but not parsed again."""
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return most < 0 or any(nested(part, most - 1) for part in inner)


def read_yaml(path: Path) -> Any:
    """Read a YAML file as plain data. OmegaConf's interpolations, such as ${HOME}, stay text.

    Raises:
        UserError: The path is not that of a regular file, or the file is invalid, nested more than DEEPEST deep, or
            larger than MOST_YAML bytes or MOST_NODES values.
        OSError: The file cannot be read.
    """
    text = read_text(path, MOST_YAML)
    try:
        _check_depth(text)
        root = yaml.compose(text, Loader=Loader)
        if root is not None and _size(root, {}) > MOST_NODES:
            raise UserError(f"{path} has more than {MOST_NODES} values, with its aliases expanded")
        return yaml.load(text, Loader=Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not a configuration: it is damaged, or not ours ({message(error)})") from None


def _check_depth(text: str) -> None:
    """Raise ValueError if a YAML text is nested more than DEEPEST deep. Aliases are not followed."""
    depth = 0
    for event in yaml.parse(text, Loader=Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError("nested too deeply")


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Count the values in a node, with aliases expanded. A node that contains itself counts as more than MOST_NODES."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = MOST_NODES + 1  # until it is counted
    inner = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        inner = [part for pair in node.value for part in pair]
    known[id(node)] = 1 + sum(_size(part, known) for part in inner)
    return known[id(node)]


def literal(value: Any) -> Any:
    """Escape all texts in a value, except keys, so that OmegaConf keeps `${HOME}` as text. Tuples become lists."""
    if isinstance(value, dict):
        return {key: literal(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [literal(part) for part in value]
    return escaped(value) if isinstance(value, str) else value


def escaped(text: str) -> str:
    """Escape each `${` in a text with backslashes, so that OmegaConf keeps it as text."""
    if "${" not in text:
        return text
    head, *tail = text.split("${")
    for part in tail:  # double the backslashes before `${`, and add one to escape it
        slashes = len(head) - len(head.rstrip("\\"))
        head += "\\" * (slashes + 1) + "${" + part
    return head
