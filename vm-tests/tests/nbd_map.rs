//! What real NBD clients are told of a volume's pages: which hold anything, and which changed since a snapshot. nbdinfo, libnbd and
//! qemu-img against `ogee nbd serve` over a real cluster.

use anyhow::{Context, Result, ensure};
use ogee_vm_tests::cluster::Cluster;
use ogee_vm_tests::nbd::{NbdServer, client, script};
use serde_json::Value;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;

/// Extents as (bytes, flags).
type Map = Vec<(u64, u64)>;

fn io(server: &NbdServer, export: &str, commands: &[&str]) -> Result<()> {
    let uri = server.unix(export)?;
    let mut words = vec!["-f", "raw"];
    commands.iter().for_each(|command: &&str| words.extend(["-c", *command]));
    words.push(&uri);
    client("qemu-io", &words).map(drop)
}

/// What nbdinfo prints for a context, neighbours that are alike joined.
fn nbdinfo(uri: &str, context: &str) -> Result<Map> {
    let option = format!("--map={context}");
    let map = client("nbdinfo", &[option.as_str(), "--json", uri])?;
    let map: Value = serde_json::from_str(&map).with_context(|| map.clone())?;
    let mut joined: Map = vec![];
    for entry in map.as_array().context("a list")? {
        let number = |field: &str| entry[field].as_u64().with_context(|| format!("{field} in {entry}"));
        let (len, flags) = (number("length")?, number("type")?);
        match joined.last_mut().filter(|(_, last)| *last == flags) {
            Some((sum, _)) => *sum += len,
            None => joined.push((len, flags)),
        }
    }
    ensure!(joined.iter().map(|(len, _)| len).sum::<u64>() == SIZE, "{joined:?}");
    Ok(joined)
}

/// What qemu-img says is dirty when a context stands for a dirty bitmap: it shows dirty ranges as those without data.
fn qemu_dirty(server: &NbdServer, export: &str, context: &str) -> Result<Vec<(u64, u64)>> {
    let uri = server.tcp(export)?;
    let port = uri.rsplit_once(':').and_then(|(_, rest)| rest.split('/').next()).context("port")?;
    let options = format!(
        "driver=nbd,server.type=inet,server.host=127.0.0.1,server.port={port},export={export},x-dirty-bitmap={context}"
    );
    let map = client("qemu-img", &["map", "--output=json", "--image-opts", &options])?;
    let map: Value = serde_json::from_str(&map).with_context(|| map.clone())?;
    let entries = map.as_array().context("a list")?.iter();
    let dirty = entries.filter(|entry| entry["data"] == false).map(|entry| {
        anyhow::Ok((entry["start"].as_u64().context("start")?, entry["length"].as_u64().context("length")?))
    });
    dirty.collect()
}

#[test]
fn allocation_and_changes_are_told_by_page() -> Result<()> {
    let cluster = Cluster::start("nbd-map", 3, 1)?;
    cluster.ok(&["volume", "create", "a", "--size", "64M"])?;
    let server = NbdServer::start(&cluster, "nbd-map-1", &["a"])?;
    io(&server, "a", &["write -P 1 0 64k", "write -P 1 20M 4k"])?;
    server.stop()?;
    cluster.ok(&["snapshot", "create", "a@s1"])?;
    let server = NbdServer::start(&cluster, "nbd-map-2", &["a"])?;
    io(&server, "a", &["write -P 2 4k 8k", "discard 20M 4k", "write -P 3 40M 4k"])?;
    server.stop()?;
    cluster.ok(&["snapshot", "create", "a@s2"])?;
    cluster.ok(&["clone", "a@s2", "c"])?;

    let server = NbdServer::start(&cluster, "nbd-map-3", &["a@s2", "a", "c", "a@s1"])?;
    io(&server, "a", &["write -P 4 50M 4k"])?;
    io(&server, "c", &["write -P 5 60M 4k"])?;
    let (page, rest) = (4 * KIB, SIZE - 40 * MIB - 4 * KIB);
    let allocated: Map = vec![(64 * KIB, 0), (40 * MIB - 64 * KIB, 3), (page, 0), (rest, 3)];
    let changed: Map = vec![
        (page, 0), (2 * page, 1), (20 * MIB - 3 * page, 0), (page, 1), (20 * MIB - page, 0), (page, 1), (rest, 0),
    ];
    let later = |mut map: Map, at: u64, flags: (u64, u64)| {
        map.pop();
        map.extend([(at - 40 * MIB - page, flags.0), (page, flags.1), (SIZE - at - page, flags.0)]);
        map
    };
    let told = |export: &str, context: &str| nbdinfo(&server.unix(export)?, context);
    let is = |what: &str, told: Map, expected: &Map| {
        ensure!(told == *expected, "{what}: {told:?}, not {expected:?}");
        Ok(())
    };
    is("the snapshot", told("a@s2", "base:allocation")?, &allocated)?;
    is("the volume", told("a", "base:allocation")?, &later(allocated.clone(), 50 * MIB, (3, 0)))?;
    is("the clone, through its parent", told("c", "base:allocation")?, &later(allocated, 60 * MIB, (3, 0)))?;
    is("between snapshots", told("a@s2", "ogee:changed:s1")?, &changed)?;
    is("since a snapshot", told("a", "ogee:changed:s1")?, &later(changed, 50 * MIB, (0, 1)))?;
    is("since the last", told("a", "ogee:changed:s2")?, &vec![(50 * MIB, 0), (page, 1), (SIZE - 50 * MIB - page, 0)])?;

    let dirty = qemu_dirty(&server, "a@s2", "ogee:changed:s1")?;
    ensure!(dirty == [(page, 2 * page), (20 * MIB, page), (40 * MIB, page)], "{dirty:?}");
    let file = script("nbd-contexts.py");
    let file = file.to_str().context("a plain path")?;
    let said = client("/usr/bin/python3", &[file, &server.unix("a@s2")?, &server.unix("a")?, &server.unix("a@s1")?])?;
    ensure!(said.ends_with("ok\n"), "{said}");
    ensure!(!server.output().text().contains("WARN"), "{}", server.output().text());
    server.stop()?;
    cluster.shut_down()
}
