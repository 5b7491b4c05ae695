"""Writes 4 KiB blocks with 64 in flight until the server closes the connection, and checks what was acknowledged:

nbd-until-closed.py write URI FILE    FILE gets the numbers of the acknowledged blocks; says "begun" after the first thousand
nbd-until-closed.py check URI FILE    every block in FILE must hold what was written
"""
import sys

import nbd

mode, uri, path = sys.argv[1:4]
BLOCK = 4096


def content(index):
    return index.to_bytes(8, "little") * (BLOCK // 8)


def write():
    h = nbd.NBD()
    h.connect_uri(uri)
    acknowledged, in_flight, following, blocks = [], {}, 1, h.get_size() // BLOCK
    begun = False
    try:
        while True:
            while len(in_flight) < 64 and following < blocks:
                buf = nbd.Buffer.from_bytearray(bytearray(content(following)))
                in_flight[h.aio_pwrite(buf, following * BLOCK)] = following
                following += 1
            h.poll(-1)
            for cookie in list(in_flight):
                if h.aio_command_completed(cookie):
                    acknowledged.append(in_flight.pop(cookie))
            if len(acknowledged) > 1000 and not begun:
                begun = True
                print("begun", flush=True)
            if following >= blocks and not in_flight:
                raise SystemExit("the volume was full before the server ended")
    except nbd.Error:
        pass
    # Answers that came with the end.
    for cookie, index in in_flight.items():
        try:
            if h.aio_command_completed(cookie):
                acknowledged.append(index)
        except nbd.Error:
            pass
    with open(path, "w") as out:
        out.writelines(f"{index}\n" for index in acknowledged)
    print(f"{len(acknowledged)} acknowledged", flush=True)


def check():
    h = nbd.NBD()
    h.connect_uri(uri)
    with open(path) as lines:
        indices = [int(line) for line in lines]
    assert len(indices) > 64, len(indices)
    for index in indices:
        assert h.pread(BLOCK, index * BLOCK) == content(index), index
    h.shutdown()
    print(f"{len(indices)} checked")


{"write": write, "check": check}[mode]()
