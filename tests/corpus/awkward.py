"""Awkward audio files as people have them, made by formula, with the samples that a reader has to give or the kind of
its refusal.

Containers are written by hand, byte by byte, where soundfile would not write what is awkward about them; only
compressed audio is encoded by soundfile. So nothing here needs ffmpeg or sox, and no binary file lies in the
repository.
"""

import io
import struct
from dataclasses import dataclass

import numpy as np
import soundfile


RATE = 24000


@dataclass
class Case:
    """
    One file.

    Args:
        name: of the file; its bytes as `os.fsencode` gives them.
        content: bytes of it.
        expected: channels (T, C), float32, at `rate`, that its samples have to be close to; None if it is to be
            refused.
        rate: Hz of `expected`.
        kind: of the refusal.
        warnings: kinds of them.
        tolerance: largest difference from `expected`.
        slack: samples that the length may differ by: a codec's frame.
        decoded_by_others: whether ffmpeg decodes it to the same samples.
    """

    name: str
    content: bytes
    expected: np.ndarray | None = None
    rate: int = RATE
    kind: str | None = None
    warnings: tuple[str, ...] = ()
    tolerance: float = 0.0
    slack: int = 0
    decoded_by_others: bool = True


# ---------------------------------------------------------------------------------------------------------------------
# Sound, and containers by hand
# ---------------------------------------------------------------------------------------------------------------------


def voice(seconds: float = 0.1, rate: int = RATE, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Harmonics with vibrato and some noise: (T, C), float32, another in each channel, within [-0.8, 0.8]."""
    random, time = np.random.default_rng(seed), np.arange(round(seconds * rate)) / rate
    columns = []
    for channel in range(channels):
        phase = 2 * np.pi * np.cumsum((130 + 40 * channel) + 20 * np.sin(2 * np.pi * 5 * time)) / rate
        tone = sum(np.sin(k * phase) / k for k in range(1, 12) if k * (200 + 40 * channel) < rate / 2.5)
        columns.append(0.3 * tone + 0.003 * random.standard_normal(len(time)))
    return np.clip(np.stack(columns, 1), -0.8, 0.8).astype(np.float32)


def integers(sound: np.ndarray, bits: int) -> np.ndarray:
    return np.round(sound.astype(np.float64) * 2 ** (bits - 1)).astype(np.int64)


def quantized(sound: np.ndarray, bits: int = 16) -> np.ndarray:
    """What a reader gives for integers of so many bits."""
    return (integers(sound, bits) / 2 ** (bits - 1)).astype(np.float32)


def pcm(sound: np.ndarray, bits: int = 16, endian: str = "<") -> bytes:
    values = integers(sound, bits)
    if bits == 8:
        return (values + 128).astype(np.uint8).tobytes()
    if bits == 24:
        four = values.astype(f"{endian}i4").reshape(-1, 1).view(np.uint8)
        return (four[:, :3] if endian == "<" else four[:, 1:]).tobytes()
    return values.astype(f"{endian}i{bits // 8}").tobytes()


def chunk(name: bytes, content: bytes, size: int | None = None, endian: str = "<") -> bytes:
    size = len(content) if size is None else size
    return struct.pack(f"{endian}4sI", name, size) + content + bytes(len(content) % 2)


def fmt(channels=1, rate=RATE, bits=16, tag=1, endian="<") -> bytes:
    frame = channels * bits // 8
    fields = struct.pack(f"{endian}HHIIHH", tag, channels, rate, min(rate * frame, 2**32 - 1), frame, bits)
    return chunk(b"fmt ", fields, endian=endian)


def riff(*chunks: bytes, name: bytes = b"RIFF", size: int | None = None) -> bytes:
    content = b"WAVE" + b"".join(chunks)
    endian = ">" if name == b"RIFX" else "<"
    return name + struct.pack(f"{endian}I", len(content) if size is None else size) + content


def wav(sound: np.ndarray, rate=RATE, bits=16, before=b"", after=b"", data_size=None, header_rate=None) -> bytes:
    header = fmt(sound.shape[1], rate if header_rate is None else header_rate, bits)
    return riff(header, before, chunk(b"data", pcm(sound, bits), data_size), after)


def float_wav(samples: np.ndarray, bits: int = 32) -> bytes:
    data = samples.astype("<f4" if bits == 32 else "<f8").tobytes()
    return riff(fmt(samples.shape[1], bits=bits, tag=3), chunk(b"data", data))


def rifx(sound: np.ndarray) -> bytes:
    return riff(fmt(endian=">"), chunk(b"data", pcm(sound, 16, ">"), endian=">"), name=b"RIFX")


def extensible_wav(sound: np.ndarray) -> bytes:
    guid = struct.pack("<H", 1) + bytes.fromhex("000000001000800000aa00389b71")
    fields = (
        struct.pack("<HHIIHHHHI", 0xFFFE, sound.shape[1], RATE, RATE * 2, 2 * sound.shape[1], 16, 22, 16, 0) + guid
    )
    return riff(chunk(b"fmt ", fields), chunk(b"data", pcm(sound)))


def rf64(sound: np.ndarray) -> bytes:
    data = pcm(sound)
    sizes = chunk(b"ds64", struct.pack("<QQQI", 100 + len(data), len(data), len(sound), 0))
    return riff(sizes, fmt(), chunk(b"data", data, 0xFFFFFFFF), name=b"RF64", size=0xFFFFFFFF)


def aiff(sound: np.ndarray, rate: int = RATE) -> bytes:
    exponent = rate.bit_length() - 1
    extended = struct.pack(">HQ", 16383 + exponent, rate << (63 - exponent))
    common = chunk(b"COMM", struct.pack(">hIh", sound.shape[1], len(sound), 16) + extended, endian=">")
    samples = chunk(b"SSND", bytes(8) + pcm(sound, 16, ">"), endian=">")
    content = b"AIFF" + common + samples
    return b"FORM" + struct.pack(">I", len(content)) + content


def au(sound: np.ndarray, size: int | None = None) -> bytes:
    data = pcm(sound, 16, ">")
    size = len(data) if size is None else size
    return struct.pack(">4sIIIII", b".snd", 24, size, 3, RATE, sound.shape[1]) + data


def caf(sound: np.ndarray, size: int | None = None) -> bytes:
    data = pcm(sound, 16, ">")
    description = struct.pack(">d4sIIIII", float(RATE), b"lpcm", 0, 2 * sound.shape[1], 1, sound.shape[1], 16)
    size = 4 + len(data) if size is None else size
    return (
        b"caff\0\1\0\0"
        + struct.pack(">4sq", b"desc", 32)
        + description
        + struct.pack(">4sqI", b"data", size, 0)
        + data
    )


def id3v2(size: int = 30000) -> bytes:
    """A tag of so many bytes, as players write them for covers."""
    return b"ID3\x03\0\0" + bytes(size >> shift & 127 for shift in (21, 14, 7, 0)) + bytes(size)


def encoded(sound: np.ndarray, format: str, subtype: str | None = None, rate: int = RATE, **options) -> bytes:
    content = io.BytesIO()
    soundfile.write(content, sound, rate, format=format, subtype=subtype, **options)
    return content.getvalue()


def with_flac_length(content: bytes, num_samples: int) -> bytes:
    """The 36 bits of STREAMINFO that count the samples; 0 says that nobody knows."""
    fields = int.from_bytes(content[18:26], "big") >> 36 << 36 | num_samples
    return content[:18] + fields.to_bytes(8, "big") + content[26:]


def first_mp3_frame_end(content: bytes) -> int:
    """Where the second frame begins: at the next header of the same version, layer and rate."""
    alike = [
        at for at in range(4, 3000)
        if content[at] == content[0] and content[at + 1] == content[1] and content[at + 2] & 12 == content[2] & 12
    ]  # fmt: skip
    return alike[0]


# ---------------------------------------------------------------------------------------------------------------------
# The files
# ---------------------------------------------------------------------------------------------------------------------


def cases() -> list[Case]:
    """All files, in the order of their names."""
    found = [*_wav_files(), *_odd_numbers(), *_other_containers(), *_flac(), *_ogg(), *_mp3(), *_names(), *_no_audio()]
    return sorted(found, key=lambda case: case.name)


def _wav_files() -> list[Case]:
    mono, stereo, many = voice(), voice(channels=2), voice(channels=8)
    good, half = wav(mono), quantized(mono)
    note = chunk(b"LIST", b"INFOISFT" + struct.pack("<I", 6) + b"maker\0")
    odd = chunk(b"note", b"five!")
    ulaw, alaw = encoded(mono, "WAV", "ULAW"), encoded(mono, "WAV", "ALAW")
    slow = voice(rate=8000)
    fine = [Case(f"pcm{bits}.wav", wav(mono, bits=bits), quantized(mono, bits)) for bits in (8, 16, 24, 32)]
    return [
        *fine,
        Case("float32.wav", float_wav(mono), mono),
        Case("float64.wav", float_wav(mono, 64), mono),
        Case("extensible.wav", extensible_wav(mono), half),
        # ffmpeg 5.1 takes these samples for little-endian, and rounds ADPCM in another way
        Case("big_endian.wav", rifx(mono), half, decoded_by_others=False),
        Case("rf64.wav", rf64(mono), half),
        Case("ulaw.wav", ulaw, mono, tolerance=0.04),
        Case("alaw.wav", alaw, mono, tolerance=0.04),
        Case(
            "ms_adpcm.wav", encoded(mono, "WAV", "MS_ADPCM"), mono, tolerance=0.1, slack=1700, decoded_by_others=False
        ),
        Case(
            "ima_adpcm.wav",
            encoded(mono, "WAV", "IMA_ADPCM"),
            mono,
            tolerance=0.5,
            slack=1700,
            decoded_by_others=False,
        ),
        Case("gsm.wav", encoded(slow, "WAV", "GSM610", 8000), slow, 8000, tolerance=0.5, slack=640),
        Case("list_before.wav", wav(mono, before=note), half),
        Case("odd_chunk_before.wav", wav(mono, before=odd), half),
        Case("list_after.wav", wav(mono, after=note), half),
        Case("large_chunk_before.wav", wav(mono, before=chunk(b"JUNK", bytes(300001))), half),
        Case("unknown_size_ffmpeg.wav", wav(mono, data_size=0xFFFFFFFF), half),
        Case("unknown_size_sox.wav", wav(mono, data_size=0x7FFFF000), half),
        Case("unfinished.wav", wav(mono, data_size=0), half),
        Case("tag_in_front.wav", id3v2() + good, half, decoded_by_others=False),
        Case("stereo.wav", wav(stereo), quantized(stereo)),
        Case("eight_channels.wav", wav(many), quantized(many)),
        Case("one_sample.wav", wav(mono[:1]), half[:1]),
        Case("low_rate.wav", wav(voice(rate=1000), rate=1000), quantized(voice(rate=1000)), 1000),
        Case("odd_rate.wav", wav(voice(rate=12345), rate=12345), quantized(voice(rate=12345)), 12345),
        Case("high_rate.wav", wav(voice(rate=192000), rate=192000), quantized(voice(rate=192000)), 192000),
        Case("half.wav", good[: len(good) // 2], kind="truncated"),
        Case("one_byte_short.wav", good[:-1], kind="truncated"),
        Case("claims_hours.wav", wav(mono, data_size=2**30), kind="truncated"),
        Case("joined.wav", good + good, kind="unreadable"),
        Case("no_samples.wav", wav(mono[:0]), kind="empty"),
        Case("header_alone.wav", good[:36], kind="truncated"),
        *(Case(f"rate_{rate}.wav", wav(mono, header_rate=rate), kind="sampling-rate") for rate in (1, 7, 999)),
        Case("rate_huge.wav", wav(mono, header_rate=2**31 - 1), kind="sampling-rate"),
    ]


def _odd_numbers() -> list[Case]:
    mono = voice()
    opposite = np.concatenate([mono, -mono], 1)
    almost = np.concatenate([mono, -0.999 * mono], 1).astype(np.float32)
    nan, infinite, large = (
        np.concatenate([mono, [[value]], mono]).astype(np.float32) for value in (np.nan, np.inf, 3e38)
    )
    return [
        Case("opposite.wav", wav(opposite), quantized(opposite), warnings=("cancelled",)),
        Case("almost_opposite.wav", float_wav(almost), almost, warnings=("cancelled",)),
        Case("silence.wav", wav(0 * mono), 0 * mono, warnings=("silent",)),
        Case("integers_as_floats.wav", float_wav(mono * 32768), mono * 32768, warnings=("out-of-range",)),
        Case("loud_but_real.wav", float_wav(mono * 4), mono * 4),
        Case("nan.wav", float_wav(nan), kind="not-finite"),
        Case("infinite.wav", float_wav(infinite), kind="not-finite"),
        Case("beyond_float.wav", float_wav(large), kind="not-finite"),
        Case("beyond_float32.wav", float_wav(large.astype(np.float64) * 1e10, 64), kind="not-finite"),
    ]


def _other_containers() -> list[Case]:
    mono, half = voice(), quantized(voice())
    exact = integers(mono, 16).astype(np.int16)  # what soundfile makes of floats is rounded in another way
    w64 = encoded(exact, "W64", "PCM_16")
    return [
        Case("aiff.aiff", aiff(mono), half),
        Case("aiff_tag_in_front.aif", id3v2() + aiff(mono), half, decoded_by_others=False),
        Case("aiff_short.aiff", aiff(mono)[:-1000], kind="truncated"),
        Case("aiff_float.aifc", encoded(mono, "AIFF", "FLOAT"), mono),
        Case("au.au", au(mono), half),
        Case("au_unknown_size.au", au(mono, 0xFFFFFFFF), half),
        Case("au_short.snd", au(mono)[:-1000], kind="truncated"),
        Case("caf.caf", caf(mono), half),
        Case("caf_unknown_size.caf", caf(mono, -1), half),
        Case("caf_short.caf", caf(mono)[:-1000], kind="truncated"),
        Case("w64.w64", w64, half),
        Case("w64_tail.w64", w64 + bytes(1000), half, decoded_by_others=False),
        Case("w64_short.w64", w64[:-1000], kind="truncated"),
        Case("nist.sph", encoded(exact, "NIST", "PCM_16"), half),
        Case("creative.voc", encoded(exact, "VOC", "PCM_16", rate=16000), half, 16000),
    ]


def _flac() -> list[Case]:
    mono, half = voice(), quantized(voice())
    good = encoded(mono, "FLAC")
    return [
        Case("flac16.flac", good, half),
        Case("flac24.flac", encoded(mono, "FLAC", "PCM_24"), quantized(mono, 24)),
        Case("flac_unknown_length.flac", with_flac_length(good, 0), half),
        Case("flac_tag_in_front.flac", id3v2() + good, half),
        Case("flac_tag_behind.flac", good + b"TAG" + bytes(125), half),
        Case("flac_half.flac", good[: len(good) // 2], kind="truncated"),
        Case("flac_claims_hours.flac", with_flac_length(good, 5 * 3600 * RATE), kind="truncated"),
        Case("flac_joined.flac", good + good, kind="unreadable"),
        Case("flac_header_alone.flac", good[:42], kind="truncated"),
        Case("flac_content.wav", good, half),
    ]


def _ogg() -> list[Case]:
    mono, wide = voice(0.5), voice(0.5, 48000)
    vorbis, opus = encoded(mono, "OGG", "VORBIS"), encoded(wide, "OGG", "OPUS", 48000)
    return [
        Case("vorbis.ogg", vorbis, mono, tolerance=0.3, slack=1024),
        Case("opus.opus", opus, wide, 48000, tolerance=0.5),
        Case("vorbis_half.ogg", vorbis[: len(vorbis) // 2], kind="truncated"),
        Case("opus_short.opus", opus[:-100], kind="truncated"),
        Case("vorbis_joined.oga", vorbis + vorbis, kind="unreadable"),
    ]


def _mp3() -> list[Case]:
    # not 24 kHz: there mpg123 and ffmpeg have different tables of bands, and give different samples
    rate, loud_then_quiet = 16000, voice(1.2, 16000)
    loud_then_quiet[len(loud_then_quiet) // 4 :] *= 0.01
    variable = encoded(loud_then_quiet, "MP3", rate=rate, bitrate_mode="VARIABLE", compression_level=0.2)
    bare = variable[first_mp3_frame_end(variable) :]
    sound = voice(0.5, rate)
    constant = encoded(sound, "MP3", rate=rate, bitrate_mode="CONSTANT")
    # without the header nobody knows of the encoder's delay of 1105 samples, nor of what fills the last frame
    late = np.pad(loud_then_quiet, ((1105, 0), (0, 0)))
    late = np.pad(late, ((0, -len(late) % 576), (0, 0)))
    twice = np.concatenate([sound, np.zeros((1680, 1), np.float32), sound])
    return [
        Case("constant.mp3", constant, sound, rate, tolerance=0.3),
        Case("variable.mp3", variable, loud_then_quiet, rate, tolerance=0.3),
        Case("variable_without_header.mp3", bare, late, rate, tolerance=0.3, slack=1152),
        Case("mp3_tag_in_front.mp3", id3v2() + bare, late, rate, tolerance=0.3, slack=1152),
        Case("old_tag_behind.mp3", constant + b"TAG" + bytes(125), sound, rate, tolerance=0.3),
        Case("ends_within_a_frame.mp3", bare[:-10], late, rate, tolerance=0.3, slack=1152),
        Case("mp3_half.mp3", constant[: len(constant) // 2], kind="truncated"),
        Case("mp3_joined.mp3", constant + constant, twice, rate, tolerance=2.0, slack=2304, decoded_by_others=False),
        Case("mp3_content.wav", constant, sound, rate, tolerance=0.3),
    ]


def _names() -> list[Case]:
    mono, half = voice(), quantized(voice())
    names = [
        "Track 2.0 (clean).wav", "Track 2.1 (clean).wav", "talk1_1.10-1.19.wav", "UPPER CASE.WAV", "it's; $HOME.wav",
        "日本語.wav", "caf\udce9.wav", f"{'long' * 55}.wav",
    ]  # fmt: skip
    return [Case(name, wav(mono), half) for name in names]


def _no_audio() -> list[Case]:
    return [
        Case("nothing.wav", b"", kind="empty"),
        Case("zeros.wav", bytes(5000), kind="unreadable"),
        Case("page.mp3", b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * 20, kind="unreadable"),
        Case("words.flac", b"fLaC and then nothing", kind="unreadable"),
        Case("noise.ogg", np.random.default_rng(0).bytes(5000), kind="unreadable"),
        Case("tag_alone.opus", id3v2(), kind="unreadable"),
        Case("tag_without_end.aif", id3v2(2**27)[:5000], kind="unreadable"),
    ]
