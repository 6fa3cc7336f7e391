"""CUDA C++ becomes machine code that is kept; loading and launching need a GPU, see the kernels' tests."""

import sys
import threading
from pathlib import Path

import pytest
import torch

from slablm.errors import SlabError
from slablm.system import cuda

TEXT = 'extern "C" __global__ void twice(float* numbers) { numbers[threadIdx.x] *= 2; }'
ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100")

needs_nvrtc = pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home of its own, and no variable that points elsewhere."""
    monkeypatch.delenv(cuda.CACHE_VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def fresh_search():
    cuda._nvrtc.cache_clear()
    yield
    cuda._nvrtc.cache_clear()


@needs_nvrtc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_text_becomes_machine_code(architecture):
    code = cuda.compiled(TEXT, architecture)
    assert code[:4] == b"\x7fELF"  # machine code, no PTX that the driver would compile again in every process
    assert b".text.twice" in code
    assert code == cuda.compiled(TEXT, architecture)


@needs_nvrtc
def test_each_architecture_has_its_own_code():
    assert len({cuda.compiled(TEXT, architecture) for architecture in ARCHITECTURES}) == len(ARCHITECTURES)


@needs_nvrtc
def test_an_error_says_what_the_compiler_says():
    with pytest.raises(SlabError, match=r"for sm_90: slablm\.cu\(2\): error: .*\n?.*undeclared"):
        cuda.compiled('extern "C" __global__ void twice(float* numbers) {\n    undeclared = 2;\n}', "sm_90")
    assert cuda.compiled(TEXT, "sm_90")  # the library is as good as before


@needs_nvrtc
def test_an_architecture_that_the_compiler_does_not_know():
    with pytest.raises(SlabError, match="NVRTC does not accept a kernel for sm_1"):
        cuda.compiled(TEXT, "sm_1")


def test_without_nvrtc_the_error_says_what_to_install(monkeypatch):
    reason = "NVRTC, which compiles the kernels, is not there (pip install nvidia-cuda-nvrtc)"
    monkeypatch.setattr(cuda, "_nvrtc", lambda: reason)
    assert cuda.missing() == reason
    with pytest.raises(SlabError, match="pip install nvidia-cuda-nvrtc"):
        cuda.compiled(TEXT, "sm_90")


def test_nvrtc_that_is_nowhere(monkeypatch, tmp_path, fresh_search):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(tmp_path / "missing")])
    assert "pip install nvidia-cuda-nvrtc" in str(cuda.missing())


def test_a_library_that_cannot_be_loaded_is_passed_over(monkeypatch, tmp_path, fresh_search):
    """As one for another processor."""
    folder = tmp_path / "nvidia" / "cu99" / "lib"
    folder.mkdir(parents=True)
    (folder / "libnvrtc.so.99").write_bytes(b"no library")
    (folder / "libnvrtc-builtins.so.99").write_bytes(b"none either")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    before = sys.path[1:]
    found = cuda.missing()
    monkeypatch.setattr(sys, "path", before)
    cuda._nvrtc.cache_clear()
    assert found == cuda.missing()


def test_where_machine_code_is_kept(home, monkeypatch):
    assert cuda._cache() == home / ".cache" / "slablm"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cuda._cache() == Path("/elsewhere/slablm")
    monkeypatch.setenv(cuda.CACHE_VARIABLE, "/here")
    assert cuda._cache() == Path("/here")
    for variable in (cuda.CACHE_VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, "")  # as if it was not set
    assert cuda._cache() == home / ".cache" / "slablm"


def test_machine_code_is_kept_as_a_whole(tmp_path):
    """Another process sees all of it or nothing, and no file is left behind."""
    path, codes = tmp_path / "deep" / "folder" / "code.cubin", [bytes([k]) * (1 << 20) for k in range(2)]
    cuda._keep(codes[0], path)
    done, seen = threading.Event(), set()

    def watch():
        while not done.is_set():
            seen.add(path.read_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for k in range(20):
        cuda._keep(codes[k % 2], path)
    done.set()
    watcher.join()
    assert seen <= set(codes)
    assert path.read_bytes() == codes[1]
    assert [entry.name for entry in path.parent.iterdir()] == ["code.cubin"]


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    cuda._keep(b"code", tmp_path / "file" / "code.cubin")
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_disk_that_is_full_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    cuda._keep(b"code", tmp_path / "code.cubin")
    assert list(tmp_path.iterdir()) == []


def test_the_key_is_of_all_that_the_code_depends_on(monkeypatch):
    def changed(**attributes):
        with monkeypatch.context() as patch:
            for name, value in attributes.items():
                patch.setattr(torch.version if name == "cuda" else cuda, name, value)
            return cuda._key(TEXT, 9, 0)

    key = cuda._key(TEXT, 9, 0)
    assert key == cuda._key(TEXT, 9, 0)
    others = [cuda._key(TEXT + " ", 9, 0), cuda._key(TEXT, 8, 0), cuda._key(TEXT, 9, 1), cuda._key(TEXT, 90, 0)]
    others += [changed(_OPTIONS=(*cuda._OPTIONS, "--use_fast_math")), changed(cuda="99.9")]
    assert len({key, *others}) == 1 + len(others)
    assert key.isalnum()  # a file's name
