#!/bin/sh
# Unpacks an aarch64 Python with numpy and TVM's runtime, for qemu's user mode. Nothing is installed; needs a
# Debian with apt, and pip.
#
#   scripts/arm-python.sh DIR
#   qemu-aarch64 -L DIR/root -E PYTHONPATH=DIR/site DIR/root/usr/bin/python3 ...
set -eu
mkdir -p "$1/apt/lists/partial" "$1/apt/cache/archives/partial" "$1/root" "$1/wheels" "$1/site"
folder=$(cd "$1" && pwd)
pip="${PYTHON:-python3} -m pip"

apt() {
  command=$1
  shift
  "$command" -q -o APT::Architecture=arm64 -o APT::Architectures::=arm64 -o Dir::State="$folder/apt" \
    -o Dir::State::lists="$folder/apt/lists" -o Dir::State::status=/dev/null \
    -o Dir::Cache="$folder/apt/cache" -o Debug::NoLocking=1 "$@"
}
apt apt-get update
python=$(apt apt-cache show python3-minimal | sed -n 's/^Pre-Depends:.*\(python3\.[0-9]*\)-minimal.*/\1/p' | head -n 1)
apt apt-get -y --no-install-recommends --download-only install "$python-minimal" "lib$python-stdlib" libstdc++6
for package in "$folder"/apt/cache/archives/*.deb; do
  dpkg -x "$package" "$folder/root"
done
ln -sf "$python" "$folder/root/usr/bin/python3"

tvm=$($pip show apache-tvm | sed -n 's/^Version: //p')
ffi=$($pip show apache-tvm-ffi | sed -n 's/^Version: //p')
$pip download -q --only-binary=:all: --no-deps --python-version "${python#python}" \
  --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64 \
  -d "$folder/wheels" "apache-tvm==$tvm" "apache-tvm-ffi==$ffi" numpy typing_extensions
for wheel in "$folder"/wheels/*.whl; do
  ${PYTHON:-python3} -m zipfile -e "$wheel" "$folder/site"
done
# Artifacts need the runtime alone, without the compiler.
rm -r "$folder/apt" "$folder/wheels" "$folder"/site/tvm/lib/libtvm_compiler.so
