#!/usr/bin/env bash
# Checks the system libraries that cannot come from pip, installs them where it may, otherwise says how.
#   libEGL + Mesa: Meta-World renders without a screen through EGL
#   g++:           DeepSpeed compiles its shared-memory communication once
set -eu

missing=()
# An NVIDIA driver brings an EGL of its own, so any vendor library will do.
ldconfig -p | grep -q 'libEGL\.so\.1' || missing+=(libegl1)
ldconfig -p | grep -qE 'libEGL_(mesa|nvidia)\.so\.0' || missing+=(libegl-mesa0)
command -v g++ >/dev/null || missing+=(g++)
[ ${#missing[@]} -eq 0 ] && exit 0

install="apt-get update && apt-get install -y --no-install-recommends ${missing[*]}"
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "installing ${missing[*]}"
  DEBIAN_FRONTEND=noninteractive sh -c "$install" >/dev/null
else
  echo "missing system libraries: ${missing[*]}. Run: sudo sh -c '$install'" >&2
  exit 1
fi
