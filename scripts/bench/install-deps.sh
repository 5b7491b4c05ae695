#!/bin/bash
# Installs what `make bench` needs besides what `make test` needs, from Debian's packages; the gate needs none of it.
#
#   scripts/bench/install-deps.sh          for everything: fio, qemu-storage-daemon and Ceph
#   scripts/bench/install-deps.sh --quick  for `make bench-quick`: fio
#   scripts/bench/install-deps.sh --nbd    for `make bench-nbd`: fio and qemu-nbd
#
# When everything is there it asks dpkg once and touches neither the network nor apt's locks. Debian's Ceph packages start
# nothing by themselves without a configuration in /etc/ceph.
set -euo pipefail

packages=(fio)
case "${1:-}" in
    --quick) ;;
    --nbd) packages+=(qemu-utils) ;;
    *) packages+=(qemu-utils qemu-system-common ceph-mon ceph-mgr ceph-osd ceph-common ceph-mgr-modules-core iproute2 python3) ;;
esac

missing=()
for package in "${packages[@]}"; do
    state=$(dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null || true)
    [[ $state == ii* ]] || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0

as_root=()
[ "$(id -u)" -eq 0 ] || as_root=(sudo)
apt_get() {
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 "$@"
}
echo "bench: installing ${missing[*]}"
apt_get update
apt_get install -y --no-install-recommends "${missing[@]}"
