#!/bin/sh
# Blender as a Python module in an environment of its own.  bpy's wheels are for exactly one Python version each.
set -eu
wanted=3.11
# `blender --version` begins with "Blender 4.2.1".
version=$(blender --version 2>/dev/null | sed -n 's/^Blender \([0-9]*\)\.\([0-9]*\).*/\1 \2/p' | head -n 1)
# shellcheck disable=SC2086  # two words, for two numbers
if [ -n "$version" ] && [ "$(printf '%d%02d' $version)" -ge 402 ]; then
  mkdir -p .venv-blender && touch .venv-blender/.installed
  echo "using $(command -v blender)"
  exit 0
fi
for python in "$1" python$wanted; do
  if command -v "$python" >/dev/null 2>&1 &&
    [ "$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" = $wanted ]; then
    "$python" -m venv .venv-blender
    .venv-blender/bin/python -m pip install --disable-pip-version-check -r constraints-blender.txt
    touch .venv-blender/.installed
    exit 0
  fi
done
echo "error: no blender on the PATH, and bpy needs Python $wanted, which is not here." >&2
echo "remedy: install Blender (4.2 or newer), or Python $wanted, and run make blender again." >&2
exit 2
