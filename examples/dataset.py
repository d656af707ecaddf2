"""Read a data set from a folder of videos, each with its question in a text file of the same name."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from specvlm import Dataset, Sample, UserError, hookimpl


@dataclass(frozen=True)
class TextFilesDataset(Dataset):
    """A folder of pairs: NAME.txt holds one question about NAME.mp4.

    root: path of the folder.
    """

    name = "text_files"
    split = "all"
    root: str

    @property
    def version(self) -> str:
        """Checksum of the questions: equal versions mean equal questions."""
        return sha256("\0".join(f"{sample.id}\0{sample.question}" for sample in self.samples()).encode()).hexdigest()[:12]

    def samples(self) -> Sequence[Sample]:
        texts = sorted(Path(self.root).glob("*.txt"))
        if not texts:
            raise UserError(f"{self.root}: no *.txt there; put NAME.txt with a question beside NAME.mp4")
        return [Sample(path.stem, path.with_suffix(".mp4"), path.read_text(encoding="utf-8").strip()) for path in texts]


@hookimpl
def specvlm_strategies() -> list[type]:
    return [TextFilesDataset]


if __name__ == "__main__":
    import sys

    for sample in TextFilesDataset(sys.argv[1]).samples():
        print(f"{sample.id}: {sample.question}")
