#!/bin/sh
# system_packages.sh PYTHON PACKAGE...: installs those of the Debian packages that are missing, g++ where there is no C++
# compiler, and what PYTHON lacks: venv, and the headers that DeepSpeed's CPU op is compiled with.
# Where apt is not there or not allowed, it says what to install and goes on: the commands that need them will say so too.
set -u
missing=""
python=$1
shift
command -v "$python" >/dev/null 2>&1 || missing="python3 python3-venv python3-dev"
if command -v "$python" >/dev/null 2>&1; then
  "$python" -c 'import ensurepip' 2>/dev/null || missing="python3-venv"
  "$python" -c 'import os, sysconfig as s; assert os.path.exists(s.get_path("include") + "/Python.h")' 2>/dev/null ||
    missing="$missing python3-dev"
fi
command -v g++ >/dev/null 2>&1 || missing="$missing g++"
if command -v dpkg-query >/dev/null 2>&1; then
  for package in "$@"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q "ok installed" || missing="$missing $package"
  done
fi
[ -z "$missing" ] && exit 0
if ! command -v apt-get >/dev/null 2>&1; then
  echo "note: install these with your package manager:$missing" >&2
  exit 0
fi
sudo=""
if [ "$(id -u)" != 0 ]; then
  sudo="sudo -n"
  $sudo true 2>/dev/null || { echo "note: not root; please run: apt-get install$missing" >&2; exit 0; }
fi
echo "installing system packages: $missing"
export DEBIAN_FRONTEND=noninteractive
# Debian and Ubuntu renamed a few (libgl1 is stable); install what exists, say what does not.
# shellcheck disable=SC2086  # one word a package
$sudo apt-get install -y -qq --no-install-recommends $missing >/dev/null 2>&1 ||
  { $sudo apt-get update -qq && $sudo apt-get install -y -qq --no-install-recommends $missing >/dev/null; } ||
  echo "note: apt-get could not install all of:$missing" >&2
exit 0
