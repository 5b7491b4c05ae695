#!/bin/bash
# Installs moto's S3 server, which the tests of backups talk to, into a virtual environment of its own (OGEE_MOTO, or
# ~/.cache/ogee-moto). Does nothing when it is there.
set -euo pipefail

version=5.2.5
venv=${OGEE_MOTO:-$HOME/.cache/ogee-moto}
[ -x "$venv/bin/moto_server" ] && exit 0
python3 -c 'import venv, ensurepip' 2>/dev/null ||
    { echo "moto.sh: python3-venv is missing; run: make deps" >&2; exit 1; }
python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check "moto[server]==$version"
