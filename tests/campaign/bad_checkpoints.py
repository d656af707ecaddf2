"""Checkpoint folders with one thing wrong: each ends well or with one line, exit code 2, soon and in little memory."""

from __future__ import annotations

import json
import random
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).resolve().parents[2] / "specvlm" / "assets"
FAMILIES = ("qwen2_5_vl", "llava_onevision")
COUNT, SAMPLE = 400, 6
MORE_MB = 1024  # than a good run's may no case take

JSON_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"),
    *("video_preprocessor_config.json", "processor_config.json", "chat_template.json", "special_tokens_map.json"),
    *("added_tokens.json", "adapter_config.json", "model.safetensors.index.json"),
)
ODD = (
    *(None, True, -1, 0, 1, 3, 0.5, -0.0, 1e308, float("nan"), float("inf"), 10**9, 2**40, -(2**63), 10**30, 999_983),
    *("", "x", "abc" * 50, "../../etc/passwd", "\ud800", "${oc.env:HOME}", "cuda", "float8_e4m3fn", "flash_attention_2"),
    *([], [0], [[]], [1, "x", None], {}, {"a": {"b": []}}, [10**9] * 3, [-1], ["x"] * 3),
)
TEMPLATES = (
    *("{% for i in range(10**9) %}x{% endfor %}", "{{ 'x' * 10**10 }}", "{{ raise_exception('no') }}", "{% if %}", "", " "),
    "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = i %}{% endfor %}{% endfor %}",
    "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    *(
        "{{ messages[7]['content'] }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ 2**(2**40) }}",
        "{% include 'x' %}",
        "<|video_pad|>" * 3,
    ),
    *("{{ [1] * 10**9 }}", "{{ '%9999999999d' % 1 }}", "{{ 'x'.center(10**10) }}", "<|video_pad|>{{ messages }}" * 2000),
)
TEMPLATE_OF_TEXT = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + m['content'] }}{% endfor %}"
QUANTISED = (
    *({"quant_method": method} for method in ("awq", "gptq", "bitsandbytes", "fp8", "compressed-tensors", "nope", "", 3, None)),
    *({"quant_method": method, "bits": 4} for method in ("torchao", "quark", "hqq", "aqlm", "eetq", "mxfp4", "bitnet", "sinq")),
    *({"load_in_4bit": True}, {"load_in_8bit": True}, [], "awq", 7, {"x": 1}, {"quant_method": "awq", "bits": "x"}),
)
NAMES = (
    *("pytorch_model.bin", "../x.safetensors", "/etc/passwd", "a/b.safetensors", "model.safetensors/", "", ".safetensors"),
    *("none.safetensors", "model.safetensors.index.json", "adapter_model.bin", 7, None, [], {"a": 1}, "\0.safetensors"),
)


def cases(rng: random.Random, folder: Path) -> Iterator[tuple[str, Path]]:
    """Without end: what was done, and the checkpoint it was done to, a folder of its own in `folder`. Files that are not
    changed are links to the embedded ones.
    """
    kinds = (garbled, changed, changed, changed, lost, template, weights, header, quantised, elsewhere, shard)
    number = 0
    while True:
        family, kind = rng.choice(FAMILIES), kinds[number % len(kinds)]
        place = folder / f"checkpoint{number}"
        place.mkdir(parents=True)
        for path in (ASSETS / family / "target").iterdir():
            (place / path.name).symlink_to(path)
        yield f"{number} {family} {kind(rng, place)}", place
        number += 1


def garbled(rng: random.Random, place: Path) -> str:
    """A JSON file cut, emptied, of other bytes or of another type."""
    name = rng.choice(JSON_FILES)
    was = (place / name).read_bytes() if (place / name).exists() else b'{"a": [1, 2, {"b": null}]}'
    at = rng.randrange(1, len(was))
    ways: dict[str, bytes] = {
        "cut": was[:at],
        "empty": b"",
        "other bytes": was[:at] + rng.randbytes(9) + was[at + 9 :],
        "not UTF-8": b"\xff\xfe" + was,
        "deep": b"[" * 100_000,
        "two": was + was,
        **{kind: kind.encode() for kind in ("[]", "{}", "null", "3", '"x"', "[{}]")},
    }
    way = rng.choice([*ways, "a folder"])
    _write(place / name, ways.get(way))
    return f"{name}: {way} ({at})"


def changed(rng: random.Random, place: Path) -> str:
    """A value somewhere in a JSON file replaced by an odd one."""
    name = rng.choice([name for name in JSON_FILES if (place / name).exists()] + ["config.json"] * 5)
    content = json.loads((place / name).read_text())
    parent, key = rng.choice(list(_leaves(content)))
    value = rng.choice(ODD)
    parent[key] = value
    _write(place / name, json.dumps(content).encode())
    return f"{name}: {key}={str(value)[:30]}"


def lost(rng: random.Random, place: Path) -> str:
    """A key, or a whole file, taken out."""
    name = rng.choice([path.name for path in place.iterdir()])
    if rng.random() < 0.3 or not name.endswith(".json"):
        (place / name).unlink()
        return f"without {name}"
    content = json.loads((place / name).read_text())
    parent, key = rng.choice([(parent, key) for parent, key in _leaves(content, inner=True) if isinstance(parent, dict)])
    del parent[key]
    _write(place / name, json.dumps(content).encode())
    return f"{name}: without {key}"


def template(rng: random.Random, place: Path) -> str:
    """A chat template that fails, loops, grows, or is for text alone, in any of the places it may be in."""
    text = rng.choice((*TEMPLATES, TEMPLATE_OF_TEXT))
    name = rng.choice(("chat_template.jinja", "chat_template.json", "processor_config.json", "tokenizer_config.json"))
    if name != "chat_template.jinja":
        (place / "chat_template.jinja").unlink()
        own = json.loads((place / name).read_text()) if (place / name).exists() else {}
        listed = [{"name": rng.choice(("default", "other")), "template": text}]
        text = json.dumps(own | {"chat_template": rng.choice((text, text, listed, 7, {"default": text}))})
    _write(place / name, text.encode())
    return f"{name}: {text[-60:]!r}"


def weights(rng: random.Random, place: Path) -> str:
    """The weights cut, emptied, or of other bytes."""
    was = (place / "model.safetensors").read_bytes()
    at = rng.choice((rng.randrange(16), rng.randrange(20_000), rng.randrange(len(was))))
    way = rng.choice(("cut", "other bytes", "longer", "length"))
    made = {
        "cut": lambda: was[:at],
        "other bytes": lambda: was[:at] + rng.randbytes(5) + was[at + 5 :],
        "longer": lambda: was + rng.randbytes(99),
        "length": lambda: struct.pack("<Q", rng.choice((0, 1, 2**62, 10**9, len(was)))) + was[8:],
    }
    _write(place / "model.safetensors", made[way]())
    return f"model.safetensors: {way} at {at}"


def header(rng: random.Random, place: Path) -> str:
    """The header of the weights says something else of a tensor."""
    was = (place / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", was[:8])
    content = json.loads(was[8 : 8 + length])
    name = rng.choice([name for name in content if name != "__metadata__"])
    entry = content[name]
    ways: dict[str, Callable[[], Any]] = {
        "dtype": lambda: entry.update(dtype=rng.choice(("F32", "I64", "BOOL", "F8_E4M3", "X", 3))),
        "shape": lambda: entry.update(shape=rng.choice(([], [1], [2**40, 2**40], [-1], entry["shape"][::-1], "x"))),
        "offsets": lambda: entry.update(data_offsets=rng.choice(([0, 0], [5, 1], [0, 2**60], [0], "x"))),
        "lost": lambda: content.pop(name),
        "renamed": lambda: content.update({name + "x": content.pop(name)}),
    }
    way = rng.choice(list(ways))
    ways[way]()
    said = json.dumps(content).encode()
    _write(place / "model.safetensors", struct.pack("<Q", len(said)) + said + was[8 + length :])
    return f"{name}: {way}"


def quantised(rng: random.Random, place: Path) -> str:
    """Said to be quantised, by a method that is not there, or in a way that no method knows."""
    value = rng.choice(QUANTISED)
    where = rng.choice(("", "text_config"))
    content = json.loads((place / "config.json").read_text())
    (content[where] if where else content)["quantization_config"] = value
    _write(place / "config.json", json.dumps(content).encode())
    return f"quantization_config={value}"


def elsewhere(rng: random.Random, place: Path) -> str:
    """config.json names weights, an attention or code from elsewhere."""
    content = json.loads((place / "config.json").read_text())
    attention = ("flash_attention_2", "eager", "kernels-community/x", 3, {"text_config": "flex_attention"}, "nope")
    key, value = rng.choice(
        (
            ("transformers_weights", rng.choice(NAMES)),
            ("_attn_implementation", rng.choice(attention)),
            ("auto_map", rng.choice(({"AutoConfig": "x--y.Z", "AutoModelForImageTextToText": "m.M"}, "x", 7))),
            ("architectures", rng.choice((["Nope"], "x", None))),
            ("dtype", rng.choice(("int8", "nope", 5, None, "bfloat16 ", {"": "float16"}))),
            ("use_safetensors", False),
        )
    )
    content[key] = value
    _write(place / "config.json", json.dumps(content).encode())
    return f"config.json: {key}={value}"


def shard(rng: random.Random, place: Path) -> str:
    """An index that names files which are not weights, not there, or not in the folder."""
    (place / "model.safetensors").rename(place / "model-00001-of-00001.safetensors")
    name = rng.choice(NAMES)
    placed = {"model.visual.x": "model-00001-of-00001.safetensors", "lm_head.weight": name}
    whole: Any = {"metadata": {"total_size": 1}, "weight_map": placed}
    whole = rng.choice((whole, whole, whole, {"weight_map": placed}, {"metadata": {}, "weight_map": name}, {"metadata": 3}))
    _write(place / "model.safetensors.index.json", json.dumps(whole).encode())
    return f"index: {str(whole)[-60:]}"


def _leaves(content: Any, inner: bool = False) -> Iterator[tuple[Any, Any]]:
    """Where each value stands: the object or list, and the key in it. inner: those of objects and lists too."""
    found = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(found):
        if inner or not isinstance(value, dict | list) or not value:
            yield content, key
        yield from _leaves(value, inner)


def _write(path: Path, content: bytes | None) -> None:
    """In place of what is there; None makes a folder."""
    path.unlink(missing_ok=True)
    path.mkdir() if content is None else path.write_bytes(content)


def run(count: int, seed: int) -> list[str]:
    from campaign.fork import Child, preload, specvlm

    preload()
    found, limit = [], 0
    with tempfile.TemporaryDirectory() as scratch:
        made = cases(random.Random(seed), Path(scratch, "checkpoints"))
        for number, (said, place) in enumerate([("nothing", ASSETS / "qwen2_5_vl" / "target"), *_first(made, count)]):
            here = Path(scratch, f"run{number}")
            pair = "embedded_llava_onevision_aware" if "llava" in said else "embedded_qwen2_5_vl_aware"
            words = (f"pair={pair}", f"target.path={place}", "frames=4", "max_new_tokens=3", "baseline=false")
            ended = Child(specvlm(*words, f"hydra.run.dir={here}/run"), here).wait()
            limit = limit or ended.peak_mb + MORE_MB
            faults = ended.faults()
            if ended.peak_mb > limit:
                faults.append(f"{ended.peak_mb} MB, where {limit} are plenty")
            found += [f"{said}: {fault}" for fault in faults]
    return found


def _first(made: Iterator[tuple[str, Path]], count: int) -> Iterator[tuple[str, Path]]:
    yield from (next(made) for _ in range(count))
