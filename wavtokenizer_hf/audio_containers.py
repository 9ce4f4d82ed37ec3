"""Read headers of audio files, to find truncated files. libsndfile reads those without an error.

This module decodes nothing. It does not trust lengths in headers, so all reads are small.
"""

import errno
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import BinaryIO, Literal


UNKNOWN_SIZE = 0x7FFF0000
"""Sizes from here on, and 0, mean an unknown size: ffmpeg writes 0xFFFFFFFF to a WAV stream, and sox 0x7FFFF000."""


@dataclass
class Container:
    """Position and promised length of the audio in a file.

    Args:
        format: "wav", "aiff", "au", "caf", "w64", "flac", "ogg", "mpeg", "mp4", or "" for any other format.
        start: Byte position of the audio file after leading tags.
        num_missing: Bytes that the header promises and the file lacks.
        num_frames: Samples per channel, by a count of the MPEG frames. None for other formats.
        estimates_length: Whether libsndfile would estimate the length and stop there.
        patch: Correction of a length in the header: position relative to `start`, and the bytes to replace it with.
        has_more: Whether a second file of the same format follows. libsndfile does not read it.
        end: End of the audio relative to `start`, if libsndfile would decode the bytes after it as audio. Else None.
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
    """Inspect the header of a seekable binary file. The position in the file changes."""
    size = file.seek(0, 2)
    start = _end_of_id3(file, size)
    head = _read(file, start, 16)
    if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        return _inspect_wav(file, start, size)
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return _inspect_aiff(file, start, size)
    if head[:4] in (b".snd", b"dns."):
        return _inspect_au(file, start, size)
    if head[:4] == b"caff":
        return _inspect_caf(file, start, size)
    if head == _W64_RIFF:
        return _inspect_w64(file, start, size)
    if head[:4] == b"fLaC":
        return Container("flac", start)
    if head[:4] == b"OggS":
        return _inspect_ogg(file, start, size)
    if head[4:8] == b"ftyp":
        return _inspect_mp4(file, start, size)
    return _inspect_mpeg(file, start, size) or Container("", start)


def _read(file: BinaryIO, position: int, size: int) -> bytes:
    """Read bytes at a position from a header. Return none if it lies beyond the end or beyond the largest offset."""
    try:
        file.seek(position)
    except OverflowError:
        return b""
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return b""
    return file.read(size)


def has_second_flac(file: BinaryIO, start: int) -> bool:
    """Return whether a second FLAC file follows the one at `start`. Reads the whole file: call it after decoding."""
    pattern = b"fLaC\x00\x00\x00\x22"  # the first 8 bytes of every FLAC file
    file.seek(start + 4)
    tail = b""
    while block := file.read(2**20):
        if pattern in tail + block:
            return True
        tail = block[-len(pattern) + 1 :]
    return False


def _end_of_id3(file: BinaryIO, size: int) -> int:
    """Return the position after leading ID3v2 tags. Players write them before any format."""
    position = 0
    while (head := _read(file, position, 10))[:3] == b"ID3" and len(head) == 10 and max(head[6:10]) < 128:
        length = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
        position += 10 + length + (10 if head[5] & 0x10 else 0)
    return min(position, size)


# ---------------------------------------------------------------------------------------------------------------------
# Chunk-based formats, and Ogg
# ---------------------------------------------------------------------------------------------------------------------


def _iter_chunks(file: BinaryIO, position: int, size: int, endian: str) -> Iterator[tuple[bytes, int, int]]:
    """Yield (name, position of the content, size of the content) for each chunk of RIFF or AIFF."""
    while position + 8 <= size:
        name, length = struct.unpack(f"{endian}4sI", _read(file, position, 8))
        yield name, position + 8, length
        position += 8 + length + length % 2


def _num_missing(position: int, length: int, size: int) -> int:
    return 0 if length == 0 or length >= UNKNOWN_SIZE else max(0, position + length - size)


def _inspect_wav(file: BinaryIO, start: int, size: int) -> Container:
    kind = _read(file, start, 4)
    container, long_size = Container("wav", start), None
    for name, position, length in _iter_chunks(file, start + 12, size, ">" if kind == b"RIFX" else "<"):
        if name == b"ds64" and kind in (b"RF64", b"BW64"):
            content = _read(file, position, 16)
            long_size = struct.unpack("<Q", content[8:])[0] if len(content) == 16 else None
        elif name == b"data" and long_size is not None and length == 0xFFFFFFFF:
            container.num_missing = max(0, position + long_size - size)
            return container
        elif name == b"data" and length == 0 and not _is_last_chunk(file, position, size, kind):
            # the recorder ended before it wrote the size; libsndfile would find no samples
            length_bytes = min(size - position, 2**32 - 1).to_bytes(4, _BYTE_ORDER[kind == b"RIFX"])
            container.patch = (position - 4 - start, length_bytes)
            return container
        elif name == b"data":
            container.num_missing = _num_missing(position, length, size)
            end = position + length + length % 2
            container.has_more = 0 < length < UNKNOWN_SIZE and _read(file, end, 4) in (b"RIFF", b"RIFX", b"RF64")
            return container
    container.num_missing = 1  # the file ends before its samples begin
    return container


_BYTE_ORDER: dict[bool, Literal["big", "little"]] = {True: "big", False: "little"}


def _is_last_chunk(file: BinaryIO, position: int, size: int, kind: bytes) -> bool:
    """Return whether the file ends at `position`, or after one complete chunk from there."""
    head = _read(file, position, 8)
    length = int.from_bytes(head[4:], _BYTE_ORDER[kind == b"RIFX"])
    return len(head) == 0 or (len(head) == 8 and position + 8 + length + length % 2 == size)


def _inspect_aiff(file: BinaryIO, start: int, size: int) -> Container:
    for name, position, length in _iter_chunks(file, start + 12, size, ">"):
        if name == b"SSND":
            has_more = _read(file, position + length + length % 2, 4) == b"FORM"
            return Container("aiff", start, _num_missing(position, length, size), has_more=has_more)
    return Container("aiff", start)


def _inspect_au(file: BinaryIO, start: int, size: int) -> Container:
    head = _read(file, start, 12)
    if len(head) < 12:
        return Container("au", start)
    offset, length = struct.unpack(">II" if head[:4] == b".snd" else "<II", head[4:])
    has_more = 0 < length < UNKNOWN_SIZE and _read(file, start + offset + length, 4) == head[:4]
    return Container("au", start, _num_missing(start + offset, length, size), has_more=has_more)


def _inspect_caf(file: BinaryIO, start: int, size: int) -> Container:
    position = start + 8
    while position + 12 <= size:
        name, length = struct.unpack(">4sq", _read(file, position, 12))
        if name == b"data":
            end = size if length < 0 else position + 12 + length
            container = Container("caf", start, max(0, end - size), has_more=_read(file, end, 4) == b"caff")
            if length < 0:  # up to the end of the file, which libsndfile treats as damage
                container.patch = (position + 4 - start, (size - position - 12).to_bytes(8, "big"))
            return container
        position += 12 + max(0, length)
    return Container("caf", start)


_W64_RIFF = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00"
_W64_DATA = b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a"


def _inspect_w64(file: BinaryIO, start: int, size: int) -> Container:
    position = start + 40
    while position + 24 <= size:
        name, length = struct.unpack("<16sQ", _read(file, position, 24))
        if name == _W64_DATA and 24 < length < 2**62:
            end = position + length
            has_more = _read(file, end + -end % 8, 16) == _W64_RIFF
            return Container("w64", start, max(0, end - size), has_more=has_more, end=end - start)
        position += max(24, length + -length % 8)
    return Container("w64", start)


def _inspect_mp4(file: BinaryIO, start: int, size: int) -> Container:
    position = start
    while position + 8 <= size:
        length, _ = struct.unpack(">I4s", _read(file, position, 8))
        if length == 1:
            length = int.from_bytes(_read(file, position + 8, 8), "big")
        if length < 8:  # 0: the box extends to the end of the file
            break
        position += length
    return Container("mp4", start, max(0, position - size))


def _inspect_ogg(file: BinaryIO, start: int, size: int) -> Container:
    """Walk over the pages, to find a truncated page or a second stream."""
    position, container, in_first_pages = start, Container("ogg", start), True
    while len(head := _read(file, position, 27)) == 27 and head[:4] == b"OggS":
        begins_stream = bool(head[5] & 2)
        container.has_more |= begins_stream and not in_first_pages
        in_first_pages &= begins_stream
        segments = file.read(head[26])
        position += 27 + head[26] + sum(segments)
        if len(segments) < head[26]:
            break
    container.num_missing = max(0, position - size)
    return container


# ---------------------------------------------------------------------------------------------------------------------
# MPEG audio
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _MpegFrame:
    """Properties of one MPEG audio frame.

    Args:
        size: Size of the frame, in bytes.
        num_samples: Samples per channel.
        sampling_rate: Sampling rate, in Hz.
        kind: MPEG version, layer and index of the sampling rate, which are equal in all frames of a file.
        is_mono: Whether the frame has one channel.
    """

    size: int
    num_samples: int
    sampling_rate: int
    kind: tuple[int, int, int]
    is_mono: bool


_BIT_RATES = {  # (whether it is MPEG-1, layer) -> kbit/s
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


@lru_cache(4096)
def _parse_frame_header(head: bytes) -> _MpegFrame | None:
    """Parse the four bytes of an MPEG frame header. Return None if they are none, or have a free bit rate."""
    if len(head) < 4 or head[0] != 0xFF or head[1] < 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)
    bit_rate, rate, padding = head[2] >> 4, head[2] >> 2 & 3, head[2] >> 1 & 1
    if version == 1 or layer == 4 or rate == 3 or bit_rate in (0, 15):
        return None
    is_mpeg1 = version == 3
    sampling_rate = (44100, 48000, 32000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
    bits_per_second = 1000 * _BIT_RATES[is_mpeg1, layer][bit_rate - 1]
    num_samples = 384 if layer == 1 else 1152 if layer == 2 or is_mpeg1 else 576
    slot_size = 4 if layer == 1 else 1
    size = slot_size * (num_samples // 8 // slot_size * bits_per_second // sampling_rate + padding)
    return _MpegFrame(size, num_samples, sampling_rate, (version, layer, rate), head[3] >> 6 == 3)


_SEARCH_BYTES = 2**20  # searched for the first frame, or for the next one after other data


def _find_frame(file: BinaryIO, position: int, size: int, kind: tuple | None, num_frames: int) -> int | None:
    """Return the position of the next frame from `position` on, or None.

    `num_frames` frames have to follow each other there. If `kind` is given, fewer suffice at the end of the file.
    """
    block = _read(file, position, _SEARCH_BYTES)
    offset = block.find(b"\xff")
    while offset >= 0:
        frame_position, expected_kind = position + offset, kind
        for index in range(num_frames):
            if index > 0 and kind is not None and frame_position >= size:
                return position + offset
            frame = _parse_frame_header(_read(file, frame_position, 4))
            if frame is None or (expected_kind is not None and frame.kind != expected_kind):
                break
            expected_kind, frame_position = frame.kind, frame_position + frame.size
        else:
            return position + offset
        offset = block.find(b"\xff", offset + 1)
    return None


def _inspect_mpeg(file: BinaryIO, start: int, size: int) -> Container | None:
    """Count the frames, since headers may lack their number or have a wrong one. Return None if there are none."""
    position = start
    first_frame = _parse_frame_header(_read(file, position, 4))
    if first_frame is None:
        first_position = _find_frame(file, position, size, None, num_frames=4)
        if first_position is None:
            return None
        position = first_position
        first_frame = _parse_frame_header(_read(file, position, 4))
        assert first_frame is not None  # _find_frame parsed it
    container = Container("mpeg", position, estimates_length=True)
    content = _read(file, position, first_frame.size)
    side_info_sizes = {(True, False): 32, (True, True): 17, (False, False): 17, (False, True): 9}
    tag = 4 + side_info_sizes[first_frame.kind[0] == 3, first_frame.is_mono]
    num_declared = None
    if content[tag : tag + 4] in (b"Xing", b"Info") and int.from_bytes(content[tag + 4 : tag + 8], "big") & 1:
        num_declared = int.from_bytes(content[tag + 8 : tag + 12], "big")
        container.estimates_length = False
        position += first_frame.size
    elif content[36:40] == b"VBRI":  # mpg123 would decode this frame as silence
        num_declared = int.from_bytes(content[50:54], "big")
        position += first_frame.size
        container.start = position
    num_frames, end = 0, position
    while position + 4 <= size:
        frame = _parse_frame_header(_read(file, position, 4))
        if frame is not None and frame.kind == first_frame.kind:
            position += frame.size
            if position <= size:
                num_frames, end = num_frames + 1, position
            continue
        next_position = _end_of_tag(file, position) or _find_frame(
            file, position + 1, size, first_frame.kind, num_frames=2
        )
        if next_position is None:
            break
        position = next_position
    container.num_frames = num_frames * first_frame.num_samples
    if num_declared is None:  # a recording may end within a frame, so this is no truncation
        container.end = end - container.start
        return container
    if num_frames < num_declared - 1 or position > size:  # some encoders count the frame of the header too
        container.num_missing = max(1, position - size)
    elif num_frames > num_declared + 1 and not container.estimates_length:  # concatenated files
        container.patch = (tag + 8, num_frames.to_bytes(4, "big"))
    return container


def _end_of_tag(file: BinaryIO, position: int) -> int | None:
    """Return the position after a tag in the middle or at the end of an MPEG file, or None if there is no tag."""
    head = _read(file, position, 32)
    if head[:3] == b"TAG":
        return position + 128
    if head[:8] == b"APETAGEX" and len(head) == 32:
        return position + 32 + int.from_bytes(head[12:16], "little")
    if head[:3] == b"ID3" and len(head) >= 10 and max(head[6:10]) < 128:
        return position + 10 + (head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9])
    return None
