"""Who is let in by a server that demands TLS, with libnbd: nbd-tls.py ADDRESS PORT EXPORT GOOD STRANGER ANONYMOUS UNBELIEVING

The last four are folders for tls-certificates: of a good client, of one with a certificate of another authority, of one without a
certificate, of one that does not believe the server's authority. While each is refused a good connection goes on. Prints what each
was told, and "ok" as its last line.
"""
import socket
import struct
import sys

import nbd

address, port, export = sys.argv[1], int(sys.argv[2]), sys.argv[3]
good, stranger, anonymous, unbelieving = sys.argv[4:]


def connect(folder, tls=nbd.TLS_REQUIRE):
    h = nbd.NBD()
    h.set_tls(tls)
    if folder:
        h.set_tls_certificates(folder)
    h.set_export_name(export)
    h.connect_tcp(address, str(port))
    return h


first = connect(good)
assert first.get_tls_negotiated()
count = 0


def goes_on():
    global count
    count += 1
    block = bytes([count]) * 4096
    first.pwrite(block, count * 4096, nbd.CMD_FLAG_FUA)
    first.flush()
    assert first.pread(4096, count * 4096) == block


def refused(who, *args):
    try:
        h = connect(*args)
        # TLS 1.3: the client is done before the server has looked at its certificate.
        h.pread(512, 0)
    except nbd.Error as error:
        print(who, "was told:", error)
        goes_on()
        return
    raise AssertionError(who + " was let in")


def bytes_of(text):
    """All that the server says to a client that sends this after its flags."""
    with socket.create_connection((address, port), timeout=60) as s:
        s.sendall(struct.pack(">I", 3) + text)
        said = b""
        try:
            while part := s.recv(4096):
                said += part
        except ConnectionResetError:
            pass
        return said


goes_on()
refused("stranger", stranger)
refused("anonymous", anonymous)
refused("unbelieving", unbelieving)
refused("clear", None, nbd.TLS_DISABLE)
option = lambda code, data=b"": b"IHAVEOPT" + struct.pack(">II", code, len(data)) + data
# In the clear behind STARTTLS: an option that must not be answered, neither in the clear nor under TLS. It breaks the handshake of NBD,
# or that of TLS if the server reads it later.
said = bytes_of(option(5) + option(3))
assert export.encode() not in said and struct.pack(">QI", 0x3E889045565A9, 3) not in said, said
goes_on()
second = connect(good)
assert second.pread(4096, count * 4096) == bytes([count]) * 4096
second.shutdown()
first.shutdown()
print("ok")
