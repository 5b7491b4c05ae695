# Run in the guest after guest-hammer.sh: reads every slot once more, past the guest's cache, and prints those that differ.
for file in /tmp/slot.*; do
  slot=${file#/tmp/slot.}
  got=$(dd if=/mnt/slots bs=64k skip=$slot count=1 iflag=direct 2>/dev/null | sha256sum)
  [ "$got" = "$(cat $file)" ] || echo "slot $slot: $got instead of $(cat $file)"
done
