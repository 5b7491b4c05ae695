//! `ogee verify volume`: has every replica of one volume read, verified and compared, as a scrub does with a whole disk.
//!
//! The MDS hands the order to the chunkservers that have replicas; its leader keeps it in memory until they have obeyed. Whoever waits
//! here gives it again when it was lost with a leader.

use crate::connect::{Context, Mds};
use crate::error::{CliError, ErrorKind};
use crate::output::Progress;
use crate::scrub::{ScrubView, judge, text};
use crate::sdk_error::call_failed;
use clap::{Args, Subcommand};
use ogee_common::clock;
use ogee_common::name::VolumeRef;
use ogee_proto::mds as m;
use std::time::Duration;

/// How often it looks.
const LOOK: Duration = Duration::from_millis(500);
/// A chunkserver begins with its next heartbeat. One that has not begun after this long is given up.
const BEGIN_LIMIT: Duration = Duration::from_secs(30);

/// The commands of `ogee verify`.
#[derive(Debug, Clone, Subcommand)]
pub(crate) enum VerifyCommand {
    /// Read and verify every replica of a volume or snapshot, with all that it was cloned from
    #[command(after_help = "Examples:\n  ogee verify volume vm1\n  ogee verify volume vm1@before-upgrade --json\n  \
        ogee verify volume vm1 --cancel\n\n\
        It may be in use meanwhile. What is bad is mended from another replica; all snapshots of the volume are read as well. The chunkservers go on\n\
        when this command is interrupted. Each verifies one volume at a time, at scrub_mib_per_second; a later order takes the place of an earlier one.\n\
        Exit code: 1 if anything bad was found that could not be mended, replicas differ, or a replica could not be looked at.")]
    Volume(VerifyVolumeArgs),
}

/// Arguments of `verify volume`.
#[derive(Debug, Clone, Args)]
pub(crate) struct VerifyVolumeArgs {
    /// What to verify
    #[arg(value_name = "VOLUME[@SNAPSHOT]", value_parser = VolumeRef::parse)]
    source: VolumeRef,
    /// Stop a verification that is under way
    #[arg(long)]
    cancel: bool,
}

/// Carries out a command of `ogee verify`.
///
/// # Errors
/// No such volume, the MDS does not answer; something is not well in the end.
pub(crate) async fn run(context: &Context, command: VerifyCommand) -> Result<(), CliError> {
    let VerifyCommand::Volume(args) = command;
    let mds = context.mds()?;
    let ordered = order(&mds, &args).await?;
    if args.cancel {
        return context.out.result(&ordered.chunkservers, |ids| format!("{} chunkservers stop verifying", ids.len()));
    }
    let views = watch(context, &mds, &args, ordered).await?;
    if views.is_empty() {
        return context.out.result(&views, |_| "nothing was ever written to it: there is nothing to verify".to_owned());
    }
    context.out.result(&views, text)?;
    let absent: Vec<String> = views.iter().filter(|v| v.state != "done").map(|v| v.chunkserver.to_string()).collect();
    if !absent.is_empty() {
        let what = format!("verify: replicas on chunkserver {} were not verified; see: ogee cluster chunkservers", absent.join(", "));
        return Err(CliError::new(ErrorKind::Failure, what));
    }
    judge("verify", &views)
}

async fn order(mds: &Mds, args: &VerifyVolumeArgs) -> Result<m::OrderScrubReply, CliError> {
    let (volume, snapshot) = (args.source.path.to_string(), args.source.snapshot.clone().unwrap_or_default());
    let request = m::OrderScrubRequest { volume, snapshot, cancel: args.cancel, ..Default::default() };
    mds.order_scrub(request).await.map_err(|e| call_failed("order a verification", &e))
}

/// Waits until nobody is verifying, with a bar.
async fn watch(context: &Context, mds: &Mds, args: &VerifyVolumeArgs, mut ordered: m::OrderScrubReply) -> Result<Vec<ScrubView>, CliError> {
    let mut begun = clock::now();
    let mut shown = 0;
    let mut progress: Option<Progress> = None;
    loop {
        let all = mds.list_scrubs().await.map_err(|e| call_failed("list verifications", &e))?.scrubs;
        let own: Vec<m::Scrub> = all.into_iter().filter(|s| ordered.chunkservers.contains(&s.chunkserver)).collect();
        let obeyed = |s: &m::Scrub| s.verify.map_or(0, |r| r.order);
        if let Some(other) = own.iter().find(|s| obeyed(s) > ordered.order) {
            let what = format!("verify: chunkserver {} was ordered to verify another volume, or to stop; try again later", other.chunkserver);
            return Err(CliError::new(ErrorKind::Conflict, what));
        }
        let is_late = begun.elapsed() >= BEGIN_LIMIT;
        let is_lost = |s: &m::Scrub| s.verify.is_some() && s.verify_ordered != ordered.order && obeyed(s) < ordered.order;
        if own.iter().any(is_lost) && !is_late {
            ordered = order(mds, args).await?;
            tokio::time::sleep(LOOK).await;
            continue;
        }
        let waits = own.iter().any(|s| obeyed(s) < ordered.order);
        let view = |s: m::Scrub| {
            let ordered = if obeyed(&s) < ordered.order { ordered.order } else { 0 };
            ScrubView::from(m::Scrub { chunkserver: s.chunkserver, report: s.verify, ordered, ..Default::default() })
        };
        let views: Vec<ScrubView> = own.into_iter().map(view).collect();
        if !views.iter().any(|v| v.state == "running") && (!waits || is_late) {
            if let Some(bar) = &progress {
                bar.finish();
            }
            return Ok(views);
        }
        if !waits {
            begun = clock::now();
            let (done, total) = views.iter().map(ScrubView::rows).fold((0, 0), |(a, b), (c, d)| (a + c, b + d));
            let bar = progress.get_or_insert_with(|| Progress::items("verify", total, context.out.is_json()));
            bar.advance(done.saturating_sub(shown));
            shown = shown.max(done);
        }
        tokio::time::sleep(LOOK).await;
    }
}
