"""README and docs: the Python code runs, the commands work, the links resolve, and the sentences are short."""

import ast
import importlib.util
import inspect
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import soundfile
import torch
from conftest import REFERENCE, ROOT, tiny_config
from hub_server import put_into_cache
from language_models import byte_level, tiny_llama
from small_checkpoints import small_tensors
from tiny_training import write_clips
from transformers import AutoModel

from wavtokenizer_hf import WavTokenizerFeatureExtractor, WavTokenizerModel, audio
from wavtokenizer_hf.cli import _parser, main
from wavtokenizer_hf.training.settings import read_arguments


DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted(DOCS.rglob("*.md"))]
# other text files
LINKING = [ROOT / ".github" / "CONTRIBUTING.md", ROOT / "tests" / "fixtures" / "README.md"]
LINKING += [*sorted(ROOT.glob("examples/*/*.md")), *sorted(ROOT.glob("wavtokenizer_hf/*/README.md"))]
LINKING += sorted(ROOT.glob("model_cards/*.md"))
MAX_WORDS = 35
# These settings make a recipe run in seconds. All its other settings apply.
TINY_RUN = {
    "steps": 1, "mel_only_steps": 1, "continuous_steps": 0, "batch_size": 1, "segment_seconds": 0.1, "num_workers": 0,
    "kmeans_latents": 20, "kmeans_iterations": 1, "num_validation_clips": 1,
}  # fmt: skip
NOT_RUN = {
    "--engine ray": "needs a Ray cluster",
    "--shard $SLURM": "needs Slurm",
    "llm-with-audio --sequences": "needs a corpus with text",
    "FOLDER": "is a placeholder",
    "--tokens tokens": "needs a token folder with the ids of the files",
    "--preset paper": "needs the weights of UTMOS",
}


def page_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(path: Path) -> list[str]:
    """Return the `wavtokenizer …` commands of a page, also those in pipes, without comments and redirections."""
    found = []
    for line in "\n".join(blocks(path, "sh")).splitlines():
        for command in re.sub(r"\s+#(?!SBATCH).*", "", line).split("|"):
            command = re.sub(
                r"^accelerate launch --num_processes \d+ -m wavtokenizer_hf", "wavtokenizer", command.strip()
            )
            if command.startswith("wavtokenizer ") and "--help" not in command:
                found.append(re.sub(r"\s*>\s*\S+$", "", command))
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """
    Return a folder with the files that the pages name: audio, a language model, and a Hub cache with a small
    checkpoint and a native folder.
    """
    folder = tmp_path_factory.mktemp("docs")
    shutil.copy(ROOT / "examples" / "speech.flac", folder)
    for clips in ("corpus", "clips", "other_clips", "other_codec"):
        write_clips(folder / clips, count=2, seconds=0.6)
    tokenizer = byte_level()
    tokenizer.save_pretrained(folder / "some-llm")
    tiny_llama(len(tokenizer)).save_pretrained(folder / "some-llm")
    torch.save({"state_dict": small_tensors(75)}, folder / "WavTokenizer_small_320_24k_4096.ckpt")
    torch.save({"state_dict": small_tensors(40)}, folder / "wavtokenizer_large_unify_600_24k.ckpt")
    cache = folder / "hub_cache"
    put_into_cache(cache, "novateur/WavTokenizer", {p.name: p for p in folder.glob("WavTokenizer_small*.ckpt")})
    torch.manual_seed(0)
    native = folder / "native"
    WavTokenizerModel(tiny_config()).save_pretrained(native)
    WavTokenizerFeatureExtractor(hop_length=16).save_pretrained(native)
    files = {path.name: path for path in native.iterdir() if path.suffix != ".py"}
    put_into_cache(cache, "swiss-ai/wavtokenizer-large-unify-40token", files)
    return folder


@pytest.fixture(scope="module")
def token_folder(base):
    """Return a token folder: the pages on export and evaluation use the output of the page on bulk tokenization."""
    assert main(["tokenize", str(base / "corpus"), "--model", "bundled", "--output", str(base / "made_tokens")]) == 0
    return base / "made_tokens"


@pytest.fixture(scope="module")
def llm_with_audio(base):
    """Return a language model whose vocabulary includes the codes of the bundled model."""
    from wavtokenizer_hf import bundled_model
    from wavtokenizer_hf.llm import AudioVocabulary

    codec = AutoModel.from_pretrained(bundled_model())
    tokenizer = byte_level()
    AudioVocabulary.add_to(tokenizer, codec.config.codebook_size, codec.codebook_fingerprint)
    tokenizer.save_pretrained(base / "made_llm")
    return base / "made_llm"


@pytest.fixture
def workplace(base, tmp_path, monkeypatch, one_thread):
    """Return a new working folder with links to the content of `base`."""
    for path in base.iterdir():
        if path.name not in ("made_tokens", "made_llm"):
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(base / "hub_cache"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(base / "hub_cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def prepare(workplace, request):
    """Return a function that creates the files which a page takes from earlier pages."""

    def make(page: str) -> None:
        if page in ("docs/export.md", "docs/evaluation.md"):
            shutil.copytree(request.getfixturevalue("token_folder"), "tokens")
        if page == "docs/export.md":
            Path("llm-with-audio").symlink_to(request.getfixturevalue("llm_with_audio"))
        if page == "docs/evaluation.md":
            for folder in ("run/best", "wavtokenizer-small-75"):
                AutoModel.from_pretrained(Path("native")).save_pretrained(folder)

    return make


# ---------------------------------------------------------------------------------------------------------------------
# Python
# ---------------------------------------------------------------------------------------------------------------------

BEFORE = {  # commands that the page's Python code needs
    "docs/export.md": ["export tokens/ --format jsonl --output lines/"],
    "docs/onnx.md": ["export-model bundled --output onnx-model"],
}
# the export compares the files with the model on 30 s of audio; the evaluation draws its report
SLOW = {"docs/onnx.md", "docs/evaluation.md"}
WITH_PYTHON = [
    pytest.param(path, id=page_name(path), marks=[pytest.mark.slow] if page_name(path) in SLOW else [])
    for path in PAGES
    if blocks(path, "python")
]


@pytest.mark.parametrize("path", WITH_PYTHON)
def test_python_blocks_of_a_page_run(path, prepare):
    """The blocks run from top to bottom, in one namespace."""
    if "transformers.models.wavtokenizer" in path.read_text():
        pytest.importorskip("transformers.models.wavtokenizer", reason="transformers < 5.24 has no WavTokenizer")
    prepare(page_name(path))
    for command in BEFORE.get(page_name(path), []):
        assert main(shlex.split(command)) == 0
    names = {"__name__": "page"}
    for block in blocks(path, "python"):
        exec(compile(block, page_name(path), "exec"), names)
    if path.name == "README.md":
        assert soundfile.info("decoded.wav").frames == soundfile.info("speech.flac").frames
        assert len(names["audio_codes"].unique()) > 10
    if path.name == "language-models.md":
        assert names["malformed"] == [] and len(names["audio_of_spans"]) == 1
        labels = names["batch"]["labels"][0]
        assert (
            sum(label != -100 for label in labels) == names["audio_codes"].numel() + 3
        )  # boundary tokens, end of text


def test_python_blocks_are_found():
    assert {page_name(param.values[0]) for param in WITH_PYTHON} >= {"README.md", "docs/models.md", "docs/bulk.md"}


@pytest.mark.parametrize("path", [ROOT / "README.md", DOCS / "models.md"], ids=page_name)
def test_every_line_that_loads_a_model_works(path, workplace):
    lines = re.findall(
        r"^\|[^|]*\| `((?:WavTokenizerModel\.from_|load_original)[^`]*)` \|", path.read_text(), re.MULTILINE
    )
    assert len(lines) == 3
    names = {}
    exec("from wavtokenizer_hf import *\nfrom wavtokenizer_hf.conversion import load_original", names)
    assert all(isinstance(eval(line, names), WavTokenizerModel) for line in lines)


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------

WITH_COMMANDS = [path for path in PAGES if commands(path)]


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=page_name)
def test_commands_of_a_page_parse(path):
    for command in commands(path):
        arguments = _parser().parse_args(shlex.split(command)[1:])
        if arguments.command == "train" and arguments.recipe != "my_recipe.yaml":
            assert read_arguments(arguments).train_data


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, id=page_name(p), marks=[] if p.name == "README.md" else [pytest.mark.slow])
        for p in WITH_COMMANDS
    ],
)
def test_commands_of_a_page_work(path, prepare, monkeypatch):
    """The commands run in order, on tiny clips and models. A training takes one step."""
    if page_name(path) != "docs/bulk.md":
        prepare(page_name(path))
    Path("my_recipe.yaml").write_text("learning_rate: 1.0e-4\n")
    lines = "\n".join(blocks(path, "sh"))
    for command in commands(path):
        piped = f"| {command}" in lines or f"{command} >" in lines or " - " in f"{command} "
        if piped or any(reason in command for reason in NOT_RUN) or "published_" in command:
            continue
        arguments = shlex.split(command)[1:]
        if arguments[0] == "train":
            arguments += [f"--{name.replace('_', '-')}={value}" for name, value in TINY_RUN.items()]
        elif arguments[0] == "evaluate":
            arguments += ["--num-workers=0", "--metrics", "stoi", "mel_distance"]
        if "--with-discriminators" in arguments:
            arguments[1] = str(with_discriminators())
        assert main(arguments) == 0, command
    if path.name in ("README.md", "getting-started.md"):
        assert soundfile.info("decoded.wav").frames == soundfile.info("speech.flac").frames
    if path.name == "README.md":
        assert (
            Path("again.png").exists()
            and Path("tokens/manifest.json").exists()
            and Path("report/report.json").exists()
        )
    if path.name == "training.md":
        for folder in ("run/best", "run/last", "tuned/best", "tuned-decoder/best"):
            assert isinstance(AutoModel.from_pretrained(folder), WavTokenizerModel)
        assert Path("wavtokenizer-small-75/discriminators.safetensors").exists() and any(Path("run/log").iterdir())


@pytest.mark.slow
def test_pipes_work(workplace):
    """The first commands of the page on long audio, run in a shell."""
    command = f'wavtokenizer() {{ {sys.executable} -m wavtokenizer_hf "$@"; }}; set -euo pipefail; '
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(["bash", "-c", command + blocks(DOCS / "long-audio.md", "sh")[0]], check=True, env=environment)
    frames = soundfile.info("speech.flac").duration * 24000 / 320
    assert len(Path("codes.txt").read_text().split()) == math.ceil(frames)
    assert len(audio.load("decoded.wav", sampling_rate=24000)) == math.ceil(frames) * 320


def with_discriminators() -> Path:
    """Return the small checkpoint, with discriminators of zeros."""
    manifest = json.loads((REFERENCE / "manifest_discriminators.json").read_text())
    discriminators = {name: torch.zeros(()).expand(shape) for name, shape in manifest.items()}
    path = Path("WavTokenizer_small_320_24k_4096.ckpt")
    path.unlink()
    torch.save({"state_dict": {**small_tensors(75), **discriminators}}, path)
    return path


def test_readme_names_every_command():
    (subparsers,) = (
        action for action in _parser()._actions if hasattr(action, "choices") and action.dest == "command"
    )
    named = set(re.findall(r"`([\w-]+)`", (ROOT / "README.md").read_text()))
    assert set(subparsers.choices) <= named


@pytest.fixture(scope="module")
def hooks():
    """Return the hooks of the documentation site."""
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_of_the_site_stay_on_the_site(hooks):
    """The benchmarks are a page of the site. Links to other files of the repository use the repository's address."""

    def converted(text: str, folder: str = "", repository: str | None = None) -> str:
        return hooks.LINK.sub(lambda match: hooks._link(match, folder, repository), text)

    assert converted("[a](../bulk.md#x)", "api") == "[a](../bulk.md#x)"
    assert converted("[a](../benchmarks/README.md)") == "[a](benchmarks.md)"
    assert converted("[a](../../benchmarks/README.md#x)", "api") == "[a](../benchmarks.md#x)"
    assert converted("![a](../examples/speech.png)") == "![a](images/examples/speech.png)"
    assert converted("[a](../LICENSE)") == "a"
    assert converted("[a](../LICENSE)", "", "https://host/name") == "[a](https://host/name/blob/main/LICENSE)"


def test_the_command_line_reference_has_every_option(hooks):
    for marker, text in hooks.MARKERS.items():
        assert sum(marker in path.read_text() for path in PAGES) == 1 and text()
    reference = hooks.command_line_reference()
    (subparsers,) = (
        action for action in _parser()._actions if hasattr(action, "choices") and action.dest == "command"
    )
    for name, command in subparsers.choices.items():
        section = reference.split(f"### wavtokenizer {name}\n")[1].split("\n### ")[0]
        for option in (string for action in command._actions for string in action.option_strings):
            option = option.replace("_", "-")  # train also takes underscores, which its help does not show
            assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", section), (name, option)


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def without_code(text: str) -> str:
    return re.sub(r"^( *)```.*?^\1```", "", text, flags=re.DOTALL | re.MULTILINE)


def sentences(text: str) -> list[str]:
    """
    Return the sentences of paragraphs, list items, headings and table cells. Inline code and links count as their
    text.
    """
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)  # the metadata of a model card
    text = re.sub(r"<!--.*?-->|^:::.*?(?=^\S|\Z)", "", without_code(text), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]*`", "code", text)
    blocks, paragraph = [], []
    for line in [*text.splitlines(), ""]:
        begins_block = re.match(r"\s*([-*] |\d+\. |#+ |\||>|$)", line)
        if begins_block:
            blocks.append(" ".join(paragraph))
            paragraph = []
        if line.lstrip().startswith("|"):
            blocks += line.strip().strip("|").split("|")
        else:
            paragraph.append(line.strip())
    return [sentence for block in blocks for sentence in re.split(r"(?<=[.!?])\s+", block.strip()) if sentence]


def test_sentences_are_split_correctly():
    text = (
        '---\na: b\n---\n# Head\n\nOne two\nthree. Four `a b c d`, [five](x.md "t").\n\n'
        "- six\n- seven\n\n| a b | c. D |\n\n```sh\nx y z\n```\n"
    )
    assert sentences(text) == ["# Head", "One two three.", "Four code, five.", "- six", "- seven", "a b", "c.", "D"]


@pytest.mark.parametrize("path", [*PAGES, *LINKING], ids=page_name)
def test_sentences_are_short(path):
    found = sentences(path.read_text(encoding="utf-8"))
    assert found
    for sentence in found:
        assert len(re.findall(r"\w[\w'’.,/-]*", sentence)) <= MAX_WORDS, sentence


def test_most_sentences_have_fewer_than_25_words():
    counts = [
        len(re.findall(r"\w[\w'’.,/-]*", s)) for path in PAGES for s in sentences(path.read_text(encoding="utf-8"))
    ]
    assert sum(count < 25 for count in counts) > 0.95 * len(counts)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def anchors(path: Path) -> set[str]:
    """Return the anchors of the headings, as GitHub and the site create them."""
    headings = re.findall(r"^#+ (.*)$", without_code(path.read_text(encoding="utf-8")), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "") for heading in headings)
    found = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in plain}
    if path.name == "command-line.md":  # the hook generates its command headings
        (subparsers,) = (a for a in _parser()._actions if hasattr(a, "choices") and a.dest == "command")
        found |= {f"wavtokenizer-{name}" for name in subparsers.choices}
    return found


@pytest.mark.parametrize("path", [*PAGES, *LINKING], ids=page_name)
def test_links_resolve(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text(encoding="utf-8"))):
        if target.startswith(("http:", "https:")):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), target
        assert ROOT in (file, *file.parents), target
        assert not anchor or anchor in anchors(file), target


def test_messages_in_troubleshooting_exist_in_the_code():
    texts = [
        node.value
        for folder in ("wavtokenizer_hf", "conversion")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    page = (DOCS / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| (?:`` ?(.+?) ?``|`(.+?)`)", page.split("\n## Slow")[0], re.MULTILINE)
    assert len(messages) > 30
    for message in (double or single for double, single in messages):
        assert any(message in text for text in texts), message


def test_the_documented_metrics_are_the_implemented_ones():
    from wavtokenizer_hf.evaluation import METRICS
    from wavtokenizer_hf.evaluation.metrics import DISTRIBUTIONS

    table = (DOCS / "evaluation.md").read_text().split("\n## Metrics")[1].split("\n## ")[0].lower()
    for metric in METRICS.values():
        assert metric.title.lower() in table
        assert not metric.packages or DISTRIBUTIONS.get(metric.packages[0], metric.packages[0]) in table


def test_the_file_tree_in_the_design_document_is_true():
    tree = (DOCS / "design.md").read_text().split("## The tree")[1].split("```")[1]
    named = set(re.findall(r"^  (\w+\.py(?:, \w+\.py)*)", tree, re.MULTILINE))
    named = {name for names in named for name in names.split(", ")}
    assert named == {path.name for path in (ROOT / "wavtokenizer_hf").glob("*.py")} - {"__init__.py"}
    for folder in re.findall(r"^(\w+)/", tree, re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder
    folders = re.findall(r"^  (\w+/(?:, \w+/)*)", tree, re.MULTILINE)
    folders = {name.strip("/ ") for names in folders for name in names.split(",")}
    assert folders == {path.parent.name for path in (ROOT / "wavtokenizer_hf").glob("*/__init__.py")} | {"bundled"}


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1].split("\n\n")[0]
    named = set(re.findall(r"- (?:[\w, ]+: )?([\w/-]+\.md)$", navigation, re.MULTILINE))
    assert named == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} | {"benchmarks.md"}


def test_public_docstrings_are_complete():
    """`help()` explains arguments, results and errors, and does not refer to other pages for them."""
    from wavtokenizer_hf import WavTokenizerEncoderModel, upgrade
    from wavtokenizer_hf.bulk import detokenize_dataset, tokenize, tokenize_dataset
    from wavtokenizer_hf.conversion import load_original
    from wavtokenizer_hf.evaluation import evaluate
    from wavtokenizer_hf.export import export_onnx
    from wavtokenizer_hf.export.run import export_tokens
    from wavtokenizer_hf.llm import AudioVocabulary, decode_spans, stream_audio
    from wavtokenizer_hf.long_audio import DecodeStream, EncodeStream

    functions = [
        WavTokenizerModel.encode, WavTokenizerModel.decode, WavTokenizerModel.forward, load_original,
        WavTokenizerEncoderModel.encode, WavTokenizerEncoderModel.forward, WavTokenizerFeatureExtractor.__call__,
        upgrade, EncodeStream.push, DecodeStream.push, audio.load, audio.read_blocks, audio.save, audio.load_clip,
        tokenize, tokenize_dataset, detokenize_dataset, evaluate, export_onnx, export_tokens, stream_audio,
        decode_spans, AudioVocabulary.add_to, AudioVocabulary.codes_to_ids, AudioVocabulary.ids_to_codes,
        AudioVocabulary.find_spans,
    ]  # fmt: skip
    for function in functions:
        text = inspect.getdoc(function)
        assert "Args:" in text and "Raises:" in text and ("Returns:" in text or "Yields:" in text), function
        assert not re.search(r":\n? *(as (in|for|of)|see) ", text), function
        parameters = set(inspect.signature(function).parameters) - {"self", "cls", "return_dict", "kwargs"}
        arguments = text.split("Args:")[1].split("Raises:")[0]
        assert not (missing := {name for name in parameters if not re.search(rf"\b{name}\b", arguments)}), (
            function,
            missing,
        )
