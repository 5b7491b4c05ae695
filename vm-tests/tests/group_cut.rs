//! Group snapshots of a real cluster are one cut. Writers count in two volumes, each volume with a client of its own; a number
//! goes to the second volume when the first has acknowledged it. So a cut that has a number in the second volume has it
//! in the first, and the first is ahead by one at most. The same while the MDS cannot reach one of the clients,
//! which goes on writing: then the copysets seal it off, each at another moment.

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use ogee_client::{BlockDevice, Cluster as Sdk, ClusterConfig, OpenMode, Volume};
use ogee_common::clock;
use ogee_common::limits::CHUNK_BYTES;
use ogee_common::name::VolumeRef;
use ogee_vm_tests::cluster::Cluster;
use ogee_vm_tests::gate::Gate;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Consecutive numbers of a writer go to different chunks, and so to different copysets.
const CHUNKS: u64 = 8;
const SIZE: u64 = CHUNKS * CHUNK_BYTES as u64;
const WRITERS: u64 = 2;
const SLOT_BYTES: u64 = 4096;
const HELD_ROUNDS: u32 = 25;
const BYPASSED_ROUNDS: u32 = 3;
/// Without an answer from a client the MDS waits 2 s, then for the seals.
const PATIENCE: Duration = Duration::from_secs(60);

async fn connect(addr: String) -> Result<Sdk> {
    let config = ClusterConfig { mds: vec![addr], description: "group cut".to_owned(), ..ClusterConfig::default() };
    Sdk::connect(config).await.context("connect")
}

async fn open(sdk: &Sdk, name: &str, mode: OpenMode) -> Result<Volume> {
    Volume::open(sdk, &VolumeRef::parse(name)?, mode).await.with_context(|| format!("open {name}"))
}

fn place(writer: u64, number: u64) -> u64 {
    number % CHUNKS * u64::from(CHUNK_BYTES) + writer * SLOT_BYTES
}

/// Counts until it is stopped: in the first volume, then in the second.
async fn count(writer: u64, volumes: [Volume; 2], counted: Arc<AtomicU64>, stop: Arc<AtomicBool>) -> Result<()> {
    let mut number = 0u64;
    while !stop.load(Ordering::Relaxed) {
        number += 1;
        for volume in &volumes {
            let mut data = vec![0; 512];
            data[..8].copy_from_slice(&number.to_le_bytes());
            volume.write(place(writer, number), Bytes::from(data)).await?;
        }
        counted.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

async fn more(counted: &AtomicU64, numbers: u64) -> Result<()> {
    let (target, until) = (counted.load(Ordering::Relaxed) + numbers, clock::now() + PATIENCE);
    while counted.load(Ordering::Relaxed) < target {
        ensure!(clock::now() < until, "the writers stand still");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Ok(())
}

/// The last number of a writer in a snapshot, which has every number before it.
async fn last(volume: &Volume, writer: u64) -> Result<u64> {
    let mut numbers = vec![];
    for slot in 0..CHUNKS {
        let data = volume.read(place(writer, slot), 512).await?.to_vec();
        numbers.push(u64::from_le_bytes(data[..8].try_into()?));
    }
    let last = numbers.iter().copied().max().unwrap_or(0);
    for (slot, found) in (0..CHUNKS).zip(&numbers) {
        // The highest number up to the last one that goes to this slot; none yet at the start.
        let expected = (last + 1).saturating_sub(CHUNKS).max(1)..=last;
        let expected = expected.rev().find(|n| n % CHUNKS == slot).unwrap_or(0);
        ensure!(*found == expected, "writer {writer}, slot {slot}: {found} instead of {expected} with last {last}: {numbers:?}");
    }
    Ok(last)
}

/// Checks a cut, and says the last numbers in it.
async fn check(sdk: &Sdk, name: &str) -> Result<Vec<(u64, u64)>> {
    let data = open(sdk, &format!("db/data@{name}"), OpenMode::ReadOnly).await?;
    let log = open(sdk, &format!("db/log@{name}"), OpenMode::ReadOnly).await?;
    let mut seen = vec![];
    for writer in 0..WRITERS {
        let (data, log) = (last(&data, writer).await?, last(&log, writer).await?);
        // Writer 0 counts in `data` first, writer 1 in `log`.
        let (first, second) = if writer == 0 { (data, log) } else { (log, data) };
        ensure!(
            first == second || first == second + 1,
            "{name}: writer {writer} was at {first} in its first volume and at {second} in its second"
        );
        seen.push((first, second));
    }
    Ok(seen)
}

fn holds(answer: &serde_json::Value) -> Vec<&str> {
    let list = answer["snapshots"].as_array().map_or(&[][..], Vec::as_slice);
    list.iter().filter_map(|s| s["hold"].as_str()).collect()
}

async fn take(cluster: &Arc<Cluster>, name: &str) -> Result<serde_json::Value> {
    let (cluster, members) = (cluster.clone(), [format!("db/data@{name}"), format!("db/log@{name}")]);
    tokio::task::spawn_blocking(move || cluster.json(&["snapshot", "create", &members[0], &members[1], "--json"])).await?
}

fn refusals(cluster: &Cluster) -> Result<()> {
    let cases = [
        (["db/data@x", "db/data@y"], "\"db/data\" is named twice"),
        (["db/data@x", "db/nothing@x"], "there is no volume \"db/nothing\""),
        (["db/data@x", "db/log@held-0"], "\"db/log\" has a snapshot \"held-0\" already"),
    ];
    for (members, text) in cases {
        let said = cluster.refused(&["snapshot", "create", members[0], members[1]])?;
        ensure!(said.contains(text), "{said}");
    }
    let listed = cluster.ok(&["snapshot", "ls", "db/data"])?;
    ensure!(!listed.contains(" x ") && listed.contains("GROUP"), "{listed}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_snapshot_is_one_cut_under_load() -> Result<()> {
    let cluster = Arc::new(Cluster::start("group-cut", 3, 1)?);
    let mds = cluster.mds().first().context("an address of the MDS")?.clone();
    for name in ["db/data", "db/log"] {
        cluster.ok(&["volume", "create", name, "--size", &SIZE.to_string()])?;
    }
    let gates = [Gate::before(mds.clone()).await?, Gate::before(mds.clone()).await?];
    let (of_data, of_log) = (connect(gates[0].addr.clone()).await?, connect(gates[1].addr.clone()).await?);
    let data = open(&of_data, "db/data", OpenMode::ReadWrite { steal: false }).await?;
    let log = open(&of_log, "db/log", OpenMode::ReadWrite { steal: false }).await?;
    let (counted, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let orders = [[data.clone(), log.clone()], [log.clone(), data.clone()]];
    let writers: Vec<_> =
        (0..).zip(orders).map(|(n, v)| tokio::spawn(count(n, v, counted.clone(), stop.clone()))).collect();
    more(&counted, 4 * CHUNKS).await?;
    let mut names = vec![];
    for round in 0..HELD_ROUNDS {
        let name = format!("held-{round}");
        let answer = take(&cluster, &name).await?;
        ensure!(holds(&answer) == ["held", "held"], "{answer}");
        ensure!(answer["group"].as_u64() > Some(0), "{answer}");
        more(&counted, 20).await?;
        names.push(name);
    }
    refusals(&cluster)?;
    for round in 0..BYPASSED_ROUNDS {
        let (name, at) = (format!("bypassed-{round}"), (round % 2) as usize);
        gates[at].shut(true);
        let answer = take(&cluster, &name).await?;
        ensure!(holds(&answer)[at] == "bypassed" && holds(&answer)[1 - at] == "held", "{answer}");
        more(&counted, 20).await?;
        gates[at].shut(false);
        names.push(name);
    }
    gates.iter().for_each(|gate| gate.shut(true));
    let said = {
        let cluster = cluster.clone();
        tokio::task::spawn_blocking(move || cluster.refused(&["snapshot", "create", "db/data@two", "db/log@two"])).await??
    };
    ensure!(said.contains("the clients of \"db/data\", \"db/log\" do not answer"), "{said}");
    gates.iter().for_each(|gate| gate.shut(false));
    more(&counted, 20).await?;
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await??;
    }
    let reader = connect(mds).await?;
    let mut between = 0;
    for name in &names {
        let seen = check(&reader, name).await?;
        between += seen.iter().filter(|(first, second)| first != second).count();
    }
    eprintln!("{} cuts of {} numbers, {between} of {} between the two volumes", names.len(), counted.load(Ordering::Relaxed), names.len() * 2);
    data.detach().await?;
    log.detach().await?;
    Arc::into_inner(cluster).context("the cluster is still in use")?.shut_down()
}
