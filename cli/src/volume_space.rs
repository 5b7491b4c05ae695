//! `ogee volume info`: the volume as the MDS has it, and the space that it takes, as its chunkservers have it.
//!
//! Invariants: what cannot be counted in time is told with its reason and is no failure of the command, because the rest is true without it.

use crate::connect::Context;
use crate::error::CliError;
use crate::open::{close_volume, open_volume};
use crate::output::Progress;
use crate::sdk_error::io_failed;
use crate::volume::{VolumeView, describe, stat};
use clap::Args;
use ogee_client::{BlockDevice, MdsClient, OpenMode, VolumeSpace};
use ogee_common::limits::SEGMENT_BYTES;
use ogee_common::name::{VolumePath, VolumeRef};
use ogee_common::size::ByteLen;
use serde::Serialize;
use std::time::Duration;

/// Arguments of `volume info`.
#[derive(Debug, Clone, Args)]
pub(crate) struct InfoArgs {
    /// The volume
    #[arg(value_parser = VolumePath::parse)]
    volume: VolumePath,
    /// How long to count the space that it takes, seconds; 0: not at all
    #[arg(long, value_name = "SECONDS", default_value_t = 20)]
    space_timeout: u32,
}

/// A volume and its space.
#[derive(Debug, Serialize)]
struct InfoView {
    #[serde(flatten)]
    volume: VolumeView,
    /// Data that is seen, bytes of one replica; absent if it was not counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    data_bytes: Option<u64>,
    /// Of it what is not its parent's.
    #[serde(skip_serializing_if = "Option::is_none")]
    own_bytes: Option<u64>,
    /// Why it was not counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    space_error: Option<String>,
}

/// Carries it out.
///
/// # Errors
/// There is no such volume, or the MDS does not answer.
pub(crate) async fn info(context: &Context, mds: &MdsClient, args: &InfoArgs) -> Result<(), CliError> {
    let volume = VolumeView::from(stat(mds, &args.volume).await?);
    let space = match args.space_timeout {
        0 => Err("not asked for".to_owned()),
        seconds => {
            let counted = tokio::time::timeout(Duration::from_secs(seconds.into()), count(context, args)).await;
            match counted {
                Ok(counted) => counted.map_err(|error| error.chain()),
                Err(_) => Err(format!("not done within {seconds} s; --space-timeout has it wait longer")),
            }
        }
    };
    let view = InfoView {
        volume,
        data_bytes: space.as_ref().ok().map(|space| space.data_bytes),
        own_bytes: space.as_ref().ok().map(|space| space.own_bytes),
        space_error: space.err(),
    };
    context.out.result(&view, |view| format!("{}\n{:<13} {}", describe(&view.volume), "data", told(view)))
}

async fn count(context: &Context, args: &InfoArgs) -> Result<VolumeSpace, CliError> {
    let name = VolumeRef { path: args.volume.clone(), snapshot: None };
    let cluster = context.copying_cluster()?;
    let volume = open_volume(&cluster, &name, OpenMode::ReadOnly).await?;
    let progress = Progress::items("count", volume.info().size_bytes.div_ceil(SEGMENT_BYTES), context.out.is_json());
    let counted = volume.space(|_, _| progress.advance(1)).await;
    progress.finish();
    // A reader that is not given back blocks nobody.
    let closed = close_volume(&volume).await;
    let space = counted.map_err(io_failed)?;
    closed.map(|()| space)
}

fn told(view: &InfoView) -> String {
    match (view.data_bytes, view.own_bytes) {
        (Some(data), Some(own)) if view.volume.is_on_others() => {
            format!("{} in one replica, {} of it its own", ByteLen(data), ByteLen(own))
        }
        (Some(data), _) => format!("{} in one replica", ByteLen(data)),
        _ => format!("not counted: {}", view.space_error.as_deref().unwrap_or("-")),
    }
}
