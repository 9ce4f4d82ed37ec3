"""What the header of an audio file promises: libsndfile takes less for the whole of a file without a word.

Nothing is decoded here, and no length of a header is trusted: all reads are small.
"""

import errno
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import BinaryIO, Literal


UNKNOWN_SIZE = 0x7FFF0000
"""Who cannot know the size of a WAV stream writes 0, 0xFFFFFFFF (ffmpeg), 0x7FFFF000 (sox) or the like."""


@dataclass
class Container:
    """Where the audio of a file lies, and how much its header promises.

    Args:
        format: "wav", "aiff", "au", "caf", "w64", "flac", "ogg", "mpeg", "mp4", or "" for one that is not known here.
        start: bytes of tags in front of it.
        num_missing: bytes that the header promises and the file lacks.
        num_frames: samples of each channel by a count of the frames, for "mpeg".
        estimates_length: whether libsndfile would estimate the length, and stop there.
        patch: position from `start`, and bytes to put over those of the file: a length that is right.
        has_more: whether another file of the same format follows the first; libsndfile does not read it.
        end: where the audio ends, from `start`, if libsndfile would take what follows it for audio.
    """

    format: str
    start: int = 0
    num_missing: int = 0
    num_frames: int | None = None
    estimates_length: bool = False
    patch: tuple[int, bytes] | None = None
    has_more: bool = False
    end: int | None = None


def inspect(file: BinaryIO) -> Container:
    """Read what the header of a seekable binary file says. The position in the file changes."""
    size = file.seek(0, 2)
    start = _end_of_id3(file, size)
    head = _read(file, start, 16)
    if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        return _wav(file, start, size)
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return _aiff(file, start, size)
    if head[:4] in (b".snd", b"dns."):
        return _au(file, start, size)
    if head[:4] == b"caff":
        return _caf(file, start, size)
    if head == _W64_RIFF:
        return _w64(file, start, size)
    if head[:4] == b"fLaC":
        return Container("flac", start)
    if head[:4] == b"OggS":
        return _ogg(file, start, size)
    if head[4:8] == b"ftyp":
        return _mp4(file, start, size)
    return _mpeg(file, start, size) or Container("", start)


def _read(file: BinaryIO, position: int, size: int) -> bytes:
    """Read bytes at a position that a header gives. There are none beyond the end, nor beyond what a file can hold."""
    try:
        file.seek(position)
    except OverflowError:
        return b""
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return b""
    return file.read(size)


def holds_another_flac(file: BinaryIO, start: int) -> bool:
    """
    Whether a second FLAC file begins after the one at `start`. Reads the whole file, so it is for after decoding.
    """
    pattern = b"fLaC\x00\x00\x00\x22"  # the first 8 bytes of every one
    file.seek(start + 4)
    tail = b""
    while block := file.read(2**20):
        if pattern in tail + block:
            return True
        tail = block[-len(pattern) + 1 :]
    return False


def _end_of_id3(file: BinaryIO, size: int) -> int:
    """The first byte after ID3v2 tags, which players write in front of any format."""
    position = 0
    while (head := _read(file, position, 10))[:3] == b"ID3" and len(head) == 10 and max(head[6:10]) < 128:
        length = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
        position += 10 + length + (10 if head[5] & 0x10 else 0)
    return min(position, size)


# ---------------------------------------------------------------------------------------------------------------------
# Formats of chunks
# ---------------------------------------------------------------------------------------------------------------------


def _chunks(file: BinaryIO, position: int, size: int, endian: str) -> Iterator[tuple[bytes, int, int]]:
    """(name, position of the content, its size) of each chunk of RIFF and AIFF."""
    while position + 8 <= size:
        name, length = struct.unpack(f"{endian}4sI", _read(file, position, 8))
        yield name, position + 8, length
        position += 8 + length + length % 2


def _missing(position: int, length: int, size: int) -> int:
    return 0 if length == 0 or length >= UNKNOWN_SIZE else max(0, position + length - size)


def _wav(file: BinaryIO, start: int, size: int) -> Container:
    kind = _read(file, start, 4)
    found, long_size = Container("wav", start), None
    for name, position, length in _chunks(file, start + 12, size, ">" if kind == b"RIFX" else "<"):
        if name == b"ds64" and kind in (b"RF64", b"BW64"):
            content = _read(file, position, 16)
            long_size = struct.unpack("<Q", content[8:])[0] if len(content) == 16 else None
        elif name == b"data" and long_size is not None and length == 0xFFFFFFFF:
            found.num_missing = max(0, position + long_size - size)
            return found
        elif name == b"data" and length == 0 and not _is_last_chunk(file, position, size, kind):
            # whoever wrote it did not come back to fill the size in; libsndfile would find no samples
            found.patch = (position - 4 - start, min(size - position, 2**32 - 1).to_bytes(4, _ORDER[kind == b"RIFX"]))
            return found
        elif name == b"data":
            found.num_missing = _missing(position, length, size)
            end = position + length + length % 2
            found.has_more = 0 < length < UNKNOWN_SIZE and _read(file, end, 4) in (b"RIFF", b"RIFX", b"RF64")
            return found
    found.num_missing = 1  # it ends before its samples begin
    return found


_ORDER: dict[bool, Literal["big", "little"]] = {True: "big", False: "little"}


def _is_last_chunk(file: BinaryIO, position: int, size: int, kind: bytes) -> bool:
    """Whether nothing but one whole chunk, or nothing at all, lies from there to the end."""
    head = _read(file, position, 8)
    length = int.from_bytes(head[4:], _ORDER[kind == b"RIFX"])
    return len(head) == 0 or (len(head) == 8 and position + 8 + length + length % 2 == size)


def _aiff(file: BinaryIO, start: int, size: int) -> Container:
    for name, position, length in _chunks(file, start + 12, size, ">"):
        if name == b"SSND":
            more = _read(file, position + length + length % 2, 4) == b"FORM"
            return Container("aiff", start, _missing(position, length, size), has_more=more)
    return Container("aiff", start)


def _au(file: BinaryIO, start: int, size: int) -> Container:
    head = _read(file, start, 12)
    if len(head) < 12:
        return Container("au", start)
    offset, length = struct.unpack(">II" if head[:4] == b".snd" else "<II", head[4:])
    more = 0 < length < UNKNOWN_SIZE and _read(file, start + offset + length, 4) == head[:4]
    return Container("au", start, _missing(start + offset, length, size), has_more=more)


def _caf(file: BinaryIO, start: int, size: int) -> Container:
    position = start + 8
    while position + 12 <= size:
        name, length = struct.unpack(">4sq", _read(file, position, 12))
        if name == b"data":
            end = size if length < 0 else position + 12 + length
            found = Container("caf", start, max(0, end - size), has_more=_read(file, end, 4) == b"caff")
            if length < 0:  # to the end of the file; libsndfile takes it for damage
                found.patch = (position + 4 - start, (size - position - 12).to_bytes(8, "big"))
            return found
        position += 12 + max(0, length)
    return Container("caf", start)


_W64_RIFF = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00"
_W64_DATA = b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a"


def _w64(file: BinaryIO, start: int, size: int) -> Container:
    position = start + 40
    while position + 24 <= size:
        name, length = struct.unpack("<16sQ", _read(file, position, 24))
        if name == _W64_DATA and 24 < length < 2**62:
            end = position + length
            more = _read(file, end + -end % 8, 16) == _W64_RIFF
            return Container("w64", start, max(0, end - size), has_more=more, end=end - start)
        position += max(24, length + -length % 8)
    return Container("w64", start)


def _mp4(file: BinaryIO, start: int, size: int) -> Container:
    position = start
    while position + 8 <= size:
        length, _ = struct.unpack(">I4s", _read(file, position, 8))
        if length == 1:
            length = int.from_bytes(_read(file, position + 8, 8), "big")
        if length < 8:  # 0: up to the end
            break
        position += length
    return Container("mp4", start, max(0, position - size))


def _ogg(file: BinaryIO, start: int, size: int) -> Container:
    """Walks over the pages: one that is cut is missing bytes, a stream that begins after another is more."""
    position, found, is_head = start, Container("ogg", start), True
    while len(head := _read(file, position, 27)) == 27 and head[:4] == b"OggS":
        begins = bool(head[5] & 2)
        found.has_more |= begins and not is_head
        is_head &= begins
        segments = file.read(head[26])
        position += 27 + head[26] + sum(segments)
        if len(segments) < head[26]:
            break
    found.num_missing = max(0, position - size)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# MPEG audio
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Frame:
    """Of one frame its bytes, samples of each channel, Hz, and what all frames of a file have in common."""

    size: int
    num_samples: int
    sampling_rate: int
    kind: tuple[int, int, int]
    is_mono: bool


_BIT_RATES = {  # kbit/s; (MPEG 1?, layer)
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


@lru_cache(4096)
def _frame(head: bytes) -> _Frame | None:
    """What the four bytes of a frame header say; None if they are none, or of a free bit rate."""
    if len(head) < 4 or head[0] != 0xFF or head[1] < 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)
    bit_rate, rate, padding = head[2] >> 4, head[2] >> 2 & 3, head[2] >> 1 & 1
    if version == 1 or layer == 4 or rate == 3 or bit_rate in (0, 15):
        return None
    is_first = version == 3
    sampling_rate = (44100, 48000, 32000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
    bits = 1000 * _BIT_RATES[is_first, layer][bit_rate - 1]
    num_samples = 384 if layer == 1 else 1152 if layer == 2 or is_first else 576
    slot = 4 if layer == 1 else 1
    size = slot * (num_samples // 8 // slot * bits // sampling_rate + padding)
    return _Frame(size, num_samples, sampling_rate, (version, layer, rate), head[3] >> 6 == 3)


_SEARCH = 2**20  # bytes that are searched for the first frame, or for the next one after what is none


def _find_frame(file: BinaryIO, position: int, size: int, kind: tuple | None, num_frames: int) -> int | None:
    """
    The position of the first of `num_frames` frames that follow each other, or of a last one, at or after this one.
    """
    block = _read(file, position, _SEARCH)
    offset = block.find(b"\xff")
    while offset >= 0:
        at, wanted = position + offset, kind
        for number in range(num_frames):
            if number > 0 and kind is not None and at >= size:
                return position + offset
            frame = _frame(_read(file, at, 4))
            if frame is None or (wanted is not None and frame.kind != wanted):
                break
            wanted, at = frame.kind, at + frame.size
        else:
            return position + offset
        offset = block.find(b"\xff", offset + 1)
    return None


def _mpeg(file: BinaryIO, start: int, size: int) -> Container | None:
    """Counts the frames, since no header has to say their number, and some say a wrong one."""
    position = start
    first = _frame(_read(file, position, 4))
    if first is None:
        found_at = _find_frame(file, position, size, None, num_frames=4)
        if found_at is None:
            return None
        position = found_at
        first = _frame(_read(file, position, 4))
        assert first is not None  # that is what was found
    found = Container("mpeg", position, estimates_length=True)
    content = _read(file, position, first.size)
    tag = (
        4
        + {(True, False): 32, (True, True): 17, (False, False): 17, (False, True): 9}[
            first.kind[0] == 3, first.is_mono
        ]
    )
    declared = None
    if content[tag : tag + 4] in (b"Xing", b"Info") and int.from_bytes(content[tag + 4 : tag + 8], "big") & 1:
        declared = int.from_bytes(content[tag + 8 : tag + 12], "big")
        found.estimates_length = False
        position += first.size
    elif content[36:40] == b"VBRI":  # mpg123 would decode this frame as a silent one
        declared = int.from_bytes(content[50:54], "big")
        position += first.size
        found.start = position
    count, end = 0, position
    while position + 4 <= size:
        frame = _frame(_read(file, position, 4))
        if frame is not None and frame.kind == first.kind:
            position += frame.size
            if position <= size:
                count, end = count + 1, position
            continue
        after = _end_of_tag(file, position) or _find_frame(file, position + 1, size, first.kind, num_frames=2)
        if after is None:
            break
        position = after
    found.num_frames = count * first.num_samples
    if declared is None:  # a recording may end within a frame, and nothing promised the rest of it
        found.end = end - found.start
        return found
    if count < declared - 1 or position > size:  # some encoders count the frame of the header too
        found.num_missing = max(1, position - size)
    elif count > declared + 1 and not found.estimates_length:  # files that were joined
        found.patch = (tag + 8, count.to_bytes(4, "big"))
    return found


def _end_of_tag(file: BinaryIO, position: int) -> int | None:
    """The first byte after a tag in the middle or at the end of an MPEG file, None if there is none."""
    head = _read(file, position, 32)
    if head[:3] == b"TAG":
        return position + 128
    if head[:8] == b"APETAGEX" and len(head) == 32:
        return position + 32 + int.from_bytes(head[12:16], "little")
    if head[:3] == b"ID3" and len(head) >= 10 and max(head[6:10]) < 128:
        return position + 10 + (head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9])
    return None
