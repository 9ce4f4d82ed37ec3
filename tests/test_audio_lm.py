"""
The programs of examples/audio_lm at small size: from sentences to audio, and fine-tuning an existing language model.
"""

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentences
import soundfile
import torch
from conftest import load_script, tiny_config
from language_models import byte_level, tiny_llama
from token_folders import FINGERPRINT, write_token_folder
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TrainingArguments

from wavtokenizer_hf import WavTokenizerFeatureExtractor, WavTokenizerModel
from wavtokenizer_hf.llm import AudioVocabulary


EXAMPLE = Path(__file__).parent.parent / "examples" / "audio_lm"
needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")


def test_sentences_are_different_and_the_same_for_a_seed():
    every = sentences.sentences(500, 0)
    assert len(set(every)) == 500 and every == sentences.sentences(500, 0) != sentences.sentences(500, 1)
    assert all(re.fullmatch(r"[a-z]+( [a-z]+)+", one) for one in every)


def test_the_grammar_gives_enough_sentences_for_a_held_out_set():
    """By hand: 12 adjectives, 20 nouns, 10 verbs, 2 articles, 20 nouns, 8 openings or none, 6 endings or none."""
    assert 12 * 20 * 10 * 2 * 20 * 9 * 7 > 100 * 4220
    heard = " ".join(sentences.sentences(4000, 0)).split()
    one = sentences.sentence(random.Random(123))
    assert set(one.split()) <= set(heard)


def test_the_commands_of_the_page_parse(monkeypatch):
    """The commands are only parsed: running them takes GPUs and the Hub."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    import fine_tune

    page = (EXAMPLE / "FINE_TUNING.md").read_text()
    commands = re.findall(r"accelerate launch .*?fine_tune.py ((?:.*\\\n)*.*)", page)
    assert len(commands) == 2
    for command in commands:
        arguments = command.replace("\\\n", " ").replace("--bf16", "").split()
        parsed, settings = HfArgumentParser((fine_tune.Arguments, TrainingArguments)).parse_args_into_dataclasses(
            arguments
        )
        assert parsed.tokens == "tokens/" and parsed.layout in fine_tune.LAYOUTS
        assert settings.output_dir == "tuned" and settings.max_steps > 0


@pytest.fixture(scope="module")
def codec(tmp_path_factory) -> Path:
    """Return a tiny WavTokenizer at 75 codes per second with diverse codes."""
    folder = tmp_path_factory.mktemp("codec")
    torch.manual_seed(0)
    model = WavTokenizerModel(tiny_config(upsampling_ratios=[8, 5, 4, 2])).eval()
    with torch.no_grad():
        latents = model.encode(0.1 * torch.randn(1, 1, 64 * 320), output_latents=True).latents[0].T
        model.quantizer.codebook.embed.copy_(latents)
    model.save_pretrained(folder)
    WavTokenizerFeatureExtractor(hop_length=320).save_pretrained(folder)
    return folder


def write_manifest(folder: Path, codebook_size: int = 4, codebook_fingerprint: str = "a" * 16) -> None:
    settings = {"codebook_size": codebook_size, "codebook_fingerprint": codebook_fingerprint}
    (folder / "manifest.json").write_text(json.dumps({"settings": settings}))


def test_a_declared_id_range_takes_the_codebook_of_the_tokens(tmp_path, monkeypatch):
    import fine_tune

    def tokenizer_with_codes():
        tokenizer = byte_level()
        tokenizer.add_tokens([AddedToken(f"<|audio_{code}|>", normalized=False) for code in range(4)])
        return tokenizer

    tokenizer = tokenizer_with_codes()
    monkeypatch.setitem(fine_tune.LAYOUTS, "known", AudioVocabulary(len(tokenizer) - 4, 4))
    arguments = fine_tune.Arguments(language_model="llm", tokens=str(tmp_path), layout="known")
    write_manifest(tmp_path)
    vocabulary = fine_tune.add_audio(arguments, tokenizer, tiny_llama(len(tokenizer)))
    assert vocabulary == AudioVocabulary.from_tokenizer(tokenizer)
    assert vocabulary.codebook_fingerprint == "a" * 16
    write_manifest(tmp_path, codebook_size=3)
    with pytest.raises(ValueError, match=r"codebook of 3, and the layout known has 4"):
        fine_tune.add_audio(arguments, tokenizer_with_codes(), tiny_llama(len(tokenizer)))


def test_flash_attention_is_refused_for_batches_of_packed_rows(tmp_path):
    import fine_tune

    def settings(rows, more=1):
        return TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            per_device_train_batch_size=rows,
            per_device_eval_batch_size=more,
        )

    model = tiny_llama(10)
    fine_tune.check_attention(model, settings(2, 8))
    model.config._attn_implementation = "flash_attention_2"
    fine_tune.check_attention(model, settings(1))
    for rows, more in ((2, 1), (1, 8)):
        with pytest.raises(ValueError, match=r"flash_attention_2 .*per_device_train_batch_size"):
            fine_tune.check_attention(model, settings(rows, more))


def test_a_tokenizer_without_end_of_text_is_refused():
    import fine_tune

    tokenizer = byte_level()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        fine_tune.make_template("speak", tokenizer, fine_tune.Arguments(language_model="llm", tokens="tokens"))


def test_a_token_folder_is_trained_on_as_a_stream(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    stream = load_script(EXAMPLE / "stream.py")
    rows = write_token_folder(tmp_path / "tokens", 60, lengths=(5, 20))
    tokenizer = byte_level()
    model = tiny_llama(len(tokenizer))
    vocabulary = AudioVocabulary.add_to(tokenizer, 64, FINGERPRINT, model=model)
    for each in (tokenizer, model):
        each.save_pretrained(tmp_path / "llm")
    settings = TrainingArguments(
        output_dir=str(tmp_path / "trained"), max_steps=8, per_device_train_batch_size=8, learning_rate=1e-2,
        logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = stream.main(stream.Arguments(str(tmp_path / "llm"), str(tmp_path / "tokens")), settings)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 8 and losses[-1] < losses[0] - 0.5
    examples = [example["input_ids"][2:-2] for example in trainer.train_dataset]  # BOS, begin, codes, end, EOS
    expected = [vocabulary.codes_to_ids(row["audio_codes"]).tolist() for row in rows]
    assert sorted(examples) == sorted(expected) != examples
    AudioVocabulary.from_tokenizer(AutoTokenizer.from_pretrained(tmp_path / "trained")).check_codebook_fingerprint(
        FINGERPRINT
    )


def test_audio_is_never_paired_with_texts_of_another_run(tmp_path, monkeypatch):
    make = load_script(EXAMPLE / "make.py")

    monkeypatch.setattr(make.subprocess, "run", lambda command, check: Path(command[-2]).write_text(command[-1]))
    size = make.Size(sentences=3, validation=1, spoken=1)
    texts = make.make_speech(tmp_path / "speech", size, seed=0)
    assert texts == make.make_speech(tmp_path / "speech", size, seed=0)  # resumes
    for others in ((make.Size(sentences=4, validation=1, spoken=1), 0), (size, 1)):
        with pytest.raises(SystemExit, match=r"other sentences.*another --output"):
            make.make_speech(tmp_path / "speech", *others)
    (tmp_path / "speech" / "texts.json").unlink()
    with pytest.raises(SystemExit, match=r"other sentences.*another --output"):
        make.make_speech(tmp_path / "speech", size, seed=0)
    assert all((tmp_path / "speech" / name).read_text() == text for name, text in texts.items())


def run(*command) -> str:
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def output(codec, tmp_path_factory) -> Path:
    """Return the output folder of one small run of the whole program."""
    folder = tmp_path_factory.mktemp("audio_lm") / "made"
    run(EXAMPLE / "make.py", "--output", folder, "--model", codec, "--quick")
    return folder


@pytest.mark.slow
@needs_espeak
def test_one_command_goes_from_sentences_to_audio(output, codec):
    result = json.loads((output / "result.json").read_text())
    assert result["validation_loss"] < result["unigram_entropy"] - 0.05
    assert 0 < result["unigram_entropy"] <= np.log(64) and result["validation_codes"] > 8 * 75
    samples, rate = soundfile.read(output / "said.wav")
    assert rate == 24000 and len(samples) / rate == pytest.approx(result["said_seconds"]) and samples.std() > 0
    assert len(list((output / "spoken").iterdir())) == 3 and (output / "said.png").exists()
    tokenizer = AutoTokenizer.from_pretrained(output / "language_model")
    vocabulary = AudioVocabulary.from_tokenizer(tokenizer)
    vocabulary.check_codec(WavTokenizerModel.from_pretrained(codec))
    model = AutoModelForCausalLM.from_pretrained(output / "language_model")
    vocabulary.check_model(model)
    assert model.config.use_cache


@pytest.mark.slow
@needs_espeak
def test_an_existing_language_model_is_fine_tuned_on_two_processes(output, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tokenizer = byte_level()
    tokenizer.save_pretrained(tmp_path / "llm")
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "llm")
    tokens = with_text(output / "tokens", tmp_path / "tokens")
    command = [
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, EXAMPLE / "fine_tune.py",
        "--language_model", tmp_path / "llm", "--tokens", tokens,
        "--task", "both", "--output_dir", tmp_path / "tuned", "--max_steps", 6, "--save_steps", 3,
        "--report_to", "none", "--row_size", 512, "--per_device_train_batch_size", 2, "--validation_share", 0.2,
        "--learning_rate", 1e-2, "--use_cpu", "--logging_steps", 1,
    ]  # fmt: skip
    run(*command)
    tuned = AutoTokenizer.from_pretrained(tmp_path / "tuned")
    vocabulary = AudioVocabulary.from_tokenizer(tuned)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    vocabulary.check_model(model)
    # it learned: the new rows were all equal at first
    assert (
        model.get_input_embeddings().weight[vocabulary.first_token_id : vocabulary.last_token_id].std(dim=0).min() > 0
    )
    history = json.loads((tmp_path / "tuned" / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    result = json.loads((tmp_path / "tuned" / "eval_results.json").read_text())
    assert result["eval_loss"] < history[0]["loss"] - 0.5
    assert result["num_processes"] == 2
    before = (tmp_path / "tuned" / "checkpoint-3").stat().st_mtime_ns
    run(*command)  # resumes at its end
    assert (tmp_path / "tuned" / "checkpoint-3").stat().st_mtime_ns == before


def with_text(tokens: Path, folder: Path) -> Path:
    """Write the tokens with a text column, like those of a dataset that has one."""
    import pyarrow.parquet as parquet
    from huggingface_hub import DatasetCard

    shutil.copytree(tokens, folder)
    card = DatasetCard.load(folder / "README.md")
    card.data.dataset_info["features"].append({"name": "text", "dtype": "string"})
    card.save(folder / "README.md")
    for path in (folder / "data").glob("*.parquet"):
        table = parquet.read_table(path)
        parquet.write_table(table.append_column("text", [[f"clip {id}" for id in table["id"].to_pylist()]]), path)
    return folder
