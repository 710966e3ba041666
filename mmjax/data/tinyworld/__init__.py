"""TinyWorld: a small world, seen and written, to train on in minutes."""

from mmjax.data.tinyworld.documents import (
    FewShot,
    InterleavedDocuments,
    NamedDigits,
    RetrievalDialogues,
    dialogue_retrieval_set,
)
from mmjax.data.tinyworld.look_alikes import LookAlikes
from mmjax.data.tinyworld.phrases import Phrases
from mmjax.data.tinyworld.questions import (
    Dialogues,
    SceneCaptions,
    VisualQuestions,
)
from mmjax.data.tinyworld.segments import SegmentedDigits
from mmjax.data.tinyworld.sheet import contact_sheet, conversation_sheet
from mmjax.data.tinyworld.tasks import (
    CaptionedDigits,
    CaptionedScenes,
    Classification,
    retrieval_set,
)
from mmjax.data.tinyworld.text import CLASSES, TEMPLATES
from mmjax.data.tinyworld.written import Echoes, Quizzes, Told

__all__ = [
    "CLASSES",
    "TEMPLATES",
    "CaptionedDigits",
    "CaptionedScenes",
    "Classification",
    "Dialogues",
    "Echoes",
    "FewShot",
    "InterleavedDocuments",
    "NamedDigits",
    "LookAlikes",
    "Phrases",
    "Quizzes",
    "RetrievalDialogues",
    "SceneCaptions",
    "SegmentedDigits",
    "Told",
    "VisualQuestions",
    "contact_sheet",
    "conversation_sheet",
    "dialogue_retrieval_set",
    "retrieval_set",
]
