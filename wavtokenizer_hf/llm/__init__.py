"""Audio in a language model: codes as ids of its vocabulary, rows to train on, and sound while it generates.

vocabulary.py    AudioVocabulary: codes <-> ids <-> text, spans of audio among other ids, tokenizers and models that get it
rows.py          codes and text -> input_ids and labels, and packing
generation.py    generate() that keeps to audio inside a span, and sound while it runs

Needs nothing beyond the core; chat templates need jinja2, as in transformers.
"""

from .generation import AudioSpanProcessor, AudioStreamer, decode_spans, span_arguments, stream_audio
from .rows import PackedRows, Template, TrainingRows
from .vocabulary import APERTUS_1_5, AudioSpan, AudioVocabulary, MalformedSpan


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
