//! The built `ogee` binary: what it tells libvirt, and whom it lets connect to a socket. No cluster is needed.

use serde_json::Value;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::{Child, Command, Output, Stdio};

fn ogee() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ogee"));
    command.stdin(Stdio::null());
    for variable in ["OGEE_MDS", "OGEE_DIR", "OGEE_LOG"] {
        command.env_remove(variable);
    }
    command
}

fn xml(args: &[&str]) -> Output {
    ogee().arg("libvirt-xml").args(args).output().expect("ogee runs")
}

fn printed(args: &[&str]) -> String {
    let done = xml(args);
    assert!(done.status.success() && done.stderr.is_empty(), "{args:?}: {done:?}");
    String::from_utf8(done.stdout).expect("UTF-8")
}

/// The one line of a command that must fail for wrong usage.
fn refused(done: &Output) -> String {
    let stderr = String::from_utf8_lossy(&done.stderr).into_owned();
    assert_eq!(done.status.code(), Some(2), "{stderr}");
    assert!(done.stdout.is_empty() && stderr.lines().count() == 1, "{stderr:?}");
    stderr
}

const MEMORY: &str = "<memoryBacking>\n  <source type='memfd'/>\n  <access mode='shared'/>\n</memoryBacking>\n";
const DISK: &str = "\
<disk type='vhostuser' device='disk' snapshot='no'>
  <driver name='qemu' type='raw' queues='8'/>
  <source type='unix' path='/run/ogee/vm1.sock'>
    <reconnect enabled='yes' timeout='1'/>
  </source>
  <target dev='vda' bus='virtio'/>
</disk>
";

#[test]
fn libvirt_is_told_without_a_cluster() {
    let both = printed(&["vm1"]);
    assert!(both.contains(MEMORY) && both.ends_with(DISK) && both.lines().count() == 13, "{both}");
    assert_eq!(printed(&["vm1", "--device"]), DISK);
    let second = printed(&["a/b@s", "--socket", "/x/y", "--device", "--target", "vdb", "--queues", "2", "--boot", "3"]);
    for part in ["queues='2'", "path='/x/y'", "dev='vdb'", "  <boot order='3'/>\n</disk>"] {
        assert!(second.contains(part), "{part}: {second}");
    }

    let domain = printed(&["golden@v1", "--domain", "--memory", "512M", "--vcpus", "4", "--virt-type", "qemu"]);
    assert!(domain.starts_with("<domain type='qemu'>\n  <name>golden-v1</name>\n"), "{domain}");
    for part in ["<memory unit='KiB'>524288</memory>", "<vcpu>4</vcpu>", "<boot order='1'/>", "/run/ogee/golden@v1.sock"] {
        assert!(domain.contains(part), "{part}: {domain}");
    }
    let json: Value = serde_json::from_str(&printed(&["vm1", "--json"])).expect("JSON");
    assert_eq!((&json["disk_xml"], &json["memory_backing_xml"]), (&DISK.into(), &MEMORY.into()));
    assert_eq!(json["socket"], "/run/ogee/vm1.sock");
    assert!(json.get("domain_xml").is_none());
}

#[test]
fn hostile_names_are_escaped_or_refused_in_one_line() {
    let hostile = printed(&["a", "--device", "--socket", "/x/'/><evil a=\"&\n--><b"]);
    assert!(hostile.contains("path='/x/&apos;/&gt;&lt;evil a=&quot;&amp;&#10;--&gt;&lt;b'>"), "{hostile}");
    let named = printed(&["a", "--domain", "--name", "<x>&'"]);
    assert!(named.contains("<name>&lt;x&gt;&amp;&apos;</name>"), "{named}");
    assert!(printed(&["a", "--device", "--socket", "s"]).contains("path='/"), "libvirt has another working directory");

    for (args, word) in [
        (&["team/db"][..], "--socket"),
        (&["a", "--socket", "/x/\u{1}"], "XML"),
        (&["a", "--target", "sda"], "vda"),
        (&["a", "--domain", "--name", "x/y"], "slash"),
        (&["a'b"], "not allowed"),
    ] {
        let line = refused(&xml(args));
        assert!(line.contains(word), "{args:?}: {line}");
    }
    let long = format!("/{}", "x".repeat(107));
    assert!(refused(&xml(&["a", "--socket", &long])).contains("at most 107"));
    let bytes = ogee().args(["libvirt-xml", "a", "--socket"]).arg(OsStr::from_bytes(b"/x/\xff")).output().expect("ogee runs");
    assert!(refused(&bytes).contains("XML"));
}

/// `ogee vhost-blk` over a null device; killed when dropped.
struct Served(Child);

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_socket_has_the_mode_and_the_group_it_was_given() {
    let dir = tempfile::tempdir().expect("a folder");
    let (socket, own) = (dir.path().join("it's.sock"), std::fs::metadata(dir.path()).expect("metadata"));
    // Only root may give a socket to a group that it is not in.
    let group = if own.uid() == 0 { 65_534 } else { own.gid() };
    let mut command = ogee();
    command.args(["vhost-blk", "--null", "64M", "--json", "--socket-mode", "660", "--socket-group", &group.to_string()]);
    command.arg("--socket").arg(&socket).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut served = Served(command.spawn().expect("ogee runs"));
    let mut line = String::new();
    let stdout = served.0.stdout.take().expect("a pipe");
    BufReader::new(stdout).read_line(&mut line).expect("a line");
    let ready: Value = serde_json::from_str(&line).unwrap_or_else(|error| {
        let mut said = String::new();
        let _ = served.0.stderr.take().expect("a pipe").read_to_string(&mut said);
        panic!("{line:?}: {error}: {said}")
    });
    // What it prints at its start is what `libvirt-xml` prints.
    let path = socket.to_str().expect("UTF-8");
    assert_eq!(ready["libvirt_xml"], printed(&["a", "--device", "--socket", path]));
    let metadata = std::fs::metadata(&socket).expect("the socket");
    assert_eq!((metadata.permissions().mode() & 0o777, metadata.gid()), (0o660, group));
}
