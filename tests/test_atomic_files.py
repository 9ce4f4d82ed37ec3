"""Output files are complete or absent, overwrite only what they should, and leave no temporary files."""

import errno
import multiprocessing
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import soundfile

from wavtokenizer_hf import atomic_files, audio
from wavtokenizer_hf.atomic_files import atomic_folder, atomic_write, refuse_inputs, remove_leftovers, write_bytes
from wavtokenizer_hf.cli import main


pytestmark = pytest.mark.usefixtures("one_thread")

TONE = (0.3 * np.sin(np.arange(64800) * 0.05) + 0.05 * np.random.default_rng(0).standard_normal(64800)).astype("f4")


@pytest.fixture
def model_folder(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def audio_path(tmp_path):
    path = tmp_path / "sound.wav"
    soundfile.write(path, TONE[:1003], 24000, subtype="FLOAT")
    return path


@contextmanager
def disk_with(num_bytes: int):
    """Limit the size of files, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# ---------------------------------------------------------------------------------------------------------------------
# Targets
# ---------------------------------------------------------------------------------------------------------------------


def test_a_symbolic_link_is_followed_and_stays_a_link(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "target")
    for content in (b"new", b"again"):
        write_bytes(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "folder" / "target").read_bytes() == content


def test_a_named_pipe_is_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write_bytes(tmp_path / "pipe", b"content")
    reader.join(timeout=10)
    assert got == [b"content"] and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.parametrize("command", ["encode", "reconstruct"])
def test_a_device_is_written_to_and_stays_a_device(command, model_folder, audio_path, tmp_path):
    (tmp_path / "null").symlink_to("/dev/null")
    assert main([command, str(audio_path), "-m", model_folder, "-o", str(tmp_path / "null")]) == 0
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode) and (tmp_path / "null").is_symlink()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a device that is always full")
@pytest.mark.parametrize("command", ["encode", "reconstruct"])
def test_a_full_device_raises_an_error(command, model_folder, audio_path, capsys):
    assert main([command, str(audio_path), "-m", model_folder, "-o", "/dev/full"]) == 2
    assert "Cannot write /dev/full: No space left on device" in capsys.readouterr().err


def test_dev_stdout_appends_the_output_to_existing_content(tmp_path):
    # run by path, since importing the package takes seconds
    script = f"import runpy; runpy.run_path({atomic_files.__file__!r})['write_bytes']('/dev/stdout', b'new')"
    (tmp_path / "file").write_bytes(b"before ")
    with (tmp_path / "file").open("ab") as file:
        subprocess.run([sys.executable, "-c", script], stdout=file, check=True)
    assert (tmp_path / "file").read_bytes() == b"before new"


def test_a_folder_is_refused(model_folder, audio_path, tmp_path, capsys):
    (tmp_path / "out" / "sound.wav").mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match="is a folder"):
        write_bytes(tmp_path / "out", b"")
    assert main(["reconstruct", str(audio_path), "-m", model_folder, "-o", f"{tmp_path}/out/"]) == 2
    assert "is a folder, expected a file" in capsys.readouterr().err


def test_permissions_come_from_the_replaced_file_or_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "new", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    (tmp_path / "new").chmod(0o604)
    write_bytes(tmp_path / "new", b"")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o604


def test_a_file_with_the_longest_allowed_name_can_be_written(model_folder, audio_path, tmp_path):
    name = "é" * 122 + ".flac"  # 249 bytes
    assert main(["reconstruct", str(audio_path), "-m", model_folder, "-o", str(tmp_path / name)]) == 0
    assert soundfile.info(tmp_path / name).frames == 1003


# ---------------------------------------------------------------------------------------------------------------------
# Temporary names
# ---------------------------------------------------------------------------------------------------------------------


def test_two_writers_of_one_file_do_not_mix_and_keep_a_users_partial_file(tmp_path):
    (tmp_path / "out.partial").write_bytes(b"of the user")
    with atomic_write(tmp_path / "out") as first, atomic_write(tmp_path / "out") as second:
        assert first != second
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert (tmp_path / "out").read_bytes() == b"first"  # its block ended last, so it wins
    assert sorted(os.listdir(tmp_path)) == ["out", "out.partial"]
    assert (tmp_path / "out.partial").read_bytes() == b"of the user"


def test_an_error_keeps_the_target_and_leaves_no_other_file(tmp_path):
    (tmp_path / "out").write_bytes(b"before")

    def interrupted(context):
        with context as partial:
            (partial / "file" if partial.is_dir() else partial).write_bytes(b"half")
            raise KeyboardInterrupt

    for context in (atomic_write(tmp_path / "out"), atomic_folder(tmp_path / "deep" / "folder")):
        with pytest.raises(KeyboardInterrupt):
            interrupted(context)
    assert os.listdir(tmp_path) == ["out"] and (tmp_path / "out").read_bytes() == b"before"


def test_a_signal_during_file_creation_leaves_no_file(tmp_path, monkeypatch):
    """The SIGTERM handler raises SystemExit right after the call that creates the file."""

    def interrupted(*arguments, **options):
        os_open(*arguments, **options)
        raise SystemExit(143)

    os_open = os.open
    monkeypatch.setattr(os, "open", interrupted)
    with pytest.raises(SystemExit), atomic_files.atomic_write(tmp_path / "x.wav"):
        pass
    assert os.listdir(tmp_path) == []


def test_sigterm_removes_the_temporary_file(model_folder, tmp_path):
    reader, writer = os.pipe()  # stays open, so that the command waits for more tokens

    def command():
        sys.stdin = os.fdopen(reader)
        sys.exit(main(["decode", "-", "-m", model_folder, "-o", str(tmp_path / "x.wav")]))

    process = multiprocessing.get_context("fork").Process(target=command)
    process.start()
    os.write(writer, b"1\n" * 3000)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".*.partial")):
        assert time.monotonic() < deadline and process.is_alive()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    process.join(timeout=120)
    assert process.exitcode == 143
    assert os.listdir(tmp_path) == []
    os.close(reader), os.close(writer)


def test_only_leftovers_of_dead_processes_are_removed(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    host = atomic_files._host()
    names = {
        "dead": f".{host}-{process.pid}-0123abcd.partial",
        "dead folder": f".{host}-{process.pid}-0123abce.partial",
        "young": f".{host}-{process.pid}-0123abcf.partial",
        "alive": f".{host}-{os.getpid()}-0123abcd.partial",
        "another machine": f".another{host}x-{process.pid}-0123abcd.partial",
        "user": "notes.partial",
    }
    for what, name in names.items():
        (tmp_path / name).mkdir() if "folder" in what else (tmp_path / name).touch()
        if what != "young":
            os.utime(tmp_path / name, (1, 1))
    remove_leftovers(tmp_path)
    assert set(os.listdir(tmp_path)) == {names[what] for what in ("young", "alive", "another machine", "user")}


# ---------------------------------------------------------------------------------------------------------------------
# Flushing to disk
# ---------------------------------------------------------------------------------------------------------------------


def _fsync_that_answers(number: int, of_folders: bool):
    fsync = os.fsync

    def answer(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == of_folders:
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    return answer


@pytest.mark.parametrize("of_folders", [True, False])
def test_files_can_be_written_without_fsync_support(of_folders, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", _fsync_that_answers(errno.EINVAL, of_folders))
    write_bytes(tmp_path / "out", b"content")
    with atomic_folder(tmp_path / "folder") as partial:
        (partial / "file").touch()
    assert sorted(os.listdir(tmp_path)) == ["folder", "out"]


def test_data_lost_by_the_disk_raises_an_error(tmp_path, monkeypatch):
    (tmp_path / "out").write_bytes(b"before")
    monkeypatch.setattr(os, "fsync", _fsync_that_answers(errno.EIO, of_folders=False))
    with pytest.raises(OSError, match="Input/output error"):
        write_bytes(tmp_path / "out", b"content")
    assert (tmp_path / "out").read_bytes() == b"before" and os.listdir(tmp_path) == ["out"]


# ---------------------------------------------------------------------------------------------------------------------
# A full disk
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("format", ["wav", "flac", "ogg", "mp3", "aiff", "w64", "caf", "au"])
def test_audio_that_does_not_fit_on_the_disk_leaves_no_file(format, share, tmp_path):
    path = audio.save(tmp_path / f"whole.{format}", TONE)
    assert soundfile.info(path).frames == len(TONE)
    with disk_with(int(share * (path.stat().st_size - 1))), pytest.raises(OSError, match=r"Cannot write \S*cut\."):
        audio.save(tmp_path / f"cut.{format}", TONE)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("format", ["flac", "ogg", "mp3"])
def test_an_incomplete_audio_file_is_never_published(format, tmp_path, monkeypatch):
    monkeypatch.setattr(audio._CheckedOutput, "check", lambda self: None)  # as if libsndfile had noticed no error
    with disk_with(10_000), pytest.raises(OSError, match=r"can(not)? be read back|not all samples"):
        audio.save(tmp_path / f"cut.{format}", TONE)
    assert os.listdir(tmp_path) == []


def test_millions_of_samples_of_ogg_are_written_at_once(tmp_path):
    # in one call, they overflow the stack of libsndfile 1.2.2
    audio.save(tmp_path / "long.ogg", np.zeros(3_500_000, np.float32))
    assert soundfile.info(tmp_path / "long.ogg").frames == 3_500_000


@pytest.mark.parametrize("format", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("command", ["reconstruct", "decode"])
def test_a_command_on_a_full_disk_fails_and_leaves_no_file(
    command, format, model_folder, audio_path, tmp_path, capsys
):
    source = audio_path
    if command == "decode":
        source = tmp_path / "tokens.json"
        assert main(["encode", str(audio_path), "-m", model_folder, "-o", str(source)]) == 0
    before = sorted(os.listdir(tmp_path))
    with disk_with(600):
        assert main([command, str(source), "-m", model_folder, "-o", str(tmp_path / f"x.{format}")]) == 2
    assert f"Cannot write {tmp_path / f'x.{format}'}: File too large" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == before


def test_a_plot_that_does_not_fit_removes_its_audio_file_too(model_folder, audio_path, tmp_path, capsys):
    with disk_with(10_000):  # the audio file has 2 kB
        assert main(["reconstruct", str(audio_path), "-m", model_folder, "-o", str(tmp_path / "x.wav"), "--plot"]) == 2
    assert f"Cannot write the picture {tmp_path / 'x.png'}" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["sound.wav"]
    assert main(["reconstruct", str(audio_path), "-m", model_folder, "-o", str(tmp_path / "x.wav"), "--plot"]) == 0
    assert sorted(os.listdir(tmp_path)) == ["sound.wav", "x.png", "x.wav"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")
@pytest.mark.parametrize("format", ["wav", "flac", "ogg", "mp3"])
def test_a_full_16_kb_file_system_holds_no_partial_audio(format, model_folder, tmp_path):
    soundfile.write(tmp_path / "long.wav", np.tile(TONE, 4), 24000)
    (tmp_path / "disk").mkdir()
    script = (
        f"mount -t tmpfs -o size=16k none {tmp_path}/disk || exit 77; {sys.executable} -m wavtokenizer_hf reconstruct "
        f"{tmp_path}/long.wav -m {model_folder} -o {tmp_path}/disk/x.{format}; code=$?; ls -A {tmp_path}/disk; exit "
        "$code"
    )
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True)
    if done.returncode in (1, 77) and "wavtokenizer" not in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr}")
    assert done.returncode == 2 and "No space left on device" in done.stderr and done.stdout == ""


# ---------------------------------------------------------------------------------------------------------------------
# Outputs that are inputs
# ---------------------------------------------------------------------------------------------------------------------


def _same(path, link, kind):
    with suppress(FileNotFoundError):
        link.unlink()
    {"link": link.symlink_to, "hard link": link.hardlink_to}[kind](path)
    return link


@pytest.mark.parametrize("kind", ["itself", "link", "hard link"])
@pytest.mark.parametrize("command", ["encode", "decode", "reconstruct"])
def test_no_command_overwrites_its_input(command, kind, model_folder, audio_path, tmp_path, capsys):
    source = audio_path
    if command == "decode":
        source = tmp_path / "tokens.safetensors"
        assert main(["encode", str(audio_path), "-m", model_folder, "-o", str(source)]) == 0
    before = source.read_bytes()
    ending = ".safetensors" if command == "encode" else ".wav"
    target = source if kind == "itself" else _same(source, tmp_path / f"other{ending}", kind)
    assert main([command, str(source), "-m", model_folder, "-o", str(target)]) == 2
    # encode and decode first refuse the input's extension as an output format
    expected = "would overwrite the input" if target.suffix == ending else "or a folder"
    assert expected in capsys.readouterr().err
    assert source.read_bytes() == before


def test_no_output_in_a_folder_overwrites_another_input(model_folder, audio_path, tmp_path, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    os.link(audio_path, folder / "a.flac")  # its output, a.wav, is the other input
    audio.save(folder / "a.wav", TONE[:500])
    before = (folder / "a.wav").read_bytes()
    files = [str(folder / "a.flac"), str(folder / "a.wav")]
    assert main(["reconstruct", files[0], "-m", model_folder, "-o", files[1]]) == 0  # not an input here
    (folder / "a.wav").write_bytes(before)
    assert main(["reconstruct", str(folder), "-m", model_folder, "-o", str(folder), "--audio-format", "flac"]) == 2
    (folder / "b.png").write_bytes(before)  # an audio file by its content
    assert main(["reconstruct", f"{folder}/b.png", "-m", model_folder, "-o", f"{folder}/b.wav", "--plot"]) == 2
    assert "would overwrite the input" in capsys.readouterr().err
    assert (folder / "a.wav").read_bytes() == (folder / "b.png").read_bytes() == before


def test_files_without_an_inode_number_are_compared_by_path(tmp_path, monkeypatch):
    # some network mounts report inode number 0 for every file
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.touch()
    real = os.stat
    monkeypatch.setattr(
        atomic_files.os, "stat", lambda path, **options: os.stat_result([real(path).st_mode, 0, 1, *[0] * 7])
    )
    refuse_inputs(paths[:1], paths[1:])
    with pytest.raises(ValueError, match="would overwrite"):
        refuse_inputs(paths, paths[1:])


@pytest.mark.parametrize("command", ["encode", "decode", "reconstruct"])
def test_an_empty_output_argument_is_refused(command, model_folder, audio_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([command, str(audio_path), "-m", model_folder, "-o", ""]) == 2
    assert os.listdir(tmp_path) == ["sound.wav"]
