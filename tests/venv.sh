#!/bin/sh
# Make the virtual environment .venv with the Python given. Debian keeps what that needs in a package of its own,
# which is installed when this runs as root and named when it does not.
set -eu

python=${1:-python3}
command -v "$python" >/dev/null || { echo "there is no $python: install Python 3.11 or newer, or say make PYTHON=..." >&2; exit 1; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "$("$python" --version) is too old: Shoal needs 3.11 or newer; say make PYTHON=python3.12, for example" >&2
    exit 1
}
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-venv >/dev/null
    else
        echo "Python cannot make virtual environments here: install the package python3-venv" >&2
        exit 1
    fi
fi
"$python" -m venv .venv
