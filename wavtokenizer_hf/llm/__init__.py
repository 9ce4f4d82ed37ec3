"""Audio in a language model: codes as token ids, training examples, and streamed audio.

mapping.py       map codes <-> token ids <-> text, and find spans of audio among other ids
tokenizer.py     AudioVocabulary: the mapping, stored in a tokenizer
resizing.py      add embeddings for the codes
rows.py          turn codes and text into input_ids and labels, and pack them
generation.py    constrain generate() to valid spans, and stream their audio

Needs no extra of the package. Chat templates need jinja2, as in transformers.
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


# generation.py needs torch, and exports of training files do not
if not TYPE_CHECKING:  # a type checker would accept every name, as Any
    __getattr__, __dir__ = lazy_names(__name__, dict.fromkeys(_GENERATION, "generation"))
