"""The dataset card of a token folder has the metadata that the Hub and the datasets library expect."""

import shutil

import datasets
import huggingface_hub
import pytest
from huggingface_hub import DatasetCard
from tiny_training import write_clips
from token_folders import write_token_folder

from wavtokenizer_hf.bulk import card as cards
from wavtokenizer_hf.bulk.options import TokenizeOptions
from wavtokenizer_hf.cli import main


SOURCE_CARD = "---\nlicense: cc-by-4.0\nlanguage:\n- en\npretty_name: Not copied\n---\n# Clips\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card") / "tokens"
    write_token_folder(folder, 3, columns={"text": ["a", "b", "c"]})
    return folder


def test_the_metadata_holds_features_and_size_and_names_missing_fields(folder):
    card = DatasetCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert data["size_categories"] == ["n<1K"] and "wavtokenizer" in data["tags"]
    features = {feature["name"]: feature for feature in data["dataset_info"]["features"]}
    assert features["audio_codes"] == {"name": "audio_codes", "list": "uint16"}
    assert features["text"]["dtype"] == "string"
    assert "license" not in data and "language" not in data  # no invented values
    assert "no `license` and no `language`" in card.text and "`--license` and `--language`" in card.text
    assert "configs" not in data  # see add_configs


def test_the_features_equal_those_of_load_dataset(folder, tmp_path):
    loaded = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path))
    written = DatasetCard.load(folder / "README.md").data.to_dict()["dataset_info"]
    assert datasets.Features._from_yaml_list(written["features"]) == loaded.features
    assert len(loaded) == 3


def test_the_card_on_the_hub_has_configs(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "hub")
    text = cards.add_configs((folder / "README.md").read_text())
    (tmp_path / "hub" / "README.md").write_text(text)
    assert cards.add_configs(text) == text
    (config,) = DatasetCard(text).data.to_dict()["configs"]
    assert config == {"config_name": "default", "data_files": [{"split": "train", "path": "data/part-*.parquet"}]}
    loaded = datasets.load_dataset(str(tmp_path / "hub"), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["text"][:] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("num_clips", "name"), [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (10**6, "1M<n<10M"), (10**12, "n>1T")]
)
def test_size_categories_are_those_of_the_hub(num_clips, name):
    assert cards.size_category(num_clips) == name


@pytest.mark.parametrize(
    "text",
    [
        "no metadata",
        "---\nlicense: [\n---\n",
        "---\n- a list\n---\n",
        "---\nlicense: 1\nlanguage: [no]\n---\n",
        b"\xff\xfe",
        "---\nlicense: " + "x" * 300 + "\n---\n",
        "---\n" + "a: " * 10_000 + "\n---\n",
    ],
)
def test_an_invalid_card_of_the_source_gives_no_metadata(text, tmp_path):
    (tmp_path / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert cards.source_metadata(tmp_path, None) == {}


def test_licence_and_language_are_found_in_a_card_with_megabytes_of_features(tmp_path):
    features = "dataset_info:\n" + "- config_name: c\n  features:\n  - name: a\n" * 50_000
    text = f"---\nlicense: mit\n{features}language:\n- en\n- de\ntags: []\n---\n"
    (tmp_path / "README.md").write_text(text)
    assert cards.source_metadata(tmp_path, None) == {"license": "mit", "language": ["en", "de"]}


def test_a_card_with_damaged_metadata_is_not_overwritten(tmp_path):
    write_token_folder(tmp_path / "tokens", 2)
    path = tmp_path / "tokens" / "README.md"
    damaged = path.read_text().replace("---\n", "---\nlicense: [mit\n", 1)
    path.write_text(damaged)
    write_token_folder(tmp_path / "tokens", 2)
    assert path.read_text() == damaged


def test_a_users_own_card_is_not_overwritten_in_any_encoding(tmp_path):
    write_clips(tmp_path / "clips", count=1, seconds=0.3)
    own = "Codes of my corpus, für mich.\n".encode("latin-1")
    line = ["tokenize", str(tmp_path / "clips"), "-m", "bundled", "-o", str(tmp_path / "tokens")]
    assert main(line) == 0
    (tmp_path / "tokens" / "README.md").write_bytes(own)
    assert main(line) == 0
    assert (tmp_path / "tokens" / "README.md").read_bytes() == own


def test_a_source_without_a_card_gives_no_metadata(tmp_path):
    """An unreachable dataset on the Hub, a glob, and a dataset in memory have no card."""
    assert cards.source_metadata("someone/dataset", None) == {}
    assert cards.source_metadata(str(tmp_path / "*.flac"), None) == {}
    assert cards.source_metadata(datasets.Dataset.from_dict({"a": [1]}), None) == {}


def test_the_card_of_a_dataset_on_the_hub_is_read(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text(SOURCE_CARD)
    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "hf_hub_download",
        lambda *names, **options: asked.append((names, options)) or tmp_path / "README.md",
    )
    assert cards.source_metadata("org/clips", "v1") == {"license": "cc-by-4.0", "language": ["en"]}
    assert asked == [(("org/clips", "README.md"), {"repo_type": "dataset", "revision": "v1"})]


def test_licence_and_language_come_from_the_source_the_options_and_the_previous_card(tmp_path, tiny_model, capsys):

    tiny_model.save_pretrained(tmp_path / "model")
    write_clips(tmp_path / "clips", count=2, seconds=0.05)
    (tmp_path / "clips" / "README.md").write_text(SOURCE_CARD)
    command = ["tokenize", str(tmp_path / "clips"), "-m", str(tmp_path / "model"), "-o", str(tmp_path / "out")]

    def metadata(*options):
        assert main([*command, *options]) == 0
        text = (tmp_path / "out" / "README.md").read_text()
        data = DatasetCard(text).data.to_dict()
        assert ("**To do:**" in text) == ("license" not in data or "language" not in data)
        return data.get("license"), data.get("language")

    assert metadata() == ("cc-by-4.0", ["en"])
    assert metadata("--license", "cc0-1.0", "--language", "de", "no") == ("cc0-1.0", ["de", "no"])
    (tmp_path / "clips" / "README.md").unlink()
    assert metadata() == ("cc0-1.0", ["de", "no"])  # unchanged
    (tmp_path / "out" / "README.md").unlink()
    assert metadata("--language", "de") == (None, ["de"])
    assert main([*command, "--license", "all rights\nreserved"]) == 2
    assert "expected a name that the Hub knows" in capsys.readouterr().err


def test_invalid_card_options_are_refused():
    assert TokenizeOptions(language=["en"]).card_metadata() == {"language": ["en"]}
    with pytest.raises(ValueError, match="Got language='e n'"):
        TokenizeOptions(language=("de", "e n"))
