"""Built-in data sets, one per file. `local.py` is the base class of those on disk."""

from specvlm.strategies.datasets.folder import FolderDataset
from specvlm.strategies.datasets.long_video_bench import LongVideoBenchDataset
from specvlm.strategies.datasets.mlvu import MLVUDataset
from specvlm.strategies.datasets.mvbench import MVBenchDataset
from specvlm.strategies.datasets.synthetic import SyntheticDataset
from specvlm.strategies.datasets.video_detail_caption import VideoDetailCaptionDataset
from specvlm.strategies.datasets.video_mme import VideoMMEDataset
from specvlm.strategies.plugins import hookimpl


@hookimpl
def specvlm_strategies() -> list[type]:
    return [
        SyntheticDataset,
        FolderDataset,
        VideoDetailCaptionDataset,
        MVBenchDataset,
        MLVUDataset,
        LongVideoBenchDataset,
        VideoMMEDataset,
    ]
