#!/bin/bash
# The codec's integers on ARM64, emulated: golden numbers, a file of this format, and a text both ways.
#
#     sudo apt-get install qemu-user-static
#     benchmarks/check_codec_on_arm64.sh FOLDER
#
# Run on Debian 12 (x86-64) in the project's environment with Python 3.11; FOLDER is filled once with Debian's Python and
# packages for arm64, some 900 MB, and used again. torch is 2.9.1 there, the last with a small CPU build for arm64.
set -euo pipefail
here=$(realpath "$(dirname "$0")/..")
mkdir -p "$1"; cd "$1"

if [ ! -e ready ]; then
  rm -rf debian site; mkdir debian site
  dpkg --print-foreign-architectures | grep -qx arm64 || { dpkg --add-architecture arm64; apt-get update -q; }
  (cd debian; for name in libc6 libstdc++6 libgcc-s1 libgomp1 zlib1g libexpat1 libssl3 libffi8 liblzma5 libbz2-1.0 libuuid1 \
      libsqlite3-0 libcrypt1 libpython3.11-minimal libpython3.11-stdlib python3.11-minimal; do
    apt-get download -q "$name:arm64"; done
  for package in *.deb; do dpkg-deb -x "$package" .; done)
  packages='numpy|numba|llvmlite|zstandard|safetensors|Brotli|brotli|psutil|sympy|mpmath|typing_extensions|filelock|networkx|Jinja2|jinja2|MarkupSafe|fsspec|cattrs|attrs|tyro|rich|jaxtyping|wadler_lindig|Pygments|pygments|markdown-it-py|mdurl|docstring_parser|typeguard|pytest|pytest-timeout|pluggy|iniconfig|packaging|hypothesis|sortedcontainers|beartype'
  python -m pip freeze --exclude-editable | grep -E "^($packages)==" > versions.txt
  python -m pip install -q --target site --no-deps --only-binary=:all: --implementation cp --python-version 3.11 \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64 \
    -r versions.txt torch==2.9.1
  touch ready
fi

on_arm64() {
  PYTHONPATH="$PWD/site:$here/src" NUMBA_CACHE_DIR="$PWD/numba" \
    qemu-aarch64-static -L "$PWD/debian" "$PWD/debian/usr/bin/python3.11" "$@"
}
on_arm64 -c 'import platform, torch, numpy, numba; print(platform.machine(), "torch", torch.__version__, "numpy", numpy.__version__, "numba", numba.__version__)'
on_arm64 -m pytest -q -p no:cacheprovider --timeout 0 --rootdir "$here" -c "$here/pyproject.toml" "$here/tests/codec/test_golden_codec.py"
head -c 3000 "$here/README.md" > text
rm -f here.bjc there.bjc
python -m bytejepa compress text -o here.bjc
on_arm64 -m bytejepa compress text -o there.bjc
cmp here.bjc there.bjc
rm -f again
on_arm64 -m bytejepa decompress here.bjc -o again
cmp text again
echo "3000 bytes compressed on both are one file of $(stat -c %s here.bjc) bytes; arm64 restores them"
