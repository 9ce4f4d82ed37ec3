"""
The structure of the package: which modules may import which, and that the core works with its own dependencies alone.
"""

import ast
import graphlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import wavtokenizer_hf


ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "wavtokenizer_hf"
CORE = (
    "auto_classes",
    "configuration_wavtokenizer",
    "feature_extraction_wavtokenizer",
    "modeling_wavtokenizer",
    "modeling_wavtokenizer_batching",
    "modeling_wavtokenizer_cpu",
    "modeling_wavtokenizer_encoder",
    "modeling_wavtokenizer_padding",
    "modeling_wavtokenizer_pickling",
    "modeling_wavtokenizer_precision",
    "modeling_wavtokenizer_typing",
    "modeling_wavtokenizer_windows",
)
ENCODER_SIBLINGS = (".modeling_wavtokenizer_cpu", ".modeling_wavtokenizer_padding")
CORE_DEPENDENCIES = {"torch", "transformers", "safetensors", "huggingface_hub", "numpy", "yaml", "tqdm"}
ALLOWED_TOGETHER = {  # "" is the package: the core
    "plots": {""},
    "cli": {"commands", ""},
    "commands": {
        "conversion",
        "audio",
        "audio_errors",
        "find_files",
        "pipes",
        "token_file",
        "long_audio",
        "plots",
        "training",
        "evaluation",
        "bulk",
        "demo",
        "export",
        "llm",
        "loading",
        "",
    },
    # The modules that read audio: headers, decoders and kinds of errors. Only `audio` is for other modules.
    "audio": {"audio_decoders", "audio_errors", ""},
    "audio_decoders": {"audio_containers", "audio_errors"},
    "pipes": {"audio", "audio_containers", "audio_errors"},  # the same samples from a stream as from a file
    "__main__": {"cli"},
    "demo": {"audio", "evaluation", "loading", "plots", "token_file", ""},
    "bulk": {"audio", "audio_errors", "find_files", "loading", ""},
    "training": {"audio", "find_files", "loading", "log_mel", ""},  # audio is the only module that reads audio files
    # long_audio scales clips to the peak level of a model
    "evaluation": {"audio", "find_files", "log_mel", "long_audio", "plots", ""},
    "conversion": {"loading", "training", ""},  # checks of weights, and the names of the discriminators
    "model_names": {
        "conversion",
        "export",
        "",
    },  # published names are converted on first use; ONNX folders are refused
    "export": {"bulk", "llm", ""},  # token folders, and the training sequences of language models
    "llm": {"long_audio", ""},  # audio while a language model generates
}
MODULES = sorted({path for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()})
# rglob does not enter `conversion` and `model_cards`, which are symbolic links in a checkout
FILES = sorted({*PACKAGE.rglob("*.py"), *PACKAGE.glob("*/*.py")})


# What every module may use: extras, worker processes, writing and reading of files, finding them and models, and kinds
# of failures of audio
SHARED = {
    "atomic_files",
    "audio_errors",
    "extras",
    "hub_errors",
    "lazy_names",
    "find_files",
    "limited_files",
    "model_names",
    "progress",
    "worker_processes",
}


def imports(path: Path, everywhere: bool = True) -> set[str]:
    """Return the modules that a file imports: `.name` for one of the package, `.` for the package itself.

    Only imports at the top level count, unless `everywhere`. Imports within a module that is a folder count as its own
    name.
    """
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if everywhere else iter(tree.body)
    folders = path.relative_to(PACKAGE).parts[:-1]  # folders between the package and the file
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                found.add(node.module.split(".")[0])
                continue
            above = list(folders[: len(folders) - node.level + 1])  # where the dots lead
            module = above + (node.module.split(".") if node.module else [])
            if module:
                found.add("." + module[0])
            else:
                modules = {p.stem for p in PACKAGE.iterdir()}
                found |= {"." + (alias.name if alias.name in modules else "") for alias in node.names}
    return found


@pytest.mark.parametrize("name", CORE)
def test_the_core_imports_only_allowed_siblings_and_core_dependencies(name):
    siblings = {"." + name for name in CORE}
    allowed = {
        "modeling_wavtokenizer": siblings - {".feature_extraction_wavtokenizer"},
        "modeling_wavtokenizer_batching": {f".modeling_wavtokenizer_{n}" for n in ("encoder", "padding", "precision")},
        "modeling_wavtokenizer_encoder": {".configuration_wavtokenizer", *ENCODER_SIBLINGS},
        "modeling_wavtokenizer_windows": {".configuration_wavtokenizer", ".modeling_wavtokenizer_padding"},
        "auto_classes": {
            ".configuration_wavtokenizer",
            ".feature_extraction_wavtokenizer",
            ".modeling_wavtokenizer",
        },
    }.get(name, set())
    outside = imports(PACKAGE / f"{name}.py") - allowed - set(sys.stdlib_module_names)
    assert outside <= CORE_DEPENDENCIES, f"the core imports {outside - CORE_DEPENDENCIES}"


@pytest.mark.parametrize("name", [name for name in CORE if name != "auto_classes"])
def test_messages_of_remote_code_name_nothing_outside_the_remote_code(name):
    """A Hub repository holds these files alone: no module, command or page of this package."""
    tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert not [text for text in texts if re.search(r"wavtokenizer_hf\.|`wavtokenizer |docs/|pip install", text)]


def test_modeling_imports_every_sibling():
    """transformers copies only the direct imports of the loaded file to a remote-code folder."""
    siblings = {f".{name}" for name in CORE if name.startswith(("configuration", "modeling_wavtokenizer_"))}
    assert siblings <= imports(PACKAGE / "modeling_wavtokenizer.py", everywhere=False)


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_modules_import_the_core_and_no_other_module(module):
    if module.stem in (*CORE, "__init__"):
        return
    files = [module] if module.is_file() else [path for path in FILES if module in path.parents]
    assert files
    imported = {name[1:] for path in files for name in imports(path) if name.startswith(".")}
    assert imported - set(CORE) - SHARED - {module.stem} <= ALLOWED_TOGETHER.get(module.stem, {""})


def test_the_import_check_sees_imports_of_a_folder():
    assert {".audio", ".training"} <= imports(PACKAGE / "training" / "data.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_extras_are_imported_where_they_are_used(path):
    third_party = imports(path, everywhere=False) - set(sys.stdlib_module_names)
    assert {name for name in third_party if not name.startswith(".")} <= CORE_DEPENDENCIES


def imported_files(path: Path) -> set[str]:
    """Files of the package that a file imports anywhere, as module names. Imports for type checkers do not count."""
    package = list(path.relative_to(PACKAGE).parts[:-1])
    found = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.ImportFrom) and node.level:
            above = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                file = PACKAGE.joinpath(*above, f"{alias.name}.py")
                found.add(".".join([*above, alias.name] if file.is_file() else above))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def test_no_files_import_each_other_in_a_circle():
    """Imports within functions count: they start a program sooner, and hide no circle."""
    names = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in FILES}
    files = {name: path for name, path in names.items() if path.stem != "__init__"}
    graph = {name: imported_files(path) & files.keys() for name, path in files.items()}
    assert "conversion.from_original" in graph["model_names"]
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
    assert order.index("modeling_wavtokenizer") < order.index("loading") < order.index("bulk.work")


def test_every_module_imports_without_the_extras_and_names_the_missing_one(tmp_path):
    code = """
import sys
for name in ("soundfile", "soxr", "matplotlib", "datasets", "torchaudio", "torchcodec", "accelerate", "tensorboard",
             "scipy", "sklearn", "librosa", "pesq", "pystoi", "auraloss", "pyarrow", "ray", "onnx", "onnxruntime",
             "lhotse", "gradio"):
    sys.modules[name] = None
import pkgutil, importlib, wavtokenizer_hf
for module in pkgutil.walk_packages(wavtokenizer_hf.__path__, "wavtokenizer_hf."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from wavtokenizer_hf import audio, plots
for function in (lambda: audio.load("x.wav"), lambda: plots.plot_reconstruction("x.png", [0], [0], [0])):
    try:
        function()
    except ImportError as error:
        assert "pip install 'wavtokenizer_hf[audio]'" in str(error), error
    else:
        raise AssertionError("no error")
from wavtokenizer_hf.training import Settings
from wavtokenizer_hf.training.log import Log
from wavtokenizer_hf.training.state import build
for function in (lambda: build(Settings()), lambda: Log("x", 24000, 0)):
    try:
        function()
    except ImportError as error:
        assert "pip install 'wavtokenizer_hf[training]'" in str(error), error
    else:
        raise AssertionError("no error")
from wavtokenizer_hf.bulk import tokenize
from wavtokenizer_hf.extras import require
for function, extra in ((lambda: tokenize("x", "m", "o"), "bulk"), (lambda: require("ray.data", "ray"), "ray")):
    try:
        function()
    except ImportError as error:
        assert f"pip install 'wavtokenizer_hf[{extra}]'" in str(error), error
    else:
        raise AssertionError("no error")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_contributing_lists_the_core_files():
    text = (PACKAGE.parent / ".github" / "CONTRIBUTING.md").read_text()
    [listed] = re.findall(r"modeling_wavtokenizer_\{(.*?)\}\.py", text)
    assert listed.split(", ") == sorted(path.stem[22:] for path in PACKAGE.glob("modeling_wavtokenizer_*.py"))


def test_the_model_is_read_in_two_files_without_cpu_machinery():
    names = ("modeling_wavtokenizer.py", "modeling_wavtokenizer_encoder.py")
    texts = [(PACKAGE / name).read_text() for name in names]
    assert sum(text.count("\n") for text in texts) <= 1050
    assert not re.search(r"onednn|mkldnn|packed|packing|near.tie", "".join(texts), flags=re.IGNORECASE)


# ---------------------------------------------------------------------------------------------------------------------
# Packaging. tests/check_wheel.py checks a built wheel (`make package`).
# ---------------------------------------------------------------------------------------------------------------------


def test_every_package_is_installed_below_wavtokenizer_hf():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {path.parent for path in FILES}
    assert set(setuptools["packages"]) == {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    for name in ("conversion", "model_cards"):
        assert setuptools["package-dir"][f"wavtokenizer_hf.{name}"] == name
        assert (PACKAGE / name).resolve() == ROOT / name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_packages_at_the_top_of_the_repository_are_imported_by_their_installed_names(path):
    assert not imports(path) & {"conversion", "model_cards"}  # otherwise a module would exist twice


def test_every_imported_package_is_a_declared_dependency():
    """Packages of extras are imported by name too, as in `require("pyarrow", "bulk")`."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    declared = {re.match(r"[\w.-]+", line)[0].lower() for line in lines}
    imported = set()
    for path in FILES:
        imported |= {name for name in imports(path) if not name.startswith(".")}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
                "require",
                "library",
                "import_optional",
            ):
                imported |= {a.value.split(".")[0] for a in node.args[:1] if isinstance(a, ast.Constant)}
    imported -= {*sys.stdlib_module_names, "wavtokenizer_hf"}
    assert {"yaml", "tqdm", "pyarrow"} <= imported
    assert {{"yaml": "pyyaml"}.get(name, name) for name in imported} <= declared


@pytest.fixture
def release(tmp_path):
    """Return a copy of the files that .github/prepare_release.py reads and changes, and a function that runs it."""
    (tmp_path / ".github").mkdir()
    (tmp_path / "wavtokenizer_hf").mkdir()
    for name in (
        "pyproject.toml",
        "README.md",
        "CHANGELOG.md",
        "wavtokenizer_hf/__init__.py",
        ".github/prepare_release.py",
    ):
        shutil.copy(ROOT / name, tmp_path / name)

    def prepare(tag: str) -> subprocess.CompletedProcess:
        command = [sys.executable, ".github/prepare_release.py", tag, "https://example.org/owner/name"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    return tmp_path, prepare


def test_a_release_refuses_a_tag_that_is_not_the_version_or_has_no_changelog(release):
    folder, prepare = release
    version = wavtokenizer_hf.__version__
    assert f"Got the tag v9.9, expected v{version}" in prepare("v9.9").stderr
    (folder / "CHANGELOG.md").write_text("## Unreleased\n")
    refused = prepare(f"v{version}")
    assert refused.returncode == 1 and f'no section "## {version}"' in refused.stderr
    assert (folder / "README.md").read_text() == (ROOT / "README.md").read_text()


def test_a_release_has_the_addresses_of_the_repository(release):
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    folder, prepare = release
    version = wavtokenizer_hf.__version__
    (folder / "CHANGELOG.md").write_text(f"## {version}\n")
    assert prepare(f"v{version}").returncode == 0
    urls = tomllib.loads((folder / "pyproject.toml").read_text())["project"]["urls"]
    assert urls["Issues"] == "https://example.org/owner/name/issues"
    assert urls["Changelog"] == f"https://example.org/owner/name/blob/v{version}/CHANGELOG.md"
    readme = (folder / "README.md").read_text()
    assert f"](https://example.org/owner/name/blob/v{version}/docs/models.md)" in readme
    assert f"](https://example.org/owner/name/raw/v{version}/examples/speech.png)" in readme
    assert all(target.startswith(("https://", "#")) for target in re.findall(r"\]\(([^)\s]+)\)", readme))
