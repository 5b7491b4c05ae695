//! The built `ogee` binary backs volumes of a real cluster up to a folder and restores them, in that cluster and in
//! another; a backup that is killed leaves nothing behind.
//!
//! One test, because a cluster takes seconds to start; its steps are functions.

use bytes::Bytes;
use ogee_client::{BlockDevice, Cluster as Sdk, ClusterConfig, OpenMode, Volume};
use ogee_common::clock::now;
use ogee_common::name::VolumeRef;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

/// Bytes of a block of the repository.
const BLOCK: u64 = 256 << 10;
/// Bytes of the volume.
const VOLUME: u64 = 96 << 20;
/// For anything that should take a moment.
const LIMIT: Duration = Duration::from_secs(60);

/// A cluster in a folder of its own.
struct Cluster {
    folder: tempfile::TempDir,
}

impl Cluster {
    /// On a real disk: chunkservers use direct IO.
    fn up() -> (Self, String) {
        let folder = tempfile::Builder::new().prefix("ogee-backup-").tempdir_in("/var/tmp").expect("a folder");
        let cluster = Self { folder };
        let up = cluster.json(&["dev", "up"]);
        let mds = up["mds"][0].as_str().expect("an address").to_owned();
        (cluster, mds)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ogee"));
        command.args(args).current_dir(self.folder.path()).env("OGEE_DIR", self.folder.path().join("cluster"));
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

    fn checksum(&self, volume: &str) -> String {
        self.json(&["checksum", volume])["sha256"].as_str().expect("a sum").to_owned()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let done = self.run(&["dev", "destroy", "--yes"]);
        if !done.status.success() {
            eprintln!("---- {}", String::from_utf8_lossy(&done.stderr));
        }
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

/// Changes one page in a hundred of a volume; the number of blocks that they lie in.
async fn change_pages(mds: &str, volume: &str) -> u64 {
    let config = ClusterConfig { mds: vec![mds.to_owned()], ..ClusterConfig::default() };
    let cluster = Sdk::connect(config).await.expect("connected");
    let name = VolumeRef::parse(volume).expect("a name");
    let volume = Volume::open(&cluster, &name, OpenMode::ReadWrite { steal: false }).await.expect("attached");
    let mut blocks = std::collections::BTreeSet::new();
    for (i, word) in noise(usize::try_from(VOLUME / 4096 / 100 * 8).expect("small"), 77).chunks(8).enumerate() {
        let offset = u64::from_le_bytes(word.try_into().expect("8 bytes")) % (VOLUME / 4096) * 4096;
        blocks.insert(offset / BLOCK);
        volume.write(offset, Bytes::from(noise(4096, i as u64 + 1000))).await.expect("written");
    }
    volume.detach().await.expect("detached");
    blocks.len() as u64
}

fn count_files(folder: &Path) -> usize {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|e| if e.path().is_dir() { count_files(&e.path()) } else { 1 }).sum()
}

fn number(value: &Value, field: &str) -> u64 {
    value[field].as_u64().unwrap_or_else(|| panic!("no {field} in {value}"))
}

/// Kills a slow backup when it has stored some blocks.
fn kill_a_backup(cluster: &Cluster, repo: &str, blocks: &Path) -> usize {
    let before = count_files(blocks);
    let words = ["backup", "create", "victim@v", "--repo", repo, "--throttle", "8MiB"];
    let mut child = cluster.command(&words).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("ogee runs");
    let deadline = now() + LIMIT;
    while count_files(blocks) < before + 20 {
        assert!(now() < deadline, "the backup stores nothing");
        assert!(child.try_wait().expect("asked").is_none(), "it was over too soon");
        std::thread::yield_now();
    }
    child.kill().expect("killed");
    child.wait().expect("ended");
    count_files(blocks) - before
}

#[test]
fn volumes_are_backed_up_and_restored() {
    let (cluster, mds) = Cluster::up();
    let folder = PathBuf::from(cluster.folder.path());
    let url = format!("file://{}", folder.join("repo").display());
    let (repo, blocks) = (url.as_str(), folder.join("repo/blocks"));
    let mut image = noise(usize::try_from(VOLUME).expect("small"), 1);
    image[32 << 20..64 << 20].fill(0);
    std::fs::write(folder.join("disk.raw"), &image).expect("written");
    cluster.json(&["image", "import", "disk.raw", "golden"]);
    cluster.refused(&["backup", "ls", "--repo", repo], 3);
    cluster.refused(&["backup", "create", "golden", "--repo", "nowhere"], 2);
    cluster.refused(&["backup", "create", "nobody@s", "--repo", repo], 3);

    cluster.json(&["snapshot", "create", "golden@one"]);
    let one = cluster.json(&["backup", "create", "golden@one", "--repo", repo]);
    assert_eq!((number(&one, "data_bytes"), number(&one, "new_blocks")), (64 << 20, 256 + 1), "{one}");
    assert_eq!((number(&one, "read_bytes"), number(&one, "kept_bytes")), (64 << 20, 0), "holes are not read: {one}");
    let change = |volume| tokio::runtime::Runtime::new().expect("a runtime").block_on(change_pages(&mds, volume));
    let changed = change("golden");
    let two = cluster.json(&["backup", "create", "golden", "--repo", repo]);
    let new = number(&two, "new_bytes");
    assert!(new >= changed * BLOCK && new * 10 <= changed * BLOCK * 13, "{changed} blocks changed: {two}");
    assert_eq!(number(&two, "read_bytes"), changed * BLOCK, "the blocks with changed pages, and no others: {two}");
    let snapshots = cluster.json(&["snapshot", "ls", "golden"]);
    assert_eq!(snapshots.as_array().map(Vec::len), Some(1), "the one that was taken for the backup is gone: {snapshots}");
    assert_eq!(cluster.json(&["backup", "ls", "--repo", repo]).as_array().map(Vec::len), Some(2));
    assert_eq!(cluster.json(&["backup", "show", "golden@one", "--repo", repo])["root"], one["root"]);

    let of_clone = built_on_others(&cluster, repo, &two, change);
    killed(&cluster, repo, &blocks);
    restored(&cluster, repo);
    for backup in [&one, &two].into_iter().chain(&of_clone) {
        cluster.json(&["backup", "rm", backup["backup"].as_str().expect("an identity"), "--repo", repo]);
    }
    cluster.json(&["backup", "gc", "--repo", repo, "--abandon-after", "0"]);
    assert_eq!(cluster.json(&["backup", "verify", "victim", "--repo", repo])["damaged"], 0);
    cluster.json(&["backup", "rm", "victim", "--repo", repo]);
    cluster.json(&["backup", "gc", "--repo", repo, "--abandon-after", "0"]);
    assert_eq!(count_files(&blocks), 0, "nothing is left of what was removed");
}

/// Of a clone nothing is read but what it wrote itself; nor of a volume that was rolled back, of what it gave up. Returns the
/// backups, which all hold what `newest` does.
fn built_on_others(cluster: &Cluster, repo: &str, newest: &Value, change: impl Fn(&'static str) -> u64) -> Vec<Value> {
    let create = |more: &[&str]| cluster.json(&[&["backup", "create", "vm", "--repo", repo][..], more].concat());
    cluster.json(&["snapshot", "create", "golden@late"]);
    cluster.json(&["clone", "golden@late", "vm"]);
    let data = number(newest, "data_bytes");
    let mut made = vec![create(&[])];
    cluster.json(&["snapshot", "create", "vm@base"]);
    assert!(change("vm") > 0);
    cluster.json(&["rollback", "vm@base"]);
    made.push(create(&[]));
    for backup in &made {
        assert_eq!((number(backup, "read_bytes"), number(backup, "kept_bytes")), (0, data), "{backup}");
    }
    made.push(create(&["--full"]));
    assert_eq!((number(&made[2], "read_bytes"), number(&made[2], "kept_bytes")), (data, 0), "{}", made[2]);
    assert!(made.iter().all(|backup| backup["root"] == newest["root"] && number(backup, "new_blocks") == 0), "{made:?}");
    made
}

/// A backup that is killed is gone on with, or collected: nothing leaks and nothing is lost.
fn killed(cluster: &Cluster, repo: &str, blocks: &Path) {
    let image = noise(48 << 20, 9);
    std::fs::write(cluster.folder.path().join("victim.raw"), image).expect("written");
    cluster.json(&["image", "import", "victim.raw", "victim"]);
    cluster.json(&["snapshot", "create", "victim@v"]);
    let before = count_files(blocks);
    kill_a_backup(cluster, repo, blocks);
    let kept = cluster.json(&["backup", "gc", "--repo", repo]);
    assert_eq!((number(&kept, "blocks_deleted"), number(&kept, "runs_given_up")), (0, 0), "it might live: {kept}");
    let gone = cluster.json(&["backup", "gc", "--repo", repo, "--abandon-after", "0"]);
    assert_eq!(number(&gone, "runs_given_up"), 1, "{gone}");
    assert_eq!(count_files(blocks), before, "nothing is left of the killed one");
    let stored = kill_a_backup(cluster, repo, blocks);
    let again = cluster.json(&["backup", "create", "victim@v", "--repo", repo]);
    assert_eq!(number(&again, "new_blocks"), 48 * 4 + 1 - stored as u64, "it goes on after {stored} blocks: {again}");
    cluster.json(&["backup", "gc", "--repo", repo, "--abandon-after", "0"]);
    assert_eq!(count_files(blocks), before + 48 * 4 + 1);
    for backup in ["golden@one", "golden", "victim@v"] {
        assert_eq!(cluster.json(&["backup", "verify", backup, "--repo", repo])["damaged"], 0);
    }
}

/// What is restored equals what was backed up, here and in another cluster.
fn restored(cluster: &Cluster, repo: &str) {
    let sums = [("golden@one", cluster.checksum("golden@one")), ("golden", cluster.checksum("golden"))];
    let (other, _) = Cluster::up();
    for (target, prefix) in [(cluster, "back/"), (&other, "")] {
        for (i, (backup, sum)) in sums.iter().enumerate() {
            let name = format!("{prefix}copy{i}");
            let report = target.json(&["restore", backup, &name, "--repo", repo]);
            assert_eq!(number(&report, "size_bytes"), VOLUME);
            assert_eq!(target.checksum(&name), *sum, "{backup}");
            assert!(target.refused(&["restore", backup, &name, "--repo", repo], 4).contains("exists"));
        }
    }
    cluster.refused(&["restore", "nobody", "copy", "--repo", repo], 3);
    // A damaged block: one clear line, and no volume.
    let index = cluster.json(&["backup", "show", "golden", "--repo", repo]);
    let own = PathBuf::from(repo.trim_start_matches("file://")).join("blocks").join(index["backup"].as_str().expect("an identity"));
    let block = std::fs::read_dir(own).expect("a folder").flatten().next().expect("a block").path();
    let object = std::fs::read(&block).expect("read");
    std::fs::write(&block, &object[..object.len() / 2]).expect("written");
    assert!(cluster.refused(&["restore", "golden", "bad", "--repo", repo], 1).contains("cut short"));
    assert!(cluster.refused(&["backup", "verify", "golden", "--repo", repo], 1).contains("1 object"));
    cluster.refused(&["volume", "info", "bad"], 3);
    cluster.refused(&["volume", "info", "bad.restoring"], 3);
    std::fs::write(&block, &object).expect("mended");
}
