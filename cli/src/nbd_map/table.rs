//! `/etc/ogee/nbdtab`: what is mapped at boot.
//!
//! ```text
//! # volume[@snapshot]   device or -   options of `ogee nbd map` without their dashes, or nothing
//! team/db               /dev/nbd0     connections=8,timeout=30
//! golden@v1             -             read-only
//! ```
//!
//! Invariants: all mistakes are reported at once, with their lines; nothing is mapped from a table with a mistake. Absent: which
//! cluster; that is `OGEE_MDS` or `--mds`.

use super::options::MapOptions;
use crate::error::{CliError, ErrorKind};
use ogee_common::name::VolumeRef;
use std::path::Path;

/// Where it is.
pub(crate) const TABLE_DEFAULT: &str = "/etc/ogee/nbdtab";
/// Lines that map something.
const ENTRIES_MAX: usize = 1024;

/// One line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// What.
    pub volume: VolumeRef,
    /// How.
    pub options: MapOptions,
}

/// Reads the table.
///
/// # Errors
/// It cannot be read ([`ErrorKind::NotFound`] if there is none), or has mistakes ([`ErrorKind::Usage`]).
pub(crate) fn read(path: &Path) -> Result<Vec<Entry>, CliError> {
    let text = std::fs::read_to_string(path).map_err(|e| CliError::file("read", path, e))?;
    parse(&text).map_err(|mistakes| {
        CliError::new(ErrorKind::Usage, format!("{}: {}", path.display(), mistakes.join("; ")))
    })
}

/// The entries, or every mistake with its line.
fn parse(text: &str) -> Result<Vec<Entry>, Vec<String>> {
    let (mut entries, mut mistakes) = (Vec::<Entry>::new(), vec![]);
    for (number, line) in (1..).zip(text.lines()) {
        let words: Vec<&str> = line.split('#').next().unwrap_or_default().split_whitespace().collect();
        if words.is_empty() {
            continue;
        }
        match entry(&words) {
            Ok(entry) if entries.iter().any(|other| other.volume == entry.volume) => {
                mistakes.push(format!("line {number}: {} is there twice", entry.volume));
            }
            Ok(entry) if entries.iter().any(|other| other.options.device.is_some() && other.options.device == entry.options.device) => {
                mistakes.push(format!("line {number}: {} is there twice", words[1]));
            }
            Ok(entry) => entries.push(entry),
            Err(mistake) => mistakes.push(format!("line {number}: {mistake}")),
        }
    }
    if entries.len() > ENTRIES_MAX {
        mistakes.push(format!("more than {ENTRIES_MAX} lines"));
    }
    if mistakes.is_empty() { Ok(entries) } else { Err(mistakes) }
}

fn entry(words: &[&str]) -> Result<Entry, String> {
    let (volume, device, options) = match *words {
        [volume, device] => (volume, device, ""),
        [volume, device, options] => (volume, device, options),
        _ => return Err("write VOLUME DEVICE [OPTIONS]".to_owned()),
    };
    let volume = VolumeRef::parse(volume).map_err(|e| format!("{volume}: {e}"))?;
    let device = (device != "-").then(|| format!("--device={device}"));
    let options = options.split(',').filter(|word| !word.is_empty() && *word != "-").map(|word| format!("--{word}"));
    let options = MapOptions::parse(device.into_iter().chain(options)).map_err(|e| {
        let said = e.render().to_string();
        let first = said.lines().next().unwrap_or_default();
        first.strip_prefix("error: ").unwrap_or(first).to_owned()
    })?;
    Ok(Entry { volume, options })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_mappings() {
        let text = "# mine\n\nteam/db /dev/nbd0 connections=8,timeout=30 # fast\n golden@v1\t-\tread-only\nplain -\nlast nbd3 -\n";
        let entries = parse(text).expect("good");
        let names: Vec<String> = entries.iter().map(|entry| entry.volume.to_string()).collect();
        assert_eq!(names, ["team/db", "golden@v1", "plain", "last"]);
        assert_eq!((entries[0].options.device, entries[0].options.connections, entries[0].options.timeout), (Some(0), 8, 30));
        assert!(entries[1].options.read_only && entries[1].options.device.is_none());
        assert_eq!(entries[2].options, MapOptions::parse(std::iter::empty()).expect("defaults"));
        assert_eq!(entries[3].options.device, Some(3));
    }

    #[test]
    fn every_mistake_is_named_with_its_line() {
        let text = "alone\na /dev/sda\nb - colour=red\nc$ -\nd nbd1\nd -\ne nbd1\nf - x y\n";
        let mistakes = parse(text).expect_err("mistakes");
        let lines: Vec<&str> = mistakes.iter().map(|mistake| mistake.split(':').next().unwrap_or_default()).collect();
        assert_eq!(lines, ["line 1", "line 2", "line 3", "line 4", "line 6", "line 7", "line 8"], "{mistakes:?}");
        assert!(mistakes.iter().all(|mistake| !mistake.contains('\n')), "{mistakes:?}");
    }
}
