//! `ogee scrub`: has chunkservers read and verify all their data, and shows how far they are.

use crate::connect::{Context, Mds};
use crate::error::{CliError, ErrorKind};
use crate::output::{Progress, Table, counted};
use crate::sdk_error::call_failed;
use clap::{Args, Subcommand};
use ogee_common::clock;
use ogee_proto::mds as m;
use serde::Serialize;
use std::time::Duration;

/// How often `--watch` looks.
const LOOK: Duration = Duration::from_millis(500);

/// The commands of `ogee scrub`.
#[derive(Debug, Clone, Subcommand)]
pub(crate) enum ScrubCommand {
    /// Read and verify all data now, and mend what is bad from other replicas
    #[command(after_help = "Examples:\n  ogee scrub start --watch       # every chunkserver\n  ogee scrub start 3 4\n  \
        ogee scrub start --pool fast\n\nWithout it every chunkserver scrubs once a week (scrub_interval_hours).\n\
        Exit code of --watch: 1 if anything bad was found that could not be mended, or replicas differ.")]
    Start(StartArgs),
    /// How far the scrub of each chunkserver is, and what the last one found
    #[command(after_help = "Examples:\n  ogee scrub status\n  ogee scrub status --json")]
    Status(StatusArgs),
    /// Stop scrubs that are running
    #[command(after_help = "Example:\n  ogee scrub cancel 3")]
    Cancel(WhichArgs),
}

/// Which chunkservers.
#[derive(Debug, Clone, Args)]
pub(crate) struct WhichArgs {
    /// Their ids, as in: ogee cluster chunkservers; none: all
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    ids: Vec<u32>,
    /// Only those of this pool
    #[arg(long, default_value = "")]
    pool: String,
}

/// Arguments of `scrub start`.
#[derive(Debug, Clone, Args)]
pub(crate) struct StartArgs {
    /// Which chunkservers.
    #[command(flatten)]
    which: WhichArgs,
    /// Stay until all have finished
    #[arg(long)]
    watch: bool,
}

/// Arguments of `scrub status`.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct StatusArgs {
    /// Stay until nothing is running
    #[arg(long)]
    watch: bool,
}

/// What a scrub, or a verification, of one chunkserver has come to.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct ScrubView {
    /// Whose.
    pub(crate) chunkserver: u32,
    /// `ordered`, `running`, `done`, `stopped`, `never` or `unknown` (not heard of).
    pub(crate) state: &'static str,
    done_rows: u64,
    total_rows: u64,
    pages: u64,
    bad_pages: u64,
    mended_pages: u64,
    skipped_copysets: u64,
    compared_records: u64,
    different_records: u64,
    started_unix_ms: u64,
    finished_unix_ms: u64,
}

impl From<m::Scrub> for ScrubView {
    fn from(s: m::Scrub) -> Self {
        let known = s.report.is_some();
        let r = s.report.unwrap_or_default();
        let state = match (known, s.ordered > 0, r.running) {
            (_, true, _) => "ordered",
            (false, ..) => "unknown",
            (.., true) => "running",
            _ if r.finished_unix_ms > 0 && r.finished_unix_ms >= r.started_unix_ms => "done",
            _ if r.finished_unix_ms == 0 && r.done_rows + r.order == 0 => "never",
            _ => "stopped",
        };
        Self {
            chunkserver: s.chunkserver,
            state,
            done_rows: r.done_rows,
            total_rows: r.total_rows,
            pages: r.pages,
            bad_pages: r.bad,
            mended_pages: r.mended,
            skipped_copysets: r.skipped,
            compared_records: r.compared,
            different_records: r.different,
            started_unix_ms: r.started_unix_ms,
            finished_unix_ms: r.finished_unix_ms,
        }
    }
}

impl ScrubView {
    /// Whether there will be more.
    pub(crate) fn is_under_way(&self) -> bool {
        matches!(self.state, "ordered" | "running")
    }

    /// Rows that are done, and that there are.
    pub(crate) fn rows(&self) -> (u64, u64) {
        (self.done_rows.min(self.total_rows), self.total_rows)
    }

    fn percent(&self) -> String {
        match self.total_rows {
            _ if self.state == "done" => "100%".to_owned(),
            0 => "-".to_owned(),
            total => format!("{}%", (self.done_rows * 100 / total).min(100)),
        }
    }
}

/// A table of them.
pub(crate) fn text(list: &Vec<ScrubView>) -> String {
    let now = clock::unix_ms();
    let ago = |at: u64| if at == 0 { "-".to_owned() } else { format!("{} s ago", now.saturating_sub(at) / 1000) };
    let mut table = Table::new(&["CHUNKSERVER", "STATE", "DONE", "PAGES", "BAD", "MENDED", "DIFFER", "SKIPPED", "STARTED", "FINISHED"]);
    for s in list {
        table.row([
            s.chunkserver.to_string(),
            s.state.to_owned(),
            s.percent(),
            s.pages.to_string(),
            s.bad_pages.to_string(),
            s.mended_pages.to_string(),
            s.different_records.to_string(),
            s.skipped_copysets.to_string(),
            ago(s.started_unix_ms),
            ago(s.finished_unix_ms),
        ]);
    }
    format!("{table}{}", counted(list.len(), "chunkserver"))
}

async fn list(mds: &Mds) -> Result<Vec<ScrubView>, CliError> {
    let reply = mds.list_scrubs().await.map_err(|e| call_failed("list scrubs", &e))?;
    Ok(reply.scrubs.into_iter().map(ScrubView::from).collect())
}

/// Whether all is well in the end.
///
/// # Errors
/// Bad pages that were not mended, records that differ, replicas that could not be looked at.
pub(crate) fn judge(verb: &str, views: &[ScrubView]) -> Result<(), CliError> {
    let left: u64 = views.iter().map(|s| s.bad_pages.saturating_sub(s.mended_pages)).sum();
    let skipped: u64 = views.iter().map(|s| s.skipped_copysets).sum();
    let different: u64 = views.iter().map(|s| s.different_records).sum();
    if left + skipped + different == 0 {
        return Ok(());
    }
    let what = format!(
        "{verb}: {left} bad pages could not be mended, {different} records differ from another replica's, {skipped} replicas were not in order"
    );
    Err(CliError::new(ErrorKind::Failure, what))
}

/// Waits until nothing is under way among `ids` (none: all), with a bar.
async fn watch(context: &Context, mds: &Mds, ids: &[u32]) -> Result<Vec<ScrubView>, CliError> {
    let mut shown = 0;
    let mut progress: Option<Progress> = None;
    loop {
        let all = list(mds).await?;
        let own: Vec<ScrubView> = all.into_iter().filter(|s| ids.is_empty() || ids.contains(&s.chunkserver)).collect();
        if !own.iter().any(ScrubView::is_under_way) {
            if let Some(bar) = &progress {
                bar.finish();
            }
            return Ok(own);
        }
        let total: u64 = own.iter().map(|s| s.total_rows).sum();
        let done: u64 = own.iter().map(|s| s.done_rows.min(s.total_rows)).sum();
        if own.iter().all(|s| s.state != "ordered") {
            let bar = progress.get_or_insert_with(|| Progress::items("scrub", total, context.out.is_json()));
            bar.advance(done.saturating_sub(shown));
            shown = shown.max(done);
        }
        tokio::time::sleep(LOOK).await;
    }
}

#[derive(Debug, Serialize)]
struct OrderView {
    order: u64,
    chunkservers: Vec<u32>,
}

async fn order(mds: &Mds, which: WhichArgs, cancel: bool) -> Result<OrderView, CliError> {
    let request = m::OrderScrubRequest { chunkservers: which.ids, pool: which.pool, cancel, ..Default::default() };
    let reply = mds.order_scrub(request).await.map_err(|e| call_failed("order a scrub", &e))?;
    Ok(OrderView { order: reply.order, chunkservers: reply.chunkservers })
}

/// Carries out a command of `ogee scrub`.
///
/// # Errors
/// The MDS does not answer or knows no such chunkserver; with `start --watch` also when bad pages were not mended.
pub(crate) async fn run(context: &Context, command: ScrubCommand) -> Result<(), CliError> {
    let mds = context.mds()?;
    match command {
        ScrubCommand::Start(StartArgs { which, watch: false }) => {
            let view = order(&mds, which, false).await?;
            context.out.result(&view, |v| {
                format!("{} scrub from the beginning; see: ogee scrub status --watch", counted(v.chunkservers.len(), "chunkserver"))
            })
        }
        ScrubCommand::Start(StartArgs { which, watch: true }) => {
            let ordered = order(&mds, which, false).await?;
            let views = watch(context, &mds, &ordered.chunkservers).await?;
            context.out.result(&views, text)?;
            judge("scrub", &views)
        }
        ScrubCommand::Status(args) => {
            let views = if args.watch { watch(context, &mds, &[]).await? } else { list(&mds).await? };
            context.out.result(&views, text)
        }
        ScrubCommand::Cancel(which) => {
            let view = order(&mds, which, true).await?;
            context.out.result(&view, |v| format!("{} stop their scrub", counted(v.chunkservers.len(), "chunkserver")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_of_a_scrub_follows_from_its_report() {
        let view = |ordered, report: Option<m::ScrubReport>| ScrubView::from(m::Scrub { chunkserver: 1, report, ordered, ..Default::default() });
        let report = m::ScrubReport { started_unix_ms: 5, total_rows: 200, done_rows: 50, ..Default::default() };
        assert_eq!(view(0, None).state, "unknown");
        assert_eq!(view(9, Some(report)).state, "ordered");
        let running = view(0, Some(m::ScrubReport { running: true, order: 9, ..report }));
        assert_eq!((running.state, running.percent()), ("running", "25%".to_owned()));
        assert_eq!(view(0, Some(m::ScrubReport { order: 9, ..report })).state, "stopped");
        assert_eq!(view(0, Some(m::ScrubReport { done_rows: 0, ..report })).state, "never");
        let done = view(0, Some(m::ScrubReport { order: 9, finished_unix_ms: 6, ..report }));
        assert_eq!((done.state, done.percent()), ("done", "100%".to_owned()));
    }
}
