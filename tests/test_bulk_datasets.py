"""Tokenization and detokenization of datasets of the datasets library."""

import copy
import io
import json
import os
import shutil
import subprocess
import sys
from pickle import PicklingError

import datasets
import numpy as np
import pyarrow
import pytest
import soundfile
import torch
from bulk_corpus import train_encoder
from bulk_runs import one_thread, save_two_models  # noqa: F401
from conftest import ROOT
from datasets.fingerprint import Hasher

from wavtokenizer_hf import WavTokenizerEncoderModel, WavTokenizerFeatureExtractor, WavTokenizerModel, audio
from wavtokenizer_hf.bulk import (
    AudioDetokenizer,
    AudioTokenizer,
    detokenize_dataset,
    mapping,
    tokenize_dataset,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_two_models(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return WavTokenizerModel.from_pretrained(folder / "model").eval()


@pytest.fixture(scope="module")
def audio_bytes():
    """Return ten clips as WAV content; the fourth is damaged."""
    contents = []
    for number in range(10):
        buffer = io.BytesIO()
        values = np.random.default_rng(number).uniform(-0.9, 0.9, 500 + 333 * number).astype(np.float32)
        soundfile.write(buffer, values, (16000, 24000)[number % 2], subtype="FLOAT", format="WAV")
        contents.append(buffer.getvalue())
    contents[3] = b"RIFF and then nothing"
    return contents


@pytest.fixture(scope="module")
def alone(model, audio_bytes, tmp_path_factory):
    """Return the expected codes of each clip from `audio.load` and `model.encode`; None for the damaged one."""
    path, codes = tmp_path_factory.mktemp("sounds") / "clip.wav", []
    for number, content in enumerate(audio_bytes):
        path.write_bytes(content)
        with torch.no_grad():
            waveform = None if number == 3 else torch.from_numpy(audio.load(path))[None, None]
            codes.append(None if number == 3 else model.encode(waveform).audio_codes[0, 0].tolist())
    assert len({code for row in codes if row for code in row}) > 20
    return codes


@pytest.fixture
def dataset(audio_bytes):
    stored = pyarrow.array(
        [{"bytes": content, "path": None} for content in audio_bytes],
        pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]),
    )
    # from Arrow: the library needs torchcodec to encode Python objects
    table = pyarrow.table({"audio": stored, "text": list("abcdefghij")})
    return datasets.Dataset(table).cast_column("audio", datasets.Audio())


def undecoded(dataset):
    return dataset.cast_column("audio", datasets.Audio(decode=False))


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_a_tokenized_dataset_has_the_codes_of_each_clip_alone_and_its_other_columns(
    folder, dataset, alone, batch_size
):
    tokens = tokenize_dataset(dataset, str(folder / "model"), batch_size=batch_size)
    assert tokens["audio_codes"][:] == alone
    assert tokens["text"][:] == list("abcdefghij") and "audio" not in tokens.column_names
    assert tokens.features["audio_codes"].feature.dtype == "uint16"
    assert tokens[1]["num_samples"] == 833 and tokens[1]["source_sampling_rate"] == 24000


def test_damaged_audio_becomes_a_row_with_the_reason(folder, dataset):
    failures = tokenize_dataset(dataset, str(folder / "model"))["failure"][:]
    assert "Cannot read" in failures[3] and failures[:3] + failures[4:] == [None] * 9


def test_the_first_damaged_audio_stops_the_work_on_request(folder, dataset):
    with pytest.raises(ValueError, match="Cannot read"):
        tokenize_dataset(dataset, str(folder / "model"), on_error="fail")


def test_a_streaming_dataset_stays_streaming(folder, dataset, alone, model):
    tokens = tokenize_dataset(dataset.to_iterable_dataset(), str(folder / "model"), batch_size=4)
    assert isinstance(tokens, datasets.IterableDataset)
    codes = [row["audio_codes"] for row in tokens]  # arrays, since they were never in a table
    assert [None if row is None else row.tolist() for row in codes] == alone
    decoded = detokenize_dataset(tokens, str(folder / "model")).cast_column("audio", datasets.Audio(decode=False))
    assert [row["audio"] is None for row in decoded] == [codes is None for codes in alone]


def test_dictionaries_of_splits_are_tokenized_split_by_split(folder, dataset, alone):
    splits = datasets.DatasetDict(train=dataset, test=dataset.select([5]))
    tokens = tokenize_dataset(splits, str(folder / "model"))
    assert tokens["train"]["audio_codes"][:] == alone and tokens["test"]["audio_codes"][:] == [alone[5]]


def test_map_takes_the_tokenizer_itself_in_several_processes(folder, dataset, alone):
    tokenizer = AudioTokenizer(str(folder / "model"))
    tokens = undecoded(dataset).map(tokenizer, batched=True, with_rank=True, num_proc=2, remove_columns=["audio"])
    assert tokens["audio_codes"][:] == alone and tokens["text"][:] == list("abcdefghij")


@pytest.mark.parametrize("with_rank", [True, False])
def test_each_process_uses_the_gpu_of_its_rank(folder, dataset, tmp_path, monkeypatch, with_rank):
    def note(rank=0):
        (tmp_path / str(rank)).touch()
        return "cpu"

    tokenizer = AudioTokenizer(str(folder / "model"))
    monkeypatch.setattr(mapping.encoding, "default_device", note)  # forked processes inherit the patch
    options = {"batch_size": 5, "num_proc": 2, "load_from_cache_file": False, "with_rank": with_rank}
    undecoded(dataset).map(tokenizer, batched=True, **options)
    first, second = (int(path.name) for path in tmp_path.iterdir())  # the count continues from one map to the next
    assert abs(first - second) == 1


def test_arrays_and_paths_are_accepted_too(folder, model, alone, audio_bytes, tmp_path):
    (tmp_path / "clip.wav").write_bytes(audio_bytes[1])
    array = {"array": audio.load(tmp_path / "clip.wav"), "sampling_rate": 24000}
    tokenizer = AudioTokenizer(str(folder / "model"), column="sound")
    assert [
        codes.tolist()
        for codes in tokenizer({"sound": [str(tmp_path / "clip.wav"), array, audio_bytes[1]]})["audio_codes"]
    ] == [alone[1]] * 3
    unfinished = {"array": np.array([0.1, np.nan], np.float32), "sampling_rate": 24000}
    (failure,) = tokenizer({"sound": [unfinished]})["failure"]
    assert failure.startswith("the array holds NaN or infinite samples") and "at sample 1 of the source" in failure


def test_the_fingerprint_is_stable_and_differs_between_models_and_options(folder, dataset):
    tokenizer = AudioTokenizer(str(folder / "model"))
    before = Hasher.hash(tokenizer)
    tokenizer(undecoded(dataset)[:2])
    assert tokenizer._loaded is not None and Hasher.hash(tokenizer) == before
    assert Hasher.hash(AudioTokenizer(str(folder / "model"))) == before
    others = [AudioTokenizer(str(folder / "other")), AudioTokenizer(str(folder / "model"), column="sound")]
    assert before not in {Hasher.hash(other) for other in others}


def test_folders_without_a_codebook_fingerprint_are_distinguished_too(folder, tmp_path):
    hashes = set()
    for name in ("model", "other"):  # one after the other at the same path
        shutil.copytree(folder / name, tmp_path / "model")
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        assert config.pop("codebook_fingerprint")
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        hashes.add(Hasher.hash(AudioTokenizer(str(tmp_path / "model"))))
        shutil.rmtree(tmp_path / "model")
    assert len(hashes) == 2


@pytest.mark.parametrize("kind", [AudioTokenizer, AudioDetokenizer])
def test_fine_tuned_weights_with_the_same_codebook_are_distinguished(folder, tmp_path, kind):
    shutil.copytree(folder / "model", tmp_path / "model")
    before = Hasher.hash(kind(str(tmp_path / "model")))
    train_encoder(tmp_path / "model")
    assert Hasher.hash(kind(str(tmp_path / "model"))) != before


def test_models_with_different_peak_levels_are_distinguished(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    before = Hasher.hash(AudioTokenizer(str(tmp_path / "model")))
    config = json.loads((tmp_path / "model" / "preprocessor_config.json").read_text())
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps({**config, "normalize_audio": True}))
    assert Hasher.hash(AudioTokenizer(str(tmp_path / "model"))) != before


def test_an_encoder_saved_alone_tokenizes_and_does_not_decode(folder, dataset, tmp_path):
    encoder = WavTokenizerEncoderModel.from_pretrained(folder / "model")
    encoder.save_pretrained(tmp_path / "encoder")
    WavTokenizerFeatureExtractor.from_pretrained(folder / "model").save_pretrained(tmp_path / "encoder")
    rows = dataset.select(range(3))
    alone, whole = (tokenize_dataset(rows, str(model)) for model in (tmp_path / "encoder", folder / "model"))
    assert alone["audio_codes"][:] == whole["audio_codes"][:]
    with pytest.raises(ValueError, match="holds an encoder only"):
        AudioDetokenizer(str(tmp_path / "encoder"))


def test_a_model_that_cannot_be_loaded_is_reported_at_once():
    with pytest.raises(ValueError, match="Cannot load the model 'no/such-model'"):
        AudioTokenizer("no/such-model")


@pytest.mark.parametrize("kind", [AudioTokenizer, AudioDetokenizer])
def test_a_damaged_model_is_reported_at_once(folder, tmp_path, kind):
    shutil.copytree(folder / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="Cannot load the model"):
        kind(str(tmp_path / "model"))


def test_the_cache_of_datasets_is_hit(folder, dataset, tmp_path, monkeypatch):
    dataset.save_to_disk(tmp_path / "dataset")
    first = tokenize_dataset(datasets.load_from_disk(tmp_path / "dataset"), str(folder / "model"))

    def no_more(*arguments):
        raise AssertionError("encoded again")

    monkeypatch.setattr(mapping.encoding, "encode", no_more)
    again = tokenize_dataset(datasets.load_from_disk(tmp_path / "dataset"), str(folder / "model"))
    assert again["audio_codes"][:] == first["audio_codes"][:]


def test_a_loaded_model_gives_the_codes_of_its_folder(folder, model, dataset, alone):
    assert tokenize_dataset(dataset, model)["audio_codes"][:] == alone
    assert tokenize_dataset(dataset, model.encoder_model, num_proc=2)["audio_codes"][:] == alone
    extractor = WavTokenizerFeatureExtractor(hop_length=16, normalize_audio=True, target_peak_dB_FS=-20.0)
    assert tokenize_dataset(dataset, model, feature_extractor=extractor)["audio_codes"][:] != alone
    tokens = tokenize_dataset(dataset, model)
    by_name, loaded = (undecoded(detokenize_dataset(tokens, m))["audio"][:] for m in (str(folder / "model"), model))
    assert loaded == by_name


def test_a_loaded_model_is_hashed_by_its_weights_before_and_after_use(folder, model, dataset):
    before = Hasher.hash(AudioTokenizer(model))
    tokenizer = AudioTokenizer(model)
    tokenizer(undecoded(dataset)[:2])
    assert tokenizer._loaded is not None and Hasher.hash(tokenizer) == before
    assert Hasher.hash(AudioTokenizer(WavTokenizerModel.from_pretrained(folder / "other"))) != before
    assert Hasher.hash(AudioTokenizer(model, feature_extractor=WavTokenizerFeatureExtractor())) != before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"revision": "main"}, ValueError, "revision='main' with a loaded model"),
        ({"device": "cpu"}, ValueError, "device='cpu' with a loaded model"),
        ({"feature_extractor": WavTokenizerFeatureExtractor(sampling_rate=16000)}, ValueError, "for 16000 Hz"),
        ({"model": torch.nn.Linear(1, 1)}, TypeError, "Got a torch.nn.modules.linear.Linear as the model"),
        ({"model": "bundled", "feature_extractor": WavTokenizerFeatureExtractor()}, ValueError, "a model by name"),
    ],
)
def test_arguments_that_conflict_with_a_loaded_model_are_refused(model, dataset, options, error, message):
    with pytest.raises(error, match=message):
        tokenize_dataset(dataset, **{"model": model, **options})


def test_an_encoder_does_not_decode(model):
    with pytest.raises(TypeError, match="which has no decoder"):
        AudioDetokenizer(model.encoder_model)


def test_a_model_with_replaced_layers_is_refused_in_one_line_by_several_processes(model, dataset):
    changed = copy.deepcopy(model)
    changed.encoder_model.encoder.layers[0].extra = torch.nn.Linear(1, 1)
    with pytest.raises(PicklingError, match="only its own layers can be pickled"):
        tokenize_dataset(dataset, changed, num_proc=2)


BY_HAND = """
import sys
import datasets, numpy as np, torch
from wavtokenizer_hf import WavTokenizerFeatureExtractor, WavTokenizerModel

torch.set_num_threads(1)
model = WavTokenizerModel.from_pretrained(sys.argv[2]).eval()
feature_extractor = WavTokenizerFeatureExtractor.from_pretrained(sys.argv[2])
calls, encode = [], WavTokenizerModel.encode
WavTokenizerModel.encode = lambda *args, **kwargs: calls.append(1) or encode(*args, **kwargs)

def add_codes(batch):
    inputs = feature_extractor([np.array(clip) for clip in batch["samples"]], sampling_rate=24000, return_tensors="pt")
    with torch.inference_mode():
        return {"audio_codes": model.encode(**inputs).audio_codes[:, 0].tolist()}

datasets.disable_progress_bars()
rows = datasets.load_from_disk(sys.argv[1]).map(add_codes, batched=True)
print(len(calls), rows._fingerprint, rows["audio_codes"][:])
calls.clear()
rows = datasets.load_from_disk(sys.argv[1]).map(add_codes, batched=True)  # after use
print(len(calls), rows._fingerprint, rows["audio_codes"][:])
"""


def test_a_function_over_a_loaded_model_hashes_by_its_weights(folder, model):
    """
    The hash is equal before and after use, and for each load of the same folder. So a hand-written `map` is cached.
    """

    def by_hand(model):
        return Hasher.hash(lambda batch: model.encode(batch["input_values"]))

    fresh = WavTokenizerModel.from_pretrained(folder / "model").eval()
    before = by_hand(fresh)
    with torch.inference_mode():
        codes = fresh.encode(torch.rand(2, 1, 500), padding_mask=torch.ones(2, 500)).audio_codes
        fresh.decode(codes)
    assert before == by_hand(fresh) == by_hand(model)
    assert by_hand(WavTokenizerModel.from_pretrained(folder / "other").eval()) != before


@pytest.mark.slow
def test_a_hand_written_map_over_the_model_is_cached_across_processes(folder, tmp_path):
    """datasets hashes the function with the model that it uses: only equal weights hit the cache."""
    clips = np.random.default_rng(0).uniform(-0.9, 0.9, (3, 500)).tolist()
    datasets.Dataset.from_dict({"samples": clips}).save_to_disk(tmp_path / "clips")
    (tmp_path / "by_hand.py").write_text(BY_HAND)

    def run(model: str, seed: str) -> list[str]:
        command = [sys.executable, tmp_path / "by_hand.py", tmp_path / "clips", folder / model]
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return result.stdout.splitlines()

    first, first_again = run("model", "1")
    second, _ = run("model", "2")
    other, _ = run("other", "1")
    assert first[0] == other[0] == "1" and first_again[0] == second[0] == "0"
    assert first_again[1:] == second[1:] == first[1:] and other[1:] != first[1:]


def test_a_detokenized_dataset_holds_the_decoded_audio_at_its_original_length(folder, dataset, alone, model):
    tokens = tokenize_dataset(dataset, str(folder / "model"))
    back = detokenize_dataset(tokens, str(folder / "model"))
    assert isinstance(back.features["audio"], datasets.Audio) and "audio_codes" not in back.column_names
    for row, codes in zip(undecoded(back), alone, strict=True):
        if codes is None:
            assert row["audio"] is None
            continue
        values, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")
        with torch.no_grad():
            expected = model.decode(torch.tensor(codes)[None, None]).audio_values[0, 0].numpy()
        assert rate == 24000 and len(values) == row["num_samples"]
        # 16-bit integers; samples outside [-1, 1] are clipped
        np.testing.assert_allclose(values, expected[: len(values)].clip(-1, 1), atol=2 / 32768)


def test_codes_of_another_codebook_are_refused(folder, dataset):
    tokens = tokenize_dataset(dataset, str(folder / "model"))
    with pytest.raises(ValueError, match="made with the codebook"):
        detokenize_dataset(tokens, str(folder / "other"))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda dataset: dataset, {"column": "sound"}, "no column 'sound' in the dataset, which has audio, text"),
        (lambda dataset: dataset.rename_column("text", "duration"), {}, "has a column 'duration' already"),
        (lambda dataset: dataset.to_iterable_dataset(), {"num_proc": 2}, "num_proc=2 for an IterableDataset"),
        (lambda dataset: dataset, {"on_error": "ignore"}, "on_error='ignore'"),
        (lambda dataset: dataset, {"batch_seconds": -1}, "batch_seconds=-1"),
    ],
)
def test_invalid_arguments_are_refused(folder, dataset, change, options, message):
    with pytest.raises(ValueError, match=message):
        tokenize_dataset(change(dataset), str(folder / "model"), **options)


def test_a_device_is_chosen_by_rank(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [mapping.encoding.default_device(rank) for rank in (0, 3, 4)] == ["cuda:0", "cuda:3", "cuda:0"]


def test_detokenizing_needs_only_the_codes(folder, model):
    codes = np.arange(10, dtype=np.uint16)
    (decoded_audio,) = AudioDetokenizer(str(folder / "model"))({"audio_codes": [codes]})["audio"]
    assert soundfile.info(io.BytesIO(decoded_audio["bytes"])).frames == 160
