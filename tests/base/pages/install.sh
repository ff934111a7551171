#!/usr/bin/env bash
# Install Chromium for the tests that open pages in a browser, where this is Debian and the user is root;
# elsewhere those tests are skipped.
set -uo pipefail

for program in chromium google-chrome chrome chromium-browser; do  # on Ubuntu the last is a stub that fails
  "$program" --version >/dev/null 2>&1 && exit 0
done
if [ "$(id -u)" != 0 ] || ! grep -qx 'ID=debian' /etc/os-release 2>/dev/null; then
  echo "note: there is no Chromium; only root on Debian can install it here, so tests in a browser will be skipped" >&2
  exit 0
fi

export DEBIAN_FRONTEND=noninteractive
for attempt in 1 2 3; do
  apt-get update -qq >/dev/null && apt-get install -y -qq --no-install-recommends chromium >/dev/null && exit 0
  echo "apt-get failed (attempt $attempt of 3)" >&2
  sleep 5
done
echo "note: apt-get could not install Chromium, so tests in a browser will be skipped" >&2
exit 0
