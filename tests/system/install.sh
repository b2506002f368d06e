#!/usr/bin/env bash
# Installs what the system tests need from Debian: Prometheus' promtool, its Pushgateway, Chromium, the Docker Engine, and
# debootstrap for a base image.
set -euo pipefail
packages=(prometheus prometheus-pushgateway chromium docker.io debootstrap)
missing=()
for package in "${packages[@]}"; do
  dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package")
done
if ((${#missing[@]} == 0)); then exit 0; fi
if (($(id -u) != 0)); then
  echo "the system tests need root to install: ${missing[*]}" >&2
  exit 2
fi
# The packages' services must not start: the tests run the programs themselves, on ports and sockets of their own.
if [[ ! -e /usr/sbin/policy-rc.d ]]; then
  printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
  chmod +x /usr/sbin/policy-rc.d
  trap 'rm -f /usr/sbin/policy-rc.d' EXIT
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
