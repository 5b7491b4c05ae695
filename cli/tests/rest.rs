//! The REST API of real `ogee snapclone` processes: every route, who is let in, what is refused and how, pages, filters, idempotency keys over two instances.
//!
//! One test, because a cluster takes seconds to start; its steps are functions.

mod served;

use ogee_common::clock::now;
use ogee_common::limits::API_BODY_BYTES_MAX;
use served::{Answer, LIMIT, Served, free_addr, http};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

const WRITER: &str = "writer-0123456789abcdef0123456789";
const READER: &str = "reader-0123456789abcdef0123456789";

/// An instance and a token.
#[derive(Clone, Copy)]
struct Api {
    addr: SocketAddr,
    token: &'static str,
}

impl Api {
    fn send(&self, method: &str, target: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let bearer = format!("Bearer {}", self.token);
        http(self.addr, method, target, &[headers, &[("Authorization", bearer.as_str())]].concat(), body)
    }

    fn get(&self, target: &str) -> Value {
        let answer = self.send("GET", target, &[], b"");
        assert_eq!(answer.status, 200, "{target}: {answer:?}");
        answer.json()
    }

    fn put(&self, method: &str, target: &str, status: u16, body: &Value) -> Value {
        let answer = self.send(method, target, &[("Content-Type", "application/json")], body.to_string().as_bytes());
        assert_eq!(answer.status, status, "{method} {target} {body}: {answer:?}");
        if answer.body.is_empty() { Value::Null } else { answer.json() }
    }

    fn post(&self, target: &str, status: u16, body: &Value) -> Value {
        self.put("POST", target, status, body)
    }

    /// A task that is made with a key.
    fn keyed(&self, target: &str, key: &str, body: &Value) -> Answer {
        self.send("POST", target, &[("Content-Type", "application/json"), ("Idempotency-Key", key)], body.to_string().as_bytes())
    }

    fn ended(&self, task: &Value, state: &str) -> Value {
        let deadline = now() + LIMIT;
        loop {
            let now_is = self.get(&format!("/v1/tasks/{}", task["task"]));
            if now_is["ended_unix_ms"] != 0 {
                assert_eq!(now_is["state"], state, "{now_is}");
                return now_is;
            }
            assert!(now() < deadline, "waited too long: {now_is}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// All pages of a list.
    fn pages(&self, target: &str, limit: usize) -> Vec<Value> {
        let (mut all, mut cursor) = (vec![], String::new());
        let join = if target.contains('?') { '&' } else { '?' };
        loop {
            let page = self.get(&format!("{target}{join}limit={limit}{cursor}"));
            let items = page["items"].as_array().expect("items").clone();
            assert!(items.len() <= limit, "{page}");
            all.extend(items);
            match page["next_cursor"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => return all,
            }
        }
    }
}

fn is_problem(answer: &Answer, status: u16, word: &str) {
    assert_eq!(answer.status, status, "{answer:?}");
    assert!(answer.head.to_ascii_lowercase().contains("content-type: application/problem+json"), "{answer:?}");
    let problem = answer.json();
    assert_eq!(problem["type"], format!("urn:ogee:problem:{word}"), "{problem}");
    assert_eq!((problem["status"].as_u64(), problem["title"].is_string(), problem["detail"].is_string()), (Some(status.into()), true, true));
}

/// Bytes that no block repeats and zstd cannot shorten.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(&mut next).take(len / 8).flatten().collect()
}

fn tokens_file(served: &Served, name: &str, mode: u32) -> String {
    let path = served.path(name);
    std::fs::write(&path, format!("ops read-write {WRITER}\nmonitor read-only {READER}\n")).expect("written");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("set");
    path.display().to_string()
}

#[test]
fn the_rest_api_does_what_its_document_says() {
    let served = Served::up();
    std::fs::write(served.path("disk.raw"), noise(8 << 20)).expect("written");
    served.json(&["image", "import", "disk.raw", "team/golden"]);
    will_not_start(&served);
    let tokens = tokens_file(&served, "tokens", 0o640);
    let (addrs, metrics) = ([free_addr(), free_addr()], free_addr());
    for (i, addr) in addrs.iter().enumerate() {
        let metrics = if i == 0 { format!("metrics = \"{metrics}\"\n") } else { String::new() };
        served.configure(&format!("{i}.toml"), &format!("{metrics}[api]\nlisten = \"{addr}\"\ntokens = \"{tokens}\"\n"));
    }
    let mut first = served.snapclone("0.toml", addrs[0]);
    let _second = served.snapclone("1.toml", addrs[1]);
    let [api, other] = addrs.map(|addr| Api { addr, token: WRITER });
    let_in(api);
    malformed(api);
    every_documented_route(api);
    snapshots_and_clones(&served, api);
    let backup = backups(api, other);
    restores(&served, api, &backup);
    tasks(api, other);
    schedules(api);
    figures(metrics);
    let process = rustix::process::Pid::from_child(&first.0);
    rustix::process::kill_process(process, rustix::process::Signal::TERM).expect("sent");
    let ended = first.0.wait().expect("ended");
    assert!(ended.success(), "{ended}\n{}", served.log());
}

/// An instance that would let everybody in, or whose tokens are of no use, ends with one line.
fn will_not_start(served: &Served) {
    served.configure("open.toml", "[api]\nlisten = \"0.0.0.0:0\"\n");
    let done = served.run(&["snapclone", "--config", "open.toml"]);
    let stderr = String::from_utf8_lossy(&done.stderr);
    assert_eq!((done.status.code(), stderr.lines().count()), (Some(2), 1), "{stderr}");
    assert!(stderr.contains("api.tokens"), "{stderr}");
    let readable = tokens_file(served, "readable", 0o644);
    for path in ["/nowhere/tokens", &readable] {
        served.configure("tokens.toml", &format!("[api]\nlisten = \"127.0.0.1:0\"\ntokens = \"{path}\"\n"));
        let done = served.run(&["snapclone", "--config", "tokens.toml"]);
        let stderr = String::from_utf8_lossy(&done.stderr);
        assert!(!done.status.success() && stderr.contains("tokens file"), "{stderr}");
    }
}

fn let_in(api: Api) {
    assert_eq!(http(api.addr, "GET", "/healthz", &[], b"").json()["status"], "ok");
    for bad in [&[][..], &[("Authorization", "Bearer x")], &[("Authorization", "Basic eDp5")], &[("Authorization", "Bearer ")]] {
        let answer = http(api.addr, "GET", "/v1/tasks", bad, b"");
        is_problem(&answer, 401, "unauthorized");
        assert!(answer.head.to_ascii_lowercase().contains("www-authenticate: bearer"), "{answer:?}");
    }
    is_problem(&http(api.addr, "GET", "/v1/nothing", &[], b""), 401, "unauthorized");
    let reader = Api { token: READER, ..api };
    reader.get("/v1/tasks");
    is_problem(&reader.send("POST", "/v1/tasks/1/cancel", &[], b""), 403, "read-only-token");
    is_problem(&reader.send("DELETE", "/v1/schedules/x", &[], b""), 403, "read-only-token");
}

fn malformed(api: Api) {
    let json = ("Content-Type", "application/json");
    is_problem(&api.send("GET", "/v1/nothing", &[], b""), 404, "no-such-route");
    is_problem(&api.send("PUT", "/v1/tasks", &[], b""), 405, "method-not-allowed");
    is_problem(&api.send("POST", "/v1/clones", &[json], b"{"), 400, "malformed");
    is_problem(&api.send("POST", "/v1/clones", &[json], b"{\"volume\":\"a\",\"clone\":\"b\",\"colour\":1}"), 400, "malformed");
    is_problem(&api.send("POST", "/v1/clones", &[], b""), 400, "malformed");
    is_problem(&api.send("POST", "/v1/clones", &[("Content-Type", "text/plain")], b"{}"), 415, "unsupported-media-type");
    is_problem(&api.send("POST", "/v1/clones", &[json], &vec![b' '; API_BODY_BYTES_MAX + 1]), 413, "body-too-large");
    for query in ["limit=0", "limit=257", "state=asleep", "kind=paint"] {
        is_problem(&api.send("GET", &format!("/v1/tasks?{query}"), &[], b""), 400, "invalid-argument");
    }
    for query in ["limit=x", "colour=red", "cursor=77", "cursor=zz", "limit=1&limit=2"] {
        is_problem(&api.send("GET", &format!("/v1/tasks?{query}"), &[], b""), 400, "malformed");
    }
    is_problem(&api.send("GET", "/v1/tasks/0", &[], b""), 400, "invalid-argument");
    is_problem(&api.send("GET", "/v1/tasks/x", &[], b""), 400, "invalid-argument");
    is_problem(&api.send("GET", "/v1/tasks/777", &[], b""), 404, "not-found");
    is_problem(&api.send("GET", "/v1/volumes/nobody", &[], b""), 404, "not-found");
    is_problem(&api.send("GET", "/v1/volumes/no%20body", &[], b""), 400, "invalid-argument");
    is_problem(&api.send("GET", "/v1/repositories/other/backups", &[], b""), 404, "unknown-repository");
    let body = json!({"volume": "team/golden"});
    is_problem(&api.keyed("/v1/repositories/main/backups", &"k".repeat(257), &body), 400, "malformed");
}

/// Every path and method of the document leads to a handler.
fn every_documented_route(api: Api) {
    let document = http(api.addr, "GET", "/openapi.json", &[], b"").json();
    assert_eq!(document, serde_json::from_str::<Value>(&ogee_snapclone::service::openapi_json()).expect("JSON"));
    let paths = document["paths"].as_object().expect("paths");
    assert!(paths.len() == 18, "{}", paths.len());
    for (path, methods) in paths {
        let target = path.replace("{task}", "999").replace("{repository}", "nowhere").replace("{volume}", "nobody");
        let target = target.replace("{snapshot}", "none").replace("{backup}", "none");
        for method in methods.as_object().expect("methods").keys() {
            let answer = api.send(&method.to_ascii_uppercase(), &target, &[("Content-Type", "application/json")], b"{}");
            let kind = answer.json()["type"].as_str().unwrap_or_default().to_owned();
            assert!(!kind.ends_with("no-such-route") && !kind.ends_with("method-not-allowed"), "{method} {path}: {answer:?}");
            assert!(answer.status < 500, "{method} {path}: {answer:?}");
        }
    }
}

fn snapshots_and_clones(served: &Served, api: Api) {
    let snapshots = "/v1/volumes/team%2Fgolden/snapshots";
    for name in ["a", "b", "c"] {
        let made = api.post(snapshots, 201, &json!({"name": name}));
        assert_eq!((made["name"].as_str(), made["volume"].as_str()), (Some(name), Some("team/golden")));
    }
    is_problem(&api.send("POST", snapshots, &[("Content-Type", "application/json")], b"{\"name\":\"a\"}"), 409, "already-exists");
    is_problem(&api.send("POST", snapshots, &[("Content-Type", "application/json")], b"{\"name\":\"a b\"}"), 400, "invalid-argument");
    let names = |list: &[Value]| list.iter().map(|s| s["name"].as_str().expect("a name").to_owned()).collect::<Vec<_>>();
    assert_eq!(names(&api.pages(snapshots, 2)), ["a", "b", "c"]);
    assert_eq!(names(&api.pages(snapshots, 1)), ["a", "b", "c"]);
    let clone = api.post("/v1/clones", 201, &json!({"volume": "team/golden", "snapshot": "a", "clone": "team/vm1", "owner": "alice"}));
    assert_eq!((clone["parent"].as_str(), clone["depth"].as_u64(), clone["owner"].as_str()), (Some("team/golden@a"), Some(1), Some("alice")));
    api.post("/v1/clones", 201, &json!({"volume": "team/golden", "clone": "team/vm2"}));
    is_problem(&api.send("DELETE", &format!("{snapshots}/a"), &[], b""), 409, "in-use");
    api.post("/v1/volumes/team%2Fvm1/flatten", 202, &json!({}));
    let deadline = now() + LIMIT;
    while api.get("/v1/volumes/team%2Fvm1")["depth"] != 0 {
        assert!(now() < deadline, "it is not flattened: {}", api.get("/v1/volumes/team%2Fvm1"));
        std::thread::sleep(Duration::from_millis(50));
    }
    api.put("DELETE", "/v1/volumes/team%2Fvm1/flatten", 202, &json!({}));
    api.put("DELETE", &format!("{snapshots}/a"), 204, &json!({}));
    is_problem(&api.send("DELETE", &format!("{snapshots}/a"), &[], b""), 404, "not-found");
    api.post("/v1/volumes/team%2Fgolden/rollback", 200, &json!({"snapshot": "b"}));
    is_problem(&api.send("POST", "/v1/volumes/team%2Fgolden/rollback", &[("Content-Type", "application/json")], b"{\"snapshot\":\"a\"}"), 404, "not-found");
    let sum = |volume: &str| served.json(&["checksum", volume])["sha256"].clone();
    assert_eq!(sum("team/vm1"), sum("team/golden"));
}

/// Makes backups with keys over two instances; the identity of the one that stays.
fn backups(api: Api, other: Api) -> String {
    let target = "/v1/repositories/main/backups";
    assert_eq!(api.get("/v1/repositories")["items"], json!(["main"]));
    let body = json!({"volume": "team/golden", "snapshot": "b"});
    let made = api.keyed(target, "one", &body);
    assert_eq!(made.status, 202, "{made:?}");
    let task = made.json();
    for again in [other.keyed(target, "one", &body), api.keyed(target, "one", &body)] {
        assert_eq!((again.status, again.json()["task"].clone()), (202, task["task"].clone()), "the same key makes one task");
    }
    is_problem(&other.keyed(target, "one", &json!({"volume": "team/golden"})), 422, "idempotency-key-reused");
    let done = api.ended(&task, "done");
    let second = api.post(target, 202, &json!({"volume": "team/golden", "full": true}));
    assert_ne!(second["task"], task["task"]);
    let second = other.ended(&second, "done");
    is_problem(&api.keyed(target, "x", &json!({"volume": "nobody"})), 404, "not-found");
    is_problem(&api.keyed(target, "x", &json!({"volume": "team/golden", "snapshot": "nobody"})), 404, "not-found");
    let id = |task: &Value| task["result"]["backup"].as_str().expect("an identity").to_owned();
    let listed: BTreeSet<String> = api.pages(target, 1).iter().map(|b| b["backup"].as_str().expect("an identity").to_owned()).collect();
    assert_eq!(listed, [id(&done), id(&second)].into());
    assert_eq!(api.pages(&format!("{target}?volume=team/golden"), 64).len(), 2);
    assert_eq!(api.pages(&format!("{target}?volume=team/other"), 64).len(), 0);
    assert_eq!(api.get(&format!("{target}/{}", id(&done)))["snapshot"], "b");
    is_problem(&api.send("GET", &format!("{target}/0000000000000001"), &[], b""), 404, "not-found");
    let check = api.post(&format!("{target}/{}/verify", id(&done)), 202, &json!({"sample": 2}));
    assert_eq!(api.ended(&check, "done")["result"]["damaged"], 0);
    let gone = api.put("DELETE", &format!("{target}/{}", id(&second)), 202, &json!({}));
    api.ended(&gone, "done");
    let gc = api.post("/v1/repositories/main/gc", 202, &json!({"abandon_after_seconds": 0}));
    api.ended(&gc, "done");
    assert_eq!(api.pages(target, 64).len(), 1);
    id(&done)
}

fn restores(served: &Served, api: Api, backup: &str) {
    let target = "/v1/repositories/main/restores";
    let lazy = json!({"backup": backup, "volume": "back", "lazy": true});
    is_problem(&api.keyed(target, "lazy", &lazy), 501, "lazy-restore-not-supported");
    is_problem(&api.keyed(target, "x", &json!({"backup": backup, "volume": "back", "sector_bytes": 7})), 400, "invalid-argument");
    let task = api.post(target, 202, &json!({"backup": backup, "volume": "back"}));
    api.ended(&task, "done");
    assert_eq!(served.json(&["checksum", "back"])["sha256"], served.json(&["checksum", "team/golden@b"])["sha256"]);
    // The name is taken now.
    let task = api.post(target, 202, &json!({"backup": backup, "volume": "back"}));
    assert!(api.ended(&task, "failed")["result"].is_string());
}

fn tasks(api: Api, other: Api) {
    let slow = api.post("/v1/repositories/main/restores", 202, &json!({"backup": "team/golden", "volume": "slow", "throttle": 262_144}));
    let open = api.get("/v1/tasks?state=open");
    assert!(open["items"].as_array().expect("items").iter().any(|t| t["task"] == slow["task"]), "{open}");
    other.post(&format!("/v1/tasks/{}/cancel", slow["task"]), 202, &json!({}));
    api.ended(&slow, "cancelled");
    assert_eq!(api.get("/v1/tasks?state=open")["items"], json!([]));
    let ids = |list: Vec<Value>| list.iter().map(|t| t["task"].as_u64().expect("a number")).collect::<Vec<_>>();
    let all = api.pages("/v1/tasks", 64);
    assert!(all.len() > 5 && all.is_sorted_by_key(|t| t["task"].as_u64()), "{all:?}");
    assert_eq!(ids(api.pages("/v1/tasks", 1)), ids(all.clone()));
    assert_eq!(ids(api.pages("/v1/tasks", 2)), ids(all.clone()));
    let done_backups: Vec<Value> = all.iter().filter(|t| t["state"] == "done" && t["kind"] == "backup").cloned().collect();
    assert_eq!(done_backups.len(), 2);
    assert_eq!(ids(other.pages("/v1/tasks?state=done&kind=backup", 1)), ids(done_backups));
    is_problem(&api.send("GET", "/v1/schedules?cursor=7461736b730a31", &[], b""), 400, "malformed");
}

fn schedules(api: Api) {
    let body = json!({"repository": "main", "every_seconds": 86_400, "keep_last": 2, "throttle": 1000});
    for volume in ["team%2Fgolden", "team%2Fvm1", "team%2Fvm2"] {
        let set = api.put("PUT", &format!("/v1/schedules/{volume}"), 200, &body);
        assert_eq!((set["every_seconds"].as_u64(), set["keep_last"].as_u64(), set["throttle"].as_u64()), (Some(86_400), Some(2), Some(1000)));
    }
    let json = ("Content-Type", "application/json");
    for (volume, body, status, word) in [
        ("team%2Fgolden", json!({"repository": "main", "every_seconds": 86_400}), 400, "invalid-argument"),
        ("team%2Fgolden", json!({"repository": "main", "every_seconds": 1, "keep_last": 1}), 400, "invalid-argument"),
        ("team%2Fgolden", json!({"repository": "main", "every_seconds": u64::MAX, "keep_last": 1}), 400, "invalid-argument"),
        ("team%2Fgolden", json!({"repository": "other", "every_seconds": 3600, "keep_last": 1}), 404, "unknown-repository"),
        ("nobody", json!({"repository": "main", "every_seconds": 3600, "keep_last": 1}), 404, "not-found"),
    ] {
        is_problem(&api.send("PUT", &format!("/v1/schedules/{volume}"), &[json], body.to_string().as_bytes()), status, word);
    }
    let volumes = |limit| api.pages("/v1/schedules", limit).iter().map(|s| s["volume"].as_str().expect("a path").to_owned()).collect::<Vec<_>>();
    assert_eq!(volumes(2), ["team/golden", "team/vm1", "team/vm2"]);
    for volume in ["team%2Fgolden", "team%2Fvm1", "team%2Fvm2"] {
        api.put("DELETE", &format!("/v1/schedules/{volume}"), 204, &json!({}));
    }
    assert!(volumes(64).is_empty());
    is_problem(&api.send("DELETE", "/v1/schedules/team%2Fgolden", &[], b""), 404, "not-found");
}

fn figures(addr: SocketAddr) {
    let page = http(addr, "GET", "/metrics", &[], b"").body;
    assert!(page.contains("ogee_snapclone_requests_total{route=\"POST /v1/clones\",status=\"201\"} 2\n"), "{page}");
    assert!(page.contains("route=\"GET other\",status=\"401\""), "{page}");
    assert!(page.contains("ogee_snapclone_tasks_ended_total{") || page.contains("ogee_snapclone_tasks_running{"), "{page}");
    assert!(!page.contains("golden") && !page.contains("writer"), "no names, no tokens: {page}");
}
