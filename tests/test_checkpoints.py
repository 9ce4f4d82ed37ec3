"""The table of published checkpoints, their cards, and checkpoints that come as several files."""

import copy
import dataclasses
import hashlib
import json
import re
from pathlib import Path

import formula
import pytest
import torch
from conftest import REFERENCE
from huggingface_hub import InferenceClient, ModelCard
from small_checkpoints import CODEBOOK, ENCODER, is_kept, new_name, read_weights, small_tensors
from transformers.pipelines import PIPELINE_REGISTRY

from wavtokenizer_hf import WavTokenizerModel, bundled_model, cli
from wavtokenizer_hf.conversion import card as cards
from wavtokenizer_hf.conversion import load_original
from wavtokenizer_hf.conversion.command import main
from wavtokenizer_hf.conversion.from_original import convert
from wavtokenizer_hf.conversion.published import KnownAnswer, PublishedCheckpoint, find, table
from wavtokenizer_hf.model_cards import check


# The published checkpoints: name, repository below novateur/, file, codes per second, mirror below swiss-ai/
FACTS = """
small-speech-40           WavTokenizer                             WavTokenizer_small_600_24k_4096.ckpt             40 small-speech-40token
small-speech-75           WavTokenizer                             WavTokenizer_small_320_24k_4096.ckpt             75 small-speech-75token
medium-speech-75          WavTokenizer-medium-speech-75token       wavtokenizer_medium_speech_320_24k.ckpt          75 medium-speech-75token
medium-speech-75-v2       WavTokenizer-medium-speech-75token       wavtokenizer_medium_speech_320_24k_v2.ckpt       75 medium-speech-75token-v2
medium-music-audio-75     WavTokenizer-medium-music-audio-75token  wavtokenizer_medium_music_audio_320_24k.ckpt     75 medium-music-audio-75token
medium-music-audio-75-v2  WavTokenizer-medium-music-audio-75token  wavtokenizer_medium_music_audio_320_24k_v2.ckpt  75 medium-music-audio-75token-v2
large-unify-40            WavTokenizer-large-unify-40token         wavtokenizer_large_unify_600_24k.ckpt            40 large-unify-40token
large-speech-75-v1        -                                        wavtokenizer_large_speech_320_24k.ckpt           75 -
large-speech-75-v2        WavTokenizer-large-speech-75token        wavtokenizer_large_speech_320_v2.ckpt            75 large-speech-75token-v2
"""  # noqa: E501, the table stays aligned
NAMES = [line.split()[0] for line in FACTS.strip().splitlines()]


@pytest.fixture(scope="module")
def tensors():
    """Return a small checkpoint for 75 codes per second, by reference names."""
    return small_tensors(75)


@pytest.fixture(scope="module")
def small(tensors, tmp_path_factory):
    """Return the small checkpoint as a file."""
    path = tmp_path_factory.mktemp("small") / "small.ckpt"
    torch.save({"state_dict": tensors}, path)
    return path


def error_of(capsys) -> str:
    return capsys.readouterr().err.splitlines()[-1]


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


def test_the_table_holds_the_published_checkpoints():
    expected = [
        (
            name,
            None if repository == "-" else f"novateur/{repository}",
            file,
            int(rate),
            None if mirror == "-" else f"swiss-ai/wavtokenizer-{mirror}",
        )
        for name, repository, file, rate, mirror in map(str.split, FACTS.strip().splitlines())
    ]
    assert [(p.name, p.repository, p.file, p.frame_rate, p.mirror) for p in table().values()] == expected


@pytest.mark.parametrize("name", NAMES)
def test_rate_file_and_yaml_of_a_checkpoint_belong_together(name):
    published = find(name)
    assert f"_{24000 // published.frame_rate}_" in published.file
    assert f"_frame{published.frame_rate}_" in published.yaml
    assert ("_music_audio_" in published.yaml) == ("_music_audio_" in published.file)


def test_the_configuration_of_each_rate_matches_the_reference_tensors(rate):
    published = next(published for published in table().values() if published.frame_rate == rate)
    with torch.device("meta"):
        model = WavTokenizerModel(published.config)
    manifest = json.loads((REFERENCE / f"manifest_{rate}.json").read_text())
    expected = {new_name(name): tuple(shape) for name, shape in manifest.items() if is_kept(name)}
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected


def test_every_stated_value_has_a_source_and_unknown_values_are_left_out():
    for published in table().values():
        assert published.sources and all(re.fullmatch(r"\[.+\]\(https://.+\)", source) for source in published.sources)
        assert published.sha256 is None or re.fullmatch("[0-9a-f]{64}", published.sha256)
        assert published.fingerprint is None or re.fullmatch("[0-9a-f]{16}", published.fingerprint)
        assert published.size is None or 1.6e9 < published.size < 1.8e9
    answer = find("large-unify-40").known_answers[0]  # architecture.md
    assert answer.first_codes == [1323, 1442, 3524, 2056, 3229, 1723, 2785, 1389, 3144, 1723]
    assert (answer.hertz, answer.amplitude, answer.seconds, answer.num_codes) == (440, 0.5, 0.5, 20)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("large-unify", "large-unify-40"), ("small-75", "small-speech-75"), ("encodec", ", ".join(NAMES))],
)
def test_an_unknown_name_lists_the_nearest_names(name, nearest):
    with pytest.raises(ValueError, match="which is not a published checkpoint") as error:
        find(name)
    assert nearest in str(error.value)


def test_the_command_prints_the_table(capsys):
    assert cli.main(["checkpoints"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, (name, repository, file, rate, _) in zip(
        lines[1:], map(str.split, FACTS.strip().splitlines()), strict=True
    ):
        assert line.split()[:2] == [name, rate]
        assert file in line and (repository in line or "no longer on the Hub" in line)
    assert cli.main(["checkpoints", "--json"]) == 0
    assert [json.loads(line)["name"] for line in capsys.readouterr().out.splitlines()] == NAMES


# ---------------------------------------------------------------------------------------------------------------------
# Checks of a published checkpoint
# ---------------------------------------------------------------------------------------------------------------------

# codes of the reference implementation for the sine on the formula's weights (at 5cf440d, torch 2.13.0, CPU, float32)
SINE_75 = KnownAnswer(440, 0.5, 0.5, 38, [3807, 112, 3379, 2464, 862, 873, 1813, 1753, 112, 1455], "the reference")


def test_the_known_answers_are_the_reference_codes_of_the_sine(models):
    dataclasses.replace(find("small-speech-75"), known_answers=[SINE_75]).check_model(models(75))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"known_answers": [dataclasses.replace(SINE_75, first_codes=[*SINE_75.first_codes[:-1], 7])]},
            "A sine of 440 Hz",
        ),
        ({"known_answers": [dataclasses.replace(SINE_75, num_codes=20)]}, "gave 38 codes"),
        ({"frame_rate": 40}, "Got a checkpoint of 75 codes/s, expected 40"),
        ({"fingerprint": "0123456789abcdef"}, "expected 0123456789abcdef for small-speech-75"),
    ],
)
def test_a_checkpoint_other_than_the_published_one_is_refused(changes, reason, models):
    with pytest.raises(ValueError, match=reason):
        dataclasses.replace(find("small-speech-75"), **changes).check_model(models(75))


def test_a_wrong_checkpoint_leaves_no_folder(small, tmp_path, capsys):
    assert main([str(small), "--checkpoint", "small-speech-40", "--output", str(tmp_path / "folder")]) == 2
    assert "expected 40 for small-speech-40" in error_of(capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_size_or_hash_is_refused_before_it_is_opened(tmp_path):
    path = tmp_path / "page.ckpt"
    path.write_bytes(b"<html>")
    digest = hashlib.sha256(b"<html>").hexdigest()
    published = dataclasses.replace(find("large-unify-40"), size=6, sha256=digest)
    published.check_file(path, digest)
    for changes, reason in (
        ({"size": 7}, "has 6 bytes, expected 7"),
        ({"sha256": 64 * "0"}, f"has the sha256 {digest}"),
    ):
        with pytest.raises(ValueError, match=reason):
            convert(path, tmp_path / "folder", published=dataclasses.replace(published, **changes))


# ---------------------------------------------------------------------------------------------------------------------
# Cards
# ---------------------------------------------------------------------------------------------------------------------


def test_each_checkpoint_has_one_card_that_matches_the_table():
    """`python -m wavtokenizer_hf.conversion.card` writes the cards again."""
    written = {path.stem: path.read_text() for path in cards.CARDS.glob("*.md") if path.name != "template.md"}
    assert written == {name: cards.published_card(published) for name, published in table().items()}


def test_the_task_of_the_cards_exists_on_the_hub_and_has_no_pipeline():
    """The Hub shows `pipeline(TASK, model=…)` for tasks of transformers' pipelines, and no pipeline runs a codec."""
    tasks = {
        ModelCard.load(path).data.pipeline_tag for path in [*cards.CARDS.glob("*-*.md"), bundled_model() / "README.md"]
    }
    assert tasks == {"audio-to-audio"} and not tasks & set(PIPELINE_REGISTRY.get_supported_tasks())
    assert hasattr(InferenceClient, "audio_to_audio")


@pytest.mark.parametrize("name", NAMES)
def test_a_card_describes_its_checkpoint(name):
    published, card = find(name), ModelCard.load(cards.CARDS / f"{name}.md")
    assert (card.data.license, card.data.library_name) == ("mit", "transformers")
    assert card.data.pipeline_tag == "audio-to-audio"
    assert {"wavtokenizer", "audio-codec"} <= set(card.data.tags)
    facts = [published.file, published.yaml, published.domain, published.corpus, published.remarks, *published.sources]
    facts += [f"{published.frame_rate} per second", {40: "480 bit/s", 75: "900 bit/s"}[published.frame_rate]]
    facts += [fact for fact in (published.repository, published.mirror) if fact is not None]
    assert [fact for fact in facts if fact not in card.text] == []


def test_no_card_states_a_number_without_a_source(capsys):
    assert check.main([]) == 0
    assert len(list(cards.CARDS.glob("*.md"))) == 1 + len(NAMES)


def test_a_card_that_conversion_writes_states_no_number_without_a_source(small, tmp_path):
    for name, published in (("plain", None), ("named", find("small-speech-75"))):
        text = (convert(small, tmp_path / name, published=published) / "README.md").read_text()
        assert check.unsourced(text) == []
        assert hashlib.sha256(small.read_bytes()).hexdigest() in text
        assert ("LibriTTS" in text) == (name == "named")


def in_the_hubs_cache(folder: Path, published: PublishedCheckpoint) -> Path:
    """Return the path of a published file in the cache of huggingface_hub, and create its folders."""
    snapshot = folder / f"models--{published.repository.replace('/', '--')}" / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    return snapshot / published.file


def test_an_unidentified_file_is_called_not_verified_in_card_and_report(small, tmp_path, capsys):
    published = find("small-speech-75")
    cached = in_the_hubs_cache(tmp_path, published)
    cached.symlink_to(small)
    another = cached.with_name("another.ckpt")
    another.symlink_to(small)
    fingerprint = load_original(small).codebook_fingerprint
    cases = [
        (small, published, False),
        (another, published, False),
        (cached, published, True),
        (cached, find("medium-speech-75"), False),
        (small, dataclasses.replace(published, fingerprint=fingerprint), True),
        (small, dataclasses.replace(published, size=small.stat().st_size), True),
        (small, dataclasses.replace(published, sha256=hashlib.sha256(small.read_bytes()).hexdigest()), True),
    ]
    for number, (file, published, verified) in enumerate(cases):
        capsys.readouterr()
        card = (convert(file, tmp_path / str(number), published=published) / "README.md").read_text()
        warning = f"iven as {published.name}, and not verified beyond its rate"
        assert (warning in capsys.readouterr().out, warning in card.replace("`", "")) == (not verified, not verified)
        assert ("\nThe weights are those of `" in card) == verified


def test_a_hash_identifies_a_whole_file_and_not_its_parts(tensors, save, tmp_path):
    encoder, decoder = halves(tensors)
    parts = [save(encoder, "encoder.pt"), save(decoder, "decoder.pt")]
    published = dataclasses.replace(find("small-speech-75"), sha256=64 * "0")
    card = (convert(parts, tmp_path / "joined", published=published) / "README.md").read_text()
    assert "not verified beyond its rate" in card


UNSOURCED = {
    "sentence": "Its PESQ is 3.1.",
    "row": "| [paper](https://arxiv.org/abs/2408.16532) | UTMOS |\n| 4.05 | here |",
    "item": "- [80,000 hours](https://example.org)\n- 40 codes per second",
    "after_its_source": "Source: me.\n\nIt runs 20 times as fast.",
    "last": "[A link](https://example.org) elsewhere.\n\nMeasured: 42 dB",
}
SOURCED = {
    "line": "Its PESQ is 3.1.\n\nSource: report.json of this folder.",
    "link": "Its PESQ is [3.1](https://example.org).",
    "names": "float32, `WavTokenizer_small_320_24k_4096.ckpt`, v2",
    "code": "```python\nx = 3.1\n```",
    "heading": "# wavtokenizer-small-40",
    "metadata": "---\nversion: 3\n---\nText.",
}


@pytest.mark.parametrize("case", UNSOURCED)
def test_the_script_refuses_a_number_without_a_source(case, tmp_path, capsys):
    (tmp_path / "card.md").write_text(UNSOURCED[case])
    assert check.main([str(tmp_path / "card.md")]) == 1
    assert "a number without a source" in capsys.readouterr().err


@pytest.mark.parametrize("case", SOURCED)
def test_the_script_accepts_a_number_with_a_source(case):
    assert check.unsourced(SOURCED[case]) == []


# ---------------------------------------------------------------------------------------------------------------------
# Several files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def save(tmp_path):
    def save(tensors, name) -> Path:
        torch.save({"state_dict": tensors}, tmp_path / name)
        return tmp_path / name

    return save


def nearby(tensors: dict[str, torch.Tensor], step: float) -> dict[str, torch.Tensor]:
    """Return the weights of a later checkpoint of the same run, which differ little."""
    return {
        name: tensor + step * torch.from_numpy(formula.fill(f"{step}.weight_v", tensor.shape))
        for name, tensor in tensors.items()
    }


def test_averaging_checkpoints_of_one_run_gives_their_mean(tensors, save, tmp_path, capsys):
    runs = [tensors, nearby(tensors, 0.01), nearby(tensors, 0.02)]
    files = [str(save(run, f"step={step}.ckpt")) for step, run in enumerate(runs)]
    assert main([*files, "--average", "--output", str(tmp_path / "mean")]) == 0
    weights = read_weights(tmp_path / "mean")
    for name in filter(is_kept, tensors):
        mean = torch.stack([run[name].double() for run in runs]).mean(0)
        # rounding of float32 sums of three values
        torch.testing.assert_close(weights[new_name(name)].double(), mean, rtol=1e-6, atol=1e-6)
    assert "averaged: 3 checkpoints" in capsys.readouterr().out
    card = (tmp_path / "mean" / "README.md").read_text()
    assert "the mean of the checkpoints named below" in card and "step=2.ckpt" in card


def test_averaging_unrelated_checkpoints_is_refused(tensors, save, tmp_path):
    first = save(tensors, "first.ckpt")
    other_run = {
        name: torch.from_numpy(formula.fill("other." + name, tensor.shape)) for name, tensor in tensors.items()
    }
    other_shape = copy.deepcopy(tensors)
    for part in ("embed", "embed_avg", "cluster_size"):
        other_shape[CODEBOOK + part] = other_shape[CODEBOOK + part][:100]
    for run, reason in ((other_run, "two training runs"), (other_shape, "differ in shape")):
        with pytest.raises(ValueError, match=reason):
            convert([first, save(run, "second.ckpt")], tmp_path / "mean", average=True)
    with pytest.raises(ValueError, match="the same checkpoint twice"):
        convert([first, first], tmp_path / "mean", average=True)
    with pytest.raises(ValueError, match="expected several"):
        convert([first], tmp_path / "mean", average=True)
    with pytest.raises(ValueError, match="discriminators to keep"):
        convert(
            [first, save(nearby(tensors, 0.01), "later.ckpt")],
            tmp_path / "mean",
            with_discriminators=True,
            average=True,
        )
    assert not (tmp_path / "mean").exists()


def halves(tensors: dict[str, torch.Tensor]) -> tuple[dict, dict]:
    """Return encoder and decoder, each with the codebook."""
    encoder = {name: tensor for name, tensor in tensors.items() if name.startswith((ENCODER, CODEBOOK))}
    decoder = {name: tensor for name, tensor in tensors.items() if name.startswith((CODEBOOK, "backbone.", "head."))}
    return encoder, decoder


def test_parts_convert_to_the_same_folder_as_the_whole(tensors, small, save, tmp_path):
    files = [str(save(half, name)) for half, name in zip(halves(tensors), ("encoder.pt", "decoder.pt"), strict=True)]
    assert main([*files, "--output", str(tmp_path / "joined")]) == 0
    whole = convert(small, tmp_path / "whole")
    assert (tmp_path / "joined" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def outetts_halves(tensors: dict[str, torch.Tensor], folder: Path) -> list[str]:
    """
    Return the halves as outetts/wav_tokenizer/model.py of github.com/edwko/OuteTTS saves them. OuteAI publishes such
    files on the Hub.
    """
    encoder = {name: tensor for name, tensor in tensors.items() if name.startswith("feature_extractor.")}
    decoder = {name: tensor for name, tensor in tensors.items() if name.startswith(("backbone.", "head."))}
    codebook = tensors[CODEBOOK + "embed"].clone()
    torch.save(encoder, folder / "encoder_model.pt")
    torch.save(
        {"model_state_dict": {**decoder, "codebook_weights": codebook}, "codebook_weights": codebook},
        folder / "decoder_model.pt",
    )
    return [str(folder / "encoder_model.pt"), str(folder / "decoder_model.pt")]


def test_the_outetts_parts_convert_to_the_same_folder_as_the_whole(tensors, small, tmp_path):
    assert main([*outetts_halves(tensors, tmp_path), "--output", str(tmp_path / "joined")]) == 0
    whole = convert(small, tmp_path / "whole")
    assert (tmp_path / "joined" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_an_outetts_decoder_with_another_codebook_is_refused(tensors, tmp_path):
    files = outetts_halves(tensors, tmp_path)
    decoder = torch.load(files[1], weights_only=True)
    decoder["model_state_dict"]["codebook_weights"][5, 5] += 1e-3
    torch.save(decoder, files[1])
    with pytest.raises(ValueError, match=r"both hold .*_codebook\.embed, and differ in it"):
        convert(files, tmp_path / "joined")


def test_parts_of_two_checkpoints_are_refused(tensors, save, tmp_path):
    encoder, decoder = halves(tensors)
    decoder[CODEBOOK + "embed"] = decoder[CODEBOOK + "embed"].clone()
    decoder[CODEBOOK + "embed"][5, 5] += 1e-3
    with pytest.raises(ValueError, match=r"both hold .*_codebook\.embed, and differ in it"):
        convert([save(encoder, "encoder.pt"), save(decoder, "decoder.pt")], tmp_path / "joined")


def test_one_part_alone_is_refused_with_the_missing_part(tensors, save, tmp_path):
    with pytest.raises(ValueError, match=r"are missing: .*backbone\."):
        convert(save(halves(tensors)[0], "encoder.pt"), tmp_path / "joined")


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------

BAD_ARGUMENTS = {
    "nothing": ([], "Got no checkpoint"),
    "all_and_one": (["--all", "--checkpoint", "large-unify-40"], "--all beside one"),
    "average_of_one": (["a.ckpt", "--average"], "expected several FILEs"),
    "average_of_a_published_one": (
        ["a.ckpt", "b.ckpt", "--average", "--checkpoint", "large-unify-40"],
        "is none of them",
    ),
    "revision_of_a_file": (["a.ckpt", "--revision", "main"], "--revision for a file"),
    "yaml_of_all": (["--all", "--config", "a.yaml"], "They belong to one checkpoint"),
    "revision_of_all": (["--all", "--revision", "main"], "They belong to one checkpoint"),
    "private_and_not_pushed": (["a.ckpt", "--private"], "without --push-to-hub"),
    "missing_file": (["a.ckpt"], "There is no file a.ckpt"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_contradictory_arguments_are_refused_in_one_line(case, tmp_path, capsys):
    arguments, reason = BAD_ARGUMENTS[case]
    assert cli.main(["convert", *arguments, "--output", str(tmp_path / "folder")]) == 2
    captured = capsys.readouterr()
    assert reason in captured.err and len(captured.err.splitlines()) == 1 and captured.out == ""


def test_the_command_reports_its_output_as_json(small, tmp_path, capsys):
    arguments = [str(small), "--checkpoint", "small-speech-75", "--output", str(tmp_path / "folder"), "--json"]
    assert cli.main(["convert", *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert result == {
        "checkpoint": "small-speech-75",
        "output": str(tmp_path / "folder"),
        "codebook_fingerprint": config["codebook_fingerprint"],
    }
