#!/usr/bin/env bash
# Makes the virtual environment of this repository: NeMo, Megatron-core and PyTorch for the CPU, exact versions from constraints/.
# Usage: scripts/make_venv.sh [DIRECTORY]        default .venv; does nothing when it is up to date
# PYTHON=/path/to/python3.11 chooses the interpreter. No GPU package is installed.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${1:-.venv}
torch_version=2.13.0

say() { printf '%s\n' "$*" >&2; }
fail() { say "make_venv: $*"; exit 1; }

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

find_python() {
    local candidate version seen=""
    local candidates=(python3.11 python3.12 python3 python)
    if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi # an explicit choice is not replaced by another
    for candidate in "${candidates[@]}"; do
        version=$(version_of "$candidate") || continue
        case $version in
            3.11 | 3.12) printf '%s %s\n' "$candidate" "$version"; return ;;
        esac
        seen="$seen $candidate=$version"
    done
    fail "found no suitable Python (seen:${seen:- none}). Versions 3.11 and 3.12 have pinned packages;" \
        "install one of them, or name it: make venv PYTHON=/path/to/python3.11"
}

python_and_version=$(find_python)
read -r python version <<<"$python_and_version"
constraints=constraints/constraints-py${version/./}.txt

# Everything that decides what is installed; contents, since a fresh clone has no meaningful file times.
state=$(cat setup.py pyproject.toml nemo_ee/package_info.py "$constraints" scripts/make_venv.sh | cksum)
state="$state $version $PWD"
stamp=$venv/nemo_ee-installed
if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$state" ]; then
    exit 0
fi

say "Making $venv with $python ($version): about 2 GB on disk, a few minutes."
rm -rf "$venv"
"$python" -m venv "$venv" || fail "'$python -m venv' failed; on Debian and Ubuntu: apt install python$version-venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input)

# A plain torch brings several GB of CUDA on Linux where the package index has no CPU build, so ask for one by name first.
# TORCH_INDEX_URL names an index that has CPU builds (PyTorch publishes one); without it the plain build is the last resort.
say "[1/3] torch $torch_version for the CPU"
"${pip[@]}" install -qq "torch==$torch_version+cpu" ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} 2>/dev/null ||
    "${pip[@]}" install -q "torch==$torch_version" ||
    fail "torch $torch_version for Python $version was not found in the configured package index; set TORCH_INDEX_URL to" \
        "one that has it"

say "[2/3] NeMo, Megatron-core and the rest, exact versions from $constraints"
"${pip[@]}" install -qq -e '.[cpu,dev]' -c "$constraints"

# Megatron-core's datasets need a compiled module; its wheels have it, a build from source leaves it out without a compiler.
say "[3/3] checks"
"$venv/bin/python" - <<'PY' || fail "Megatron-core lacks its compiled dataset helpers. Install a C++ compiler (g++ or clang++) and run again."
from megatron.core.datasets import helpers_cpp  # noqa: F401
PY
printf '%s\n' "$state" >"$stamp"
say "Ready: $venv/bin/python"
