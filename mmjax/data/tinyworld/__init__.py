"""TinyWorld: a small world, seen and written, to train on in minutes."""

from mmjax.data.tinyworld.sheet import contact_sheet
from mmjax.data.tinyworld.tasks import (
    CaptionedDigits,
    CaptionedScenes,
    Classification,
    retrieval_set,
)
from mmjax.data.tinyworld.text import CLASSES, TEMPLATES

__all__ = [
    "CLASSES",
    "TEMPLATES",
    "CaptionedDigits",
    "CaptionedScenes",
    "Classification",
    "contact_sheet",
    "retrieval_set",
]
