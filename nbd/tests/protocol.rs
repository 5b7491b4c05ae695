//! The protocol core against transcripts written by hand from proto.md, and against garbage.

#![allow(clippy::unwrap_used, reason = "test code")]

use bytes::{BufMut, Bytes, BytesMut};
use ogee_client::{ReadData, ReadPiece};
use ogee_nbd::wire::{Errno, option};
use ogee_nbd::{
    Agreement, Command, ContextExtents, Contexts, ExportInfo, Framing, Handshake, HandshakeError, Outcome, Progress, Refusal, Replies, ReplyTo,
    RequestError, RequestHead, StatusExtent, TlsOffer, check,
};
use proptest::prelude::*;

const MIB: u64 = 1 << 20;

fn export(name: &str, read_only: bool) -> ExportInfo {
    let contexts = if read_only { vec!["ogee:changed:a".to_owned(), "ogee:changed:b".to_owned()] } else { vec![] };
    let (name, description) = (name.to_owned(), "d".to_owned());
    ExportInfo { name, description, size_bytes: 64 * MIB, read_only, contexts, sector_bytes: 512 }
}

fn exports() -> Vec<ExportInfo> {
    vec![export("vm1", false), export("vm1@s", true)]
}

/// Bytes from hexadecimal digits; `'` begins text that ends with the next `'`.
fn hex(text: &str) -> BytesMut {
    let mut out = BytesMut::new();
    for (i, part) in text.split('\'').enumerate() {
        if i % 2 == 1 {
            out.put_slice(part.as_bytes());
            continue;
        }
        let digits: Vec<u8> = part.bytes().filter(|b| !b.is_ascii_whitespace()).collect();
        for pair in digits.chunks(2) {
            out.put_u8(u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap());
        }
    }
    out
}

/// Runs the input to its end: the output and how it ended.
fn talk(exports: &[ExportInfo], mut input: BytesMut) -> (BytesMut, Result<Progress, HandshakeError>, BytesMut) {
    let mut handshake = Handshake::new(TlsOffer::Absent);
    let (out, end) = go_on(&mut handshake, exports, &mut input);
    (out, end, input)
}

/// Feeds a handshake until it ends, wants more or begins TLS.
fn go_on(
    handshake: &mut Handshake, exports: &[ExportInfo], input: &mut BytesMut,
) -> (BytesMut, Result<Progress, HandshakeError>) {
    let mut out = BytesMut::new();
    loop {
        match handshake.advance(exports, input, &mut out) {
            Ok(Progress::Replied) => {}
            end => return (out, end),
        }
    }
}

/// A client that sends `options` after its flags gets exactly `replies`.
fn transcript(options: &str, replies: &str) -> Result<Progress, HandshakeError> {
    let (out, end, _) = talk(&exports(), hex(&format!("00000003 {options}")));
    assert_eq!(out, hex(replies), "\nsent {options}\n got {out:02x?}");
    end
}

const OPT: &str = "49484156454f5054";
const REP: &str = "0003e889045565a9";

#[test]
fn greeting() {
    let mut out = BytesMut::new();
    Handshake::greet(&mut out);
    assert_eq!(out, hex("4e42444d41474943 49484156454f5054 0003"));
}

#[test]
fn go_with_everything() {
    let end = transcript(
        &format!(
            "{OPT} 00000008 00000000
             {OPT} 0000000a 0000001e 00000003 'vm1' 00000001 0000000f 'base:allocation'
             {OPT} 00000007 0000000f 00000003 'vm1' 0003 0001 0002 0003"
        ),
        &format!(
            "{REP} 00000008 00000001 00000000
             {REP} 0000000a 00000004 00000013 00000001 'base:allocation'
             {REP} 0000000a 00000001 00000000
             {REP} 00000007 00000003 0000000c 0000 0000000004000000 0ded
             {REP} 00000007 00000003 00000005 0001 'vm1'
             {REP} 00000007 00000003 00000003 0002 'd'
             {REP} 00000007 00000003 0000000e 0003 00000200 00001000 02000000
             {REP} 00000007 00000001 00000000"
        ),
    );
    assert_eq!(end, Ok(Progress::Transmission(agreed(Framing::Structured))));
}

#[test]
fn list_and_abort() {
    let end = transcript(
        &format!("{OPT} 00000003 00000000 {OPT} 00000002 00000002 ffff"),
        &format!(
            "{REP} 00000003 00000002 00000008 00000003 'vm1d'
             {REP} 00000003 00000002 0000000a 00000005 'vm1@sd'
             {REP} 00000003 00000001 00000000
             {REP} 00000002 00000001 00000000"
        ),
    );
    assert_eq!(end, Ok(Progress::Aborted));
}

#[test]
fn export_name_with_and_without_zeroes() {
    let (out, end, rest) = talk(&exports(), hex(&format!("00000001 {OPT} 00000001 00000005 'vm1@s' 2560")));
    let mut expected = hex("0000000004000000 050f");
    expected.put_bytes(0, 124);
    assert_eq!(out, expected);
    assert!(matches!(end, Ok(Progress::Transmission(Agreement { export: 1, read_only: true, .. }))), "{end:?}");
    assert_eq!(rest, hex("2560"), "what follows are requests");
    let end = transcript(&format!("{OPT} 00000001 00000003 'vm1'"), "0000000004000000 0d6d");
    assert!(matches!(end, Ok(Progress::Transmission(Agreement { framing: Framing::Simple, .. }))), "{end:?}");
}

#[test]
fn the_empty_name_is_the_only_export() {
    let go = format!("00000003 {OPT} 00000007 00000006 00000000 0000");
    let (_, end, _) = talk(&exports()[..1], hex(&go));
    assert!(matches!(end, Ok(Progress::Transmission(Agreement { export: 0, .. }))), "{end:?}");
    let (out, end, _) = talk(&exports(), hex(&go));
    assert!(matches!(end, Ok(Progress::NeedBytes(16))), "{end:?}");
    assert!(out.starts_with(&hex(&format!("{REP} 00000007 80000006"))), "{out:02x?}");
}

/// The type of the last reply to `options`, after structured replies were agreed on.
fn last_reply(options: &str) -> u32 {
    let (out, end, _) = talk(&exports(), hex(&format!("00000003 {OPT} 00000008 00000000 {options}")));
    assert!(matches!(end, Ok(Progress::NeedBytes(16))), "{end:?}");
    let mut at = 0;
    let word = |at: usize| u32::from_be_bytes(out[at..at + 4].try_into().unwrap());
    loop {
        let (kind, len) = (word(at + 12), word(at + 16) as usize);
        at += 20 + len;
        if at == out.len() {
            return kind;
        }
    }
}

#[test]
fn options_are_refused_one_by_one() {
    const UNSUP: u32 = 0x8000_0001;
    const INVALID: u32 = 0x8000_0003;
    const UNKNOWN: u32 = 0x8000_0006;
    const EXT_REQD: u32 = 0x8000_000a;
    let cases: &[(&str, u32)] = &[
        // STARTTLS, PEEK_EXPORT, an option of the future with data
        ("00000005 00000000", UNSUP),
        ("00000004 00000000", UNSUP),
        ("000000ff 00000003 'abc'", UNSUP),
        // data where none may be
        ("00000003 00000001 00", INVALID),
        ("00000005 00000001 00", INVALID),
        ("00000008 00000001 00", INVALID),
        ("0000000b 00000001 00", INVALID),
        // GO: too short, a name longer than the data, too few requests, something behind them, no UTF-8, NUL
        ("00000007 00000003 000000", INVALID),
        ("00000007 00000006 ffffffff 0000", INVALID),
        ("00000007 00000008 00000000 0002 0003", INVALID),
        ("00000007 00000008 00000000 0000 0003", INVALID),
        ("00000007 00000007 00000001 ff 0000", INVALID),
        ("00000007 00000007 00000001 00 0000", INVALID),
        ("00000007 00000007 00000001 'x' 0000", UNKNOWN),
        ("00000006 00000007 00000001 'x' 0000", UNKNOWN),
        // contexts: unknown export, lengths, more queries than data, no namespace
        ("0000000a 00000009 00000001 'x' 00000000", UNKNOWN),
        ("0000000a 0000000b 00000003 'vm1' ffffffff", INVALID),
        ("0000000a 00000010 00000003 'vm1' 00000001 00000005 'x'", INVALID),
        ("00000009 00000010 00000003 'vm1' 00000001 00000001 'x'", INVALID),
        // done: unknown context, wildcard, all
        ("0000000a 00000012 00000003 'vm1' 00000001 00000003 'x:y'", 1),
        ("00000009 00000014 00000003 'vm1' 00000001 00000005 'base:'", 1),
        ("00000009 0000000b 00000003 'vm1' 00000000", 1),
        ("0000000b 00000000", 1),
    ];
    for (option, kind) in cases {
        assert_eq!(last_reply(&format!("{OPT} {option}")), *kind, "{option}");
    }
    let extended = format!("{OPT} 0000000b 00000000");
    assert_eq!(last_reply(&format!("{extended} {OPT} 00000008 00000000")), EXT_REQD);
    assert_eq!(last_reply(&format!("{extended} {extended}")), INVALID);
}

#[test]
fn a_context_is_forgotten_by_a_choice_that_fails_and_holds_for_its_export() {
    let set = |name: &str| format!("{OPT} 0000000a 000000{:02x} 000000{:02x} '{name}' 00000001 0000000f 'base:allocation'", 27 + name.len(), name.len());
    let go = format!("{OPT} 00000007 00000009 00000003 'vm1' 0000");
    let structured = format!("00000003 {OPT} 00000008 00000000");
    let allocation = |options: &str| match talk(&exports(), hex(&format!("{structured} {options} {go}"))).1 {
        Ok(Progress::Transmission(agreed)) => !agreed.contexts.is_empty(),
        other => panic!("{other:?}"),
    };
    assert!(allocation(&set("vm1")));
    assert!(!allocation(&set("vm1@s")));
    assert!(!allocation(&format!("{} {}", set("vm1"), set("none"))));
    assert!(!allocation(&format!("{} {OPT} 0000000a 00000001 00", set("vm1"))));
    let (out, _, _) = talk(&exports(), hex(&format!("00000003 {}", set("vm1"))));
    assert!(out.starts_with(&hex(&format!("{REP} 0000000a 80000003"))), "contexts need structured replies");
}

#[test]
fn contexts_are_listed_by_namespace_and_chosen_by_name() {
    let option = |code: u32, queries: &[&str]| {
        let mut data = hex("00000005 'vm1@s'");
        data.put_u32(u32::try_from(queries.len()).unwrap());
        for query in queries {
            data.put_u32(u32::try_from(query.len()).unwrap());
            data.put_slice(query.as_bytes());
        }
        let mut all = hex(OPT);
        all.put_u32(code);
        all.put_u32(u32::try_from(data.len()).unwrap());
        all.put_slice(&data);
        all
    };
    let told = |code, queries: &[&str]| {
        let mut input = hex(&format!("00000003 {OPT} 00000008 00000000"));
        input.put_slice(&option(code, queries));
        input.put_slice(&hex(&format!("{OPT} 00000007 0000000b 00000005 'vm1@s' 0000")));
        let (out, end, _) = talk(&exports(), input);
        let Ok(Progress::Transmission(agreed)) = end else { panic!("{end:?}") };
        // Each reply to the option: its number and name.
        let (mut at, mut found) = (20, vec![]);
        while out[at + 8..at + 16] == [&code.to_be_bytes()[..], &[0, 0, 0, 4]].concat() {
            let len = u32::from_be_bytes(out[at + 16..at + 20].try_into().unwrap()) as usize;
            let id = u32::from_be_bytes(out[at + 20..at + 24].try_into().unwrap());
            found.push((id, String::from_utf8(out[at + 24..at + 20 + len].to_vec()).unwrap()));
            at += 20 + len;
        }
        (found, agreed.contexts)
    };
    let names = |code, queries: &[&str]| told(code, queries).0.into_iter().map(|(_, name)| name).collect::<Vec<_>>();
    let (list, set) = (9, 10);
    assert_eq!(names(list, &[]), ["base:allocation", "ogee:changed:a", "ogee:changed:b"]);
    for query in ["ogee:", "ogee:changed:"] {
        assert_eq!(names(list, &[query]), ["ogee:changed:a", "ogee:changed:b"]);
    }
    assert_eq!(names(list, &["base:", "ogee:changed:b", "qemu:"]), ["base:allocation", "ogee:changed:b"]);
    let (chosen, contexts) = told(set, &["ogee:changed:b", "ogee:changed:b", "base:allocation", "ogee:changed:none"]);
    assert_eq!(chosen, [(1, "base:allocation".to_owned()), (3, "ogee:changed:b".to_owned())]);
    assert_eq!(contexts, Contexts::ALLOCATION.with(2));
    assert_eq!(contexts.iter().collect::<Vec<_>>(), [0, 2]);
    assert!(told(set, &["ogee:changed:"]).1.is_empty(), "nothing is chosen by a namespace");
}

#[test]
fn every_end_of_a_handshake() {
    let end = |input: &str| talk(&exports(), hex(input)).1;
    assert_eq!(end("00000004"), Err(HandshakeError::ClientFlags { flags: 4 }));
    assert_eq!(end("00000003 4e42444d41474943 0000000100000000"), Err(HandshakeError::Magic { magic: 0x4e42_444d_4147_4943 }));
    let long = end(&format!("00000003 {OPT} 00000003 00010001"));
    assert_eq!(long, Err(HandshakeError::OptionTooLong { option: 3, len: 65537 }));
    let unknown = end(&format!("00000003 {OPT} 00000001 00000001 'x'"));
    assert_eq!(unknown, Err(HandshakeError::UnknownExport { name: "x".to_owned() }));
    let late = end(&format!("00000003 {OPT} 0000000b 00000000 {OPT} 00000001 00000003 'vm1'"));
    assert_eq!(late, Err(HandshakeError::ExportNameAfterExtended));
    let many = format!("{OPT} 00000003 00000000").repeat(1025);
    assert_eq!(end(&format!("00000003 {many}")), Err(HandshakeError::TooManyOptions));
}

/// A server with TLS: each part of the transcript is what a client sends, and exactly what it gets.
fn tls_transcript(offer: TlsOffer, parts: &[(&str, &str)]) -> Result<Progress, HandshakeError> {
    let mut handshake = Handshake::new(offer);
    let mut end = Ok(Progress::NeedBytes(4));
    for (sent, replies) in parts {
        let mut input = hex(sent);
        let (out, now) = go_on(&mut handshake, &exports(), &mut input);
        assert_eq!(out, hex(replies), "\nsent {sent}\n got {out:02x?}");
        end = now;
    }
    end
}

const FLAGS: &str = "00000003";
const REFUSED_WITHOUT_TLS: &str = "80000005 00000015 'this server wants TLS'";

#[test]
fn what_wants_tls_is_refused_before_it_and_answered_under_it() {
    let end = tls_transcript(
        TlsOffer::Demanded,
        &[
            (FLAGS, ""),
            // LIST, PEEK_EXPORT, INFO, GO, STRUCTURED_REPLY, contexts, EXTENDED_HEADERS, one of the future
            (
                &format!(
                    "{OPT} 00000003 00000000
                     {OPT} 00000004 00000000
                     {OPT} 00000006 00000009 00000003 'vm1' 0000
                     {OPT} 00000007 00000009 00000003 'vm1' 0000
                     {OPT} 00000008 00000000
                     {OPT} 00000009 0000000b 00000003 'vm1' 00000000
                     {OPT} 0000000a 0000001e 00000003 'vm1' 00000001 0000000f 'base:allocation'
                     {OPT} 0000000b 00000000
                     {OPT} 000000ff 00000003 'abc'"
                ),
                &[3, 4, 6, 7, 8, 9, 10, 11, 255].map(|code| format!("{REP} {code:08x} {REFUSED_WITHOUT_TLS}")).concat(),
            ),
            // Malformed ones, too: nothing is looked at.
            (&format!("{OPT} 00000007 00000001 00"), &format!("{REP} 00000007 {REFUSED_WITHOUT_TLS}")),
            (
                &format!("{OPT} 00000005 00000001 00"),
                &format!("{REP} 00000005 80000003 00000019 'this option takes no data'"),
            ),
            (&format!("{OPT} 00000005 00000000"), &format!("{REP} 00000005 00000001 00000000")),
            // Under TLS.
            (
                &format!("{OPT} 00000005 00000000"),
                &format!("{REP} 00000005 80000003 00000015 'TLS has begun already'"),
            ),
            (
                &format!("{OPT} 00000007 00000009 00000003 'vm1' 0000"),
                &format!(
                    "{REP} 00000007 00000003 0000000c 0000 0000000004000000 0d6d
                     {REP} 00000007 00000001 00000000"
                ),
            ),
        ],
    );
    assert_eq!(end, Ok(Progress::Transmission(agreed(Framing::Simple))));
}

#[test]
fn before_tls_a_client_may_leave_and_cannot_name_an_export() {
    let (abort, name) = (format!("{OPT} 00000002 00000000"), format!("{OPT} 00000001 00000003 'vm1'"));
    let left = tls_transcript(
        TlsOffer::Demanded,
        &[(FLAGS, ""), (&abort, &format!("{REP} 00000002 00000001 00000000"))],
    );
    assert_eq!(left, Ok(Progress::Aborted));
    let named = tls_transcript(TlsOffer::Demanded, &[(FLAGS, ""), (&name, "")]);
    assert_eq!(named, Err(HandshakeError::ExportNameWithoutTls));
    let starttls = format!("{OPT} 00000005 00000000");
    let ack = format!("{REP} 00000005 00000001 00000000");
    let under_tls = tls_transcript(
        TlsOffer::Demanded,
        &[(FLAGS, ""), (&starttls, &ack), (&name, "0000000004000000 0d6d")],
    );
    assert!(matches!(under_tls, Ok(Progress::Transmission(_))), "{under_tls:?}");
}

#[test]
fn what_was_agreed_on_in_the_clear_is_forgotten_under_tls() {
    let set = format!("{OPT} 0000000a 0000001e 00000003 'vm1' 00000001 0000000f 'base:allocation'");
    let go = format!("{OPT} 00000007 00000009 00000003 'vm1' 0000");
    let parts = |before: &str| {
        let mut handshake = Handshake::new(TlsOffer::Optional);
        let mut clear = hex(&format!("{FLAGS} {before} {OPT} 00000005 00000000"));
        assert_eq!(go_on(&mut handshake, &exports(), &mut clear).1, Ok(Progress::StartTls));
        let mut under_tls = hex(&format!("{set} {go}"));
        go_on(&mut handshake, &exports(), &mut under_tls)
    };
    for before in [String::new(), format!("{OPT} 00000008 00000000 {set}"), format!("{OPT} 0000000b 00000000 {set}")] {
        let (out, end) = parts(&before);
        assert!(out.starts_with(&hex(&format!("{REP} 0000000a 80000003"))), "contexts need structured replies: {out:02x?}");
        let Ok(Progress::Transmission(agreed)) = end else { panic!("{end:?}") };
        assert_eq!((agreed.framing, agreed.contexts), (Framing::Simple, Contexts::default()), "{before}");
    }
    // Without STARTTLS it goes on in the clear: nobody has to.
    let end = tls_transcript(
        TlsOffer::Optional,
        &[(FLAGS, ""), (&format!("{OPT} 00000001 00000003 'vm1'"), "0000000004000000 0d6d")],
    );
    assert!(matches!(end, Ok(Progress::Transmission(_))), "{end:?}");
}

#[test]
fn nothing_sent_in_the_clear_is_taken_as_if_it_had_come_under_tls() {
    for offer in [TlsOffer::Optional, TlsOffer::Demanded] {
        for behind in ["00".to_owned(), format!("{OPT} 00000007 00000009 00000003 'vm1' 0000")] {
            let bytes = hex(&behind).len();
            let injected = tls_transcript(offer, &[(FLAGS, ""), (&format!("{OPT} 00000005 00000000 {behind}"), "")]);
            assert_eq!(injected, Err(HandshakeError::ClearBehindStartTls { bytes }), "{offer:?}");
        }
    }
}

fn agreed(framing: Framing) -> Agreement {
    let contexts = if framing == Framing::Simple { Contexts::default() } else { Contexts::ALLOCATION };
    Agreement { export: 0, framing, contexts, size_bytes: 64 * MIB, read_only: false, sector_bytes: 512 }
}

#[test]
fn heads_of_requests() {
    let compact = hex("25609513 0001 0001 0102030405060708 0000000000001000 00000200");
    let head = RequestHead::decode(Framing::Structured, &compact).unwrap().unwrap();
    let expected =
        RequestHead { flags: 1, kind: 1, cookie: 0x0102_0304_0506_0708, offset: 4096, len: 512, payload_len: 512 };
    assert_eq!(head, expected);
    assert_eq!(RequestHead::decode(Framing::Structured, &compact[..27]), Ok(None));
    let wrong = RequestError::Magic { magic: 0x2560_9513, expected: 0x21e4_1c71 };
    assert_eq!(RequestHead::decode(Framing::Extended, &compact), Err(wrong));
    let extended = hex("21e41c71 0020 0001 0000000000000001 0000000000001000 0000000000000200");
    let head = RequestHead::decode(Framing::Extended, &extended).unwrap().unwrap();
    assert_eq!((head.payload_len, head.len), (512, 512));
    let qemu = hex("21e41c71 0000 0001 0000000000000001 0000000000001000 0000000000000200");
    let head = RequestHead::decode(Framing::Extended, &qemu).unwrap().unwrap();
    assert_eq!(head.payload_len, 512, "a write has a payload with or without the flag");
    let trim = hex("21e41c71 0000 0004 0000000000000001 0000000000000000 0000010000000000");
    let head = RequestHead::decode(Framing::Extended, &trim).unwrap().unwrap();
    assert_eq!((head.payload_len, head.len), (0, 1 << 40));
    let long = hex("25609513 0000 0001 0000000000000001 0000000000000000 02000001");
    assert_eq!(RequestHead::decode(Framing::Simple, &long), Err(RequestError::PayloadTooLong { len: 0x0200_0001 }));
}

/// What a request of this type comes to.
fn asked(framing: Framing, kind: u16, flags: u16, offset: u64, len: u64) -> Result<Command, Errno> {
    let head = RequestHead { flags, kind, cookie: 1, offset, len, payload_len: 0 };
    check(&head, &agreed(framing)).map_err(|refusal| refusal.errno)
}

#[test]
fn requests_are_checked_before_anything_is_done() {
    use Framing::{Extended, Simple, Structured};
    let end = 64 * MIB;
    assert_eq!(asked(Simple, 0, 0, 512, 512), Ok(Command::Read { offset: 512, len: 512, one_chunk: false }));
    assert_eq!(asked(Structured, 0, 4, 0, 512), Ok(Command::Read { offset: 0, len: 512, one_chunk: true }));
    assert_eq!(asked(Simple, 0, 4, 0, 512), Err(Errno::Inval), "DF needs structured replies");
    assert_eq!(asked(Simple, 0, 0, 0, 33 * MIB), Err(Errno::Overflow));
    assert_eq!(asked(Simple, 0, 0, end, 512), Err(Errno::Inval));
    assert_eq!(asked(Simple, 0, 0, u64::MAX - 511, 1024), Err(Errno::Inval));
    assert_eq!(asked(Simple, 0, 0, 1, 512), Err(Errno::Inval));
    assert_eq!(asked(Simple, 0, 0, 0, 511), Err(Errno::Inval));
    assert_eq!(asked(Simple, 0, 0, 0, 0), Err(Errno::Inval));
    assert_eq!(asked(Simple, 1, 1, 0, 512), Ok(Command::Write { offset: 0 }));
    assert_eq!(asked(Simple, 1, 0, end - 512, 1024), Err(Errno::NoSpc));
    assert_eq!(asked(Simple, 1, 0x20, 0, 512), Err(Errno::Inval));
    assert_eq!(asked(Extended, 1, 0x20, 0, 512), Ok(Command::Write { offset: 0 }));
    assert_eq!(asked(Extended, 1, 0, 0, 512), Ok(Command::Write { offset: 0 }), "QEMU's client");
    assert_eq!(asked(Extended, 0, 0x20, 0, 512), Err(Errno::Inval));
    assert_eq!(asked(Simple, 2, 0xffff, 9, 9), Ok(Command::Disconnect));
    assert_eq!(asked(Simple, 3, 1, 0, 0), Ok(Command::Flush));
    assert_eq!(asked(Simple, 3, 0, 512, 0), Err(Errno::Inval));
    assert_eq!(asked(Simple, 4, 1, 0, end), Ok(Command::Trim { offset: 0, len: end }));
    assert_eq!(asked(Simple, 4, 0, 0, end + 512), Err(Errno::Inval));
    assert_eq!(asked(Simple, 5, 0, 0, end), Ok(Command::Cache { offset: 0, len: end }));
    assert_eq!(asked(Simple, 5, 2, 0, end), Err(Errno::Inval));
    let zeroes = |allocate| Ok(Command::WriteZeroes { offset: 0, len: end, allocate });
    assert_eq!(asked(Simple, 6, 0, 0, end), zeroes(false));
    assert_eq!(asked(Simple, 6, 2, 0, end), zeroes(true));
    assert_eq!(asked(Simple, 6, 16, 0, end), zeroes(false));
    assert_eq!(asked(Simple, 6, 18, 0, end), Err(Errno::NotSup));
    assert_eq!(asked(Simple, 6, 0, 0, end + 512), Err(Errno::NoSpc));
    assert_eq!(asked(Structured, 7, 8, 0, end), Ok(Command::BlockStatus { offset: 0, len: end, one: true, contexts: Contexts::ALLOCATION }));
    assert_eq!(asked(Simple, 7, 0, 0, end), Err(Errno::Inval), "no context");
    assert_eq!(asked(Simple, 8, 0, 0, 512), Err(Errno::Inval));
    let read_only = Agreement { read_only: true, ..agreed(Simple) };
    for kind in [1, 4, 6] {
        let head = RequestHead { flags: 0, kind, cookie: 1, offset: 0, len: 512, payload_len: 0 };
        assert_eq!(check(&head, &read_only).map_err(|r| r.errno), Err(Errno::Perm));
    }
}

#[test]
fn large_sectors_are_said_and_asked_for() {
    let large = [ExportInfo { sector_bytes: 4096, ..export("vm1", false) }];
    let (out, end, _) = talk(&large, hex(&format!("00000003 {OPT} 00000007 0000000b 00000003 'vm1' 0001 0003")));
    let replies = format!(
        "{REP} 00000007 00000003 0000000c 0000 0000000004000000 0d6d
         {REP} 00000007 00000003 0000000e 0003 00001000 00001000 02000000
         {REP} 00000007 00000001 00000000"
    );
    assert_eq!(out, hex(&replies), "got {out:02x?}");
    let Ok(Progress::Transmission(agreed)) = end else { panic!("{end:?}") };
    for kind in [0, 1, 4, 5, 6] {
        let head = |offset, len| RequestHead { flags: 0, kind, cookie: 1, offset, len, payload_len: 0 };
        assert!(check(&head(4096, 8192), &agreed).is_ok());
        for (offset, len) in [(512, 4096), (0, 512), (4096, 4608)] {
            assert_eq!(check(&head(offset, len), &agreed).map_err(|r| r.errno), Err(Errno::Inval), "{offset} {len}");
        }
    }
}

fn reply(framing: Framing, outcome: Outcome) -> Vec<u8> {
    let mut replies = Replies::new(framing);
    replies.push(ReplyTo { cookie: 0xc00c, offset: 512 }, outcome);
    let mut out = vec![];
    while replies.bytes() > 0 {
        // Sent in odd parts, as a slow socket would take it.
        let part: Vec<u8> = replies.slices().iter().flat_map(|slice| slice.to_vec()).take(5).collect();
        replies.sent(part.len());
        out.extend(part);
    }
    out
}

fn pieces(pieces: &[ReadPiece]) -> ReadData {
    ReadData { pieces: pieces.iter().cloned().collect() }
}

#[test]
fn replies_as_they_go_over_the_wire() {
    use Framing::{Extended, Simple, Structured};
    let data = |text: &'static str| ReadPiece::Data(Bytes::from_static(text.as_bytes()));
    let mixed = |one_chunk| Outcome::Read { data: pieces(&[data("ab"), data("cd"), ReadPiece::Zeros(3), data("e")]), one_chunk };
    let refused = || Outcome::Failed(Refusal { errno: Errno::NoSpc, reason: "no" });
    let is = |framing, outcome, expected: &str| {
        let got = reply(framing, outcome);
        assert_eq!(got, hex(expected).to_vec(), "{framing:?} {got:02x?}");
    };
    is(Simple, Outcome::Done, "67446698 00000000 000000000000c00c");
    is(Structured, Outcome::Done, "67446698 00000000 000000000000c00c");
    is(Extended, Outcome::Done, "6e8a278c 0001 0000 000000000000c00c 0000000000000200 0000000000000000");
    is(Simple, refused(), "67446698 0000001c 000000000000c00c");
    is(Structured, refused(), "668e33ef 0001 8001 000000000000c00c 00000008 0000001c 0002 'no'");
    is(
        Extended,
        refused(),
        "6e8a278c 0001 8001 000000000000c00c 0000000000000200 0000000000000008 0000001c 0002 'no'",
    );
    is(Simple, mixed(false), "67446698 00000000 000000000000c00c 'abcd' 000000 'e'");
    is(
        Structured,
        mixed(false),
        "668e33ef 0000 0001 000000000000c00c 0000000c 0000000000000200 'abcd'
         668e33ef 0000 0002 000000000000c00c 0000000c 0000000000000204 00000003
         668e33ef 0001 0001 000000000000c00c 00000009 0000000000000207 'e'",
    );
    is(Structured, mixed(true), "668e33ef 0001 0001 000000000000c00c 00000010 0000000000000200 'abcd' 000000 'e'");
    let zeros = Outcome::Read { data: pieces(&[ReadPiece::Zeros(2), ReadPiece::Zeros(3)]), one_chunk: true };
    is(
        Extended,
        zeros,
        "6e8a278c 0001 0002 000000000000c00c 0000000000000200 000000000000000c 0000000000000200 00000005",
    );
    let allocation = vec![StatusExtent { len: 4096, flags: 3 }, StatusExtent { len: 1 << 33, flags: 0 }];
    let extents = || Outcome::Extents(vec![ContextExtents { id: 1, extents: allocation.clone() }]);
    is(
        Structured,
        extents(),
        "668e33ef 0001 0005 000000000000c00c 00000014 00000001 00001000 00000003 fffff000 00000000",
    );
    is(
        Extended,
        extents(),
        "6e8a278c 0001 0006 000000000000c00c 0000000000000200 0000000000000028 00000001 00000002
         0000000000001000 0000000000000003 0000000200000000 0000000000000000",
    );
    let of = |id, flags| ContextExtents { id, extents: vec![StatusExtent { len: 512, flags }] };
    let two = || Outcome::Extents(vec![of(1, 0), of(3, 1)]);
    is(
        Structured,
        two(),
        "668e33ef 0000 0005 000000000000c00c 0000000c 00000001 00000200 00000000
         668e33ef 0001 0005 000000000000c00c 0000000c 00000003 00000200 00000001",
    );
    is(
        Extended,
        two(),
        "6e8a278c 0000 0006 000000000000c00c 0000000000000200 0000000000000018 00000001 00000001 0000000000000200 0000000000000000
         6e8a278c 0001 0006 000000000000c00c 0000000000000200 0000000000000018 00000003 00000001 0000000000000200 0000000000000001",
    );
}

/// Options that mostly parse, and garbage.
fn option_bytes() -> impl Strategy<Value = Vec<u8>> {
    let data = prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..64),
        Just(hex("00000003 'vm1' 0000").to_vec()),
        Just(hex("00000003 'vm1' 00000001 0000000f 'base:allocation'").to_vec()),
        Just(vec![]),
    ];
    let code = prop_oneof![Just(option::LIST), Just(option::INFO), Just(option::STARTTLS), 3_u32..12, any::<u32>()];
    let framed = (code, data).prop_map(|(code, data)| {
        let mut out = BytesMut::new();
        out.put_slice(&hex(OPT));
        out.put_u32(code);
        out.put_u32(u32::try_from(data.len()).unwrap());
        out.put_slice(&data);
        out.to_vec()
    });
    prop_oneof![9 => framed, 1 => proptest::collection::vec(any::<u8>(), 0..40)]
}

proptest! {
    /// Whatever comes, the handshake ends or wants more; and how the bytes are cut does not matter.
    #[test]
    fn handshakes_of_any_bytes(options in proptest::collection::vec(option_bytes(), 0..12), cut in 1_usize..40) {
        let mut all = BytesMut::from(&[0, 0, 0, 3][..]);
        options.iter().for_each(|option| all.put_slice(option));
        let (out, end, rest) = talk(&exports(), all.clone());
        let mut handshake = Handshake::new(TlsOffer::Absent);
        let (mut input, mut cut_out) = (BytesMut::new(), BytesMut::new());
        let mut parts = all.chunks(cut);
        let cut_end = loop {
            match handshake.advance(&exports(), &mut input, &mut cut_out) {
                Ok(Progress::Replied) => {}
                Ok(Progress::NeedBytes(more)) => {
                    prop_assert!(more > 0);
                    match parts.next() {
                        Some(part) => input.put_slice(part),
                        None => break Ok(Progress::NeedBytes(more)),
                    }
                }
                end => break end,
            }
        };
        parts.for_each(|part| input.put_slice(part));
        prop_assert_eq!((out, end, rest), (cut_out, cut_end, input));
    }

    /// Where TLS is demanded nothing is learned in the clear, whatever comes.
    #[test]
    fn nothing_is_served_before_tls(options in proptest::collection::vec(option_bytes(), 0..12)) {
        let mut handshake = Handshake::new(TlsOffer::Demanded);
        let mut input = BytesMut::from(&[0, 0, 0, 3][..]);
        for option in options {
            input.put_slice(&option);
            let (out, end) = go_on(&mut handshake, &exports(), &mut input);
            prop_assert!(!matches!(end, Ok(Progress::Transmission(_))));
            let clear = String::from_utf8_lossy(&out);
            prop_assert!(!clear.contains("vm1") && !clear.contains("base:"));
            if !matches!(end, Ok(Progress::NeedBytes(_))) {
                break;
            }
        }
    }

    /// No head makes the decoder or the check panic, and what passes lies inside the export.
    #[test]
    fn requests_of_any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..40), magic in 0..3, kind in 0_u16..10) {
        let mut bytes = bytes;
        for framing in [Framing::Simple, Framing::Structured, Framing::Extended] {
            if bytes.len() >= 8 && magic > 0 {
                let word: u32 = if framing == Framing::Extended { 0x21e4_1c71 } else { 0x2560_9513 };
                bytes[..4].copy_from_slice(&word.to_be_bytes());
                bytes[6..8].copy_from_slice(&kind.to_be_bytes());
            }
            let Ok(Some(head)) = RequestHead::decode(framing, &bytes) else { continue };
            prop_assert!(head.payload_len <= 32 << 20);
            if let Ok(command) = check(&head, &agreed(framing)) {
                let ends = matches!(command, Command::Disconnect | Command::Flush);
                prop_assert!(ends || head.offset + head.len <= 64 * MIB);
            }
        }
    }

    /// Every way to cut a read into pieces gives the same bytes, and chunks that add up.
    #[test]
    fn reads_are_whole(lens in proptest::collection::vec((any::<bool>(), 0_u32..200_000), 1..8), one_chunk: bool) {
        let piece = |(is_hole, len): &(bool, u32)| if *is_hole {
            ReadPiece::Zeros(*len)
        } else {
            ReadPiece::Data(Bytes::from(vec![7; *len as usize]))
        };
        let data = pieces(&lens.iter().map(piece).collect::<Vec<_>>());
        prop_assume!(!data.is_empty());
        let expected = data.to_vec();
        let mut queue = Replies::new(Framing::Structured);
        queue.push(ReplyTo { cookie: 1, offset: 0 }, Outcome::Read { data, one_chunk });
        let mut out = BytesMut::new();
        while queue.bytes() > 0 {
            let part: Vec<u8> = queue.slices().iter().flat_map(|slice| slice.to_vec()).collect();
            queue.sent(part.len());
            out.put_slice(&part);
        }
        let (mut got, mut at, mut chunks, mut done) = (vec![], 0, 0, false);
        while at < out.len() {
            prop_assert!(!done);
            done = out[at + 5] == 1;
            let len = u32::from_be_bytes(out[at + 16..at + 20].try_into().unwrap()) as usize;
            let body = &out[at + 20..at + 20 + len];
            prop_assert_eq!(u64::from_be_bytes(body[..8].try_into().unwrap()), got.len() as u64);
            if out[at + 7] == 1 {
                got.extend_from_slice(&body[8..]);
            } else {
                let zeros = u32::from_be_bytes(body[8..12].try_into().unwrap()) as usize;
                got.resize(got.len() + zeros, 0);
            }
            at += 20 + len;
            chunks += 1;
        }
        prop_assert!(done && (!one_chunk || chunks == 1));
        prop_assert_eq!(got, expected);
    }
}
