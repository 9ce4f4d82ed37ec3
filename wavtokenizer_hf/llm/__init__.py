"""Audio in a language model: codes as ids of its vocabulary, rows to train on, and sound while it generates.

mapping.py       codes <-> token ids <-> text, spans of audio among other ids
tokenizer.py     AudioVocabulary: the mapping in a tokenizer
resizing.py      embeddings for the codes
rows.py          codes and text -> input_ids and labels, and packing
generation.py    generate() that keeps to audio inside a span, and sound while it runs

Needs nothing beyond the core; chat templates need jinja2, as in transformers.
"""

from typing import TYPE_CHECKING

from ..lazy_names import lazy_names
from .mapping import AudioSpan, MalformedSpan
from .rows import PackedRows, Template, TrainingRows
from .tokenizer import APERTUS_1_5, AudioVocabulary


if TYPE_CHECKING:
    from .generation import AudioSpanProcessor, AudioStreamer, decode_spans, span_arguments, stream_audio

_GENERATION = ("AudioSpanProcessor", "AudioStreamer", "decode_spans", "span_arguments", "stream_audio")

__all__ = [
    "APERTUS_1_5",
    "AudioSpan",
    "AudioSpanProcessor",
    "AudioStreamer",
    "AudioVocabulary",
    "MalformedSpan",
    "PackedRows",
    "Template",
    "TrainingRows",
    "decode_spans",
    "span_arguments",
    "stream_audio",
]


# what generates needs torch, and exports of training files do not
if not TYPE_CHECKING:  # to a type checker every name would exist, and be Any
    __getattr__, __dir__ = lazy_names(__name__, dict.fromkeys(_GENERATION, "generation"))
