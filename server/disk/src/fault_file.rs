//! A fault plan that follows a file: how a torture of real processes makes one disk fail while the process runs.
//!
//! The file is named by the environment variable [`FAULTS_VARIABLE`] and has one rule a line (`#` begins a comment):
//!
//! ```text
//! OPERATION PATH-PART SKIP TIMES FAULT
//! sync - 0 1 errno:5            # the next flush of anything fails with EIO
//! write segment- 3 1 torn:512       # the fourth log write from now stores a sector and is short
//! sync segment- 0 always delay:100  # every log write takes 100 ms longer
//! ```
//!
//! Invariants: a process without the variable has no plan and never looks at it; one with it says so loudly when it starts, and
//! looks at the file every 20 ms; a file that changed replaces all rules, one that is missing means none, one that cannot be
//! understood keeps those that hold and says why. Not for production: it makes a healthy disk lie.

use crate::fault::{DiskOp, Fault, FaultPlan, FaultRule};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// Names the file with the faults of this process's disk.
pub const FAULTS_VARIABLE: &str = "OGEE_DISK_FAULTS";

const LOOK_PAUSE: Duration = Duration::from_millis(20);

/// The plan of this process, if the variable is set.
pub(crate) fn of_process() -> Option<Arc<FaultPlan>> {
    static PLAN: OnceLock<Option<Arc<FaultPlan>>> = OnceLock::new();
    PLAN.get_or_init(|| std::env::var_os(FAULTS_VARIABLE).map(|path| follow(path.into()))).clone()
}

/// A plan that follows a file for as long as the process lives.
fn follow(path: PathBuf) -> Arc<FaultPlan> {
    tracing::warn!(target: "controlpath", path = %path.display(), "disk faults are planted from a file ({FAULTS_VARIABLE}): this process is being tested");
    let plan = FaultPlan::new();
    let mut known = String::new();
    look(&path, &mut known, &plan);
    let followed = Arc::clone(&plan);
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(LOOK_PAUSE);
            look(&path, &mut known, &followed);
        }
    });
    plan
}

fn look(path: &Path, known: &mut String, plan: &FaultPlan) {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    if text == *known {
        return;
    }
    match parse(&text) {
        Ok(rules) => plan.replace(rules),
        Err(reason) => tracing::error!(target: "controlpath", path = %path.display(), reason, "disk faults not understood"),
    }
    *known = text;
}

/// Reads the rules of a file.
///
/// # Errors
/// What is wrong with which line.
pub fn parse(text: &str) -> Result<Vec<FaultRule>, String> {
    let lines = text.lines().map(|line| line.split('#').next().unwrap_or_default().trim()).enumerate();
    lines.filter(|(_, line)| !line.is_empty()).map(|(n, line)| rule(line).map_err(|e| format!("line {}: {e}", n + 1))).collect()
}

fn rule(line: &str) -> Result<FaultRule, String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [op, part, skip, times, fault] = words[..] else {
        return Err(format!("{line:?} has {} words; wanted: OPERATION PATH-PART SKIP TIMES FAULT", words.len()));
    };
    let number = |text: &str| text.parse::<u64>().map_err(|_| format!("{text:?} is no number"));
    let op = match op {
        "create" => DiskOp::Create,
        "read" => DiskOp::Read,
        "write" => DiskOp::Write,
        "sync" => DiskOp::Sync,
        "punch" => DiskOp::Punch,
        "rename" => DiskOp::Rename,
        "unlink" => DiskOp::Unlink,
        _ => return Err(format!("{op:?} is no operation (create, read, write, sync, punch, rename, unlink)")),
    };
    let fault = match fault.split_once(':') {
        Some(("errno", n)) => Fault::Errno(n.parse().map_err(|_| format!("{n:?} is no errno"))?),
        Some(("torn", n)) => Fault::Torn { bytes: n.parse().map_err(|_| format!("{n:?} is no number of bytes"))? },
        Some(("delay", n)) => Fault::Delay(Duration::from_millis(number(n)?)),
        _ => return Err(format!("{fault:?} is no fault (errno:N, torn:BYTES, delay:MILLISECONDS)")),
    };
    Ok(FaultRule {
        op,
        path_contains: if part == "-" { String::new() } else { part.to_owned() },
        skip: number(skip)?,
        times: if times == "always" { u64::MAX } else { number(times)? },
        fault,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DataDir, DiskErrorKind};

    #[test]
    fn rules_are_read_and_wrong_ones_named() {
        let rules = parse("# nothing\nsync - 0 1 errno:5\n\nwrite log/ 3 always torn:512 # half\nread - 1 2 delay:100\n").expect("rules");
        assert_eq!(rules.len(), 3);
        assert_eq!((rules[0].op, rules[0].path_contains.as_str(), rules[0].fault), (DiskOp::Sync, "", Fault::Errno(5)));
        assert_eq!((rules[1].skip, rules[1].times, rules[1].fault), (3, u64::MAX, Fault::Torn { bytes: 512 }));
        assert_eq!((rules[2].skip, rules[2].times, rules[2].fault), (1, 2, Fault::Delay(Duration::from_millis(100))));
        for (text, part) in [
            ("sync - 0 1", "line 1: \"sync - 0 1\" has 4 words"),
            ("\nflush - 0 1 errno:5", "line 2: \"flush\" is no operation"),
            ("sync - x 1 errno:5", "\"x\" is no number"),
            ("sync - 0 1 boom", "\"boom\" is no fault"),
            ("sync - 0 1 errno:EIO", "\"EIO\" is no errno"),
        ] {
            let said = parse(text).expect_err(text);
            assert!(said.contains(part), "{said}");
        }
    }

    #[test]
    fn a_plan_follows_its_file() {
        let temp = tempfile::tempdir().expect("temp dir");
        let path = temp.path().join("faults");
        let dir = DataDir::open_with_faults(&temp.path().join("data"), Some(follow(path.clone()))).expect("open");
        let file = dir.create_data("x").expect("create");
        file.sync_data().expect("no file, no rules");
        let until = |wanted: Result<(), DiskErrorKind>| {
            for _ in 0..500 {
                if file.sync_data().map_err(|e| e.kind()) == wanted {
                    return;
                }
                std::thread::sleep(LOOK_PAUSE);
            }
            panic!("never {wanted:?}");
        };
        std::fs::write(&path, "sync - 0 always errno:5\n").expect("plant");
        until(Err(DiskErrorKind::Io));
        std::fs::write(&path, "nonsense").expect("plant");
        std::thread::sleep(LOOK_PAUSE * 5);
        assert_eq!(file.sync_data().expect_err("the rules stay").kind(), DiskErrorKind::Io);
        std::fs::remove_file(&path).expect("heal");
        until(Ok(()));
        std::fs::write(&path, "sync - 0 1 delay:300\n").expect("plant");
        let slow = (0..500).any(|_| {
            let began = ogee_common::clock::now();
            file.sync_data().expect("slow, not failed");
            std::thread::sleep(LOOK_PAUSE);
            began.elapsed() >= Duration::from_millis(300)
        });
        assert!(slow, "no flush was slow");
    }
}
