"""Check a wheel: its files, and that it works in an environment where nothing else of this repository is installed.

python tests/check_wheel.py WHEEL                    # also installs the dependencies, which needs the network
python tests/check_wheel.py WHEEL --borrow FOLDER    # takes all other packages from a site-packages folder
"""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
PACKAGED = {"conversion": "wavtokenizer_hf/conversion", "model_cards": "wavtokenizer_hf/model_cards"}
CLIP = ROOT / "examples" / "speech.flac"
IMPORTS = """
import importlib, importlib.util, pkgutil, sys
from pathlib import Path
import wavtokenizer_hf
from wavtokenizer_hf.conversion import load_original
from wavtokenizer_hf.conversion.card import published_card
from wavtokenizer_hf.conversion.published import table

for found in pkgutil.walk_packages(wavtokenizer_hf.__path__, "wavtokenizer_hf."):
    if not found.name.endswith("__main__"):
        module = importlib.import_module(found.name)
        assert Path(module.__file__).resolve().is_relative_to(Path(sys.prefix).resolve()), module.__file__
for name in ("conversion", "model_cards"):
    assert importlib.util.find_spec(name) is None, f"the wheel installs {name}"
assert all(map(published_card, table().values()))  # reads checkpoints.yaml and the template of the card
try:
    load_original("no-such-checkpoint")
except ValueError as error:
    assert "small-speech-75" in str(error), error
else:
    raise AssertionError("no error")
"""


def expected_files() -> set[str]:
    """Return the paths that belong in the wheel, without dist-info: all files of the package in this repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "wavtokenizer_hf", *PACKAGED]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    files = set()
    for path in map(Path, listed):
        is_published_card = path.parts[0] == "model_cards" and path.suffix == ".md" and path.name != "template.md"
        if (ROOT / path).is_file() and not is_published_card:
            files.add("/".join([PACKAGED.get(path.parts[0], path.parts[0]), *path.parts[1:]]))
    return files


def check_files(wheel: Path) -> None:
    """Raise SystemExit if the wheel lacks a file, or has one that does not belong to the package."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    installed = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    expected = expected_files()
    if missing := sorted(expected - installed):
        raise SystemExit(f"{wheel.name} lacks {missing}. List them in pyproject.toml.")
    if others := sorted(installed - expected):
        raise SystemExit(f"{wheel.name} has files that are not of the package: {others}.")
    for name in ("conversion/checkpoints.yaml", "model_cards/template.md", "bundled/model.safetensors", "py.typed"):
        assert f"wavtokenizer_hf/{name}" in installed, name


def check_use(wheel: Path, folder: Path, borrowed: Path | None) -> None:
    """Install the wheel into a new environment below `folder`, and use it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    binaries = folder / "venv" / ("Scripts" if sys.platform == "win32" else "bin")
    python = binaries / "python"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)

    def install(*arguments: str) -> None:
        subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "--quiet", *arguments], check=True)

    def run(*command: str | Path) -> None:
        print(
            "$", command[0].name, *("..." if argument == IMPORTS else argument for argument in command[1:]), flush=True
        )
        subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)

    if borrowed is None:
        install("--constraint", str(ROOT / "constraints.txt"), str(wheel))
    else:
        install("--no-deps", str(wheel))
        # A line of a .pth file adds only the folder. site.addsitedir would also activate an editable install in it.
        code = "import site; print(site.getsitepackages()[0])"
        own = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
        Path(own, "borrowed.pth").write_text(f"{borrowed.resolve()}\n", encoding="utf-8")
    run(python, "-c", IMPORTS)
    wavtokenizer = binaries / "wavtokenizer"
    for arguments in (["--help"], ["checkpoints"], ["convert", "--help"]):
        run(wavtokenizer, *arguments)
    if borrowed is None:
        install("--constraint", str(ROOT / "constraints.txt"), f"{wheel}[audio]")
    run(wavtokenizer, "encode", CLIP, "--model", "bundled", "--output", "speech.safetensors")
    run(wavtokenizer, "decode", "speech.safetensors", "--model", "bundled", "--output", "speech.wav")
    assert (folder / "speech.wav").stat().st_size > 100_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--borrow", type=Path, metavar="FOLDER", help="site-packages folder with all other packages")
    arguments = parser.parse_args()
    wheel = arguments.wheel.resolve()
    check_files(wheel)
    with tempfile.TemporaryDirectory() as folder:
        check_use(wheel, Path(folder), arguments.borrow)
    print(f"{wheel.name}: files and use are as they should be")


if __name__ == "__main__":
    main()
