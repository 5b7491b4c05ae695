"""Every NBD command and flag against an export of ogee, with libnbd: nbd-commands.py WRITABLE-URI READ-ONLY-URI SIZE

Run once with structured and once with simple replies. Prints "ok" as its last line. With nbds:// all of it goes under TLS; where
the certificates are says `?tls-certificates=DIR` of the URI.
"""
import errno
import sys

import nbd

writable, read_only, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
MIB = 1 << 20
tls = writable.startswith("nbds")


def new():
    h = nbd.NBD()
    h.set_uri_allow_local_file(True)
    return h


def connect(uri, structured):
    h = new()
    h.set_request_structured_replies(structured)
    h.add_meta_context("base:allocation")
    # The server is asked what libnbd itself would refuse.
    h.set_strict_mode(0)
    h.connect_uri(uri)
    assert h.get_structured_replies_negotiated() == structured
    assert h.get_tls_negotiated() == tls
    return h


def refused(expected, call, *args, **flags):
    try:
        call(*args, **flags)
    except nbd.Error as error:
        # The name of the number, or the number where the name is not known.
        assert error.errnum == expected, (call, args, error)
        return
    raise AssertionError(f"{call} {args} should fail")


def commands(h, structured):
    assert h.get_size() == size
    assert h.get_block_size(nbd.SIZE_MINIMUM) == 512
    assert h.get_block_size(nbd.SIZE_MAXIMUM) == 32 * MIB
    for can in ("flush", "fua", "trim", "zero", "fast_zero", "cache", "multi_conn"):
        assert getattr(h, "can_" + can)(), can
    assert h.can_df() == structured and not h.is_read_only()
    data = bytes(range(1, 256)) * 4112 + b"x" * 16
    data = data[:MIB]
    h.pwrite(data, 512)
    assert h.pread(MIB, 512) == data
    h.pwrite(data, 4 * MIB, nbd.CMD_FLAG_FUA)
    assert h.pread(MIB, 4 * MIB) == data
    h.pwrite(b"\x55" * 32 * MIB, 8 * MIB)
    assert h.pread(32 * MIB, 8 * MIB) == b"\x55" * 32 * MIB
    if structured:
        # Data and a hole in one chunk, and apart.
        assert h.pread(64 * 1024, 4 * MIB, nbd.CMD_FLAG_DF) == data[: 64 * 1024]
        pieces = []
        buf = h.pread_structured(2 * MIB, 4 * MIB, lambda s, o, status, e: pieces.append((len(s), o, status)))
        assert buf == data + bytes(MIB), pieces
        assert sum(p[0] for p in pieces) <= 2 * MIB
    for flags in (0, nbd.CMD_FLAG_FUA):
        h.pwrite(data[:8192], 0)
        h.trim(4096, 0, flags)
        assert h.pread(8192, 0) == bytes(4096) + data[4096:8192]
    for flags in (0, nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FAST_ZERO):
        h.pwrite(data[:8192], 0)
        h.zero(1024, 512, flags)
        assert h.pread(8192, 0) == data[:512] + bytes(1024) + data[1536:8192]
    h.zero(3 * MIB, 9 * MIB, nbd.CMD_FLAG_NO_HOLE)
    assert h.pread(5 * MIB, 8 * MIB) == b"\x55" * MIB + bytes(3 * MIB) + b"\x55" * MIB
    h.flush()
    h.cache(MIB, 0)
    h.cache(size, 0)
    # Refused, and the connection goes on.
    refused(errno.ENOTSUP, h.zero, 512, 0, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO)
    refused(errno.EINVAL, h.pread, 512, size)
    refused(errno.ENOSPC, h.pwrite, b"1" * 1024, size - 512)
    refused(errno.ENOSPC, h.zero, 1024, size - 512)
    refused(errno.EINVAL, h.trim, 1024, size - 512)
    refused(errno.EINVAL, h.pread, 512, 1)
    refused(errno.EINVAL, h.pwrite, b"1" * 100, 0)
    refused(errno.EOVERFLOW, h.pread, 33 * MIB, 0)
    refused(errno.EINVAL, h.trim, 0, 0)
    assert h.pread(512, 0) == data[:512]


def block_status(h):
    def extents(count, offset, flags=0):
        found = []
        h.block_status(count, offset, lambda name, o, entries, e: found.append((name, o, entries)), flags)
        assert len(found) == 1 and found[0][:2] == ("base:allocation", offset)
        entries = found[0][2]
        return list(zip(entries[::2], entries[1::2]))

    gib = 1 << 30
    at, holes = 0, 0
    while at < size:
        found = extents(size - at, at)
        assert found, at
        for length, flags in found:
            assert flags in (0, 3) and length % 4096 == 0
            if flags == 3:
                holes += length
                for offset in (at, at + length - 4096):
                    assert h.pread(4096, offset) == bytes(4096), offset
            at += length
    assert at == size and size - holes < 80 * MIB, holes
    # A page with data, one that was never written beside one that was, one that was trimmed, segments that were never written.
    page = bytes(range(256)) * 16
    h.pwrite(page, 80 * MIB)
    assert extents(8192, 80 * MIB) == [(4096, 0), (4096, 3)]
    assert extents(2048, 80 * MIB + 1024) == [(2048, 0)]
    assert extents(8192, 80 * MIB, nbd.CMD_FLAG_REQ_ONE) == [(4096, 0)]
    h.trim(4096, 80 * MIB)
    assert extents(8192, 80 * MIB) == [(8192, 3)]
    assert extents(size - gib, gib) == [(size - gib, 3)]
    refused(errno.EINVAL, h.block_status, 4096, size, lambda *a: 0)


def read_only_export(structured):
    h = connect(read_only, structured)
    assert h.is_read_only() and h.can_multi_conn() and not h.can_trim() and not h.can_zero()
    refused(errno.EPERM, h.pwrite, b"1" * 512, 0)
    refused(errno.EPERM, h.trim, 512, 0)
    refused(errno.EPERM, h.zero, 512, 0)
    h.flush()
    assert len(h.pread(512, 0)) == 512
    h.shutdown()


def two_connections(structured):
    a, b = connect(writable, structured), connect(writable, structured)
    for i in range(20):
        block = bytes([i + 1]) * 4096
        a.pwrite(block, 64 * MIB + i * 4096)
        b.flush()
        assert b.pread(4096, 64 * MIB + i * 4096) == block
        b.pwrite(block, 65 * MIB + i * 4096, nbd.CMD_FLAG_FUA)
        assert a.pread(4096, 65 * MIB + i * 4096) == block
    a.shutdown()
    b.shutdown()


def handshake():
    h = new()
    h.set_opt_mode(True)
    h.connect_uri(writable)
    names = []
    h.opt_list(lambda name, description: names.append((name, description)))
    assert len(names) == 2 and all(description for _, description in names), names
    contexts = []
    h.opt_list_meta_context(contexts.append)
    assert contexts == ["base:allocation"], contexts
    h.opt_info()
    assert h.get_size() == size
    h.set_export_name("nothing")
    refused(errno.ENOENT, h.opt_info)
    refused(errno.ENOENT, h.opt_go)
    h.opt_abort()
    if tls:
        return
    # The client asks for TLS, the server says no, the client may go on without.
    h = new()
    h.set_tls(nbd.TLS_ALLOW)
    h.connect_uri(writable)
    assert not h.get_tls_negotiated()
    h.shutdown()


for structured in (True, False):
    h = connect(writable, structured)
    commands(h, structured)
    if structured:
        block_status(h)
    h.shutdown()
    read_only_export(structured)
    two_connections(structured)
handshake()
print("ok")
