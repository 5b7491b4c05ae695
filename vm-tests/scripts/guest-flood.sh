# Verified load of several writers at once, run in the guest:  sh guest-flood.sh WRITERS
# Each writer fills its own file /mnt/flood.N with contents of its own, past the guest's cache, and reads it back, until /tmp/flood.stop
# exists. It leaves in /tmp: flood.N (rounds done), flood.bad (what went wrong), flood.over.N (that it has ended).
writer() {
  round=0
  while [ ! -f /tmp/flood.stop ]; do
    round=$((round + 1))
    yes "writer $1 round $round" | head -c 262144 >/tmp/flood.want.$1
    dd if=/tmp/flood.want.$1 of=/mnt/flood.$1 bs=16k iflag=fullblock oflag=direct conv=notrunc 2>/tmp/flood.dd.$1 ||
      { echo "writer $1 round $round: write: $(cat /tmp/flood.dd.$1)" >>/tmp/flood.bad; break; }
    dd if=/mnt/flood.$1 of=/tmp/flood.got.$1 bs=64k iflag=direct 2>/tmp/flood.dd.$1 ||
      { echo "writer $1 round $round: read: $(cat /tmp/flood.dd.$1)" >>/tmp/flood.bad; break; }
    cmp /tmp/flood.want.$1 /tmp/flood.got.$1 >/tmp/flood.dd.$1 2>&1 ||
      { echo "writer $1 round $round: $(cat /tmp/flood.dd.$1)" >>/tmp/flood.bad; break; }
    echo $round >/tmp/flood.$1
  done
  echo over >/tmp/flood.over.$1
}
n=0
while [ $n -lt $1 ]; do
  writer $n &
  n=$((n + 1))
done
wait
