#!/bin/bash
# A volume as a disk of a host without the kernel's nbd module: bare-host.sh ext4|xfs URI FOLDER CERTIFICATES INFO DATA...
#
# nbdfuse shows the export as a file, a loop device with direct IO makes a disk of it, and the disk gets a file system: ACLs and extended
# attributes, filled to the last byte, emptied and trimmed, unmounted, attached anew, checked, read again. CERTIFICATES is the folder of a
# client for nbds://, or `-`. INFO is the command that tells of the volume as JSON, its `data_bytes` too. DATA are the folders of chunk data, one for each replica, whose size on disk must shrink after the trim. Runs in
# namespaces of its own, so that a script that is killed leaves no mount behind; a loop device is told to end with its last user. Prints "ok"
# as its last line.
set -euo pipefail
if [ -z "${BARE_HOST_INSIDE:-}" ]; then
    exec env BARE_HOST_INSIDE=1 unshare --mount --propagation private --pid --fork --kill-child --mount-proc "$0" "$@"
fi
fs=$1 uri=$2 folder=$3 certificates=$4 info=$5
shift 5
data=("$@")
mnt=$folder/mnt
mkdir -p "$folder/fuse" "$mnt"
limit=180
# nbdfuse takes no tls-certificates in its URI: as root it looks into /etc/pki/libnbd, which in this mount namespace alone is ours.
if [ "$certificates" != - ]; then
    mkdir -p "$folder/etc/pki"
    ln -s "$certificates" "$folder/etc/pki/libnbd"
    mount -t overlay overlay -o "lowerdir=$folder/etc:/etc" /etc
fi

die() { echo "bare-host: $*" >&2; exit 1; }
until_true() { # WHAT COMMAND...: looks again until it succeeds
    local what=$1 end=$((SECONDS + limit))
    shift
    until "$@"; do
        [ $SECONDS -lt $end ] || die "$what: not within $limit s"
        sleep 0.1
    done
}
is_file() { [ -s "$folder/fuse/disk" ]; }
is_gone() { ! kill -0 "$server" 2>/dev/null; }
is_free() { ! losetup "$dev" >/dev/null 2>&1; }
on_disk() { du --summarize --block-size=1M --total "${data[@]}" | tail -1 | cut -f1; }
told() { # MiB of data, as `ogee volume info` has them
    local bytes
    bytes=$($info | sed -n 's/.*"data_bytes":\([0-9]*\).*/\1/p')
    [ -n "$bytes" ] || die "no data_bytes: $($info)"
    echo $((bytes >> 20))
}
shrank_to() { [ "$(on_disk)" -le "$1" ]; }

attach() {
    nbdfuse -C 4 "$folder/fuse/disk" "$uri" &
    server=$!
    until_true "the file of nbdfuse" is_file
    dev=$(losetup --find --show --direct-io=on "$folder/fuse/disk")
    [ "$(losetup --noheadings --output DIO "$dev" | tr -d ' ')" = 1 ] || die "$dev has no direct IO"
}
detach() {
    losetup --detach "$dev" 2>/dev/null || true
    until_true "the end of $dev" is_free
    umount "$folder/fuse"
    until_true "the end of nbdfuse" is_gone
}
mount_it() {
    mount "$dev" "$mnt"
    # Busy: it ends when it is unmounted, or with this script.
    losetup --detach "$dev"
}
unmount_it() {
    umount "$mnt"
    detach
}
as_user() { setpriv --reuid "$1" --regid "$1" --clear-groups "${@:2}"; }

acls_and_attributes() { # make|check
    local dir=$mnt/shared
    if [ "$1" = make ]; then
        mkdir -m 750 "$dir"
        echo secret >"$dir/file"
        chmod 640 "$dir/file"
        setfacl -m u:4242:rx,d:u:4242:rw "$dir"
        setfacl -m u:4242:r "$dir/file"
        echo new >"$dir/inherits"
        setfattr -n user.colour -v blue "$dir/file"
        setfattr -n trusted.origin -v 0x00ff10 "$dir/file"
    fi
    [ "$(as_user 4242 cat "$dir/file")" = secret ] || die "the ACL lets nobody in"
    if as_user 4243 cat "$dir/file" 2>/dev/null; then die "the ACL keeps nobody out"; fi
    if as_user 4242 sh -c "echo x >>$dir/file" 2>/dev/null; then die "the ACL lets write"; fi
    as_user 4242 sh -c "echo more >>$dir/inherits" || die "the default ACL was not inherited"
    getfacl --numeric --omit-header --absolute-names "$dir/file" | grep -qx 'user:4242:r--' || die "getfacl: $(getfacl -pn "$dir/file")"
    [ "$(getfattr --only-values --absolute-names -n user.colour "$dir/file")" = blue ] || die "user.colour"
    getfattr --absolute-names -e hex -n trusted.origin "$dir/file" | grep -qx 'trusted.origin=0x00ff10' || die "trusted.origin"
}
drop_caches() { sync; echo 1 >/proc/sys/vm/drop_caches; }

attach
case $fs in
ext4) mkfs.ext4 -q -F -m 0 -E lazy_itable_init=0,lazy_journal_init=0 "$dev" ;;
xfs) mkfs.xfs -q -f "$dev" ;;
*) die "no file system $fs" ;;
esac
mount_it
acls_and_attributes make
dd if=/dev/urandom of="$mnt/kept" bs=1M count=24 conv=fsync status=none
(cd "$mnt" && sha256sum kept shared/file) >"$folder/sums"
sync
before=$(on_disk)
told_before=$(told)

# Filled to the last byte: an error that says so, and what was there stays.
if dd if=/dev/urandom of="$mnt/fill" bs=1M status=none 2>"$folder/full"; then die "the disk is never full"; fi
grep -q 'No space left' "$folder/full" || die "filled: $(cat "$folder/full")"
if dd if=/dev/urandom of="$mnt/fill-2" bs=4k oflag=append conv=notrunc,fsync status=none 2>/dev/null; then die "there was space left"; fi
sync
sha256sum "$mnt/fill" >"$folder/fill-sum"
drop_caches
(cd "$mnt" && sha256sum --quiet --check "$folder/sums")
sha256sum --quiet --check "$folder/fill-sum"
filled=$(stat -c %s "$mnt/fill")
full=$(on_disk)
told_full=$(told)
[ "$told_full" -ge $((told_before + (filled >> 20))) ] || die "$filled bytes grew the told data from $told_before to $told_full MiB only"
[ "$filled" -gt $((100 << 20)) ] || die "only $filled bytes fitted in"
[ "$full" -ge $((before + ${#data[@]} * filled / (2 << 20))) ] || die "$filled bytes grew the chunk data from $before to $full MiB only"

# The space comes back.
rm "$mnt/fill" "$mnt/fill-2"
sync
trimmed=$(fstrim --verbose "$mnt")
until_true "space after $trimmed (from $full MiB to near $before)" shrank_to $((before + (full - before) / 10))
after=$(on_disk)
told_after=$(told)
[ "$told_after" -le $((told_before + (told_full - told_before) / 10)) ] || die "$trimmed: told are $told_after MiB still, $told_full before, $told_before at first"
unmount_it

# Attached anew: clean, and everything is there.
attach
case $fs in
ext4) e2fsck -fn "$dev" >"$folder/fsck" 2>&1 || die "e2fsck: $(cat "$folder/fsck")" ;;
xfs) xfs_repair -n "$dev" >"$folder/fsck" 2>&1 || die "xfs_repair: $(cat "$folder/fsck")" ;;
esac
mount_it
(cd "$mnt" && sha256sum --quiet --check "$folder/sums")
acls_and_attributes check
unmount_it
echo "$fs: filled with $((filled >> 20)) MiB; chunk data of all replicas $before, $full, after fstrim $after MiB; volume info: $told_before, $told_full, $told_after MiB"
echo ok
