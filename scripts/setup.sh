#!/usr/bin/env bash
# Set up a checkout on Debian or Ubuntu: FFCV's system packages where they are missing, a virtual environment in .venv,
# the versions of constraints.txt, the package itself (editable) with its development tools and extras. Where apt can be
# used, Slurm, shellcheck and Chromium as well, for the tests of slurm/ and of the service's page; without them those tests are
# skipped.
#
#   scripts/setup.sh          PYTHON=/path/to/python chooses the interpreter (3.11 or newer)
#
# A second run installs nothing: .venv/setup-stamp holds a hash of all that the environment was made from.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
stamp=$venv/setup-stamp
unfinished=$venv/setup-unfinished

die() {
    printf 'error: %s\n' "$1" >&2
    exit 1
}

# Print "<base interpreter> <version and prefix>" of the Python given, or fail when it does not run or is too old. The
# base interpreter is asked for because the Python may be that of a virtual environment, of this one even.
describe_python() {
    "$1" - 2>/dev/null <<'PYTHON'
import sys

if sys.version_info < (3, 11):
    sys.exit(1)
print(getattr(sys, "_base_executable", sys.executable), sys.base_prefix, *sys.version.split())
PYTHON
}

find_python() {
    local candidates candidate
    if [[ -n ${PYTHON:-} ]]; then
        describe_python "$PYTHON" || die "PYTHON=$PYTHON is not Python 3.11 or newer; give another one"
        return
    fi
    # The environment's own Python comes first, so that another shell's PATH does not build it anew.
    candidates=("$venv/bin/python" python3 python3.13 python3.12 python3.11)
    for candidate in "${candidates[@]}"; do
        describe_python "$candidate" && return
    done
    die "no Python 3.11 or newer found; install one (apt-get install python3 python3-venv python3-dev) or set PYTHON"
}

# Names of the apt packages without which FFCV's extension or the environment cannot be built.
missing_packages() {
    local base=$1 missing=() name
    command -v pkg-config >/dev/null || missing+=(pkg-config)
    command -v g++ >/dev/null || missing+=(g++)
    pkg-config --exists opencv4 2>/dev/null || missing+=(libopencv-dev)
    pkg-config --exists libturbojpeg 2>/dev/null || missing+=(libturbojpeg0-dev)
    # Only Debian's own interpreters leave these two to packages of their own.
    if [[ $(realpath "$base") == /usr/bin/* ]]; then
        name=$("$base" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
        "$base" -c 'import ensurepip, venv' 2>/dev/null || missing+=("$name-venv")
        "$base" -c 'import os, sysconfig; os.stat(os.path.join(sysconfig.get_path("include"), "Python.h"))' \
            2>/dev/null || missing+=("$name-dev")
    fi
    printf '%s' "${missing[*]}"
}

# Names of the apt packages that only tests of slurm/ and of the service's page need.
missing_test_packages() {
    local missing=()
    command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v srun >/dev/null || missing+=(slurm-wlm)
    command -v munged >/dev/null || missing+=(munge)
    command -v shellcheck >/dev/null || missing+=(shellcheck)
    command -v chromium >/dev/null || missing+=(chromium)
    printf '%s' "${missing[*]}"
}

# What tests alone need may be missing: a word about it, and set-up goes on.
install_test_packages() {
    local packages as_root=()
    packages=$(missing_test_packages)
    [[ -n $packages ]] || return 0
    local advice="tests of slurm/ and of pages will be skipped; they need: apt-get install -y --no-install-recommends $packages"
    if [[ $(id -u) != 0 ]]; then
        as_root=(sudo -n)
    fi
    if ! command -v apt-get >/dev/null || ! "${as_root[@]}" true 2>/dev/null; then
        echo "$advice"
        return 0
    fi
    echo "installing packages for tests: $packages"
    local apt=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300)
    "${apt[@]}" update || true
    # shellcheck disable=SC2086 # a list of names
    "${apt[@]}" install -y --no-install-recommends $packages >/dev/null || echo "$advice"
}

install_packages() {
    local packages as_root=()
    packages=$(missing_packages "$1")
    [[ -n $packages ]] || return 0
    local advice="system packages are missing; install them with: apt-get install -y --no-install-recommends $packages"
    command -v apt-get >/dev/null || die "$advice (no apt-get here: install what they hold, $packages, another way)"
    if [[ $(id -u) != 0 ]]; then
        sudo -n true 2>/dev/null || die "$advice (as root)"
        as_root=(sudo -n)
    fi
    echo "installing system packages: $packages"
    local apt=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300)
    # An update that partly fails (a stale third-party source) may still list what is needed: the install decides.
    "${apt[@]}" update || true
    # shellcheck disable=SC2086 # a list of names
    "${apt[@]}" install -y --no-install-recommends $packages >/dev/null ||
        die "apt-get could not install $packages; its own message is above"
    packages=$(missing_packages "$1")
    [[ -z $packages ]] || die "apt-get ended well, but these are still missing: $packages"
}

# The pins hold in pip's isolated build environments as well (PIP_BUILD_CONSTRAINT from pip 25.3 on, which takes no
# notice of the other there). The path is relative because pip splits these variables at spaces.
install_python_packages() {
    export PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1
    echo "installing Python packages into $venv (a few minutes and 6 GB the first time)"
    "$venv/bin/python" -m pip install --quiet --editable '.[dev,deepspeed,serve,milvus]' ||
        die "pip could not install the packages; its own message is above"
    "$venv/bin/python" -c 'import ffcv' ||
        die "FFCV was installed but cannot be imported; its own message is above"
}

main() {
    local python base identity key
    python=$(find_python)
    base=${python%% *}
    identity=${python#* }
    # The checkout's place counts too: scripts of a virtual environment and the editable install hold it.
    key=$({ cat pyproject.toml constraints.txt scripts/setup.sh && printf '%s\n%s\n' "$identity" "$PWD"; } | sha256sum)
    if [[ -f $stamp && -x $venv/bin/python && $(<"$stamp") == "$key" ]]; then
        return
    fi
    install_packages "$base"
    install_test_packages
    # pip takes a half-written package for an installed one, so what an interrupted run left behind is built anew, and so
    # is the environment of another interpreter or another place.
    if [[ -e $unfinished || $(describe_python "$venv/bin/python") != "$python" ]] ||
        ! grep -qsF "$PWD/$venv" "$venv/bin/activate" || ! "$venv/bin/python" -m pip --version &>/dev/null; then
        echo "creating $venv with $base"
        mkdir -p "$venv"
        find "$venv/" -mindepth 1 -delete # not venv --clear, which would take the mark away, nor a link to another disk
        touch "$unfinished"
        "$base" -m venv "$venv" || die "$base could not create $venv; its own message is above"
    fi
    touch "$unfinished"
    rm -f "$stamp"
    install_python_packages
    printf '%s\n' "$key" >"$stamp"
    rm -f "$unfinished"
    echo "set up: $("$venv/bin/python" --version), $PWD/$venv"
}

# One set-up at a time in a checkout; another waits for the first and then finds nothing to do.
exec 9<scripts/setup.sh
flock --wait 3600 9 || die "another set-up of this checkout has been running for an hour; end it and try again"
main
