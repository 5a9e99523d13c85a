#!/usr/bin/env bash
# ./run.sh             sets up, prepares Python's own sources, trains a small Mamba on them, and lets it write
# ./run.sh serve       sets up and opens the page, on which all this is done without typing (more arguments: serve.py)
# ./run.sh test        sets up and runs ruff and all tests (further arguments go to pytest alone)
# ./run.sh test quick  the heart of everything in a minute, with no more installed than ./run.sh needs, and pytest
# All are quick the second time: what is installed, prepared or trained already stays.
# TORCH=cpu or TORCH=cuda before any of them says which torch is installed; without it, it is the one for this machine.
set -euo pipefail
trap 'exit 130' INT    # pip ends with a status of its own after Ctrl-C, and nothing is to come after that
cd "$(dirname "$0")"

environment() {  # .venv, and its interpreter in $python
    if [ ! -e .venv/bin/python ] && [ ! -e .venv/Scripts/python.exe ]; then
        local found=${PYTHON:-}
        for name in python3 python; do
            [ -n "$found" ] || ! "$name" -c '' 2>/dev/null || found=$name
        done
        if ! "${found:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
            echo 'error: Python 3.10 or newer is needed; name one with: PYTHON=/path/to/python3 ./run.sh' >&2
            exit 2
        fi
        if ! "$found" -m venv .venv; then
            rm -rf .venv
            echo 'error: could not make .venv; on Debian or Ubuntu first: sudo apt install python3-venv' >&2
            exit 2
        fi
    fi
    python=.venv/bin/python
    [ -e "$python" ] || python=.venv/Scripts/python.exe
}

requirements() {  # requirements.txt, and group $1 of pyproject.toml; as pip's --group, which older ones do not have
    cat requirements.txt
    [ -z "$1" ] || "$python" - "$1" <<'END'
import sys

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

def show(group):
    for entry in groups[group]:
        if isinstance(entry, dict):
            show(entry['include-group'])
        else:
            print(entry)

with open('pyproject.toml', 'rb') as f:
    groups = tomllib.load(f)['dependency-groups']
show(sys.argv[1])
END
}

pip_install() {
    "$python" -m pip install --quiet --disable-pip-version-check "$@"
}

has_card() {  # of NVIDIA; in WSL too
    nvidia-smi -L > /dev/null 2>&1 || [ -e /proc/driver/nvidia/version ] || [ -e /dev/nvidia0 ] ||
        /usr/lib/wsl/lib/nvidia-smi -L > /dev/null 2>&1
}

torch() {  # the one without CUDA where nothing here could use that: it is a tenth as large. Elsewhere pip's usual one
    local version installed settings
    version=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' requirements.txt)
    installed=$("$python" -c 'import importlib.metadata as m; print(m.version("torch"))' 2> /dev/null || true)
    case "${TORCH:-}" in
        ''|cpu|cuda) ;;
        *) echo "error: TORCH=$TORCH: it is cpu or cuda" >&2; exit 2 ;;
    esac
    if [ "${TORCH:-}" = cuda ] && [[ "$installed" = *+cpu ]]; then
        echo 'fetching torch with CUDA in the place of the one without, about 3 GB'
        pip_install --force-reinstall --no-deps "torch==$version" || failed
    fi
    # of the others it is said in the stamp alone that they were asked for
    [ "$(uname -s)" = Linux ] && [ "${TORCH:-}" != cuda ] && [[ "$installed" != *+cpu ]] || return 0
    if [ -z "${TORCH:-}" ]; then
        # what is there stays, and so does where the person has told pip to look
        [ -z "$installed" ] || return 0
        # (all of it is read: where grep -q has seen enough, pip calls its closed pipe an error)
        settings=$("$python" -m pip config list) || true
        ! grep -Eq '(index-url|find-links|no-index)=' <<< "$settings" || return 0
        ! has_card || { echo 'torch is fetched with CUDA, for the NVIDIA card here: about 3 GB'; return 0; }
    fi
    echo 'torch is fetched for the CPU, without CUDA: about 200 MB (TORCH=cuda ./run.sh for the other)'
    pip_install "torch==$version+cpu" --index-url https://download.pytorch.org/whl/cpu ||
        echo "that did not work (pip's message is above): now pip's usual torch, with CUDA, about 3 GB"
}

failed() {
    echo 'error: pip could not install it; its message is above. Run the same command again to go on' >&2
    exit 2
}

setup() {  # .venv with what is required for group $1, '': to run; again only when that changes
    environment
    local wanted=.venv/wanted.txt stamp=.venv/installed-${1:-core}.txt
    requirements "$1" > "$wanted"
    [ -z "${TORCH:-}" ] || echo "# TORCH=$TORCH" >> "$wanted"
    if ! cmp -s "$wanted" "$stamp"; then
        echo 'installing what is needed into .venv: some minutes the first time'
        torch
        pip_install -r "$wanted" || failed
        cp "$wanted" "$stamp"
    fi
}

case "${1:-}" in
    test)
        shift
        if [ "${1:-}" = quick ]; then
            shift
            setup quick
            exec "$python" -m pytest -q tests/quick "$@"
        fi
        setup test
        if [ $# -eq 0 ]; then
            "$python" -m ruff check --quiet
            set -- -n auto --maxprocesses=4 --dist=loadfile    # all of them: a file a process at a time
        fi
        exec "$python" -m pytest -q "$@"
        ;;
    serve)
        shift
        setup serve
        exec "$python" serve.py "$@"
        ;;
    '')
        setup ''
        [ -e data/stdlib/meta.json ] || "$python" prepare.py
        "$python" train.py config/quick.py
        "$python" sample.py --out_dir=out-quick --start='def ' --max_new_tokens=400 --temperature=0.7
        cat <<'END'

This model was trained here, on the Python sources of this machine. What to type next:

    source .venv/bin/activate                           # on Windows: .venv\Scripts\activate
    python sample.py --out_dir=out-quick --start='class '
    python prepare.py your/files --out=data/mine        # text and code, files or folders
    python train.py --dataset=mine                      # --model=gpt, --model=hybrid; --help lists the rest
    python sample.py
    ./run.sh serve                                      # all of it, and talking to the model, on a page; and an API
END
        ;;
    *)
        echo "error: unknown argument '$1': it is ./run.sh, ./run.sh serve, ./run.sh test or ./run.sh test quick" >&2
        exit 2
        ;;
esac
