"""Training data: the same for a seed, for any number of workers, processes and resumptions."""

import itertools

import datasets
import numpy as np
import pytest
import soundfile
import torch
from tiny_training import write_clips

from wavtokenizer_hf.training.data import (
    EndlessBatches,
    Segments,
    cut_segment,
    log_each_kind_once,
    open_clips,
    read_clip,
    training_batches,
    validation_clips,
)


RATE = 24000


def batches(folder, count, start=0, **changes):
    arguments = {"length": 2400, "sampling_rate": RATE, "batch_size": 2, "seed": 0, "num_workers": 0, **changes}
    return list(itertools.islice(training_batches(open_clips(folder), start=start, **arguments), count))


def test_a_folder_a_list_and_a_dataset_give_the_same_clips(tmp_path):
    folder = write_clips(tmp_path / "clips", 3)
    files = sorted(folder.glob("*.wav"))
    (tmp_path / "list.txt").write_text("\n".join(f"clips/{file.name}" for file in files) + "\n\n")
    dataset = datasets.Dataset.from_dict({"audio": [str(file) for file in files], "text": ["a", "b", "c"]})
    dataset = dataset.cast_column("audio", datasets.Audio())
    dataset.save_to_disk(tmp_path / "saved")
    embedded = datasets.Dataset.from_dict({"audio": [{"bytes": file.read_bytes(), "path": None} for file in files]})
    expected = [soundfile.read(file, dtype="float32")[0] for file in files]
    for source in (
        folder,
        tmp_path / "list.txt",
        dataset,
        tmp_path / "saved",
        embedded,
        [str(file) for file in files],
    ):
        clips = open_clips(source)
        assert len(clips) == 3
        for index in range(3):
            np.testing.assert_array_equal(read_clip(clips, index, RATE), expected[index])


def test_arrays_of_another_rate_are_resampled_as_files_are(tmp_path):
    noise = np.random.default_rng(0).uniform(-1, 1, 1000).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", noise, 16000, subtype="FLOAT")
    samples = read_clip([{"audio": {"array": noise.tolist(), "sampling_rate": 16000}}], 0, RATE)
    np.testing.assert_array_equal(samples, read_clip([tmp_path / "a.wav"], 0, RATE))


def test_datasets_that_are_not_sequences_of_clips_are_refused(tmp_path):
    dataset = datasets.Dataset.from_dict({"audio": ["a.wav"]})
    splits = datasets.DatasetDict({"train": dataset, "test": dataset})
    splits.save_to_disk(tmp_path / "saved")
    for source, message in (
        (dataset.to_iterable_dataset(), "IterableDataset.*length"),
        (splits, "splits train, test"),
        (tmp_path / "saved", "splits train, test"),
        (dataset.rename_column("audio", "sound"), "column 'audio', but sound"),
    ):
        with pytest.raises(ValueError, match=message):
            open_clips(source)
    with pytest.raises(ValueError, match="audio"):
        read_clip([{"sound": "a.wav"}], 0, RATE)


@pytest.mark.parametrize("source", ["nowhere", "empty", "empty.txt"])
def test_empty_data_raises_an_error_that_names_it(source, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match=source):
        open_clips(tmp_path / source)


def test_every_epoch_takes_every_clip_once_in_another_order():
    positions = [position for batch in itertools.islice(EndlessBatches(10, 4, seed=0), 5) for position in batch]
    first, second = (
        [index for epoch, index in positions if epoch == 0],
        [index for epoch, index in positions if epoch == 1],
    )
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_processes_take_equal_parts_of_the_joint_batch():
    joint = list(itertools.islice(EndlessBatches(10, 6, seed=0), 7))
    parts = [itertools.islice(EndlessBatches(10, 3, seed=0, rank=rank, world_size=2), 7) for rank in (0, 1)]
    assert [left + right for left, right in zip(*parts, strict=True)] == joint


def test_a_resumed_run_sees_the_same_data_as_an_uninterrupted_one(tmp_path):
    folder = write_clips(tmp_path)
    whole, rest = batches(folder, 5), batches(folder, 2, start=3)
    for expected, got in zip(whole[3:], rest, strict=True):
        assert torch.equal(expected.audio, got.audio)
    assert not torch.equal(whole[0].audio, whole[3].audio)


def test_the_number_of_workers_does_not_change_the_data(tmp_path):
    folder = write_clips(tmp_path)
    for alone, helped in zip(batches(folder, 3), batches(folder, 3, num_workers=2), strict=True):
        assert torch.equal(alone.audio, helped.audio)


def test_another_seed_gives_other_segments(tmp_path):
    folder = write_clips(tmp_path, count=1)
    assert not torch.equal(batches(folder, 1)[0].audio, batches(folder, 1, seed=1)[0].audio)


def test_training_peaks_lie_between_minus_6_and_minus_1_dbfs_and_differ():
    clip = np.full(100, 0.1, np.float32)
    peaks = [20 * np.log10(cut_segment(clip, 100, np.random.default_rng(seed)).max()) for seed in range(50)]
    assert -6.001 < min(peaks) < -5
    assert -2 < max(peaks) < -0.999


def test_validation_takes_the_beginning_at_minus_3_dbfs():
    clip = np.linspace(-0.2, 0.1, 50, dtype=np.float32)
    segment = cut_segment(clip, 30, None)
    assert -segment.min() == pytest.approx(10 ** (-3 / 20), rel=1e-6)
    np.testing.assert_allclose(segment / segment[0], clip[:30] / clip[0], rtol=1e-5)  # float32


def test_short_clips_are_repeated_to_length():
    clip = np.array([0.5, -0.25, 0.1], np.float32)
    segment = cut_segment(clip, 7, None)
    np.testing.assert_array_equal(segment, np.tile(segment[:3], 3)[:7])


def test_silence_stays_silence():
    assert not cut_segment(np.zeros(20, np.float32), 10, np.random.default_rng(0)).any()


def test_a_corrupt_clip_is_skipped_named_and_replaced(tmp_path):
    folder = write_clips(tmp_path, 3)
    (folder / "broken.wav").write_bytes(b"RIFF and nothing more")
    taken = batches(folder, 4)
    skipped = {clip for batch in taken for clip in batch.skipped}
    assert skipped == {str(folder / "broken.wav")}
    assert all(batch.audio.shape == (2, 1, 2400) and batch.audio.abs().amax(-1).min() > 0.4 for batch in taken)
    validation = validation_clips(folder, 2400, RATE, most=10)
    assert (len(validation.audio), len(validation.skipped)) == (3, 1)


def test_only_corrupt_clips_raise_an_error(tmp_path):
    (tmp_path / "broken.wav").write_bytes(b"RIFF and nothing more")
    clips = open_clips(tmp_path)
    with pytest.raises(ValueError, match=r"broken\.wav"):
        Segments(clips, 2400, RATE, seed=0)[0, 0]
    with pytest.raises(ValueError, match="validation"):
        validation_clips(tmp_path, 2400, RATE, most=10)


def test_a_stereo_corpus_is_logged_once(tmp_path, caplog):
    for index in range(3):
        soundfile.write(tmp_path / f"{index}.wav", np.full((4800, 2), 0.1), RATE)
    with log_each_kind_once():
        batches(tmp_path, 3)
    assert sum("channels" in record.getMessage() for record in caplog.records) == 1


def test_a_list_of_training_data_is_split_only_at_line_ends(tmp_path):
    names = ["a\u2028b.wav", "c\x85d.wav", "e\x0cf.wav"]
    (tmp_path / "list.txt").write_bytes("\r\n".join(names).encode())
    assert open_clips(tmp_path / "list.txt") == [str(tmp_path / name) for name in names]
