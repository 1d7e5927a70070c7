#!/bin/bash
# wheel.sh PYTHON: build the wheel twice from copies of what is committed, compare the bytes, and put it into out/dist.
# The time of the commit stands in for the time of the build, and umask for that of whoever builds.
set -euo pipefail
python=$1
umask 022
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
export SOURCE_DATE_EPOCH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for copy in first second; do
    mkdir -p "$work/$copy"
    git archive HEAD | tar -x --no-same-permissions -C "$work/$copy"
    "$python" -m pip wheel --quiet --no-deps --wheel-dir "$work/$copy/dist" "$work/$copy"
done
cmp "$work"/first/dist/*.whl "$work"/second/dist/*.whl
mkdir -p out/dist
cp "$work"/first/dist/*.whl out/dist/
sha256sum out/dist/*.whl
