//! Curve's API of a real `ogee snapclone`: what a Cinder driver of Curve does with snapshots and clones, step by step, and every error code that has a case here.
//!
//! One test, because a cluster takes seconds to start; its steps are functions. The requests are those of Curve's interface; no client of Curve takes part.

mod served;

use ogee_common::clock::now;
use served::{LIMIT, Served, exchange, free_addr, http};
use serde_json::Value;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::time::Duration;

#[derive(Clone, Copy)]
struct Curve(SocketAddr);

impl Curve {
    fn ask(self, action: &str, rest: &str) -> (u16, Value) {
        let answer = http(self.0, "GET", &format!("/SnapshotCloneService?Action={action}&Version=0.0.6&{rest}"), &[], b"");
        let body = answer.json();
        assert!(body["RequestId"].is_string() && body["Message"].is_string() && body["Code"].is_string(), "{action} {rest}: {body}");
        (answer.status, body)
    }

    fn done(self, action: &str, rest: &str) -> Value {
        let (status, body) = self.ask(action, rest);
        assert_eq!((status, body["Code"].as_str()), (200, Some("0")), "{action} {rest}: {body}");
        body
    }

    fn uuid(self, action: &str, rest: &str) -> String {
        self.done(action, rest)["UUID"].as_str().expect("a UUID").to_owned()
    }

    fn refused(self, action: &str, rest: &str, code: &str) {
        let (status, body) = self.ask(action, rest);
        let wanted = if code == "-5" { 400 } else { 500 };
        assert_eq!((status, body["Code"].as_str()), (wanted, Some(code)), "{action} {rest}: {body}");
    }

    /// Asks for a task until it has this status.
    fn until(self, user: &str, uuid: &str, status: u64) -> Value {
        let deadline = now() + LIMIT;
        loop {
            let list = self.done("GetCloneTasks", &format!("User={user}&UUID={uuid}"));
            assert_eq!(list["TotalCount"], 1, "{list}");
            let task = list["TaskInfos"][0].clone();
            if task["TaskStatus"] == status {
                return task;
            }
            assert!(now() < deadline, "waited too long: {task}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

#[test]
fn curves_clients_find_what_they_know() {
    let served = Served::up();
    std::fs::write(served.path("disk.raw"), vec![7u8; 4 << 20]).expect("written");
    served.json(&["image", "import", "disk.raw", "base"]);
    for volume in ["cinder/vm", "cinder/other"] {
        served.json(&["clone", "base", volume, "--owner", "alice"]);
        served.json(&["volume", "flatten", volume, "--wait"]);
    }
    served.json(&["volume", "create", "bobs", "--size", "4MiB", "--owner", "bob"]);
    let (addr, socket) = (free_addr(), served.path("curve.sock"));
    served.configure("tcp.toml", &format!("[curve]\nlisten = \"{addr}\"\n"));
    served.configure("socket.toml", &format!("[curve]\nlisten = \"unix:{}\"\n[api]\nlisten = \"{}\"\n", socket.display(), free_addr()));
    let _snapclone = served.snapclone("tcp.toml", addr);
    let curve = Curve(addr);
    as_cinder_does(&served, curve);
    malformed(curve);
    snapshots_refused(curve);
    clones_refused(curve);
    not_lazy(&served, curve);
    recovered(&served, curve);
    over_a_socket(&served, &socket);
}

/// Create a snapshot, wait for it, clone it lazily, wait, flatten, wait, clean, delete.
fn as_cinder_does(served: &Served, curve: Curve) {
    let snapshot = curve.uuid("CreateSnapshot", "User=alice&File=/cinder/vm&Name=snapshot-1");
    let list = curve.done("GetFileSnapshotList", &format!("User=alice&File=/cinder/vm&UUID={snapshot}"));
    assert_eq!(list["TotalCount"], 1);
    let shown = &list["Snapshots"][0];
    assert_eq!((&shown["UUID"], &shown["Status"], &shown["Progress"]), (&Value::from(snapshot.clone()), &0.into(), &100.into()), "{shown}");
    assert_eq!((&shown["User"], &shown["File"], &shown["Name"], &shown["FileLength"]), (&"alice".into(), &"/cinder/vm".into(), &"snapshot-1".into(), &(4 << 20).into()));
    assert!(shown["SeqNum"].is_u64() && shown["Time"].as_u64().is_some_and(|t| t > 1_000_000_000_000_000), "{shown}");
    let info = curve.done("GetFileSnapshotInfo", &format!("User=alice&UUID={snapshot}"));
    assert_eq!(info["Snapshots"][0], *shown);
    let clone = format!("User=alice&Source={snapshot}&Destination=/cinder/new&Lazy=true");
    let task = curve.uuid("Clone", &clone);
    assert_eq!(curve.uuid("Clone", &clone), task, "the same request once more");
    let shown = curve.until("alice", &task, 7);
    assert_eq!((&shown["File"], &shown["Src"], &shown["TaskType"], &shown["FileType"]), (&"/cinder/new".into(), &snapshot.clone().into(), &0.into(), &1.into()));
    assert_eq!((&shown["IsLazy"], &shown["UUID"], &shown["User"]), (&true.into(), &task.clone().into(), &"alice".into()));
    assert_eq!(served.json(&["checksum", "cinder/new"])["sha256"], served.json(&["checksum", "cinder/vm"])["sha256"], "it may be used");
    let refs = curve.done("GetCloneRefStatus", &format!("User=alice&Source={snapshot}"));
    assert_eq!((&refs["RefStatus"], &refs["CloneFileInfo"][0]["File"]), (&2.into(), &"/cinder/new".into()), "{refs}");
    curve.refused("DeleteSnapshot", &format!("User=alice&UUID={snapshot}&File=/cinder/vm"), "-16");
    curve.refused("CleanCloneTask", &format!("User=alice&UUID={task}"), "-17");
    curve.done("Flatten", &format!("User=alice&UUID={task}"));
    let shown = curve.until("alice", &task, 0);
    assert_eq!((&shown["Progress"], &shown["NextStep"]), (&100.into(), &8.into()));
    curve.done("Flatten", &format!("User=alice&UUID={task}"));
    curve.done("CleanCloneTask", &format!("User=alice&UUID={task}"));
    assert_eq!(curve.done("GetCloneRefStatus", &format!("User=alice&Source={snapshot}"))["RefStatus"], 0);
    curve.done("DeleteSnapshot", &format!("User=alice&UUID={snapshot}&File=/cinder/vm"));
    curve.done("DeleteSnapshot", &format!("User=alice&UUID={snapshot}&File=/cinder/vm"));
    curve.refused("GetFileSnapshotInfo", &format!("User=alice&UUID={snapshot}"), "-8");
    assert_eq!(curve.done("GetFileSnapshotList", "User=alice&File=/cinder/vm")["TotalCount"], 0);
    // The clone is deleted: its task is no more.
    served.json(&["volume", "rm", "cinder/new", "--owner", "alice"]);
    curve.refused("GetCloneTasks", &format!("User=alice&UUID={task}"), "-8");
    curve.done("CleanCloneTask", &format!("User=alice&UUID={task}"));
}

fn malformed(curve: Curve) {
    for (action, rest) in [
        ("Paint", "User=alice"),
        ("CreateSnapshot", "User=alice&File=/cinder/vm"),
        ("CreateSnapshot", "User=&File=/cinder/vm&Name=x"),
        ("CreateSnapshot", "User=alice&File=/cinder/vm&Name=a%20b"),
        ("DeleteSnapshot", "User=alice"),
        ("CancelSnapshot", "User=alice&UUID=x"),
        ("GetFileSnapshotInfo", "File=/cinder/vm"),
        ("GetFileSnapshotList", "Limit=many"),
        ("Clone", "User=alice&Source=/cinder/vm&Destination=/x"),
        ("Clone", "User=alice&Source=/cinder/vm&Destination=/x&Lazy=perhaps"),
        ("Clone", "User=alice&Source=/cinder/vm&Destination=/x&Lazy=1&Poolset="),
        ("Clone", "User=alice&Source=/cinder/vm&Destination=/a%20b&Lazy=1"),
        ("Recover", "User=alice&Source=x&Destination=/cinder/vm"),
        ("Flatten", "User=alice"),
        ("GetCloneTasks", "UUID=x"),
        ("CleanCloneTask", "User=alice"),
        ("GetCloneRefStatus", "User=alice"),
    ] {
        curve.refused(action, rest, "-5");
    }
    let answer = http(curve.0, "GET", "/SnapshotCloneService?Action=GetFileSnapshotList", &[], b"");
    assert_eq!((answer.status, answer.json()["Code"].as_str()), (400, Some("-5")), "no version");
    assert_eq!(http(curve.0, "GET", "/", &[], b"").status, 404);
    assert_eq!(http(curve.0, "POST", "/SnapshotCloneService?Action=GetFileSnapshotList&Version=1", &[], b"").status, 405);
}

fn snapshots_refused(curve: Curve) {
    let snapshot = curve.uuid("CreateSnapshot", "User=alice&File=cinder/vm&Name=s");
    curve.refused("CreateSnapshot", "User=alice&File=/cinder/vm&Name=s", "-6");
    curve.refused("CreateSnapshot", "User=bob&File=/cinder/vm&Name=t", "-7");
    curve.refused("CreateSnapshot", "User=alice&File=/nobody&Name=t", "-8");
    curve.refused("DeleteSnapshot", &format!("User=bob&UUID={snapshot}"), "-7");
    curve.refused("DeleteSnapshot", &format!("User=alice&UUID={snapshot}&File=/cinder/other"), "-11");
    curve.refused("CancelSnapshot", &format!("User=alice&UUID={snapshot}&File=/cinder/vm"), "-14");
    curve.refused("CancelSnapshot", &format!("User=bob&UUID={snapshot}&File=/cinder/vm"), "-7");
    curve.refused("GetFileSnapshotInfo", &format!("User=bob&UUID={snapshot}"), "-7");
    curve.refused("GetFileSnapshotInfo", &format!("User=alice&UUID={snapshot}&File=/bobs"), "-11");
    curve.refused("GetFileSnapshotInfo", "User=alice&UUID=6a6e4b1c-0c44-4f6f-a6a9-1f6f0a1f5f11", "-8");
    let bobs = curve.uuid("CreateSnapshot", "User=bob&File=/bobs&Name=s");
    curve.uuid("CreateSnapshot", "User=alice&File=/cinder/other&Name=s");
    assert_eq!(curve.done("GetFileSnapshotInfo", "User=alice")["TotalCount"], 2);
    assert_eq!(curve.done("GetFileSnapshotList", "")["TotalCount"], 3);
    assert_eq!(curve.done("GetFileSnapshotList", "User=bob")["Snapshots"][0]["UUID"], bobs);
    assert_eq!(curve.done("GetFileSnapshotList", "Status=1")["TotalCount"], 0);
    let page = curve.done("GetFileSnapshotList", "Limit=1&Offset=2");
    assert_eq!((page["TotalCount"].as_u64(), page["Snapshots"].as_array().map(Vec::len)), (Some(3), Some(1)));
    curve.done("DeleteSnapshot", &format!("User=bob&UUID={bobs}"));
}

fn clones_refused(curve: Curve) {
    let list = curve.done("GetFileSnapshotList", "File=/cinder/vm");
    let snapshot = list["Snapshots"][0]["UUID"].as_str().expect("a UUID").to_owned();
    curve.refused("Clone", &format!("User=bob&Source={snapshot}&Destination=/stolen&Lazy=true"), "-7");
    curve.refused("Clone", "User=alice&Source=/nobody&Destination=/x&Lazy=true", "-8");
    curve.refused("Clone", "User=alice&Source=6a6e4b1c-0c44-4f6f-a6a9-1f6f0a1f5f11&Destination=/x&Lazy=true", "-8");
    curve.refused("Clone", &format!("User=alice&Source={snapshot}&Destination=/cinder/other&Lazy=true"), "-19");
    curve.refused("Clone", &format!("User=alice&Source={snapshot}&Destination=/x&Lazy=true&Poolset=nowhere"), "-8");
    curve.refused("Recover", &format!("User=alice&Source={snapshot}&Destination=/cinder/other&Lazy=false"), "-15");
    curve.refused("Recover", "User=alice&Source=/cinder/vm&Destination=/cinder/vm&Lazy=false", "-15");
    curve.refused("Recover", &format!("User=alice&Source={snapshot}&Destination=/nobody&Lazy=false"), "-8");
    curve.refused("Recover", &format!("User=bob&Source={snapshot}&Destination=/cinder/vm&Lazy=false"), "-7");
    curve.refused("Flatten", "User=alice&UUID=6a6e4b1c-0c44-4f6f-a6a9-1f6f0a1f5f11", "-8");
    curve.refused("GetCloneTasks", "User=alice&File=/nobody", "-8");
    let task = curve.uuid("Clone", &format!("User=alice&Source={snapshot}&Destination=/cinder/lazy&Lazy=1&Poolset=default"));
    curve.refused("GetCloneTasks", &format!("User=bob&UUID={task}"), "-7");
    curve.refused("CleanCloneTask", &format!("User=bob&UUID={task}"), "-7");
    let of = |filter: &str| curve.done("GetCloneTaskList", filter)["TotalCount"].as_u64().expect("a number");
    assert_eq!(of("Destination=/cinder/lazy"), 1);
    assert_eq!(of(&format!("Source={snapshot}")), 1);
    assert_eq!((of("Status=7"), of("Status=7&User=bob"), of("Type=1")), (1, 0, 0));
    assert_eq!(of("User=alice"), 1, "flattened ones are found by their UUID alone");
    curve.done("Flatten", &format!("User=bob&UUID={task}"));
    curve.until("alice", &task, 0);
}

/// Without laziness the data is copied, and the client sees it end.
fn not_lazy(served: &Served, curve: Curve) {
    let task = curve.uuid("Clone", "User=bob&Source=/cinder/vm&Destination=/cinder/whole&Lazy=false");
    let shown = curve.until("bob", &task, 0);
    assert_eq!((&shown["File"], &shown["Src"], &shown["Progress"]), (&"/cinder/whole".into(), &"".into(), &100.into()), "{shown}");
    assert_eq!(served.json(&["volume", "info", "cinder/whole"])["depth"], 0);
    curve.refused("GetCloneTasks", "User=bob&File=/cinder/whole", "-8");
}

fn recovered(served: &Served, curve: Curve) {
    let list = curve.done("GetFileSnapshotList", "File=/cinder/vm");
    let snapshot = list["Snapshots"][0]["UUID"].as_str().expect("a UUID").to_owned();
    let before = served.json(&["checksum", "cinder/vm"])["sha256"].clone();
    let task = curve.uuid("Recover", &format!("User=alice&Source={snapshot}&Destination=/cinder/vm&Lazy=false"));
    let shown = curve.until("alice", &task, 0);
    assert_eq!((&shown["TaskType"], &shown["Src"], &shown["File"]), (&1.into(), &snapshot.clone().into(), &"/cinder/vm".into()), "{shown}");
    assert_eq!(served.json(&["checksum", "cinder/vm"])["sha256"], before);
    curve.done("CleanCloneTask", &format!("User=alice&UUID={task}"));
    let task = curve.uuid("Recover", &format!("User=alice&Source={snapshot}&Destination=/cinder/vm&Lazy=true"));
    curve.until("alice", &task, 7);
    curve.done("Flatten", &format!("User=alice&UUID={task}"));
    curve.until("alice", &task, 0);
}

/// The same over a UNIX socket, by another instance, with the same UUIDs.
fn over_a_socket(served: &Served, socket: &std::path::Path) {
    let config = std::fs::read_to_string(served.path("socket.toml")).expect("read");
    let api = config.lines().filter_map(|l| l.strip_prefix("listen = \"127")).next_back().expect("an address");
    let api: SocketAddr = format!("127{}", api.trim_end_matches('"')).parse().expect("an address");
    let _snapclone = served.snapclone("socket.toml", api);
    let stream = UnixStream::connect(socket).expect("connected");
    let answer = exchange(stream, "GET", "/SnapshotCloneService?Action=GetFileSnapshotList&Version=0.0.6&File=/cinder/vm", &[], b"");
    assert_eq!((answer.status, answer.json()["TotalCount"].as_u64()), (200, Some(1)), "{answer:?}");
    assert_eq!(http(api, "GET", "/v1/repositories", &[], b"").json()["items"][0], "main", "this host needs no token");
}
