//! A golden image is backed up, its cluster goes away for ever, and a guest boots at once from a volume of a new cluster that stands on the
//! backup. The repository goes away for a while under the running guest; then snapclone fills the volume and the backup is needed no more.

use anyhow::{Context, Result, ensure};
use ogee_common::clock;
use ogee_vm_tests::cluster::{Cluster, binary};
use ogee_vm_tests::deadline::wait_for;
use ogee_vm_tests::image::Image;
use ogee_vm_tests::places;
use ogee_vm_tests::process::{kill_now, tied};
use ogee_vm_tests::vm::Vm;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

/// The bar is 5 s later than from a local clone, in the same run; both are printed. A machine that others use differs by more between two boots.
const SLOWER: Duration = Duration::from_secs(25);
/// How long the repository is away.
const OUTAGE: Duration = Duration::from_secs(30);
/// For the guest to read its boot disk, and for the hydrate task.
const LIMIT: Duration = Duration::from_secs(180);

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is no text")
}

#[test]
fn a_guest_boots_from_a_lazy_restore() -> Result<()> {
    let image = Image::golden()?;
    // Removed when the guard is dropped.
    let folder = places::scratch_folder()?;
    let _guard = ogee_vm_tests::reaper::Reaper::of_folder(&folder)?;
    let (repo, away, config) = (folder.join("repo"), folder.join("away"), folder.join("snapclone.toml"));
    let url = format!("file://{}", repo.display());

    let mut first = Cluster::start("lazy-restore-1", 3, 1)?;
    first.ok(&["image", "import", &image.raw.to_string_lossy(), "golden"])?;
    first.ok(&["clone", "golden", "local"])?;
    first.ok(&["backup", "create", "golden", "--repo", &url])?;
    let sum = first.checksum("golden")?;
    let backend = first.serve("local")?;
    let start = clock::now();
    let vm = Vm::boot("lazy-restore-local", &backend.disk())?;
    let local = start.elapsed();
    vm.power_off()?;
    backend.stop()?;
    first.shut_down()?;

    let mut cluster = Cluster::start("lazy-restore-2", 3, 1)?;
    let mds: Vec<String> = cluster.mds().iter().map(|addr| format!("{addr:?}")).collect();
    let text_of = format!("mds = [{}]\n[[repository]]\nname = \"main\"\nurl = \"{url}\"\n", mds.join(", "));
    std::fs::write(&config, text_of).context("write the configuration")?;
    let access = ["--repo-config", text(&config)?];
    cluster.ok(&[&["restore", "golden", "vm1", "--lazy", "--no-hydrate", "--repo", "main"][..], &access].concat())?;
    let refused = cluster.refused(&["checksum", "vm1"])?;
    ensure!(refused.contains("--repo-config"), "who has no access should be told how to get it: {refused}");

    let socket = folder.join("lazy.sock");
    let backend = cluster.serve_with("vm1", &socket, &access)?;
    let start = clock::now();
    let mut vm = Vm::boot("lazy-restore-lazy", &backend.disk())?;
    let lazy = start.elapsed();
    eprintln!("from power-on to the shell: {local:?} from a local clone, {lazy:?} from the backup");
    ensure!(lazy <= local + SLOWER, "a lazy restore boots in {lazy:?}, a local clone in {local:?}");
    vm.run_ok("echo precious >/mnt/kept && sync")?;

    // The repository goes away under a guest that reads what it has never read.
    std::fs::rename(&repo, &away).context("take the repository away")?;
    vm.spawn("(dd if=/dev/vda of=/dev/null bs=1M && touch /tmp/read) 2>/tmp/dd")?;
    std::thread::sleep(OUTAGE);
    ensure!(vm.run("test -e /tmp/read")?.code == 1, "all of the disk was read without the repository");
    std::fs::rename(&away, &repo).context("bring the repository back")?;
    vm.wait_until("test -e /tmp/read", LIMIT)?;
    assert_eq!(vm.disk_errors()?, "");

    // The volume is filled under the guest, and needs the repository no more.
    let log = std::fs::File::create(places::logs()?.join("lazy-restore-snapclone.log")).context("make a log")?;
    let mut snapclone = tied(binary()?);
    snapclone.args(["snapclone", "--config", text(&config)?]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    let mut snapclone = snapclone.spawn().context("start snapclone")?;
    let hydrate = cluster.json(&["volume", "hydrate", "vm1", "--json"])?;
    let task = hydrate["task"].to_string();
    let state = || -> Result<Option<String>> {
        let task = cluster.json(&["task", "show", &task, "--json"])?;
        Ok(task["state"].as_str().filter(|state| ["done", "failed", "cancelled"].contains(state)).map(str::to_owned))
    };
    let ended = wait_for("the hydrate task", LIMIT, state);
    kill_now(&mut snapclone);
    ensure!(ended? == "done", "the hydrate task failed: {}", cluster.ok(&["task", "show", &task])?);
    vm.reboot()?;
    assert_eq!(vm.run_ok("cat /mnt/kept")?, "precious");
    assert_eq!(vm.disk_errors()?, "");
    vm.power_off()?;
    backend.stop()?;
    std::fs::remove_dir_all(&repo).context("remove the repository")?;
    let backend = cluster.serve("vm1")?;
    let mut vm = Vm::boot("lazy-restore-complete", &backend.disk())?;
    assert_eq!(vm.run_ok("cat /mnt/kept")?, "precious");
    vm.power_off()?;
    backend.stop()?;
    ensure!(cluster.checksum("vm1")? != sum, "the guest wrote to it");
    cluster.shut_down()
}
