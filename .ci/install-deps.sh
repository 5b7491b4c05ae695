#!/bin/bash
# Installs what `make test` and `make demo` need on a fresh Debian 12 machine: Debian packages only.
#
#   .ci/install-deps.sh           install what is missing (with sudo when not root)
#   .ci/install-deps.sh --check   only say what is missing; exit code 1 when something is
#
# When everything is there it asks dpkg once and touches neither the network nor apt's locks. A Rust toolchain is not
# installed here; see README.md. The guest kernel and busybox are not installed on this machine either: the image script
# (vm-tests/scripts/mkimage.sh) unpacks them into its cache.
set -euo pipefail

# To build: bindgen (RocksDB) needs libclang, the tonic build scripts need protoc.
build=(gcc g++ make cmake clang libclang-dev pkg-config protobuf-compiler)
# To make guest images without root: partition table, FAT, ext4, boot loader, initial RAM disk, and an assembler for the MBR.
image=(fdisk dosfstools mtools syslinux syslinux-common e2fsprogs cpio gzip xz-utils binutils)
# To run guests. setpriv (util-linux) ties the life of a QEMU to the test that started it.
qemu=(qemu-system-x86 qemu-utils util-linux)
# libvirtd alone, without its services, firewall and network: 20 MB. The whole (libvirt-daemon-system) pulls in systemd.
libvirt=(libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients)
# A server for the tests of backups: scripts/moto.sh.
s3=(python3-venv)
# Clients of the NBD server; file systems on them, with ACLs and extended attributes.
nbd=(libnbd-bin python3-libnbd nbd-client fio xfsprogs acl attr)
# For the torture: network namespaces, clocks that jump. (unshare, nsenter, fsfreeze and mkfs.ext4 come with util-linux and e2fsprogs.)
torture=(iproute2 mount libfaketime)

die() { echo "install-deps: $*" >&2; exit 1; }

missing_of() { # prints those of the named packages that are not installed
    local package
    declare -A have=()
    while read -r package state; do
        [ "$state" = ii ] && have[${package%%:*}]=1
    done < <(dpkg-query -W -f '${Package} ${db:Status-Abbrev}\n' "$@" 2>/dev/null || true)
    for package in "$@"; do [ -n "${have[$package]:-}" ] || echo "$package"; done
}

command -v dpkg-query >/dev/null && command -v apt-get >/dev/null ||
    die "this is not a Debian system (no apt-get); install these by hand: ${build[*]} ${image[*]} ${qemu[*]} ${libvirt[*]} ${nbd[*]} ${s3[*]} ${torture[*]}"

mapfile -t missing < <(missing_of "${build[@]}" "${image[@]}" "${qemu[@]}" "${libvirt[@]}" "${nbd[@]}" "${s3[@]}" "${torture[@]}")
[ ${#missing[@]} -gt 0 ] || exit 0
if [ "${1:-}" = --check ]; then
    echo "missing packages: ${missing[*]}"
    exit 1
fi

as_root=()
if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || die "missing packages: ${missing[*]}; run as root or install sudo"
    as_root=(sudo)
    # In a script nobody answers a password prompt; without a terminal a clear failure is better than a hang.
    if [ ! -t 0 ]; then
        as_root=(sudo -n)
        sudo -n true 2>/dev/null || die "missing packages: ${missing[*]}; sudo asks for a password and there is no terminal"
    fi
fi
apt_get() {
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 "$@"
}
# Two tries: a mirror in the middle of its update, or another apt that holds the lock of the package lists (for which apt does not wait).
# A source that we added and that does not work is taken away again, as it would break apt for everything else; then the release's own
# QEMU has to do (the tests run with 7.2 as well).
apt_update() {
    apt_get update && return 0
    echo "install-deps: apt-get update failed; once more in 10 s" >&2
    sleep 10
    apt_get update && return 0
    [ -n "$added" ] || die "apt-get update failed"
    echo "install-deps: $added does not work here; going on without it" >&2
    "${as_root[@]}" rm -f "$added"
    suite=()
    apt_get update || die "apt-get update failed"
}

# Debian 12's own QEMU is 7.2; we use the 10.0 of its backports, from the mirror the system already uses.
# Later releases have a new enough QEMU of their own.
release=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
suite=()
wants_backports() {
    local package
    for package in "${missing[@]}"; do case $package in qemu-*) return 0 ;; esac; done
    return 1
}
added=
add_backports() {
    local uri
    apt-get indextargets --format '$(RELEASE)' 2>/dev/null | grep -qx bookworm-backports && return 0
    uri=$(apt-get indextargets --format '$(RELEASE) $(REPO_URI)' 'Created-By: Packages' | awk '$1 == "bookworm" && !n++ { print $2 }')
    [ -n "$uri" ] || die "apt knows no source for bookworm; QEMU cannot be installed from bookworm-backports"
    echo "install-deps: adding $uri bookworm-backports to apt's sources"
    added=/etc/apt/sources.list.d/bookworm-backports.sources
    printf 'Types: deb\nURIs: %s\nSuites: bookworm-backports\nComponents: main\nSigned-By: %s\n' \
        "$uri" /usr/share/keyrings/debian-archive-keyring.gpg | "${as_root[@]}" tee "$added" >/dev/null
}
if [ "$release" = bookworm ] && wants_backports; then
    add_backports
    suite=(-t bookworm-backports)
fi

echo "install-deps: installing ${missing[*]}"
apt_update
mapfile -t ordinary < <(printf '%s\n' "${missing[@]}" | grep -v '^qemu-' || true)
mapfile -t emulator < <(printf '%s\n' "${missing[@]}" | grep '^qemu-' || true)
if [ ${#ordinary[@]} -gt 0 ]; then apt_get install -y --no-install-recommends "${ordinary[@]}"; fi
if [ ${#emulator[@]} -gt 0 ]; then apt_get install -y --no-install-recommends "${suite[@]}" "${emulator[@]}"; fi
mapfile -t missing < <(missing_of "${missing[@]}")
[ ${#missing[@]} -eq 0 ] || die "still missing after the installation: ${missing[*]}"
