//! Lazy restore with real processes: an image is backed up, its cluster destroyed, and a volume of a new cluster stands on the backup at once.
//!
//! One life for a folder and one for an S3 server (moto's), because a cluster takes seconds to start; their steps are functions. The volume is
//! read and written by the SDK in this process, as a guest's daemon would, and compared with a model.

use ogee_client::{BlockDevice, Cluster as Client, ClusterConfig, ExtentKind, OpenMode, Volume};
use ogee_common::clock::now;
use ogee_common::name::VolumeRef;
use ogee_snapclone::Repositories;
use ogee_snapclone::service::SnapcloneConfig;
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

/// For anything that should take a moment.
const LIMIT: Duration = Duration::from_secs(180);
/// How long the repository is away.
const OUTAGE: Duration = Duration::from_secs(30);
/// Bytes of the image: more than one chunk, and no multiple of one.
const IMAGE: usize = (40 << 20) + 8192;

/// Where the backup lies.
enum Place {
    Folder,
    S3(Moto),
}

/// moto's server, with a bucket named `bucket`.
struct Moto {
    child: Child,
    addr: String,
}

impl Moto {
    fn start() -> Self {
        let cache = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache/ogee-moto"));
        let venv = std::env::var_os("OGEE_MOTO").map(PathBuf::from).or(cache).expect("a home");
        let program = venv.join("bin/moto_server");
        assert!(program.exists(), "{} is missing: make moto", program.display());
        let mut command = Command::new(program);
        command.args(["-H", "127.0.0.1", "-p", "0"]).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("moto starts");
        let mut lines = BufReader::new(child.stderr.take().expect("a pipe"));
        let addr = loop {
            let mut line = String::new();
            assert_ne!(lines.read_line(&mut line).expect("text"), 0, "moto ended");
            if let Some((_, addr)) = line.split_once("Running on http://") {
                break addr.trim().to_owned();
            }
        };
        // It goes on logging; nobody may leave it with a full pipe.
        std::thread::spawn(move || std::io::copy(&mut lines, &mut std::io::sink()));
        let moto = Self { child, addr };
        let request = format!("PUT /bucket HTTP/1.1\r\nHost: {}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", moto.addr);
        let mut stream = std::net::TcpStream::connect(&moto.addr).expect("connected");
        std::io::Write::write_all(&mut stream, request.as_bytes()).expect("sent");
        let mut answer = String::new();
        std::io::Read::read_to_string(&mut stream, &mut answer).expect("answered");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        moto
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        signal("-CONT", &[self.child.id()]);
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn signal(signal: &str, pids: &[u32]) {
    let pids = pids.iter().map(ToString::to_string);
    let done = Command::new("kill").arg(signal).args(pids).stderr(Stdio::null()).status();
    assert!(done.expect("kill runs").success() || std::thread::panicking());
}

/// A cluster in a folder of its own, the repository beside it.
struct Cluster {
    folder: tempfile::TempDir,
    place: Place,
}

impl Cluster {
    /// On a real disk: chunkservers use direct IO.
    fn up(place: Place) -> Self {
        let folder = tempfile::Builder::new().prefix("ogee-lazy-").tempdir_in("/var/tmp").expect("a folder");
        let cluster = Self { folder, place };
        cluster.begin();
        cluster
    }

    /// Starts a new cluster and writes the configuration of its daemons.
    fn begin(&self) {
        let up = self.json(&["dev", "up"]);
        let mds = up["mds"][0].as_str().expect("an address");
        let (url, more) = match &self.place {
            Place::Folder => (format!("file://{}", self.path("repo").display()), String::new()),
            Place::S3(moto) => {
                let file = self.path("credentials");
                std::fs::write(&file, "[default]\naws_access_key_id = key\naws_secret_access_key = secret\n").expect("written");
                let more = format!("endpoint = \"http://{}\"\ncredentials = \"{}\"\n", moto.addr, file.display());
                ("s3://bucket/lazy".to_owned(), more)
            }
        };
        let config = format!("mds = [\"{mds}\"]\ntasks = 4\n[[repository]]\nname = \"main\"\nurl = \"{url}\"\n{more}");
        std::fs::write(self.path("snapclone.toml"), config).expect("written");
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ogee"));
        command.args(args).current_dir(self.folder.path()).env("OGEE_DIR", self.path("cluster"));
        command.env("AWS_ACCESS_KEY_ID", "key").env("AWS_SECRET_ACCESS_KEY", "secret");
        for name in ["OGEE_MDS", "OGEE_LOG", "OGEE_REPO", "OGEE_REPO_CONFIG"] {
            command.env_remove(name);
        }
        command.stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("ogee runs")
    }

    fn json(&self, args: &[&str]) -> Value {
        let done = self.run(&[args, &["--json"]].concat());
        let stderr = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "ogee {args:?}: {stderr}");
        serde_json::from_slice(&done.stdout).expect("one JSON document")
    }

    fn refused(&self, args: &[&str]) -> String {
        let done = self.run(args);
        let stderr = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(!done.status.success(), "ogee {args:?} succeeded");
        assert!(done.stdout.is_empty() && stderr.lines().count() == 1, "ogee {args:?}: {stderr}");
        stderr
    }

    /// Options of a command by hand, which takes no names.
    fn repo(&self) -> Vec<String> {
        match &self.place {
            Place::Folder => vec!["--repo".into(), format!("file://{}", self.path("repo").display())],
            Place::S3(moto) => ["--repo", "s3://bucket/lazy", "--endpoint", &format!("http://{}", moto.addr)].map(str::to_owned).to_vec(),
        }
    }

    fn lazily(&self, volume: &str, more: &[&str]) -> Value {
        let args = ["restore", "golden", volume, "--lazy", "--repo", "main", "--repo-config", "snapclone.toml"];
        self.json(&[&args, more].concat())
    }

    /// Leaves a hydrate task; its number.
    fn hydrate(&self, volume: &str, more: &[&str]) -> String {
        let task = self.json(&[&["volume", "hydrate", volume], more].concat());
        task["task"].to_string()
    }

    fn snapclone(&self, die_at: &str) -> Process {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.path("snapclone.log")).expect("a log");
        let mut command = self.command(&["snapclone", "--config", "snapclone.toml"]);
        command.env("OGEE_SNAPCLONE_DIE_AT", die_at).stdout(Stdio::null()).stderr(log);
        Process(command.spawn().expect("ogee runs"))
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.path("snapclone.log")).unwrap_or_default()
    }

    fn until(&self, what: &str, mut is_so: impl FnMut() -> bool) {
        let deadline = now() + LIMIT;
        while !is_so() {
            assert!(now() < deadline, "waited too long for {what}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The repository goes away, or comes back.
    fn repository_is(&self, there: bool) {
        match &self.place {
            Place::Folder => {
                let names = if there { ("repo.away", "repo") } else { ("repo", "repo.away") };
                std::fs::rename(self.path(names.0), self.path(names.1)).expect("renamed");
            }
            Place::S3(moto) => signal(if there { "-CONT" } else { "-STOP" }, &[moto.child.id()]),
        }
    }

    /// A client with access to the repository, as a guest's daemon has.
    fn client(&self) -> Client {
        let places = SnapcloneConfig::load_repositories(&self.path("snapclone.toml")).expect("a configuration");
        let status = self.json(&["dev", "status"]);
        let mds = status["mds"].as_array().expect("addresses").iter().map(|a| a.as_str().expect("text").to_owned()).collect();
        let all = Repositories::new(places.into_iter().map(|r| (r.name, r.place)));
        Client::connect_lazy(ClusterConfig { mds, backups: Some(Arc::new(all)), ..ClusterConfig::default() }).expect("a client")
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
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Bytes that zstd cannot shorten, with a hole of zeros in the middle and single pages of zeros.
fn image() -> Vec<u8> {
    let mut state = 7u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let mut all: Vec<u8> = std::iter::repeat_with(&mut next).take(IMAGE / 8).flatten().collect();
    all[9 << 20..21 << 20].fill(0);
    all[3 * 4096..4 * 4096].fill(0);
    all
}

async fn open(client: &Client, name: &str, mode: OpenMode) -> Volume {
    let name = VolumeRef::parse(name).expect("a name");
    Volume::open(client, &name, mode).await.expect("opens")
}

async fn whole(volume: &Volume) -> Vec<u8> {
    let size = usize::try_from(volume.info().size_bytes).expect("small");
    let mut all = Vec::with_capacity(size);
    while all.len() < size {
        let len = u32::try_from((size - all.len()).min(1 << 20)).expect("small");
        all.extend(volume.read(all.len() as u64, len).await.expect("read").to_vec());
    }
    all
}

/// A volume that is written, and what it must hold.
struct Written {
    volume: Volume,
    model: Vec<u8>,
}

impl Written {
    async fn write(&mut self, offset: usize, byte: u8, len: usize) {
        self.model[offset..offset + len].fill(byte);
        self.volume.write(offset as u64, vec![byte; len].into()).await.expect("written");
    }

    async fn zero(&mut self, offset: usize, len: usize) {
        self.model[offset..offset + len].fill(0);
        self.volume.discard(offset as u64, len as u64).await.expect("discarded");
    }

    async fn is_right(&self, when: &str) {
        assert!(whole(&self.volume).await == self.model, "the volume differs: {when}");
    }
}

fn life(place: Place) {
    let cluster = Cluster::up(place);
    std::fs::write(cluster.path("disk.raw"), image()).expect("written");
    cluster.json(&["image", "import", "disk.raw", "golden"]);
    let repo = cluster.repo();
    let repo: Vec<&str> = repo.iter().map(String::as_str).collect();
    cluster.json(&[&["backup", "create", "golden"], &repo[..]].concat());
    cluster.json(&["dev", "destroy", "--yes"]);
    cluster.begin();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    runtime.block_on(Box::pin(lived(&cluster)));
}

async fn lived(cluster: &Cluster) {
    let made = cluster.lazily("vm/a", &["--no-hydrate"]);
    assert_eq!((made["task"].as_u64(), made["size_bytes"].as_u64()), (Some(0), Some(IMAGE as u64)));
    let info = cluster.json(&["volume", "info", "vm/a"]);
    assert_eq!((&info["backup"], &info["backup_repository"]), (&made["backup"], &Value::from("main")));
    without_access(cluster);
    not_removed(cluster, made["backup"].as_str().expect("an identity"));
    let client = cluster.client();
    let mut a = Written { volume: open(&client, "vm/a", OpenMode::ReadWrite { steal: false }).await, model: image() };
    writes_to_missing_pages(&mut a).await;
    let (snapshot, mut c) = copies(cluster, &client, &mut a).await;
    let reader = open(&client, "vm/a@s", OpenMode::ReadOnly).await;
    outage(cluster, &mut a).await;
    hydrated(cluster, &mut a, &mut c).await;
    a.is_right("hydrated").await;
    c.is_right("hydrated").await;
    complete(cluster, (a, c), (&reader, &snapshot)).await;
}

/// Who has no access is told so in one line, and the volume is left as it was.
fn without_access(cluster: &Cluster) {
    let error = cluster.refused(&["checksum", "vm/a"]);
    assert!(error.contains("--repo-config") && error.contains("\"main\""), "{error}");
    std::fs::write(cluster.path("other.toml"), "[[repository]]\nname = \"other\"\nurl = \"file:///nowhere\"\n").expect("written");
    let error = cluster.refused(&["checksum", "vm/a", "--repo-config", "other.toml"]);
    assert!(error.contains("\"main\""), "{error}");
    cluster.refused(&["restore", "golden", "vm/b", "--lazy", "--repo", "main", "--repo-config", "other.toml"]);
    cluster.refused(&["restore", "golden", "vm/a", "--lazy", "--repo", "main", "--repo-config", "snapclone.toml"]);
}

/// The backup is not removed under the volume, by hand either; and none is made on a backup that is being removed.
fn not_removed(cluster: &Cluster, backup: &str) {
    let repo = cluster.repo();
    let rm: Vec<&str> = ["backup", "rm", backup].into_iter().chain(repo.iter().map(String::as_str)).collect();
    let error = cluster.refused(&rm);
    assert!(error.contains("vm/a") && error.contains("hydrate"), "{error}");
    // What a remover leaves that was killed before it asked.
    let record = cluster.path("repo/removals").join(backup).join("0000000000000001");
    if !matches!(cluster.place, Place::Folder) {
        return;
    }
    std::fs::create_dir_all(record.parent().expect("a folder")).expect("made");
    std::fs::write(&record, b"{\"began_unix_ms\":1}").expect("written");
    let error = cluster.refused(&["restore", "golden", "vm/z", "--lazy", "--repo", "main", "--repo-config", "snapclone.toml"]);
    assert!(error.contains("is being removed"), "{error}");
    let volumes = cluster.json(&["volume", "ls", "-r"]).to_string();
    assert!(!volumes.contains("vm/z"), "{volumes}");
    let gc: Vec<&str> = ["backup", "gc"].into_iter().chain(repo.iter().map(String::as_str)).collect();
    assert_eq!(cluster.json(&gc)["removals_given_up"], 1);
    cluster.lazily("vm/z", &["--no-hydrate"]);
    cluster.json(&["volume", "rm", "vm/z"]);
}

/// Parts of pages, whole pages, zeroings; of data, of zeros, and over the end of both.
async fn writes_to_missing_pages(a: &mut Written) {
    a.write(512, 1, 512).await;
    a.write(3 * 4096 + 1024, 2, 1024).await;
    a.write(9 * (1 << 20) - 512, 3, 4096).await;
    a.write(10 << 20, 4, 4096).await;
    a.write((16 << 20) - 1024, 5, 2048).await;
    a.zero(5 * 4096 + 512, 2 * 4096).await;
    a.zero(24 << 20, 1 << 20).await;
    a.write(IMAGE - 1536, 6, 1024).await;
    let parts = [(0, 8192), (9 * (1 << 20) - 4096, 8192), ((16 << 20) - 4096, 8192), (24 << 20, 4096), (IMAGE - 4096, 4096)];
    for (offset, len) in parts {
        let read = a.volume.read(offset as u64, u32::try_from(len).expect("small")).await.expect("read").to_vec();
        assert!(read == a.model[offset..offset + len], "{len} bytes at {offset}");
    }
    let extents = a.volume.extents(32 << 20, 4 << 20, None).await.expect("extents");
    assert!(extents.iter().all(|e| e.kind == ExtentKind::Data), "what the backup holds is data: {extents:?}");
    let extents = a.volume.extents(12 << 20, 1 << 20, None).await.expect("extents");
    assert!(extents.iter().all(|e| e.kind == ExtentKind::Hole), "{extents:?}");
}

/// A snapshot, and a clone that is written.
async fn copies(cluster: &Cluster, client: &Client, a: &mut Written) -> (Vec<u8>, Written) {
    cluster.json(&["snapshot", "create", "vm/a@s"]);
    let taken = a.model.clone();
    cluster.json(&["clone", "vm/a@s", "vm/c"]);
    let error = cluster.refused(&["volume", "flatten", "vm/c"]);
    assert!(error.contains("hydrate"), "{error}");
    // After the snapshot: it sees what the backup has there, and so does the clone.
    a.write((6 << 20) + 512, 7, 512).await;
    a.write(7 << 20, 8, 8192).await;
    let c = open(client, "vm/c", OpenMode::ReadWrite { steal: false }).await;
    let mut c = Written { volume: c, model: taken.clone() };
    c.write((6 << 20) + 1024, 9, 512).await;
    c.zero((30 << 20) + 512, 8192).await;
    let s = open(client, "vm/a@s", OpenMode::ReadOnly).await;
    let read = s.read(6 << 20, 4096).await.expect("read").to_vec();
    assert!(read == taken[6 << 20..(6 << 20) + 4096], "the snapshot");
    (taken, c)
}

/// The repository goes away: IO that needs it waits, other IO does not, and everything goes on when it is back.
async fn outage(cluster: &Cluster, a: &mut Written) {
    cluster.repository_is(false);
    let start = now();
    let (volume, model) = (a.volume.clone(), a.model.clone());
    let waiting = tokio::spawn(async move {
        let read = volume.read(36 << 20, 1 << 20).await.expect("no error, whatever happens").to_vec();
        assert!(read == model[36 << 20..37 << 20]);
    });
    a.write(35 << 20, 11, 4096).await;
    tokio::time::sleep(OUTAGE).await;
    assert!(!waiting.is_finished(), "nobody can know what is there");
    cluster.repository_is(true);
    tokio::time::timeout(LIMIT, waiting).await.expect("in time").expect("read");
    println!("an outage of {OUTAGE:?} was over for the guest after {:?}", now() - start);
}

/// Hydrators die at each step, a chunkserver is killed, and somebody writes all the time.
async fn hydrated(cluster: &Cluster, a: &mut Written, c: &mut Written) {
    let task = cluster.hydrate("vm/a", &["--throttle", "8MiB"]);
    let second = cluster.hydrate("vm/a", &[]);
    for step in ["hydrate-proved", "hydrate-pass", "hydrate-completed"] {
        let mut dies = cluster.snapclone(step);
        let offset = 26 << 20;
        cluster.until(step, || dies.0.try_wait().expect("asked").is_some());
        a.write(offset + 512, 12, 1024).await;
        c.write(offset, 13, 4096).await;
        if step == "hydrate-proved" {
            let status = cluster.json(&["dev", "status"]);
            let daemons = status["daemons"].as_array().expect("a list");
            let pid = daemons.iter().find(|d| d["name"] == "cs-1").and_then(|d| d["pid"].as_u64()).expect("a chunkserver");
            signal("-KILL", &[u32::try_from(pid).expect("a pid")]);
            a.write(offset + (1 << 20) + 512, 14, 512).await;
            cluster.json(&["dev", "up"]);
        }
    }
    let _last = cluster.snapclone("");
    for task in [task, second] {
        cluster.until("the hydrate task", || cluster.json(&["task", "show", &task])["ended_unix_ms"] != 0);
        let done = cluster.json(&["task", "show", &task]);
        assert_eq!(done["state"], "done", "{done}");
    }
}

/// The backup is needed no more: the repository may go, and whoever knows of none opens the volumes.
async fn complete(cluster: &Cluster, (a, c): (Written, Written), (reader, snapshot): (&Volume, &[u8])) {
    assert_eq!(cluster.json(&["volume", "info", "vm/a"])["backup"], "");
    cluster.repository_is(false);
    // Whoever opened it before needs it no more either, also for what was never written.
    tokio::time::timeout(LIMIT, async {
        a.is_right("without the repository").await;
        c.is_right("without the repository").await;
        assert!(whole(reader).await == snapshot, "the snapshot without the repository");
    })
    .await
    .expect("nobody waits for a backup that is needed no more");
    for written in [&a, &c] {
        written.volume.detach().await.expect("detached");
    }
    let sum = |bytes: &[u8]| {
        use sha2::{Digest, Sha256};
        Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect::<String>()
    };
    for (name, content) in [("vm/a", &a.model[..]), ("vm/c", &c.model), ("vm/a@s", snapshot)] {
        assert_eq!(cluster.json(&["checksum", name])["sha256"], sum(content), "{name}");
    }
    cluster.json(&["volume", "flatten", "vm/c", "--wait"]);
    assert_eq!(cluster.json(&["checksum", "vm/c"])["sha256"], sum(&c.model), "flattened");
}

#[test]
fn a_volume_stands_on_a_backup_in_a_folder() {
    life(Place::Folder);
}

#[test]
fn a_volume_stands_on_a_backup_in_a_bucket() {
    life(Place::S3(Moto::start()));
}
