# Boot code of the test images' master boot record: starts the boot sector of the first partition.
#
# Why not the usual one: a usual MBR moves itself away from 0x7c00 and lets the disk write the partition's boot sector to that very
# address. Under QEMU's TCG, memory that another process writes (our daemon, over vhost-user) is not checked for code translated before,
# so the processor would go on with the old code of 0x7c00. Here the disk writes to STAGING, from which nothing ever ran, and the
# processor itself copies it to 0x7c00; such writes TCG does see.
#
# At most 440 bytes (mkimage.sh checks): the disk signature and the partition table follow.
#
# Entry (SeaBIOS): cs:ip = 0:7c00, dl = boot drive. Exit: the boot sector at 0:7c00 with dl = boot drive, ds:si = the partition's entry.
    .code16
    .globl _start

    .set LOADED,   0x7c00           # where the BIOS puts an MBR, and where a boot sector expects itself
    .set MOVED,    0x0600           # where this code runs while 0x7c00 is rewritten
    .set STAGING,  0x8000           # where the disk writes
    .set SECTOR_WORDS, 256
    .set ENTRY1,   MOVED + 0x1be    # the first partition's entry
    .set ENTRY_LBA, 8               # offset of its first sector in that entry

_start:
    cli
    xorw    %ax, %ax
    movw    %ax, %ss
    movw    $LOADED, %sp
    movw    %ax, %ds
    movw    %ax, %es
    sti
    cld

    movw    $LOADED, %si            # move out of the way
    movw    $MOVED, %di
    movw    $SECTOR_WORDS, %cx
    rep movsw
    ljmp    $0, $moved              # linked at MOVED, so this continues in the copy

moved:
    movl    ENTRY1 + ENTRY_LBA, %eax
    movl    %eax, packet_lba
    movw    $packet, %si
    movb    $0x42, %ah              # BIOS: extended read, dl is still the boot drive
    int     $0x13
    jc      stop

    movw    $STAGING, %si
    movw    $LOADED, %di
    movw    $SECTOR_WORDS, %cx
    rep movsw
    movw    $ENTRY1, %si
    ljmp    $0, $LOADED

stop:                               # the disk cannot be read: let the BIOS say that there is nothing to boot
    int     $0x18
    hlt
    jmp     stop

    .balign 4
packet:                             # disk address packet of the extended read
    .byte   16, 0                   # its size; reserved
    .word   1                       # sectors
    .word   STAGING, 0              # offset, segment
packet_lba:
    .long   0, 0                    # first sector, 64 bits
