//! Rules of the repository that a test can check: see `docs/STYLE.md`.

use std::fs;
use std::path::{Path, PathBuf};

/// Production lines of a file; more than this no one holds in the head.
const FILE_LINES_MAX: usize = 800;
/// Folders whose paths documents name.
const FOLDERS: [&str; 13] = [
    "common", "proto", "client-sdk", "vhost-blk", "nbd", "snapclone", "server", "cli", "vm-tests", "docs", "scripts", "packaging", ".ci",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the workspace").to_owned()
}

fn files(dir: &Path, extension: &str, out: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("a readable folder") {
        let path = entry.expect("a readable entry").path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if path.is_dir() {
            if !matches!(name, "target" | ".git" | "corpus" | "artifacts") {
                files(&path, extension, out);
            }
        } else if path.extension().is_some_and(|e| e == extension) {
            out.push(path);
        }
    }
}

/// Every source file: its path from the root, and its text.
fn sources() -> Vec<(String, String)> {
    let mut paths = vec![];
    files(&root(), "rs", &mut paths);
    let text = |p: &PathBuf| {
        let name = p.strip_prefix(root()).expect("below the root").to_string_lossy().into_owned();
        (name, fs::read_to_string(p).expect("UTF-8"))
    };
    let mut all: Vec<_> = paths.iter().map(text).filter(|(name, _)| !name.ends_with("tidy.rs")).collect();
    all.sort();
    assert!(all.len() > 50, "the walk found only {} files", all.len());
    all
}

fn production_lines(text: &str) -> usize {
    text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default().lines().count()
}

fn report(what: &str, bad: &[String]) {
    assert!(bad.is_empty(), "{what}:\n  {}", bad.join("\n  "));
}

#[test]
fn every_file_says_what_it_is() {
    let bad: Vec<_> = sources().into_iter().filter(|(_, t)| !t.starts_with("//!")).map(|(n, _)| n).collect();
    report("files without module documentation", &bad);
}

#[test]
fn no_file_is_too_big() {
    let too_big = |(n, t): &(String, String)| !n.contains("/tests") && production_lines(t) > FILE_LINES_MAX;
    let bad: Vec<_> = sources().into_iter().filter(too_big).map(|(n, _)| n).collect();
    report("files too big to hold in the head", &bad);
}

#[test]
fn third_party_engines_are_named_in_one_place() {
    let homes = [("openraft::", "server/raft/"), ("rocksdb::", "server/disk/"), ("io_uring::", "server/disk/")];
    let mut bad = vec![];
    for (name, text) in sources() {
        for (engine, home) in homes {
            if !name.starts_with(home) && text.contains(engine) {
                bad.push(format!("{name} names {engine}"));
            }
        }
    }
    report("an engine outside its home", &bad);
}

#[test]
fn unsafe_code_is_contained() {
    // A test that drives a foreign library, whose interface takes raw memory; a test that stands in for two functions of the C library.
    let homes = [
        "server/disk/src/io.rs",
        "vhost-blk/src/handover/exchange.rs",
        "vhost-blk/tests/independent_driver.rs",
        "vm-tests/tests/sim/entropy.rs",
    ];
    let allows = |text: &str| {
        let allowing = |l: &str| l.starts_with("#![allow(unsafe_code)") || l.starts_with("#[allow(unsafe_code)");
        text.lines().any(|l| allowing(l.trim_start()))
    };
    let elsewhere = |(n, t): &(String, String)| allows(t) && !homes.contains(&n.as_str());
    let bad: Vec<_> = sources().into_iter().filter(elsewhere).map(|(n, _)| n).collect();
    report("files that allow unsafe code", &bad);
}

#[test]
fn only_the_simulation_switches_itself_on() {
    let switches = ["sim::plant(", "sim::set_ns(", "use_wire(Some", "ogee_disk::simulate("];
    let elsewhere = |(n, t): &(String, String)| !n.starts_with("vm-tests/tests/sim/") && switches.iter().any(|s| t.contains(s));
    let bad: Vec<_> = sources().into_iter().filter(elsewhere).map(|(n, _)| n).collect();
    report("files that switch the simulation on", &bad);
}

#[test]
fn every_queue_is_bounded_and_no_test_is_ignored() {
    let mut bad = vec![];
    for (name, text) in sources() {
        for (i, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            if code.contains("unbounded_channel") || code.contains("#[ignore") {
                bad.push(format!("{name}:{}: {}", i + 1, line.trim()));
            }
        }
    }
    report("unbounded channels or ignored tests", &bad);
}

/// The tests of `vm-tests` are named one by one in the Makefile: one that is not named never runs.
#[test]
fn the_gate_runs_every_test_of_processes_and_guests() {
    let makefile = fs::read_to_string(root().join("Makefile")).expect("a Makefile");
    let named: Vec<&str> = makefile.split_whitespace().collect();
    let runs = |name: &str| named.windows(2).any(|w| w == ["--test", name]);
    let of = |n: &str| Some(n.strip_prefix("vm-tests/tests/")?.split(['.', '/']).next()?.to_owned());
    let tests: std::collections::BTreeSet<String> = sources().iter().filter_map(|(n, _)| of(n)).collect();
    assert!(tests.len() > 15, "only {} tests were found", tests.len());
    report("tests that the Makefile does not name", &tests.into_iter().filter(|name| !runs(name)).collect::<Vec<_>>());
}

#[test]
fn paths_named_in_documents_exist() {
    let mut documents = vec![];
    files(&root(), "md", &mut documents);
    let mut bad = vec![];
    for document in documents.into_iter().filter(|d| !d.ends_with("STYLE.md")) {
        let text = fs::read_to_string(&document).expect("UTF-8");
        for quoted in text.split('`').skip(1).step_by(2) {
            let plain = !quoted.contains(|c: char| c.is_whitespace() || "<>{}*$~:@=|".contains(c));
            let ours = quoted.contains('/') && FOLDERS.contains(&quoted.split('/').next().unwrap_or_default());
            if plain && ours && !root().join(quoted).exists() {
                bad.push(format!("{}: {quoted}", document.strip_prefix(root()).expect("below the root").display()));
            }
        }
    }
    report("documents name paths that do not exist", &bad);
}
