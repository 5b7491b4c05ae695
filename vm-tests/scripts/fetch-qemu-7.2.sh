#!/bin/bash
# Unpacks the QEMU 7.2 of Debian 12 into a folder, beside the installed one, to run the VM tests with both:
#
#   vm-tests/scripts/fetch-qemu-7.2.sh DIR
#   OGEE_QEMU=DIR/qemu-7.2 cargo test --release -p ogee-vm-tests
#
# Nothing is installed and root is not needed. DIR/qemu-7.2 is a wrapper that finds the unpacked libraries and firmware.
set -euo pipefail

dir=${1:?usage: fetch-qemu-7.2.sh DIR}
die() { echo "fetch-qemu-7.2: $*" >&2; exit 1; }
[ "$(. /etc/os-release && echo "${VERSION_CODENAME:-}")" = bookworm ] || die "only Debian 12 (bookworm) has this package"
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)

newest_72() { # the newest 7.2 version of package $1 that apt knows
    apt-cache madison "$1" | awk -F' *\\| *' '$2 ~ /^1:7\.2\+/ { print $2 }' | sort -V | tail -n 1
}
version=$(newest_72 qemu-system-x86)
[ -n "$version" ] || die "apt knows no qemu-system-x86 7.2; is bookworm among its sources (apt-get update)?"

work=$(mktemp -d "$dir/.fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT
fetch() { (cd "$work" && apt-get -q -o APT::Sandbox::User= -o Acquire::Retries=3 download "$@"); }
# A rebuild (+bN) raises the version of the architecture's packages only, not of the data.
fetch "qemu-system-x86=$version" "qemu-system-common=$version" "qemu-system-data=${version%%+b[0-9]*}"
# SeaBIOS of bookworm: 7.2 takes any.
fetch seabios
for package in "$work"/*.deb; do dpkg-deb -x "$package" "$work/root"; done

# Libraries that the installed system does not have come from the packages that apt says 7.2 depends on.
binary=$work/root/usr/bin/qemu-system-x86_64
if ldd "$binary" | grep -q 'not found'; then
    mapfile -t libraries < <(dpkg-deb -f "$work/qemu-system-x86_"*.deb Depends | tr ',' '\n' | awk '$1 ~ /^lib/ { print $1 }')
    for package in "${libraries[@]}"; do
        dpkg-query -W "$package" >/dev/null 2>&1 || fetch "$package"
    done
    for package in "$work"/lib*.deb; do dpkg-deb -x "$package" "$work/root"; done
fi
library_path=$dir/root/usr/lib/x86_64-linux-gnu
left=$(LD_LIBRARY_PATH=$work/root/usr/lib/x86_64-linux-gnu ldd "$binary" | grep 'not found' || true)
[ -z "$left" ] || die "libraries are missing: $left"

rm -rf "$dir/root"
mv "$work/root" "$dir/root"
cat >"$dir/qemu-7.2" <<WRAPPER
#!/bin/sh
# QEMU $version, made by fetch-qemu-7.2.sh
export LD_LIBRARY_PATH='$library_path' QEMU_MODULE_DIR='$dir/root/usr/lib/x86_64-linux-gnu/qemu'
exec '$dir/root/usr/bin/qemu-system-x86_64' -L '$dir/root/usr/share/qemu' -L '$dir/root/usr/share/seabios' "\$@"
WRAPPER
chmod +x "$dir/qemu-7.2"
"$dir/qemu-7.2" --version | head -n 1
