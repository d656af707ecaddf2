"""Cache of baselines: the target's own answers, decoded once and shared by jobs.

Each baseline is a file `KEY.json`. It also lists what the key is a hash of: prompt, weights, options, machine and how
the target runs. The machine is part of the key because a baseline's times are compared too. A file that was edited is
ignored, and its answer decoded again. The digest detects edits; it is not a signature.
"""

import errno
import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import torch
from filelock import FileLock
from torch import Tensor

from specvlm.app.prepare import Prepared
from specvlm.decoding.loop import DecodingGraph
from specvlm.errors import UserError, message
from specvlm.models import families, plugins
from specvlm.models.load import name_of
from specvlm.parallel.ranks import SINGLE, ProcessGroup
from specvlm.parsing.bounds import parse
from specvlm.parsing.files import json_of, open_regular, read_text
from specvlm.results import metrics
from specvlm.results.folder import write_json
from specvlm.results.records import KeptBaseline
from specvlm.types import Step, VideoPrompt
from specvlm.types.pixels import pixel_digest

KEYED = (".json", ".jinja", ".txt", ".safetensors")  # suffixes of the files that a checkpoint's fingerprint covers
PIECE = 4096  # bytes hashed at the beginning, middle and end of a tensor


@dataclass(frozen=True)
class Baseline:
    """The target's own answer.

    Attributes:
        tokens: Token ids, including the stop id.
        times_s: Seconds by part, as in `Step.times_s`, over all steps.
        key: Name of its file in `Baselines`, without the suffix; empty in a run of one video, which has no such file.
    """

    tokens: list[int]
    times_s: dict[str, float]
    key: str = ""

    @classmethod
    def of(cls, steps: Sequence[Step], key: str = "") -> Self:
        """Build a baseline from the steps of `autoregressive`."""
        return cls(metrics.tokens_of(steps), metrics.times_of(steps), key)


class Baselines:
    """A folder of baselines that several processes may share.

    Args:
        folder: Where they are kept. None: keep nothing, and decode every baseline.
        ranks: The ranks that need the same baseline; rank 0 reads it.
        note: Called with a message about a file that cannot be used.
    """

    def __init__(
        self, folder: Path | None, ranks: ProcessGroup = SINGLE, note: Callable[[str], None] = lambda line: None
    ) -> None:
        self.folder, self.ranks, self.note = folder, ranks, note
        self.begun = False

    def get(self, request: Prepared, graph: DecodingGraph, weights: int, decode: Callable[[], list[Step]]) -> Baseline:
        """Return the kept baseline, or decode and keep it. Waits while another process decodes the same one.

        Args:
            request: The prompt and the configuration.
            graph: The target and the options.
            weights: Checksum of the target's weights at load time.
            decode: Decodes with the target alone.

        Raises:
            OSError: The folder cannot be written, or was removed meanwhile.
        """
        made_of = inputs(request, graph, weights)
        key = sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]
        path = self.folder / f"{key}.json" if self.folder else None
        if self.folder and not self.begun:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.begun = True
        if self.folder and not self.folder.is_dir():  # do not recreate it: the sweep's folder may be gone too
            raise FileNotFoundError(errno.ENOENT, "it was removed while jobs kept baselines there")
        with waiting(path.with_suffix(".lock")) if path else nullcontext():
            kept: Baseline | None = self.ranks.share(lambda: self._read(path, key, graph, request.cfg.max_new_tokens))
            if kept is None:
                kept = Baseline.of(decode(), key)
                if path:
                    content = asdict(kept) | {"made_of": made_of}
                    write_json(path, content | {"digest": digest_of(content)})
        return kept

    def _read(self, path: Path | None, key: str, graph: DecodingGraph, most: int) -> Baseline | None:
        """Read a baseline; None if the file is missing or cannot be used."""
        if path is None or not path.exists():
            return None
        try:
            found = parse(KeptBaseline, json_of(read_text(path)), "it")
            _check(found, key, graph, most)
            return Baseline(found["tokens"], found["times_s"], key)
        except (OSError, ValueError) as error:
            self.note(f"{path} is decoded again: {message(error)}")
            return None


def _check(found: KeptBaseline, key: str, graph: DecodingGraph, most: int) -> None:
    """Raise UserError if a file's content cannot be what `get` wrote under this key. most: limit on the tokens."""
    tokens, stop_ids = found["tokens"], graph.target.stop_ids
    if found["key"] != key:
        raise UserError("its key does not match")
    if digest_of(found) != found["digest"]:
        raise UserError("it has changed since it was written")
    ended = bool(tokens) and (len(tokens) == most or tokens[-1] in stop_ids)
    if not ended or len(tokens) > most or stop_ids & set(tokens[:-1]) or max(tokens) >= graph.target.vocabulary:
        raise UserError("its tokens cannot be an answer of this target")
    if not sum(found["times_s"].values()) > 0:
        raise UserError("its times sum to zero")


def digest_of(content: Mapping[str, Any]) -> str:
    """SHA-256 of all fields except the digest."""
    plain = json.dumps({key: value for key, value in content.items() if key != "digest"}, sort_keys=True)
    return sha256(plain.encode()).hexdigest()


@contextmanager
def waiting(path: Path) -> Iterator[None]:
    """Hold a lock file during the block, so that one process makes a baseline and the others wait for its file."""
    with FileLock(path):
        yield
    with suppress(OSError):  # Windows cannot remove a file that a waiting process has open
        path.unlink()


def inputs(request: Prepared, graph: DecodingGraph, weights: int) -> dict[str, Any]:
    """List what the target's own answer and its times depend on, as plain values. Their hash is a baseline's key."""
    target, places = graph.target, request.places
    sampled = graph.sampling.temperature > 0
    return {
        "weights": f"{weights:016x}",
        "files": fingerprint(target.folder),
        "dtype": name_of(target.dtype),
        "quantised": request.kinds["target"],
        "engine": graph.engine.runs(target),
        "code": revision(),
        "family": families.version_of(type(target)),
        "mrope": target.mrope,
        "repetition_penalty": graph.options.repetition_penalty or target.repetition_penalty,
        "stop_ids": sorted(target.stop_ids),
        "prompt": digest(request.prompt),
        "reused": 0 if graph.prefixes is None else graph.prefixes.known(target, request.prompt, graph.engine),
        "max_new_tokens": request.cfg.max_new_tokens,
        "sampling": repr(graph.sampling),
        "seed": graph.options.seed if sampled else None,
        "parallel": places.parallel,
        "devices": [machine(device) for device in places.target] * places.ranks,
        "threads": torch.get_num_threads() if places.first.type == "cpu" else None,
        "versions": metrics.versions(),
        "plugins": plugins.installed(),
    }


# Modules of decoding/ that produce the target's own answer.
DECODING = ("loop", "output", "prefill", "prefixes", "prefix_entries", "prefix_keys", "scheduler", "shelf", "slices", "text",
            "ticket")  # fmt: skip


@cache
def revision() -> str:
    """Hash of the source code that the target's own answer depends on, kernels included."""
    home, found = Path(__file__).parents[1], sha256()
    files: tuple[str, ...] = ("parallel/ranks.py", "strategies/verifier.py")
    files += tuple(f"decoding/{name}.py" for name in DECODING)
    for part in ("engine", "models", "strategies/verifiers", "types", *files):
        place = home / part
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            found.update(f"{path.relative_to(home)} ".encode() + path.read_bytes())
    return found.hexdigest()[:16]


def digest(prompt: VideoPrompt) -> str:
    """Hash of the prompt's tokens and pixels, and of which slots hold videos and images."""
    found = sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            found.update(repr((tuple(value.shape), value.dtype)).encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            found.update(repr(value).encode())

    for slots in (prompt.tokens, prompt.video_index, prompt.image_index):
        add(slots)
    for pixels in (*prompt.videos, *prompt.images):
        add(pixel_digest(pixels))
    return found.hexdigest()


def fingerprint(folder: Path) -> str:
    """Hash of a checkpoint: its small files, the header of each weight file, and three pieces of every tensor.

    Training changes tensors throughout, so three pieces suffice. Reading 150 GB would cost more than most baselines.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix in KEYED and path.is_file())
    return _fingerprint(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files))


@cache
def _fingerprint(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Hash the files of a checkpoint. Computed again if the size or the time of a file changes."""
    found = sha256()
    for path, size, _ in files:
        found.update(f"{path.name} {size}".encode())
        if path.suffix != ".safetensors":
            found.update(path.read_bytes())
            continue
        with open_regular(path) as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, size))
            found.update(header)
            for start, end in _spans(header):
                for at in sorted({start, max(start, (start + end - PIECE) // 2), max(start, end - PIECE)}):
                    file.seek(8 + length + at)
                    found.update(file.read(min(PIECE, end - at)))
    return found.hexdigest()


def _spans(header: bytes) -> list[tuple[int, int]]:
    """Byte ranges of a safetensors file's tensors, counted from the end of its header; empty for an invalid header."""
    try:
        return sorted(tuple(entry["data_offsets"]) for name, entry in json.loads(header).items() if name != "__metadata__")
    except (ValueError, TypeError, KeyError, AttributeError):
        return []


def machine(device: torch.device) -> str:
    """Model name of a GPU or CPU: times on devices of the same model are comparable.

    If the system does not report the CPU's model, the name is its architecture.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
