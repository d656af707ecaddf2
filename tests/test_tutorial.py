"""docs/tutorial.md from first to last line, in one shell as a reader would: every file written, every command run.

The repository beside it is as `make demo` leaves it. Without a network nothing can be fetched, nor needs to be. Two
scenes of four frames stand in for the eight of sixteen of the text.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import site
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from specvlm.app import compose
from specvlm.app.quoting import quoted
from specvlm.results.rows import rows_of
from specvlm.strategies import PruneContext
from specvlm.strategies.pruners.verifier_attention import VerifierAttentionPruner
from specvlm.types import TokenGrid

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
SCENES, FEWER = "export SCENES=8\n", "export SCENES=2\n"
FRAMES = "\nframes: null "
BLOCK = re.compile(r"(?:<!-- exit code (?P<code>\d) -->\n)?```(?P<kind>\w+)\n(?P<body>.*?)```\n", re.S)
FILE = re.compile(r"`(specvlm-blend/[\w.]+)`")
END = "end of block, exit code"


@dataclass
class Command:
    """A bash block: its command, expected exit code, the output that the text shows, and its real output."""

    words: str
    code: int
    shown: str = ""
    said: str = ""


def steps() -> list[Command | tuple[str, str]]:
    """Return commands, and files as (path, content), in the order of the text."""
    found: list[Command | tuple[str, str]] = []
    for block in BLOCK.finditer(TEXT):
        if block["kind"] == "bash":
            found.append(Command(block["body"], int(block["code"] or 0)))
        elif block["kind"] == "text":
            last = found[-1]
            assert isinstance(last, Command) and not last.shown, block["body"]
            last.shown = block["body"]
        else:
            path = FILE.findall(TEXT[: block.start()].rstrip().splitlines()[-1])
            assert len(path) == 1, f"which file is this? {block['body'][:80]}"
            found.append((path[0], block["body"]))
    return found


def script(found: list[Command | tuple[str, str]]) -> str:
    parts = []
    for step in found:
        if isinstance(step, Command):
            parts.append(f"{step.words}echo '{END}' $?\n")
        else:
            parts.append(f"cat > {step[0]} <<'END OF FILE'\n{step[1]}END OF FILE\n")
    return "".join(parts)


def shape(line: str) -> str:
    """Remove what differs between runs: figures, their unit (s or ms), and column widths."""
    line = re.sub(r"\d+(\.\d+)?( m?s\b)?", "0", line)
    return " ".join(re.sub(r"(/\S*)+/", "/", line).split())


def unwrapped(text: str) -> list[str]:
    """Join wrapped lines, since where they break depends on their figures."""
    return re.sub(r"\n {8,}(?=\S)", " ", text).splitlines()


def missing(shown: str, said: str) -> list[str]:
    """List lines of the text that the output lacks, in order. `…` stands for omitted output."""
    rest, gone = iter([shape(line) for line in unwrapped(said)]), []
    for line in filter(str.strip, unwrapped(shown)):
        begin, cut, _ = line.partition("…")
        want = shape(begin)
        if want and not any(now.startswith(want) if cut else now == want for now in rest):
            gone.append(line)
    return gone


@pytest.fixture
def checkout(tmp_path):
    """Make a repository after `make demo`; its environment sees this one's packages and keeps what is installed."""
    for needed in ("hatchling", "altair", "vl_convert", "jinja2", "scipy"):
        pytest.importorskip(needed)
    if not shutil.which("make"):
        pytest.skip("needs make")
    folder = tmp_path / "specvlm"
    folder.mkdir()
    (folder / "specvlm").symlink_to(ROOT / "specvlm")
    shutil.copytree(ROOT / "conf", folder / "conf")
    usual = (folder / "conf" / "config.yaml").read_text(encoding="utf-8")
    assert FRAMES in usual
    (folder / "conf" / "config.yaml").write_text(usual.replace(FRAMES, "\nframes: 4 "), encoding="utf-8")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    venv = folder / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (packages,) = venv.glob("lib/python*/site-packages")
    seen = [f"import site; site.addsitedir({there!r})" for there in site.getsitepackages()]
    (packages / "here.pth").write_text("\n".join([str(folder), *seen]) + "\n", encoding="utf-8")
    for stamp in (".created", ".torch", ".installed"):
        (venv / stamp).touch()
    return folder


def run(checkout: Path) -> list[Command]:
    """Run all blocks in one shell; return the commands with their output."""
    found = steps()
    text = script(found)
    assert SCENES in text
    ours = ("SPECVLM_PLUGINS", "PYTHONPATH", "ARGS", "MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS")  # of a `make test ARGS=…`, too
    env = {key: value for key, value in os.environ.items() if key not in ours}
    env |= {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}  # 0: what 1 would say
    done = subprocess.run(
        ["bash", "-c", text.replace(SCENES, FEWER)],
        cwd=checkout,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=900,
    )
    parts = re.split(rf"{END} (\d+)\n", done.stdout)
    commands = [step for step in found if isinstance(step, Command)]
    for command, said, code in zip(commands, parts[::2], parts[1::2], strict=False):
        command.said = said
        assert int(code) == command.code, f"{command.words}ended with {code}, not {command.code}:\n{said}"
    assert len(parts) // 2 == len(commands), done.stdout
    return commands


@pytest.mark.slow
def test_every_command_runs_and_does_what_the_text_shows(checkout):
    """A single test, since it is a single shell. The other tests look at what it left."""
    commands = run(checkout)
    assert len(commands) >= 8 and sum(bool(command.shown) for command in commands) >= 6
    for command in commands:
        assert not missing(command.shown, command.said), f"{command.words}does not say so:\n{command.said}"

    (resumed,) = [command for command in commands if "resume=true" in command.words]
    assert "1 of them done" in resumed.said, "nothing was left of the process that was killed"
    folder = checkout.parent / "my-pruner"
    rows = {path.parent: rows_of(path.parent) for path in sorted(folder.glob("*/*/samples.jsonl"))}
    assert len(rows) == 9
    for job, found in rows.items():
        assert [row["index"] for row in found] == [0, 1] and {row["verdict"] for row in found} == {"identical"}, job

    page = (folder / "report.html").read_text(encoding="utf-8")
    for job in ("none", "uniform", "random", "two_stage", *(f"blend attention={part}" for part in (0.0, 0.25, 0.5, 0.75, 1.0))):
        assert job in page, job
    assert "all 18 answers are the target's own" in " ".join(page.split()).replace("&#39;", "'")


def test_lines_are_compared_by_their_shape():
    said = "a note\ntokens  109 in 25 rounds\ndecode  1.92 s, alone 3 s\n        more\nwritten to /a/b/run\n"
    assert not missing("tokens 1 in 2 rounds\ndecode 940 ms, alone 2 s more\nwritten to …\n", said)
    assert missing("tokens 1 in 2 rounds\na note\n", said) == ["a note"]  # in another order
    assert missing("tokens 1 of 2 rounds\n", said) == ["tokens 1 of 2 rounds"]


def test_the_pruner_has_the_ends_that_the_text_says():
    """attention=1 is the built-in verifier_attention; attention=0 ignores the attention."""
    (code,) = [content for path, content in (s for s in steps() if isinstance(s, tuple)) if path.endswith(".py")]
    module: dict = {"__name__": "specvlm_blend"}
    sys.modules["specvlm_blend"] = type(sys)("specvlm_blend")  # dataclasses look there
    try:
        exec(code, module)
    finally:
        del sys.modules["specvlm_blend"]
    generator = torch.Generator().manual_seed(0)
    attention_N, features_ND = torch.rand(48, generator=generator), torch.randn(48, 5, generator=generator)

    def kept(pruner, attention_N):
        ctx = PruneContext((TokenGrid(4, 3, 4),), 9, {"verifier_attention": attention_N, "features": features_ND})
        return pruner.select(ctx).index.tolist()

    blend = module["BlendPruner"]
    assert kept(blend(attention=1.0), attention_N) == kept(VerifierAttentionPruner(), attention_N)
    assert kept(blend(attention=0.0), attention_N) == kept(blend(attention=0.0), -attention_N)
    assert kept(blend(attention=0.5), attention_N) not in (
        kept(blend(attention=0.0), attention_N),
        kept(blend(attention=1.0), attention_N),
    )


@pytest.mark.slow
def test_the_commands_of_the_last_part_compose():
    inline = re.findall(r"`python -m specvlm (.*?)`", TEXT.partition("## Where to go next")[2].replace("blend", "random"))
    assert len(inline) == 4
    for line in inline:
        words = shlex.split(line)
        assert compose.jobs(quoted([w for w in words if w != "-m"], "-m" in words), "-m" in words), line
