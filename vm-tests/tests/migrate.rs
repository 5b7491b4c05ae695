//! Live migration: a guest that verifies what it writes moves between two QEMUs, each with a daemon of its own on the same volume. Migrations
//! that fail leave it where it was; a source that comes back after a migration gets nothing.
//!
//! `OGEE_MIGRATIONS` is the number of moves; by default ten, five there and five back.

use anyhow::{Context, Result, ensure};
use ogee_vm_tests::cluster::Cluster;
use ogee_vm_tests::deadline::wait_for;
use ogee_vm_tests::hammer::Hammer;
use ogee_vm_tests::image::Image;
use ogee_vm_tests::migrate::{Migration, move_guest, wait_running};
use ogee_vm_tests::vm::Vm;
use serde_json::json;
use std::path::PathBuf;
use std::time::Duration;

/// A test waits at most this long for something that must happen.
const PATIENCE: Duration = Duration::from_secs(120);
/// Slow enough that a migration of the guest's memory is not over before it is interfered with.
const SLOW: u64 = 4 << 20;
const INCOMING: [&str; 1] = ["--incoming"];

fn cluster_with_guest(name: &str) -> Result<Cluster> {
    let image = Image::golden()?;
    let cluster = Cluster::start(name, 3, 1)?;
    cluster.ok(&["image", "import", &image.raw.to_string_lossy(), "golden"])?;
    cluster.ok(&["clone", "golden", "vm1"])?;
    Ok(cluster)
}

/// The sockets of two hosts, which are used in turn.
fn socket(cluster: &Cluster, turn: u32) -> PathBuf {
    cluster.folder().join(format!("host-{}.sock", turn % 2))
}

#[test]
fn a_verifying_guest_moves_there_and_back() -> Result<()> {
    let moves = std::env::var("OGEE_MIGRATIONS").ok().and_then(|n| n.parse().ok()).unwrap_or(10_u32);
    let mut cluster = cluster_with_guest("migrate")?;
    let stream = cluster.folder().join("stream");
    let mut backend = cluster.serve_on("vm1", &socket(&cluster, 0))?;
    let mut vm = Vm::boot("migrate-0", &backend.disk())?;
    let hammer = Hammer::start(&mut vm, "migrate")?;
    vm.put_file("/tmp/flood.sh", include_str!("../scripts/guest-flood.sh"))?;
    vm.spawn("sh /tmp/flood.sh 3")?;
    vm.wait_until("test -f /tmp/flood.0 -a -f /tmp/flood.1 -a -f /tmp/flood.2", PATIENCE)?;
    let mut stopped = Vec::new();
    for turn in 1..=moves {
        let next = cluster.serve_with("vm1", &socket(&cluster, turn), &INCOMING)?;
        let mut there = Vm::start_incoming(&format!("migrate-{turn}"), &next.disk())?;
        stopped.push(move_guest(&mut vm, &mut there, &stream).with_context(|| format!("move {turn}"))?);
        hammer.goes_on(&mut there).with_context(|| format!("after move {turn}"))?;
        vm.quit()?;
        backend.stop()?;
        (vm, backend) = (there, next);
    }
    vm.run_ok("touch /tmp/flood.stop")?;
    vm.wait_until("test -f /tmp/flood.over.0 -a -f /tmp/flood.over.1 -a -f /tmp/flood.over.2", PATIENCE)?;
    ensure!(vm.run("cat /tmp/flood.bad")?.code != 0, "{}", vm.run("cat /tmp/flood.bad")?.output);
    let rounds = vm.run_ok("cat /tmp/flood.0 /tmp/flood.1 /tmp/flood.2")?;
    let longest = hammer.finish(&mut vm)?;
    eprintln!("{moves} moves: stopped for {stopped:?}, longest verified round {longest:?}, rounds of the other writers {rounds:?}");
    vm.power_off()?;
    backend.stop()?;
    cluster.shut_down()
}

#[test]
fn failed_migrations_fall_back_and_a_source_that_comes_back_gets_nothing() -> Result<()> {
    let mut cluster = cluster_with_guest("migrate-fails")?;
    let stream = cluster.folder().join("stream");
    let source_daemon = cluster.serve_on("vm1", &socket(&cluster, 0))?;
    let mut vm = Vm::boot("migrate-fails-0", &source_daemon.disk())?;
    let hammer = Hammer::start(&mut vm, "migrate-fails")?;
    let daemon = cluster.serve_with("vm1", &socket(&cluster, 1), &INCOMING)?;

    // The destination dies half-way; then a migration is given up. The same daemon waits for the next one.
    let mut doomed = Vm::start_incoming("migrate-fails-1", &daemon.disk())?;
    let mut migration = Migration::begin(&mut vm, &mut doomed, &stream, SLOW)?;
    migration.wait_under_way()?;
    doomed.kill();
    migration.wait_end("failed")?;
    drop(migration);
    hammer.goes_on(&mut vm).context("after the destination died")?;
    let mut unwanted = Vm::start_incoming("migrate-fails-2", &daemon.disk())?;
    let mut migration = Migration::begin(&mut vm, &mut unwanted, &stream, SLOW)?;
    migration.wait_under_way()?;
    migration.cancel()?;
    migration.wait_end("cancelled")?;
    drop(migration);
    unwanted.kill();
    hammer.goes_on(&mut vm).context("after a migration that was cancelled")?;
    ensure!(!daemon.output().has_heard("volume attached"), "the volume was taken by a migration that failed");

    // Stopped and continued, and moved, without an MDS: IO that needs it waits.
    cluster.kill("mds-1")?;
    let mut qmp = vm.qmp()?;
    qmp.execute("stop", &json!({}))?;
    qmp.execute("cont", &json!({}))?;
    drop(qmp);
    wait_running(&mut vm)?;
    hammer.goes_on(&mut vm).context("stopped and continued without an MDS")?;
    let mut there = Vm::start_incoming("migrate-fails-3", &daemon.disk())?;
    move_guest(&mut vm, &mut there, &stream)?;
    ensure!(!daemon.output().has_heard("volume attached"), "attached without an MDS");
    cluster.revive()?;
    hammer.goes_on(&mut there).context("with the MDS again")?;

    // The source's QEMU is still there, stopped, and its daemon is started again: its rings start, and must not be served.
    source_daemon.kill();
    let stale = cluster.serve_with("vm1", &socket(&cluster, 0), &INCOMING)?;
    wait_for("the stopped source to be refused", PATIENCE, || {
        Ok(stale.output().has_heard("is not attached").then_some(()))
    })?;
    ensure!(!stale.output().has_heard("volume attached"), "a stopped source took the volume back");
    hammer.goes_on(&mut there).context("with the source's daemon back")?;

    // The destination's daemon dies and is stopped under its guest, and the next one goes on.
    daemon.kill();
    let daemon = cluster.serve_with("vm1", &socket(&cluster, 1), &INCOMING)?;
    hammer.goes_on(&mut there).context("after the death of its daemon")?;
    daemon.stop()?;
    let daemon = cluster.serve_with("vm1", &socket(&cluster, 1), &INCOMING)?;
    hammer.goes_on(&mut there).context("after the restart of its daemon")?;
    let longest = hammer.finish(&mut there)?;
    eprintln!("longest verified round {longest:?}");
    vm.quit()?;
    stale.stop()?;
    there.power_off()?;
    daemon.stop()?;
    cluster.shut_down()
}
