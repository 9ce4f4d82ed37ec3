"""Every kind of source gives the same codes, with its extra columns."""

import errno
import json
import os
import pickle
import shutil
import tarfile

import pyarrow
import pytest
from bulk_corpus import codes_of, rows_of, write_corpus
from bulk_runs import (  # noqa: F401
    alone,
    check_clips,
    clips,
    model,
    one_thread,
    run,
    workspace,
)
from pyarrow import parquet

from wavtokenizer_hf.bulk import output, sources
from wavtokenizer_hf.bulk import run as bulk_run


@pytest.mark.parametrize("ending", ["txt", "csv", "jsonl"])
def test_a_list_file_is_read_with_its_extra_columns(run, clips, alone, tmp_path, workspace, ending):
    os.symlink(workspace / "corpus", tmp_path / "sounds")
    rows = [(f"sounds/{name}", text, index) for index, (name, (_, text)) in enumerate(clips.items())]
    lines = {
        "txt": [path for path, _, _ in rows],
        "csv": ["path,text,number", *(f"{path},{text},{number}" for path, text, number in rows)],
        "jsonl": [json.dumps({"path": path, "text": text, "number": number}) for path, text, number in rows],
    }[ending]
    # spreadsheets write a UTF-8 byte order mark before the first column's name
    (tmp_path / f"list.{ending}").write_text("\n".join(lines) + "\n", "utf-8-sig" if ending == "csv" else "utf-8")
    result = run(tmp_path / f"list.{ending}")
    ids = {name: f"sounds/{name}" for name in clips}
    check_clips(result, tmp_path / "out", clips, alone, ids, None if ending == "txt" else "text")
    if ending == "jsonl":
        assert sorted(row["number"] for row in rows_of(tmp_path / "out").values()) == [0, 1, 2]


def test_a_glob_selects_the_files_that_it_matches(run, alone, workspace, tmp_path):
    run(str(workspace / "corpus" / "a" / "*.flac"))
    expected = {name[2:]: codes for name, codes in alone.items() if name.startswith("a/") and name.endswith(".flac")}
    assert codes_of(tmp_path / "out") == expected != {}


def test_links_to_folders_are_followed_but_not_in_cycles(run, alone, workspace, tmp_path):
    (tmp_path / "corpus").mkdir()
    os.symlink(workspace / "corpus" / "a", tmp_path / "corpus" / "link")
    os.symlink(tmp_path / "corpus", tmp_path / "corpus" / "circle")
    run(tmp_path / "corpus")
    expected = {f"link/{name[2:]}": codes for name, codes in alone.items() if name.startswith("a/")}
    assert codes_of(tmp_path / "out") == expected != {}


def test_audio_of_an_unknown_format_is_listed_as_a_failure(run, tmp_path):
    corpus = tmp_path / "corpus"
    write_corpus(corpus, 1, (0.01, 0.1))
    (corpus / "phone.m4a").write_bytes(b"\0\0\0\x1cftypM4A ")
    assert "ffmpeg -i" in run(corpus).failures["phone.m4a"].reason


def test_tar_shards_are_read_with_the_other_files_of_each_sample(run, clips, alone, tmp_path):
    ids, pixels = {}, bytes(range(256))
    (tmp_path / "pixels").write_bytes(pixels)
    (tmp_path / "shards").mkdir()
    for number, (name, (path, text)) in enumerate(clips.items()):
        with tarfile.open(tmp_path / "shards" / f"{number % 2}.tar", "a") as shard:
            (tmp_path / "text").write_text(text)
            shard.add(path, f"clip{number}{path.suffix}")
            shard.add(tmp_path / "text", f"clip{number}.txt")
            shard.add(tmp_path / "pixels", f"clip{number}.jpg")
        ids[name] = f"{number % 2}.tar/clip{number}"
    check_clips(run(tmp_path / "shards"), tmp_path / "out", clips, alone, ids, column="txt")
    assert all(row["jpg"] == pixels for row in rows_of(tmp_path / "out").values())


def test_reasons_of_failures_are_the_same_in_every_run(run, tmp_path):
    (tmp_path / "noise.wav").write_bytes(b"no sound")
    with tarfile.open(tmp_path / "x.tar", "w") as shard:
        shard.add(tmp_path / "noise.wav", "noise.wav")
    first, again = (run(tmp_path / "x.tar", output=tmp_path / name).failures for name in ("first", "again"))
    assert first == again and first["x.tar/noise"].kind == "unreadable"
    assert first["x.tar/noise"].reason.startswith("Cannot read the content as audio: Format not recognised. ")


def test_a_link_in_a_shard_is_refused(run, clips, tmp_path):
    path, _ = next(iter(clips.values()))
    with tarfile.open(tmp_path / "x.tar", "w") as shard:
        shard.add(path, "a.wav")
        shard.add(path, "b.wav")
        link = tarfile.TarInfo("link.wav")
        link.type, link.linkname = tarfile.LNKTYPE, "a.wav"
        shard.addfile(link)
    with pytest.raises(ValueError, match=r"x\.tar holds 'link\.wav' as a link"):
        run(tmp_path / "x.tar")


@pytest.mark.parametrize("pattern", ["corpus/**/*.wav", "corpus/*/*.wav", "corpus/a*/*"])
def test_a_folder_that_a_glob_cannot_read_is_reported(run, tmp_path, monkeypatch, pattern):
    write_corpus(tmp_path / "corpus", 4, (0.01, 0.1))
    (tmp_path / "corpus" / "a" / "deeper").mkdir()
    (tmp_path / "corpus" / ".hidden").mkdir()
    scandir = os.scandir  # tests may run as root, who can read every folder

    def locked(path="."):
        if os.path.basename(os.fspath(path)) in (("a", ".hidden") if "**" not in pattern else ("deeper", ".hidden")):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    run(str(tmp_path / pattern))
    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(PermissionError, match=r"a|deeper"):
        run(str(tmp_path / pattern))


@pytest.mark.parametrize("fault", ["joined", "damaged"])
def test_a_shard_with_members_that_would_be_skipped_is_refused(run, clips, tmp_path, fault):
    shard = tmp_path / "x.tar"
    with tarfile.open(shard, "w") as file:
        for path, _ in clips.values():
            file.add(path, path.name)
        start = file.offset
        file.add(path, "last.wav")
    content = bytearray(shard.read_bytes())
    content[start] ^= 255  # in the header of the last member
    shard.write_bytes(content if fault == "damaged" else shard.read_bytes() * 2)
    with pytest.raises(ValueError, match=r"x\.tar goes on after the end of the archive"):
        run(shard)


def _table(clips):
    audio_values = [{"bytes": path.read_bytes(), "path": path.name} for path, _ in clips.values()]
    return {"id": list(clips), "audio": audio_values, "text": [text for _, text in clips.values()]}


@pytest.mark.parametrize("kind", ["parquet", "dataset"])
def test_sources_with_tables_reach_workers_by_pickling(clips, tmp_path, kind):
    import datasets

    table = pyarrow.table(_table(clips))
    parquet.write_table(table, tmp_path / "x.parquet")
    source = sources.open_source(tmp_path / "x.parquet" if kind == "parquet" else datasets.Dataset(table))
    locators = [item.locator for item in source.items]
    source.read(locators[0])  # opens files, which must not be pickled
    unpickled = pickle.loads(pickle.dumps(source.without_items()))
    assert [unpickled.read(locator)["bytes"] for locator in locators] == [
        path.read_bytes() for path, _ in clips.values()
    ]
    assert [unpickled.extra_columns(locator)["text"] for locator in locators] == [text for _, text in clips.values()]


@pytest.mark.parametrize("with_ids", [True, False])
def test_parquet_is_read_row_group_by_row_group(run, clips, alone, tmp_path, with_ids):
    (tmp_path / "tables").mkdir()
    table = pyarrow.table(_table(clips))
    parquet.write_table(
        table if with_ids else table.drop_columns("id"), tmp_path / "tables" / "x.parquet", row_group_size=3
    )
    ids = None if with_ids else {name: f"x.parquet/{row}" for row, name in enumerate(clips)}
    check_clips(run(tmp_path / "tables", num_readers=3), tmp_path / "out", clips, alone, ids)


@pytest.mark.parametrize("kind", ["on disk", "of splits", "in memory"])
def test_datasets_are_read_undecoded_and_keep_their_column_features(run, clips, alone, tmp_path, kind):
    import datasets

    table = pyarrow.table({**_table(clips), "speaker": [index % 2 for index in range(len(clips))]})
    dataset = datasets.Dataset(table)  # from Arrow: the library needs torchcodec to encode Python objects
    dataset = dataset.cast_column("audio", datasets.Audio())
    dataset = dataset.cast_column("speaker", datasets.ClassLabel(names=["anna", "bert"]))
    if kind == "on disk":
        dataset.save_to_disk(tmp_path / "dataset")
    elif kind == "of splits":
        datasets.DatasetDict(test=dataset).save_to_disk(tmp_path / "dataset")
    source = dataset if kind == "in memory" else tmp_path / "dataset"
    result = run(source, split="test" if kind == "of splits" else None, num_readers=2)
    check_clips(result, tmp_path / "out", clips, alone)
    loaded = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.features["speaker"].names == ["anna", "bert"]
    assert loaded.features["audio_codes"].feature.dtype == "uint16"


@pytest.mark.parametrize("streaming", [False, True])
def test_load_dataset_reads_the_output_folder_as_it_is(run, alone, tmp_path, streaming):
    import datasets

    run(part_size=2)  # one file holds only failures
    loaded = datasets.load_dataset(
        str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"), streaming=streaming
    )
    assert {row["id"]: row["audio_codes"] for row in loaded} == alone


def test_load_dataset_distinguishes_folders_of_the_same_name_and_sees_new_files(run, workspace, alone, tmp_path):
    """With `configs` in the card, datasets 5.2 returned cached data of another folder of the same name."""
    import datasets

    def ids(folder) -> set[str]:
        loaded = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
        return set(loaded["id"])

    clips = [workspace / "corpus" / clip for clip in sorted(alone)[:2]]
    for name, clip in zip(("one", "other"), clips, strict=True):
        (tmp_path / name / "corpus").mkdir(parents=True)
        shutil.copy(clip, tmp_path / name / "corpus")
        run(tmp_path / name / "corpus", output=tmp_path / name / "tokens")
    first, second = (clip.name for clip in clips)
    assert (ids(tmp_path / "one" / "tokens"), ids(tmp_path / "other" / "tokens")) == ({first}, {second})
    shutil.copy(clips[1], tmp_path / "one" / "corpus")
    run(tmp_path / "one" / "corpus", output=tmp_path / "one" / "tokens")
    assert ids(tmp_path / "one" / "tokens") == {first, second}


def test_the_schema_describes_the_codes(run, workspace, model, tmp_path):
    run()
    part = next((tmp_path / "out" / "data").iterdir())
    settings = json.loads(parquet.read_schema(part).metadata[output.METADATA_KEY])["settings"]
    assert settings["codebook_fingerprint"] == model.codebook_fingerprint
    assert settings["model"] == "model" and settings["hop_length"] == 16
    assert "revision" in settings


def test_card_and_settings_hold_no_local_paths(run, workspace, tmp_path):
    run(model="bundled")
    package = os.path.dirname(os.path.dirname(bulk_run.__file__))
    for name in ("README.md", "manifest.json"):
        text = (tmp_path / "out" / name).read_text()
        assert "bundled" in text and "corpus (path " in text and str(workspace) not in text and package not in text
    assert 'detokenize_dataset(tokens, "bundled")' in (tmp_path / "out" / "README.md").read_text()
