//! Tasks that survive: real `ogee snapclone` processes of a real cluster are killed at every step of their work, and others come to the same end.
//!
//! One test, because a cluster takes seconds to start; its steps are functions. A snapclone dies by itself at a step that the environment
//! names (`OGEE_SNAPCLONE_DIE_AT`), as `kill -9` would end it, or is killed from here in the middle of a copy.

use ogee_common::clock::now;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

/// For anything that should take a moment.
const LIMIT: Duration = Duration::from_secs(120);
/// Bytes of the volume that is backed up.
const VOLUME: usize = 24 << 20;
/// Blocks of it, of 256 KiB, and the one leaf.
const BLOCKS: usize = VOLUME / (256 << 10) + 1;

/// A cluster in a folder of its own, with snapclones.
struct Cluster {
    folder: tempfile::TempDir,
}

impl Cluster {
    /// On a real disk: chunkservers use direct IO.
    fn up() -> Self {
        let folder = tempfile::Builder::new().prefix("ogee-tasks-").tempdir_in("/var/tmp").expect("a folder");
        let cluster = Self { folder };
        let up = cluster.json(&["dev", "up"]);
        let mds = up["mds"][0].as_str().expect("an address");
        let repo = cluster.path("repo");
        let config = format!("mds = [\"{mds}\"]\ntasks = 16\n[[repository]]\nname = \"main\"\nurl = \"file://{}\"\n", repo.display());
        std::fs::write(cluster.path("snapclone.toml"), config).expect("written");
        cluster
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ogee"));
        command.args(args).current_dir(self.folder.path()).env("OGEE_DIR", self.path("cluster"));
        command.stdin(Stdio::null()).env_remove("OGEE_MDS").env_remove("OGEE_LOG").env_remove("OGEE_REPO");
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("ogee runs")
    }

    fn json(&self, args: &[&str]) -> Value {
        let done = self.run(&[args, &["--json"]].concat());
        let stderr = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success() && stderr.is_empty(), "ogee {args:?}: {stderr}");
        serde_json::from_slice(&done.stdout).expect("one JSON document")
    }

    fn refused(&self, args: &[&str], code: i32) -> String {
        let done = self.run(args);
        let stderr = String::from_utf8_lossy(&done.stderr).into_owned();
        assert_eq!(done.status.code(), Some(code), "ogee {args:?}: {stderr}");
        assert!(done.stdout.is_empty() && stderr.lines().count() == 1, "ogee {args:?}: {stderr}");
        stderr
    }

    /// Leaves a task; its number.
    fn leave(&self, args: &[&str]) -> String {
        let task = self.json(&[args, &["--repo", "main", "--detach"]].concat());
        assert_eq!(task["state"], "queued", "{task}");
        task["task"].to_string()
    }

    fn task(&self, id: &str) -> Value {
        self.json(&["task", "show", id])
    }

    /// Waits until a task is as wished.
    fn until(&self, what: &str, id: &str, is_so: impl Fn(&Value) -> bool) -> Value {
        let deadline = now() + LIMIT;
        loop {
            let task = self.task(id);
            if is_so(&task) {
                return task;
            }
            assert!(now() < deadline, "waited too long for {what}: {task}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.path("snapclone.log")).unwrap_or_default()
    }

    /// A snapclone that dies at a step.
    fn snapclone(&self, die_at: &str) -> Snapclone {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.path("snapclone.log")).expect("a log");
        let mut command = self.command(&["snapclone", "--config", "snapclone.toml"]);
        command.env("OGEE_SNAPCLONE_DIE_AT", die_at).stdout(Stdio::null()).stderr(log);
        Snapclone(command.spawn().expect("ogee runs"))
    }

    fn backups(&self) -> Vec<Value> {
        let list = self.json(&["backup", "ls", "--repo", &self.url()]);
        list.as_array().expect("a list").clone()
    }

    fn url(&self) -> String {
        format!("file://{}", self.path("repo").display())
    }

    fn checksum(&self, volume: &str) -> String {
        self.json(&["checksum", volume])["sha256"].as_str().expect("a sum").to_owned()
    }

    fn volumes(&self) -> Vec<String> {
        let list = self.json(&["volume", "ls", "-r"]);
        let path = |v: &Value| v["path"].as_str().expect("a path").to_owned();
        list.as_array().expect("a list").iter().map(path).collect()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("---- snapclones:\n{}", self.log());
        }
        let done = self.run(&["dev", "destroy", "--yes"]);
        if !done.status.success() {
            eprintln!("---- {}", String::from_utf8_lossy(&done.stderr));
        }
    }
}

/// A process that ends with its owner.
struct Snapclone(Child);

impl Snapclone {
    fn kill(&mut self) {
        self.0.kill().expect("killed");
        self.0.wait().expect("ended");
    }

    /// Waits until it dies by itself.
    fn died(&mut self, step: &str, cluster: &Cluster) {
        let deadline = now() + LIMIT;
        while self.0.try_wait().expect("asked").is_none() {
            assert!(now() < deadline, "no snapclone came to step {step}\n{}", cluster.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Snapclone {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Bytes that no block repeats and zstd cannot shorten.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(&mut next).take(len / 8).flatten().collect()
}

fn count_files(folder: &Path) -> usize {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|e| if e.path().is_dir() { count_files(&e.path()) } else { 1 }).sum()
}

#[test]
fn tasks_come_to_the_same_end_whoever_dies() {
    let cluster = Cluster::up();
    std::fs::write(cluster.path("disk.raw"), noise(VOLUME, 1)).expect("written");
    cluster.json(&["image", "import", "disk.raw", "golden"]);
    wrong_wishes(&cluster);
    killed_in_the_middle(&cluster);
    killed_at_every_step(&cluster);
    cancelled(&cluster);
    scheduled(&cluster);
}

fn wrong_wishes(cluster: &Cluster) {
    cluster.refused(&["backup", "create", "golden", "--repo", &cluster.url(), "--detach"], 2);
    cluster.refused(&["backup", "create", "golden", "--repo", "main", "--key-file", "k", "--detach"], 2);
    cluster.refused(&["backup", "create", "nobody", "--repo", "main", "--detach"], 3);
    cluster.refused(&["backup", "create", "golden@nobody", "--repo", "main", "--detach"], 3);
    cluster.refused(&["restore", "x", "golden", "--repo", "main", "--detach"], 4);
    cluster.refused(&["task", "show", "77"], 3);
    std::fs::write(cluster.path("bad.toml"), "mds = []\ntasks = 0\n").expect("written");
    let error = cluster.refused(&["snapclone", "--config", "bad.toml"], 2);
    assert!(error.contains("mds") && error.contains("tasks") && error.contains("repository"), "{error}");
    cluster.refused(&["snapclone", "--config", "missing.toml"], 2);
}

/// A backup whose snapclone is killed while it copies is gone on with by another one.
fn killed_in_the_middle(cluster: &Cluster) {
    let blocks = cluster.path("repo/blocks");
    let task = cluster.leave(&["backup", "create", "golden", "--throttle", "1MiB"]);
    let mut first = cluster.snapclone("");
    let deadline = now() + LIMIT;
    while count_files(&blocks) < 20 {
        assert!(now() < deadline, "the backup stores nothing: {}\n{}", cluster.task(&task), cluster.log());
        std::thread::sleep(Duration::from_millis(10));
    }
    let before = cluster.task(&task);
    assert_eq!(before["state"], "running", "{before}");
    let _second = cluster.snapclone("");
    first.kill();
    let (stored, killed) = (count_files(&blocks), now());
    cluster.until("another to take the task over", &task, |t| t["takes"].as_u64() > before["takes"].as_u64());
    println!("taken over after {:?}", now() - killed);
    let done = cluster.json(&["task", "watch", &task]);
    assert_eq!(done["state"], "done");
    let backups = cluster.backups();
    assert_eq!(backups.len(), 1, "one backup of one task: {backups:?}");
    assert_eq!(backups[0]["backup"], done["result"]["backup"]);
    let new = usize::try_from(backups[0]["new_bytes"].as_u64().expect("a number")).expect("small");
    // Blocks that were being stored when it died may be there or not.
    assert!(new <= VOLUME + (256 << 10) + 16 * (256 << 10) - stored * (256 << 10), "{stored} blocks were there: {backups:?}");
    assert_eq!(cluster.json(&["snapshot", "ls", "golden"]), Value::Array(vec![]), "the one that was taken is gone");
    assert_eq!(count_files(&cluster.path("repo/runs")), 0, "no run is open");
    cluster.json(&["backup", "gc", "--repo", &cluster.url(), "--abandon-after", "0"]);
    assert_eq!(count_files(&blocks), BLOCKS);
}

/// A snapclone dies at each step of each task; what comes of it is the same.
fn killed_at_every_step(cluster: &Cluster) {
    let backup = ["snapshot", "run", "noted", "stored", "buried", "published", "forgotten", "tidied"];
    let restore = ["resolved", "created", "noted", "filled", "renamed"];
    let old = cluster.backups()[0]["backup"].as_str().expect("an identity").to_owned();
    let sum = cluster.checksum("golden");
    let mut tasks = vec![];
    let orphan = |args: &[&str], step: &str| {
        let task = cluster.leave(args);
        cluster.snapclone(step).died(step, cluster);
        task
    };
    for step in backup {
        tasks.push(orphan(&["backup", "create", "golden"], &format!("backup-{step}")));
    }
    for step in restore {
        tasks.push(orphan(&["restore", &old, &format!("back/{step}")], &format!("restore-{step}")));
    }
    let last = cluster.snapclone("");
    for task in &tasks {
        let done = cluster.until("the task to end", task, |t| t["ended_unix_ms"] != 0);
        assert_eq!(done["state"], "done", "{done}");
    }
    let mut made = cluster.backups();
    made.retain(|b| b["backup"] != *old);
    assert_eq!(made.len(), backup.len(), "one backup for each task: {made:?}");
    assert!(made.iter().all(|b| b["root"] == made[0]["root"]), "{made:?}");
    assert_eq!(cluster.json(&["snapshot", "ls", "golden"]), Value::Array(vec![]));
    let restored: Vec<String> = restore.iter().map(|step| format!("back/{step}")).collect();
    for volume in &restored {
        assert_eq!(cluster.checksum(volume), sum, "{volume}");
    }
    let volumes = cluster.volumes();
    assert!(volumes.iter().all(|v| !v.contains(".restoring")), "{volumes:?}");
    removed_at_every_step(cluster, last, &made);
}

/// Backups are removed, and garbage collected, by snapclones that die; then nothing is left of them.
fn removed_at_every_step(cluster: &Cluster, mut last: Snapclone, made: &[Value]) {
    last.kill();
    let id = |i: usize| made[i]["backup"].as_str().expect("an identity").to_owned();
    let mut tasks = vec![];
    for (i, step) in ["remove-noted", "remove-begun", "remove-removed"].into_iter().enumerate() {
        tasks.push(cluster.leave(&["backup", "rm", &id(i)]));
        cluster.snapclone(step).died(step, cluster);
    }
    let _last = cluster.snapclone("");
    tasks.extend((3..made.len()).map(|i| cluster.leave(&["backup", "rm", &id(i)])));
    for task in &tasks {
        let done = cluster.until("the removal", task, |t| t["ended_unix_ms"] != 0);
        assert_eq!(done["state"], "done", "{done}");
    }
    assert_eq!(cluster.backups().len(), 1);
    let gc = cluster.leave(&["backup", "gc", "--abandon-after", "0"]);
    assert_eq!(cluster.json(&["task", "watch", &gc])["state"], "done");
    assert_eq!(count_files(&cluster.path("repo/blocks")), BLOCKS, "nothing is left of what was removed or interrupted");
    assert_eq!(count_files(&cluster.path("repo/runs")), 0);
    assert_eq!(count_files(&cluster.path("repo/removals")), 0);
    let check = cluster.leave(&["backup", "verify", "golden"]);
    assert_eq!(cluster.json(&["task", "watch", &check])["result"]["damaged"], 0);
    // What cannot be done fails with a reason.
    let gone = cluster.leave(&["backup", "rm", &id(0)]);
    assert!(cluster.refused(&["task", "watch", &gone], 1).contains("no such backup"));
}

/// What a cancelled task began is undone: the snapshot, the blocks, the volume.
fn cancelled(cluster: &Cluster) {
    let mut snapclone = cluster.snapclone("");
    std::fs::write(cluster.path("other.raw"), noise(VOLUME, 2)).expect("written");
    cluster.json(&["image", "import", "other.raw", "other"]);
    let slow: [&[&str]; 2] = [&["backup", "create", "other", "--throttle", "512KiB"], &["restore", "golden", "slow", "--throttle", "512KiB"]];
    for words in slow {
        let task = &cluster.leave(words);
        cluster.until("it to be under way", task, |t| t["done_bytes"].as_u64().is_some_and(|n| n > 0));
        cluster.json(&["task", "cancel", task]);
        cluster.until("it to be undone", task, |t| t["state"] == "cancelled");
        assert!(cluster.refused(&["task", "watch", task], 4).contains("cancelled"));
    }
    assert_eq!(cluster.json(&["snapshot", "ls", "other"]), Value::Array(vec![]));
    cluster.refused(&["volume", "info", "slow"], 3);
    assert!(cluster.volumes().iter().all(|v| !v.contains(".restoring")));
    cluster.json(&["backup", "gc", "--repo", &cluster.url()]);
    assert_eq!(count_files(&cluster.path("repo/blocks")), BLOCKS, "a cancelled run needs no time to count as dead");
    snapclone.kill();
    // Nobody is there: what was never taken is cancelled at once.
    let queued = cluster.leave(&["backup", "create", "other"]);
    assert_eq!(cluster.json(&["task", "cancel", &queued])["state"], "cancelled");
    assert_eq!(cluster.json(&["task", "ls", "--open"]), Value::Array(vec![]));
}

/// Scheduled backups are made once for each due time, and the schedule's own are removed as it says.
fn scheduled(cluster: &Cluster) {
    let set = ["backup", "schedule", "set", "golden", "--repo", "main"];
    cluster.refused(&[&set[..], &["--every", "1h"]].concat(), 2);
    cluster.refused(&[&set[..], &["--every", "1s", "--keep-last", "1"]].concat(), 2);
    cluster.refused(&[&set[..], &["--every", "soon", "--keep-last", "1"]].concat(), 2);
    cluster.refused(&["backup", "schedule", "set", "nobody", "--repo", "main", "--every", "1h", "--keep-last", "1"], 3);
    cluster.refused(&["backup", "schedule", "rm", "golden"], 3);
    let before = cluster.backups();
    let made = cluster.json(&[&set[..], &["--every", "10s", "--keep-last", "1"]].concat());
    assert_eq!((made["every_seconds"].as_u64(), made["keep_last"].as_u64(), made["last_task"].as_u64()), (Some(10), Some(1), Some(0)));
    let _both = [cluster.snapclone(""), cluster.snapclone("")];
    let of_schedule = || {
        let tasks = cluster.json(&["task", "ls"]);
        let mut tasks = tasks.as_array().expect("a list").clone();
        tasks.retain(|t| t["arguments"]["keep"].is_object());
        tasks
    };
    let deadline = now() + LIMIT;
    while of_schedule().iter().filter(|t| t["state"] == "done").count() < 2 {
        assert!(now() < deadline, "nothing is made: {:?}\n{}", of_schedule(), cluster.log());
        std::thread::sleep(Duration::from_millis(200));
    }
    assert_eq!(cluster.json(&["backup", "schedule", "ls"]).as_array().map(Vec::len), Some(1));
    cluster.json(&["backup", "schedule", "rm", "golden"]);
    assert_eq!(cluster.json(&["backup", "schedule", "ls"]), Value::Array(vec![]));
    let deadline = now() + LIMIT;
    while of_schedule().iter().any(|t| t["ended_unix_ms"] == 0) {
        assert!(now() < deadline, "a task does not end: {:?}\n{}", of_schedule(), cluster.log());
        std::thread::sleep(Duration::from_millis(50));
    }
    let tasks = of_schedule();
    let slots: std::collections::BTreeSet<u64> = tasks.iter().map(|t| t["created_unix_ms"].as_u64().expect("a time") / 10_000).collect();
    assert_eq!(slots.len(), tasks.len(), "one task for each due time: {tasks:?}");
    let (scheduled, others): (Vec<Value>, Vec<Value>) =
        cluster.backups().into_iter().partition(|b| b["snapshot"].as_str().is_some_and(|s| s.starts_with("scheduled-")));
    assert_eq!((scheduled.len(), others), (1, before), "the last one stays, and what the schedule did not make");
    assert_eq!(cluster.json(&["snapshot", "ls", "golden"]), Value::Array(vec![]));
}
