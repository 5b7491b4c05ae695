//! The systemd units, their user and the folder of sockets, as `make install-units` puts them in place: systemd's own tools take them, and
//! the command line in each unit is one that the built `ogee` takes. No systemd runs and nothing outside of a scratch folder is touched.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Output};

/// The unit with one volume, and the one with many; both stand in the folder of units.
const UNITS: [&str; 2] = ["ogee-vhost-blk@.service", "ogee-vhost-blk.service"];
const FOLDER: &str = "usr/lib/systemd/system";

/// Installs for `distro` below `root`.
fn install(root: &Path, distro: &str) -> Output {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let mut make = Command::new("make");
    make.args(["-s", "install-units", "PREFIX=/usr", &format!("DISTRO={distro}")]);
    // The flags of a `make test` around this test are not for this one.
    make.env_remove("MAKEFLAGS").env_remove("MAKELEVEL").env_remove("MFLAGS");
    make.arg(format!("DESTDIR={}", root.display())).current_dir(workspace).output().expect("make runs")
}

fn installed(root: &Path, distro: &str) {
    let done = install(root, distro);
    assert!(done.status.success() && done.stderr.is_empty(), "{done:?}");
}

fn read(path: impl AsRef<Path>) -> String {
    let path = path.as_ref();
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Whether a tool of systemd is there; said, if not.
fn has(tool: &str) -> bool {
    let there = Command::new(tool).arg("--version").output().is_ok_and(|done| done.status.success());
    if !there {
        eprintln!("SKIPPED: {tool} is not installed");
    }
    there
}

#[test]
fn the_command_in_each_unit_is_one_that_ogee_takes() {
    let root = tempfile::tempdir().expect("a folder");
    installed(root.path(), "debian");
    for (unit, path) in UNITS.into_iter().zip(["/run/ogee/vm1.sock", "/run/ogee/vhost-blk.control"]) {
        ogee_takes(root.path(), &read(root.path().join(FOLDER).join(unit)), path);
    }
}

fn ogee_takes(root: &Path, unit: &str, path: &str) {
    let mut line = unit.lines().find_map(|line| line.strip_prefix("ExecStart=/usr/bin/ogee ")).expect("an ExecStart of PREFIX").to_owned();
    // As systemd would expand it, but for a group that is here and a folder that is not.
    let missing = root.join("missing");
    if let Some(socket) = unit.split_whitespace().find_map(|word| word.strip_prefix("OGEE_SOCKET=/run/ogee/%i")) {
        line = line.replace("${OGEE_SOCKET}", &format!("/run/ogee/%i{socket}"));
    }
    let line = line.replace("${OGEE_VOLUME}", "vm1").replace("${OGEE_SOCKET_GROUP}", "root").replace("%i", "vm1");
    let more = if line.contains(" serve ") { "--control-group root --metrics 127.0.0.1:0" } else { "--queues 16 --metrics 127.0.0.1:0" };
    let line = line.replace("$OGEE_VHOST_OPTIONS", more);
    assert!(line.contains(path) && !line.contains('$') && !line.contains('%'), "{line}");
    let line = line.replace("/run/ogee", missing.to_str().expect("UTF-8"));
    let mut ogee = Command::new(env!("CARGO_BIN_EXE_ogee"));
    let done = ogee.args(line.split_whitespace()).env("OGEE_MDS", "127.0.0.1:1").output().expect("ogee runs");
    let said = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(3), "{said}");
    assert!(said.contains("no such directory"), "{said}");
}

#[test]
fn systemd_takes_the_units() {
    if !has("systemd-analyze") {
        return;
    }
    for (distro, unit) in [("debian", UNITS[0]), ("debian", UNITS[1]), ("fedora", UNITS[0]), ("fedora", UNITS[1])] {
        let root = tempfile::tempdir().expect("a folder");
        installed(root.path(), distro);
        let folder = root.path().join(FOLDER);
        let path = folder.join(unit.replace('@', "@vm1"));
        // The command has to exist.
        let text = read(folder.join(unit)).replace("/usr/bin/ogee", env!("CARGO_BIN_EXE_ogee"));
        let verify = |text: &str| {
            fs::write(&path, text).expect("written");
            let mut command = Command::new("systemd-analyze");
            command.env("SYSTEMD_UNIT_PATH", format!("{}:", folder.display()));
            let done = command.args(["verify", "--man=no"]).arg(&path).output().expect("systemd-analyze runs");
            // It succeeds whatever it complains of, and complains of other units too.
            let said = String::from_utf8_lossy(&done.stderr).into_owned();
            said.lines().filter(|line| line.contains("ogee")).collect::<Vec<_>>().join("\n")
        };
        assert_eq!(verify(&text), "", "{distro} {unit}");
        assert!(verify(&text.replace("Restart=", "Restart=sometimes-")).contains("sometimes"), "it reads the unit");
        let group = folder.join(format!("{unit}.d/fedora.conf"));
        assert_eq!(group.exists(), distro == "fedora");
        if group.exists() {
            assert!(read(group).contains("\nEnvironment=OGEE_SOCKET_GROUP=qemu\n"));
        }
    }
    let refused = install(tempfile::tempdir().expect("a folder").path(), "beos");
    assert!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("debian or fedora"));
}

#[test]
fn the_user_is_in_the_group_of_qemu_and_owns_the_folder_of_sockets() {
    if !has("systemd-sysusers") || !has("systemd-tmpfiles") {
        return;
    }
    for (distro, group) in [("debian", "libvirt-qemu"), ("fedora", "qemu")] {
        let root = tempfile::tempdir().expect("a folder");
        if fs::metadata(root.path()).expect("metadata").uid() != 0 {
            eprintln!("SKIPPED: only root may give a folder to a user");
            return;
        }
        installed(root.path(), distro);
        let etc = root.path().join("etc");
        fs::create_dir_all(&etc).expect("made");
        fs::write(etc.join("passwd"), "root:x:0:0::/root:/bin/sh\n").expect("written");
        fs::write(etc.join("group"), format!("root:x:0:\n{group}:x:64055:\n")).expect("written");
        let of_root = format!("--root={}", root.path().display());
        let done = Command::new("systemd-sysusers").arg(&of_root).output().expect("systemd-sysusers runs");
        assert!(done.status.success(), "{done:?}");
        assert!(read(etc.join("group")).contains(&format!("{group}:x:64055:ogee\n")), "{}", read(etc.join("group")));
        let done = Command::new("systemd-tmpfiles").args(["--create", &of_root]).output().expect("systemd-tmpfiles runs");
        assert!(done.status.success(), "{done:?}");
        let folder = fs::metadata(root.path().join("run/ogee")).expect("the folder");
        let users = read(etc.join("passwd"));
        let owner = users.lines().find_map(|line| line.strip_prefix("ogee:")?.split(':').nth(1)).expect("a user");
        assert_eq!((folder.uid().to_string().as_str(), folder.mode() & 0o777), (owner, 0o755));
    }
}
