"""Threads and processes: first use by many at once, a system that gives no threads, and a fork."""

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tests
from slablm.packing import PackedSpec
from slablm.runtime.kernels import native, reference, to_native
from tests.runtime.kernels.weights import random_packed

LIBRARY = native.load()
ROOT = Path(tests.__file__).parents[1]

pytestmark = pytest.mark.skipif(isinstance(LIBRARY, str), reason="no compiled kernels")


def run(program, *arguments, timeout=60):
    """What a fresh process prints."""
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_what_one_thread_reads_survives_the_first_call_of_another():
    """Both find that the weight has no struct yet; the one that is stored last must not free the other's."""
    weight = to_native(random_packed(PackedSpec(20, 130, 50, 1, True, torch.float16), 0))
    inputs = torch.randn(1, 130, generator=torch.Generator().manual_seed(0))
    expected = reference.linear(inputs, weight)

    def interrupted(*arguments):
        native._structs.clear()
        garbage = [ctypes.create_string_buffer(b"\xff" * ctypes.sizeof(native._Weight)) for _ in range(1000)]
        status = LIBRARY.functions.slablm_matvec(*arguments)
        del garbage
        return status

    library = native.Library(SimpleNamespace(slablm_matvec=interrupted), LIBRARY.path, LIBRARY.supported, ())
    outputs = native.matvec(library, "portable", weight, inputs)
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)


FIRST_USE = """
import sys, threading
import torch
from slablm.runtime import kernels
from slablm.runtime.kernels import reference, to_native
from slablm.packing import PackedSpec
from tests.runtime.kernels.weights import random_packed

torch.set_num_threads(2)
sys.setswitchinterval(1e-6)
weights = [to_native(random_packed(PackedSpec(400, 640, 200, 1, True, torch.float16), seed), 8) for seed in range(5)]
inputs = torch.randn(1, 640, generator=torch.Generator().manual_seed(0))
expected = [reference.linear(inputs, weight) for weight in weights]
start, wrong = threading.Barrier(16), []

def work():
    start.wait()
    for weight, truth in zip(weights, expected):
        for _ in range(3):
            error = (kernels.linear(inputs, weight) - truth).norm() / truth.norm()
            if not error < 1e-3:
                wrong.append(error)

threads = [threading.Thread(target=work) for _ in range(16)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(wrong))
"""


def test_many_threads_at_first_use():
    assert run(FIRST_USE) == "0"


# Only ctypes: without torch there is no OpenMP runtime, and the library starts threads itself.
NO_THREADS = """
import ctypes, resource, sys, threading

library = ctypes.CDLL(sys.argv[1])
m, n = 512, 1024
weight, inputs, outputs = (ctypes.c_uint16 * (m * n))(), (ctypes.c_float * n)(), (ctypes.c_float * m)()
for i in range(m * n):
    weight[i] = 0x3F80  # 1 in bfloat16
for j in range(n):
    inputs[j] = j % 3
i64, pointer = ctypes.c_int64, ctypes.byref

def product(threads):
    ctypes.memset(outputs, 0, ctypes.sizeof(outputs))
    status = library.slablm_dense_matvec(
        0, pointer(weight), 2, None, i64(m), i64(n), pointer(inputs), 0, i64(1), pointer(outputs), 0, threads)
    return status, set(outputs) == {float(sum(inputs))}

used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
stacks = 8 << 20
threading.stack_size(stacks)
resource.setrlimit(resource.RLIMIT_STACK, (stacks, resource.RLIM_INFINITY))
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]) * stacks + (2 << 20), resource.RLIM_INFINITY))
try:
    thread = threading.Thread(target=print, args=("thread",))
    thread.start()
    thread.join()
except RuntimeError:
    print("no thread")
print(*product(4))
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(*product(4))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc of Linux")
@pytest.mark.parametrize(("stacks", "says"), [(0, "no thread"), (1, "thread")])
def test_a_system_with_few_threads_to_give_is_served_by_those(stacks, says):
    """Memory for the stacks of none or one of the three threads that a call wants beside its own."""
    assert run(NO_THREADS, str(LIBRARY.path), str(stacks)).splitlines() == [says, "0 True", "0 True"]


FORKED = """
import os, sys, warnings
import torch
from slablm.runtime import kernels
from slablm.runtime.kernels import to_native
from slablm.packing import PackedSpec
from tests.runtime.kernels.weights import random_packed

warnings.simplefilter("ignore")  # newer Pythons warn of a fork beside threads: that is the test
torch.set_num_threads(2)
weight = to_native(random_packed(PackedSpec(600, 1024, 300, 1, True, torch.float16), 0))
inputs = torch.randn(1, 1024, generator=torch.Generator().manual_seed(0))
expected = kernels.linear(inputs, weight)  # starts the threads
child = os.fork()
if child == 0:
    same = all(torch.equal(kernels.linear(inputs, weight), expected) for _ in range(20))
    os._exit(0 if same else 1)
_, status = os.waitpid(child, 0)
same = torch.equal(kernels.linear(inputs, weight), expected)
print(os.waitstatus_to_exitcode(status), same)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_has_threads_of_its_own():
    """The parent's are gone, and an OpenMP runtime would wait for them forever."""
    assert run(FORKED, timeout=20) == "0 True"


def test_threads_of_one_process_do_not_share_scratch_memory():
    weight = to_native(random_packed(PackedSpec(40, 200, 90, 1, True, torch.float16), 0))
    inputs = [torch.full((1, 200), float(i)) for i in range(8)]
    expected = [native.matvec(LIBRARY, "portable", weight, x) for x in inputs]
    same = [True] * 8

    def work(i):
        for _ in range(50):
            same[i] &= torch.equal(native.matvec(LIBRARY, "portable", weight, inputs[i]), expected[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same)
