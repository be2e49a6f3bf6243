#!/bin/sh
# Resolve locks/dev.txt from pyproject.toml. torch is held back: 2.13.0 is what the suite is proven on.
set -eu
cd "$(dirname "$0")/.."
env=$(mktemp -d)
trap 'rm -rf "$env"' EXIT
python3 -m venv "$env"
"$env/bin/python" -m pip install --quiet --upgrade pip
"$env/bin/python" -m pip install --quiet torch==2.13.0 -e '.[dev]'
{
  echo "# Exact versions for development, tests and the demo. Made by scripts/lock.sh; Python 3.11."
  "$env/bin/python" -m pip freeze --all --exclude-editable | grep -v '^pip==' | sed 's/+cpu$//'
} > locks/dev.txt
