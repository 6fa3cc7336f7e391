#!/bin/sh
# Runs the kernel tests against a library built with AddressSanitizer and UndefinedBehaviorSanitizer.
# Usage: csrc/sanitize.sh [pytest arguments]; PYTHON names the interpreter (with slablm's dependencies), CXX the compiler.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cmake -S "$root" -B "$work/build" -DSLABLM_SANITIZE=ON >"$work/log" || { cat "$work/log"; exit 1; }
cmake --build "$work/build" --parallel 2 >"$work/log" || { cat "$work/log"; exit 1; }

# A copy of the package with this library in it, so that nothing else can be the one that is tested.
mkdir "$work/package"
cp -r "$root/src/slablm" "$work/package/slablm"
rm -f "$work/package/slablm/runtime/kernels/_kernels."*
cmake --install "$work/build" --prefix "$work/package" >/dev/null

# Leaks are not looked for: Python and torch keep memory until the end on purpose.
cd "$root"
PYTHONPATH="$work/package" \
LD_PRELOAD="$("${CXX:-c++}" -print-file-name=libasan.so) $("${CXX:-c++}" -print-file-name=libubsan.so)" \
ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
  "${PYTHON:-python3}" -m pytest tests/runtime/kernels "$@"
