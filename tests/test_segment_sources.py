"""Manifests of segments and Lhotse Shar as sources of `tokenize`: each segment gets the codes of a separate file."""

import gzip
import io
import json
import re
import tarfile
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile
from bulk_corpus import codes_alone, rows_of, save_model
from corpus.awkward import cases
from test_export_onnx import tiny

from wavtokenizer_hf import audio
from wavtokenizer_hf.bulk import TokenizeOptions, tokenize
from wavtokenizer_hf.bulk.sources import open_source, segments


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, one_thread):
    """Return a folder with a tiny model and two recordings, one of them in stereo."""
    workspace = tmp_path_factory.mktemp("segments")
    save_model(tiny(), workspace / "model")
    random = np.random.default_rng(0)
    soundfile.write(workspace / "talk.wav", random.uniform(-0.9, 0.9, 48_000), 24_000, subtype="FLOAT")
    soundfile.write(workspace / "stereo.wav", random.uniform(-0.9, 0.9, (16_000, 2)), 16_000, subtype="FLOAT")
    return workspace


def run(workspace, source, output, **options):
    return tokenize(source, str(workspace / "model"), output, TokenizeOptions(num_processes=1, **options))


def write_manifest(workspace, rows, name="list.jsonl"):
    (workspace / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return workspace / name


ROWS = [
    {"audio": "talk.wav", "start": 1.25, "duration": 0.5, "text": "b"},
    {"audio": "stereo.wav", "start": 0, "duration": 1.0, "text": "c"},
    {"audio": "talk.wav", "start": 0.0, "duration": 0.3, "text": "a"},
]


def test_segments_get_the_codes_of_a_separate_file_and_each_recording_is_read_once(workspace, tmp_path, monkeypatch):
    real, read = segments.audio.read_channels, []

    def counted(path):
        read.append(str(path))
        return real(path)

    monkeypatch.setattr(segments.audio, "read_channels", counted)
    run(workspace, write_manifest(workspace, ROWS), tmp_path / "out", num_readers=1)
    assert sorted(read) == [str(workspace / "stereo.wav"), str(workspace / "talk.wav")]
    monkeypatch.undo()
    files = {}
    for row in ROWS:
        samples, rate = soundfile.read(workspace / row["audio"], dtype="float32")
        part = samples[round(row["start"] * rate) :][: round(row["duration"] * rate)]
        path = tmp_path / f"{row['text']}.wav"
        soundfile.write(path, part, rate, subtype="FLOAT")
        files[row["text"]] = path
    found = rows_of(tmp_path / "out")
    assert set(found) == {"talk.wav#1.25+0.5", "talk.wav#0+0.3", "stereo.wav#0+1"}
    by_text = {row["text"]: row["audio_codes"] for row in found.values()}
    assert by_text == codes_alone(tiny(), files)
    assert found["talk.wav#1.25+0.5"]["start"] == 1.25 and found["talk.wav#1.25+0.5"]["duration"] == 0.5


def test_several_readers_read_each_recording_once(workspace, monkeypatch):
    rows = [
        {"audio": f"{number}.wav", "start": position / 10, "duration": 0.1}
        for position in range(10)
        for number in range(4)
    ]
    for number in range(4):
        soundfile.write(workspace / f"{number}.wav", np.zeros(24_000), 24_000)
    real, read = segments.audio.read_channels, []

    def slow(path):
        read.append(path)
        time.sleep(0.02)  # long enough for all readers to wait for it
        return real(path)

    monkeypatch.setattr(segments.audio, "read_channels", slow)
    source = open_source(write_manifest(workspace, rows, "many.jsonl"))
    with ThreadPoolExecutor(4) as readers:
        clips = list(readers.map(source.read, [item.locator for item in source.items]))
    assert {len(clip.samples) for clip in clips} == {2_400}
    assert sorted(read) == [str(workspace / f"{number}.wav") for number in range(4)]


def test_a_channel_can_be_selected_and_opposite_phase_is_reported(workspace, tmp_path):
    samples = np.sin(np.arange(24_000) / 9).astype(np.float32)
    soundfile.write(workspace / "opposite.wav", np.stack([samples, -samples], axis=1), 24_000, subtype="FLOAT")
    soundfile.write(tmp_path / "left.wav", samples[6_000:18_000], 24_000, subtype="FLOAT")
    manifest = write_manifest(workspace, [{"audio": "opposite.wav", "start": 0.25, "duration": 0.5}], "opposite.jsonl")
    run(workspace, manifest, tmp_path / "mean")
    (mean,) = rows_of(tmp_path / "mean").values()
    assert mean["warnings"] == ["cancelled"]
    run(workspace, manifest, tmp_path / "left", channel="left")
    (left,) = rows_of(tmp_path / "left").values()
    assert left["audio_codes"] == codes_alone(tiny(), {"": tmp_path / "left.wav"})[""] and not left["warnings"]


def test_a_segment_beyond_its_recording_is_listed_and_a_bad_row_refused(workspace, tmp_path):
    rows = [*ROWS, {"audio": "talk.wav", "start": 1.9, "duration": 0.5, "text": "d"}]
    result = run(workspace, write_manifest(workspace, rows, "long.jsonl"), tmp_path / "out")
    (failure,) = result.failures.values()
    assert "ends after" in failure.reason and "which has 2 s" in failure.reason
    assert failure.kind == "truncated" and result.total.num_clips == 3
    for bad in ({"start": -1, "duration": 1}, {"start": 0, "duration": 0}, {"start": "x", "duration": 1}):
        manifest = write_manifest(workspace, [{"audio": "talk.wav", **bad}], "bad.jsonl")
        with pytest.raises(ValueError, match=r"Row 1 has .* expected seconds"):
            run(workspace, manifest, tmp_path / "bad")


def test_lhotse_shar_cuts_get_their_codes(workspace, tmp_path):
    lhotse = pytest.importorskip("lhotse", reason="pip install lhotse")
    from lhotse.shar import SharWriter

    files = {"talk": workspace / "talk.wav", "stereo": workspace / "stereo.wav"}
    shar = tmp_path / "shar"
    shar.mkdir()
    with SharWriter(str(shar), fields={"recording": "flac"}, shard_size=1) as writer:
        for name, path in files.items():
            cut = lhotse.Recording.from_file(path, recording_id=name).to_cut()
            cut = cut.to_mono(mono_downmix=True) if cut.num_channels > 1 else cut
            cut.id = name
            cut.supervisions = [lhotse.SupervisionSegment(name, name, 0, cut.duration, text=f"text of {name}")]
            writer.write(cut)
    assert len(list(shar.glob("cuts.*"))) == 2
    source = open_source(shar)
    assert {source.file(item.locator) for item in source.items} == {str(path) for path in shar.glob("recording.*.tar")}
    run(workspace, shar, tmp_path / "out")
    found = rows_of(tmp_path / "out")
    for name in files:  # as FLAC of 16 bits, which lhotse wrote
        (tar,) = [path for path in shar.glob("recording.*.tar") if name.encode() in path.read_bytes()]
        cuts = lhotse.CutSet.from_shar(
            fields={
                "cuts": [str(tar).replace("recording", "cuts").replace(".tar", ".jsonl.gz")],
                "recording": [str(tar)],
            }
        )
        cut = next(iter(cuts))
        soundfile.write(tmp_path / f"{name}.wav", cut.load_audio().mean(axis=0), cut.sampling_rate, subtype="FLOAT")
        expected = codes_alone(tiny(), {name: tmp_path / f"{name}.wav"})
        assert found[name]["audio_codes"] == expected[name] and found[name]["text"] == f"text of {name}"


def test_a_recording_that_would_take_too_much_memory_fails_before_it_is_read(workspace, tmp_path, monkeypatch):
    monkeypatch.setattr(audio, "MAX_DECODED_BYTES", 150_000)  # talk.wav needs 192,000 bytes, stereo.wav 128,000
    result = run(workspace, write_manifest(workspace, ROWS, "large.jsonl"), tmp_path / "out")
    assert {failure.kind for failure in result.failures.values()} == {"memory"} and len(result.failures) == 2
    assert set(rows_of(tmp_path / "out")) == {"stereo.wav#0+1"}


@pytest.mark.parametrize("times", [{"start": 1e305}, {"duration": 1e305}])
def test_huge_times_are_beyond_the_recording(times, workspace, tmp_path):
    row = {"audio": "talk.wav", "start": 0, "duration": 0.1, **times}
    (failure,) = run(workspace, write_manifest(workspace, [row], "huge.jsonl"), tmp_path / "out").failures.values()
    assert failure.kind == "truncated" and "ends after" in failure.reason


# ---------------------------------------------------------------------------------------------------------------------
# Lhotse Shar written by other programs
# ---------------------------------------------------------------------------------------------------------------------


def write_shar(folder, contents: dict[str, tuple[bytes, dict]]):
    """
    Write recordings to Shar unchanged, each with its rate, channels and number of samples, as
    `audio_format="original"` does.
    """
    folder.mkdir()
    lines = []
    with tarfile.open(folder / "recording.000000.tar", "w") as tar:
        for id, (content, facts) in contents.items():
            rate, num_samples, channels = facts["rate"], facts["num_samples"], list(range(facts["channels"]))
            source = {"type": "shar", "channels": channels, "source": ""}
            recording = {
                "id": id, "sources": [source], "sampling_rate": rate, "num_samples": num_samples,
                "duration": num_samples / rate, "channel_ids": channels,
            }  # fmt: skip
            cut = {"id": id, "start": 0, "duration": num_samples / rate, "recording": recording, "supervisions": []}
            kind = (
                {"type": "MultiCut", "channel": channels} if len(channels) > 1 else {"type": "MonoCut", "channel": 0}
            )
            lines.append(json.dumps({**cut, **kind}))
            for ending, member in (("wav", content), ("json", json.dumps(recording).encode())):
                info = tarfile.TarInfo(f"{id}.{ending}")
                info.size = len(member)
                tar.addfile(info, io.BytesIO(member))
    with gzip.open(folder / "cuts.000000.jsonl.gz", "wt") as file:
        file.write("\n".join(lines))
    return folder


SHAR_FILES = (
    "variable_without_header.mp3",
    "stereo.wav",
    "tag_in_front.wav",
    "opposite.wav",
    "flac_half.flac",
    "nan.wav",
)


def test_awkward_files_give_the_same_result_in_shar_and_as_files(workspace, tmp_path):
    pytest.importorskip("lhotse", reason="pip install lhotse")
    contents, files, kinds, warnings = {}, {}, {}, {}
    for case in cases():
        if case.name not in SHAR_FILES:
            continue
        path = tmp_path / case.name
        path.write_bytes(case.content)
        id, facts = case.name.replace(".", "_"), {"rate": case.rate, "num_samples": 4801, "channels": 1}
        if case.kind is None:
            whole = audio.read_channels(path)
            facts = {"rate": case.rate, "num_samples": len(whole.samples), "channels": whole.samples.shape[1]}
            files[id], warnings[id] = path, list(case.warnings)
        else:
            kinds[id] = case.kind
        contents[id] = (case.content, facts)
    assert len(files) == 4 and len(kinds) == 2
    result = run(workspace, write_shar(tmp_path / "shar", contents), tmp_path / "out")
    found = rows_of(tmp_path / "out")
    assert {id: failure.kind for id, failure in result.failures.items()} == kinds
    assert {id: row["audio_codes"] for id, row in found.items()} == codes_alone(tiny(), files)
    assert {id: row["warnings"] for id, row in found.items()} == warnings


def test_files_beside_shar_are_counted_and_a_damaged_shard_fails_alone(workspace, tmp_path):
    pytest.importorskip("lhotse", reason="pip install lhotse")
    content = (workspace / "talk.wav").read_bytes()
    shar = write_shar(tmp_path / "shar", {"a": (content, {"rate": 24_000, "num_samples": 48_000, "channels": 1})})
    for kind in ("cuts", "recording"):
        (whole,) = shar.glob(f"{kind}.*")
        (shar / whole.name.replace("000000", "000001")).write_bytes(whole.read_bytes().replace(b'"a"', b'"b"'))
    cuts = gzip.decompress((shar / "cuts.000000.jsonl.gz").read_bytes()).replace(b'"a"', b'"b"')
    (shar / "cuts.000001.jsonl.gz").write_bytes(gzip.compress(cuts))
    (shar / "recording.000001.tar").write_bytes(b"no tar")
    (shar / "cover.jpg").touch()
    result = run(workspace, shar, tmp_path / "out")
    assert [path.rsplit("/", 1)[-1] for path in result.passed_over] == ["cover.jpg"]
    assert {id: failure.kind for id, failure in result.failures.items()} == {"b": "unreadable"}
    assert not re.search("0x[0-9a-f]{6}", result.failures["b"].reason)
    assert set(rows_of(tmp_path / "out")) == {"a"}


HOSTILE_CUTS = {
    "cut": gzip.compress(b'{"id": "a"}\n' * 100)[:-12],
    "flipped": bytes(byte ^ (255 * (index == 12)) for index, byte in enumerate(gzip.compress(b'{"id": "a"}\n' * 100))),
    "a list": gzip.compress(b"[1]\n"),
    "nested deep": gzip.compress(b"[" * 100_000),
    "a number as id": gzip.compress(b'{"id": 3}\n'),
    "a bomb": gzip.compress(bytes(2**25)),
}


@pytest.mark.parametrize("case", HOSTILE_CUTS)
def test_hostile_cuts_are_refused_in_one_line(case, tmp_path):
    pytest.importorskip("lhotse", reason="pip install lhotse")
    (tmp_path / "cuts.000000.jsonl.gz").write_bytes(HOSTILE_CUTS[case])
    (tmp_path / "recording.000000.tar").touch()
    tracemalloc.start()
    with pytest.raises(ValueError, match="Cannot read the cuts of") as error:
        open_source(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * 2**20 and "\n" not in str(error.value)
