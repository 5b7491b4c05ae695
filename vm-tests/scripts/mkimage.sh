#!/bin/bash
# Makes the golden image of the VM tests: a bootable disk from Debian packages, without root, loop devices or mounts.
#
#   mkimage.sh OUT_DIR
#
# OUT_DIR gets
#   golden.raw     MBR (mbr.S) | 20 MiB FAT16: SYSLINUX, kernel, initrd | 27 MiB ext4 for the guest's data
#   golden.qcow2   the same disk
#   vmlinuz initrd the kernel and initrd alone, for a boot without a disk
#   golden.key     what the files were made from; while it is unchanged, nothing is made again
#
# The kernel and busybox come with `apt-get download` and are only unpacked, not installed; they stay in ${OGEE_CACHE:-~/.cache/ogee-vm}.
# The same inputs give the same bytes: no time, random identifier or user name of this machine gets into the image.
set -euo pipefail
export LC_ALL=C TZ=UTC PATH="$PATH:/usr/sbin:/sbin"

out=${1:?usage: mkimage.sh OUT_DIR}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${OGEE_CACHE:-$HOME/.cache/ogee-vm}

image_mib=48
boot_mib=20
first_mib=1 # the gap before the first partition
epoch=1700000000 # every time stamp in the image

# init_on_alloc stays on, as Debian has it: under TCG a page that is to hold code must be written by the guest's own processor after the
# disk's daemon wrote it (see mbr.S for the same trap). nohz=off highres=off keep the timer periodic: one boot hung under TCG
# on a busy machine with "rcu_preempt kthread timer wakeup didn't happen"; a lost one-shot tick is the guess, it was not reproduced.
# The rest makes the boot short.
cmdline='console=ttyS0 quiet panic=-1 nohz=off highres=off'
cmdline+=' tsc=reliable no_timer_check nokaslr mitigations=off random.trust_cpu=on edd=off'
# In the order in which they have to be loaded; what the kernel has built in is skipped.
modules=(virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk)

say() { echo "mkimage: $*" >&2; }
die() { say "$*"; exit 1; }
for tool in apt-get apt-cache dpkg-deb sfdisk mkfs.vfat mcopy syslinux mke2fs cpio gzip as ld qemu-img flock; do
    command -v "$tool" >/dev/null || die "$tool is not installed; run .ci/install-deps.sh"
done
mkdir -p "$cache" "$out"

# One maker at a time: tests run in parallel and share the cache.
exec 9>"$cache/lock"
flock 9

# ---- packages ----------------------------------------------------------------------------------------------------------------------

apt_options=(-q -o APT::Sandbox::User= -o Acquire::Retries=3)
# Package lists of our own, when the system's are missing or name files that the mirror no longer has.
own_lists() {
    say "fetching package lists"
    mkdir -p "$cache/apt/lists/partial" "$cache/apt/archives/partial"
    apt_options+=(-o "Dir::State::Lists=$cache/apt/lists" -o "Dir::Cache=$cache/apt")
    apt-get "${apt_options[@]}" update >&2
}
candidate() { # prints the version apt would install, nothing when it knows none
    apt-cache "${apt_options[@]}" policy "$1" 2>/dev/null | awk '$1 == "Candidate:" && $2 != "(none)" { print $2 }'
}
current_kernel() {
    apt-cache "${apt_options[@]}" depends linux-image-cloud-amd64 2>/dev/null | awk '$1 == "Depends:" && $2 ~ /^linux-image-/ { print $2; exit }'
}
unpack() { # fetches package $1 and prints the folder in $cache/packages that has its contents
    local package=$1 version folder
    version=$(candidate "$package")
    [ -n "$version" ] || { say "apt knows no package $package"; return 1; }
    folder=${package}_${version//[:\/]/_}
    if [ ! -d "$cache/packages/$folder" ]; then
        rm -rf "$cache/packages/new" && mkdir -p "$cache/packages/new/deb"
        say "fetching $package $version"
        (cd "$cache/packages/new/deb" && apt-get "${apt_options[@]}" download "$package=$version" >&2) || return 1
        dpkg-deb -x "$cache/packages/new/deb/"*.deb "$cache/packages/new/root"
        mv "$cache/packages/new/root" "$cache/packages/$folder"
        rm -r "$cache/packages/new"
    fi
    echo "$folder"
}
choose_packages() { # writes the folders of the kernel and of busybox to $cache/packages/chosen
    local kernel busybox
    kernel=$(current_kernel)
    [ -n "$kernel" ] || { say "apt knows no linux-image-cloud-amd64"; return 1; }
    kernel=$(unpack "$kernel") && busybox=$(unpack busybox-static) || return 1
    printf '%s\n%s\n' "$kernel" "$busybox" >"$cache/packages/chosen.new"
    mv "$cache/packages/chosen.new" "$cache/packages/chosen"
}

# The choice is kept, so that the image changes when somebody wants it to and apt (slow) is asked once: remove the file for a newer kernel.
mkdir -p "$cache/packages"
if [ ! -f "$cache/packages/chosen" ] && ! choose_packages; then
    # The system has no package lists, or lists that name files the mirror no longer has.
    own_lists
    choose_packages || die "the guest's kernel and busybox cannot be fetched"
fi
{ read -r kernel_folder; read -r busybox_folder; } <"$cache/packages/chosen"
kernel_root=$cache/packages/$kernel_folder
busybox_root=$cache/packages/$busybox_folder

# ---- nothing to do? ----------------------------------------------------------------------------------------------------------------

key=$({
    cat "$here/mkimage.sh" "$here/mbr.S" "$here/guest-init"
    echo "$kernel_folder $busybox_folder"
} | sha256sum | cut -d' ' -f1)
if [ "$(cat "$out/golden.key" 2>/dev/null)" = "$key" ] && [ -f "$out/golden.raw" ] && [ -f "$out/golden.qcow2" ]; then
    exit 0
fi

# ---- the image ---------------------------------------------------------------------------------------------------------------------

work=$(mktemp -d "$out/.mkimage.XXXXXX")
trap 'rm -rf "$work"' EXIT
umask 022
export SOURCE_DATE_EPOCH=$epoch E2FSPROGS_FAKE_TIME=$epoch MTOOLS_SKIP_CHECK=1

make_initrd() {
    local root=$work/initrd.d release modules_root module file
    release=$(ls "$kernel_root/lib/modules")
    modules_root=$kernel_root/lib/modules/$release/kernel
    mkdir -p "$root"/{bin,dev,proc,sys,mnt,tmp,lib/modules}
    cp "$busybox_root/bin/busybox" "$root/bin/busybox"
    "$busybox_root/bin/busybox" --list | while read -r applet; do
        [ "$applet" = busybox ] || ln -sf busybox "$root/bin/$applet"
    done
    for module in "${modules[@]}"; do
        file=$(find "$modules_root" -name "$module.ko*" | head -n 1)
        [ -n "$file" ] || continue
        case $file in
            *.xz) xz -dc "$file" >"$root/lib/modules/$module.ko" ;;
            *) cp "$file" "$root/lib/modules/$module.ko" ;;
        esac
        echo "$module" >>"$root/lib/modules/order"
    done
    cp "$here/guest-init" "$root/init"
    chmod 755 "$root/init"
    find "$root" -exec touch -h -d "@$epoch" {} +
    (cd "$root" && find . | sort | cpio -o -H newc -R 0:0 --reproducible --quiet) | gzip -n -1 >"$work/initrd"
    cp "$kernel_root/boot/vmlinuz-$release" "$work/vmlinuz"
}

make_boot_partition() { # FAT16 with SYSLINUX inside the disk image $1
    local disk=$1 partition=$1@@${first_mib}M
    mkfs.vfat -F 16 -s 4 -n OGEEBOOT -i 0613e0ee --invariant --offset $((first_mib * 2048)) "$disk" $((boot_mib * 1024)) \
        >/dev/null 2> >(grep -v 'block count mismatch' >&2)
    {
        # Lines of syslinux.cfg; SERIAL sends what the boot loader says to ttyS0 too.
        printf 'SERIAL 0 115200\nPROMPT 0\nDEFAULT linux\nLABEL linux\n  KERNEL vmlinuz\n  INITRD initrd\n  APPEND %s\n' "$cmdline"
    } >"$work/syslinux.cfg"
    touch -d "@$epoch" "$work/vmlinuz" "$work/initrd" "$work/syslinux.cfg"
    mcopy -m -i "$partition" "$work/vmlinuz" "$work/initrd" "$work/syslinux.cfg" ::
    syslinux --install --offset $((first_mib * 1024 * 1024)) "$disk"
}

make_data_partition() { # ext4 with one file the guest shows at its start
    local data_mib=$((image_mib - boot_mib - first_mib)) uuid=0613e000-0000-4000-8000-000000000001
    mkdir -p "$work/data.d/etc"
    echo "OGEE-GUEST-DATA-OK" >"$work/data.d/etc/ogee-guest"
    find "$work/data.d" -exec touch -h -d "@$epoch" {} +
    mke2fs -q -t ext4 -b 4096 -L ogee-data -U "$uuid" -E "root_owner=0:0,hash_seed=$uuid" -d "$work/data.d" "$work/data" "${data_mib}M" >/dev/null
    # The files' owner is whoever runs this script; the image must not depend on it.
    for path in /etc /etc/ogee-guest /lost+found; do
        printf 'sif %s uid 0\nsif %s gid 0\nsif %s ctime @%s\nsif %s atime @%s\nsif %s crtime @%s\n' \
            "$path" "$path" "$path" $epoch "$path" $epoch "$path" $epoch
    done | debugfs -w -f - "$work/data" >/dev/null 2>&1
}

make_disk() {
    local disk=$work/golden.raw
    truncate -s "${image_mib}M" "$disk"
    printf 'label: dos\nlabel-id: 0x0613e0ee\nstart=%d, size=%dMiB, type=e, bootable\nstart=%d, type=83\n' \
        $((first_mib * 2048)) "$boot_mib" $(((first_mib + boot_mib) * 2048)) | sfdisk -q "$disk"
    make_boot_partition "$disk"
    as --32 -o "$work/mbr.o" "$here/mbr.S"
    # Linked to run at 0x600, where the code moves itself (MOVED in mbr.S).
    ld -m elf_i386 -Ttext 0x600 --oformat binary -o "$work/mbr" "$work/mbr.o"
    [ "$(stat -c %s "$work/mbr")" -le 440 ] || die "the MBR's boot code is too long"
    dd if="$work/mbr" of="$disk" conv=notrunc status=none
    make_data_partition
    dd if="$work/data" of="$disk" bs=1M seek=$((first_mib + boot_mib)) conv=notrunc,sparse status=none
    qemu-img convert -f raw -O qcow2 "$disk" "$work/golden.qcow2"
}

make_initrd
make_disk
# The key goes last and away first: a half-made set is never taken for a whole one.
rm -f "$out/golden.key"
mv "$work"/{golden.raw,golden.qcow2,vmlinuz,initrd} "$out/"
echo "$key" >"$work/golden.key"
mv "$work/golden.key" "$out/golden.key"
