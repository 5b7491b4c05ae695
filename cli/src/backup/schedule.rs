//! `ogee backup schedule`: backups that are made every so often.

use crate::connect::{Context, Mds};
use crate::error::{CliError, ErrorKind};
use crate::names;
use crate::output::{Table, counted, date};
use crate::sdk_error::call_failed;
use clap::{ArgGroup, Args, Subcommand};
use ogee_common::name::VolumePath;
use ogee_common::size::parse_bytes;
use ogee_proto::mds as m;
use ogee_snapclone::service::{BackupTask, Keep, Work};
use serde::Serialize;
use std::time::Duration;

/// The commands of `ogee backup schedule`.
#[derive(Debug, Clone, Subcommand)]
pub(crate) enum ScheduleCommand {
    /// Have a volume backed up every so often, or change that
    #[command(after_help = "Example:\n  ogee backup schedule set vm1 --repo main --every 6h --keep-last 4 --keep-daily 7 --keep-weekly 4\n\n\
        Backups are due at the multiples of the interval (6h: 0, 6, 12 and 18 o'clock UTC), one for each; none while the last one\n\
        runs. Those that are not to be kept are removed after each backup; ogee backup gc frees their space. Backups that were not\n\
        made by the schedule stay.")]
    Set(SetArgs),
    /// List the schedules
    #[command(after_help = "Example:\n  ogee backup schedule ls")]
    Ls,
    /// End a schedule; backups and tasks stay
    #[command(after_help = "Example:\n  ogee backup schedule rm vm1")]
    Rm(RmArgs),
}

/// Arguments of `backup schedule set`.
#[derive(Debug, Clone, Args)]
#[command(group = ArgGroup::new("keep").args(["keep_last", "keep_hourly", "keep_daily", "keep_weekly"]).multiple(true).required(true))]
pub(crate) struct SetArgs {
    /// The volume
    #[arg(value_parser = VolumePath::parse)]
    volume: VolumePath,
    /// Time between two backups: 30m, 6h, 1d
    #[arg(long, value_parser = parse_interval, value_name = "TIME")]
    every: Duration,
    /// The newest backups that stay
    #[arg(long, default_value_t = 0, value_name = "N", hide_default_value = true)]
    keep_last: u32,
    /// Hours of which the newest backup stays
    #[arg(long, default_value_t = 0, value_name = "N", hide_default_value = true)]
    keep_hourly: u32,
    /// Days of which the newest backup stays
    #[arg(long, default_value_t = 0, value_name = "N", hide_default_value = true)]
    keep_daily: u32,
    /// Weeks of which the newest backup stays
    #[arg(long, default_value_t = 0, value_name = "N", hide_default_value = true)]
    keep_weekly: u32,
    /// Bytes a second sent to the repository, at most: 50MiB
    #[arg(long, value_parser = parse_bytes, value_name = "BYTES")]
    throttle: Option<u64>,
    /// The repository's name in snapclone's configuration
    #[arg(long, value_parser = names::plain, value_name = "NAME")]
    repo: String,
}

/// Arguments of `backup schedule rm`.
#[derive(Debug, Clone, Args)]
pub(crate) struct RmArgs {
    /// The volume
    #[arg(value_parser = VolumePath::parse)]
    volume: VolumePath,
}

/// A schedule as programs see it.
#[derive(Debug, Serialize)]
struct ScheduleView {
    volume: String,
    repository: String,
    every_seconds: u64,
    keep_last: u32,
    keep_hourly: u32,
    keep_daily: u32,
    keep_weekly: u32,
    last_due_unix_ms: u64,
    next_due_unix_ms: u64,
    /// 0: none yet.
    last_task: u64,
    created_unix_ms: u64,
}

impl From<m::Schedule> for ScheduleView {
    fn from(s: m::Schedule) -> Self {
        let keep = match Work::parse(&s.kind, &s.arguments) {
            Ok(Work::Backup(BackupTask { keep: Some(keep), .. })) => keep,
            _ => Keep::default(),
        };
        Self {
            volume: s.name,
            repository: s.repository,
            every_seconds: s.every_ms / 1000,
            keep_last: keep.last,
            keep_hourly: keep.hourly,
            keep_daily: keep.daily,
            keep_weekly: keep.weekly,
            last_due_unix_ms: s.last_due_unix_ms,
            next_due_unix_ms: s.last_due_unix_ms.saturating_add(s.every_ms),
            last_task: s.last_task,
            created_unix_ms: s.created_unix_ms,
        }
    }
}

/// `90s`, `30m`, `6h`, `1d`.
fn parse_interval(text: &str) -> Result<Duration, String> {
    let wanted = || format!("{text:?} is no time; write 90s, 30m, 6h or 1d");
    let (number, unit) = text.split_at_checked(text.len().saturating_sub(1)).ok_or_else(wanted)?;
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err(wanted()),
    };
    let number: u64 = number.parse().map_err(|_| wanted())?;
    number.checked_mul(seconds).map(Duration::from_secs).ok_or_else(wanted)
}

/// As [`parse_interval`] reads it.
fn interval(seconds: u64) -> String {
    let units = [(86_400, "d"), (3600, "h"), (60, "m")];
    let fits = units.into_iter().find(|(unit, _)| seconds > 0 && seconds.is_multiple_of(*unit));
    fits.map_or_else(|| format!("{seconds}s"), |(unit, name)| format!("{}{name}", seconds / unit))
}

/// Carries out a command of `ogee backup schedule`.
///
/// # Errors
/// There is no such volume or schedule, or the MDS does not answer.
pub(crate) async fn run(context: &Context, command: ScheduleCommand) -> Result<(), CliError> {
    let mds = context.mds()?;
    match command {
        ScheduleCommand::Set(args) => set(context, &mds, args).await,
        ScheduleCommand::Ls => ls(context, &mds).await,
        ScheduleCommand::Rm(RmArgs { volume }) => {
            let gone = mds.delete_schedule(m::DeleteScheduleRequest { name: volume.to_string() }).await;
            gone.map_err(|e| call_failed(&format!("end the schedule of {volume}"), &e))?;
            context.out.result(&serde_json::json!({"removed": volume.to_string()}), |_| format!("{volume} is not backed up by a schedule any more"))
        }
    }
}

async fn set(context: &Context, mds: &Mds, args: SetArgs) -> Result<(), CliError> {
    let volume = args.volume.to_string();
    let doing = format!("schedule backups of {volume}");
    let found = mds.stat_volume(m::StatVolumeRequest { path: volume.clone() }).await;
    found.map_err(|e| call_failed(&doing, &e))?;
    let keep = Keep { last: args.keep_last, hourly: args.keep_hourly, daily: args.keep_daily, weekly: args.keep_weekly };
    if !keep.keeps_any() {
        return Err(CliError::new(ErrorKind::Usage, format!("{doing}: at least one backup must stay: --keep-last 1")));
    }
    let throttle = args.throttle.unwrap_or(0);
    let work = Work::Backup(BackupTask { volume: volume.clone(), snapshot: None, throttle, full: false, keep: Some(keep) });
    let request = m::SetScheduleRequest {
        name: volume,
        kind: work.kind().to_owned(),
        repository: args.repo,
        arguments: work.arguments(),
        every_ms: u64::try_from(args.every.as_millis()).unwrap_or(u64::MAX),
    };
    let view = ScheduleView::from(mds.set_schedule(request).await.map_err(|e| call_failed(&doing, &e))?);
    context.out.result(&view, |v| format!("{} is backed up every {} to {}, next {}", v.volume, interval(v.every_seconds), v.repository, date(v.next_due_unix_ms)))
}

async fn ls(context: &Context, mds: &Mds) -> Result<(), CliError> {
    let mut list: Vec<ScheduleView> = vec![];
    loop {
        let start_after = list.last().map_or_else(String::new, |s| s.volume.clone());
        let page = mds.list_schedules(m::ListSchedulesRequest { start_after }).await.map_err(|e| call_failed("list schedules", &e))?;
        let more = page.more && !page.schedules.is_empty();
        list.extend(page.schedules.into_iter().map(ScheduleView::from));
        if !more {
            break;
        }
    }
    context.out.result(&list, |list| {
        let mut table = Table::new(&["VOLUME", "REPOSITORY", "EVERY", "LAST", "HOURLY", "DAILY", "WEEKLY", "NEXT", "TASK"]);
        for s in list {
            table.row([
                s.volume.clone(),
                s.repository.clone(),
                interval(s.every_seconds),
                s.keep_last.to_string(),
                s.keep_hourly.to_string(),
                s.keep_daily.to_string(),
                s.keep_weekly.to_string(),
                date(s.next_due_unix_ms),
                if s.last_task == 0 { String::new() } else { s.last_task.to_string() },
            ]);
        }
        format!("{table}{}", counted(list.len(), "schedule"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_come_back_and_nonsense_does_not() {
        for text in ["10s", "90s", "30m", "6h", "1d", "36h"] {
            assert_eq!(interval(parse_interval(text).expect(text).as_secs()), text);
        }
        for bad in ["", "6", "h", "-1h", "1w", "6 h", "99999999999999999999d", "é"] {
            assert!(parse_interval(bad).is_err(), "{bad}");
        }
    }
}
