#!/usr/bin/env bash
# ./run.sh         sets up, prepares Python's own sources, trains a small Mamba on them, and lets it write
# ./run.sh test    sets up and runs the tests (further arguments go to pytest)
# Both are quick the second time: what is installed, prepared or trained already stays.
set -euo pipefail
cd "$(dirname "$0")"

setup() {  # .venv with what requirements file $1 asks for; again only when one of the files changes
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
    local stamp=.venv/installed-$1
    if ! cmp -s <(cat requirements*.txt) "$stamp"; then
        echo "installing $1 into .venv (torch is large; some minutes the first time)"
        if ! "$python" -m pip install --quiet --disable-pip-version-check -r "$1"; then
            echo "error: pip could not install $1; its message is above. Run the same command again to go on" >&2
            exit 2
        fi
        cat requirements*.txt > "$stamp"
    fi
}

case "${1:-}" in
    test)
        shift
        setup requirements-test.txt
        [ $# -gt 0 ] || set -- -n auto --maxprocesses=4 --dist=loadfile    # all of them: a file a process at a time
        exec "$python" -m pytest -q -o testpaths=tests "$@"
        ;;
    '')
        setup requirements.txt
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
END
        ;;
    *)
        echo "error: unknown argument '$1': it is ./run.sh or ./run.sh test" >&2
        exit 2
        ;;
esac
