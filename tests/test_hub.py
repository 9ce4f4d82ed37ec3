"""Published checkpoints from the Hub, and uploads of converted folders, against a small server and handmade caches."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import formula
import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import REFERENCE
from hub_server import Hub, Repository, put_into_cache
from small_checkpoints import large_checkpoint, memory_and_seconds, new_name, small_tensors

from wavtokenizer_hf import WavTokenizerConfig, WavTokenizerEncoderModel, WavTokenizerModel, cli, loading
from wavtokenizer_hf.conversion import load_original
from wavtokenizer_hf.conversion.command import main
from wavtokenizer_hf.conversion.from_original import convert
from wavtokenizer_hf.conversion.published import find
from wavtokenizer_hf.model_names import converted_folder, find_model


SMALL_75 = find("small-speech-75")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Return a checkpoint with a published file's name and rate, and fewer channels."""
    path = tmp_path_factory.mktemp("small") / SMALL_75.file
    torch.save({"state_dict": small_tensors(75)}, path)
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return an empty cache of huggingface_hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hub(monkeypatch, cache):
    """Start a small Hub for huggingface_hub in this process, with a user who may write to org/…."""
    constants = huggingface_hub.constants
    with Hub() as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        yield hub


def codes_without_the_package(name: str, audio: np.ndarray, folder: Path, **environment) -> np.ndarray:
    """
    Return the codes from `AutoModel.from_pretrained(name, trust_remote_code=True)`, in a process without the package.
    """
    np.save(folder / "audio.npy", audio)
    program = """
import sys
sys.modules["wavtokenizer_hf"] = None  # importing it raises ImportError
import numpy, torch
from transformers import AutoFeatureExtractor, AutoModel
feature_extractor = AutoFeatureExtractor.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
inputs = feature_extractor(numpy.load("audio.npy"), sampling_rate=24000, return_tensors="pt")
with torch.no_grad():
    numpy.save("codes.npy", model.encode(**inputs).audio_codes[0, 0].numpy())
"""
    environment = {**os.environ, "HF_HOME": str(folder / "hf_home"), **environment}
    for name_of_path in ("HF_MODULES_CACHE", "HF_HUB_CACHE", "PYTHONPATH"):
        environment.pop(name_of_path, None)
    run = subprocess.run(
        [sys.executable, "-c", program, name], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return np.load(folder / "codes.npy")


def one_line(capsys) -> str:
    """Return the error that a command printed. It must be one line."""
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ")
    assert "Traceback" not in "".join(lines)
    return lines[-1]


# ---------------------------------------------------------------------------------------------------------------------
# From a name to a folder on the Hub, and back
# ---------------------------------------------------------------------------------------------------------------------


def expected_codes(tensors: dict[str, torch.Tensor], audio: np.ndarray) -> np.ndarray:
    """Return the codes of a model whose weights were assigned by the names in architecture.md, without conversion."""
    weights = {new_name(name): tensor for name, tensor in tensors.items() if "encodec.decoder" not in name}
    del weights["head.istft.window"]
    fields = {"num_filters": 4, "hidden_size": 64, "codebook_dim": 64, "codebook_size": 128, "decoder_hidden_size": 32}
    config = WavTokenizerConfig(upsampling_ratios=[8, 5, 4, 2], decoder_intermediate_size=48, **fields)
    model = WavTokenizerModel(config).eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        return model.encode(torch.from_numpy(audio)[None, None]).audio_codes[0, 0].numpy()


def test_a_name_becomes_a_repository_that_works_with_transformers_alone(hub, cache, small, tmp_path):
    put_into_cache(cache, SMALL_75.repository, {SMALL_75.file: small})
    arguments = ["--checkpoint", "small-speech-75", "--output", str(tmp_path / "folder"), "--push-to-hub", "org/codec"]
    assert main(arguments) == 0
    audio = formula.waveform("chirp", 0.7)
    codes = codes_without_the_package("org/codec", audio, tmp_path, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0")
    assert len(np.unique(codes)) > 3
    np.testing.assert_array_equal(codes, expected_codes(small_tensors(75), audio))
    assert "novateur/WavTokenizer" in hub.repositories["org/codec"].files()["README.md"].decode()


@pytest.mark.slow
def test_a_model_of_published_shape_gives_the_reference_codes_from_the_hub(hub, cache, checkpoints, tmp_path):
    put_into_cache(cache, SMALL_75.repository, {SMALL_75.file: checkpoints(75)})
    arguments = ["--checkpoint", "small-speech-75", "--output", str(tmp_path / "folder"), "--push-to-hub", "org/codec"]
    assert main(arguments) == 0
    golden = np.load(REFERENCE / "chirp_1.37_75.npz")
    audio = formula.waveform("chirp", 1.37)
    codes = codes_without_the_package("org/codec", audio, tmp_path, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0")
    clear = golden["margin"] > 1e-6  # closer ties may be decided differently on another processor
    assert len(np.unique(codes)) > 10
    np.testing.assert_array_equal(codes[clear], golden["codes"][0, clear])


@pytest.mark.slow
def test_a_folder_in_a_cache_made_by_hand_works_offline_with_transformers_alone(small, tmp_path):
    folder = convert(small, tmp_path / "folder")
    cache = tmp_path / "hf_home" / "hub"
    put_into_cache(cache, "org/codec", {file.name: file for file in folder.iterdir()})
    audio = formula.waveform("speechlike", 0.5)
    codes = codes_without_the_package("org/codec", audio, tmp_path, HF_HUB_OFFLINE="1")
    assert len(np.unique(codes)) > 3
    np.testing.assert_array_equal(codes, expected_codes(small_tensors(75), audio))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_a_large_file_by_name_needs_little_memory_and_less_than_a_minute(checkpoints, tmp_path):
    large = large_checkpoint(checkpoints(75), tmp_path / SMALL_75.file)
    put_into_cache(tmp_path / "cache", SMALL_75.repository, {SMALL_75.file: large})
    arguments = ["--checkpoint", "small-speech-75", "--output", tmp_path / "folder"]
    memory, seconds = memory_and_seconds(arguments, HF_HUB_CACHE=str(tmp_path / "cache"), HF_HUB_OFFLINE="1")
    assert memory < 1.2e9
    assert seconds < 60  # on two cores


# ---------------------------------------------------------------------------------------------------------------------
# Downloads
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(hub, small):
    """Serve the repository of a published checkpoint, with that file and another."""
    repository = hub.repositories[SMALL_75.repository] = Repository()
    repository.commit({SMALL_75.file: small.read_bytes(), "WavTokenizer_small_600_24k_4096.ckpt": b"another"})
    return repository


def convert_by_name(tmp_path: Path, *options: str, name: str = "small-speech-75") -> int:
    return main(["--checkpoint", name, "--output", str(tmp_path / "folder"), *options])


def test_a_name_converts_to_the_same_folder_as_its_file(served, small, tmp_path):
    assert convert_by_name(tmp_path) == 0
    by_path = convert(small, tmp_path / "by_path")
    for name in ("model.safetensors", "config.json", "preprocessor_config.json"):
        assert (tmp_path / "folder" / name).read_bytes() == (by_path / name).read_bytes()


def test_load_original_accepts_names_and_paths_and_writes_no_folder(served, small, tmp_path):
    by_name, by_path = (load_original(source) for source in ("small-speech-75", small))
    folder = WavTokenizerModel.from_pretrained(convert(small, tmp_path / "folder"))
    codes = torch.arange(40)[None, None]
    for model in (by_name, by_path):
        assert not model.training
        assert model.config.codebook_fingerprint == folder.config.codebook_fingerprint
        state, expected = model.state_dict(), folder.state_dict()
        assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)
        assert torch.equal(model.decode(codes).audio_values, folder.decode(codes).audio_values)


def test_a_revision_of_a_file_is_refused(small):
    with pytest.raises(ValueError, match=r"Got revision 'main' for .*, a file on this machine"):
        load_original(small, revision="main")


def test_cached_files_need_no_network(served, hub, small, tmp_path, monkeypatch):
    load_original("small-speech-75")
    before = len(hub.requests)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    load_original("small-speech-75")
    assert before > 0 and len(hub.requests) == before


def test_an_older_revision_can_be_downloaded(served, small, tmp_path, capsys):
    older_revision = served.names["main"]
    served.commit({SMALL_75.file: b"changed"})
    assert convert_by_name(tmp_path) == 2
    assert "cannot be read" in one_line(capsys)
    assert convert_by_name(tmp_path, "--revision", older_revision) == 0


def test_a_private_copy_needs_the_users_token(served, hub, monkeypatch):
    served.private = True
    hub.writers["hf_writer"] = "novateur"
    load_original("small-speech-75")
    with pytest.raises(OSError, match="you have no access"):
        load_original("small-speech-75", token="hf_other", cache_dir="elsewhere")


def test_an_interrupted_download_resumes(served, hub, tmp_path):
    # huggingface_hub resumes at whole blocks of 10 MB
    others = {"optimizer_states": [torch.zeros(6_000_000)]}
    torch.save({"state_dict": small_tensors(75), **others}, tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    served.commit({SMALL_75.file: content})
    hub.fault = lambda method, path: "cut" if method == "GET" and not hub.ranges and path.endswith(".ckpt") else None
    assert convert_by_name(tmp_path) == 0
    (wanted,) = hub.ranges
    assert 0 < int(wanted.removeprefix("bytes=").removesuffix("-")) <= len(content) / 2


def test_a_broken_connection_is_reported_and_the_same_command_finishes(served, hub, tmp_path, capsys):
    hub.fault = lambda method, path: 500 if method == "GET" and path.endswith(".ckpt") else None
    assert convert_by_name(tmp_path) == 2
    assert "could not be downloaded" in (said := one_line(capsys)) and "Run this again" in said
    assert not (tmp_path / "folder").exists()
    hub.fault = lambda method, path: None
    assert convert_by_name(tmp_path) == 0


def test_a_file_with_a_wrong_hash_is_refused(cache, small, tmp_path, capsys):
    snapshot = put_into_cache(cache, SMALL_75.repository, {SMALL_75.file: small})
    blob = next((snapshot.parent.parent / "blobs").iterdir())
    blob.unlink()
    content = bytearray(small.read_bytes())
    content[-5000] ^= 1
    blob.write_bytes(content)
    (snapshot / SMALL_75.file).unlink()
    (snapshot / SMALL_75.file).symlink_to(blob)
    assert convert_by_name(tmp_path) == 2
    said = one_line(capsys)
    assert (
        f"expected {blob.name}" in said and hashlib.sha256(content).hexdigest() in said and "download it again" in said
    )
    assert not (tmp_path / "folder").exists()


def test_a_cached_file_is_used_after_its_repository_was_deleted(hub, cache, small, tmp_path):
    put_into_cache(cache, SMALL_75.repository, {SMALL_75.file: small})
    assert convert_by_name(tmp_path) == 0
    assert hub.requests  # it was requested, and none exists


BAD_NAMES = {
    "gone": ("small-speech-75", lambda hub: None, "There is no novateur/WavTokenizer on the Hub"),
    "empty": (
        "small-speech-75",
        lambda hub: (
            hub.repositories.update({SMALL_75.repository: Repository()})
            or hub.repositories[SMALL_75.repository].commit({".gitattributes": b""})
        ),
        "holds no WavTokenizer_small_320_24k_4096.ckpt",
    ),
    "deleted": ("large-speech-75-v1", lambda hub: None, "no longer on the Hub"),
    "unknown": ("large-speech-75", lambda hub: None, "Nearest: large-speech-75-v2, large-speech-75-v1"),
}


@pytest.mark.parametrize("case", BAD_NAMES)
def test_an_unavailable_checkpoint_is_reported_in_one_line(case, hub, tmp_path, capsys):
    name, make, reason = BAD_NAMES[case]
    make(hub)
    assert convert_by_name(tmp_path, name=name) == 2
    assert reason in one_line(capsys)
    assert not (tmp_path / "folder").exists()


def test_offline_mode_without_a_cached_file_is_reported(cache, tmp_path, capsys):
    assert convert_by_name(tmp_path) == 2
    assert "offline mode is on (HF_HUB_OFFLINE)" in one_line(capsys)


def test_an_unreachable_hub_is_reported(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the attempts of huggingface_hub
    hub.server.shutdown()
    hub.server.server_close()
    assert convert_by_name(tmp_path) == 2
    assert "the Hub cannot be reached. Go online and run this again" in one_line(capsys)


def test_a_missing_revision_is_reported(served, tmp_path, capsys):
    assert convert_by_name(tmp_path, "--revision", "v9") == 2
    assert "no revision 'v9'" in one_line(capsys)


# ---------------------------------------------------------------------------------------------------------------------
# Uploads
# ---------------------------------------------------------------------------------------------------------------------


def push(small: Path, tmp_path: Path, *options: str) -> int:
    return main([str(small), "--output", str(tmp_path / "folder"), "--push-to-hub", "org/codec", *options])


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_every_uploaded_file_is_unchanged(hub, small, tmp_path):
    assert push(small, tmp_path) == 0
    there = hub.repositories["org/codec"].files()
    assert {name: there[name] for name in there if name != ".gitattributes"} == contents(tmp_path / "folder")
    assert not hub.repositories["org/codec"].private


def test_a_private_repository_is_private(hub, small, tmp_path):
    assert push(small, tmp_path, "--private") == 0
    assert hub.repositories["org/codec"].private


@pytest.mark.parametrize("options", [["--private"], ["--private", "--create-pr"]], ids=str)
def test_private_is_refused_for_a_public_repository(options, hub, small, tmp_path, capsys):
    hub.repositories["org/codec"] = Repository()
    hub.repositories["org/codec"].commit({"README.md": b"theirs"})
    assert push(small, tmp_path, *options) == 2
    said = one_line(capsys)
    assert "org/codec exists and is public" in said and "Make it private in its settings" in said
    assert hub.repositories["org/codec"].files() == {"README.md": b"theirs"}
    assert "refs/pr/1" not in hub.repositories["org/codec"].names
    hub.repositories["org/codec"].private = True
    assert push(small, tmp_path, *options) == 0


def test_discriminators_of_an_earlier_upload_are_deleted_with_new_weights(hub, small, tmp_path):
    repository = hub.repositories["org/codec"] = Repository()
    repository.commit({"discriminators.safetensors": b"of others", "notes.txt": b"theirs"})
    commits = len(repository.revisions)
    assert push(small, tmp_path) == 0
    assert repository.files() == {"notes.txt": b"theirs", **contents(tmp_path / "folder")}
    assert len(repository.revisions) == commits + 1


def test_a_pull_request_leaves_the_main_branch_alone(hub, small, tmp_path, capsys):
    hub.repositories["org/codec"] = Repository()
    hub.repositories["org/codec"].commit({"README.md": b"theirs"})
    hub.writers["hf_writer"] = "somebody-else"
    assert push(small, tmp_path, "--create-pr") == 0
    assert hub.repositories["org/codec"].files() == {"README.md": b"theirs"}
    assert hub.repositories["org/codec"].files("refs/pr/1") == contents(tmp_path / "folder")
    assert "/discussions/1" in capsys.readouterr().out


def test_a_missing_token_is_reported_before_the_work_begins(hub, small, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    assert push(small, tmp_path) == 2
    assert "Log in with `hf auth login`" in one_line(capsys)
    assert not (tmp_path / "folder").exists() and not hub.requests


def test_missing_write_permission_is_reported_and_the_folder_is_kept(hub, small, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_stranger")
    assert push(small, tmp_path) == 2
    said = one_line(capsys)
    assert "Use a token with write access" in said and "is complete: run this again" in said
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    assert push(small, tmp_path) == 0


def test_a_failed_conversion_creates_no_repository(hub, tmp_path, capsys):
    (tmp_path / "page.ckpt").write_text("<html>")
    assert push(tmp_path / "page.ckpt", tmp_path) == 2
    assert hub.repositories == {}


@pytest.mark.parametrize("where", ["/lfs/", "/commit/"])
@pytest.mark.parametrize("fault", [403, "cut"])
def test_an_interrupted_upload_corrupts_nothing_and_the_same_command_finishes(
    fault, where, hub, small, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the attempts of huggingface_hub
    hub.fault = lambda method, path: fault if where in path else None
    assert push(small, tmp_path) == 2
    assert "is complete: run this again" in one_line(capsys)
    before = contents(tmp_path / "folder")
    arrived = (fault, where) == ("cut", "/commit/")  # only the response is cut
    assert set(hub.repositories["org/codec"].files()) == {".gitattributes", *(before if arrived else ())}
    hub.fault = lambda method, path: None
    assert push(small, tmp_path) == 0
    assert contents(tmp_path / "folder") == before
    there = hub.repositories["org/codec"].files()
    assert {name: there[name] for name in before} == before


def test_a_folder_of_another_checkpoint_is_not_pushed(hub, small, tmp_path, capsys):
    assert push(small, tmp_path) == 0
    tensors = small_tensors(75)
    tensors["head.out.bias"] += 1
    torch.save({"state_dict": tensors}, tmp_path / "other.ckpt")
    before = hub.repositories["org/codec"].files()
    assert push(tmp_path / "other.ckpt", tmp_path) == 2
    assert "head.linear.bias differs" in one_line(capsys)
    assert hub.repositories["org/codec"].files() == before


def test_all_converts_available_checkpoints_and_names_the_others(hub, tmp_path, capsys, monkeypatch):
    names = ("small-speech-40", "small-speech-75", "large-speech-75-v1", "large-unify-40")
    published = {name: find(name) for name in names}
    monkeypatch.setattr("wavtokenizer_hf.conversion.command.table", lambda: published)
    for checkpoint in published.values():
        if checkpoint.repository is not None:
            torch.save({"state_dict": small_tensors(checkpoint.frame_rate)}, tmp_path / "file")
            repository = hub.repositories.setdefault(checkpoint.repository, Repository())
            repository.commit({checkpoint.file: (tmp_path / "file").read_bytes()})
    arguments = ["--all", "--output", str(tmp_path / "all"), "--push-to-hub", "org"]
    assert main(arguments) == 1
    errors = capsys.readouterr().err
    assert "large-speech-75-v1: skipped: no longer on the Hub" in errors
    assert "`wavtokenizer convert FILE --checkpoint large-speech-75-v1`" in errors
    # the weights are untrained, so the known answer shows that they are not those of Apertus
    assert "large-unify-40: failed: A sine of 440 Hz" in errors
    assert sorted(os.listdir(tmp_path / "all")) == ["wavtokenizer-small-speech-40", "wavtokenizer-small-speech-75"]
    rates = [
        json.loads(hub.repositories[f"org/wavtokenizer-small-speech-{rate}"].files()["config.json"])[
            "upsampling_ratios"
        ]
        for rate in (40, 75)
    ]
    assert rates == [[6, 5, 5, 4], [8, 5, 4, 2]]
    assert main(arguments) == 1  # again: existing folders stay
    assert "exists and is equal" in capsys.readouterr().out


def test_all_succeeds_if_every_checkpoint_still_on_the_hub_was_converted(hub, cache, small, tmp_path, monkeypatch):
    published = {name: find(name) for name in ("large-speech-75-v1", "small-speech-75")}
    monkeypatch.setattr("wavtokenizer_hf.conversion.command.table", lambda: published)
    put_into_cache(cache, SMALL_75.repository, {SMALL_75.file: small})
    assert main(["--all", "--output", str(tmp_path / "all")]) == 0
    assert os.listdir(tmp_path / "all") == ["wavtokenizer-small-speech-75"]


def test_all_without_a_push_token_is_refused_once_before_the_work_begins(hub, small, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    assert main(["--all", "--output", str(tmp_path / "all"), "--push-to-hub", "org"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "Log in with `hf auth login`" in said
    assert not (tmp_path / "all").exists() and not hub.requests


# ---------------------------------------------------------------------------------------------------------------------
# Names of published checkpoints as models
# ---------------------------------------------------------------------------------------------------------------------

SPEECH = str(Path(__file__).parent.parent / "examples" / "speech.flac")


@pytest.fixture
def assets(tmp_path, monkeypatch):
    """Return an empty assets cache of huggingface_hub, which holds converted copies."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return tmp_path / "assets"


def test_a_published_name_is_converted_on_first_use_and_then_found_offline(
    hub, cache, assets, small, tmp_path, capsys, monkeypatch
):
    hub.repositories[SMALL_75.repository] = Repository()
    hub.repositories[SMALL_75.repository].commit({SMALL_75.file: small.read_bytes()})
    output = tmp_path / "tokens.json"
    assert cli.main(["encode", SPEECH, "-m", "small-speech-75", "-o", str(output)]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("small-speech-75: ")]
    assert len(said) == 2 and SMALL_75.file in said[0] and str(assets) in said[1]
    tokens = json.loads(output.read_text())
    assert tokens["model"] == "small-speech-75"
    assert tokens["codebook_fingerprint"] == load_original(small).codebook_fingerprint

    requests = len(hub.requests)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    encoder = loading.load_model(WavTokenizerEncoderModel, "small-speech-75")
    assert encoder.codebook_fingerprint == tokens["codebook_fingerprint"]
    assert cli.main(["info", "small-speech-75", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["codebook_fingerprint"] == tokens["codebook_fingerprint"]
    assert "small-speech-75:" not in printed.err and len(hub.requests) == requests


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("small-speech-75", "offline mode is on (HF_HUB_OFFLINE). Go online and run this again."),
        (
            "large-speech-75-v1",
            "`wavtokenizer convert FILE --checkpoint large-speech-75-v1` converts a copy that you have.",
        ),
        ("small-speach-75", "Did you mean small-speech-75"),
        ("encodec", "`wavtokenizer checkpoints` lists the names"),
    ],
)
def test_an_unavailable_published_name_gives_one_line_with_the_next_step(name, message, cache, assets, capsys):
    assert cli.main(["encode", SPEECH, "-m", name, "-o", "-"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert not converted_folder(name).exists()


def test_an_unwritable_cache_is_reported_before_any_download(hub, cache, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(huggingface_hub.constants, "HF_ASSETS_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"cannot be written .* Set HF_HOME to another folder"):
        find_model("small-speech-75")
    assert hub.requests == []


def test_a_damaged_download_leaves_no_converted_copy(hub, cache, assets):
    hub.repositories[SMALL_75.repository] = Repository()
    hub.repositories[SMALL_75.repository].commit({SMALL_75.file: b"<html>"})
    with pytest.raises(ValueError, match="Cannot load the model 'small-speech-75'"):
        find_model("small-speech-75")
    assert not converted_folder("small-speech-75").exists()


def test_each_revision_of_a_published_name_has_its_own_copy(assets):
    assert converted_folder("small-speech-75", "refs/pr/1").name == "small-speech-75@refs--pr--1"


def test_a_local_folder_takes_precedence_over_a_published_name(tmp_path, monkeypatch, assets):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small-speech-75").mkdir()
    assert find_model("small-speech-75") == "small-speech-75"
