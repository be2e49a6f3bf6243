#!/bin/sh
# Install the example plug-in into a throw-away folder, as pip would anywhere, and run its tests there.
#   sh scripts/test-plugin.sh .venv/bin/python
set -eu
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
cd "$(dirname "$0")/.."
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cp -R examples/plugin "$place/source"  # a build leaves files beside the sources
"$python" -m pip install --quiet --no-deps --no-build-isolation --target "$place/site" "$place/source"
cd "$place/source"
PYTHONPATH="$place/site${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH
"$python" -m pytest -q -p no:cacheprovider tests
"$python" -m netlathe passes merge_products
