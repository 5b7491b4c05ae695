//! Golden bytes of every message, as `linux/nbd-netlink.h` has them (little-endian machines), and hostile answers.

use super::message::Attribute;
use super::*;
use proptest::prelude::*;
use std::os::fd::AsFd;

/// Bytes written as words for people: hexadecimal digits, spaces ignored.
fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<char> = hex.chars().filter(|c| !c.is_whitespace()).collect();
    let byte = |pair: &[char]| u8::from_str_radix(&pair.iter().collect::<String>(), 16).expect("hexadecimal");
    digits.chunks(2).map(byte).collect()
}

fn attach() -> Attach<'static> {
    Attach {
        index: Some(3),
        size_bytes: 1 << 30,
        block_bytes: 512,
        resend_after: Duration::from_secs(10),
        dead_limit: Duration::from_secs(3600),
        server_flags: 0x0d6d,
        backend: "ogee:vm1",
    }
}

/// The golden attribute of a socket; its number is the machine's choice.
fn sock_item(socket: &UnixStream) -> Vec<u8> {
    let fd = socket.as_raw_fd().unsigned_abs();
    [bytes("0c00 0180 0800 0100"), fd.to_le_bytes().to_vec()].concat()
}

#[test]
fn the_question_for_the_family_is_golden() {
    let mut ask = Request::new(CONTROLLER, GET_FAMILY, CONTROLLER_VERSION);
    ask.string(FAMILY_NAME, NBD_FAMILY);
    let golden = "1c000000 1000 0500 07000000 00000000  03 01 0000  0800 0200 6e626400";
    assert_eq!(ask.finish(7), bytes(golden));
}

#[test]
fn connect_is_golden() {
    let (one, two) = UnixStream::pair().expect("a pair");
    let message = connect_request(0x1c, &attach(), &[one.as_fd(), two.as_fd()]).finish(9);
    let fixed = "b0000000 1c00 0500 09000000 00000000  01 01 0000
        0800 0100 03000000
        0c00 0200 0000004000000000
        0c00 0300 0002000000000000
        0c00 0400 0a00000000000000
        0c00 0500 6d0d000000000000
        0c00 0600 0000000000000000
        0c00 0800 100e000000000000
        0d00 0a00 6f6765653a766d31 00000000
        1c00 0780";
    let mut golden = [bytes(fixed), sock_item(&one), sock_item(&two)].concat();
    let len = u32::try_from(golden.len()).expect("short");
    golden[..4].copy_from_slice(&len.to_le_bytes());
    assert_eq!(message, golden);
    let free = connect_request(0x1c, &Attach { index: None, ..attach() }, &[one.as_fd()]).finish(9);
    assert_eq!(free[20..24], bytes("0c00 0200"), "no index: the kernel chooses");
}

#[test]
fn reconfigure_is_golden() {
    let (one, _two) = UnixStream::pair().expect("a pair");
    let message = reconnect_request(0x1c, 5, &attach(), one.as_fd()).finish(2);
    let fixed = "00000000 1c00 0500 02000000 00000000  03 01 0000
        0800 0100 05000000
        0c00 0200 0000004000000000
        0c00 0300 0002000000000000
        0c00 0400 0a00000000000000
        0c00 0800 100e000000000000
        0d00 0a00 6f6765653a766d31 00000000
        1000 0780";
    let mut golden = [bytes(fixed), sock_item(&one)].concat();
    let len = u32::try_from(golden.len()).expect("short");
    golden[..4].copy_from_slice(&len.to_le_bytes());
    assert_eq!(message, golden);
}

#[test]
fn disconnect_and_status_are_golden() {
    let mut request = Request::new(0x1c, COMMAND_DISCONNECT, NBD_VERSION);
    request.u32(INDEX, 15);
    assert_eq!(request.finish(1), bytes("1c000000 1c00 0500 01000000 00000000  02 01 0000  0800 0100 0f000000"));
    let request = Request::new(0x1c, COMMAND_STATUS, NBD_VERSION);
    assert_eq!(request.finish(1), bytes("14000000 1c00 0500 01000000 00000000  05 01 0000"));
}

#[test]
fn answers_are_read() {
    // An answer and its acknowledgement in one datagram.
    let connected = bytes(
        "1c000000 1c00 0000 09000000 11220000  01 01 0000  0800 0100 04000000
         24000000 0200 0001 09000000 11220000  00000000 b0000000 1c000500 09000000 00000000",
    );
    let responses = Response::decode_all(&connected).expect("well-formed");
    assert_eq!(responses.len(), 2);
    let Ok(Some(answer)) = &responses[0].outcome else { panic!("{responses:?}") };
    assert_eq!(Attributes(answer).find(INDEX).and_then(Attribute::u32), Some(4));
    assert_eq!(responses[1], Response { sequence: 9, outcome: Ok(None) });
    let busy = bytes("24000000 0200 0000 09000000 11220000  f0ffffff b0000000 1c000500 09000000 00000000");
    let responses = Response::decode_all(&busy).expect("well-formed");
    assert_eq!(responses, [Response { sequence: 9, outcome: Err(EBUSY) }]);
}

#[test]
fn the_list_of_devices_is_read() {
    let list = bytes(
        "2c00 0980
         1400 0180  0800 0100 00000000  0500 0200 01 000000
         1400 0180  0800 0100 07000000  0500 0200 00 000000",
    );
    assert_eq!(device_list(&list), Some(vec![(0, true), (7, false)]));
    assert_eq!(device_list(&[]), Some(vec![]));
    let without_index = bytes("1000 0980  0c00 0180  0500 0200 01 000000");
    assert_eq!(device_list(&without_index), None);
    let cut_short = bytes("0c00 0980  1400 0180  0800 0100");
    assert_eq!(device_list(&cut_short), None);
}

#[test]
fn a_socket_that_nobody_took_has_no_limit() {
    let (one, _two) = UnixStream::pair().expect("a pair");
    assert!(!is_taken(&one).expect("asked"));
    one.set_write_timeout(Some(Duration::from_secs(10))).expect("set");
    assert!(is_taken(&one).expect("asked"));
}

#[test]
fn a_kernel_without_the_module_is_told_apart() {
    // Here or there: the question itself works on every kernel.
    match KernelNbd::open() {
        Ok(mut kernel) => assert!(kernel.status().is_ok()),
        Err(error) => assert!(matches!(error, KernelError::NoModule | KernelError::Socket { verb: "open", .. }), "{error:?}"),
    }
}

proptest! {
    #[test]
    fn any_bytes_are_read_without_harm(input in proptest::collection::vec(any::<u8>(), 0..128)) {
        if let Some(responses) = Response::decode_all(&input) {
            for response in responses {
                if let Ok(Some(answer)) = response.outcome {
                    let _ = device_list(&answer);
                }
            }
        }
        let _ = device_list(&input);
        prop_assert!(Attributes(&input).count() <= input.len() / 4 + 1);
    }
}
