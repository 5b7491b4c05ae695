//! What cannot work is refused with one line that names the thing, and an exit code; nothing is left behind.

use anyhow::{Result, ensure};
use ogee_vm_tests::cluster::Cluster;

#[test]
fn wrong_sockets_unknown_volumes_and_unwritable_targets_are_named() -> Result<()> {
    let cluster = Cluster::start("clear-errors", 3, 1)?;
    cluster.ok(&["volume", "create", "disk", "--size", "16MiB"])?;
    let missing = cluster.folder().join("no-such-folder");
    let socket = missing.join("disk.sock").to_string_lossy().into_owned();
    let fine = cluster.folder().join("fine.sock").to_string_lossy().into_owned();
    let occupied = cluster.folder().join("occupied");
    std::fs::write(&occupied, "a file of somebody")?;
    let occupied = occupied.to_string_lossy().into_owned();

    let cases: &[(&[&str], &str)] = &[
        (&["vhost-blk", "disk", "--socket", &socket], "no-such-folder"),
        (&["vhost-blk", "disk", "--socket", &occupied], "occupied"),
        (&["vhost-blk", "nobody", "--socket", &fine], "nobody"),
        (&["vhost-blk", "disk@nowhere", "--socket", &fine], "nowhere"),
        (&["vhost-blk", "nobody", "--socket", &fine, "--incoming"], "nobody"),
        (&["vhost-blk", "disk@nowhere", "--socket", &fine, "--incoming"], "disk@nowhere"),
        (&["volume", "info", "nobody"], "nobody"),
        (&["clone", "nobody", "copy"], "nobody"),
        (&["clone", "disk@nowhere", "copy"], "nowhere"),
        (&["rollback", "disk@nowhere"], "nowhere"),
        (&["snapshot", "create", "nobody@s"], "nobody"),
        (&["export", "nobody", &fine], "nobody"),
        (&["export", "disk", &socket], "no-such-folder"),
        (&["image", "import", &socket, "copy"], "no-such-folder"),
        (&["volume", "create", "disk", "--size", "16MiB"], "disk"),
    ];
    let mut wrong = Vec::new();
    for (arguments, named) in cases {
        match cluster.refused(arguments) {
            Ok(line) if line.contains(named) => eprintln!("{line}"),
            Ok(line) => wrong.push(format!("{arguments:?} does not name {named:?}: {line}")),
            Err(error) => wrong.push(format!("{error:#}")),
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));

    ensure!(std::fs::read(&occupied)? == b"a file of somebody", "a file was overwritten by a socket");
    ensure!(!std::path::Path::new(&fine).exists(), "a refused command left its file behind");
    let volumes = cluster.json(&["volume", "ls", "--json"])?.to_string();
    ensure!(!volumes.contains("copy"), "a refused command left a volume behind: {volumes}");
    cluster.shut_down()
}
