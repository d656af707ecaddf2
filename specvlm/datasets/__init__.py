"""The built-in data sets, one a file. `local.py` is what those on disk share."""

from specvlm.datasets.folder import FolderDataset
from specvlm.datasets.long_video_bench import LongVideoBenchDataset
from specvlm.datasets.mlvu import MLVUDataset
from specvlm.datasets.mvbench import MVBenchDataset
from specvlm.datasets.synthetic import SyntheticDataset
from specvlm.datasets.video_detail_caption import VideoDetailCaptionDataset
from specvlm.datasets.video_mme import VideoMMEDataset
from specvlm.plugins import hookimpl


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
