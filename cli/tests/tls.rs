//! A dev cluster made with `--tls`: the built binary, three MDS nodes and three chunkservers, every connection encrypted.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

struct Cluster {
    folder: tempfile::TempDir,
}

impl Cluster {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn run_with(&self, args: &[&str], env: &[(&str, &str)]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ogee"));
        command.args(args).current_dir(self.folder.path()).stdin(Stdio::null());
        for variable in ["OGEE_MDS", "OGEE_DIR", "OGEE_LOG", "OGEE_TLS_DIR", "OGEE_TLS_LOOPBACK"] {
            command.env_remove(variable);
        }
        command.envs(env.iter().copied()).output().expect("ogee runs")
    }

    fn json(&self, args: &[&str]) -> serde_json::Value {
        let dir = self.path("cluster");
        let done = self.run_with(&[args, &["--json"]].concat(), &[("OGEE_DIR", dir.to_str().expect("text"))]);
        assert!(done.status.success(), "ogee {args:?}: {}", String::from_utf8_lossy(&done.stderr));
        serde_json::from_slice(&done.stdout).unwrap_or_default()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let dir = self.path("cluster");
        let done = self.run_with(&["dev", "destroy", "--yes"], &[("OGEE_DIR", dir.to_str().expect("text"))]);
        if !done.status.success() {
            eprintln!("---- {}", String::from_utf8_lossy(&done.stderr));
        }
    }
}

#[test]
fn a_cluster_with_certificates_serves_its_clients_and_nobody_else() {
    let folder = tempfile::Builder::new().prefix("ogee-tls-").tempdir_in("/var/tmp").expect("a folder");
    let cluster = Cluster { folder };
    let up = cluster.json(&["dev", "up", "--tls", "--mds", "3"]);
    let mds: Vec<&str> = up["mds"].as_array().expect("addresses").iter().filter_map(|a| a.as_str()).collect();
    let mds = mds.join(",");
    cluster.json(&["volume", "create", "b", "--size", "256M"]);
    // Raft among the MDS and among the chunkservers, gRPC and data all had to work for this; and the data is verified.
    let row = cluster.json(&["bench", "b", "--rw", "randwrite", "--iodepth", "8", "--runtime", "2", "--verify"]);
    let row = row.as_array().and_then(|rows| rows.first().cloned()).unwrap_or(row);
    assert!(row["iops"].as_f64().expect("a rate") > 1.0, "{row}");
    cluster.json(&["dev", "up"]);

    let tls = |who: &str| cluster.path("cluster/tls").join(who).to_str().expect("text").to_owned();
    let list = ["volume", "ls", "--mds", &mds];
    let named = [("OGEE_TLS_DIR", &*tls("client")), ("OGEE_TLS_LOOPBACK", "1")];
    let done = cluster.run_with(&list, &named);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    // Without certificates, and with those of another authority: no answer, one line, and no hang.
    let refused = |env: &[(&str, &str)]| {
        let done = cluster.run_with(&list, env);
        let stderr = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(done.status.code() == Some(5) && stderr.lines().count() == 1, "{stderr}");
        stderr
    };
    for (command, args) in [("authority", vec!["other-ca"]), ("client", vec!["me", "--authority", "other-ca", "--out", "other"])] {
        let done = cluster.run_with(&[&["tls", command], &args[..]].concat(), &[]);
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }
    let other = cluster.path("other");
    let strange = [("OGEE_TLS_DIR", other.to_str().expect("text")), ("OGEE_TLS_LOOPBACK", "1")];
    let why = std::thread::scope(|both| {
        let plain = both.spawn(|| refused(&[]));
        let why = refused(&strange);
        plain.join().expect("refused");
        why
    });
    assert!(why.contains("is not of an authority"), "it does not say why: {why}");
    speak_plainly(up["daemons"].as_array().expect("daemons"));
}

/// The start of a plain hello gets no frame back from any daemon.
fn speak_plainly(daemons: &[serde_json::Value]) {
    for daemon in daemons {
        let mut stream = TcpStream::connect(daemon["addr"].as_str().expect("an address")).expect("connect");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("set");
        stream.write_all(&[b'O'; 64]).expect("sent");
        let mut answer = vec![];
        // A reset is an end as well.
        let _ = stream.read_to_end(&mut answer);
        assert!(answer.first() != Some(&b'O'), "{} answers plain frames", daemon["name"]);
    }
}
