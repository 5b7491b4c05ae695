"""Metadata contexts of ogee with libnbd: nbd-contexts.py SNAPSHOT2-URI VOLUME-URI SNAPSHOT1-URI

Snapshots s1 and s2 of one volume. Prints "ok" as its last line.
"""
import sys

import nbd

snapshot2, volume, snapshot1 = sys.argv[1:]


def listed(uri, *queries):
    h = nbd.NBD()
    h.set_opt_mode(True)
    h.connect_uri(uri)
    for query in queries:
        h.add_meta_context(query)
    found = []
    h.opt_list_meta_context(found.append)
    h.opt_abort()
    return found


assert listed(snapshot1) == ["base:allocation"], "nothing is earlier than the first snapshot"
assert listed(snapshot2) == ["base:allocation", "ogee:changed:s1"]
assert listed(volume) == ["base:allocation", "ogee:changed:s2", "ogee:changed:s1"]
assert listed(volume, "ogee:") == ["ogee:changed:s2", "ogee:changed:s1"]
assert listed(volume, "ogee:changed:s1", "base:") == ["base:allocation", "ogee:changed:s1"]

# Two contexts in one reply, and one that is not there.
h = nbd.NBD()
for name in ("base:allocation", "ogee:changed:s1", "ogee:changed:s9"):
    h.add_meta_context(name)
h.connect_uri(snapshot2)
assert h.can_meta_context("base:allocation") and h.can_meta_context("ogee:changed:s1")
assert not h.can_meta_context("ogee:changed:s9")
found = {}
h.block_status(16384, 0, lambda name, offset, entries, e: found.update({name: entries}))
assert found == {"base:allocation": [16384, 0], "ogee:changed:s1": [4096, 0, 8192, 1, 4096, 0]}, found
found = {}
h.block_status(16384, 4096, lambda name, offset, entries, e: found.update({name: entries}), nbd.CMD_FLAG_REQ_ONE)
assert found == {"base:allocation": [16384, 0], "ogee:changed:s1": [8192, 1]}, found
h.shutdown()
print("ok")
