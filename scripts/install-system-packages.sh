#!/bin/sh
# Python's venv module is a package of its own on Debian and Ubuntu: install it where we may.
set -eu
if ! command -v apt-get >/dev/null 2>&1; then
  echo "Python's venv module is missing: install it with your system's package manager" >&2
  exit 1
fi
run=""
[ "$(id -u)" = 0 ] || run="sudo"
$run apt-get update
$run apt-get install -y python3-venv
