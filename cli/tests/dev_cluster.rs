//! The built `ogee` binary against a real dev cluster of one MDS and three chunkservers: every command that needs one.
//!
//! One test, because a cluster takes seconds to start; its steps are functions. The cluster is destroyed when the test
//! ends, however it ends.

use ogee_common::clock::now;
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

/// Bytes of the images used here.
const IMAGE_BYTES: u64 = 96 << 20;
/// For anything that should take a moment.
const LIMIT: Duration = Duration::from_secs(60);

/// A cluster in a folder of its own.
struct Cluster {
    folder: tempfile::TempDir,
}

impl Cluster {
    /// On a real disk: chunkservers use direct IO.
    fn new() -> Self {
        Self { folder: tempfile::Builder::new().prefix("ogee-cli-").tempdir_in("/var/tmp").expect("a folder") }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ogee"));
        command.args(args).current_dir(self.folder.path()).env("OGEE_DIR", self.path("cluster")).stdin(Stdio::null());
        command.env_remove("OGEE_MDS").env_remove("OGEE_LOG");
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("ogee runs")
    }

    /// Runs a command that must succeed, with `--json`, and gives its answer.
    fn json(&self, args: &[&str]) -> Value {
        let done = self.run(&[args, &["--json"]].concat());
        let stderr = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "ogee {args:?}: {stderr}");
        assert!(stderr.is_empty(), "ogee {args:?} succeeded and still complained: {stderr}");
        serde_json::from_slice(&done.stdout).expect("one JSON document")
    }

    /// Runs a command that must fail with `code`, and gives its one line.
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

    fn pids(&self, prefix: &str) -> Vec<String> {
        let status = self.json(&["dev", "status"]);
        let daemons = status["daemons"].as_array().expect("daemons").clone();
        let named = |d: &Value| d["name"].as_str().is_some_and(|n| n.starts_with(prefix));
        daemons.iter().filter(|d| named(d)).map(|d| d["pid"].to_string()).collect()
    }

    fn names(&self) -> Vec<String> {
        let list = self.json(&["volume", "ls", "-r"]);
        list.as_array().expect("a list").iter().map(|v| v["path"].as_str().expect("a path").to_owned()).collect()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for log in ["mds-1", "cs-1", "cs-2", "cs-3"] {
                let text = std::fs::read_to_string(self.path("cluster").join(log).join("log")).unwrap_or_default();
                let tail: Vec<&str> = text.lines().rev().take(15).collect();
                eprintln!("---- end of the log of {log}");
                tail.iter().rev().for_each(|line| eprintln!("{line}"));
            }
        }
        if !self.path("cluster/dev.toml").exists() {
            return;
        }
        let done = self.run(&["dev", "destroy", "--yes"]);
        if !done.status.success() {
            eprintln!("---- {}", String::from_utf8_lossy(&done.stderr));
        }
    }
}

fn signal(signal: &str, pids: &[String]) {
    // A process may have ended already; the test asks for effects, not for this.
    let _ = Command::new("kill").arg(signal).args(pids).stderr(Stdio::null()).status().expect("kill runs");
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = now() + LIMIT;
    while !done() {
        assert!(now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn wait_end(child: &mut Child, what: &str) -> std::process::ExitStatus {
    let mut status = None;
    wait_for(what, || {
        status = child.try_wait().expect("waited");
        status.is_some()
    });
    status.expect("ended")
}

fn sha256(file: &Path) -> String {
    let done = Command::new("sha256sum").arg(file).output().expect("sha256sum runs");
    String::from_utf8_lossy(&done.stdout).split_whitespace().next().expect("a sum").to_owned()
}

fn qemu_img(args: &[&str]) {
    let done = Command::new("qemu-img").args(args).output().expect("qemu-img runs");
    assert!(done.status.success(), "qemu-img {args:?}: {}", String::from_utf8_lossy(&done.stderr));
}

/// A disk with a hole, noise, zeros that take space, and data at its very end.
fn make_image(path: &Path) {
    let file = std::fs::File::create(path).expect("created");
    file.set_len(IMAGE_BYTES).expect("grown");
    let mut state = 1u64;
    let noise: Vec<u8> = (0..8u32 << 20)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56).to_le_bytes()[0]
        })
        .collect();
    file.write_all_at(&noise, 15 << 20).expect("written");
    file.write_all_at(&vec![0; 4 << 20], 40 << 20).expect("written");
    file.write_all_at(&noise[..4096], IMAGE_BYTES - 4096).expect("written");
}

#[test]
fn every_command_works_on_a_real_cluster() {
    let cluster = Cluster::new();
    start(&cluster);
    let sum = import(&cluster);
    interrupted_import_leaves_nothing(&cluster);
    refusals(&cluster);
    clone_and_rollback(&cluster, &sum);
    exports_are_equal(&cluster);
    serve(&cluster);
    bench(&cluster);
    survives_kill(&cluster, &sum);
    stop(&cluster);
}

fn start(cluster: &Cluster) {
    let up = cluster.json(&["dev", "up"]);
    let daemons = up["daemons"].as_array().expect("daemons");
    assert_eq!(daemons.iter().map(|d| d["name"].as_str().expect("a name")).collect::<Vec<_>>(), ["mds-1", "cs-1", "cs-2", "cs-3"]);
    assert!(daemons.iter().all(|d| d["started"] == true && d["pid"].as_u64() > Some(1)), "{up}");
    let again = cluster.json(&["dev", "up", "--chunkservers", "3", "--mds", "1"]);
    assert!(again["daemons"].as_array().expect("daemons").iter().all(|d| d["started"] == false), "{again}");
    assert_eq!(again["mds"], up["mds"]);
    let status = cluster.json(&["status"]);
    assert_eq!((&status["chunkservers_up"], &status["copysets"]), (&3.into(), &status["copysets_with_leader"]));
    assert_eq!(cluster.json(&["pool", "ls"])[0]["replicas"], 3);
    assert_eq!(cluster.json(&["cluster", "chunkservers"]).as_array().expect("a list").len(), 3);
}

fn import(cluster: &Cluster) -> String {
    let (raw, qcow2) = (cluster.path("disk.raw"), cluster.path("disk.qcow2"));
    make_image(&raw);
    qemu_img(&["convert", "-c", "-O", "qcow2", raw.to_str().expect("UTF-8"), qcow2.to_str().expect("UTF-8")]);
    let report = cluster.json(&["image", "import", "disk.raw", "golden"]);
    assert_eq!(report["size_bytes"], IMAGE_BYTES);
    assert!(report["written_bytes"].as_u64().expect("bytes") < 9 << 20, "holes and zeros are not written: {report}");
    let report = cluster.json(&["image", "import", "disk.qcow2", "folder/from-qcow2"]);
    assert_eq!(report["format"], "qcow2");
    let sum = sha256(&raw);
    assert_eq!(cluster.checksum("golden"), sum);
    assert_eq!(cluster.checksum("folder/from-qcow2"), sum);
    assert_eq!(cluster.names().iter().filter(|n| n.contains("importing")).count(), 0);
    sum
}

/// With every chunkserver stopped an import stands still; SIGINT then takes the half-made volume back.
fn interrupted_import_leaves_nothing(cluster: &Cluster) {
    let chunkservers = cluster.pids("cs-");
    signal("-STOP", &chunkservers);
    let mut import = cluster.command(&["image", "import", "disk.raw", "half"]).stderr(Stdio::piped()).spawn().expect("ogee runs");
    wait_for("the half-made volume", || cluster.names().contains(&"half.importing".to_owned()));
    signal("-INT", &[import.id().to_string()]);
    let status = wait_end(&mut import, "the interrupted import");
    signal("-CONT", &chunkservers);
    assert_eq!(status.code(), Some(1));
    let stderr = std::io::read_to_string(import.stderr.take().expect("a pipe")).expect("read");
    assert!(stderr.contains("interrupted") && stderr.lines().count() == 1, "{stderr}");
    assert!(!cluster.names().iter().any(|n| n.starts_with("half")), "{:?}", cluster.names());
}

fn refusals(cluster: &Cluster) {
    assert!(cluster.refused(&["image", "import", "disk.raw", "golden"], 4).contains("golden exists"));
    assert!(cluster.refused(&["volume", "info", "nobody"], 3).contains("nobody"));
    assert!(cluster.refused(&["checksum", "golden@none"], 3).contains("none"));
    assert!(cluster.refused(&["volume", "resize", "golden", "--size", "1M"], 2).contains("golden"));
    let error: Value = serde_json::from_str(&cluster.refused(&["volume", "create", "golden", "--size", "1G", "--json"], 4))
        .expect("a JSON error");
    assert_eq!((&error["error"]["kind"], &error["error"]["reason"]), (&"conflict".into(), &"already-exists".into()));
    cluster.refused(&["volume", "create", "x", "--size", "1G", "--pool", "nowhere"], 3);
}

fn clone_and_rollback(cluster: &Cluster, sum: &str) {
    cluster.json(&["snapshot", "create", "golden@v1"]);
    cluster.refused(&["snapshot", "create", "golden@v1"], 4);
    let clone = cluster.json(&["clone", "golden@v1", "vms/vm1", "--owner", "alice"]);
    assert!(clone["elapsed_ms"].as_f64().is_some_and(|ms| ms > 0.0), "{clone}");
    assert_eq!((&clone["parent"], &clone["owner"]), (&"golden@v1".into(), &"alice".into()));
    assert_eq!(cluster.checksum("vms/vm1"), sum);
    cluster.refused(&["volume", "rm", "golden"], 4);
    cluster.refused(&["snapshot", "rm", "golden@v1"], 4);
    cluster.refused(&["volume", "rm", "vms/vm1", "--owner", "bob"], 4);
    cluster.json(&["snapshot", "create", "vms/vm1@s"]);
    assert!(cluster.json(&["rollback", "vms/vm1@s"])["elapsed_ms"].is_number());
    assert_eq!(cluster.checksum("vms/vm1"), sum);
    cluster.json(&["volume", "rename", "vms/vm1", "vms/vm2"]);
    assert_eq!(cluster.json(&["volume", "resize", "vms/vm2", "--size", "128M"])["size_bytes"], 128 << 20);
    assert_eq!(cluster.json(&["snapshot", "ls", "vms/vm2"])[0]["name"], "s");
    cluster.json(&["volume", "create", "empty", "--size", "2M"]);
    assert_eq!(cluster.json(&["volume", "rm", "empty"])["deleted"], "empty");
}

fn exports_are_equal(cluster: &Cluster) {
    cluster.json(&["export", "golden@v1", "out.raw"]);
    assert!(std::fs::read(cluster.path("out.raw")).expect("read") == std::fs::read(cluster.path("disk.raw")).expect("read"));
    cluster.refused(&["export", "golden@v1", "out.raw"], 4);
    cluster.json(&["export", "golden", "out.qcow2", "--format", "qcow2"]);
    let (raw, qcow2) = (cluster.path("disk.raw"), cluster.path("out.qcow2"));
    let (raw, qcow2) = (raw.to_str().expect("UTF-8"), qcow2.to_str().expect("UTF-8"));
    qemu_img(&["check", "-f", "qcow2", qcow2]);
    qemu_img(&["compare", "-f", "raw", "-F", "qcow2", raw, qcow2]);
    cluster.refused(&["export", "golden@v9", "none.raw"], 3);
    assert!(!cluster.path("none.raw").exists() && !cluster.path("none.raw.partial").exists());
}

/// A page of `/metrics`, by plain HTTP.
fn scrape(addr: &str) -> String {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(addr).expect("connected");
    write!(stream, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").expect("sent");
    let mut page = String::new();
    stream.read_to_string(&mut page).expect("the server closes");
    assert!(page.starts_with("HTTP/1.1 200") && page.ends_with("# EOF\n"), "{page}");
    page
}

fn metric(page: &str, name: &str) -> u64 {
    let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {name} in {page}")).parse().expect("a number")
}

/// Where the daemons of a kind show their metrics.
fn metrics_addrs(cluster: &Cluster, key: &str) -> Vec<String> {
    let record = std::fs::read_to_string(cluster.path("cluster/dev.toml")).expect("read");
    let record: toml::Table = toml::from_str(&record).expect("TOML");
    record[key].as_array().expect("a list").iter().map(|a| a.as_str().expect("an address").to_owned()).collect()
}

/// A load that verifies finds nothing wrong, says what it cost, and moves the daemons' metrics.
fn bench(cluster: &Cluster) {
    let (chunkservers, mds) = (metrics_addrs(cluster, "chunkserver_metrics"), metrics_addrs(cluster, "mds_metrics"));
    let volumes = metric(&scrape(&mds[0]), "ogee_mds_volumes");
    let commands = metric(&scrape(&mds[0]), "ogee_mds_commands_total");
    cluster.json(&["volume", "create", "bench", "--size", "16M"]);
    let page = scrape(&mds[0]);
    assert_eq!((metric(&page, "ogee_mds_leader"), metric(&page, "ogee_mds_volumes")), (1, volumes + 1));
    assert_eq!(metric(&page, "ogee_mds_chunkservers_up"), 3);
    assert!(metric(&page, "ogee_mds_commands_total") > commands);
    let before: Vec<String> = chunkservers.iter().map(|addr| scrape(addr)).collect();
    let load = ["--rw", "randrw", "--rwmixread", "30", "--iodepth", "8", "--numjobs", "2", "--size", "8M", "--runtime", "2"];
    let words = [&["bench", "bench", "--verify", "--prefill", "--fsync", "16"], &load[..]].concat();
    let mut report = Value::Null;
    // A disk that stands still for seconds leaves figures out: then it is done again.
    wait_for("a load whose figures are complete", || {
        report = cluster.json(&words);
        report["flushes_per_1000"].is_number()
    });
    let after: Vec<String> = chunkservers.iter().map(|addr| scrape(addr)).collect();
    let number = |value: &Value| value.as_f64().unwrap_or_else(|| panic!("not a number in {report}"));
    assert_eq!((&report["system"], &report["load"]), (&"ogee".into(), &"randrw".into()));
    assert_eq!((&report["block_bytes"], &report["depth"]), (&4096.into(), &8.into()));
    assert_eq!((&report["jobs"], &report["volumes"], &report["errors"]), (&2.into(), &1.into(), &0.into()));
    let at = |name: &str| number(&report[name]);
    assert!(at("iops") > 0.0 && (at("seconds") - 2.0).abs() < 0.1, "{report}");
    assert!(at("p50_us") <= at("p99_us") && at("p99_us") <= at("p999_us") && at("p999_us") <= at("max_us"), "{report}");
    assert!(at("mean_us") > 0.0 && at("mean_us") <= at("max_us"), "{report}");
    let writes = number(&report["write"]["ios"]);
    let share = number(&report["read"]["ios"]) / at("ios");
    assert!(writes > 0.0 && (0.1..0.5).contains(&share), "{report}");
    assert!(number(&report["flush"]["ios"]) > 0.0, "{report}");
    assert!(at("verified_blocks") >= 2048.0, "all blocks at the end, and those that were read: {report}");
    assert!(at("flushes_per_1000") > 0.0 && at("write_amplification") > 0.5, "{report}");
    assert!((0.0..=1.0).contains(&at("foreign_cpu")), "{report}");
    for name in ["bench", "mds-1", "cs-1", "cs-2", "cs-3"] {
        assert!(number(&report["rss_bytes"][name]) > 1e6 && report["cpu_us_per_io"][name].is_number(), "{name}: {report}");
    }
    assert!(number(&report["cpu_us_per_io"]["total"]) > 0.0, "{report}");
    for (before, after) in before.iter().zip(&after) {
        let moved = |name: &str| metric(after, name) - metric(before, name);
        // Every chunkserver has a replica of everything: the load's writes, and 8 for the filling.
        let entries = f64::from(u32::try_from(moved("ogee_wal_entries_total")).expect("few"));
        assert!(entries >= writes + 8.0, "{entries} entries for {writes} writes");
        assert!(moved("ogee_data_written_bytes_total") >= 8 << 20, "{after}");
        assert!(moved("ogee_wal_written_bytes_total") >= 8 << 20 && moved("ogee_wal_flushes_total") > 0, "{after}");
        assert!(moved("ogee_raft_applied_entries_total") > 0, "{after}");
    }
    let led: u64 = after.iter().map(|page| metric(page, "ogee_raft_groups_led")).sum();
    assert_eq!(led, metric(&page, "ogee_mds_copysets"), "every copyset has one leader");
    let info = cluster.json(&["volume", "info", "bench"]);
    assert_eq!((&info["attached"], &info["data_bytes"], &info["own_bytes"]), (&false.into(), &(8 << 20).into(), &(8 << 20).into()), "{info}");
    let info = cluster.json(&["volume", "info", "bench", "--space-timeout", "0"]);
    assert!(info["data_bytes"].is_null() && info["space_error"].is_string(), "{info}");
    assert!(cluster.refused(&["bench", "nobody"], 3).contains("nobody"));
    cluster.refused(&["bench", "bench", "--size", "17M"], 2);
    cluster.json(&["volume", "rm", "bench"]);
}

/// A served volume is attached and says so; SIGTERM gives it back.
fn serve(cluster: &Cluster) {
    let socket = cluster.path("vm.sock");
    let path = socket.to_str().expect("UTF-8");
    cluster.refused(&["vhost-blk", "nobody", "--socket", path], 3);
    cluster.refused(&["vhost-blk", "golden@v1", "--socket", path], 2);
    let line = cluster.refused(&["vhost-blk", "vms/vm2", "--socket", "/var/tmp/no/such/folder/s"], 3);
    assert!(line.contains("there is no such directory"), "{line}");
    let mut server = cluster
        .command(&["vhost-blk", "vms/vm2", "--socket", path, "--queues", "2", "--metrics", "127.0.0.1:0", "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("ogee runs");
    let mut first = String::new();
    BufReader::new(server.stdout.take().expect("a pipe")).read_line(&mut first).expect("a line");
    let ready: Value = serde_json::from_str(&first).expect("one JSON document");
    assert_eq!((&ready["ready"], &ready["socket"]), (&true.into(), &path.into()));
    assert!(ready["qemu_args"].as_array().is_some_and(|a| a.iter().any(|w| w.as_str().is_some_and(|w| w.contains(path)))));
    assert!(ready["libvirt_xml"].as_str().is_some_and(|x| x.starts_with("<disk")));
    assert_eq!(cluster.json(&["volume", "info", "vms/vm2"])["attached"], true);
    let report = cluster.json(&["bench", "--vhost-socket", path, "--size", "4M", "--runtime", "1", "--ramp", "0"]);
    let page = scrape(ready["metrics"].as_str().expect("an address"));
    let reads = report["ios"].as_u64().expect("a count");
    assert!(reads > 0 && metric(&page, "ogee_volume_ios_total{kind=\"read\"}") >= reads, "{report} {page}");
    assert!(metric(&page, "ogee_volume_io_bytes_total{kind=\"read\"}") >= reads * 4096, "{page}");
    assert!(cluster.refused(&["vhost-blk", "vms/vm2", "--socket", "other.sock"], 4).contains("--steal"));
    assert!(cluster.refused(&["volume", "rm", "vms/vm2"], 4).contains("vms/vm2"));
    signal("-TERM", &[server.id().to_string()]);
    assert_eq!(wait_end(&mut server, "the end of vhost-blk").code(), Some(0));
    assert!(!socket.exists());
    assert_eq!(cluster.json(&["volume", "info", "vms/vm2"])["attached"], false);
}

fn survives_kill(cluster: &Cluster, sum: &str) {
    signal("-KILL", &cluster.pids(""));
    let up = cluster.json(&["dev", "up"]);
    assert!(up["daemons"].as_array().expect("daemons").iter().all(|d| d["started"] == true), "{up}");
    assert_eq!(cluster.checksum("golden@v1"), sum);
    // One that hangs is killed in the end; a dead one is no error.
    signal("-KILL", &cluster.pids("cs-2"));
    signal("-STOP", &cluster.pids("cs-3"));
}

fn stop(cluster: &Cluster) {
    let pids = cluster.pids("");
    let down = cluster.json(&["dev", "down"]);
    let outcome = |name: &str| {
        let daemons = down["daemons"].as_array().expect("daemons");
        daemons.iter().find(|d| d["name"] == name).expect(name)["outcome"].as_str().expect("a word").to_owned()
    };
    assert_eq!((outcome("mds-1"), outcome("cs-3")), ("stopped".to_owned(), "killed".to_owned()), "{down}");
    assert!(pids.iter().all(|pid| std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|c| c.is_empty()) || !Path::new(&format!("/proc/{pid}")).exists()));
    let status = cluster.json(&["dev", "status"]);
    assert!(status["daemons"].as_array().expect("daemons").iter().all(|d| d["alive"] == false), "{status}");
    assert!(status["cluster"].is_null());
    cluster.refused(&["volume", "ls"], 5);
    cluster.json(&["dev", "destroy", "--yes"]);
    assert!(!cluster.path("cluster").exists());
}
