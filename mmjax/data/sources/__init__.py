"""Data as users have it: files of many kinds as sources of examples.

A source of records (`WebDataset`, `Parquet`, `ArrayRecord`, `TFDS`, `Folder`)
gives raw fields; `Examples` makes of each field a key of an example.
"""

from mmjax.data.sources.arrayrecord import ArrayRecord
from mmjax.data.sources.examples import Examples
from mmjax.data.sources.fields import (
    Frames,
    Label,
    Numbers,
    Picture,
    Sound,
    Text,
)
from mmjax.data.sources.folder import Folder
from mmjax.data.sources.guess import open_records
from mmjax.data.sources.limits import Limits
from mmjax.data.sources.parquet import Parquet
from mmjax.data.sources.records import BadRecord, Record, Records
from mmjax.data.sources.tfds import TFDS
from mmjax.data.sources.webdataset import WebDataset

__all__ = [
    "ArrayRecord",
    "BadRecord",
    "Examples",
    "Folder",
    "Frames",
    "Label",
    "Limits",
    "Numbers",
    "Parquet",
    "Picture",
    "Record",
    "Records",
    "Sound",
    "TFDS",
    "Text",
    "WebDataset",
    "open_records",
]
