#!/bin/sh
# Runs the kernel tests against a library built with AddressSanitizer and UndefinedBehaviorSanitizer.
# Usage: csrc/sanitize.sh [pytest arguments]; PYTHON names the interpreter (with slablm's dependencies), CXX the compiler.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(cd "$(mktemp -d)" && pwd -P)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
case $python in */*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ;; esac

cmake -S "$root" -B "$work/build" -DSLABLM_SANITIZE=ON >"$work/log" || { cat "$work/log"; exit 1; }
cmake --build "$work/build" --parallel 2 >"$work/log" || { cat "$work/log"; exit 1; }

# A copy of the package with this library in it, so that nothing else can be the one that is tested.
mkdir "$work/package"
cp -r "$root/src/slablm" "$work/package/slablm"
find "$work/package" -name '_kernels.*' -delete
cp "$work"/build/_kernels.* "$(dirname "$(find "$work/package" -path '*/kernels/native.py')")"
# An editable install finds its own files before PYTHONPATH is looked at; Python imports this module first of all.
cat >"$work/package/sitecustomize.py" <<'END'
import sys

sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__name__.startswith("ScikitBuild")]
END

# Leaks are not looked for: Python and torch keep memory until the end on purpose.
export PYTHONPATH="$work/package" SLABLM_SANITIZED="$work/package"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
preload="$("${CXX:-c++}" -print-file-name=libasan.so) $("${CXX:-c++}" -print-file-name=libubsan.so)"
cd "$root"
LD_PRELOAD=$preload "$python" - <<'END'
import ctypes
import os
from pathlib import Path

import slablm

package = Path(os.environ["SLABLM_SANITIZED"])
assert package in Path(slablm.__file__).parents, f"{slablm.__file__} would be tested, not {package}"
[library] = package.rglob("_kernels.*")
ctypes.CDLL(str(library)).__asan_init  # it is instrumented
END

# What runs the library; the GPU's kernels are Triton's. A process under AddressSanitizer has no limit of memory.
LD_PRELOAD=$preload "$python" -m pytest $(find tests -type d -name kernels) tests/compression/test_cpu_sweep.py --ignore-glob='*gpu*' \
  -k 'not gpu and not few_threads and not compile and not opcheck' "$@"
