//! Real NBD clients against `ogee nbd serve` over a real cluster: libnbd's tools and its Python module, QEMU's tools, fio, nbd-client.
//!
//! What each was seen to do is the table in `docs/nbd.md`.

use anyhow::{Context, Result, ensure};
use ogee_vm_tests::cluster::{Cluster, binary};
use ogee_vm_tests::deadline::wait_for;
use ogee_vm_tests::nbd::{NbdServer, client, script};
use ogee_vm_tests::process::{is_alive, kill_now, send, tied, wait_exit};
use ogee_vm_tests::vhost::{Readiness, VhostBackend};
use rand::rngs::StdRng;
use rand::{RngCore, SeedableRng};
use rustix::process::Signal;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

const MIB: u64 = 1 << 20;

/// A file with data, holes and zeros.
fn image(path: &Path, size: u64) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::create(path)?;
    file.set_len(size)?;
    let mut rng = StdRng::seed_from_u64(6);
    let mut part = vec![0; 3 << 20];
    for at in [0, 7 * MIB + 512, 40 * MIB] {
        rng.fill_bytes(&mut part);
        file.write_all_at(&part, at)?;
    }
    Ok(())
}

fn text(path: &Path) -> &str {
    path.to_str().expect("scratch paths are plain")
}

#[test]
fn libnbd_tools_list_map_and_copy_both_ways() -> Result<()> {
    let cluster = Cluster::start("nbd-libnbd", 3, 1)?;
    cluster.ok(&["volume", "create", "team/a", "--size", "64M"])?;
    cluster.ok(&["volume", "create", "b", "--size", "3G"])?;
    let server = NbdServer::start(&cluster, "nbd-libnbd-1", &["team/a", "b"])?;
    let (source, back) = (cluster.folder().join("source"), cluster.folder().join("back"));
    image(&source, 64 * MIB)?;
    client("nbdcopy", &[text(&source), &server.unix("team/a")?])?;
    client("nbdcopy", &[&server.tcp("team/a")?, text(&back)])?;
    client("cmp", &[&source, &back])?;
    let list: serde_json::Value = serde_json::from_str(&client("nbdinfo", &["--list", "--json", &server.tcp("b")?])?)?;
    let names: Vec<_> = list["exports"].as_array().context("exports")?.iter().map(|e| &e["export-name"]).collect();
    ensure!(names == ["team/a", "b"], "{list}");
    ensure!(list["exports"][1]["export-size"] == 3_221_225_472_u64, "{list}");
    let map: serde_json::Value = serde_json::from_str(&client("nbdinfo", &["--map", "--json", &server.unix("b")?])?)?;
    ensure!(map[0]["length"] == 3_221_225_472_u64 && map[0]["type"] == 3, "nothing was written: {map}");
    let port = server.tcp("b")?;
    let port = port.rsplit_once(':').and_then(|(_, rest)| rest.split('/').next()).context("port")?.to_owned();
    let listed = client("nbd-client", &["-l", "127.0.0.1", &port])?;
    ensure!(listed.contains("team/a") && listed.contains('b'), "{listed}");
    server.stop()?;

    // A snapshot stays what it was; the volume goes on.
    cluster.ok(&["snapshot", "create", "team/a@v1"])?;
    let server = NbdServer::start(&cluster, "nbd-libnbd-2", &["team/a", "team/a@v1"])?;
    client("qemu-io", &["-f", "raw", "-c", "write -P 1 0 1M", &server.unix("team/a")?])?;
    client("nbdcopy", &[&server.unix("team/a@v1")?, text(&back)])?;
    client("cmp", &[&source, &back])?;
    client("nbdcopy", &[&server.unix("team/a")?, text(&back)])?;
    ensure!(client("cmp", &[&source, &back]).is_err(), "the volume has changed");
    server.stop()?;
    ensure!(cluster.checksum("team/a@v1")? != cluster.checksum("team/a")?, "SDK and NBD agree");
    cluster.shut_down()
}

#[test]
fn nbdsh_every_command_and_flag() -> Result<()> {
    let cluster = Cluster::start("nbd-commands", 3, 1)?;
    cluster.ok(&["volume", "create", "rw", "--size", "3G"])?;
    cluster.ok(&["volume", "create", "ro", "--size", "64M"])?;
    cluster.ok(&["snapshot", "create", "ro@s"])?;
    let server = NbdServer::start(&cluster, "nbd-commands", &["rw", "ro@s"])?;
    let file = script("nbd-commands.py");
    let size = (3_u64 << 30).to_string();
    let over = |rw: String, ro: String| client("/usr/bin/python3", &[text(&file), &rw, &ro, &size]);
    let said = over(server.unix("rw")?, server.unix("ro@s")?)?;
    ensure!(said.ends_with("ok\n"), "{said}");
    let said = over(server.tcp("rw")?, server.tcp("ro@s")?)?;
    ensure!(said.ends_with("ok\n"), "{said}");
    server.stop()?;
    cluster.shut_down()
}

#[test]
fn qemu_tools_convert_compare_and_io() -> Result<()> {
    let cluster = Cluster::start("nbd-qemu", 3, 1)?;
    cluster.ok(&["volume", "create", "disk", "--size", "64M"])?;
    let server = NbdServer::start(&cluster, "nbd-qemu", &["disk"])?;
    let source = cluster.folder().join("source");
    let (source, qcow2) = (text(&source), cluster.folder().join("back.qcow2"));
    image(Path::new(source), 64 * MIB)?;
    for uri in [server.tcp("disk")?, server.unix("disk")?] {
        client("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", source, &uri])?;
        client("qemu-img", &["compare", "-f", "raw", "-F", "raw", source, &uri])?;
        client("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &uri, text(&qcow2)])?;
        client("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", source, text(&qcow2)])?;
        let info = client("qemu-img", &["info", "--output", "json", &uri])?;
        ensure!(info.contains("67108864"), "{info}");
        let mut io = vec!["-f".to_owned(), "raw".to_owned()];
        for command in [
            "write -P 3 1M 1M",
            "write -f -P 4 4096 4096",
            "write -z 0 4096",
            "write -z -u 512k 512k",
            "discard 3M 1M",
            "flush",
            "read -P 3 1M 1M",
            "read -P 4 4096 4096",
            "read -P 0 0 4096",
            "read -P 0 512k 512k",
            "read -P 0 3M 1M",
            "write -P 9 100 1000",
            "read -P 9 100 1000",
            "map",
        ] {
            io.extend(["-c".to_owned(), command.to_owned()]);
        }
        io.push(uri);
        let said = client("qemu-io", &io)?;
        ensure!(!said.contains("fail"), "{said}");
    }
    ensure!(!server.output().text().contains("WARN"), "{}", server.output().text());
    server.stop()?;
    cluster.shut_down()
}

#[test]
fn fio_verifies_while_chunkservers_are_killed() -> Result<()> {
    let mut cluster = Cluster::start("nbd-killed", 3, 1)?;
    cluster.ok(&["volume", "create", "disk", "--size", "256M"])?;
    let server = NbdServer::start(&cluster, "nbd-killed", &["disk"])?;
    let out = tempfile::NamedTempFile::new()?;
    let mut fio = tied("fio");
    let uri = format!("--uri={}", server.unix("disk")?);
    fio.args(["--name=kill", "--ioengine=nbd", &uri, "--rw=randrw", "--bs=4k", "--iodepth=16", "--size=128m"]);
    fio.args(["--verify=crc32c", "--verify_state_save=0", "--time_based", "--runtime=25", "--output-format=json"]);
    let mut fio = fio.stdin(Stdio::null()).stdout(out.reopen()?).stderr(Stdio::inherit()).spawn().context("start fio")?;
    let written = || -> Result<u64> {
        let info = cluster.json(&["volume", "info", "disk", "--json"])?;
        info["allocated_segments"].as_u64().context("allocated_segments")
    };
    wait_for("the first write of fio", Duration::from_secs(20), || Ok((written()? > 0).then_some(())))?;
    for victim in ["cs-1", "cs-2", "cs-3"] {
        cluster.kill(victim)?;
        ensure!(fio.try_wait()?.is_none(), "fio ended when {victim} was killed");
        cluster.revive()?;
    }
    let status = wait_exit(&mut fio, "fio", Duration::from_secs(90));
    kill_now(&mut fio);
    let report = std::fs::read_to_string(out.path())?;
    ensure!(status?.success(), "fio failed: {report}");
    let report: serde_json::Value = serde_json::from_str(&report[report.find('{').context("a report")?..])?;
    let job = &report["jobs"][0];
    eprintln!("fio under kills: {} reads, {} writes", job["read"]["total_ios"], job["write"]["total_ios"]);
    ensure!(job["error"] == 0 && job["write"]["total_ios"].as_u64() > Some(100), "{job}");
    ensure!(!server.output().text().contains("WARN"), "{}", server.output().text());
    server.stop()?;
    cluster.shut_down()
}

#[test]
fn a_stop_under_load_loses_no_acknowledged_write() -> Result<()> {
    let cluster = Cluster::start("nbd-stop", 3, 1)?;
    cluster.ok(&["volume", "create", "disk", "--size", "4G"])?;
    let server = NbdServer::start(&cluster, "nbd-stop-1", &["disk"])?;
    let (file, acknowledged, out) =
        (script("nbd-until-closed.py"), cluster.folder().join("acknowledged"), tempfile::NamedTempFile::new()?);
    let mut writer = tied("/usr/bin/python3");
    writer.arg(&file).args(["write", &server.tcp("disk")?]).arg(&acknowledged).stdin(Stdio::null());
    let mut writer = writer.stdout(out.reopen()?).spawn().context("start the writer")?;
    wait_for("a thousand acknowledged writes", Duration::from_secs(20), || {
        Ok(std::fs::read_to_string(out.path())?.contains("begun").then_some(()))
    })?;
    server.stop()?;
    let status = wait_exit(&mut writer, "the writer", Duration::from_secs(20));
    kill_now(&mut writer);
    ensure!(status?.success(), "{}", std::fs::read_to_string(out.path())?);
    // The volume was given back: nothing has to be stolen.
    let server = NbdServer::start(&cluster, "nbd-stop-2", &["disk"])?;
    let said = client("/usr/bin/python3", &[text(&file), "check", &server.unix("disk")?, text(&acknowledged)])?;
    eprintln!("after SIGTERM under load: {said}");
    server.stop()?;
    cluster.shut_down()
}

#[test]
fn sockets_of_systemd_are_served_and_stay() -> Result<()> {
    let cluster = Cluster::start("nbd-activation", 3, 1)?;
    cluster.ok(&["volume", "create", "disk", "--size", "64M"])?;
    let socket = cluster.folder().join("activated");
    let process = VhostBackend::start("nbd-activation", Path::new("/usr/bin/python3"), &socket, Readiness::Says, |command| {
        command.env("OGEE_MDS", cluster.mds().join(",")).arg(script("with-listen-fds.py")).arg(&socket);
        command.arg(binary().expect("the cluster runs it")).args(["nbd", "serve", "disk"]);
    })?;
    let uri = format!("nbd+unix:///disk?socket={}", text(&socket));
    ensure!(client("nbdinfo", &["--size", &uri])? == "67108864\n", "size");
    process.stop()?;
    ensure!(socket.exists(), "the socket is systemd's");
    cluster.shut_down()
}

#[test]
fn refusals_are_one_line_that_says_what_to_do() -> Result<()> {
    let cluster = Cluster::start("nbd-refusals", 3, 1)?;
    cluster.ok(&["volume", "create", "disk", "--size", "64M"])?;
    let socket = cluster.folder().join("s");
    let socket = text(&socket);
    for (arguments, word) in [
        (&["nbd", "serve", "disk"][..], "--socket PATH"),
        (&["nbd", "serve", "none", "--socket", socket], "none"),
        (&["nbd", "serve", "disk", "disk", "--socket", socket], "twice"),
        (&["nbd", "serve", "disk", "--socket", "/nowhere/s"], "/nowhere/s"),
        (&["nbd", "serve", "disk", "--socket", socket, "--threads", "0"], "threads"),
        (&["nbd", "serve", "disk", "--listen", "127.0.0.1"], "127.0.0.1"),
    ] {
        let line = cluster.refused(arguments)?;
        ensure!(line.contains(word), "{arguments:?}: {line}");
    }
    let server = NbdServer::start(&cluster, "nbd-refusals", &["disk"])?;
    let line = cluster.refused(&["nbd", "serve", "disk", "--socket", socket])?;
    ensure!(line.contains("--steal"), "{line}");
    // Killed, it leaves its volume attached; the next one takes it after a moment.
    let pid = server.pid();
    send(pid, Signal::KILL)?;
    wait_for("death of the server", Duration::from_secs(10), || Ok((!is_alive(pid)).then_some(())))?;
    drop(server);
    NbdServer::start(&cluster, "nbd-refusals-2", &["disk", "--steal"])?.stop()?;
    cluster.shut_down()
}
