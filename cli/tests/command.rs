//! The built `ogee` binary: what it says, where, and with which exit code. No cluster is needed: an MDS that answers as
//! told stands in where one must.

use serde_json::Value;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// `ogee` in an empty environment and folder, so that no cluster of the developer is found.
fn ogee(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ogee"));
    command.args(args).current_dir(dir).stdin(Stdio::null());
    for variable in ["OGEE_MDS", "OGEE_DIR", "OGEE_LOG", "OGEE_DETACH"] {
        command.env_remove(variable);
    }
    command
}

fn run(args: &[&str]) -> Output {
    let dir = tempfile::tempdir().expect("a folder");
    ogee(dir.path(), args).output().expect("ogee runs")
}

/// Runs a command that must fail with `code`, and gives its one line.
fn refused(args: &[&str], code: i32) -> String {
    one_line(&run(args), args, code)
}

fn one_line(done: &Output, args: &[&str], code: i32) -> String {
    let stderr = String::from_utf8(done.stderr.clone()).expect("UTF-8");
    assert_eq!(done.status.code(), Some(code), "ogee {args:?}: {stderr}");
    assert!(done.stdout.is_empty(), "ogee {args:?} prints nothing when it fails");
    assert_eq!(stderr.lines().count(), 1, "ogee {args:?}: {stderr:?}");
    stderr.trim_end().to_owned()
}

/// An address on which nobody listens.
fn dead_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
    listener.local_addr().expect("an address").to_string()
}

#[test]
fn wrong_usage_is_one_line_and_code_2() {
    let cases: &[(&[&str], &str)] = &[
        (&[], "ogee --help"),
        (&["frobnicate"], "frobnicate"),
        (&["volume", "create", "a"], "--size"),
        (&["volume", "create", "a", "--size", "12Q"], "12Q"),
        (&["volume", "info", "a b"], "' ' is not allowed"),
        (&["snapshot", "create", "a"], "volume@snapshot"),
        (&["status", "--mds", "nonsense"], "nonsense"),
        (&["status"], "ogee dev up"),
    ];
    for (args, word) in cases {
        let line = refused(args, 2);
        assert!(line.starts_with("ogee: ") && line.contains(word), "ogee {args:?}: {line}");
    }
}

#[test]
fn errors_are_json_when_asked_for() {
    for args in [&["volume", "create", "--json", "a"][..], &["status", "--json"]] {
        let line = refused(args, 2);
        let error: Value = serde_json::from_str(&line).expect("one JSON object");
        assert_eq!(error["error"]["kind"], "usage", "{line}");
        assert_eq!(error["error"]["exit_code"], 2);
        assert!(error["error"]["message"].as_str().is_some_and(|m| !m.is_empty()));
    }
}

#[test]
fn help_and_version_are_on_standard_output() {
    for args in [&["--help"][..], &["--version"], &["dev", "up", "--help"], &["help", "clone"]] {
        let done = run(args);
        assert!(done.status.success() && done.stderr.is_empty() && !done.stdout.is_empty(), "{args:?}: {done:?}");
    }
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut child = ogee(dir.path(), &["--help"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("ogee runs");
    drop(child.stdout.take());
    let done = child.wait_with_output().expect("waited");
    assert!(done.status.success() && done.stderr.is_empty(), "{done:?}");
}

#[test]
fn a_missing_image_and_a_bad_one_are_told_before_a_cluster_is_asked() {
    let dir = tempfile::tempdir().expect("a folder");
    let dead = dead_address();
    let import = |file: &str, extra: &[&str], code| {
        let mut args = vec!["image", "import", file, "golden", "--mds", &dead];
        args.extend(extra);
        one_line(&ogee(dir.path(), &args).output().expect("ogee runs"), &args, code)
    };
    let line = import("missing.raw", &[], 3);
    assert!(line.contains("missing.raw") && line.contains("No such file"), "{line}");
    std::fs::write(dir.path().join("bad"), b"QFI\xfb and then nonsense").expect("written");
    assert!(import("bad", &[], 2).contains("qcow2"), "by its first bytes");
    std::fs::write(dir.path().join("raw"), vec![1; 2 << 20]).expect("written");
    assert!(import("raw", &["--format", "qcow2"], 2).contains("not a qcow2 image"));
    assert!(import("raw", &["--size", "1M"], 2).contains("too small"));
    assert!(import(".", &[], 2).contains("neither a regular file nor a block device"));
}

#[test]
fn a_dead_cluster_is_code_5_and_says_what_to_do() {
    let line = refused(&["volume", "info", "golden", "--mds", &dead_address()], 5);
    assert!(line.contains("volume golden") && line.contains("ogee dev status"), "{line}");
}

#[test]
fn dev_commands_need_a_dev_folder() {
    for command in ["status", "down"] {
        let line = refused(&["dev", command, "--dir", "nowhere"], 3);
        assert!(line.contains("nowhere") && line.contains("ogee dev up"), "{line}");
    }
    assert!(refused(&["volume", "ls", "--dir", "nowhere"], 3).contains("nowhere"));
    assert!(refused(&["dev", "destroy", "--dir", "nowhere"], 2).contains("--yes"));
}

#[test]
fn dev_up_tells_whose_port_is_taken_and_leaves_nothing_running() {
    let dir = tempfile::tempdir().expect("a folder");
    let foreign = TcpListener::bind("127.0.0.1:0").expect("bound");
    let taken = foreign.local_addr().expect("an address");
    let other = dead_address();
    let record = format!("mds = [\"{taken}\"]\nchunkservers = [\"{other}\"]\n");
    std::fs::write(dir.path().join("dev.toml"), record).expect("written");
    let args = ["dev", "up", "--dir", "."];
    let line = one_line(&ogee(dir.path(), &args).output().expect("ogee runs"), &args, 4);
    assert!(line.contains("mds-1") && line.contains(&taken.to_string()), "{line}");
    assert!(!dir.path().join("cs-1/pid").exists());
}

#[test]
fn a_daemon_without_a_good_configuration_says_so() {
    for daemon in ["mds", "chunkserver"] {
        let line = refused(&[daemon, "--config", "missing.toml"], 2);
        assert!(line.contains("missing.toml"), "{line}");
    }
}
