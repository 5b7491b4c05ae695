//! Waits until a system that was just started or filled has finished what it does in the background.

use crate::usage::{Moment, Process, Used};
use ogee_vm_tests::deadline::Deadline;
use std::path::Path;
use std::time::Duration;

/// How long CPU use is looked at.
const LOOK: Duration = Duration::from_millis(500);
/// Quiet is less than this many microseconds of CPU in a look: a tenth of a core.
const QUIET_US: u64 = 50_000;
/// A system that never gets quiet is measured as it is.
const LIMIT: Duration = Duration::from_secs(30);

/// Returns when the processes use little CPU, or after 30 s.
pub(crate) fn wait_quiet(processes: &[Process]) {
    let deadline = Deadline::after(LIMIT);
    while !deadline.passed() {
        let Ok(before) = Moment::now(processes, Path::new("/")) else { return };
        // A rate needs a stretch of time.
        std::thread::sleep(LOOK);
        let Ok(after) = Moment::now(processes, Path::new("/")) else { return };
        if Used::between(&before, &after).daemons_us() < QUIET_US {
            return;
        }
    }
    eprintln!("    not quiet after {LIMIT:?}: measured as it is");
}
