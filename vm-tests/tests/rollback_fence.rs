//! A rollback that takes the volume from a client which the MDS cannot reach: from the moment it is answered, that client is told of no
//! success any more, in no copyset, whether it wrote there before or not; and what it wrote after the snapshot is gone.

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use ogee_client::{BlockDevice, Cluster as Sdk, ClusterConfig, OpenMode, Volume};
use ogee_common::limits::CHUNK_BYTES;
use ogee_common::name::VolumeRef;
use ogee_vm_tests::cluster::Cluster;
use ogee_vm_tests::gate::Gate;
use std::time::Duration;

const CHUNKS: u64 = 8;
/// The client asks the MDS what became of its attach when a copyset fences it, and hears nothing: it may go on asking.
const PATIENCE: Duration = Duration::from_secs(10);

async fn open(mds: String) -> Result<Volume> {
    let config = ClusterConfig { mds: vec![mds], description: "rollback fence".to_owned(), ..ClusterConfig::default() };
    let sdk = Sdk::connect(config).await?;
    Volume::open(&sdk, &VolumeRef::parse("disk")?, OpenMode::ReadWrite { steal: false }).await.context("open")
}

fn block(byte: u8) -> Bytes {
    Bytes::from(vec![byte; 4096])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_hears_of_no_mds_is_fenced_by_a_rollback() -> Result<()> {
    let cluster = Cluster::start("rollback-fence", 3, 1)?;
    let mds = cluster.mds().first().context("an address of the MDS")?.clone();
    cluster.ok(&["volume", "create", "disk", "--size", &(CHUNKS * u64::from(CHUNK_BYTES)).to_string()])?;
    let gate = Gate::before(mds.clone()).await?;
    let lost = open(gate.addr.clone()).await?;
    let place = |chunk: u64| chunk * u64::from(CHUNK_BYTES);
    // The first half of the chunks, so that the client has a fence in some copysets only.
    for chunk in 0..CHUNKS / 2 {
        lost.write(place(chunk), block(1)).await?;
    }
    // The second snapshot keeps the old head alive.
    cluster.ok(&["snapshot", "create", "disk@first"])?;
    lost.write(place(0), block(2)).await?;
    cluster.ok(&["snapshot", "create", "disk@second"])?;
    gate.shut(true);
    lost.write(place(0), block(3)).await.context("a client without an MDS goes on")?;
    lost.write(place(1), block(3)).await.context("a client without an MDS goes on")?;
    cluster.ok(&["rollback", "disk@first", "--detach"])?;
    for chunk in 0..CHUNKS {
        let late = tokio::time::timeout(PATIENCE, lost.write(place(chunk), block(4))).await;
        ensure!(!matches!(late, Ok(Ok(()))), "chunk {chunk}: a write after the rollback was acknowledged to the client that lost the volume");
        if chunk == 0 {
            eprintln!("the client hears: {late:?}");
        }
    }
    let now = open(mds).await?;
    for chunk in 0..CHUNKS {
        let expected = u8::from(chunk < CHUNKS / 2);
        let found = now.read(place(chunk), 4096).await?.to_vec();
        ensure!(found.iter().all(|b| *b == expected), "chunk {chunk} holds {}, not {expected}", found[0]);
        now.write(place(chunk), block(5)).await?;
    }
    gate.shut(false);
    now.detach().await?;
    cluster.shut_down()
}
