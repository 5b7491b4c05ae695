#!/bin/bash
# PostgreSQL on a volume of a host without the kernel's nbd module: qemu-storage-daemon (an NBD client that connects again) -> FUSE -> loop
# device -> ext4. Until a line comes on standard input; then everything is ended and checked, and "ALL-CLEAN" is the last word.
#
#   postgres-on-nbd.sh SOCKET EXPORT FOLDER
#
# For vm-tests/tests/postgres.rs, which runs it as root in mount and process namespaces of its own: they go, with all in them, when the test
# goes. FOLDER is empty; the server's socket is FOLDER/run/.s.PGSQL.5432.
set -euo pipefail
export LC_ALL=C PATH="$PATH:/usr/sbin:/sbin"
socket=$1 export=$2 folder=$3
bin=$(ls -d /usr/lib/postgresql/*/bin | sort -V | tail -n 1)
as_nobody=(setpriv --reuid 65534 --regid 65534 --clear-groups --)
die() { echo "postgres-on-nbd: $*"; exit 1; }

: >"$folder/disk"
qemu-storage-daemon \
    --blockdev "driver=nbd,node-name=volume,server.type=unix,server.path=$socket,export=$export,reconnect-delay=600" \
    --export "type=fuse,id=disk,node-name=volume,mountpoint=$folder/disk,writable=on" &
until [ -s "$folder/disk" ]; do
    kill -0 $! 2>/dev/null || die "qemu-storage-daemon ended"
    sleep 0.05
done
# Through the page cache: with direct IO QEMU 10.0's FUSE export damages what mkfs writes, over qemu-nbd too.
loop=$(losetup --find --show "$folder/disk")
mkfs.ext4 -q -F "$loop"
mkdir "$folder/mnt"
mount "$loop" "$folder/mnt"
# In use, so it goes with the mount.
losetup --detach "$loop"
chmod 711 "$folder"
install -d -o 65534 -g 65534 -m 700 "$folder/mnt/data" "$folder/run"
cd /
"${as_nobody[@]}" "$bin/initdb" --data-checksums --username postgres --auth trust --pgdata "$folder/mnt/data" >/dev/null
"${as_nobody[@]}" "$bin/postgres" -D "$folder/mnt/data" -k "$folder/run" \
    -c listen_addresses= -c checkpoint_timeout=30s 2>&1 &

read -r _ || die "the test is gone"
"${as_nobody[@]}" "$bin/pg_ctl" stop --silent --mode fast --timeout 300 --pgdata "$folder/mnt/data" || die "PostgreSQL does not stop"
"${as_nobody[@]}" "$bin/pg_checksums" --check --pgdata "$folder/mnt/data" || die "pg_checksums found damage"
umount "$folder/mnt"
e2fsck -f -n "$folder/disk" || die "e2fsck found damage"
echo ALL-CLEAN
