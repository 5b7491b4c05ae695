# Verified load, run in the guest by `ogee_vm_tests::hammer`:  sh guest-hammer.sh KEY
# Each round writes 64 KiB of contents of its own to one of 32 slots of /mnt/slots, past the guest's cache, flushes, reads back and compares,
# until /tmp/stop exists. It leaves in /tmp: round (the last one done), worst (the longest one, 1/100 s), slot.N (the checksum
# that slot N must have), bad (the first thing that went wrong), over (it has ended). Each appears whole (by a rename), because it is read
# while this runs.
KEY=$1 round=0 worst=0
block() { yes "block $1 of $KEY" | head -c 65536; }
leave() { echo "$2" >/tmp/leave && mv /tmp/leave "/tmp/$1"; }
now() { read -r up rest </proc/uptime; now=${up%.*}${up#*.}; }
dd if=/dev/zero of=/mnt/slots bs=64k count=32 conv=fsync 2>/dev/null
while [ ! -f /tmp/stop ]; do
  round=$((round + 1)) slot=$((round % 32))
  sum=$(block $round | sha256sum)
  now; start=$now
  block $round | dd of=/mnt/slots bs=64k seek=$slot iflag=fullblock oflag=direct conv=notrunc,fsync 2>/tmp/dd ||
    { leave bad "write $round: $(cat /tmp/dd)"; break; }
  got=$(dd if=/mnt/slots bs=64k skip=$slot count=1 iflag=direct 2>/tmp/dd | sha256sum)
  now; took=$((now - start))
  [ "$got" = "$sum" ] || { leave bad "round $round: wrote $sum read $got $(cat /tmp/dd)"; break; }
  leave slot.$slot "$sum"
  [ $took -le $worst ] || { worst=$took; leave worst $worst; }
  leave round $round
done
echo over >/tmp/over
