//! Golden lines of the control socket, and lines that nobody should send.

use super::*;
use crate::vhost_many::spec::tests::spec;
use proptest::prelude::*;

fn usage(line: &[u8]) -> String {
    let refusal = parse_request(line).expect_err("not a request");
    assert_eq!(refusal.kind, ErrorKind::Usage);
    assert!(!refusal.message.contains('\n'), "{refusal:?}");
    refusal.message
}

#[test]
fn lines_are_these() {
    let attach = |steal| Request::Attach(Attach { spec: spec("team/a", "/run/ogee/a.sock"), steal });
    let detach = |of, force| Request::Detach(Detach { of, force });
    let golden = [
        (
            attach(false),
            r#"{"version":1,"request":{"attach":{"spec":{"volume":"team/a","socket":"/run/ogee/a.sock","read_only":false,"queues":2},"steal":false}}}"#,
        ),
        (detach(Which::Volume("a".to_owned()), false), r#"{"version":1,"request":{"detach":{"of":{"volume":"a"},"force":false}}}"#),
        (detach(Which::Socket("/s".into()), true), r#"{"version":1,"request":{"detach":{"of":{"socket":"/s"},"force":true}}}"#),
        (Request::List, r#"{"version":1,"request":"list"}"#),
        (Request::Stats, r#"{"version":1,"request":"stats"}"#),
    ];
    for (request, line) in golden {
        assert_eq!(request_line(request.clone()).expect("a line"), format!("{line}\n"));
        assert_eq!(parse_request(line.as_bytes()).expect("read again"), request);
        assert_eq!(parse_request(format!("{line}\r\n").as_bytes()).expect("with its end"), request);
    }
    let short = br#"{"version":1,"request":{"attach":{"spec":{"volume":"team/a","socket":"/s"}}}}"#;
    let Request::Attach(Attach { spec, steal: false }) = parse_request(short).expect("defaults") else { panic!("an attach") };
    assert_eq!((spec.queues, spec.read_only), (ogee_vhost_blk::NUM_QUEUES_DEFAULT, false));
}

#[test]
fn answers_are_these() {
    let error = Reply::Error(Refusal::new(ErrorKind::Conflict, "a \"b\"\n"));
    assert_eq!(reply_line(error.clone()), "{\"version\":1,\"reply\":{\"error\":{\"kind\":\"conflict\",\"message\":\"a \\\"b\\\"\\n\"}}}\n");
    let refused = parse_reply(reply_line(error).as_bytes()).expect_err("an error");
    assert_eq!(refused.kind(), ErrorKind::Conflict);
    let listed = Listed {
        volume: "a".to_owned(),
        socket: "/s".into(),
        read_only: true,
        state: Phase::Waiting,
        connected: false,
        queues: 8,
        size_bytes: 0,
        since_unix_ms: 0,
        reason: Some("why".to_owned()),
    };
    let kind = KindFigures { kind: "read".to_owned(), ios: 1, errors: 0, bytes: 512, latency_us_log2: vec![0, 1] };
    let figures = Figures {
        volume: "a".to_owned(),
        socket: "/s".into(),
        connections: 1,
        resubmitted: 2,
        in_flight: 3,
        throttled: 4,
        kinds: vec![kind],
    };
    for reply in [Reply::Done, Reply::List(vec![listed]), Reply::Stats(vec![figures])] {
        assert_eq!(parse_reply(reply_line(reply.clone()).as_bytes()).expect("read again"), reply);
    }
    assert_eq!(reply_line(Reply::Done), "{\"version\":1,\"reply\":\"done\"}\n");
    for bad in ["", "{}", "{\"version\":2,\"reply\":\"done\"}", "{\"version\":1}", "{\"version\":1,\"reply\":\"later\"}"] {
        assert_eq!(parse_reply(bad.as_bytes()).expect_err(bad).kind(), ErrorKind::Failure, "{bad}");
    }
    let newer = br#"{"version":1,"reply":{"error":{"kind":"weather","message":"rain"}}}"#;
    assert_eq!(parse_reply(newer).expect_err("an error").kind(), ErrorKind::Failure);
}

#[test]
fn what_is_no_request_is_refused_with_a_reason() {
    for (line, word) in [
        ("", "EOF"),
        ("\n", "EOF"),
        ("attach vm1", "expected"),
        ("{\"version\":1}", "request"),
        ("{\"request\":\"list\"}", "version"),
        ("{\"version\":2,\"request\":\"fly\",\"x\":1}", "speaks version 1"),
        ("{\"version\":-1,\"request\":\"list\"}", "invalid"),
        ("{\"version\":1,\"request\":\"fly\"}", "fly"),
        ("{\"version\":1,\"request\":\"list\",\"more\":1}", "more"),
        ("{\"version\":1,\"request\":\"list\"} {}", "trailing"),
        ("{\"version\":1,\"request\":{\"attach\":{}}}", "spec"),
        ("{\"version\":1,\"request\":{\"attach\":{\"spec\":{\"volume\":\"a\",\"socket\":\"/s\",\"colour\":1}}}}", "colour"),
        ("{\"version\":1,\"request\":{\"attach\":{\"spec\":{\"volume\":\"a\",\"socket\":\"/s\",\"queues\":65536}}}}", "65536"),
        ("{\"version\":1,\"request\":{\"detach\":{\"of\":{\"uuid\":\"a\"}}}}", "uuid"),
    ] {
        let message = usage(line.as_bytes());
        assert!(message.contains(word), "{line}: {message}");
    }
    usage(b"{\"version\":1,\"request\":\"\xff\"}");
    usage("[".repeat(60_000).as_bytes());
    assert!(usage(&vec![b' '; VHOST_CONTROL_LINE_BYTES_MAX + 1]).contains("longer"));
}

proptest! {
    #[test]
    fn no_bytes_are_too_much(line in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = parse_request(&line);
        let _ = parse_reply(&line);
    }

    #[test]
    fn nor_are_damaged_lines(at in 0_usize..120, byte in any::<u8>()) {
        let mut line = request_line(Request::Attach(Attach { spec: spec("team/a", "/run/a"), steal: true })).expect("a line").into_bytes();
        let at = at % line.len();
        line[at] = byte;
        if let Ok(Request::Attach(attach)) = parse_request(&line) {
            let _ = attach.spec.check();
        }
    }
}
