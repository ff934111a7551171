#!/usr/bin/env bash
# Install Slurm's daemons for tests/operate/slurm, where this is Debian or Ubuntu and the user is root; elsewhere those tests are skipped.
# Nothing is switched on as a service.
set -uo pipefail

missing=()
for program in munged slurmctld slurmd sbatch; do command -v "$program" >/dev/null || missing+=("$program"); done
[ ${#missing[@]} = 0 ] && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "note: not installed: ${missing[*]}; only root on Debian or Ubuntu can install them here, so tests/operate/slurm will be skipped" >&2
  exit 0
fi

policy=/usr/sbin/policy-rc.d  # asked by packages before they start a service
if [ ! -e "$policy" ]; then
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod 755 "$policy"
  trap 'rm -f "$policy"' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
for attempt in 1 2 3; do
  apt-get update -qq >/dev/null && apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge >/dev/null && exit 0
  echo "apt-get failed (attempt $attempt of 3)" >&2
  sleep 5
done
echo "note: apt-get could not install Slurm, so tests/operate/slurm will be skipped" >&2
exit 0
